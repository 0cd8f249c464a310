"""The order in which demonstrations stand in a prompt, first to last; the last stands next to the query.

Contract: an order is a permutation of the demonstrations (of those with a score, under missing="drop"). Ties keep the
given order. `reverse:X` is the exact reverse of X, ties included. Nothing here knows a model: difficulty, similarity
and length come in as numbers. Difficulty rises with sparsity, so "sparse" reads as hard and "dense" as easy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, Values, When, refuse_unread_arguments
from sparsort.curriculum.demos.difficulty import DifficultyTable, ScoresLike, resolve
from sparsort.curriculum.demos.duplicates import duplicates
from sparsort.curriculum.demos.rows import Row, TextOf, id_of, listed, text_of
from sparsort.errors import SparsortError, unknown_choice

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

ORDERS: tuple[str, ...] = get_args(Order)
_REVERSE = "reverse:"
_OTHER_NAME = {"sparse_to_dense": "hard_to_easy", "dense_to_sparse": "easy_to_hard"}
_LOSSES = ("answer_loss", "prompt_loss")


def _ascending(key_N: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.argsort(key_N, kind="stable").astype(np.int64)


def _descending(key_N: NDArray[np.float64]) -> NDArray[np.int64]:
    return _ascending(-key_N)


def _u_shape(key_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Falls, then rises: dealt from the highest down, alternately to the back and to the front."""
    falling = _descending(key_N)
    return np.concatenate([falling[1::2], falling[0::2][::-1]])


def _inverted_u(key_N: NDArray[np.float64]) -> NDArray[np.int64]:
    return _u_shape(-key_N)


_BY_DIFFICULTY: dict[str, Callable[[NDArray[np.float64]], NDArray[np.int64]]] = {
    "sparse_to_dense": _descending,
    "dense_to_sparse": _ascending,
    "easy_to_hard": _ascending,
    "hard_to_easy": _descending,
    "u_shape": _u_shape,
    "inverted_u": _inverted_u,
    "perplexity_ascending": _ascending,
}
_BY_SIMILARITY = {"similarity_ascending": _ascending, "similarity_descending": _descending}
_BY_LENGTH = {"length_ascending": _ascending, "length_descending": _descending}


def base_order(order: str) -> str:
    """An order without its "reverse:".

    Raises:
        SparsortError: there is no such order.
    """
    base = str(order)
    while base.startswith(_REVERSE):
        base = base.removeprefix(_REVERSE)
    if base not in ORDERS:
        raise unknown_choice("order", order, (*ORDERS, "reverse:<any of these>"))
    return base


def default_order(kind: str | None) -> str:
    """The order where none is named: the hardest first, by the name that goes with scores of this kind."""
    return "sparse_to_dense" if kind in (None, "sparsity") else "hard_to_easy"


def _keys(values: Values) -> frozenset[str]:
    """What the order that is asked for ranks by."""
    order = values["order"]
    try:
        base = base_order(order if order is not None else default_order(None))
    except SparsortError:
        return frozenset(("difficulty", "similarity", "length"))
    return frozenset(
        name
        for name, orders in (("difficulty", _BY_DIFFICULTY), ("similarity", _BY_SIMILARITY), ("length", _BY_LENGTH))
        if base in orders
    )


def ranks_by(*keys: str) -> Callable[[Values], bool]:
    """Whether the order ranks by one of "difficulty", "similarity" and "length"; true of what is no order."""
    return lambda values: bool(_keys(values) & set(keys))


# The orders that read a setting; see `sparsort.conditions`. Numbers of the rows and a seed may be given where they are not read.
READ_BY: Table = {
    "missing": (
        When(holds=ranks_by("difficulty", "similarity"), why="{order} ranks by nothing that a row could lack"),
    ),
    "text": (When(holds=ranks_by("length"), why="only the orders by length read a text, and this is {order}"),),
}


def order_demos(
    demos: Sequence[Row],
    scores: ScoresLike | None = None,
    order: str | None = None,
    *,
    similarity: Mapping[Any, float] | Sequence[float] | NDArray[Any] | None = None,
    seed: int = 0,
    text: TextOf | None = None,
    missing: Missing = "error",
) -> list[dict[str, Any]]:
    """Put demonstrations in an order.

    The orders:
        sparse_to_dense, dense_to_sparse: by sparsity (arXiv 2603.03415); scores of another kind are refused.
        easy_to_hard, hard_to_easy: by any difficulty.
        u_shape: difficulty falls, then rises; the hardest stands next to the query, the second hardest first, the
            easiest in the middle. The ends are what a model reads best (arXiv 2307.03172). inverted_u: the same with
            easy and hard exchanged, so the hardest stands in the middle.
        similarity_ascending (the nearest next to the query, as KATE, arXiv 2101.06804), similarity_descending.
        perplexity_ascending: ICCL (arXiv 2402.10738); by the model's loss on the answer or on the prompt.
        length_ascending, length_descending: by characters; the confound that every other order is measured against.
        random: seeded. given: as they come.
        reverse:X: the exact reverse of any of these.

    Args:
        demos: K rows.
        scores: a table of scores, a mapping from id to difficulty, or K numbers; higher is harder.
        order: one of the names above; None for the hardest first: `sparse_to_dense`, or `hard_to_easy` for scores of another kind
            than sparsity.
        similarity: K similarities to the query, or a mapping from id; for the similarity orders.
        seed: of the random order.
        text: a row's text, for the length orders; by default all its text fields but the id.
        missing: what happens to rows whose difficulty or similarity is NaN: refuse ("error"), put them first or last in
            the prompt (also under `reverse:`), or leave them out ("drop").

    Returns:
        Copies of the rows, first to last. Duplicates are kept, and logged as a warning (logger "sparsort").

    Raises:
        SparsortError: unknown order, a missing input, scores of the wrong kind or length, NaN under missing="error", or a
            setting that the order does not read.
    """
    refuse_unread_arguments(order_demos, READ_BY, {"order": order, "missing": missing, "text": text})
    if order is None:
        order = default_order(scores.kind if isinstance(scores, DifficultyTable) else None)
    base = base_order(order)
    difficulty = kind = near = lengths = None
    if base in _BY_DIFFICULTY and scores is not None:
        resolved = resolve(scores, demos)
        difficulty, kind = resolved.values, resolved.kind
    if base in _BY_SIMILARITY and similarity is not None:
        near = resolve(similarity, demos, argument="similarity").values
    if base in _BY_LENGTH:
        lengths = [len(text(row) if text else text_of(row, position)) for position, row in enumerate(demos)]
    indices = order_indices(
        order,
        len(demos),
        difficulty=difficulty,
        kind=kind,
        similarity=near,
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
    """The positions of `count` items, first to last, under one of the orders of `order_demos`.

    Args:
        order: the order's name.
        count: how many items there are.
        difficulty: (count,) numbers, higher is harder, NaN where unknown.
        kind: what the difficulty is ("sparsity", "answer_loss", …), or None for bare numbers, which any order takes.
        similarity: (count,) similarities to the query.
        lengths: (count,) lengths.
        seed: of the random order.
        missing: what happens to items whose key is NaN.
        names: (count,) what errors call the items; by default their positions.

    Raises:
        SparsortError: as `order_demos`.
    """
    base = base_order(order)
    if missing not in get_args(Missing):
        raise unknown_choice("treatment of missing scores", missing, get_args(Missing))
    if base == "given":
        ranked = np.arange(count, dtype=np.int64)
    elif base == "random":
        ranked = np.random.default_rng(seed).permutation(count).astype(np.int64)
    elif base in _BY_DIFFICULTY:
        _check_kind(base, kind)
        return _rank(order, _BY_DIFFICULTY[base], _key(base, difficulty, count, "scores"), missing, names)
    elif base in _BY_SIMILARITY:
        return _rank(order, _BY_SIMILARITY[base], _key(base, similarity, count, "similarity"), missing, names)
    else:
        return _rank(order, _BY_LENGTH[base], _key(base, lengths, count, "lengths"), missing, names)
    return ranked[::-1].copy() if _is_reversed(order) else ranked


def _is_reversed(order: str) -> bool:
    return order.count(_REVERSE) % 2 == 1


def _check_kind(base: str, kind: str | None) -> None:
    if kind is None:
        return
    if base in _OTHER_NAME and kind != "sparsity":
        raise SparsortError(
            f"the order {base!r} is by sparsity, but these scores are of kind {kind!r}. "
            f"For any difficulty the same order is called {_OTHER_NAME[base]!r}."
        )
    if base == "perplexity_ascending" and kind not in _LOSSES:
        raise SparsortError(
            f"the order {base!r} is by the model's loss ({' or '.join(_LOSSES)}), but these scores are of kind "
            f"{kind!r}. Score with LossScorer, or use 'easy_to_hard', which takes any difficulty."
        )


def _key(base: str, values: Sequence[float] | NDArray[Any] | None, count: int, argument: str) -> NDArray[np.float64]:
    if values is None:
        hint = " Without scores: random, given, length_ascending." if argument == "scores" else ""
        raise SparsortError(f"the order {base!r} needs {argument}=, one number a demonstration.{hint}")
    key = np.asarray(values, dtype=np.float64)
    if key.shape != (count,):
        raise SparsortError(f"{argument} has shape {key.shape}; the {count} demonstrations need shape ({count},).")
    return key


def _rank(
    order: str,
    rank: Callable[[NDArray[np.float64]], NDArray[np.int64]],
    key_N: NDArray[np.float64],
    missing: Missing,
    names: Sequence[str] | None,
) -> NDArray[np.int64]:
    unknown = np.flatnonzero(np.isnan(key_N)).astype(np.int64)
    if unknown.size and missing == "error":
        who = listed([repr(names[index]) if names else str(index) for index in unknown.tolist()], most=10)
        raise SparsortError(
            f"the order {order!r} needs a number for each demonstration, but {unknown.size} of {len(key_N)} have NaN: "
            f"{who}. "
            "A table of scores keeps the reason of a row that could not be scored in its column 'reason'. "
            "Leave such rows out with missing='drop', or place them with missing='first' or 'last'."
        )
    known = np.flatnonzero(~np.isnan(key_N)).astype(np.int64)
    ranked = known[rank(key_N[known])]
    if _is_reversed(order):
        ranked = ranked[::-1].copy()
    if missing == "first":
        return np.concatenate([unknown, ranked])
    if missing == "last":
        return np.concatenate([ranked, unknown])
    return ranked
