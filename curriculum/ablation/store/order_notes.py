"""Where the store keeps a demonstration set's outcomes, and the note of its orders: the rows shown, and each orderer's
permutation.

Contract: no model. `run` writes the note before it runs the set, and `collect` reads it. A note stays valid for a recipe with
more or fewer test rows and with other orderers. Orders that this recipe would compute differently, because its sparsity is
another or its test rows are new or have moved, are ignored and computed again.

Shapes: Q test queries, k demonstrations.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import (
    RANDOM_SCORES,
    SPARSITY,
    Ablation,
    DemoSet,
    base_order,
    depends_on_query,
    kind_of,
)
from sparsort.curriculum.ablation.recipe.selectors import looks_at_query
from sparsort.curriculum.ablation.recipe.task_data import Row, SetDemos
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import digest
from sparsort.errors import SparsortError
from sparsort.scoring.data.digests import SAMPLING

if TYPE_CHECKING:
    from sparsort.curriculum.ablation.store.store import OutcomeStore

_LOG = logging.getLogger("sparsort")


def group_name(task: Task, demo_set: DemoSet) -> str:
    """The group of a set's outcomes."""
    return f"{_prefix(task)}/{demo_set.selector}/k{demo_set.k}/seed{demo_set.seed}"


def zero_shot_group(task: Task) -> str:
    """The group of a task's outcomes without demonstrations."""
    return f"{_prefix(task)}/none"


def loss_group(task: Task, demo_set: DemoSet) -> str:
    """The group of a set's losses on the queries' own tokens, which "cone" reads."""
    return f"{group_name(task, demo_set)}/loss"


def neighbour_group(task: Task, demo_set: DemoSet) -> str:
    """The group of losses on the queries' own tokens after single neighbours, which "topk_cone" reads for every k."""
    return f"{_prefix(task)}/{demo_set.selector}/seed{demo_set.seed}/loss"


def _prefix(task: Task) -> str:
    # The digest separates tasks that share a name but differ in what the model reads.
    return f"{task.name}-{task.digest[:12]}"


def stored_orders(store: OutcomeStore, group: str) -> Any:
    """The note of a group's orders; None if there is none or it is damaged.

    Stores of version 1 have no digests in their notes, so damage is detected by the note's content.
    """
    note = store.get_note(group, "orders")
    if note is not None and not _is_plausible(note):
        _LOG.warning("%s: the note of the orders of %r is damaged; they are computed again.", store.folder, group)
        return None
    return note


def _is_plausible(note: Any) -> bool:
    """Whether a note shows only demonstrations that it lists, in orders that are permutations."""
    try:
        of_query, count = np.array(note["of_query"], dtype=np.int64), len(note["ids"])
        orders = [np.array(order, dtype=np.int64) for order in note["named"].values()]
        return (
            of_query.ndim == 2
            and 0 <= of_query.min(initial=0) <= of_query.max(initial=0) < max(count, 1)
            and len(note["texts"]) == len(note["labels"]) == count
            and all(order.ndim == 2 and np.array_equal(np.sort(order), _identity(order.shape)) for order in orders)
        )
    # A damaged note may have any type anywhere.
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return False


def _identity(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(shape[1]), shape)


def order_note(
    ablation: Ablation, task: Task, set_demos: SetDemos, named: Mapping[str, NDArray[np.int64]], queries: Sequence[str]
) -> dict[str, Any]:
    """The note of a set's orders, as JSON values.

    Args:
        ablation: the recipe.
        task: the set's task.
        set_demos: the demonstrations.
        named: orderer → (1, k), or (Q, k) if it depends on the query.
        queries: texts of the Q test queries.
    """
    return {
        "ids": [str(row["id"]) for row in set_demos.rows],
        "texts": [digest(task.demo_text(row)) for row in set_demos.rows],
        "labels": [task.gold_text(row) for row in set_demos.rows],
        "of_query": set_demos.of_query.tolist(),
        "queries": [digest(text) for text in queries],
        "named": {name: order.tolist() for name, order in named.items()},
        "sparsity": _sparsity(ablation),
    }


def check_note(note: Mapping[str, Any], current: Mapping[str, Any], group: str) -> None:
    """Refuse a note in which a test query has other demonstrations than the recipe draws now.

    Args:
        note: the note in the store.
        current: the note that `order_note` creates for the recipe.
        group: the note's group, for the message.

    Raises:
        SparsortError: the demonstrations differ.
    """
    # The shorter list decides, because the recipes may have different numbers of test queries.
    pairs = zip(_demos_by_query(note), _demos_by_query(current), strict=False)
    if any(before != after for before, after in pairs):
        raise SparsortError(
            f"the store's {group!r} has other demonstrations ({', '.join(note['ids'][:4])} …) than this recipe draws "
            f"({', '.join(current['ids'][:4])} …), or their texts have changed: the data, the split or the numbers that the "
            "selector reads are not the same. Use a new folder (--out)."
        )


def orders_of(
    note: Mapping[str, Any], ablation: Ablation, demo_set: DemoSet, queries: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """The orders in a note that are valid for a recipe: orderer → (1, k), or (Q, k) if it depends on the query.

    Args:
        note: a note of `order_note`.
        ablation: the recipe.
        demo_set: the set of the note.
        queries: texts of the Q test queries.
    """
    # Notes of an earlier version do not name the sparsity. It is assumed to be the recipe's.
    is_other_sparsity = note.get("sparsity", _sparsity(ablation)) != _sparsity(ablation)
    valid = {}
    for name, order in note["named"].items():
        if is_other_sparsity and kind_of(name) == SPARSITY:
            continue
        # Random scores are drawn once for all queries, even if the selector gives each query its own set.
        if base_order(name) == RANDOM_SCORES or not depends_on_query(name, demo_set.selector):
            valid[name] = np.asarray(order, dtype=np.int64)
        elif holds_for(note, queries):
            valid[name] = np.asarray(order, dtype=np.int64)[: len(queries)]
    return valid


def demos_of(
    note: Mapping[str, Any], rows: Mapping[str, Row], demo_set: DemoSet, queries: Sequence[str]
) -> SetDemos | None:
    """The demonstrations in a note; None if a row no longer exists, or if they were chosen for other test queries.

    Args:
        note: a note of `order_note`.
        rows: the pool by id.
        demo_set: the set of the note.
        queries: texts of the Q test queries.
    """
    of_query = np.asarray(note["of_query"], dtype=np.int64)
    # The pool has changed since the set was run.
    if any(name not in rows for name in note["ids"]):
        return None
    if looks_at_query(demo_set.selector):
        if not holds_for(note, queries):
            return None
        of_query = of_query[: len(queries)]
    return SetDemos(rows=[rows[name] for name in note["ids"]], of_query=of_query)


def holds_for(note: Mapping[str, Any], queries: Sequence[str]) -> bool:
    """Whether a note's queries begin with these. Notes of an earlier version do not list their queries."""
    known = list(note.get("queries", []))[: len(queries)]
    return known == [digest(text) for text in queries]


def _demos_by_query(note: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """For each query, the ids of its demonstrations and the digests of their texts."""
    demos = list(zip(note["ids"], note["texts"], strict=True))
    return [[demos[position] for position in positions] for positions in note["of_query"]]


def _sparsity(ablation: Ablation) -> dict[str, str]:
    settings = {name: getattr(ablation, name) for name in ("site", "pooling", "metric", "outliers")}
    # An earlier version, whose notes have no "sampling", fitted the outlier rule on the first rows of the pool.
    return settings if ablation.outliers == "none" else {**settings, "sampling": SAMPLING}
