"""The difficulty of each demonstration, from any form in which the caller passes it.

Contract: `resolve` turns a table of scores, a mapping from id to number, or numbers in the order of the rows into one fp64 array;
higher is harder, and NaN marks a row without a score. Selection and ordering both read scores through it.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.rows import Row, id_of, listed, name_of
from sparsort.errors import SparsortError
from sparsort.values import number_array


@runtime_checkable
class DifficultyTable(Protocol):
    """The interface of a table of scores, which `sparsort.scoring.store.scores.Scores` implements."""

    @property
    def kind(self) -> str:
        """The kind of the scores: the name of a scorer (`sparsort.scoring.scorers.SCORERS`), or "calibrated"."""

    def difficulty_of(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        """The difficulty of each row, (N,), NaN if it could not be scored.

        Raises:
            SparsortError: a row is not in the table.
        """


ScoresLike = DifficultyTable | Mapping[Any, float] | Sequence[float] | NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """The difficulty of each row.

    Attributes:
        values: (N,) fp64, higher is harder, NaN where unknown.
        kind: the kind of the scores, or None if the caller passed bare numbers.
    """

    values: NDArray[np.float64]
    kind: str | None = None


def resolve(scores: ScoresLike, rows: Sequence[Row], *, argument: str = "scores") -> Difficulty:
    """The difficulty of each row.

    Args:
        scores: a table of scores; a mapping from id to number; or one number for each row, in their order.
        rows: N rows.
        argument: the name of the caller's argument, for error messages.

    Raises:
        SparsortError: a row has no entry, the length differs from N, or something is not a number.
    """
    # A table is recognised by its interface, since this package does not import the store of scores.
    if isinstance(scores, DifficultyTable):
        return Difficulty(values=_numbers(scores.difficulty_of(rows), len(rows), argument), kind=str(scores.kind))
    if isinstance(scores, Mapping):
        return Difficulty(values=_numbers(_by_id(scores, rows, argument), len(rows), argument))
    return Difficulty(values=_numbers(scores, len(rows), argument))


def _by_id(scores: Mapping[Any, float], rows: Sequence[Row], argument: str) -> list[float]:
    # A caller may have integers as ids, while ids of rows are compared as text.
    by_text = {str(key): value for key, value in scores.items()}
    names = [id_of(row, position) for position, row in enumerate(rows)]
    absent = [name_of(row, position) for position, row in enumerate(rows) if names[position] not in by_text]
    if absent:
        raise SparsortError(
            f"{argument} has no entry for {listed(absent)}; it has {len(by_text)} entries, keyed by id. "
            "Score those rows too, or remove them."
        )
    return [by_text[name] for name in names]


def _numbers(values: Any, count: int, argument: str) -> NDArray[np.float64]:
    try:
        numbers = number_array(values)
    except (OverflowError, TypeError, ValueError) as error:
        raise SparsortError(
            f"{argument} must be a table of scores, a mapping from id to number, or one number for each demonstration; "
            f"{type(values).__name__} was given ({error})."
        ) from error
    if numbers.shape != (count,):
        raise SparsortError(
            f"{argument} has shape {numbers.shape}, but there are {count} demonstrations: "
            f"one number for each was expected, shape ({count},)."
        )
    return numbers
