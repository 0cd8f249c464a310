"""From results to the numbers of the report, `report.json`: the one place where its numbers are computed.

Contract: pure, without knowledge of figures, pages or models. An arm is compared with the mean over the random orders of the
same demonstration sets, item by item. The families for Holm's correction are the arms of one cell, and the arms of one pooled
panel. Oracles are chosen by the test labels, so they are in no family. An arm that was not run in a cell is absent from it. A
number that cannot be computed is None, and the object that has it gives the reason.

Shapes: R random orders, S demonstration sets, Q test items, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.report.numbers import compare
from sparsort.curriculum.ablation.report.numbers.findings import findings, notes, one_label
from sparsort.curriculum.ablation.report.numbers.shape import (
    FORMAT,
    LEVEL,
    POWER,
    ArmNumbers,
    CalibrationArm,
    CalibrationCell,
    CellNumbers,
    Difference,
    Pooled,
    PooledArm,
    PromptTexts,
    RandomOrders,
    Report,
)
from sparsort.curriculum.ablation.results.cells import Arm, Cell
from sparsort.curriculum.ablation.results.results import Results

T = TypeVar("T")


def summarise(results: Results, *, title: str = "Does the order of demonstrations matter here?") -> Report:
    """Every number of the report, and the text made from them."""
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
        demonstrations=[inspect(group) for group in results.cells],
        texts=_texts(results.cells),
    )
    report["notes"] = notes(report)
    report["findings"] = findings(report)
    return report


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


# Single cells


def _id(group: Cell) -> str:
    return f"{group.task}/{group.selector}/{group.k}/{'calibrated' if group.contextual else 'plain'}"


def _cell(group: Cell) -> CellNumbers:
    random_RSQ = group.random_correct
    compared = [arm for arm in group.arms if arm.kind != "oracle"]
    family = compare.cell_family([arm.correct for arm in compared], random_RSQ)
    differences = {arm.name: difference for arm, difference in zip(compared, family, strict=True)}
    for arm in group.arms:
        value = float(arm.correct.mean()) - float(random_RSQ.mean())
        # Only oracles are not in the family.
        differences.setdefault(arm.name, compare.untested(value, "an oracle is chosen by the test labels"))
    gold = np.array([group.labels.index(answer) for answer in group.gold]) if group.labels else np.empty(0, np.int64)
    return CellNumbers(
        id=_id(group),
        task=group.task,
        selector=group.selector,
        k=group.k,
        calibrated=group.contextual,
        labels=group.labels,
        gold_share=_shares(gold, len(group.labels)).tolist(),
        items=len(group.items),
        sets=len(group.sets),
        orders=len(group.random),
        random=_random_orders(group, random_RSQ),
        arms=[_arm(group, arm, differences[arm.name], random_RSQ) for arm in group.arms],
    )


def _random_orders(group: Cell, random_RSQ: NDArray[np.bool_]) -> RandomOrders:
    accuracy, low, high, missing = compare.accuracy(random_RSQ.mean(axis=0))
    parts, reasons = compare.spread_parts(random_RSQ)
    reasons = {"low, high": missing, "label_entropy": _no_entropy(group.labels), **reasons}
    # The entropy is that of each order and set, because pooled predictions hide orders that lean to different labels.
    share_RSL = np.stack([_shares(arm.predicted, len(group.labels)) for arm in group.random])
    several = len(group.labels) > 1
    return RandomOrders(
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
        label_entropy=float(_entropy(share_RSL).mean()) if several else None,
        entropy_by_set=_entropy(share_RSL).T.tolist() if several else [],
        label_share_by_set=share_RSL.transpose(1, 0, 2).tolist() if group.labels else [],
    )


def _arm(group: Cell, arm: Arm, difference: Difference, random_RSQ: NDArray[np.bool_]) -> ArmNumbers:
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
        label_entropy=float(_entropy(share_SL).mean()) if several else None,
        label_entropy_by_set=_entropy(share_SL).tolist() if several else [],
        reason=compare.explain({"low, high": missing, "label_entropy": _no_entropy(group.labels)}),
        by_query=arm.order is None,
    )


def _shares(predicted: NDArray[np.int64], labels: int) -> NDArray[np.float64]:
    """(…, L) share of each label over the last axis of `predicted`; without labels (…, 0)."""
    if not labels:
        return np.empty((*predicted.shape[:-1], 0))
    return np.stack([(predicted == label).mean(axis=-1) for label in range(labels)], axis=-1)


def _entropy(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy over the last axis, divided by log L."""
    from scipy.special import entr

    # `entr` is −x·log x with the limit 0 at x = 0, where the formula itself would give NaN.
    return np.asarray(entr(share).sum(axis=-1) / np.log(share.shape[-1]), dtype=np.float64)


def _no_entropy(labels: Sequence[str]) -> str:
    """The reason why predictions have no entropy over labels; empty if they have one."""
    return "" if len(labels) > 1 else "there is one label" if labels else "answers are generated"


# Several cells


def _pooled(groups: Sequence[Cell]) -> list[Pooled]:
    """Panels over tasks for every selector and calibration: all k together, and each k that at least two tasks have."""
    pooled = []
    for selector, calibrated in _distinct((group.selector, group.contextual) for group in groups):
        alike = [group for group in groups if (group.selector, group.contextual) == (selector, calibrated)]
        shots = _distinct(group.k for group in alike)
        panels: list[tuple[int | None, list[Cell]]] = [(None, alike)] if len(shots) > 1 else []
        panels += [(k, [group for group in alike if group.k == k]) for k in shots]
        pooled += [_panel(selector, k, calibrated, members) for k, members in panels if len(members) > 1]
    return pooled


def _panel(selector: str, k: int | None, calibrated: bool, groups: Sequence[Cell]) -> Pooled:
    kinds = {arm.name: arm.kind for group in groups for arm in group.arms if arm.kind != "oracle"}
    having = {name: [group for group in groups if any(arm.name == name for arm in group.arms)] for name in kinds}
    clusters = [_clusters(name, having[name]) for name in kinds]
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
                kind=kinds[name],
                tasks=_distinct(group.task for group in having[name]),
                clusters=sum(map(len, by_task)),
                difference=difference,
                cost=float(np.mean([_cost(group, group.arm(name)) for group in having[name]])),
            )
            for name, by_task, difference in zip(kinds, clusters, differences, strict=True)
        ],
    )


def _clusters(name: str, groups: Sequence[Cell]) -> list[NDArray[np.float64]]:
    """For each task the arm's difference in every set, (sets of the task,); the mean over k if a set was run with several."""
    by_task: dict[str, dict[int, list[float]]] = {}
    for group in groups:
        gain_S = (group.arm(name).correct - group.random_correct.mean(axis=0)).mean(axis=1)
        for demo_set, gain in zip(group.sets, gain_S.tolist(), strict=True):
            # Sets of one seed and different k share demonstrations, so they are one observation and not several.
            by_task.setdefault(group.task, {}).setdefault(demo_set.seed, []).append(gain)
    return [np.array([float(np.mean(gains)) for gains in by_seed.values()]) for by_seed in by_task.values()]


def _cost(group: Cell, arm: Arm) -> float:
    """Tokens per answer as a multiple of those of a random order."""
    # An order is chosen once per set, and all items of the set use it.
    own = arm.tokens.mean() + arm.choosing_tokens.mean() / len(group.items)
    return float(own / max(1e-9, np.mean([random.tokens.mean() for random in group.random])))


def _calibration(groups: Sequence[Cell]) -> list[CalibrationCell]:
    by_key = {group.key: group for group in groups}
    keys = [key[:3] for key in by_key if not key[3] and (*key[:3], True) in by_key]
    pairs = [_calibration_cell(by_key[(*key, False)], by_key[(*key, True)]) for key in keys]
    return [pair for pair in pairs if pair is not None]


def _calibration_cell(off: Cell, on: Cell) -> CalibrationCell | None:
    """The effect over the sets and items that both cells have; None if they share none."""
    # A seed alone does not identify a set: with another pool, the same seed draws other demonstrations.
    sets_off, sets_on = _common(
        [(one.seed, *one.demo_ids) for one in off.sets], [(one.seed, *one.demo_ids) for one in on.sets]
    )
    items_off, items_on = _common(off.items, on.items)
    if not sets_off or not items_off:
        return None
    shared_off, shared_on = np.ix_(sets_off, items_off), np.ix_(sets_on, items_on)
    # If one cell has more random orders than the other, only the first ones are compared.
    orders = min(len(off.random), len(on.random))
    random_off = np.stack([arm.correct[shared_off] for arm in off.random[:orders]])
    random_on = np.stack([arm.correct[shared_on] for arm in on.random[:orders]])
    rows: list[tuple[str, str, NDArray[Any], NDArray[Any]]] = [
        ("random", "random", random_off.mean(axis=0), random_on.mean(axis=0))
    ]
    with_calibration: Mapping[str, Arm] = {arm.name: arm for arm in on.arms}
    rows += [
        (arm.name, arm.kind, arm.correct[shared_off], with_calibration[arm.name].correct[shared_on])
        for arm in off.arms
        if arm.name in with_calibration
    ]
    changes = compare.change_family([(after, before) for _, _, before, after in rows])
    parts_off, reasons = compare.spread_parts(random_off)
    parts_on, _ = compare.spread_parts(random_on)
    # Both sides have equally many orders and items, so either both have a spread or neither.
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
        arms=[
            CalibrationArm(name=name, kind=kind, off=float(before.mean()), on=float(after.mean()), change=change)
            for (name, kind, before, after), change in zip(rows, changes, strict=True)
        ],
    )


def _common(left: Sequence[Any], right: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The positions in both sequences of the values that both contain, in the order of the first."""
    place = {value: index for index, value in enumerate(right)}
    shared = [(index, place[value]) for index, value in enumerate(left) if value in place]
    return [index for index, _ in shared], [index for _, index in shared]


# What every item was shown


def inspect(group: Cell) -> dict[str, Any]:
    """The sets, prompts and orders of one cell, as JSON values.

    An order is a list of positions in the set's `demos`, or None if the results do not contain it.

    Returns:
        `cell` (its id); `items` (Q ids) and `gold`; `sets`, each with `seed`, `demos` (id, label, tokens), `prompt`, `orders`
        (arm → order) and `random_orders` (R orders). If an order or the demonstrations depend on the query, a set also has
        `order_of_item` (arm → Q orders) and `demo_ids_of_item` (Q × k ids).
    """
    sets = []
    for number, demo_set in enumerate(group.sets):
        labels: list[str | None] = [*demo_set.demo_labels] or [None] * group.k
        tokens: list[int | None] = [*demo_set.demo_tokens] or [None] * group.k
        entry: dict[str, Any] = {
            "seed": demo_set.seed,
            "demos": [
                {"id": name, "label": label, "tokens": length}
                # If each item has its own demonstrations, `demo_ids` is empty, and so is this list.
                for name, label, length in zip(demo_set.demo_ids, labels, tokens, strict=False)
            ],
            "prompt": demo_set.prompt,
            "orders": {arm.name: None if arm.order is None else arm.order[number] for arm in group.arms},
            "random_orders": [None if arm.order is None else arm.order[number] for arm in group.random],
        }
        by_item = {arm.name: arm.order_of_item[number].tolist() for arm in group.arms if arm.order_of_item is not None}
        if by_item:
            entry["order_of_item"] = by_item
        if group.demo_ids_of_item is not None:
            entry["demo_ids_of_item"] = group.demo_ids_of_item[number]
        sets.append(entry)
    return {"cell": _id(group), "items": group.items, "gold": group.gold, "sets": sets}


def _texts(groups: Sequence[Cell]) -> dict[str, PromptTexts]:
    """The texts of all demonstrations and test items, once per task, since the cells of a task share most of them."""
    texts: dict[str, PromptTexts] = {}
    for group in groups:
        of_task = texts.setdefault(group.task, PromptTexts(demos={}, items={}))
        of_task["demos"].update(group.demo_texts)
        # Results of older versions have no texts of items.
        of_task["items"].update(zip(group.items, group.item_texts, strict=False))
    return texts
