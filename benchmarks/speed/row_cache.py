"""Time saved by the row cache: the first and the second call of `sparsort order --select knn` over the 240 example rows.

    python benchmarks/speed/row_cache.py --save

Each of three rounds begins with an empty row cache and runs two commands with different queries, each in a separate process and
including the loading of the model. The figure is the wall time of the second command over that of the first, together with the
processor time, which other programs on the machine affect less. Then the second query runs without the cache, and its prompt has
to be the same. Each round also loads the model in a process that does nothing else: no call can be faster than that, whatever
the cache contains. With --quick there is one round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options

from sparsort.kernels.backend import default_device
from sparsort.scoring.loading.demo_model import demo_folder
from sparsort.storage.files import cache_folder

ROWS = Path(__file__).parents[2] / "examples" / "graded.jsonl"
QUERIES = ("Tom has 12 pens and gives 5 away. How many are left?", "The meeting is on a Monday. Which day follows it?")


def _order(query: str, cache: Path, *options: str) -> tuple[float, float, dict[str, Any]]:
    """Wall seconds and processor seconds of one call, and the JSON that it printed."""
    command = [
        sys.executable,
        "-m",
        "sparsort",
        "order",
        str(ROWS),
        "-q",
        query,
        "-k",
        "4",
        "--select",
        "knn",
        "--json",
    ]
    wall, processor, printed = _timed([*command, *options], cache)
    return wall, processor, json.loads(printed)


def _load(cache: Path) -> float:
    """Wall seconds of a process that only loads the model and its tokenizer."""
    code = "from sparsort.scoring.loading.load import load_model; load_model('demo')"
    return _timed([sys.executable, "-c", code], cache)[0]


def _timed(command: list[str], cache: Path) -> tuple[float, float, str]:
    """Wall seconds and processor seconds of a command, and its output."""
    start, before = time.perf_counter(), _processor_seconds()
    done = subprocess.run(
        command, env={**os.environ, "SPARSORT_CACHE": str(cache)}, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - start, _processor_seconds() - before, done.stdout


def _processor_seconds() -> float:
    """Processor seconds of the child processes that have ended."""
    # Children count only after they have been waited for, so a difference around `run` is the time of that child.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args()
    # The conversion of the embedded model happens before any timed call.
    demo_folder()
    firsts, seconds, loads = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        # The temporary cache has its own rows but shares the converted model, which takes long to make.
        (cache / "models").symlink_to(cache_folder() / "models")
        for _ in range(1 if arguments.quick else 3):
            # Each round starts with an empty row cache.
            shutil.rmtree(cache / "rows", ignore_errors=True)
            firsts.append(_order(QUERIES[0], cache))
            seconds.append(_order(QUERIES[1], cache))
            loads.append(_load(cache))
        size = sum(path.stat().st_size for path in (cache / "rows").glob("*/*"))
        without = _order(QUERIES[1], cache, "--no-cache")
    report = Report("row_cache", torch.device(default_device().value))
    for number, what in enumerate(("wall", "processor")):
        for name, calls in (("first", firsts), ("second", seconds)):
            report.add(f"{name}_call_{what}", statistics.median(call[number] for call in calls), "s", better="lower")
        ratios = [second[number] / first[number] for first, second in zip(firsts, seconds, strict=True)]
        report.add(
            f"second_over_first_{what}",
            statistics.median(ratios),
            "",
            floor=0.3 if what == "wall" else None,
            better="lower",
            note=f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    report.add("loading_alone_wall", statistics.median(loads), "s", better="lower")
    report.add("same_prompt", float(all(call[2]["prompt"] == without[2]["prompt"] for call in seconds)), "", floor=1.0)
    read, kept = seconds[-1][2]["cache"]["read"], seconds[-1][2]["cache"]["from_cache"]
    report.add("readings_first", firsts[-1][2]["cache"]["read"], "rows", better="lower")
    report.add("readings_second", read, "rows", better="lower", note=f"{kept} more from the cache")
    report.add("cache_bytes", size, "bytes", better="lower")
    report.finish(arguments)


if __name__ == "__main__":
    main()
