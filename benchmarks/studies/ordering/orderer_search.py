"""The search for an orderer: the cheap numbers of a model that correlate with the accuracy of an order.

    python benchmarks/studies/ordering/orderer_search.py STORE --data FOLDER [--read-demos FOLDER]
        [--early 2] [--by rho] [--save [--name N]]

STORE is the store of an ordering study (`sparsort ablate`): every (order, query) pair with its label log-probabilities, the
sparsity of the query's last state and the entropy of its next token. Only `--read-demos` calls a model: it reads every
demonstration as a query after the demonstrations before it (only the prefix), and stores the outcomes in a folder.

Protocol. Tuning uses mr and sst5 at both shot counts and trec at k = 4, on sets of seeds below `--early`. It gives every
candidate of every family its direction and each family its winner, by the mean over (task, k) of Spearman's ρ over the random
orders (with `--by gain`: by the mean accuracy gained by the order that it ranks highest). p of the best of all candidates is
max-T (Westfall and Young 1993) with random signs of whole seeds. The report has the unchanged winners on trec at k = 8, rte and
cb ("new tasks"), on the later sets of the tuning tasks ("new sets"), and on all later sets, with intervals by bootstrap over
seeds within tasks, one-sided p by sign flips, and Holm's correction over the winners. `FROZEN` were named after the sets of
`SEEN` had been seen; "fresh" are the others. Accuracy is that on the test rows, without contextual calibration; no candidate sees
their labels.

Shapes: O random orders, P probe queries, Q test queries, L labels, F features, C candidates, U units (demonstration sets).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from orderer_candidates import (
    TOGETHER,
    Case,
    Floats,
    Loader,
    Scores,
    baselines,
    by_query,
    correlation,
    families,
    joined,
)
from scipy.stats import rankdata

from sparsort.curriculum.demos.criteria.ranking import choose
from sparsort.scoring.calibration.correlation import holm
from sparsort.storage.files import write_json

RESULTS = Path(__file__).parents[2] / "results"
TUNING_CELLS = {("mr", 4), ("mr", 8), ("sst5", 4), ("sst5", 8), ("trec", 4)}
# Named before any set outside SEEN existed, as (family, candidate, direction).
FROZEN = {
    "sparsest before the norm": ("density", "dev 32, mean pre_norm/top10_energy", 1),
    "quietest after the norm": ("density", "dev 32, mean post_norm/l1", -1),
    "sparsest before the norm, 8 queries": ("density", "dev 8, mean pre_norm/top10_energy", 1),
    "quietest after the norm, 8 queries": ("density", "dev 8, mean post_norm/l1", -1),
}
SEEN = {(task, k, seed) for task in ("trec", "mr", "sst5", "rte", "cb") for k in (4, 8) for seed in (0, 1)} - {
    (task, 8, 1) for task in ("mr", "sst5", "rte", "cb")
}
JOINED = ("two of ours", "ours with a baseline", "ours prunes, a baseline decides")
FLIPS, RESAMPLES = 16384, 4000


def rho(scores: Floats, accuracy: Floats) -> float:
    return float(correlation(rankdata(scores), rankdata(accuracy)))


def gains(scores: Floats, accuracy: Floats, seed: int) -> tuple[float, float]:
    """Accuracy of the best order by the scores, and of the four best, minus the mean of all orders."""
    # The seed breaks ties, as in `sparsort choose`.
    ranking = choose(scores, seed=seed).ranking
    return float(accuracy[ranking[0]] - accuracy.mean()), float(accuracy[ranking[:4]].mean() - accuracy.mean())


def beyond_last_label(scores: Floats, case: Case) -> float:
    """Accuracy of the best order minus the mean of the orders that end with the same label."""
    best, last = choose(scores, seed=case.seed).index, case.demo_gold[:, -1]
    return float(case.accuracy[best] - case.accuracy[last == last[best]].mean())


def cell_mean(cases: Sequence[Case], values_U: Any) -> Floats:
    """The mean over (task, k) of the means over sets; further axes are kept."""
    values = np.asarray(values_U, dtype=np.float64)
    cells = {case.cell for case in cases}
    parts = [values[[case.cell == cell for case in cases]].mean(axis=0) for cell in sorted(cells)]
    mean: Floats = np.mean(parts, axis=0)
    return mean


def interval(cases: Sequence[Case], values_U: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval: seeds are resampled within each task, with all of their sets. NaN if a task has one seed."""
    values, rng = np.asarray(values_U, dtype=np.float64), np.random.default_rng(0)
    cells = sorted({case.cell for case in cases})
    place = {(case.cell, case.seed): row for row, case in enumerate(cases)}
    sums = np.zeros((RESAMPLES, len(cells)))
    counts = np.zeros_like(sums)
    for task in sorted({case.task for case in cases}):
        seeds = sorted({case.seed for case in cases if case.task == task})
        if len(seeds) == 1:
            return float("nan"), float("nan")
        # How often each seed is drawn. Counts are equivalent to drawing, and need no copies of the sets.
        drawn = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=RESAMPLES)
        for column, cell in enumerate(cells):
            for number, seed in enumerate(seeds):
                if cell[0] == task and (cell, seed) in place:
                    sums[:, column] += drawn[:, number] * values[place[cell, seed]]
                    counts[:, column] += drawn[:, number]
    # A cell is NaN if no seed of it was drawn.
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    low, high = np.nanquantile(means.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def statistics(
    cases: Sequence[Case], tables: Sequence[Scores], by: str, turned: bool
) -> tuple[list[tuple[str, int]], Floats]:
    """The candidates that all sets have, with a sign, and the values (U, C) by which they are judged."""
    names = [name for name in tables[0] if all(name in table for table in tables)]
    signed = [(name, sign) for sign in ((1, -1) if turned else (1,)) for name in names]
    rows = []
    for case, table in zip(cases, tables, strict=True):
        if by == "rho":
            row = [sign * rho(table[name], case.accuracy) for name, sign in signed]
        else:
            row = [gains(sign * table[name], case.accuracy, case.seed)[0] for name, sign in signed]
        rows.append(row)
    return signed, np.array(rows)


def flipped(cases: Sequence[Case], values_UC: Floats) -> Floats:
    """Means over (task, k) under random signs of whole clusters, (R, C); under all combinations of signs if they are few.

    A cluster is one seed of a task, because its set of 4 demonstrations is part of its set of 8. Orders with the same end give
    similar answers, so permuting orders would treat them as independent and find too many significant results.
    """
    clusters = sorted({(case.task, case.seed) for case in cases})
    member = np.array([clusters.index((case.task, case.seed)) for case in cases])
    if 2 ** len(clusters) <= FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(clusters))))
    else:
        signs = np.random.default_rng(1).choice((1.0, -1.0), size=(FLIPS, len(clusters)))
        # The first row is the observed data, so that a p-value is never 0.
        signs[0] = 1.0
    cells = sorted({case.cell for case in cases})
    # Every (task, k) has equal weight, and within it every set.
    weight = np.array([1 / len(cells) / sum(other.cell == case.cell for other in cases) for case in cases])
    means: Floats = (signs[:, member] * weight) @ values_UC
    return means


@dataclass(frozen=True, kw_only=True)
class Winner:
    """A family's best candidate in tuning, with the sign that makes higher better."""

    family: str
    name: str
    sign: int
    tuning: float
    tried: int


def tune(
    cases: Sequence[Case], table: Callable[[Case], dict[str, Scores]], by: str, *, turned: bool = True
) -> tuple[list[Winner], dict[str, Any]]:
    """Each family's winner, and a record of all candidates. With `turned`, both signs of a candidate are tried."""
    tables = [table(case) for case in cases]
    winners, record, nulls = [], {}, []
    for family in tables[0]:
        signed, each = statistics(cases, [one[family] for one in tables], by, turned)
        if not signed:
            continue
        null = flipped(cases, each)
        # max-T: the best candidate is compared with the best one under each combination of signs.
        nulls.append(null.max(axis=1))
        best = int(null[0].argmax())
        name, sign = signed[best]
        count = len(signed) // (2 if turned else 1)
        winners.append(Winner(family=family, name=name, sign=sign, tuning=float(null[0, best]), tried=count))
        record[family] = {
            "tried": count,
            "p_best_of_family": float((nulls[-1] >= null[0, best] - 1e-12).mean()),
            by: {one: round(float(value), 3) for (one, _), value in zip(signed[:count], null[0], strict=False)},
        }
    over_all = np.max(nulls, axis=0)
    for winner in winners:
        record[winner.family]["p_best_of_all"] = float((over_all >= winner.tuning - 1e-12).mean())
    return winners, record


def _p(cases: Sequence[Case], values_U: Sequence[float]) -> float:
    """One-sided p-value for a mean above 0."""
    null = flipped(cases, np.asarray(values_U)[:, None])[:, 0]
    # The tolerance counts combinations that equal the observed mean up to rounding.
    return float((null >= null[0] - 1e-12).mean())


def judge(cases: Sequence[Case], scores_of: Callable[[Case], Floats]) -> dict[str, Any]:
    """The figures of one orderer on some sets."""
    scores = [scores_of(case) for case in cases]
    rhos = [rho(own, case.accuracy) for own, case in zip(scores, cases, strict=True)]
    both = np.array([gains(own, case.accuracy, case.seed) for own, case in zip(scores, cases, strict=True)])
    mean = float(cell_mean(cases, rhos))
    cells = sorted({case.cell for case in cases})
    by_cell = {
        f"{task} {k}": [
            round(float(np.mean([x for x, c in zip(column, cases, strict=True) if c.cell == (task, k)])), 4)
            for column in (rhos, both[:, 0], both[:, 1])
        ]
        for task, k in cells
    }
    return {
        "rho": mean,
        "p": _p(cases, rhos),
        "p_gain": _p(cases, both[:, 0]),
        "gain": float(cell_mean(cases, both[:, 0])),
        "gain_interval": interval(cases, both[:, 0]),
        "gain_beyond_last_label": float(
            cell_mean(cases, [beyond_last_label(own, case) for own, case in zip(scores, cases, strict=True)])
        ),
        "gain_of_four": float(cell_mean(cases, both[:, 1])),
        "gain_of_four_interval": interval(cases, both[:, 1]),
        "by_cell": by_cell,
    }


# The study

Table = dict[int, dict[str, Scores]]


def calibrated(cases: Sequence[Case], table: Table) -> dict[int, Floats]:
    """Scores by the density, with its sign, that followed the dev rows' likelihood best in the task's other sets."""
    pools = {
        id(case): {
            name: values
            for family in ("density", "content-free, density", "demonstrations in place, density")
            for name, values in table[id(case)].get(family, {}).items()
            if not name.startswith(("dev 4", "dev 8", "dev 16"))
        }
        for case in cases
    }
    found = {}
    for case in cases:
        others = [other for other in cases if other.task == case.task and other is not case]
        names = [name for name in pools[id(case)] if all(name in pools[id(other)] for other in others)]
        if others:
            followed = [
                np.mean([rho(pools[id(other)][name], other.dev_likelihood) for other in others]) for name in names
            ]
            best = int(np.abs(followed).argmax())
            found[id(case)] = np.sign(followed[best]) * pools[id(case)][names[best]]
    return found


class Search:
    """All candidates of all sets, tuned on one part and reported on the others."""

    def __init__(self, cases: Sequence[Case], names: Sequence[str], early: int, by: str) -> None:
        self.names = names
        self.parts = {
            "tuning": [case for case in cases if case.cell in TUNING_CELLS and case.seed < early],
            "new tasks": [case for case in cases if case.cell not in TUNING_CELLS],
            "new sets": [case for case in cases if case.cell in TUNING_CELLS and case.seed >= early],
            "all later sets": [case for case in cases if case.seed >= early],
            "fresh, for the frozen": [case for case in cases if (*case.cell, case.seed) not in SEEN],
        }
        tuning = self.parts["tuning"]
        self.table: Table = {id(case): families(case, names) for case in cases}
        self.basis = {id(case): baselines(case, names) for case in cases}
        self.winners, self.record = tune(tuning, lambda case: self.table[id(case)], by)
        ours = [winner for winner in self.winners if winner.family != "read-out"]
        # Named by tuning alone, before any other set is looked at.
        self.primary = max(ours, key=lambda winner: winner.tuning)
        for case in cases:
            found = {w.family: w.sign * self.table[id(case)][w.family][w.name] for w in ours if self._has(case, w)}
            self.table[id(case)] |= joined(found, self.basis[id(case)])
        second, record = tune(
            tuning, lambda case: {family: self.table[id(case)][family] for family in JOINED}, by, turned=False
        )
        self.winners += second
        self.record |= record
        self.calibrated = calibrated(cases, self.table)
        self.by_query = {id(case): by_query(case, names) for case in cases}
        shared = {
            name: cell_mean(tuning, [self.by_query[id(case)][name] for case in tuning])
            for name in self.by_query[id(tuning[0])]
        }
        self.best_by_query = max(
            (name for name in shared if name not in TOGETHER), key=lambda name: float(shared[name])
        )
        self.record["an order for each query"] = {
            "tried": len(shared) - len(TOGETHER),
            "gain": {name: round(float(value), 4) for name, value in shared.items()},
        }

    def _has(self, case: Case, winner: Winner) -> bool:
        return winner.name in self.table[id(case)].get(winner.family, {})

    def orderers(self, cases: Sequence[Case]) -> dict[str, Callable[[Case], Floats]]:
        """The orderers that exist for every set of a part."""

        def of(winner: Winner) -> Callable[[Case], Floats]:
            return lambda case: winner.sign * self.table[id(case)][winner.family][winner.name]

        found = {w.family: of(w) for w in self.winners if all(self._has(case, w) for case in cases)}
        if all(id(case) in self.calibrated for case in cases):
            found["calibrated on the task's other sets"] = lambda case: self.calibrated[id(case)]
        return found

    def report(self) -> dict[str, Any]:
        """The figures of every winner and baseline on every part."""
        report: dict[str, Any] = {}
        for part, cases in self.parts.items():
            if not cases:
                continue
            frozen = {label: of_frozen(self.table, *entry) for label, entry in FROZEN.items()}
            groups: dict[str, dict[str, Callable[[Case], Floats]]] = {
                "frozen": frozen,
                "ours": self.orderers(cases),
                "baselines": {
                    name: lambda case, name=name: self.basis[id(case)][name]
                    for name in self.basis[id(cases[0])]
                    if all(name in self.basis[id(case)] for case in cases)
                },
            }
            found = {
                kind: {name: judge(cases, scores) for name, scores in group.items()} for kind, group in groups.items()
            }
            for kind in ("frozen", "ours"):
                # Corrected over the orderers of one kind; baselines are not corrected.
                entries = found[kind].values()
                for entry, p in zip(entries, holm([entry["p"] for entry in entries]).tolist(), strict=True):
                    entry["p_holm"] = p
            report[part] = {
                "sets": [f"{case.task} {case.k} {case.seed}" for case in cases],
                "sd_over_orders": float(cell_mean(cases, [case.accuracy.std() for case in cases])),
                "gain_of_the_best_order": float(
                    cell_mean(cases, [case.accuracy.max() - case.accuracy.mean() for case in cases])
                ),
                **found,
                "named orders": _only_gains(cases, [case.named for case in cases]),
                "an order for each query": {
                    name: entry
                    for name, entry in _only_gains(cases, [self.by_query[id(case)] for case in cases]).items()
                    if name == self.best_by_query or name in TOGETHER
                },
            }
        return report


def of_frozen(table: Table, family: str, name: str, sign: int) -> Callable[[Case], Floats]:
    """The scores of a candidate by its name."""
    return lambda case: sign * table[id(case)][family][name]


def _only_gains(cases: Sequence[Case], each: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    shared = [name for name in each[0] if all(name in one for one in each)]
    columns = {name: [one[name] for one in each] for name in shared}
    return {
        name: {"gain": float(cell_mean(cases, own)), "gain_interval": interval(cases, own), "p": _p(cases, own)}
        for name, own in columns.items()
    }


def show(search: Search, report: dict[str, Any]) -> None:
    """Print the tables."""
    print("Winners in tuning (p: the best of the family, and of all families, under sign flips)\n")
    for winner in search.winners:
        record = search.record[winner.family]
        print(
            f"  {winner.family:44s} {record['tried']:4d} tried   {winner.tuning:.3f}   p {record['p_best_of_family']:.3f}, "
            f"{record['p_best_of_all']:.3f}   {'higher' if winner.sign > 0 else 'lower'}: {winner.name}"
        )
    print(f"\nPrimary, the highest of those without labels: {search.primary.family}")
    for part, found in report.items():
        spread, most = 100 * found["sd_over_orders"], 100 * found["gain_of_the_best_order"]
        print(f"\n{part}: {len(found['sets'])} sets; sd over orders {spread:.1f} points, best order {most:+.1f}")
        print(
            f"  {'':50s}     ρ        p     Holm   p of gain   gain [95 %]          beyond last label   of four [95 %]"
        )
        for kind in ("frozen", "ours", "baselines"):
            for name, entry in found[kind].items():
                label = f"frozen: {name}" if kind == "frozen" else name
                adjusted = f"{entry['p_holm']:.3f}" if "p_holm" in entry else "     "
                print(
                    f"  {label:50s} {entry['rho']:+.2f}   {entry['p']:.4f}   {adjusted}      {entry['p_gain']:.4f}   "
                    f"{_points(entry, 'gain')}   {100 * entry['gain_beyond_last_label']:+17.1f}   "
                    f"{_points(entry, 'gain_of_four')}"
                )
        for kind in ("named orders", "an order for each query"):
            for name, entry in found[kind].items():
                label = f"named: {name}" if kind == "named orders" else f"each query: {name}"
                print(f"  {label:50s} {'':29s}{entry['p']:.4f}   {_points(entry, 'gain')}")


def _points(entry: dict[str, Any], what: str) -> str:
    low, high = entry[f"{what}_interval"]
    return f"{100 * entry[what]:+5.1f} [{100 * low:+5.1f}, {100 * high:+5.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the store of an ordering study")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the tasks' files")
    parser.add_argument(
        "--read-demos", type=Path, metavar="FOLDER", help="read demonstrations in place, and store the outcomes here"
    )
    parser.add_argument("--early", type=int, default=2, help="sets with a lower seed are for tuning [default: 2]")
    parser.add_argument("--by", choices=("rho", "gain"), default="rho", help="what tuning maximises [default: rho]")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the tables")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/ too")
    parser.add_argument("--name", default="orderer-search", help="name of the file that --save writes")
    arguments = parser.parse_args()
    loader = Loader(arguments.store, arguments.data, arguments.read_demos)
    search = Search(list(loader.cases()), loader.names, arguments.early, arguments.by)
    report = search.report()
    whole = {
        "protocol": {
            "tuning_cells": sorted(TUNING_CELLS),
            "early": arguments.early,
            "by": arguments.by,
            "flips": FLIPS,
        },
        "primary": asdict(search.primary),
        "winners": [asdict(winner) for winner in search.winners],
        "report": report,
        "tried": search.record,
    }
    if arguments.json:
        print(json.dumps(whole, indent=1))
    else:
        show(search, report)
    if arguments.save:
        path = RESULTS / f"{arguments.name}.json"
        write_json(path, whole)
        print(f"saved to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
