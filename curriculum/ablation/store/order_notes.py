"""The note that the store keeps of a unit's orders: which rows are shown, and the permutation of every orderer.

Contract: no model. `run` writes the note before it asks, `collect` reads it. A note holds for a recipe with more or fewer
test rows and with other orderers; what this recipe would order otherwise (by another sparsity, or for test rows that have
come since or stand elsewhere) is left out, to be ordered anew.
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
    Unit,
    base_order,
    depends_on_query,
    kind_of,
)
from sparsort.curriculum.ablation.recipe.selectors import looks_at_query
from sparsort.curriculum.ablation.recipe.task_data import Row, Showing
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import digest
from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import SAMPLING

if TYPE_CHECKING:
    from sparsort.curriculum.ablation.store.store import OutcomeStore

_LOG = logging.getLogger("sparsort")


def stored_orders(store: OutcomeStore, group: str) -> Any:
    """The note of a group's orders; None where there is none, or it cannot be one.

    Notes of the first version of the store have no digest, so that damage in them shows here if anywhere.
    """
    note = store.get_note(group, "orders")
    if note is not None and not _is_plausible(note):
        _LOG.warning("%s: the note of the orders of %r is damaged; they are made again.", store.folder, group)
        return None
    return note


def _is_plausible(note: Any) -> bool:
    """Whether a note shows demonstrations that it has, in orders that are permutations."""
    try:
        shown, count = np.array(note["of_query"], dtype=np.int64), len(note["ids"])
        orders = [np.array(order, dtype=np.int64) for order in note["named"].values()]
        return (
            shown.ndim == 2
            and 0 <= shown.min(initial=0) <= shown.max(initial=0) < max(count, 1)
            and len(note["texts"]) == len(note["labels"]) == count
            and all(order.ndim == 2 and np.array_equal(np.sort(order), _counted(order.shape)) for order in orders)
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return False


def _counted(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(shape[1]), shape)


def order_note(
    ablation: Ablation, task: Task, showing: Showing, named: Mapping[str, NDArray[np.int64]], queries: Sequence[str]
) -> dict[str, Any]:
    """The note of a unit's orders, as JSON values.

    Args:
        ablation: the recipe.
        task: its task.
        showing: the demonstrations.
        named: orderer to (1, k), or (Q, k) where it depends on the query.
        queries: texts of the Q test queries.
    """
    return {
        "ids": [str(row["id"]) for row in showing.rows],
        "texts": [digest(task.demo_text(row)) for row in showing.rows],
        "labels": [task.gold_text(row) for row in showing.rows],
        "of_query": showing.of_query.tolist(),
        "queries": [digest(text) for text in queries],
        "named": {name: order.tolist() for name, order in named.items()},
        "sparsity": _sparsity(ablation),
    }


def check_note(note: Mapping[str, Any], now: Mapping[str, Any], group: str) -> None:
    """Refuse a note that shows any test query other demonstrations than the recipe draws now.

    Args:
        note: the one in the store.
        now: what `order_note` makes today.
        group: of the store, for the message.

    Raises:
        SparsortError: it does.
    """
    pairs = zip(_shown(note), _shown(now), strict=False)
    if any(before != after for before, after in pairs):
        raise SparsortError(
            f"the store's {group!r} holds other demonstrations ({', '.join(note['ids'][:4])} …) than this recipe draws "
            f"({', '.join(now['ids'][:4])} …), or their texts have changed: the data, the split or the numbers that the selector "
            "reads are not the same. Use a new folder (--out)."
        )


def orders_of(
    note: Mapping[str, Any], ablation: Ablation, unit: Unit, queries: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """The orders in a note that hold for a recipe: orderer to (1, k), or (Q, k) where it depends on the query.

    Args:
        note: of `order_note`.
        ablation: the recipe.
        unit: which of its sets this is.
        queries: texts of the Q test queries.
    """
    # A note of an earlier version does not say by which sparsity: that of the recipe at hand.
    other = note.get("sparsity", _sparsity(ablation)) != _sparsity(ablation)
    found = {}
    for name, order in note["named"].items():
        if other and kind_of(name) == SPARSITY:
            continue
        # Drawn scores are drawn once for a set, whoever chose it.
        if base_order(name) == RANDOM_SCORES or not depends_on_query(name, unit.selector):
            found[name] = np.asarray(order, dtype=np.int64)
        elif holds_for(note, queries):
            found[name] = np.asarray(order, dtype=np.int64)[: len(queries)]
    return found


def showing_of(note: Mapping[str, Any], rows: Mapping[str, Row], unit: Unit, queries: Sequence[str]) -> Showing | None:
    """The demonstrations of a note; None where a row is gone, or they were chosen for other test queries.

    Args:
        note: of `order_note`.
        rows: the pool by id.
        unit: which set this is.
        queries: texts of the Q test queries.
    """
    of_query = np.asarray(note["of_query"], dtype=np.int64)
    if any(name not in rows for name in note["ids"]):
        return None
    if looks_at_query(unit.selector):
        if not holds_for(note, queries):
            return None
        of_query = of_query[: len(queries)]
    return Showing(rows=[rows[name] for name in note["ids"]], of_query=of_query)


def holds_for(note: Mapping[str, Any], queries: Sequence[str]) -> bool:
    """Whether what a note holds by query is about these, or these and more. Notes of an earlier version do not say."""
    known = list(note.get("queries", []))[: len(queries)]
    return known == [digest(text) for text in queries]


def _shown(note: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """What each query is shown: ids and digests of the texts."""
    shown = list(zip(note["ids"], note["texts"], strict=True))
    return [[shown[place] for place in row] for row in note["of_query"]]


def _sparsity(ablation: Ablation) -> dict[str, str]:
    found = {name: getattr(ablation, name) for name in ("site", "pooling", "metric", "outliers")}
    # Notes without it come from a version that fitted the rule on the first rows of the pool.
    return found if ablation.outliers == "none" else {**found, "sampling": SAMPLING}
