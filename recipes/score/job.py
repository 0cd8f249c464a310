"""A score job: everything that a process needs to score shards of a file, in a form that can be sent to it.

Contract: local processes, array jobs, torchrun and other engines all call `run_shards(job, numbers)`, and differ only in the
numbers. Which process scores a shard changes no score.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.errors import SparsortError
from sparsort.recipes.score.config import ScorerConfig
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.prompts.prompt import Prompt
    from sparsort.scoring.scorers.base import Scorer
    from sparsort.scoring.scorers.run_shards import Coverage, ShardRun

_LOG = logging.getLogger("sparsort")


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """A file, how to score it, and the folder for its scores. It can be pickled, because a model in it is only named.

    Attributes:
        file: the rows; see `open_rows`.
        scorer: the scorer.
        prompt: the text of a row.
        data: how the file is read.
        out: the score folder; None to keep the scores in memory, which only one process can.
        shard_rows: rows per shard.
    """

    file: Any
    scorer: ScorerConfig
    prompt: PromptSpec = PromptSpec()
    data: DataSpec = DataSpec()
    out: Path | None = None
    shard_rows: int = 2048

    def checked(self) -> ScoreJob:
        """This job with what its calibration decides.

        Raises:
            SparsortError: an option is wrong; see `ScorerConfig.check`.
        """
        scorer, prompt = self.scorer.calibrated(), self.prompt
        if (calibration := scorer.loaded_calibration) is not None:
            prompt = calibration.definition.complete(prompt)
        scorer.check(prompt, self.shard_rows)
        text = prompt.read()
        if text is not None and text.function is not None and self.out is not None:
            text.function.need_hash("a run with a folder (out=)")
        out = self.out.expanduser() if self.out is not None else None
        return replace(self, scorer=scorer, prompt=prompt, out=out)

    def need_folder(self) -> Path:
        """The score folder; a `SparsortError` if there is none."""
        if self.out is None:
            raise SparsortError("several processes need a folder that they share. Pass out='FOLDER' (--out).")
        return self.out

    def on(self, device: str | None) -> ScoreJob:
        """This job on another device; None for the same one."""
        if device is None:
            return self
        return replace(self, scorer=replace(self.scorer, model=replace(self.scorer.model, device=device)))

    def open(self) -> tuple[RowSource, Prompt | None]:
        """Open the rows, and check that each of them can be read; of several processes, one reads the whole file.

        Raises:
            SparsortError: a row is broken, or lacks a field of the prompt.
        """
        text = self.prompt.read()
        column = self.scorer.column
        content = [column] if column is not None else text.content if text is not None else None
        source = self.data.open(self.file, content=content)
        if text is not None:
            text = text.for_rows(source)
            if (calibration := self.scorer.loaded_calibration) is not None:
                calibration.definition.refuse_other_prompt(text)
        with _checking(source, text, self.out) as must_check:
            if must_check and text is not None:
                source.require(text.fields, text)
            elif self.scorer.reads_text and text is None:
                raise SparsortError(
                    "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces, or messages='…' "
                    f"(--messages) with a column of conversations; this data has: {', '.join(source.columns())}."
                )
        return source, text

    def load(self, text: Prompt | None) -> Scorer:
        """Load the model and build the scorer.

        Args:
            text: the prompt for the rows, as `open` returns it: whether a function writes chat turns is known from the rows only.
        """
        is_chat = text is not None and text.is_chat
        tokenizer = self.scorer.check_model(max_length=self.prompt.max_length, chat=is_chat)
        return self.scorer.load(tokenizer=tokenizer)

    def begin(self, scorer: Scorer, source: RowSource) -> ShardRun:
        """Begin or resume the run in the folder."""
        return scorer.begin(source, self.prompt, out=self.need_folder(), shard_rows=self.shard_rows)


def run_shards(job: ScoreJob, numbers: Iterable[int]) -> Coverage:
    """Return when these shards of a job are done, by this process or by another.

    The model is loaded by the first call with a job, and kept for later calls with the same job.

    Args:
        job: the job. Its model must be given by name.
        numbers: the numbers of the shards; shard i has the rows from i * shard_rows on.

    Raises:
        SparsortError: see `Scorer.score`.
    """
    shards = _begun(job)
    numbers = list(numbers)
    if wrong := [number for number in numbers if not 0 <= number < shards.total]:
        raise SparsortError(f"there is no shard {wrong[0]}: {job.file} has {shards.total} shards, counted from 0.")
    try:
        return shards.run(numbers)
    finally:
        shards.suspend()


def part_from_environment(environment: Mapping[str, str]) -> tuple[tuple[int, int], str]:
    """The part of this process by the variables of Slurm and torchrun, and a text that names them with their values.

    The tasks of an array job, and the processes inside a task (torchrun's, otherwise those that srun starts), are counted
    together: process p of P in task t of T takes the part (t * P + p, T * P).

    Args:
        environment: the environment variables.

    Raises:
        SparsortError: there are no such variables, or one of them is not a number.
    """
    used: dict[str, int] = {}

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name)
        if text is None and default is not None:
            return default
        try:
            used[name] = int(text or "")
        except ValueError:
            raise SparsortError(
                f"part (--part) is 'env', and the environment variable {name} is {text!r}; expected a whole number. Pass K/N."
            ) from None
        return used[name]

    task, tasks, process, processes = 0, 1, 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = number("SLURM_ARRAY_TASK_STEP", 1)
        task = (number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN", 0)) // step
        tasks = number("SLURM_ARRAY_TASK_COUNT")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        process, processes = number("RANK"), number("WORLD_SIZE")
    # Only srun sets the number of tasks of a step. Without srun, the script of a job has SLURM_PROCID=0 for all of its tasks.
    elif "SLURM_STEP_NUM_TASKS" in environment:
        process, processes = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")
    if not used:
        raise SparsortError(
            "part (--part) is 'env', and neither Slurm's variables (SLURM_ARRAY_TASK_ID, or SLURM_PROCID under srun) nor "
            "torchrun's (RANK and WORLD_SIZE) are set. Pass K/N, such as 0/4."
        )
    return (task * processes + process, tasks * processes), ", ".join(f"{name}={value}" for name, value in used.items())


# The job of the last call in this process, with its run.
_last: tuple[int, ScoreJob, ShardRun] | None = None


def _begun(job: ScoreJob) -> ShardRun:
    global _last
    # A forked process may not use the log of its parent.
    if _last is None or _last[:2] != (os.getpid(), job):
        checked = job.checked()
        source, text = checked.open()
        _last = (os.getpid(), job, checked.begin(checked.load(text), source))
    return _last[2]


@contextlib.contextmanager
def _checking(source: RowSource, text: Prompt | None, out: Path | None) -> Iterator[bool]:
    """Yield whether this process must check the rows; the snapshot of a source that another has checked is restored."""
    from sparsort.scoring.store.claims import Claims
    from sparsort.scoring.store.manifest import WORKERS, has_shards, load_snapshot, save_snapshot
    from sparsort.scoring.store.shards import refuse_foreign

    def restored() -> bool:
        snapshot = load_snapshot(out) if out is not None else None
        # Other columns of the file may be broken, but the checked ones are those that the same prompt reads.
        return snapshot is not None and snapshot.get("prompt") == prompt and source.restore(snapshot, text)

    prompt: Mapping[str, object] | None = text.describe() if text is not None else None
    if out is not None:
        refuse_foreign(out)
    # A snapshot vouches for the rows of the shards that are scored after it, so it is not made for a folder that has shards.
    if out is None or not source.can_restore or (has_shards(out) and not restored()):
        yield True
        source.count()
        return
    claims = Claims(out / WORKERS)
    is_new = not out.exists()
    try:
        with claims.first("rows", restored) as must_check:
            yield must_check
            if must_check:
                save_snapshot(out, {**source.snapshot(), "prompt": prompt})
    finally:
        claims.close()
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()
