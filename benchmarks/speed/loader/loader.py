"""The cost of a curriculum: planning 100 million examples, resuming anywhere in them, loading, and online difficulty.

    python benchmarks/speed/loader/loader.py [--quick] [--json] [--save] [--rows 100000000] [--plans-only]

Every measurement of `--rows` runs in a separate process, so that its peak of memory is measured alone. `index_seconds` and
`index_peak_gib` go from float32 difficulties on disk (memory-mapped) through plan_curriculum to a saved plan whose first batch
was drawn, for a sorted order in stages; the same for a plain shuffle, a pacing, and float64. The peak is that of the resident
set, including mapped files. `open_seconds` is CurriculumPlan.open, which reads every array once and compares it with its digest.
`first_batch_seconds` goes from the opened plan to the first batch in a new process, without imports, at the beginning, near the
end and at random positions; the slowest of each is reported. The files are in the page cache.

`batches_per_second_*` compares CurriculumLoader with PyTorch's DataLoader and RandomSampler over the same memory-mapped data,
a NumPy array and a `datasets.Dataset`, in alternating rounds, for a whole epoch. At a ratio of 1 both are equally fast.
`online_step_ratio` is a training step with online difficulty over one without (benchmarks/speed/loader/online_difficulty.py).
For how other loaders cover the data and resume, see benchmarks/speed/loader/loader_peers.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Report, add_output_options, compare
from numpy.typing import NDArray
from online_difficulty import measure as measure_online
from torch.utils.data import DataLoader, RandomSampler

from sparsort import CurriculumLoader, plan_curriculum

BATCH = 64
PLANS = {
    "": {"stages": 10},
    "_shuffle": {"schedule": "shuffle"},
    "_paced": {"stages": 100, "pacing": "root:start=0.05,until=0.8"},
    "_float64": {"stages": 10},
}
INDEX = """
import json, resource, sys, time
import numpy as np
from sparsort import plan_curriculum
source, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
began = time.perf_counter()
plan_curriculum(np.load(source, mmap_mode="r"), out=folder, batch_size=512, **settings).batch(0)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"seconds": seconds, "peak": peak}))
"""
RESUME = """
import json, sys, time
import numpy as np
from sparsort import CurriculumLoader
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
source, folder, position = sys.argv[1], sys.argv[2], float(sys.argv[3])
data = np.load(source, mmap_mode="r")
fresh = CurriculumLoader(CurriculumPlan.open(folder), data, verify=False)
state = json.loads(json.dumps({**fresh.state_dict(), "batch": int(position * (fresh.plan.n_batches - 1))}))
began, spent = time.perf_counter(), time.process_time()
plan = CurriculumPlan.open(folder)
opened, spent = time.perf_counter(), time.process_time() - spent
loader = CurriculumLoader(plan, data, verify=False)
loader.load_state_dict(state)
batch = next(iter(loader))
seconds = time.perf_counter() - opened
assert len(batch) in (511, 512), len(batch)
print(json.dumps({"open": opened - began, "cpu": spent, "seconds": seconds, "state": len(json.dumps(loader.state_dict()))}))
"""


class Rows:
    """A memory-mapped array of token ids as a map-style dataset that reads a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, rows: list[int]) -> list[NDArray[Any]]:
        return list(self.tokens[rows])

    def __getitem__(self, row: int) -> NDArray[Any]:
        return np.asarray(self.tokens[row])


def in_a_process(script: str, *arguments: object) -> dict[str, float]:
    """Run a script in a process with its own memory and caches, and return the JSON that it prints."""
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a part of the benchmark failed:\n{done.stderr}")
    return dict(json.loads(done.stdout))


def measure_index(report: Report, folder: Path, n: int, quick: bool) -> None:
    """Measure plans of n rows, and resuming in them."""
    generator = np.random.default_rng(0)
    source, wide = folder / "difficulty.npy", folder / "difficulty64.npy"
    # The difficulties are on disk, so that the array in this process does not count towards the peak of the other.
    np.save(source, generator.random(n, dtype=np.float32))
    if not quick:
        np.save(wide, generator.random(n))
    # The floors are set for 100 million rows.
    floors = n == 100_000_000
    for name, settings in list(PLANS.items())[: 1 if quick else None]:
        where = folder / f"plan{name}"
        found = in_a_process(INDEX, wide if name == "_float64" else source, where, json.dumps(settings))
        note = f"{n:,} rows, {settings or 'sorted'}"
        bounded = floors and name != "_float64"
        report.add(
            f"index_seconds{name}", found["seconds"], "s", floor=60 if bounded else None, better="lower", note=note
        )
        peak = found["peak"] / 2**30
        report.add(f"index_peak_gib{name}", peak, "GiB", floor=2 if bounded else None, better="lower", note=note)
        if name in ("", "_shuffle"):
            # Positions in the epoch: its beginning, its last batch, and random ones.
            positions = [0.0, 1.0, *generator.random(1 if quick else 6)]
            resumed = [in_a_process(RESUME, source, where, position) for position in positions]
            seconds = [one["seconds"] for one in resumed]
            note = f"{len(seconds)} positions, median {np.median(seconds):.3f} s"
            report.add(f"first_batch_seconds{name}", max(seconds), "s", floor=1, better="lower", note=note)
            opening = [one["open"] for one in resumed]
            size = sum(path.stat().st_size for path in where.iterdir()) / 1e9
            cpu = np.median([one["cpu"] for one in resumed])
            note = f"{size:.2f} GB, median {np.median(opening):.2f} s, of CPU time {cpu:.2f} s"
            report.add(f"open_seconds{name}", max(opening), "s", better="lower", note=note)
            size = max(one["state"] for one in resumed)
            report.add(f"state_bytes{name}", size, "bytes", floor=1024, better="lower", note="as JSON")


def measure_loading(report: Report, folder: Path, quick: bool) -> None:
    """Measure batches per second against PyTorch's own loader."""
    n = 20_000 if quick else 100_000
    tokens = np.random.default_rng(0).integers(0, 32_000, (n, 128), dtype=np.int32)
    np.save(folder / "tokens.npy", tokens)
    arrow = datasets.Dataset.from_dict({"input_ids": list(tokens)})
    datasets.disable_progress_bars()
    arrow.save_to_disk(str(folder / "arrow"))
    sources = {
        "numpy": Rows(folder / "tokens.npy"),
        "datasets": datasets.load_from_disk(str(folder / "arrow")).with_format("torch"),
    }
    for kind, rows in sources.items():
        difficulty = np.random.default_rng(1).random(len(rows))
        # The plan is written to a folder, as in training.
        plan = plan_curriculum(difficulty, batch_size=BATCH, stages=10, out=folder / f"plan-{kind}")
        for workers in (0, 2):
            theirs = DataLoader(rows, batch_size=BATCH, sampler=_random(rows), num_workers=workers)
            ours = CurriculumLoader(plan, rows, num_workers=workers, verify=False)
            found = compare(_epoch(theirs), _epoch(ours), rounds=3 if quick else 11)
            per_second = len(ours) / found.ours_s
            note = f"{len(ours)} batches of {BATCH}, {per_second:.0f} a second; {found}"
            report.add(f"batches_per_second_{kind}_{workers}_workers", found.ratio, "ratio", floor=0.97, note=note)


def _random(rows: Any) -> RandomSampler:
    return RandomSampler(rows, generator=torch.Generator().manual_seed(0))


def _epoch(loader: Any) -> Callable[[], int]:
    return lambda: sum(1 for _ in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows to plan [default: 100 million, or 5 million with --quick]")
    parser.add_argument("--folder", type=Path, help="folder for 4 GB of temporary files")
    parser.add_argument("--plans-only", action="store_true", help="skip loading and online difficulty")
    add_output_options(parser)
    arguments = parser.parse_args()
    report = Report("loader-plans" if arguments.plans_only else "loader", torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        folder = Path(made)
        measure_index(
            report, folder, arguments.rows or (5_000_000 if arguments.quick else 100_000_000), arguments.quick
        )
        if not arguments.plans_only:
            measure_loading(report, folder, arguments.quick)
    if arguments.plans_only:
        report.finish(arguments)
        return
    online = measure_online(quick=arguments.quick)
    report.add("online_step_ratio", online["ratio"], "ratio", floor=1.01, better="lower", note=online["note"])
    report.finish(arguments)


if __name__ == "__main__":
    main()
