"""Which prompts should RL with verifiable rewards draw? DifficultySampler against uniform draws, a filter and the prior alone.

    nice -n 5 python benchmarks/studies/rlvr/rlvr_study.py            # runs what is missing, then writes the page
    python benchmarks/studies/rlvr/rlvr_study.py --page               # only the page, from the stored results

The task is in `rlvr_task.py`. Arms, hypotheses and the primary test were fixed in `docs/design/rl-difficulty-and-resuming.md`
before the first run; the task was tuned (warm start, learning rate, number of steps) on the uniform arm and seed 100 only. Every
run is stored when it ends, so an interrupted study continues.

All arms have the same number of rollouts, which includes those of a pilot. A seed determines the data, the scores, the warm start
and the test prompts, so arms are paired by seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import RESULTS, machine
from rlvr_task import LONGEST, Policy, Strings, make_strings, warm_start

from sparsort.curriculum.ablation.statistics.resampling import student_t
from sparsort.curriculum.loading.online.difficulty_sampler import DifficultySampler
from sparsort.scoring.calibration.correlation import holm
from sparsort.storage.files import write_atomically, write_json
from sparsort.terminal.progress import progress

FILE = RESULTS / "rlvr-study.json"
PAGE = Path(__file__).resolve().parents[3] / "docs" / "results" / "rl-difficulty.md"

SEEDS = tuple(range(5))
PROMPTS, TEST_PER_LENGTH = 512, 40
BLOCK, GROUP, STEPS, EVALUATIONS = 8, 8, 250, 10
WARM_STEPS, RATE = 150, 1e-3
# The score is the length plus noise of three quarters of its deviation: a correlation of 0.8.
NOISE = 0.75
PILOT_PROMPTS = 32
ARMS = {
    "uniform": "epochs of shuffled prompts",
    "filter": "8 rollouts of each prompt first; prompts that pass always or never are dropped",
    "prior": "the calibrated prior alone, never updated",
    "sampler": "`DifficultySampler` without a prior",
    "sampler_prior": "`DifficultySampler` with the calibrated prior",
}
# The first pair is the primary test; the others are secondary, with Holm's correction.
PAIRS = (
    ("sampler_prior", "uniform"),
    ("sampler_prior", "sampler"),
    ("sampler_prior", "filter"),
    ("prior", "uniform"),
    ("sampler", "uniform"),
)
Observe = Callable[[NDArray[np.int64], NDArray[np.float64]], None]


class World:
    """What all arms of a seed share: training prompts, their scores, test prompts, and the warm policy."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        lengths = rng.integers(1, LONGEST + 1, PROMPTS)
        self.train = make_strings(lengths, rng)
        self.scores = lengths + rng.normal(0, NOISE * lengths.std(), PROMPTS)
        self.test = make_strings(np.repeat(np.arange(1, LONGEST + 1), TEST_PER_LENGTH), rng)
        self.warm = warm_start(seed, steps=WARM_STEPS, rate=RATE, rng=rng)

    def policy(self) -> Policy:
        policy = copy.deepcopy(self.warm)
        # The warm start ends at a rate of 0.
        for group in policy.optimiser.param_groups:
            group["lr"] = RATE
        return policy


class Run:
    """One run of an arm: counts rollouts, and evaluates at equal numbers of them."""

    def __init__(self, world: World) -> None:
        self.world, self.policy = world, world.policy()
        self.generator = torch.Generator().manual_seed(world.seed)
        self.rollouts = 0
        self.test: list[float] = []
        self.informative: list[float] = []

    def roll(self, rows: NDArray[np.int64]) -> tuple[Strings, torch.Tensor, NDArray[np.float64]]:
        """`GROUP` rollouts of each row: the strings, the answers, and the rewards (rows × GROUP,)."""
        strings = self.world.train.at(np.repeat(rows, GROUP))
        answers, rewards = self.policy.answer(strings, self.generator)
        self.rollouts += len(rewards)
        self._evaluate()
        return strings, answers, rewards

    def pilot(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The pass rate of each row over `GROUP` rollouts, which count like those of training."""
        rates = [self.roll(part)[2].reshape(-1, GROUP).mean(1) for part in np.array_split(rows, -(-len(rows) // BLOCK))]
        return np.concatenate(rates)

    def train(self, blocks: Iterator[NDArray[np.int64]], observe: Observe | None = None) -> None:
        """Train until the rollouts are used up."""
        while self.rollouts < STEPS * BLOCK * GROUP:
            rows = next(blocks)
            strings, answers, rewards = self.roll(rows)
            self.informative.append(float((np.ptp(rewards.reshape(-1, GROUP), axis=1) > 0).mean()))
            self.policy.update(strings, answers, rewards, GROUP)
            if observe is not None:
                observe(np.repeat(rows, GROUP), rewards)
        self._evaluate(at_end=True)

    def _evaluate(self, at_end: bool = False) -> None:
        # Evaluation k belongs to k tenths of the rollouts; a pilot delays training, not the evaluations.
        tenths = self.rollouts * EVALUATIONS / (STEPS * BLOCK * GROUP)
        while len(self.test) < (EVALUATIONS if at_end else min(int(tenths), EVALUATIONS - 1)):
            self.test.append(float(self.policy.pass_rates(self.world.test).mean()))


def run_arm(arm: str, world: World) -> dict[str, Any]:
    """Train one arm; the curve of test pass rates, and the share of groups with both passes and failures."""
    run, rng = Run(world), np.random.default_rng([world.seed, 1])
    if arm == "uniform":
        run.train(shuffled(np.arange(PROMPTS), rng))
    elif arm == "filter":
        rates = run.pilot(np.arange(PROMPTS))
        kept = np.flatnonzero((rates > 0) & (rates < 1))
        if len(kept) < BLOCK:
            raise RuntimeError(f"the filter keeps {len(kept)} prompts, fewer than a step needs")
        run.train(shuffled(kept, rng))
    else:
        options: dict[str, Any] = {"block": BLOCK, "lag": 0, "seed": world.seed}
        sampler = DifficultySampler(PROMPTS if arm == "sampler" else world.scores, **options)
        if arm != "sampler":
            rows = rng.choice(PROMPTS, PILOT_PROMPTS, replace=False)
            sampler.fit(world.scores[rows], run.pilot(rows), rollouts=GROUP)
        run.train(endless(sampler), None if arm == "prior" else sampler.observe)
    return {"test": run.test, "informative": float(np.mean(run.informative)), "rollouts": run.rollouts}


def shuffled(rows: NDArray[np.int64], rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Blocks of shuffled epochs without end; a last block that is too small is dropped, as in TRL."""
    while True:
        order = rng.permutation(rows)
        yield from (order[start : start + BLOCK] for start in range(0, len(order) - BLOCK + 1, BLOCK))


def endless(sampler: DifficultySampler) -> Iterator[NDArray[np.int64]]:
    while True:
        yield from sampler.blocks()


def run_study() -> dict[str, Any]:
    """Run what is missing."""
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"runs": {}}
    results["machine"] = machine(torch.device("cpu"))
    missing = [(seed, arm) for seed in SEEDS for arm in ARMS if f"{seed}/{arm}" not in results["runs"]]
    world: World | None = None
    with progress("runs", len(missing)) as advance:
        for seed, arm in missing:
            if world is None or world.seed != seed:
                world = World(seed)
            start = time.process_time()
            run = run_arm(arm, world)
            warm = float(world.warm.pass_rates(world.test).mean())
            results["runs"][f"{seed}/{arm}"] = {**run, "warm": warm, "cpu_s": time.process_time() - start}
            write_json(FILE, results)
            advance(1)
    return results


def area(results: dict[str, Any], arm: str) -> NDArray[np.float64]:
    """The mean test pass rate over the evaluations, by seed, in points."""
    return np.array([100 * np.mean(results["runs"][f"{seed}/{arm}"]["test"]) for seed in SEEDS])


def final(results: dict[str, Any], arm: str) -> NDArray[np.float64]:
    return np.array([100 * results["runs"][f"{seed}/{arm}"]["test"][-1] for seed in SEEDS])


def differences(results: dict[str, Any], of: Callable[[dict[str, Any], str], NDArray[np.float64]]) -> list[list[float]]:
    """Mean, low, high and p of each of `PAIRS`; p of the secondary pairs after Holm's correction."""
    rows = []
    for first, second in PAIRS:
        difference = of(results, first) - of(results, second)
        low, high, p = (float(value[0]) for value in student_t(difference[:, None]))
        rows.append([float(difference.mean()), low, high, p])
    for row, p in zip(rows[1:], holm([row[3] for row in rows[1:]]), strict=True):
        row[3] = float(p)
    return rows


def page(results: dict[str, Any]) -> str:
    """The page with the results."""
    runs = results["runs"]
    warm = 100 * np.mean([runs[f"{seed}/uniform"]["warm"] for seed in SEEDS])
    minutes = sum(run["cpu_s"] for run in runs.values()) / 60
    tables = [differences(results, area), differences(results, final)]
    blocks = [
        "# Which prompts should RL with verifiable rewards draw?",
        f"`python benchmarks/studies/rlvr/rlvr_study.py` ({minutes:.0f} minutes of CPU time on one core) writes this page. "
        "Hypotheses, arms and the primary test were [written down](../design/rl-difficulty-and-resuming.md) before the first "
        "run.",
        f"A transformer of 0.1 million parameters answers a string of 1 to {LONGEST} digits with the reversed string. After a "
        f"supervised warm start it passes {warm:.0f} % of the test prompts: short strings nearly always, long ones never. "
        f"GRPO then trains it for {STEPS * BLOCK * GROUP:,} rollouts ({BLOCK} prompts × {GROUP} rollouts per step, {PROMPTS} "
        "prompts). The score of a prompt is its length plus noise (correlation 0.8). All arms have the same number of "
        "rollouts, and pay for their pilots.",
        _arm_table(results),
        "The area under the curve is the mean test pass rate over ten evaluations at equal numbers of rollouts, in points. A "
        "group has a gradient if its rollouts do not all have the same reward.",
        _difference_table(tables),
        f"Means over {len(SEEDS)} seeds, paired, with 95 % t intervals. The p-values of the secondary rows are corrected by "
        "Holm's method within their column. Only the area of the primary row was the primary test.",
        "\n".join(_conclusions(*tables)),
        "What this does not show: one toy task, one size, one informative score, one setting of the sampler. Five seeds find "
        "only large differences. The filter is applied once, before training; filters that are repeated during training "
        "cost more rollouts and drop less.",
    ]
    wrapped = (block if block[0] in "#|-" else textwrap.fill(block, 130, break_on_hyphens=False) for block in blocks)
    return "\n\n".join(wrapped) + "\n"


def _arm_table(results: dict[str, Any]) -> str:
    lines = [
        "| arm | prompts | area under the curve | final pass rate | groups with a gradient |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, meaning in ARMS.items():
        informative = 100 * np.mean([results["runs"][f"{seed}/{arm}"]["informative"] for seed in SEEDS])
        numbers = f"{area(results, arm).mean():.1f} | {final(results, arm).mean():.1f} | {informative:.0f} %"
        lines.append(f"| `{arm}` | {meaning} | {numbers} |")
    return "\n".join(lines)


def _difference_table(tables: list[list[list[float]]]) -> str:
    lines = ["| difference, points | area under the curve | final pass rate |", "| --- | --- | --- |"]
    for number, (first, second) in enumerate(PAIRS):
        cells = " | ".join(_difference(*table[number]) for table in tables)
        lines.append(f"| {'' if number else '**primary:** '}`{first}` − `{second}` | {cells} |")
    return "\n".join(lines)


def _difference(mean: float, low: float, high: float, p: float) -> str:
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}], p = {p:.2g}".replace("-", "−").replace("e−", "e-")


def _conclusions(rows: list[list[float]], final_rows: list[list[float]]) -> list[str]:
    lines = []
    for number, ((first, second), (mean, _low, _high, p)) in enumerate(zip(PAIRS, rows, strict=True)):
        name = "Primary" if number == 0 else "Secondary"
        if not p < 0.05:
            lines.append(f"- {name}, a null result: no difference between `{first}` and `{second}` was found.")
        else:
            lines.append(f"- {name}: `{first}` is {'better' if mean > 0 else 'worse'} than `{second}`.")
    mean, low, high, _ = final_rows[0]
    if low > 0 or high < 0:
        first, second = PAIRS[0]
        lines.append(
            f"- At the end of training, `{first}` is {abs(mean):.1f} points {'above' if mean > 0 else 'below'} `{second}`, with "
            "an interval that excludes zero."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from the stored results, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(FILE.read_text()) if arguments.page else run_study()
    with write_atomically(PAGE) as temporary:
        temporary.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
