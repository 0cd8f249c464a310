"""Which calibration and which prior a few-shot classifier should use by default, when label shares of pool and queries differ.

    python benchmarks/studies/classify/calibration_choices.py --data FOLDER --save

FOLDER holds icl/*.jsonl as for `ordering_study.py`. No model is called: the demonstration sets, their 16 random orders and all
label log-probabilities are those of the study, from benchmarks/results/ordering-study-outcomes.parquet. With --save the numbers
are written to benchmarks/results/calibration-choices.json.

Protocol. Shifts as in `prior_shift.py`: none; each label with 80 % of the pool; each label with 80 % of the queries. The test
rows are split at random, label by label, into three parts: one joins the development rows as labelled rows of the pool (64 are
read, their labels as even as possible), one provides 64 unlabelled queries, and accuracy is measured on the third, weighted to
the queries' shares. Gain: points over the model's own predictions under the same single order. Clusters are seeds of
demonstration sets within a task; sets of 4 and 8 demonstrations are averaged first.

Shapes: O random orders, N labelled rows, P unlabelled queries, L labels.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ordering"))

from common import machine
from numpy.typing import NDArray
from orderer_candidates import TASKS, Case, Loader
from ordering_study_outcomes import unpack
from prior_shift import KEPT, LABELLED, POOL, draw, shifted, shifts, thirds

from sparsort.curriculum.ablation.statistics.estimates import estimate_sets
from sparsort.curriculum.demos.criteria.distributions import log_softmax
from sparsort.curriculum.demos.criteria.label_bias import evenly_by_label, fit_bias, shares_by_em
from sparsort.curriculum.demos.criteria.label_calibration import LABEL_CALIBRATIONS, BiasEvidence, combine_orders
from sparsort.storage.files import write_json

SAVED = Path(__file__).parents[2] / "results" / "calibration-choices.json"
QUERIES, TOGETHER = 64, (1, 4, 16)
KINDS = ("none", "pool", "queries")
BASELINE = ("none", "uniform", 1)

Floats = NDArray[np.float64]
Choice = tuple[str, str, int]


def evaluated(case: Case) -> Iterator[tuple[str, dict[Choice, Floats]]]:
    """For every shift: its kind, and the accuracy and balanced accuracy of every (calibration, prior, orders averaged)."""
    labels = len(case.prior)
    natural = np.bincount(case.gold, minlength=labels) / len(case.gold)
    scores = log_softmax(np.concatenate([case.test.log_p, case.dev.log_p], axis=1))
    gold = np.concatenate([case.gold, case.dev_gold])
    for shift in shifts(labels):
        target = shifted(natural, shift.label) if shift.kind == "queries" else natural
        pool = case.prior / case.prior.sum()
        pool = shifted(pool, shift.label) if shift.kind == "pool" else pool
        rng = np.random.default_rng([TASKS.index(case.task), case.seed, KINDS.index(shift.kind), shift.label + 1])
        first, asked, held_out = thirds(case.gold, rng)
        known = draw(gold, np.concatenate([first, len(case.gold) + np.arange(len(case.dev_gold))]), pool, POOL, rng)
        known = known[evenly_by_label(gold[known].tolist(), seed=0)[:LABELLED]]
        queries = draw(gold, asked, target, QUERIES, rng)
        evidence = BiasEvidence(
            orders=len(scores),
            labels=labels,
            labelled=scores[:, known],
            gold=gold[known],
            content_free=case.free.log_p,
        )
        estimated = shares_by_em(scores[0, queries], fit_bias(scores[0, known], gold[known]))
        uniform = np.full(labels, 1 / labels)
        priors = {
            "uniform": uniform,
            "pool": pool,
            "mixed": (pool + uniform) / 2,
            "estimated": estimated,
            "true": target,
        }
        unlabelled = BiasEvidence(orders=len(scores), labels=labels, unlabelled=scores[:, queries])
        calibrated = {
            **{
                name: entry.estimate(evidence).remove(scores[:, held_out]) for name, entry in LABEL_CALIBRATIONS.items()
            },
            "batch, unlabelled queries": LABEL_CALIBRATIONS["batch"].estimate(unlabelled).remove(scores[:, held_out]),
        }
        counts = np.bincount(case.gold[held_out], minlength=labels)
        weights = [np.where(counts > 0, shares, 0) / np.maximum(counts, 1) for shares in (target, uniform)]
        weights = [weight[case.gold[held_out]] / weight[case.gold[held_out]].sum() for weight in weights]
        found: dict[Choice, Floats] = {}
        for name, (prior, shares), m in itertools.product(calibrated, priors.items(), TOGETHER):
            if LABEL_CALIBRATIONS.get(name) and not LABEL_CALIBRATIONS[name].needs and prior != "uniform":
                continue
            right = np.stack(
                [
                    combine_orders(calibrated[name][begin : begin + m], np.log(shares)).argmax(axis=1)
                    == case.gold[held_out]
                    for begin in range(0, len(scores), m)
                ]
            )
            found[name, prior, m] = np.array([100 * float((right @ weight).mean()) for weight in weights])
        yield shift.kind, found


def table(cases: list[Case]) -> list[dict[str, Any]]:
    """One row for each choice: mean accuracies, and gains with intervals, by kind of shift."""
    values: dict[tuple[Choice, str, str, int], list[Floats]] = defaultdict(list)
    for case in cases:
        for kind, found in evaluated(case):
            for choice, accuracy in found.items():
                values[choice, kind, case.task, case.seed].append(np.array([accuracy, accuracy - found[BASELINE]]))
        print(f"{case.task}, k = {case.k}, set {case.seed}", file=sys.stderr)
    rows = []
    for choice in dict.fromkeys(key[0] for key in values):
        row: dict[str, Any] = dict(zip(("calibration", "prior", "orders"), choice, strict=True))
        for kind in KINDS:
            clusters = {key[2:]: np.mean(own, axis=0) for key, own in values.items() if key[:2] == (choice, kind)}
            stacked = np.stack(list(clusters.values()))
            row[kind] = {
                "accuracy": round(float(stacked[:, 0, 0].mean()), 2),
                "balanced_accuracy": round(float(stacked[:, 0, 1].mean()), 2),
                "gain": _interval(stacked[:, 1, 0]),
                "balanced_gain": _interval(stacked[:, 1, 1]),
                "gain_by_task": {
                    task: round(float(np.mean([own[1, 0] for key, own in clusters.items() if key[0] == task])), 2)
                    for task in TASKS
                },
            }
        rows.append(row)
    return rows


def _interval(values: Floats) -> list[float | None]:
    one = estimate_sets(values)
    return [round(value, 2) if np.isfinite(value) else None for value in (one.value, one.low, one.high)]


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
        "benchmark": "calibration_choices",
        "protocol": {"sets": len(cases), "labelled_rows": LABELLED, "queries": QUERIES, "orders_averaged": TOGETHER},
        "choices": table(cases),
        "machine": machine(torch.device("cpu")),
        "command": "python benchmarks/studies/classify/calibration_choices.py --data FOLDER --save",
    }
    if arguments.save:
        write_json(SAVED, whole)
    for row in whole["choices"]:
        shown = "  ".join(f"{kind} {row[kind]['gain']} / {row[kind]['balanced_gain']}" for kind in KINDS)
        print(f"{row['calibration']}, prior {row['prior']}, {row['orders']} orders: {shown}")


if __name__ == "__main__":
    main()
