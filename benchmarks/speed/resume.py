"""An unfinished score folder of 100,000 shards: the time of `sparsort status`, and of a resume until its next shard is scored.

    python benchmarks/speed/resume.py --save

The folder is simulated: its shards are links to a few files, and its log has a line for each. One shard in the middle is missing.
`until the next shard` is the time in one process from opening the file to scoring the missing shard, without imports; `whole
command` also lists the shards in the manifest, checks each against its digest, and reads the columns of the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options

from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.job import ScoreJob
from sparsort.scoring.data.rows import Row
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.scorers.run_shards import ShardRun
from sparsort.scoring.store.manifest import WORKERS
from sparsort.scoring.store.shards import ShardStore
from sparsort.scoring.store.work_log import WorkLog

SHARDS, ROWS = 100_000, 2
# Files that the shards are links to. A file of ext4 has at most 65,000 links.
_FILES = 8
_STATUS_FLOOR, _RESUME_FLOOR = 2.0, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shards", type=int, default=SHARDS)
    add_output_options(parser)
    arguments = parser.parse_args()
    shards = 2000 if arguments.quick else arguments.shards
    report = Report("resume", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        job = _simulate(Path(name), shards)
        out = job.need_folder()
        load = f"load average {os.getloadavg()[0]:.1f}"
        wall, cpu = _command("status", out, "--json")
        report.add(f"status of {shards:,} shards, wall", wall, "s", floor=_STATUS_FLOOR, better="lower", note=load)
        report.add(f"status of {shards:,} shards, CPU", cpu, "s", better="lower")
        wall, cpu = _until_next_shard(job)
        report.add("resume, until the next shard, wall", wall, "s", floor=_RESUME_FLOOR, better="lower", note=load)
        report.add("resume, until the next shard, CPU", cpu, "s", better="lower")
        wall, cpu = _command(
            "score", job.file, "-p", "{text}", "--scorer", "compression", "--shard-rows", ROWS, "--out", out, "--json"
        )
        report.add("resume, whole command, wall", wall, "s", better="lower")
        report.add("resume, whole command, CPU", cpu, "s", better="lower")
    report.finish(arguments)


def _simulate(folder: Path, shards: int) -> ScoreJob:
    """An unfinished folder in which all shards are done except the one in the middle."""
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(shards * ROWS):
            file.write(json.dumps({"id": f"q{number}", "text": f"What is {number} + {number % 7}?"}) + "\n")
    scorer = ScorerConfig(scorer="compression")
    job = ScoreJob(file=rows, scorer=scorer, prompt=PromptSpec("{text}"), out=folder / "scores", shard_rows=ROWS)
    source, _ = job.open()
    with job.begin(job.load(), source) as run:
        for index in range(_FILES):
            run.score_shard(index)
        (log,) = (folder / "scores" / WORKERS).glob("log-*")
        log.unlink()
        _fill(run.store, shards)
    return job


def _fill(store: ShardStore, shards: int) -> None:
    entries = [store._checked[index] for index in range(_FILES)]
    modified = [store.path(index).stat().st_mtime_ns for index in range(_FILES)]
    log = WorkLog(store.folder / WORKERS)
    for index in range(shards):
        if index == shards // 2:
            continue
        same = index % _FILES
        if index >= _FILES:
            os.link(store.path(same), store.path(index))
        facts = {name: entries[same][name] for name in ("rows", "digest")}
        record = entries[same]["record"]
        facts |= {"n_bytes": record["bytes"], "file_digest": record["digest"], "modified": modified[same]}
        log.append(**facts, shard=index, settings=store._settings, unscored=None)
    log.close()


class _ScoredError(Exception):
    pass


def _until_next_shard(job: ScoreJob) -> tuple[float, float]:
    begin, cpu = time.perf_counter(), time.process_time()
    source, _ = job.open()
    with job.begin(job.load(), source) as run:
        _stop_before_scoring(run)
        with contextlib.suppress(_ScoredError):
            run.run(run.numbers())
        return time.perf_counter() - begin, time.process_time() - cpu


def _stop_before_scoring(run: ShardRun) -> None:
    def score_rows(_rows: Sequence[Row], _advance: Callable[[int], None]) -> NoReturn:
        raise _ScoredError

    run._job.score_rows = score_rows  # type: ignore[method-assign]


def _command(*arguments: object) -> tuple[float, float]:
    """Wall and CPU seconds of one `sparsort` process."""
    command = [sys.executable, "-m", "sparsort", *map(str, arguments)]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed")
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
