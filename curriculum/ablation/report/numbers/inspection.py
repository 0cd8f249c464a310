"""What every item was shown: the prompts, the demonstration sets and each arm's order of them, as values of JSON.

Contract: an arm's order is given once a set where it depends on no query, and once an item (`order_of_item`) where it does.
Orders are positions in the set's `demos`; None where the results do not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsort.curriculum.ablation.report.numbers.shape import PromptTexts
from sparsort.curriculum.ablation.results.cells import Arm, Cell


def inspect(group: Cell, cell: str) -> dict[str, Any]:
    """One cell's sets, prompts and orders.

    Args:
        group: the cell.
        cell: its id in the report.

    Returns:
        `cell`; `items` (Q ids) and `gold`; `sets`, each with `seed`, `demos` (id, label, tokens), `prompt`, `orders` (arm →
        order or None), `random_orders` (R orders) and, only where something depends on the query, `order_of_item` (arm → Q
        orders) and `demo_ids_of_item` (Q × k ids).
    """
    sets = []
    for number, one in enumerate(group.sets):
        labels: list[str | None] = [*one.demo_labels] or [None] * group.k
        tokens: list[int | None] = [*one.demo_tokens] or [None] * group.k
        entry: dict[str, Any] = {
            "seed": one.seed,
            "demos": [
                {"id": name, "label": label, "tokens": length}
                for name, label, length in zip(one.demo_ids, labels, tokens, strict=False)
            ],
            "prompt": one.prompt,
            "orders": {arm.name: _order(arm, number) for arm in group.arms},
            "random_orders": [_order(arm, number) for arm in group.random],
        }
        by_item = {arm.name: arm.order_of_item[number].tolist() for arm in group.arms if arm.order_of_item is not None}
        if by_item:
            entry["order_of_item"] = by_item
        if group.demo_ids_of_item is not None:
            entry["demo_ids_of_item"] = group.demo_ids_of_item[number]
        sets.append(entry)
    return {"cell": cell, "items": group.items, "gold": group.gold, "sets": sets}


def texts_of(groups: Sequence[Cell]) -> dict[str, PromptTexts]:
    """The words of every demonstration and test item, once a task: its cells show many of the same."""
    found: dict[str, PromptTexts] = {}
    for group in groups:
        of_task = found.setdefault(group.task, PromptTexts(demos={}, items={}))
        of_task["demos"].update(group.demo_texts)
        of_task["items"].update(zip(group.items, group.item_texts, strict=False))
    return found


def _order(arm: Arm, number: int) -> list[int] | None:
    return None if arm.order is None else arm.order[number]
