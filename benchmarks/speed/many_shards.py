"""Score folders of 10,000 small shards: the time of writing, resuming and planning as commands, and of Python's imports.

    python benchmarks/speed/many_shards.py --save

Every figure of a command is the wall time of a separate process: the median of the repeats, with the lowest and the highest. The
CPU time (user + system) depends less on other programs on the machine. `resume` is `sparsort score` called again on the finished
folder, and `resume, unfinished` on a folder whose last shard and list of shards are missing, as after a kill. A folder with a
tenth of the shards shows whether the cost per shard grows with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options

from sparsort.scoring.store.manifest import MANIFEST
from sparsort.scoring.store.shard_files import read_shard
from sparsort.storage.integrity import read_sealed, write_sealed

SHARDS, ROWS = 10_000, 2
# Upper bound for a resume and for a plan, in seconds.
FLOOR = 5.0
_WORDS = (
    "the",
    "of",
    "sparse",
    "model",
    "order",
    "score",
    "demo",
    "pear",
    "river",
    "train",
    "light",
    "stone",
    "quick",
    "brown",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5)
    add_output_options(parser)
    arguments = parser.parse_args()
    shards, repeats = (1000, 2) if arguments.quick else (SHARDS, arguments.repeats)
    report = Report("many_shards", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _measure(report, folder, shards, repeats)
    report.finish(arguments)


def _measure(report: Report, folder: Path, shards: int, repeats: int) -> None:
    few = max(1, shards // 10)
    out = folder / "scores"
    for count in (few, shards):
        rows = _write_rows(folder / f"{count}.jsonl", count * ROWS)
        score = ["score", rows, "--scorer", "compression", "-p", "{text}", "--shard-rows", str(ROWS), "--out"]
        wall, cpu = _run(*score, folder / f"scores-{count}")
        report.add(f"write {count:,} shards", wall, "s", better="lower", note=f"CPU {cpu:.1f} s, once")
        report.add(f"write, a shard of {count:,}", 1e3 * cpu / count, "ms CPU", better="lower")
    (folder / f"scores-{shards}").rename(out)
    command = [*score, out]
    _add(report, "import", lambda: _run("--version"), repeats)
    _add(report, "resume", lambda: _run(*command), repeats, FLOOR)
    _add(report, "resume, unfinished", lambda: _run(*command), repeats, FLOOR, before=lambda: _unfinish(out))
    _add(report, "plan", lambda: _run("plan", out, "--batch-size", "8"), repeats, FLOOR)
    files = sorted(out.glob("shard-*.parquet"))
    report.add("read a shard, its copy", _each(read_shard, files), "ms CPU", better="lower")
    report.add("read a shard, its pages", _each(_read_pages, files), "ms CPU", better="lower")


def _add(
    report: Report,
    name: str,
    run: Callable[[], tuple[float, float]],
    repeats: int,
    floor: float | None = None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Add the wall time and the CPU time of `run`, after one untimed call; `before` is not timed."""
    times = []
    for _ in range(repeats + 1):
        before()
        times.append(run())
    # The first call fills the page cache and is not counted.
    for kind, values in zip(("wall", "CPU"), zip(*times[1:], strict=True), strict=True):
        note = f"{min(values):.2f} to {max(values):.2f} in {repeats} calls"
        report.add(f"{name}, {kind}", statistics.median(values), "s", floor=floor, better="lower", note=note)


def _run(*arguments: object) -> tuple[float, float]:
    """Wall and CPU seconds of one `sparsort` process."""
    command = [sys.executable, "-m", "sparsort", *map(str, arguments)]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        errors = process.stderr.read() if process.stderr is not None else b""
        # `wait4` reports the processor time of this process alone. `Popen` must be given the exit code, as it
        # cannot wait again.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"{command} failed: {errors.decode(errors='replace')}")
    return wall, usage.ru_utime + usage.ru_stime


def _unfinish(out: Path) -> None:
    """Bring the folder into the state after a kill before the last shard."""
    manifest = read_sealed(out / MANIFEST, next_step="")
    (out / manifest["shards"][-1]["file"]).unlink()
    # The list of shards is written at the end of a run, so a killed run has none.
    write_sealed(out / MANIFEST, {name: manifest[name] for name in ("format", "version", "shard_rows", "provenance")})


def _write_rows(path: Path, count: int) -> Path:
    rng = random.Random(0)
    lines = (
        json.dumps({"id": f"row-{number}", "text": " ".join(rng.choices(_WORDS, k=rng.randint(3, 12)))})
        for number in range(count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _each(read: Callable[[Path], object], files: list[Path]) -> float:
    begin = time.process_time()
    for path in files:
        read(path)
    return 1e3 * (time.process_time() - begin) / len(files)


def _read_pages(path: Path) -> object:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(use_threads=False)


if __name__ == "__main__":
    main()
