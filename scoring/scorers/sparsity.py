"""Scorers that run a language model: activation sparsity, and the losses and entropy that it is measured against.

Contract: `score` takes data and a prompt and gives `Scores`; `difficulty` rises with what the scorer calls hard (sparser,
higher loss, higher entropy). The table keeps every metric of the pass; another one is a column away (`Scores.by`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsort.kernels.backend import sparsity_implementation
from sparsort.kernels.sparsity.metrics import METRIC_NAMES, METRICS, ROW_REASONS, check_l0_threshold
from sparsort.scoring.data.rows import SAMPLE_ROWS, Row, RowSource
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
    span_of,
    whole_texts,
)
from sparsort.scoring.scorers.pooling import (
    OutlierFit,
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
    """What the model scorers share: the model, loaded once at construction.

    Args:
        model: a `ModelSpec`; or what its `name` takes: a hub id, a folder, a `.gguf` file, "demo" (the embedded model), a
            transformers model with its `tokenizer`.
        options: fields of `ModelSpec`: `tokenizer`, `dtype`, `device`, `token_budget`, `revision`, `trust_remote_code`.
    """

    def __init__(self, model: Any = "demo", **options: Unpack[ModelOptions]) -> None:
        spec = ModelSpec.of(model, **options)
        self.loaded = spec.load()
        self.backbone = Backbone(self.loaded, token_budget=spec.token_budget)
        if spec.is_named:
            self.backbone.mark_as_own()

    def prepare(self, source: RowSource, request: Request, previous: dict[str, Any] | None) -> ModelJob:
        """The job that scores this source's shards."""
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

    def check_cache(self) -> None:
        """Refuse a model, or a scorer, whose values cannot be kept, before any row is read."""
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
    """Scores shards of rows with a model: text, ids, plan, forward passes, a table."""

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
        """One table row a row, in order, whatever became of it."""
        encoded = self.encode(rows)
        todo = [number for number, item in enumerate(encoded) if item.problem is None]
        values = np.full((len(rows), len(self.metrics)), np.nan)
        status = [item.problem[0] if item.problem else "ok" for item in encoded]
        reason = [item.problem[1] if item.problem else "" for item in encoded]
        advance(len(rows) - len(todo))
        if todo:
            kept = [encoded[number] for number in todo]
            found, reasons = self._cached_or_read(kept, advance)
            values[todo] = found
            for number, why in zip(todo, reasons, strict=True):
                if why:
                    status[number], reason[number] = why, _SENTENCES[why]
        metric = self.provenance["metric"]
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
        """What `read` gives, of which only what the cache does not hold is read."""
        cache = self.request.cache
        if cache is None:
            return self.read(encoded, self.plan(encoded), advance)

        def read(numbers: list[int]) -> tuple[NDArray[np.float64], list[str]]:
            wanted = [encoded[number] for number in numbers]
            return self.read(wanted, self.plan(wanted), advance)

        before = cache.from_cache
        context = context_of(self.backbone, **self.measured())
        values, reasons = cache.through(context, [key_of(item) for item in encoded], read)
        found = cache.from_cache - before
        advance(found)
        environment = self.provenance["environment"]
        environment["rows_from_cache"] = environment.get("rows_from_cache", 0) + found
        return values, reasons

    def measured(self) -> dict[str, Any]:
        """What `read` measures, as JSON values: all that its values depend on besides the model and the token ids."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its values depend on")

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Token ids of the rows; an answer that is wanted and empty is a problem of the row."""
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

    wants_answer = False

    def plan(self, encoded: Sequence[Encoded]) -> Plan:
        """The plan of a shard's rows; every token is computed somewhere, in a shared head or in the row."""
        return self.backbone.plan([item.ids for item in encoded])

    @abstractmethod
    def read(self, encoded: Sequence[Encoded], how: Plan, advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        """(n, metrics) values and each row's reason code name ("" for ok)."""


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
        metric: the metric behind `difficulty`, one of `sparsort.kernels.sparsity.metrics.METRICS`.
        outliers: "none", "drop:n" (leave out the n widest dimensions) or "rms" (standardise each), fitted on a sample.
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
        pooling: str = "last",
        metric: str = "gini",
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
            same = all((previous or {}).get(key) == provenance[key] for key in ("weights", "site", "pooling"))
            job.outliers = self._fit(job, source, previous["outliers"] if previous and same else None)
            provenance["outliers"] = job.outliers.record
        return job

    def _fit(self, job: _SparsityJob, source: RowSource, recorded: dict[str, Any] | None) -> OutlierFit:
        """The outlier rule as a run in the same folder or `like` has recorded it, or fitted on a sample of the source."""
        if recorded and recorded.get("rule") == self.outliers:
            return restore_outliers(recorded, self.backbone.width(self.site))
        kept = [item for item in job.encode(source.sample(SAMPLE_ROWS)) if item.problem is None]
        cache = job.request.cache
        if cache is None or not kept:
            count, mean_square_H = self._mean_square(job, kept)
            return fit_outliers(self.outliers, mean_square_H, count)

        def read(_numbers: list[int]) -> tuple[NDArray[np.float64], list[str]]:
            count, mean_square_H = self._mean_square(job, kept)
            return np.concatenate([[count], mean_square_H])[None], ["" if count else "no state"]

        context = context_of(self.backbone, mean_square=True, site=self.site.name, pooling=self.pooling)
        (values,), _ = cache.through(context, [key_of_all(kept)], read, rows_of_key=len(kept))
        return fit_outliers(self.outliers, values[1:], int(values[0]))

    def _mean_square(self, job: _SparsityJob, kept: Sequence[Encoded]) -> tuple[int, NDArray[np.float64]]:
        """How many states these rows have where the site is read, and the (width,) mean square of those."""
        how = job.plan(kept)
        squares, span = SquareSum(exact=True), span_of(self.pooling, whole_texts(kept), how)
        for piece in self.backbone.walk([item.ids for item in kept], how, [self.site]):
            batch, token = span.pick(piece)
            if len(batch):
                squares.add(states_at(piece.states[self.site.name], batch, token), span.shares(piece)[batch])
        return squares.count, squares.mean_H()


class _SparsityJob(ModelJob):
    """Reads the sparsity metrics of one site."""

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
        # A shared head must not reach into an answer, whose tokens are read row by row.
        depth = min((item.answer_start for item in encoded), default=0) if self.wants_answer else None
        return self.backbone.plan([item.ids for item in encoded], max_depth=depth)

    def read(self, encoded: Sequence[Encoded], how: Plan, advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        measurement = Measurement(self.site.name, self.pooling, str(self.outliers.record["rule"]))
        collector = StateCollector(
            whole_texts(encoded),
            how,
            [measurement],
            fits={measurement: self.outliers},
            l0_threshold=self.threshold,
            exact=True,
        )
        ids = [item.ids for item in encoded]
        for piece in self.backbone.walk(ids, how, [self.site]):
            collector.add(piece)
            advance(finished_rows(piece, ids))
        values, codes = collector.values()[measurement]
        return values, [ROW_REASONS[code] for code in codes]
