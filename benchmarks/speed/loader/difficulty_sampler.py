"""The time that `DifficultySampler` takes for a generation batch, and its state.

    python benchmarks/speed/loader/difficulty_sampler.py [--quick] [--json] [--save]

One block is 64 prompts with 8 rewards each: fold the rewards of an earlier block, weigh all prompts, draw, observe. TRL's
RepeatSampler shuffles once per epoch and then only repeats rows, so all of this time is additional.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Report, add_output_options

from sparsort.curriculum.loading.online.difficulty_sampler import DifficultySampler

BLOCK, GROUP = 64, 8
SIZES = {"10,000 prompts": 10_000, "1,000,000 prompts": 1_000_000}


def measure(report: Report, name: str, n: int, blocks: int) -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=n)
    for target, meaning in (("variance", "expected variance"), ((0.2, 0.8), "band")):
        sampler = DifficultySampler(difficulty, block=BLOCK, target=target)  # type: ignore[arg-type]
        stream, seconds = sampler.blocks(), []
        for _ in range(blocks):
            rewards = rng.integers(0, 2, BLOCK * GROUP)
            start = time.perf_counter()
            rows = next(stream)
            sampler.observe(np.repeat(rows, GROUP), rewards)
            seconds.append(time.perf_counter() - start)
        report.add(f"{name}, {meaning}", 1000 * statistics.median(seconds), "ms per block", better="lower")
    arrays = [value for value in sampler.state_dict().values() if isinstance(value, np.ndarray)]
    report.add(f"{name}, state", sum(array.nbytes for array in arrays) / 1e6, "MB", better="lower")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args()
    report = Report("difficulty_sampler", torch.device("cpu"))
    for name, n in SIZES.items():
        measure(report, name, n, 10 if arguments.quick else 40)
    report.finish(arguments)


if __name__ == "__main__":
    main()
