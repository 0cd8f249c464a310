"""The order of demonstrations in a prompt, first to last; the last one is next to the query.

Contract: `ORDERS` lists the orders. An order is a permutation of the demonstrations, or, under missing="drop", of those that
have a score. Ties keep the given order. `reverse:X` is the exact reverse of X, ties included. No model is run here: the caller
passes difficulty, similarity and length as numbers. Difficulty rises with sparsity, so "sparse" means hard and "dense" means
easy. To add an order, add an entry to `ORDERS` and its name to `Order`.

Shapes: K demonstrations, N of them that have a key. A key is the number by which an order ranks a demonstration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, Values, When, refuse_unread_arguments
from sparsort.curriculum.demos.pool.difficulty import DifficultyTable, ScoresLike, resolve
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.rows import TextOf, id_of, listed, text_of
from sparsort.errors import SparsortError, unknown_choice
from sparsort.registry import Entry, Registry
from sparsort.scoring.data.rows import rows_of

Order = Literal[
    "sparse_to_dense",
    "dense_to_sparse",
    "easy_to_hard",
    "hard_to_easy",
    "u_shape",
    "inverted_u",
    "similarity_ascending",
    "similarity_descending",
    "perplexity_ascending",
    "length_ascending",
    "length_descending",
    "random",
    "given",
]
Missing = Literal["error", "first", "last", "drop"]
Key = Literal["difficulty", "similarity", "length", "nothing"]
Direction = Literal["ascending", "descending", "descending, then ascending", "ascending, then descending", "none"]
# A function from keys (N,) and a seed to N positions, first to last.
Ranking = Callable[[NDArray[np.float64], int], NDArray[np.int64]]

REVERSE = "reverse:"
# Each key → the argument of `order_indices` and `order_demos` that holds it.
_INPUTS: dict[Key, str] = {"difficulty": "scores", "similarity": "similarity", "length": "lengths"}


@dataclass(frozen=True, kw_only=True)
class OrderEntry(Entry):
    """One order. Its `needs` follow from its key: "scores", "similarity" or "lengths".

    Attributes:
        ranks_by: the key.
        direction: how the key changes from the first demonstration to the last.
        kinds: the kinds of score that the order accepts; empty if it accepts all. Scores without a kind are always accepted.
        function: computes the order from the keys, which are zero if the order ranks by nothing.
        is_seeded: whether the order depends on the seed.
    """

    ranks_by: Key
    direction: Direction
    kinds: tuple[str, ...] = ()
    function: Ranking
    is_seeded: bool = False

    def __post_init__(self) -> None:
        inputs = (_INPUTS[self.ranks_by],) if self.ranks_by in _INPUTS else ()
        # The dataclass is frozen, so a plain assignment would raise.
        object.__setattr__(self, "needs", frozenset(inputs))

    def accepts(self, kind: str | None) -> bool:
        """Whether the order ranks by difficulty of this kind; None stands for numbers without a kind."""
        return self.ranks_by == "difficulty" and (kind is None or not self.kinds or kind in self.kinds)


def _ascending(key_N: NDArray[np.float64], seed: int = 0) -> NDArray[np.int64]:
    # A stable sort keeps ties in the given order.
    return np.argsort(key_N, kind="stable").astype(np.int64)


def _descending(key_N: NDArray[np.float64], seed: int = 0) -> NDArray[np.int64]:
    # Reversing the ascending order would also reverse ties.
    return _ascending(-key_N)


def _u_shape(key_N: NDArray[np.float64], seed: int = 0) -> NDArray[np.int64]:
    """High keys at both ends: the highest key takes the last place, the second highest the first place, and so on inwards."""
    descending = _descending(key_N)
    return np.concatenate([descending[1::2], descending[0::2][::-1]])


def _inverted_u(key_N: NDArray[np.float64], seed: int = 0) -> NDArray[np.int64]:
    return _u_shape(-key_N)


def _random(key_N: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(len(key_N)).astype(np.int64)


def _given(key_N: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    return np.arange(len(key_N), dtype=np.int64)


_CONTROL = "control for the confound with length"

ORDERS = Registry(
    "order",
    (
        # Orders by sparsity, and the same orders by any difficulty.
        OrderEntry(
            name="sparse_to_dense",
            help="the sparsest first, as sparse counts as hard",
            source="arXiv 2603.03415",
            ranks_by="difficulty",
            direction="descending",
            kinds=("sparsity",),
            function=_descending,
        ),
        OrderEntry(
            name="dense_to_sparse",
            help="the densest first, as dense counts as easy",
            source="arXiv 2603.03415",
            ranks_by="difficulty",
            direction="ascending",
            kinds=("sparsity",),
            function=_ascending,
        ),
        OrderEntry(
            name="easy_to_hard",
            help="the easiest first, by any difficulty",
            source="curriculum learning, Bengio et al. 2009",
            ranks_by="difficulty",
            direction="ascending",
            function=_ascending,
        ),
        OrderEntry(
            name="hard_to_easy",
            help="the hardest first, by any difficulty",
            source="the reverse of a curriculum",
            ranks_by="difficulty",
            direction="descending",
            function=_descending,
        ),
        OrderEntry(
            name="u_shape",
            help="the hardest last, the second hardest first, the easiest in the middle",
            source="after arXiv 2307.03172: models read both ends of a prompt best",
            ranks_by="difficulty",
            direction="descending, then ascending",
            function=_u_shape,
        ),
        OrderEntry(
            name="inverted_u",
            help="the easiest last, the second easiest first, the hardest in the middle",
            source="the opposite of u_shape",
            ranks_by="difficulty",
            direction="ascending, then descending",
            function=_inverted_u,
        ),
        # Orders by similarity to the query.
        OrderEntry(
            name="similarity_ascending",
            help="the most similar to the query last, next to it",
            source="KATE, arXiv 2101.06804",
            ranks_by="similarity",
            direction="ascending",
            function=_ascending,
        ),
        OrderEntry(
            name="similarity_descending",
            help="the most similar to the query first",
            source="KATE, arXiv 2101.06804",
            ranks_by="similarity",
            direction="descending",
            function=_descending,
        ),
        # The name that the literature uses for an order by the model's loss.
        OrderEntry(
            name="perplexity_ascending",
            help="the lowest loss of the model first, on the answer or on the prompt",
            source="ICCL, arXiv 2402.10738",
            ranks_by="difficulty",
            direction="ascending",
            kinds=("answer_loss", "prompt_loss"),
            function=_ascending,
        ),
        # Orders without a model: controls and baselines.
        OrderEntry(
            name="length_ascending",
            help="the shortest first, in characters",
            source=_CONTROL,
            ranks_by="length",
            direction="ascending",
            function=_ascending,
        ),
        OrderEntry(
            name="length_descending",
            help="the longest first, in characters",
            source=_CONTROL,
            ranks_by="length",
            direction="descending",
            function=_descending,
        ),
        OrderEntry(
            name="random",
            help="drawn at random from the seed",
            source="baseline",
            ranks_by="nothing",
            direction="none",
            function=_random,
            is_seeded=True,
        ),
        OrderEntry(
            name="given",
            help="the order in which the demonstrations are given",
            source="baseline",
            ranks_by="nothing",
            direction="none",
            function=_given,
        ),
    ),
)

# The orders that need neither a difficulty nor the query. All queries can therefore share one prompt.
SHARED_PROMPT_ORDERS = Registry(ORDERS.kind, (entry for entry in ORDERS.values() if entry.needs <= {"lengths"}))
# The default is the first of these orders that accepts the kind of the scores.
_HARDEST_FIRST: tuple[Order, ...] = ("sparse_to_dense", "hard_to_easy")


def base_name(order: str) -> str:
    """The name of an order without "reverse:"."""
    # A loop, because "reverse:reverse:X" is allowed and means X.
    while order.startswith(REVERSE):
        order = order.removeprefix(REVERSE)
    return order


def order_entry(order: str) -> OrderEntry:
    """The entry of an order, with or without "reverse:".

    Raises:
        SparsortError: there is no such order.
    """
    base = base_name(str(order))
    if base not in ORDERS:
        raise unknown_choice("order", order, (*ORDERS, "reverse:<any of these>"))
    return ORDERS[base]


def default_order(kind: str | None) -> str:
    """The default order for scores of a kind: the hardest first, under the name that accepts this kind."""
    return next(name for name in _HARDEST_FIRST if ORDERS[name].accepts(kind))


def is_reversed(order: str) -> bool:
    """Whether "reverse:" has an effect; written twice, it cancels itself."""
    return order.count(REVERSE) % 2 == 1


def ranks_by(*keys: Key) -> Callable[[Values], bool]:
    """The condition that the option `order` ranks by one of these keys; it holds if the value is not an order."""
    return reads_order(lambda entry: entry.ranks_by in keys)


def reads_order(holds: Callable[[OrderEntry], bool]) -> Callable[[Values], bool]:
    """The condition that `holds` for the entry of the option `order`; it holds if the value is not an order."""

    def read(values: Values) -> bool:
        order = values["order"]
        try:
            return holds(order_entry(order if order is not None else default_order(None)))
        except SparsortError:
            return True

    return read


# The conditions under which an order reads a setting; see `sparsort.conditions`. Scores, similarities and a seed are not checked:
# they may be passed to an order that does not read them.
READ_BY: Table = {
    "missing": (When(holds=ranks_by("difficulty", "similarity"), why="{order} needs no number that could be missing"),),
    "text": (When(holds=ranks_by("length"), why="only the orders by length read a text, and this is {order}"),),
}


def order_demos(
    demos: Any,
    scores: ScoresLike | None = None,
    order: str | None = None,
    *,
    similarity: Mapping[Any, float] | Sequence[float] | NDArray[Any] | None = None,
    seed: int = 0,
    text: TextOf | None = None,
    missing: Missing = "error",
) -> list[dict[str, Any]]:
    """Put demonstrations in an order. `ORDERS` lists the orders, what each ranks by, and its source.

    Args:
        demos: K rows, in any form that `open_rows` reads.
        scores: a table of scores, a mapping from id to difficulty, or K numbers; higher is harder.
        order: a name in `ORDERS`, or "reverse:NAME" for its exact reverse. None puts the hardest first: it means
            `sparse_to_dense`, or `hard_to_easy` for scores of another kind than sparsity.
        similarity: K similarities to the query, or a mapping from id to similarity; for the orders by similarity.
        seed: seed of the random order.
        text: function from a row to its text, for the orders by length; by default all text fields except the id.
        missing: treatment of rows whose difficulty or similarity is NaN: "error" refuses them, "first" and "last" put them
            there in the prompt (also under `reverse:`), and "drop" removes them.

    Returns:
        Copies of the rows, first to last. Duplicates are kept, and logged as a warning (logger "sparsort").

    Raises:
        SparsortError: an unknown order, a missing input, scores of the wrong kind or length, NaN under missing="error", or a
            setting that the order does not read.
    """
    refuse_unread_arguments(order_demos, READ_BY, {"order": order, "missing": missing, "text": text})
    demos = rows_of(demos)
    if order is None:
        order = default_order(scores.kind if isinstance(scores, DifficultyTable) else None)
    key = order_entry(order).ranks_by
    difficulty = kind = similarity_K = lengths = None
    # Inputs that the order does not rank by are not even checked, so that one call can pass the same inputs to every order.
    if key == "difficulty" and scores is not None:
        resolved = resolve(scores, demos)
        difficulty, kind = resolved.values, resolved.kind
    if key == "similarity" and similarity is not None:
        similarity_K = resolve(similarity, demos, argument="similarity").values
    if key == "length":
        lengths = [len(text(row) if text else text_of(row, position)) for position, row in enumerate(demos)]
    indices = order_indices(
        order,
        len(demos),
        difficulty=difficulty,
        kind=kind,
        similarity=similarity_K,
        lengths=lengths,
        seed=seed,
        missing=missing,
        names=[id_of(row, position) for position, row in enumerate(demos)],
    )
    ordered = [dict(demos[index]) for index in indices]
    for note in duplicates(ordered):
        logging.getLogger("sparsort").warning("%s", note)
    return ordered


def order_indices(
    order: str,
    count: int,
    *,
    difficulty: Sequence[float] | NDArray[Any] | None = None,
    kind: str | None = None,
    similarity: Sequence[float] | NDArray[Any] | None = None,
    lengths: Sequence[float] | NDArray[Any] | None = None,
    seed: int = 0,
    missing: Missing = "error",
    names: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """The positions of K = `count` items, first to last, under one of the orders of `order_demos`.

    Args:
        order: the order's name.
        count: number of items.
        difficulty: (K,) numbers, higher is harder, NaN where unknown.
        kind: the kind of the difficulty ("sparsity", "answer_loss", …), or None for bare numbers, which any order accepts.
        similarity: (K,) similarities to the query.
        lengths: (K,) lengths.
        seed: seed of the random order.
        missing: treatment of items whose key is NaN, as in `order_demos`.
        names: (K,) names of the items in error messages; by default their positions.

    Raises:
        SparsortError: as `order_demos`.
    """
    entry = order_entry(order)
    if missing not in get_args(Missing):
        raise unknown_choice("treatment of missing scores", missing, get_args(Missing))
    if entry.ranks_by == "difficulty":
        _check_kind(entry, kind)
    inputs = {"scores": difficulty, "similarity": similarity, "lengths": lengths}
    # An entry needs one input, or none; without one, every key is zero and the function decides by position or by seed.
    key_K = next((_key(entry, name, inputs[name], count) for name in entry.needs), np.zeros(count))
    unknown = np.flatnonzero(np.isnan(key_K)).astype(np.int64)
    if unknown.size and missing == "error":
        raise _missing_key(order, unknown, count, names)
    known = np.flatnonzero(~np.isnan(key_K)).astype(np.int64)
    ranked = known[entry.function(key_K[known], seed)]
    # Only the ranked items are reversed: missing="first" puts the others first under `reverse:` too.
    if is_reversed(order):
        ranked = ranked[::-1].copy()
    match missing:
        case "first":
            return np.concatenate([unknown, ranked])
        case "last":
            return np.concatenate([ranked, unknown])
        case _:
            return ranked


def _check_kind(entry: OrderEntry, kind: str | None) -> None:
    if entry.accepts(kind):
        return
    # Every order that accepts some kinds only has a twin with the same function that accepts all.
    any_kind = ORDERS.names(lambda one: one.ranks_by == "difficulty" and not one.kinds)
    twin = next(name for name in any_kind if ORDERS[name].function is entry.function)
    raise SparsortError(
        f"the order {entry.name!r} is by {' or '.join(entry.kinds)}, but these scores are of kind {kind!r}. "
        f"For any difficulty the same order is called {twin!r}."
    )


def _key(
    entry: OrderEntry, argument: str, values: Sequence[float] | NDArray[Any] | None, count: int
) -> NDArray[np.float64]:
    if values is None:
        others = ORDERS.names(lambda one: one.ranks_by in ("length", "nothing"))
        hint = f" Orders that need no scores: {', '.join(others)}." if entry.ranks_by == "difficulty" else ""
        raise SparsortError(f"the order {entry.name!r} needs {argument}=, one number for each demonstration.{hint}")
    key = np.asarray(values, dtype=np.float64)
    if key.shape != (count,):
        raise SparsortError(f"{argument} has shape {key.shape}; the {count} demonstrations need shape ({count},).")
    return key


def _missing_key(order: str, unknown: NDArray[np.int64], count: int, names: Sequence[str] | None) -> SparsortError:
    without = listed([repr(names[index]) if names else str(index) for index in unknown.tolist()], most=10)
    return SparsortError(
        f"the order {order!r} needs a number for each demonstration, but {unknown.size} of {count} have NaN: {without}. "
        "If a row could not be scored, the column 'reason' of its table of scores says why. "
        "Drop such rows with missing='drop', or place them with missing='first' or 'last'."
    )
