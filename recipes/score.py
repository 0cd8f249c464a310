"""Score a file: the recipe behind `sparsort score`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sparsort.errors import SparsortError, unknown_choice

if TYPE_CHECKING:
    from sparsort.scoring.base import Scorer
    from sparsort.scoring.scores import Scores

ScorerName = Literal["sparsity", "answer_loss", "prompt_loss", "entropy", "length", "compression", "random", "column"]


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Which scorer, with the options of each (those of the others are ignored)."""

    scorer: str = "sparsity"
    model: str = "demo"
    site: str = "pre_norm"
    pooling: str = "last"
    metric: str = "gini"
    outliers: str = "none"
    l0_threshold: float = 1.0
    column: str | None = None
    descending: bool = False
    seed: int = 0
    unit: Literal["tokens", "characters"] = "tokens"
    dtype: str = "auto"
    device: str = "auto"
    token_budget: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.scorer not in get_args(ScorerName):
            raise unknown_choice("scorer", self.scorer, get_args(ScorerName))
        if self.scorer == "column" and self.column is None:
            raise SparsortError("the scorer 'column' needs the name of a numeric column. Pass --column NAME.")

    @property
    def runs_model(self) -> bool:
        """Whether scoring runs a forward pass."""
        return self.scorer in ("sparsity", "answer_loss", "prompt_loss", "entropy")

    def load(self, loaded: Any = None) -> Scorer:
        """Build the scorer; `loaded` is a model that stands in memory already."""
        from sparsort.scoring import baselines, scorers

        if self.runs_model:
            options: dict[str, Any] = {"token_budget": self.token_budget}
            if loaded is None:
                names = ("dtype", "device", "revision", "trust_remote_code")
                options |= {name: getattr(self, name) for name in names}
            model = loaded if loaded is not None else self.model
            if self.scorer == "sparsity":
                return scorers.SparsityScorer(
                    model,
                    site=self.site,
                    pooling=self.pooling,
                    metric=self.metric,
                    outliers=self.outliers,
                    l0_threshold=self.l0_threshold,
                    **options,
                )
            if self.scorer == "entropy":
                return scorers.EntropyScorer(model, **options)
            return scorers.LossScorer(model, on="answer" if self.scorer == "answer_loss" else "prompt", **options)
        if self.scorer == "length":
            return baselines.LengthScorer(self.unit, model=self.model, trust_remote_code=self.trust_remote_code)
        if self.scorer == "compression":
            return baselines.CompressionScorer()
        if self.scorer == "random":
            return baselines.RandomScorer(self.seed)
        return baselines.ColumnScorer(str(self.column), descending=self.descending)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a row becomes text."""

    prompt: str | None = None
    answer: str | None = None
    system: str | None = None
    chat: bool = False
    truncation: Any = "error"
    max_length: int | None = None
    id_column: str | None = None

    def options(self) -> dict[str, Any]:
        """The arguments of `Scorer.score`."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """What became of a file."""

    scores: Scores
    seconds: float
    out: str | None
    counts: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The report as JSON values."""
        difficulty = self.scores.difficulty
        known = difficulty[np.isfinite(difficulty)]
        quantiles = np.quantile(known, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(known) else None
        tokens = self.scores.column("n_tokens")
        return {
            "out": self.out,
            "rows": len(self.scores),
            "status": self.counts,
            "difficulty_quantiles": quantiles,
            "tokens": int(tokens.sum()),
            "truncated_rows": int((self.scores.column("n_truncated") > 0).sum()),
            "seconds": round(self.seconds, 3),
            "provenance": self.scores.provenance,
        }


def score_file(
    file: str | Path,
    *,
    scorer: ScorerConfig,
    text: TextConfig,
    out: str | Path | None = None,
    shard_rows: int = 2048,
) -> ScoreReport:
    """Score every row of `file`; see `Scorer.score`."""
    start = time.perf_counter()
    scores = scorer.load().score(file, out=out, shard_rows=shard_rows, **text.options())
    statuses, counts = np.unique(scores.column("status"), return_counts=True)
    return ScoreReport(
        scores=scores,
        seconds=time.perf_counter() - start,
        out=str(out) if out is not None else None,
        counts={str(status): int(count) for status, count in zip(statuses, counts, strict=True)},
    )
