"""The cost of `sparsort plan --export`: seconds and peak memory of writing a million rows in training order.

    python benchmarks/speed/loader/export.py [--quick] [--json] [--save] [--rows 1000000]

`command` is the whole command with a JSONL export: it reads the scores, matches them to the rows of a JSONL file, plans, saves
the plan and exports it. `jsonl`, `parquet` and `folder` are `export_plan` alone, from the saved plan. Each of these runs in a
separate process. Seconds are wall time, next to the processor time, which other programs on the machine affect less. The peak is
that of the resident set, which includes the libraries and mapped files. Each export is read back row by row, and compared with
the order of the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Report, add_output_options

from sparsort import ColumnScorer
from sparsort.curriculum.loading.plan.plan import CurriculumPlan

FORMATS = {"jsonl": "ordered.jsonl", "parquet": "ordered.parquet", "folder": "ordered"}
EXPORT = """
import sys
from sparsort.curriculum.loading.export import export_plan
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
folder, name = sys.argv[1:]
export_plan(CurriculumPlan.open(f"{folder}/plan"), f"{folder}/rows.jsonl", f"{folder}/{name}")
"""
WORDS = 60
FLOOR_GIB = 1.0


def write_rows(path: Path, n: int) -> None:
    """Write n rows with an id, a difficulty, a text of about 400 characters, and a nested field."""
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, n, 10_000):
            count = min(10_000, n - first)
            words = generator.integers(0, 100_000, (count, WORDS))
            hard = generator.random(count)
            for at in range(count):
                row = {
                    "id": f"r{first + at}",
                    "hard": float(hard[at]),
                    "text": " ".join(map(str, words[at].tolist())),
                    "meta": {"n": first + at, "tags": ["a", "b"]},
                }
                file.write(json.dumps(row) + "\n")


def run(*arguments: object) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak GiB of Python with these arguments."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-P", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit("an export failed; its error is above")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    return seconds, usage.ru_utime + usage.ru_stime, peak


def ids(path: Path) -> Iterator[str]:
    """The ids of an export, in its order."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["id"]
    elif path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(columns=["id"]):
            yield from batch.column(0).to_pylist()
    else:
        from datasets import load_from_disk

        yield from load_from_disk(str(path))["id"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows to export [default: 1 million, or 50,000 with --quick]")
    add_output_options(parser)
    arguments = parser.parse_args()
    n = arguments.rows or (50_000 if arguments.quick else 1_000_000)
    report = Report("plan-export", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_rows(folder / "rows.jsonl", n)
        size = (folder / "rows.jsonl").stat().st_size / 1e9
        ColumnScorer("hard").score(str(folder / "rows.jsonl"), out=folder / "scores")
        note = f"{n:,} rows, {size:.2f} GB of JSONL"
        options = ["--data", folder / "rows.jsonl", "--batch-size", 64, "--stages", 10, "--out", folder / "plan"]
        command = ["-m", "sparsort", "plan", folder / "scores", *options, "--export", folder / "command.jsonl"]
        calls = {"command": ("command.jsonl", command)}
        calls |= {kind: (name, ["-c", EXPORT, folder, name]) for kind, name in FORMATS.items()}
        for kind, (name, arguments_of_call) in calls.items():
            seconds, processor, peak = run(*arguments_of_call)
            plan = CurriculumPlan.open(folder / "plan")
            places = (place for number in range(plan.n_batches) for place in plan.batch(number).tolist())
            for place, found in zip(places, ids(folder / name), strict=True):
                if found != f"r{place}":
                    raise SystemExit(f"{name} has {found} in place of r{place}")
            spent = f"{note}; {processor:.0f} s of processor time"
            report.add(f"seconds_{kind}", seconds, "s", better="lower", note=spent)
            report.add(f"peak_gib_{kind}", peak, "GiB", floor=FLOOR_GIB, better="lower", note=note)
    report.finish(arguments)


if __name__ == "__main__":
    main()
