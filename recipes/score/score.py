"""Score a file. The recipe for `sparsort score`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from sparsort.errors import SparsortError
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.job import ScoreJob
from sparsort.recipes.score.workers import Workers, usable_cores
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.scoring.scorers.run_shards import Coverage, check_part, count_rows, count_shards, cover
from sparsort.scoring.store.manifest import MANIFEST, load_snapshot
from sparsort.scoring.store.shards import ShardStore, discard_unbegun
from sparsort.trackers import NO_TRACKER, ReportTo, check_trackers

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.prompts.prompt import Prompt
    from sparsort.scoring.store.scores import Scores

_LOG = logging.getLogger("sparsort")


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


@overload
def score_file(
    file: Any,
    *,
    scorer: ScorerConfig,
    prompt: PromptSpec = PromptSpec(),
    data: DataSpec = DataSpec(),
    out: str | Path | None = None,
    shard_rows: int = 2048,
    part: None = None,
    workers: int | Literal["auto"] = 1,
    devices: Sequence[str] = (),
    report_to: ReportTo = NO_TRACKER,
) -> ScoreReport: ...


@overload
def score_file(
    file: Any,
    *,
    scorer: ScorerConfig,
    prompt: PromptSpec = PromptSpec(),
    data: DataSpec = DataSpec(),
    out: str | Path | None,
    shard_rows: int = 2048,
    part: tuple[int, int],
    workers: int | Literal["auto"] = 1,
    devices: Sequence[str] = (),
    report_to: ReportTo = NO_TRACKER,
) -> Coverage: ...


def score_file(
    file: Any,
    *,
    scorer: ScorerConfig,
    prompt: PromptSpec = PromptSpec(),
    data: DataSpec = DataSpec(),
    out: str | Path | None = None,
    shard_rows: int = 2048,
    part: tuple[int, int] | None = None,
    workers: int | Literal["auto"] = 1,
    devices: Sequence[str] = (),
    report_to: ReportTo = NO_TRACKER,
) -> ScoreReport | Coverage:
    """Score every row of `file`; see `Scorer.score`.

    Args:
        file, prompt, data, out, shard_rows, part: see `Scorer.score`.
        scorer: the scorer. With several workers, its model must be given by name.
        workers: local processes that share the work in `out`, each with its own model; at least one for each of `devices`. 1 is
            this process. "auto": one for each GPU or, if there is none, for each core.
        report_to: see `Scorer.score`. With several workers, the rows are not counted by status.
        devices: the devices of the workers, in turn, such as ["cuda:0", "cuda:1"]; empty for the device of the model.

    Returns:
        The scores with a report; with `part`, the coverage of the folder.
    """
    from sparsort.scoring.scorers.base import warn_unscored

    start = time.perf_counter()
    check_trackers(report_to)
    job = ScoreJob(
        file=file, scorer=scorer, prompt=prompt, data=data, out=Path(out) if out else None, shard_rows=shard_rows
    )
    job = job.checked()
    if part is not None:
        check_part(part)
    n_workers, devices = _workers_and_devices(job, workers, devices)
    if part is not None or n_workers > 1:
        job.need_folder()
    resumed = job.out is not None and (job.out / MANIFEST).exists()
    try:
        if n_workers > 1:
            source, text, coverage, scoring = _score_in_workers(job, n_workers, devices, part, report_to)
        else:
            source, text, coverage, scoring = _score_here(job.on(devices[0] if devices else None), part, report_to)
    except BaseException:
        if job.out is not None:
            discard_unbegun(job.out)
        raise
    if part is not None and isinstance(coverage, Coverage):
        return coverage
    scores = coverage.load() if isinstance(coverage, Coverage) else coverage
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


# The rows, their prompt, what was done, and the time at which scoring began.
_Result = tuple["RowSource", "Prompt | None", "Coverage | Scores", float]


def _score_here(job: ScoreJob, part: tuple[int, int] | None, report_to: ReportTo) -> _Result:
    from sparsort.scoring.scorers.base import watched

    source, text = job.open()
    scorer = job.load(text)
    scoring = time.perf_counter()
    if job.out is None:
        scores = scorer.score(source, job.prompt, shard_rows=job.shard_rows, report_to=report_to)
        return source, text, scores, scoring
    with job.begin(scorer, source) as shards:
        numbers = shards.numbers(part or (0, 1))
        rows = count_rows(numbers, source.count(), job.shard_rows)
        with watched(source.name, rows, shards.store.provenance, job.out, report_to) as (advance, scored):
            return source, text, shards.run(numbers, advance, scored), scoring


def _score_in_workers(
    job: ScoreJob, count: int, devices: Sequence[str], part: tuple[int, int] | None, report_to: ReportTo
) -> _Result:
    from sparsort.scoring.scorers.base import watched

    # The processes load their models while this one checks the rows.
    with Workers(job, count, devices=devices, note=_LOG.warning) as workers:
        source, text = job.open()
        rows, folder = source.count(), job.need_folder()
        k, n = part or (0, 1)
        numbers = range(k, count_shards(rows, job.shard_rows), n)
        workers.begin(len(numbers))
        scoring = time.perf_counter()
        store = ShardStore.join(folder)
        # A shard in the logs need not be sent to a worker, unless the file may have changed since.
        done = store.logged().intersection(numbers) if source.restore(load_snapshot(folder), text) else set()
        todo = count_rows(numbers, rows, job.shard_rows)
        with watched(source.name, todo, store.provenance, folder, report_to) as (advance, _):
            advance(count_rows(done, rows, job.shard_rows))
            outcomes = workers.run((number for number in numbers if number not in done), advance)
    coverage = cover(store, rows, scored=outcomes["scored"], kept=outcomes["kept"] + len(done))
    return source, text, coverage, scoring


def _workers_and_devices(
    job: ScoreJob, workers: int | Literal["auto"], devices: Sequence[str]
) -> tuple[int, Sequence[str]]:
    """The number of processes, and the devices that they take in turn."""
    if workers != "auto" and (type(workers) is not int or workers < 1):
        raise SparsortError(f"workers (--workers) is {workers!r}; expected a number from 1 on, or 'auto'.")
    has_workers, text = workers != 1 or len(devices) > 1, job.prompt.read()
    if has_workers and not job.scorer.model.is_named:
        raise SparsortError(
            "a model in memory cannot be sent to worker processes. Give its name or folder in ModelSpec, or use workers=1."
        )
    if has_workers and (not isinstance(job.file, (str, Path)) or (text is not None and text.function is not None)):
        raise SparsortError(
            "rows in memory, or a function as the prompt, cannot be sent to worker processes. Pass the path of a file and a "
            "format string, or use workers=1."
        )
    if not devices and workers == "auto" and job.scorer.runs_model and job.scorer.model.device in ("auto", "cuda"):
        import torch

        devices = [f"cuda:{place}" for place in range(torch.cuda.device_count())]
    if workers == "auto":
        workers = len(devices) or usable_cores()
    return max(workers, len(devices)), devices
