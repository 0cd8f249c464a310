"""From results to the numbers of the report, `report.json`: the one place where a number is made.

Contract: pure; knows no figure, no page and no model. What is compared with what: an arm with the mean over the random orders
of the same demonstration sets, item by item. Families for Holm's correction: the arms of one cell, and the arms of one pooled
panel; oracles are chosen by the test labels and stand in no family. Arms that a cell lacks are absent there. A number that
cannot be had is None, with its reason next to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.report.numbers import compare
from sparsort.curriculum.ablation.report.numbers.inspection import inspect, texts_of
from sparsort.curriculum.ablation.report.numbers.shape import (
    FORMAT,
    LEVEL,
    POWER,
    ArmNumbers,
    CalibrationArm,
    CalibrationCell,
    Cell,
    Difference,
    Pooled,
    PooledArm,
    Report,
    Spread,
)
from sparsort.curriculum.ablation.results.cells import Arm
from sparsort.curriculum.ablation.results.cells import Cell as Group
from sparsort.curriculum.ablation.results.results import Results


def summarise(results: Results, *, title: str = "Does the order of demonstrations matter here?") -> Report:
    """Every number of the report."""
    from sparsort.curriculum.ablation.report.numbers.findings import findings, notes
    from sparsort.curriculum.ablation.report.numbers.warnings import one_label

    cells = [_cell(group) for group in results.cells]
    report = Report(
        format=FORMAT,
        title=title,
        level=LEVEL,
        power=POWER,
        provenance=results.provenance,
        tasks=_distinct(group.task for group in results.cells),
        warnings=one_label(cells, results.provenance.get("model")),
        notes=[],
        findings=[],
        cells=cells,
        pooled=_pooled(results.cells),
        calibration=_calibration(results.cells),
        demonstrations=[inspect(group, cell_id(group)) for group in results.cells],
        texts=texts_of(results.cells),
    )
    report["notes"] = notes(report)
    report["findings"] = findings(report)
    return report


def cell_id(group: Group) -> str:
    """The cell's name in `report.json` and in the page."""
    return f"{group.task}/{group.selector}/{group.k}/{'calibrated' if group.contextual else 'plain'}"


def _cell(group: Group) -> Cell:
    random_RSQ = group.random_correct
    compared = [arm for arm in group.arms if arm.kind != "oracle"]
    differences = dict(
        zip(
            [arm.name for arm in compared],
            compare.cell_family([arm.correct for arm in compared], random_RSQ),
            strict=True,
        )
    )
    base = float(random_RSQ.mean())
    for arm in group.arms:
        value = float(arm.correct.mean()) - base
        differences.setdefault(arm.name, compare.untested(value, "an oracle is picked by the test labels"))
    gold = np.array([group.labels.index(answer) for answer in group.gold]) if group.labels else np.empty(0, np.int64)
    return Cell(
        id=cell_id(group),
        task=group.task,
        selector=group.selector,
        k=group.k,
        calibrated=group.contextual,
        labels=group.labels,
        gold_share=_shares(gold, len(group.labels)).tolist(),
        items=len(group.items),
        sets=len(group.sets),
        orders=len(group.random),
        random=_spread(group, random_RSQ),
        arms=[_arm(group, arm, differences[arm.name], random_RSQ) for arm in group.arms],
    )


def _spread(group: Group, random_RSQ: NDArray[np.bool_]) -> Spread:
    accuracy, low, high, missing = compare.accuracy(random_RSQ.mean(axis=0))
    parts, reasons = compare.spread_parts(random_RSQ)
    reasons = {"low, high": missing, "label_entropy": _no_entropy(group.labels), **reasons}
    share_RSL = np.stack([_shares(arm.predicted, len(group.labels)) for arm in group.random])
    return Spread(
        accuracy=accuracy,
        low=low,
        high=high,
        accuracy_by_set=random_RSQ.mean(axis=2).T.tolist(),
        sd_orders=parts["sd_orders"],
        sd_noise=parts["sd_noise"],
        sd_orders_true=parts["sd_orders_true"],
        real_share=parts["real_share"],
        sd_sets=parts["sd_sets"],
        reason=compare.explain(reasons),
        tokens=float(np.mean([arm.tokens.mean() for arm in group.random])),
        label_share=share_RSL.mean(axis=(0, 1)).tolist(),
        label_entropy=_mean(_entropy(share_RSL)) if len(group.labels) > 1 else None,
        entropy_by_set=_entropy(share_RSL).T.tolist() if len(group.labels) > 1 else [],
        label_share_by_set=share_RSL.transpose(1, 0, 2).tolist() if group.labels else [],
    )


def _arm(group: Group, arm: Arm, difference: Difference, random_RSQ: NDArray[np.bool_]) -> ArmNumbers:
    accuracy, low, high, missing = compare.accuracy(arm.correct)
    share_SL = _shares(arm.predicted, len(group.labels))
    several = len(group.labels) > 1
    answering, choosing = float(arm.tokens.mean()), float(arm.choosing_tokens.mean())
    return ArmNumbers(
        name=arm.name,
        kind=arm.kind,
        accuracy=accuracy,
        low=low,
        high=high,
        accuracy_by_set=arm.accuracy.tolist(),
        difference=difference,
        percentile=compare.percentile(arm.correct, random_RSQ),
        tokens=answering,
        choosing_tokens=choosing,
        tokens_per_answer=answering + choosing / len(group.items),
        label_share=share_SL.mean(axis=0).tolist(),
        label_entropy=_mean(_entropy(share_SL)) if several else None,
        label_entropy_by_set=_entropy(share_SL).tolist() if several else [],
        reason=compare.explain({"low, high": missing, "label_entropy": _no_entropy(group.labels)}),
        by_query=arm.order is None,
    )


def _shares(predicted: NDArray[np.int64], labels: int) -> NDArray[np.float64]:
    """(…, L) share of each label over the last axis; labels 0 gives (…, 0)."""
    return (
        np.stack([(predicted == label).mean(axis=-1) for label in range(labels)], axis=-1)
        if labels
        else np.empty((*predicted.shape[:-1], 0))
    )


def _entropy(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy over the last axis as a share of log L."""
    from scipy.special import entr

    return np.asarray(entr(share).sum(axis=-1) / np.log(share.shape[-1]), dtype=np.float64)


def _no_entropy(labels: Sequence[str]) -> str:
    """Why predictions have no entropy over labels."""
    return "" if len(labels) > 1 else "there is one label" if labels else "answers are generated"


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _pooled(groups: Sequence[Group]) -> list[Pooled]:
    """Panels over tasks: for every selector and calibration, each k with at least two tasks, and every k together."""
    made = []
    for selector, calibrated in _distinct((group.selector, group.contextual) for group in groups):
        alike = [group for group in groups if (group.selector, group.contextual) == (selector, calibrated)]
        shots = _distinct(group.k for group in alike)
        panels: list[tuple[int | None, list[Group]]] = [(None, alike)] if len(shots) > 1 else []
        panels += [(k, [group for group in alike if group.k == k]) for k in shots]
        for k, members in panels:
            if len(members) > 1:
                made.append(_panel(selector, k, calibrated, members))
    return made


def _panel(selector: str, k: int | None, calibrated: bool, groups: Sequence[Group]) -> Pooled:
    names = _distinct((arm.name, arm.kind) for group in groups for arm in group.arms if arm.kind != "oracle")
    held = {name: [group for group in groups if any(arm.name == name for arm in group.arms)] for name, _ in names}
    clusters = [_clusters(name, held[name]) for name, _ in names]
    differences = compare.pooled_family(clusters)
    return Pooled(
        id=f"{selector}/{'all' if k is None else k}/{'calibrated' if calibrated else 'plain'}",
        selector=selector,
        k=k,
        calibrated=calibrated,
        tasks=_distinct(group.task for group in groups),
        arms=[
            PooledArm(
                name=name,
                kind=kind,
                tasks=_distinct(group.task for group in held[name]),
                clusters=sum(map(len, by_task)),
                difference=difference,
                cost=float(np.mean([_cost(group, group.arm(name)) for group in held[name]])),
            )
            for (name, kind), by_task, difference in zip(names, clusters, differences, strict=True)
        ],
    )


def _clusters(name: str, groups: Sequence[Group]) -> list[NDArray[np.float64]]:
    """(sets of the task,) for every task, an arm's difference in every set: the mean over k where a set was run with several."""
    by_task: dict[str, dict[int, list[float]]] = {}
    for group in groups:
        gain_S = (group.arm(name).correct - group.random_correct.mean(axis=0)).mean(axis=1)
        for one, gain in zip(group.sets, gain_S.tolist(), strict=True):
            by_task.setdefault(group.task, {}).setdefault(one.seed, []).append(gain)
    return [np.array([float(np.mean(gains)) for gains in by_seed.values()]) for by_seed in by_task.values()]


def _cost(group: Group, arm: Arm) -> float:
    """Tokens an answer over those of a random order."""
    own = arm.tokens.mean() + arm.choosing_tokens.mean() / len(group.items)
    return float(own / max(1e-9, np.mean([one.tokens.mean() for one in group.random])))


def _calibration(groups: Sequence[Group]) -> list[CalibrationCell]:
    held = {group.key: group for group in groups}
    pairs = [
        (held[(*key[:3], False)], held[(*key[:3], True)]) for key in held if not key[3] and (*key[:3], True) in held
    ]
    return [made for off, on in pairs if (made := _calibrated(off, on)) is not None]


def _calibrated(off: Group, on: Group) -> CalibrationCell | None:
    """The effect over the sets and items that both cells have; None where they share none."""
    sets_off, sets_on = _common(
        [(one.seed, *one.demo_ids) for one in off.sets], [(one.seed, *one.demo_ids) for one in on.sets]
    )
    items_off, items_on = _common(off.items, on.items)
    if not sets_off or not items_off:
        return None
    cut_off, cut_on = np.ix_(sets_off, items_off), np.ix_(sets_on, items_on)
    orders = min(len(off.random), len(on.random))
    random_off = np.stack([arm.correct[cut_off] for arm in off.random[:orders]])
    random_on = np.stack([arm.correct[cut_on] for arm in on.random[:orders]])
    rows: list[tuple[str, str, NDArray[Any], NDArray[Any]]] = [
        ("random", "random", random_off.mean(axis=0), random_on.mean(axis=0))
    ]
    known: Mapping[str, Arm] = {arm.name: arm for arm in on.arms}
    rows += [
        (arm.name, arm.kind, arm.correct[cut_off], known[arm.name].correct[cut_on])
        for arm in off.arms
        if arm.name in known
    ]
    changes = compare.change_family([(after, before) for _, _, before, after in rows])
    arms = [
        CalibrationArm(name=name, kind=kind, off=float(before.mean()), on=float(after.mean()), change=change)
        for (name, kind, before, after), change in zip(rows, changes, strict=True)
    ]
    parts_off, reasons = compare.spread_parts(random_off)
    parts_on, _ = compare.spread_parts(random_on)
    # Both sides have the same orders and items, so both lack it or neither.
    missing = next(iter(reasons.values())) if parts_off["sd_orders"] is None else ""
    return CalibrationCell(
        id=f"{off.task}/{off.selector}/{off.k}",
        task=off.task,
        selector=off.selector,
        k=off.k,
        sets=len(sets_off),
        spread_off=parts_off["sd_orders"],
        spread_on=parts_on["sd_orders"],
        reason=compare.explain({"spread_off, spread_on": missing}),
        arms=arms,
    )


def _common(left: Sequence[Any], right: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Positions, in both, of what both hold."""
    place = {value: index for index, value in enumerate(right)}
    shared = [(index, place[value]) for index, value in enumerate(left) if value in place]
    return [index for index, _ in shared], [index for _, index in shared]
