"""Toy experiments against the literature: when does the order of the training data matter?

Wu, Dyer and Neyshabur (2021, arXiv 2012.03107) train 25,000 image classifiers. They find that curricula, anti-curricula and
random order with the same pacing are equally good on clean data with a full budget, and that curricula win if labels are noisy or
steps are few. This script repeats the experiment for `plan_curriculum` with a small network on scikit-learn's handwritten digits:

    python benchmarks/studies/curriculum/curriculum_toys.py --save

Protocol, like theirs where possible:
- Labels of the training AND the validation rows are flipped in the same way; only the test rows are clean. A flipped label is one
  of the other labels with equal probability.
- Difficulty is the loss of each row, with the label it has, under reference networks trained on other rows with the same noise
  (cross-validation). The true labels are never used.
- As in the paper, an order is judged at the best pacing of a grid ("own"), and also at the best pacing of the curriculum
  ("same"). The best pacing has the highest accuracy on validation rows, over seeds other than those that are reported.
- A seed determines a split, its flips, its reference networks and its initial weights; all orders of a seed share them.
  Differences are paired by seed, with t intervals over seeds.

Tried before the protocol was fixed, at 40 % flipped labels: one pacing for all, a = 0.8 and b = 0.2 (at 150 steps the
curriculum is 1.6 points BELOW random order: it shows the flipped rows last, and most of its steps go to few rows); the pacing
chosen seed by seed (273 noisy validation rows cannot tell pacings apart); classes balanced within the easy share (no other
conclusion); budgets of 75, 150, 300, 600 and 1500 steps, all reported. The curriculum gains if random order cannot average
the noise (75 steps) or memorises it (600 steps and more); in between, noise costs little, and there is little to gain.
On clean labels "full" has to be long: at 400 and 600 steps the curriculum is still 1.0 and 0.7 points below random order, with
intervals that exclude zero; at 1500 all orders are within a point of each other. This margin is the floor here; it does not prove
that they are equal.

Shapes: M networks trained together, N rows, B rows per batch, D inputs, H hidden units, C classes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Report, add_output_options
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from sparsort.curriculum.ablation.statistics.resampling import student_t
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.terminal.progress import progress

Direction = Literal["easy_to_hard", "random", "hard_to_easy"]
ORDERS: tuple[Direction, ...] = ("easy_to_hard", "random", "hard_to_easy")
# A part of their grid: a is the share of training after which all rows are included (above 1: never), b the share at the start.
PACINGS = tuple(itertools.product((0.4, 0.8, 1.6), (0.2, 0.4, 0.8)))
ARMS = tuple(itertools.product(ORDERS, PACINGS))
PAIRS: dict[str, tuple[str, str]] = {
    "curriculum_over_random": ("easy_to_hard", "random"),
    "random_over_anti": ("random", "hard_to_easy"),
    "curriculum_over_plain": ("easy_to_hard", "plain"),
}
TRAIN, VALIDATION = 1_024, 273
BATCH, HIDDEN, CLASSES, FOLDS, REFERENCE_STEPS = 32, 128, 10, 4, 300
LEARNING_RATE, MOMENTUM = 0.1, 0.9
MARGIN = 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The share of flipped labels, and the length of training."""

    flipped: float
    steps: int


SHORT, FULL = "flipped_75_steps", "clean_1500_steps"
SETTINGS = {
    SHORT: Setting(flipped=0.4, steps=75),
    **{f"flipped_{steps}_steps": Setting(flipped=0.4, steps=steps) for steps in (150, 300, 600, 1_500)},
    "clean_75_steps": Setting(flipped=0.0, steps=75),
    FULL: Setting(flipped=0.0, steps=1_500),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """Accuracies of the networks of one seed in per cent, (M,) each: the networks of each of `ARMS`, then plain shuffle.

    `flips_found` is the probability that a flipped row has a higher difficulty than an unflipped one.
    """

    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    flips_found: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Inputs (N, D) float32, labels (N,) as the learner sees them, and which of them were flipped (N,)."""

    inputs: torch.Tensor
    labels: torch.Tensor
    flipped: torch.Tensor


def split(seed: int, flipped: float) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test rows of a seed; the test rows keep their true labels."""
    images, truth = load_digits(return_X_y=True)
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(truth))
    flips = rng.random(len(truth)) < flipped
    # The rows after the training and validation rows are the test rows.
    flips[order[TRAIN + VALIDATION :]] = False
    # A shift by 1 to CLASSES − 1 gives each of the other labels with equal probability.
    labels = np.where(flips, (truth + rng.integers(1, CLASSES, len(truth))) % CLASSES, truth)
    parts = np.split(order, [TRAIN, TRAIN + VALIDATION])
    inputs = torch.from_numpy((images / 16).astype(np.float32))
    train, validation, test = (
        Rows(inputs=inputs[part], labels=torch.from_numpy(labels[part]), flipped=torch.from_numpy(flips[part]))
        for part in parts
    )
    return train, validation, test


def train(rows: Rows, batches_MTB: NDArray[np.int64], seed: int) -> list[torch.Tensor]:
    """M networks of one hidden layer from the same initial weights, each on its own batches: SGD with cosine decay to zero.

    Their losses are summed, so that each network gets the same gradient as if it were trained alone.
    """
    networks, steps = batches_MTB.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    inputs = rows.inputs.shape[1]
    weights = [
        # He initialisation for ReLU.
        (torch.randn(inputs, HIDDEN, generator=generator) * (2 / inputs) ** 0.5),
        torch.zeros(1, HIDDEN),
        (torch.randn(HIDDEN, CLASSES, generator=generator) * (2 / HIDDEN) ** 0.5),
        torch.zeros(1, CLASSES),
    ]
    weights = [weight.expand(networks, *weight.shape).clone().requires_grad_() for weight in weights]
    optimiser = torch.optim.SGD(weights, lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    batches = torch.from_numpy(batches_MTB)
    for step in range(steps):
        chosen_MB = batches[:, step]
        logits_MBC = forward(weights, rows.inputs[chosen_MB])
        # Divided by the batch and not by M · B, so each network has the gradient of its own mean loss.
        loss = cross_entropy(logits_MBC.flatten(0, 1), rows.labels[chosen_MB].flatten(), reduction="sum") / BATCH
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return [weight.detach() for weight in weights]


def forward(weights: Sequence[torch.Tensor], inputs_MBD: torch.Tensor) -> torch.Tensor:
    """Logits, (M, B, C)."""
    first, first_bias, second, second_bias = weights
    return torch.relu(inputs_MBD @ first + first_bias) @ second + second_bias


def accuracies(weights: Sequence[torch.Tensor], rows: Rows) -> NDArray[np.float64]:
    """Accuracy of each network in per cent, (M,)."""
    guessed_MN = forward(weights, rows.inputs.expand(len(weights[0]), *rows.inputs.shape)).argmax(dim=-1)
    return 100.0 * (guessed_MN == rows.labels).double().mean(dim=1).numpy()


def difficulties(rows: Rows, seed: int) -> NDArray[np.float64]:
    """Loss of each row under a network that was trained on the other folds with their noise, (N,)."""
    rng = np.random.default_rng([seed, 1])
    fold_N = rng.permutation(len(rows.labels)) % FOLDS
    others = [np.flatnonzero(fold_N != fold) for fold in range(FOLDS)]
    # Each reference step draws a batch without replacement from the rows of the other folds.
    batches = [rng.permuted(np.tile(other, (REFERENCE_STEPS, 1)), axis=1)[:, :BATCH] for other in others]
    weights = train(rows, np.stack(batches), seed + 1_000)
    logits_MNC = forward(weights, rows.inputs.expand(FOLDS, *rows.inputs.shape))
    # Row n takes the logits of the network that did not train on its fold.
    losses = cross_entropy(logits_MNC[fold_N, np.arange(len(fold_N))], rows.labels, reduction="none")
    return losses.double().numpy()


def paced(
    difficulty: NDArray[np.float64], order: Direction, shape: tuple[float, float], steps: int, seed: int
) -> NDArray[np.int64]:
    """The batches of a plan in the pool mode, (T, B). `shape` is (a, b); with a > 1 the plan is cut off at `steps`."""
    a, b = shape
    plan = plan_curriculum(
        difficulty,
        mode="pool",
        pacing=Pacing(kind="linear", start=b, until=min(a, 1.0)),
        direction=order,
        # With a above 1, the plan is longer than the training, which therefore never sees all rows.
        steps=round(max(a, 1.0) * steps),
        batch_size=BATCH,
        seed=seed,
    )
    return np.stack([plan.batch(step) for step in range(steps)])


def plain(difficulty: NDArray[np.float64], steps: int, seed: int) -> NDArray[np.int64]:
    """The batches of a plain shuffle, epoch after epoch, (T, B)."""
    plan = plan_curriculum(difficulty, schedule="shuffle", batch_size=BATCH, seed=seed)
    return np.stack([plan.batch(step % plan.n_batches, step // plan.n_batches) for step in range(steps)])


def run(seed: int, setting: Setting) -> Trained:
    """Train every order with every pacing, and a plain shuffle, from the same weights on the same rows."""
    training, validation, test = split(seed, setting.flipped)
    difficulty = difficulties(training, seed)
    batches = [paced(difficulty, order, shape, setting.steps, seed) for order, shape in ARMS]
    weights = train(training, np.stack([*batches, plain(difficulty, setting.steps, seed)]), seed)
    flipped = training.flipped.numpy()
    # All pairs of a flipped and an unflipped row; the share of True is the AUC.
    above = difficulty[flipped][:, None] > difficulty[~flipped]
    return Trained(
        validation=accuracies(weights, validation),
        test=accuracies(weights, test),
        flips_found=float(above.mean()) if above.size else float("nan"),
    )


def chosen(tuning: Sequence[Trained]) -> dict[str, int]:
    """Index of each order's network with the best pacing by mean validation accuracy, and of the plain shuffle."""
    mean = np.mean([one.validation for one in tuning], axis=0)
    best = {
        order: max((number for number, (name, _) in enumerate(ARMS) if name == order), key=lambda number: mean[number])
        for order in ORDERS
    }
    return {**best, "plain": len(ARMS)}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean difference of two orders over seeds in points, and its 95 % t interval."""

    mean: float
    low: float
    high: float
    note: str

    @property
    def interval(self) -> str:
        """The interval in words; there is none if the seeds do not differ."""
        return "no interval" if np.isnan(self.low) else f"{self.low:+.2f} to {self.high:+.2f}"


def difference(seeds: Sequence[Trained], first: int, second: int) -> Difference:
    """Test accuracy of network `first` minus that of network `second`."""
    test = np.array([one.test for one in seeds])
    low, high, _ = student_t((test[:, first] - test[:, second])[:, None])
    mean = test.mean(axis=0)
    names = [f"{_name(number)} {mean[number]:.1f} %" for number in (first, second)]
    return Difference(
        mean=float(mean[first] - mean[second]), low=float(low[0]), high=float(high[0]), note=", ".join(names)
    )


def compared(tuning: Sequence[Trained], seeds: Sequence[Trained]) -> dict[str, Difference]:
    """Every pair of `PAIRS` at the orders' own best pacings ("own_…") and at the curriculum's ("same_…")."""
    own = chosen(tuning)
    shape = ARMS[own["easy_to_hard"]][1]
    # All orders at the pacing that is the curriculum's best.
    same = {**own, **{order: ARMS.index((order, shape)) for order in ORDERS}}
    found = {f"own_{name}": difference(seeds, own[one], own[other]) for name, (one, other) in PAIRS.items()}
    return found | {
        f"same_{name}": difference(seeds, same[one], same[other])
        for name, (one, other) in PAIRS.items()
        if other != "plain"
    }


def describe(report: Report, name: str, tuning: Sequence[Trained], seeds: Sequence[Trained]) -> None:
    """Add all differences of a setting. Those for which the literature has a result have floors."""
    found = compared(tuning, seeds)
    for pair, one in found.items():
        report.add(f"{name}_{pair}", one.mean, "points", note=f"95 %: {one.interval}; {one.note}")
    if name == SHORT:
        for pair in ("own_curriculum_over_random", "same_curriculum_over_random", "same_random_over_anti"):
            report.add(f"{name}_{pair}_low", found[pair].low, "points", floor=0.0, note="lower end of the interval")
        flips = float(np.mean([one.flips_found for one in seeds]))
        report.add("flips_found", flips, "AUC", note="difficulty of flipped rows against that of the others")
    if name == FULL:
        ends = [abs(end) for pair, one in found.items() if pair.startswith("own") for end in (one.low, one.high)]
        report.add(
            f"{name}_own_farthest_end",
            max(ends),
            "points",
            floor=MARGIN,
            better="lower",
            note="of the three intervals, from zero",
        )


def main() -> None:
    """Run every setting over the seeds, and print and save the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("curriculum-toys", torch.device("cpu"))
    names = [SHORT, FULL] if arguments.quick else list(SETTINGS)
    tuning, seeds = (4, 8) if arguments.quick else (10, 20)
    with progress("training", len(names) * (tuning + seeds)) as advance:
        for name in names:
            runs = []
            for seed in range(tuning + seeds):
                runs.append(run(seed, SETTINGS[name]))
                advance(1)
            # The seeds that choose the pacing are not reported.
            describe(report, name, runs[:tuning], runs[tuning:])
    report.finish(arguments)


def _name(number: int) -> str:
    if number == len(ARMS):
        return "plain"
    order, (a, b) = ARMS[number]
    return f"{order} (a {a:g}, b {b:g})"


if __name__ == "__main__":
    main()
