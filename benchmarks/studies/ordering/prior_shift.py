"""Which prior of `choose --criterion pdo` loses least when the label shares of the pool and of the queries differ.

    python benchmarks/studies/ordering/prior_shift.py --data FOLDER --save

FOLDER holds icl/*.jsonl as for `ordering_study.py`. No model is called: the demonstration sets, their 16 random orders and all
label log-probabilities are those of the study, from benchmarks/results/ordering-study-outcomes.parquet. With --save the
numbers are written to benchmarks/results/prior-shift.json, from which `ordering_study.py --save` writes a section of its page.

Protocol. Shifts of every task: none; for every label, a pool in which that label has 80 % of the rows, with the queries as they
are; and the reverse. The other labels share the remaining 20 % in their original proportions. Each shift is resampled
`RESAMPLES` times for each set, the same rows for every prior. The study's test rows are split at random, label by label, into
three parts: one joins the 32 development rows as the labelled rows of the pool, one provides the 32 unlabelled queries that
the criterion reads, and accuracy is measured on the third. Rows are drawn label by label, with replacement where a label has
too few; accuracy weighs the third part's rows to the queries' shares, which is the expectation of such a draw. The
demonstrations stay those of the unshifted pool.

Gain: accuracy of the chosen order minus the mean of the 16 orders. Loss: for each task and shift, the mean gain of the better of
uniform and pool minus that of the prior in question. Clusters are seeds of demonstration sets within a task; their sets of 4
and of 8 demonstrations are averaged first, because the smaller set is part of the larger. Settings of the estimators were
chosen on the seeds below `TUNED`; the loss is reported for all seeds and for the others alone.

Shapes: O random orders, P queries, N labelled rows, L labels, M priors.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import machine
from numpy.typing import NDArray
from orderer_candidates import TASKS, Case, Floats, Loader
from ordering_study_outcomes import unpack
from prior_shift_estimators import shares_by_bbse

from sparsort.curriculum.ablation.statistics.estimates import estimate_sets
from sparsort.curriculum.demos.criteria import label_criteria
from sparsort.curriculum.demos.criteria.distributions import log_softmax
from sparsort.curriculum.demos.criteria.label_shift import evenly_by_label, fit_bias, shares_by_em
from sparsort.curriculum.demos.criteria.ranking import choose
from sparsort.storage.files import write_json

RESULTS = Path(__file__).parents[2] / "results"
KEPT = RESULTS / "ordering-study-outcomes.parquet"
SAVED = RESULTS / "prior-shift.json"
MAJORITY, QUERIES, LABELLED, POOL = 0.8, 32, 64, 512
RESAMPLES, TUNED = 5, 5

Ints = NDArray[np.int64]
Kind = Literal["none", "pool", "queries"]


@dataclass(frozen=True)
class Shift:
    """What is shifted, and the label that has 80 % of the rows; −1 for none."""

    kind: Kind
    label: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One resample of a demonstration set under a shift.

    Attributes:
        queries: (O, P, L) normalised scores of the unlabelled queries.
        labelled: (O, N, L) the same of labelled pool rows, their labels as even as the pool allows.
        gold: (N,) their labels.
        pool, target: (L,) label shares of the pool and of the queries.
        accuracy: (O,) on the rows that are held out, at the queries' shares.
        seed: for ties.
    """

    queries: Floats
    labelled: Floats
    gold: Ints
    pool: Floats
    target: Floats
    accuracy: Floats
    seed: int


def shifts(labels: int) -> list[Shift]:
    """No shift, then every label of the pool, then of the queries."""
    kinds: tuple[Kind, Kind] = ("pool", "queries")
    return [Shift("none"), *(Shift(kind, label) for kind in kinds for label in range(labels))]


def shifted(shares: Floats, label: int) -> Floats:
    """The shares with one label at 80 % and the others in their proportions."""
    rest = np.where(np.arange(len(shares)) == label, 0.0, shares)
    moved: Floats = rest / rest.sum() * (1.0 - MAJORITY)
    moved[label] = MAJORITY
    return moved


def draw(gold: Ints, rows: Ints, shares: Floats, count: int, rng: np.random.Generator) -> Ints:
    """`count` of the rows at the label shares; with replacement for a label of too few rows, none for one without any."""
    members = [rows[gold[rows] == label] for label in range(len(shares))]
    present = np.where([len(own) > 0 for own in members], shares, 0.0)
    counts = rng.multinomial(count, present / present.sum())
    drawn = [rng.choice(own, n, replace=n > len(own)) for own, n in zip(members, counts, strict=True) if n]
    return rng.permutation(np.concatenate(drawn))


def thirds(gold: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """The rows in three parts of about equal size for every label."""
    parts: list[list[Ints]] = [[], [], []]
    for label in np.unique(gold):
        own = rng.permutation(np.flatnonzero(gold == label))
        for part, rows in zip(rng.permutation(3), np.array_split(own, 3), strict=True):
            parts[part].append(rows)
    first, second, third = (np.concatenate(part) for part in parts)
    return first, second, third


def samples(case: Case, shift: Shift, resamples: int, *, from_pool: bool) -> Iterator[Sample]:
    """Resamples of a set under a shift; the same rows whatever the prior.

    Args:
        case: the demonstration set.
        shift: what is shifted.
        resamples: how many.
        from_pool: whether the criterion reads unlabelled rows of the pool, as `choose -k` does without --queries, and not the
            queries.
    """
    labels = len(case.prior)
    natural = np.bincount(case.gold, minlength=labels) / len(case.gold)
    target = shifted(natural, shift.label) if shift.kind == "queries" else natural
    pool = case.prior / case.prior.sum()
    pool = shifted(pool, shift.label) if shift.kind == "pool" else pool
    every = log_softmax(np.concatenate([case.test.log_p, case.dev.log_p], axis=1))
    gold = np.concatenate([case.gold, case.dev_gold])
    right = case.right
    for number in range(resamples):
        place = (
            TASKS.index(case.task),
            case.seed,
            ("none", "pool", "queries").index(shift.kind),
            shift.label + 1,
            number,
        )
        rng = np.random.default_rng([*place])
        first, asked, held_out = thirds(case.gold, rng)
        of_pool = np.concatenate([first, len(case.gold) + np.arange(len(case.dev_gold))])
        known = draw(gold, of_pool, pool, POOL, rng)
        known = known[evenly_by_label(gold[known].tolist(), seed=number)[:LABELLED]]
        queries = draw(gold, asked, pool if from_pool else target, QUERIES, rng)
        counts = np.bincount(case.gold[held_out], minlength=labels)
        weight = np.where(counts > 0, target, 0.0) / np.maximum(counts, 1)
        weight = weight[case.gold[held_out]]
        yield Sample(
            queries=every[:, queries],
            labelled=every[:, known],
            gold=gold[known],
            pool=pool,
            target=target,
            accuracy=right[:, held_out] @ (weight / weight.sum()),
            seed=number,
        )


def _uniform(sample: Sample) -> Floats:
    return np.full(len(sample.pool), 1.0 / len(sample.pool))


@functools.lru_cache(maxsize=16)
def _em_of(sample: Sample, order: int, rows: int) -> Floats:
    return shares_by_em(sample.queries[order], fit_bias(sample.labelled[order, :rows], sample.gold[:rows]))


def _em(sample: Sample, rows: int = LABELLED, orders: Sequence[int] = (0,)) -> Floats:
    """EM as `choose` has it: everything is read under the first order alone; of several orders the mean."""
    mean: Floats = np.mean([_em_of(sample, order, rows) for order in orders], axis=0)
    return mean


def _pdo(prior: Callable[[Sample], Floats]) -> Callable[[Sample], Floats]:
    return lambda sample: label_criteria.pdo(sample.queries, np.maximum(prior(sample), 1e-3))


def _best_on_labelled(sample: Sample) -> Floats:
    likelihood = label_criteria.gold_log_likelihood(sample.labelled, sample.gold)
    # The likelihood decides between equals, as in the criterion.
    return label_criteria.best_on_dev(sample.labelled, sample.gold) + 1e-6 * likelihood


# By name: what a criterion scores the orders by, and the prior where it is PDO with an estimate.
ESTIMATES: dict[str, Callable[[Sample], Floats]] = {
    "estimated (EM)": _em,
    "EM, 32 labelled rows": lambda sample: _em(sample, rows=32),
    "EM, 16 labelled rows": lambda sample: _em(sample, rows=16),
    "EM, each of 4 orders": lambda sample: _em(sample, orders=range(4)),
    "EM and uniform, averaged": lambda sample: (_em(sample) + _uniform(sample)) / 2,
    "BBSE": lambda sample: shares_by_bbse(sample.queries[:1], sample.labelled[:1], sample.gold),
    "BBSE, 16 orders": lambda sample: shares_by_bbse(sample.queries, sample.labelled, sample.gold),
}
ORDERERS: dict[str, Callable[[Sample], Floats]] = {
    "uniform": _pdo(_uniform),
    "pool": _pdo(lambda sample: sample.pool),
    **{name: _pdo(prior) for name, prior in ESTIMATES.items()},
    "true shares of the queries": _pdo(lambda sample: sample.target),
    "LocalE": lambda sample: label_criteria.locale(sample.queries),
    "GlobalE": lambda sample: label_criteria.globale(sample.queries),
    "best on 64 labelled rows": _best_on_labelled,
}


# What is tried where the criterion reads unlabelled rows of the pool: an estimate would be one of shares that can be counted.
FROM_POOL: dict[str, Callable[[Sample], Floats]] = {
    name: ORDERERS[name] for name in ("uniform", "pool", "estimated (EM)", "true shares of the queries", "LocalE")
} | {"uniform and pool, averaged": _pdo(lambda sample: (sample.pool + _uniform(sample)) / 2)}

Gains = dict[tuple[str, int, Shift], dict[str, Floats]]


def gains(cases: Sequence[Case], orderers: dict[str, Callable[[Sample], Floats]], *, from_pool: bool) -> Gains:
    """By task, seed and shift: what each orderer gains in points, over resamples and both numbers of demonstrations."""
    found: dict[tuple[str, int, Shift], dict[str, list[float]]] = {}
    for case in cases:
        for shift in shifts(len(case.prior)):
            cell = found.setdefault((case.task, case.seed, shift), {name: [] for name in orderers})
            for sample in samples(case, shift, RESAMPLES, from_pool=from_pool):
                for name, score in orderers.items():
                    best = choose(score(sample), seed=sample.seed).index
                    cell[name].append(100.0 * float(sample.accuracy[best] - sample.accuracy.mean()))
        print(f"{case.task}, k = {case.k}, set {case.seed}", file=sys.stderr)
    return {key: {name: np.array(values) for name, values in cell.items()} for key, cell in found.items()}


def losses(found: Gains) -> Gains:
    """Of shifted cells: the gain of the better of uniform and pool, by their means over all sets, minus the gain itself."""
    shifted_cells = {key: cell for key, cell in found.items() if key[2].kind != "none"}
    made = {}
    for (task, seed, shift), cell in shifted_cells.items():
        alike = [other for key, other in shifted_cells.items() if (key[0], key[2]) == (task, shift)]
        better = max(("uniform", "pool"), key=lambda name: float(np.mean([other[name] for other in alike])))
        made[task, seed, shift] = {name: cell[better] - values for name, values in cell.items()}
    return made


def estimated(found: Gains, name: str, kinds: Sequence[Kind], tasks: Sequence[str]) -> list[float | None]:
    """Mean and 95 % interval (None without one) over clusters (task, seed); tasks, and shifts of a task, count alike."""
    clusters = []
    for task in tasks:
        for seed in sorted({key[1] for key in found if key[0] == task}):
            own = [cell[name].mean() for key, cell in found.items() if key[:2] == (task, seed) and key[2].kind in kinds]
            clusters.append(float(np.mean(own)))
    one = estimate_sets(np.array(clusters))
    return [round(value, 3) if np.isfinite(value) else None for value in (one.value, one.low, one.high)]


def table(found: Gains) -> dict[str, Any]:
    """Every orderer's gains and losses, over all tasks and within each."""
    lost = losses(found)
    later = losses({key: cell for key, cell in found.items() if key[1] >= TUNED})
    both: tuple[Kind, Kind] = ("pool", "queries")
    rows = {}
    for name in next(iter(found.values())):
        rows[name] = {
            "gain": {kind: estimated(found, name, (kind,), TASKS) for kind in ("none", *both)},
            "loss": estimated(lost, name, both, TASKS),
            "loss_later_sets": estimated(later, name, both, TASKS),
            "by_task": {
                task: {
                    "gain": {kind: estimated(found, name, (kind,), (task,)) for kind in ("none", *both)},
                    "loss": estimated(lost, name, both, (task,)),
                }
                for task in TASKS
            },
        }
    return rows


def errors(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Half the absolute difference between estimated and true shares, over the first resample of every set."""
    priors = {"uniform": _uniform, "pool": lambda sample: sample.pool, **ESTIMATES}
    found: dict[str, dict[str, list[float]]] = {name: {"none": [], "pool": [], "queries": []} for name in priors}
    for case in cases:
        for shift in shifts(len(case.prior)):
            (sample,) = samples(case, shift, 1, from_pool=False)
            for name, prior in priors.items():
                found[name][shift.kind].append(float(np.abs(prior(sample) - sample.target).sum() / 2))
    return {name: {kind: round(float(np.mean(v)), 3) for kind, v in own.items()} for name, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with icl/*.jsonl")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name} in benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        unpack(KEPT, store)
        cases = list(Loader(store, arguments.data, None).cases())
    whole = {
        "benchmark": "prior_shift",
        "protocol": {
            "sets": len(cases),
            "resamples": RESAMPLES,
            "queries": QUERIES,
            "labelled_rows": LABELLED,
            "majority": MAJORITY,
            "seeds_for_tuning": TUNED,
        },
        "queries": table(gains(cases, ORDERERS, from_pool=False)),
        "pool_rows": table(gains(cases, FROM_POOL, from_pool=True)),
        "error_of_shares": errors(cases),
        "machine": machine(torch.device("cpu")),
        "command": "python benchmarks/studies/ordering/prior_shift.py --data FOLDER --save",
    }
    print(json.dumps(whole, indent=1))
    if arguments.save:
        write_json(SAVED, whole)
        print(f"saved to {SAVED}", file=sys.stderr)


if __name__ == "__main__":
    main()
