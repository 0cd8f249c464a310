"""Score a file. The recipe for `sparsort score`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsort.errors import SparsortError
from sparsort.recipes.score.config import ScorerConfig
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.trackers import NO_TRACKER, ReportTo, check_trackers

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.prompts.prompt import Prompt
    from sparsort.scoring.store.scores import Scores


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """The scores of a file, and the time they took.

    Attributes:
        scores: the table with one row per row of the file.
        seconds: the time of the whole call: checks, loading and scoring.
        loading_seconds: the time before scoring: libraries, the checks of the file, the model.
        scoring_seconds: the time in which rows were read and scored.
        resumed: whether an earlier call may have scored some rows.
        out: the score folder.
        source: the rows of the file.
        prompt: renders a row as text; None if the scorer reads no text.
        counts: the number of rows with each status.
    """

    scores: Scores
    seconds: float
    loading_seconds: float
    scoring_seconds: float
    resumed: bool
    out: str | None
    source: RowSource
    prompt: Prompt | None
    counts: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The report as JSON values; only the tokens of rows with a score are counted."""
        difficulty = self.scores.difficulty
        known = difficulty[np.isfinite(difficulty)]
        quantiles = np.quantile(known, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(known) else None
        tokens = self.scores.column("n_tokens")
        return {
            "out": self.out,
            "rows": len(self.scores),
            "status": self.counts,
            "difficulty_quantiles": quantiles,
            "tokens": int(tokens[np.isfinite(difficulty)].sum()),
            "truncated_rows": int((self.scores.column("n_truncated") > 0).sum()),
            "seconds": round(self.seconds, 3),
            "loading_seconds": round(self.loading_seconds, 3),
            "scoring_seconds": round(self.scoring_seconds, 3),
            "provenance": self.scores.provenance,
        }


def score_file(
    file: Any,
    *,
    scorer: ScorerConfig,
    prompt: PromptSpec = PromptSpec(),
    data: DataSpec = DataSpec(),
    out: str | Path | None = None,
    shard_rows: int = 2048,
    report_to: ReportTo = NO_TRACKER,
) -> ScoreReport:
    """Score every row of `file`, a path or other data; see `Scorer.score`."""
    from sparsort.scoring.scorers.base import warn_unscored
    from sparsort.scoring.store.shards import MANIFEST

    start = time.perf_counter()
    check_trackers(report_to)
    scorer = scorer.calibrated()
    if (calibration := scorer.loaded_calibration) is not None:
        prompt = calibration.definition.complete(prompt)
    scorer.check(prompt, shard_rows)
    # Mistakes in the data and the prompt are reported before a model is loaded.
    text = prompt.read()
    if text is not None and text.function is not None and out is not None:
        text.function.need_hash("a run with a folder (out=)")
    content = [scorer.column] if scorer.column is not None else text.content if text is not None else None
    source = data.open(file, content=content)
    if text is not None:
        text = text.for_rows(source)
        if calibration is not None:
            calibration.definition.refuse_other_prompt(text)
        source.require(text.fields, text)
    elif scorer.reads_text:
        raise SparsortError(
            "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces, or messages='…' (--messages) "
            f"with a column of conversations; this data has: {', '.join(source.columns())}."
        )
    resumed = out is not None and (Path(out).expanduser() / MANIFEST).exists()
    tokenizer = scorer.check_model(max_length=prompt.max_length, chat=text is not None and text.is_chat)
    loaded = scorer.load(tokenizer=tokenizer)
    scoring = time.perf_counter()
    scores = loaded.score(source, prompt, out=out, shard_rows=shard_rows, report_to=report_to)
    warn_unscored(scores)
    end = time.perf_counter()
    return ScoreReport(
        scores=scores,
        seconds=end - start,
        loading_seconds=scoring - start,
        scoring_seconds=end - scoring,
        resumed=resumed,
        out=str(out) if out is not None else None,
        source=source,
        prompt=text,
        counts=scores.counts("status"),
    )
