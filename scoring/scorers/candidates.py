"""Computes every candidate score in one forward pass: sites × poolings × metrics × outlier rules, and the model's own loss.

Contract: `CandidateScorer` is a scorer, so its folder is durable, can be resumed, and is refused under other settings. The table
has one column per candidate, named `site/pooling/rule/metric`. With an answer it also has `answer_loss` (mean negative
log-likelihood of the answer's tokens, in nats) and `answer_tokens`. `n_tokens` counts the tokens of the prompt. A candidate's
column equals the one of `SparsityScorer` with the same options: the poolings `last`, `mean_metric` and `mean_state` read the
prompt alone, and `answer` reads the answer after it.

Prompt and answer run as one text, since the states of the prompt cannot see the answer. If tokenising them together changes the
prompt's own tokens (a token straddles the border), the row is read twice: once without its answer and once with it. The outlier
rules are fitted on a sample of the source, which is scored in the same pass (`candidate_job`). The fits are in the provenance.
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
    """The definition of one score, apart from the model and the prompt."""

    site: str
    pooling: str
    outliers: str
    metric: str

    @property
    def name(self) -> str:
        """The name of its column."""
        return f"{self.site}/{self.pooling}/{self.outliers}/{self.metric}"

    @property
    def reads_answer(self) -> bool:
        """Whether it reads the tokens of the answer."""
        return self.pooling == "answer"

    @classmethod
    def of(cls, name: str) -> Candidate:
        """Return the candidate whose column has this name.

        Raises:
            SparsortError: it is not the name of a candidate.
        """
        parts = name.split("/")
        if len(parts) != 4 or parts[3] not in METRICS:
            raise SparsortError(f"{name!r} is not the name of a candidate; expected site/pooling/rule/metric.")
        return cls(site=parts[0], pooling=parts[1], outliers=parts[2], metric=parts[3])


class CandidateScorer(ModelScorer):
    """Scores rows by every candidate at once.

    Args:
        model: see `ModelScorer`, with its other arguments.
        sites: the sites to measure; None for those of `SITES` that this model has.
        poolings: the poolings; None for all, including `answer` if the request has an answer.
        outliers: the outlier rules.
        own_loss: also compute the model's loss on the answer, if the request has an answer.
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

    def shown(self) -> dict[str, Any]:
        return super().shown() | {"sites": list(self.sites), "poolings": self.poolings, "outliers": self.outliers}

    def check_cache(self) -> None:
        raise SparsortError("cache= has no effect on candidates, which are kept in a score folder. Pass out= instead.")

    def _names(self, requested: Sequence[str] | None) -> list[str]:
        if requested is not None:
            return _distinct(requested)
        available = []
        for name in SITES:
            try:
                available.append(self.backbone.site(name).name)
            except SparsortError as error:
                self.notes.append(f"skipped: {error}")
        return available

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
        # The shards that are already in the folder were scored with the recorded fits, so the rest must use them too.
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
    """Refuse a misspelt name before a model is loaded.

    Raises:
        SparsortError: an unknown name, or an empty list.
    """
    for kind, names in (("site", sites), ("pooling", poolings), ("outlier rule", outliers)):
        if names is not None and (isinstance(names, str) or not names):
            raise SparsortError(f"the {kind}s are {names!r}; expected a list of at least one name.")
    for name in sites or ():
        check_site(name)
    for name in poolings or ():
        check_pooling(name)
    for name in outliers:
        check_outlier_rule(name)


def _distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))
