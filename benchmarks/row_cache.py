"""What the cache of read rows saves: `sparsort order --select knn` over the 240 example rows, the first call and the next.

    python benchmarks/row_cache.py --save

Each round begins with an empty cache of rows and runs three commands, each in a process of its own, loading included: one
query, another query, and the second query again without the cache. The figure is the time of the second over that of the
first. The demonstrations that the second and the third choose, and their order, have to be the same. With --quick there is one
round instead of three.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Report, add_output_options

from sparsort.files import cache_folder
from sparsort.kernels.backend import default_device
from sparsort.scoring.embedded import demo_folder

ROWS = Path(__file__).parents[1] / "examples" / "graded.jsonl"
QUERIES = ("Tom has 12 pens and gives 5 away. How many are left?", "The meeting is on a Monday. Which day follows it?")


def _order(query: str, cache: Path, *options: str) -> tuple[float, dict[str, Any]]:
    """Seconds of one call, and what it printed as JSON."""
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
    start = time.perf_counter()
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, "SPARSORT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - start, json.loads(done.stdout)


def _round(cache: Path) -> dict[str, Any]:
    shutil.rmtree(cache / "rows", ignore_errors=True)
    first_s, first = _order(QUERIES[0], cache)
    second_s, second = _order(QUERIES[1], cache)
    without_s, without = _order(QUERIES[1], cache, "--no-cache")
    ids = [[demo["id"] for demo in result["demonstrations"]] for result in (second, without)]
    return {
        "first": first_s,
        "second": second_s,
        "without": without_s,
        "counts": (first["cache"], second["cache"]),
        "same": ids[0] == ids[1] and second["prompt"] == without["prompt"],
        "bytes": sum(path.stat().st_size for path in (cache / "rows").glob("*/*")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args()
    demo_folder()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        (cache / "models").symlink_to(cache_folder() / "models")
        rounds = [_round(cache) for _ in range(1 if arguments.quick else 3)]
    report = Report("row_cache", torch.device(default_device().value))
    ratios = [one["second"] / one["first"] for one in rounds]
    for name in ("first", "second", "without"):
        report.add(f"{name}_call", statistics.median(one[name] for one in rounds), "s", better="lower")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    report.add("second_over_first", statistics.median(ratios), "", floor=0.3, better="lower", note=spread)
    report.add("same_demonstrations", float(all(one["same"] for one in rounds)), "", floor=1.0)
    first, second = rounds[-1]["counts"]
    report.add("readings_first", first["read"], "rows", better="lower")
    report.add("readings_second", second["read"], "rows", better="lower", note=f"{second['from_cache']} from the cache")
    report.add("cache_bytes", rounds[-1]["bytes"], "bytes", better="lower")
    report.finish(arguments)


if __name__ == "__main__":
    main()
