"""The cost of `sparsort plan --export`: seconds and peak memory of writing a million rows in training order.

    python benchmarks/speed/loader/export.py [--quick] [--json] [--save] [--rows 1000000]

The command runs in a separate process, over a JSONL file and scores on disk, once for each format. `seconds` is the wall time of
the whole command: reading the scores, matching them to the rows, planning, and the export. `peak_gib` is the peak of the resident
set of that process, which includes the libraries and mapped files. Each export is read back row by row, and compared with the
order of the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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


def export(folder: Path, name: str) -> tuple[float, float]:
    """Seconds and peak GiB of one command."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "sparsort",
        "plan",
        str(folder / "scores"),
        "--data",
        str(folder / "rows.jsonl"),
    ]
    command += ["--batch-size", "64", "--stages", "10", "--out", str(folder / "plan"), "--export", str(folder / name)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit("sparsort plan failed; its error is above")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


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
        for kind, name in FORMATS.items():
            seconds, peak = export(folder, name)
            plan = CurriculumPlan.open(folder / "plan")
            places = (place for number in range(plan.n_batches) for place in plan.batch(number).tolist())
            for place, found in zip(places, ids(folder / name), strict=True):
                if found != f"r{place}":
                    raise SystemExit(f"{name} has {found} in place of r{place}")
            note = f"{n:,} rows, {size:.2f} GB of JSONL"
            report.add(f"seconds_{kind}", seconds, "s", better="lower", note=note)
            report.add(f"peak_gib_{kind}", peak, "GiB", floor=FLOOR_GIB, better="lower", note=note)
            shutil.rmtree(folder / "plan")
    report.finish(arguments)


if __name__ == "__main__":
    main()
