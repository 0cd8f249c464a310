"""Every candidate score of every row from one forward pass: sites × poolings × metrics × outlier rules, and the model's own loss.

Contract: `CandidateScorer` is a scorer, so its table is durable, resumable and refused under other settings as any other; it
has a column a candidate, named `site/pooling/rule/metric`, and with an answer also `answer_loss` (mean negative
log-likelihood in nats of the answer's tokens) and `answer_tokens`. `n_tokens` counts the prompt. A candidate's column is what
`SparsityScorer` with its options gives: poolings `last`, `mean_metric` and `mean_state` read the prompt alone, `answer` the
answer behind it.

One pass: prompt and answer run as one text, since the prompt's states cannot see the answer. Where tokenising them together
changes the prompt's own tokens (a token straddles the border) that row is read twice, alone and with its answer. The outlier
rules are fitted on a sample of the source, which is scored in the same pass (`candidate_job`); the fits are in the
provenance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack, get_args

from sparsort.errors import SparsortError
from sparsort.kernels.backend import sparsity_implementation
from sparsort.kernels.sparsity.metrics import METRICS, check_l0_threshold
from sparsort.scoring.data.rows import RowSource
from sparsort.scoring.model.early_checks import check_model
from sparsort.scoring.model.head import Head
from sparsort.scoring.model.sites import check_site
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.prompt import Encoder
from sparsort.scoring.scorers.base import Request
from sparsort.scoring.scorers.candidate_job import LOSS, CandidateJob
from sparsort.scoring.scorers.collect import Measurement
from sparsort.scoring.scorers.pooling import Pooling, check_answer, check_outlier_rule, check_pooling
from sparsort.scoring.scorers.sparsity import ModelJob, ModelScorer

SITES = ("pre_norm", "post_norm", "mlp")
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
OUTLIERS = ("none", "drop:3", "rms")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One score by its definition, apart from model and prompt."""

    site: str
    pooling: str
    outliers: str
    metric: str

    @property
    def name(self) -> str:
        """The column that holds it."""
        return f"{self.site}/{self.pooling}/{self.outliers}/{self.metric}"

    @property
    def reads_answer(self) -> bool:
        """Whether it is one of the answer's tokens."""
        return self.pooling == "answer"

    @classmethod
    def of(cls, name: str) -> Candidate:
        """The candidate of a column.

        Raises:
            SparsortError: the name is not that of a candidate.
        """
        parts = name.split("/")
        if len(parts) != 4 or parts[3] not in METRICS:
            raise SparsortError(f"{name!r} names no candidate; expected site/pooling/rule/metric.")
        return cls(site=parts[0], pooling=parts[1], outliers=parts[2], metric=parts[3])


class CandidateScorer(ModelScorer):
    """Scores rows by every candidate at once.

    Args:
        model: see `ModelScorer`, with its other arguments.
        sites: where to read; None for those of `SITES` that this model has.
        poolings: None for all, `answer` only where the request has one.
        outliers: the outlier rules.
        own_loss: read the model's loss on the answer, where the request has one.
        l0_threshold: threshold of `l0_absolute`, in the units of the state.

    Raises:
        SparsortError: an unknown name, nothing to measure, or a site that this model does not have.
    """

    kind: ClassVar[str] = "candidates"

    def __init__(
        self,
        model: Any = "demo",
        *,
        sites: Sequence[str] | None = None,
        poolings: Sequence[str] | None = None,
        outliers: Sequence[str] = OUTLIERS,
        own_loss: bool = True,
        l0_threshold: float = 1.0,
        **options: Unpack[ModelOptions],
    ) -> None:
        check_grid(sites, poolings, outliers)
        check_l0_threshold(l0_threshold)
        spec = ModelSpec.of(model, **options)
        check_model(spec, sites=sites or SITES[:1], outliers=outliers)
        super().__init__(spec)
        self.poolings = [check_pooling(name) for name in _distinct(poolings)] if poolings is not None else None
        self.outliers, self.own_loss, self.l0_threshold = _distinct(outliers), own_loss, l0_threshold
        self.notes: list[str] = []
        self.sites = {name: self.backbone.site(name) for name in self._names(sites)}

    def check_cache(self) -> None:
        raise SparsortError("cache= has no effect on candidates, which are kept in a score folder. Pass out= instead.")

    def _names(self, asked: Sequence[str] | None) -> list[str]:
        if asked is not None:
            return _distinct(asked)
        found = []
        for name in SITES:
            try:
                found.append(self.backbone.site(name).name)
            except SparsortError as error:
                self.notes.append(f"left out: {error}")
        return found

    def _job(self, source: RowSource, request: Request, encoder: Encoder, previous: dict[str, Any] | None) -> ModelJob:
        has_answer = request.prompt.answer is not None
        poolings = self.poolings or [name for name in POOLINGS if has_answer or name != "answer"]
        check_answer(poolings, request.prompt.answer)
        measurements = [
            Measurement(site, pooling, rule) for site in self.sites for pooling in poolings for rule in self.outliers
        ]
        head = Head(self.loaded.model, self.backbone.config, self.loaded.name) if has_answer and self.own_loss else None
        orientation = {"/".join((*m, name)): metric.sign for m in measurements for name, metric in METRICS.items()}
        provenance = self._provenance(request, encoder, orientation | ({LOSS: 1} if head else {}), previous) | {
            "metric": "/".join((*measurements[0], "gini")),
            "sites": list(self.sites),
            "poolings": poolings,
            "outliers": self.outliers,
            "l0_threshold": self.l0_threshold,
        }
        provenance["environment"]["sparsity"] = str(sparsity_implementation(self.backbone.device).value)
        # What was fitted for a run that stands in the folder already is what its shards were scored with.
        same = all((previous or {}).get(key) == provenance[key] for key in provenance if key != "environment")
        return CandidateJob(
            self,
            request,
            encoder,
            provenance,
            source,
            measurements=measurements,
            sites=list(self.sites.values()),
            head=head,
            l0_threshold=self.l0_threshold,
            recorded=previous["fits"] if previous and same else None,
        )


def check_grid(sites: Sequence[str] | None, poolings: Sequence[str] | None, outliers: Sequence[str]) -> None:
    """Find a misspelt name before a model is loaded for it.

    Raises:
        SparsortError: an unknown name, or an empty list.
    """
    for what, names in (("site", sites), ("pooling", poolings), ("outlier rule", outliers)):
        if names is not None and (isinstance(names, str) or not names):
            raise SparsortError(f"the {what}s are {names!r}; expected a list of at least one name.")
    for name in sites or ():
        check_site(name)
    for name in poolings or ():
        check_pooling(name)
    for name in outliers:
        check_outlier_rule(name)


def _distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))
