"""The base of all scorers that run a language model, and the scorer of activation sparsity.

Contract: `score` takes data and a prompt and returns `Scores`. Their `difficulty` rises with the scorer's notion of hard:
sparser, higher loss, higher entropy. The table holds every metric of the forward pass, so the difficulty can be taken from
another one without a second pass (`Scores.by`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsort.kernels.backend import sparsity_implementation
from sparsort.kernels.sparsity.metrics import METRIC_NAMES, METRICS, ROW_REASONS, MetricName, check_l0_threshold
from sparsort.scoring.data.digests import SAMPLE_ROWS
from sparsort.scoring.data.rows import Row, RowSource
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.batching import Plan
from sparsort.scoring.model.early_checks import check_max_length, check_model
from sparsort.scoring.model.sites import check_site
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.prompt import Encoded, Encoder, identify_tokenizer
from sparsort.scoring.scorers.base import Advance, Request, Scorer, versions
from sparsort.scoring.scorers.collect import (
    Measurement,
    SquareSum,
    StateCollector,
    finished_rows,
    spans_of,
    whole_texts,
)
from sparsort.scoring.scorers.pooling import (
    OutlierFit,
    Pooling,
    check_answer,
    check_outlier_rule,
    check_pooling,
    fit_outliers,
    restore_outliers,
)
from sparsort.scoring.scorers.run_shards import Job
from sparsort.scoring.scorers.spans import states_at
from sparsort.scoring.store.row_cache import context_of, key_of, key_of_all
from sparsort.scoring.store.score_tables import score_table


class ModelScorer(Scorer):
    """A scorer that runs a model, which is loaded once, at construction.

    Args:
        model: a `ModelSpec`; or a value of its `name`: a hub id, a folder, a `.gguf` file, "demo" (the embedded model), or a
            transformers model with its `tokenizer`.
        options: fields of `ModelSpec`: `tokenizer`, `dtype`, `device`, `token_budget`, `revision`, `trust_remote_code`.
    """

    def __init__(self, model: Any = "demo", **options: Unpack[ModelOptions]) -> None:
        spec = ModelSpec.of(model, **options)
        self.loaded = spec.load()
        self.backbone = Backbone(self.loaded, token_budget=spec.token_budget)
        # A model in memory may be changed by its owner, so its values cannot be cached.
        if spec.is_named:
            self.backbone.mark_as_own()

    def prepare(self, source: RowSource, request: Request, previous: dict[str, Any] | None) -> ModelJob:
        """Create the job that scores the shards of this source."""
        # A limit above the model's own context is refused, not clipped.
        own = self.backbone.max_length
        check_max_length(request.max_length, own, self.loaded.name)
        limit = request.max_length if request.max_length is not None else own
        encoder = Encoder(
            self.loaded.tokenizer,
            max_length=limit,
            truncation=request.truncation,
            chat=request.need_prompt(source).is_chat,
        )
        if request.cache is not None:
            self.check_cache()
        return self._job(source, request, encoder, previous)

    def shown(self) -> dict[str, Any]:
        return {"model": self.loaded.name}

    def check_cache(self) -> None:
        """Refuse a model, or a scorer, whose values cannot be cached, before any row is read."""
        context_of(self.backbone)

    @abstractmethod
    def _job(
        self, source: RowSource, request: Request, encoder: Encoder, previous: dict[str, Any] | None
    ) -> ModelJob: ...

    def _provenance(
        self, request: Request, encoder: Encoder, orientation: dict[str, int], previous: dict[str, Any] | None
    ) -> dict[str, Any]:
        loaded = self.loaded
        recorded = (previous or {}).get("tokenizer")
        return request.provenance(self.kind, orientation) | {
            "weights": loaded.weights,
            "tokenizer": identify_tokenizer(loaded.tokenizer, chat=request.prompt.is_chat, recorded=recorded),
            "dtype": str(loaded.dtype.value).removeprefix("torch."),
            "max_length": encoder.max_length,
            "truncation": encoder.truncation,
            "environment": versions()
            | {
                "model": loaded.name,
                "device": str(loaded.device.value),
                "dtype_reason": loaded.dtype.reason,
                "token_budget": self.backbone.token_budget,
                "prefix_sharing": self.backbone.can_continue,
            },
        }


class ModelJob(Job):
    """Scores shards of rows with a model: renders and encodes the rows, plans and runs the passes, and makes the table."""

    # Whether a row with an empty answer has a problem.
    wants_answer = False

    def __init__(
        self,
        scorer: ModelScorer,
        request: Request,
        encoder: Encoder,
        provenance: dict[str, Any],
        metrics: Sequence[str],
    ) -> None:
        self.backbone = scorer.backbone
        self.request = request
        self.encoder = encoder
        self.provenance = provenance
        self.metrics = tuple(metrics)

    def score_rows(self, rows: Sequence[Row], advance: Advance) -> pa.Table:
        """Return a table with one row for each of `rows`, in order, including rows that could not be scored."""
        encoded = self.encode(rows)
        todo = [number for number, item in enumerate(encoded) if item.problem is None]
        values = np.full((len(rows), len(self.metrics)), np.nan)
        status = [item.problem[0] if item.problem else "ok" for item in encoded]
        reason = [item.problem[1] if item.problem else "" for item in encoded]
        advance(len(rows) - len(todo))
        if todo:
            values[todo], codes = self._cached_or_read([encoded[number] for number in todo], advance)
            for number, code in zip(todo, codes, strict=True):
                if code:
                    status[number], reason[number] = code, _SENTENCES[code]
        metric = self.provenance["metric"]
        # The orientation is −1 for a metric that is lower for sparser states.
        difficulty = self.provenance["orientation"][metric] * values[:, self.metrics.index(metric)]
        for number in np.flatnonzero(np.isinf(difficulty)).tolist():
            # A sum such as L1 can overflow where the state itself is finite.
            difficulty[number], status[number] = np.nan, "not_finite"
            reason[number] = f"{metric} of this state is beyond the numbers that can be held"
        return score_table(
            rows,
            difficulty=difficulty,
            status=status,
            reason=reason,
            n_tokens=[len(item.ids) for item in encoded],
            n_truncated=[item.n_dropped for item in encoded],
            metrics={name: values[:, column] for column, name in enumerate(self.metrics)},
        )

    def _cached_or_read(self, encoded: Sequence[Encoded], advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        """Return what `read` returns; rows whose values the cache holds are not read."""
        cache = self.request.cache
        if cache is None:
            return self.read(encoded, self.plan(encoded), advance)

        def read(numbers: list[int]) -> tuple[NDArray[np.float64], list[str]]:
            wanted = [encoded[number] for number in numbers]
            return self.read(wanted, self.plan(wanted), advance)

        before = cache.from_cache
        context = context_of(self.backbone, **self.measured())
        values, reasons = cache.through(context, [key_of(item) for item in encoded], read)
        n_cached = cache.from_cache - before
        advance(n_cached)
        environment = self.provenance["environment"]
        environment["rows_from_cache"] = environment.get("rows_from_cache", 0) + n_cached
        return values, reasons

    def measured(self) -> dict[str, Any]:
        """Return everything that the values of `read` depend on, besides the model and the token ids, as JSON values."""
        raise NotImplementedError(f"{type(self).__name__} does not state what its values depend on")

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Render the rows and return their token ids; an empty answer is a problem of its row if `wants_answer`."""
        prompt = self.request.prompt
        rendered = [prompt.render(row.fields, where=row.name, tokenizer=self.encoder.tokenizer) for row in rows]
        encoded = self.encoder.encode(rendered)
        if not self.wants_answer:
            return encoded
        return [
            Encoded(ids=e.ids, n_lead=e.n_lead, answer_start=e.answer_start, problem=("empty", "the answer is empty"))
            if e.problem is None and e.answer_start >= len(e.ids)
            else e
            for e in encoded
        ]

    def plan(self, encoded: Sequence[Encoded]) -> Plan:
        """Plan the batches of a shard's rows."""
        return self.backbone.plan([item.ids for item in encoded])

    @abstractmethod
    def read(self, encoded: Sequence[Encoded], plan: Plan, advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        """Run the model; returns values, (n, metrics), and the name of each row's reason, "" for a row with values."""


# The name of a reason → the sentence in the table's column "reason".
_SENTENCES = {
    "zero": "every coordinate of the state is zero, so it has no sparsity",
    "not_finite": "the model's state or loss is NaN or infinite",
}


class SparsityScorer(ModelScorer):
    """Ranks examples by how sparse the model's hidden state is: the sparser, the harder (arXiv 2603.03415).

    Args:
        model: see `ModelScorer`, with its other arguments.
        site: "pre_norm", "post_norm", "mlp", "mlp:N" or "layer:N" (see `sparsort.scoring.model.sites`).
        pooling: "last", "mean_metric", "mean_state" or "answer" (see `sparsort.scoring.scorers.pooling`).
        metric: the metric that `difficulty` is made of, one of `sparsort.kernels.sparsity.metrics.METRICS`.
        outliers: "none", "drop:n" (remove the n dimensions of largest RMS) or "rms" (divide each by its RMS), fitted on a
            sample.
        l0_threshold: threshold of `l0_absolute`, in the units of the state.

    Example:
        >>> scorer = SparsityScorer("demo", site="pre_norm", pooling="last", metric="gini")
        >>> scores = scorer.score(rows, prompt="Question: {question}\\nAnswer:")
    """

    kind: ClassVar[str] = "sparsity"

    def __init__(
        self,
        model: Any = "demo",
        *,
        site: str = "pre_norm",
        pooling: Pooling = "last",
        metric: MetricName = "gini",
        outliers: str = "none",
        l0_threshold: float = 1.0,
        **options: Unpack[ModelOptions],
    ) -> None:
        METRICS.check(metric)
        check_l0_threshold(l0_threshold)
        self.pooling = check_pooling(pooling)
        self.outliers = check_outlier_rule(outliers)
        self.metric = metric
        self.l0_threshold = l0_threshold
        check_site(site)
        spec = ModelSpec.of(model, **options)
        check_model(spec, sites=[site], outliers=[outliers])
        super().__init__(spec)
        self.site = self.backbone.site(site)

    def shown(self) -> dict[str, Any]:
        settings = {"site": self.site.name, "pooling": self.pooling, "metric": self.metric, "outliers": self.outliers}
        return super().shown() | settings

    def _job(self, source: RowSource, request: Request, encoder: Encoder, previous: dict[str, Any] | None) -> ModelJob:
        check_answer([self.pooling], request.prompt.answer)
        orientation = {name: entry.sign for name, entry in METRICS.items()}
        provenance = self._provenance(request, encoder, orientation, previous) | {
            "metric": self.metric,
            "site": self.site.name,
            "pooling": self.pooling,
            "outliers": {"rule": "none"},
            "l0_threshold": self.l0_threshold,
        }
        provenance["environment"]["sparsity"] = str(sparsity_implementation(self.backbone.device).value)
        job = _SparsityJob(self, request, encoder, provenance)
        if self.outliers != "none":
            # A recorded fit holds for the same states only, whatever else has changed since.
            same = all((previous or {}).get(key) == provenance[key] for key in ("weights", "site", "pooling"))
            job.outliers = self._fit(job, source, previous["outliers"] if previous and same else None)
            provenance["outliers"] = job.outliers.record
        return job

    def _fit(self, job: _SparsityJob, source: RowSource, recorded: dict[str, Any] | None) -> OutlierFit:
        """Return the outlier rule that an earlier run or `like` recorded; without one, fit it on a sample of the source."""
        if recorded and recorded.get("rule") == self.outliers:
            return restore_outliers(recorded, self.backbone.width(self.site))
        sample = [item for item in job.encode(source.sample(SAMPLE_ROWS)) if item.problem is None]
        cache = job.request.cache
        if cache is None or not sample:
            count, mean_square_H = self._mean_square(job, sample)
            return fit_outliers(self.outliers, mean_square_H, count)

        # The cache holds rows of numbers: the whole sample is one row, of the number of states and their mean square.
        def read(_numbers: list[int]) -> tuple[NDArray[np.float64], list[str]]:
            count, mean_square_H = self._mean_square(job, sample)
            return np.concatenate([[count], mean_square_H])[None], ["" if count else "no state"]

        context = context_of(self.backbone, mean_square=True, site=self.site.name, pooling=self.pooling)
        (values,), _ = cache.through(context, [key_of_all(sample)], read, rows_of_key=len(sample))
        return fit_outliers(self.outliers, values[1:], int(values[0]))

    def _mean_square(self, job: _SparsityJob, sample: Sequence[Encoded]) -> tuple[int, NDArray[np.float64]]:
        """Return the number of states that the pooling reads in these rows, and their mean square, (width,)."""
        plan = job.plan(sample)
        squares, spans = SquareSum(exact=True), spans_of(self.pooling, whole_texts(sample), plan)
        for piece in self.backbone.walk([item.ids for item in sample], plan, [self.site]):
            batch, token = spans.pick(piece)
            if len(batch):
                squares.add(states_at(piece.states[self.site.name], batch, token), spans.shares(piece)[batch])
        return squares.count, squares.mean_H()


class _SparsityJob(ModelJob):
    """Measures the sparsity of one site under one pooling and outlier rule."""

    def __init__(self, scorer: SparsityScorer, request: Request, encoder: Encoder, provenance: dict[str, Any]) -> None:
        super().__init__(scorer, request, encoder, provenance, METRIC_NAMES)
        self.site, self.pooling, self.threshold = scorer.site, scorer.pooling, scorer.l0_threshold
        self.wants_answer = scorer.pooling == "answer"
        self.outliers = OutlierFit(scale_H=None, record={"rule": "none"})

    def measured(self) -> dict[str, Any]:
        return {
            "metrics": list(METRICS),
            "site": self.site.name,
            "pooling": self.pooling,
            "l0_threshold": self.threshold,
            "outliers": self.outliers.record,
            "sparsity": str(sparsity_implementation(self.backbone.device).value),
        }

    def plan(self, encoded: Sequence[Encoded]) -> Plan:
        # A shared head must end before every answer, because rows that share it may begin their answers at different tokens.
        depth = min((item.answer_start for item in encoded), default=0) if self.wants_answer else None
        return self.backbone.plan([item.ids for item in encoded], max_depth=depth)

    def read(self, encoded: Sequence[Encoded], plan: Plan, advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        measurement = Measurement(self.site.name, self.pooling, str(self.outliers.record["rule"]))
        collector = StateCollector(
            whole_texts(encoded),
            plan,
            [measurement],
            fits={measurement: self.outliers},
            l0_threshold=self.threshold,
            exact=True,
        )
        ids = [item.ids for item in encoded]
        for piece in self.backbone.walk(ids, plan, [self.site]):
            collector.add(piece)
            advance(finished_rows(piece, ids))
        values, codes = collector.values()[measurement]
        return values, [ROW_REASONS[code] for code in codes]
