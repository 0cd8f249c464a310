"""Observations of training: the raw values of rows at steps (NumPy only).

Contract: the result of `ordered` does not depend on the order in which ranks delivered the observations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class Observations:
    """n measured values, each of a row at a step.

    Attributes:
        rows: (n,) row numbers of the data.
        steps: (n,) number of the optimiser step, counted over all epochs.
        values: (n,) finite values in the units of the metric; higher is harder.

    Raises:
        SparsortError: the arrays differ in length, or a value is not finite.
    """

    rows: NDArray[np.int64]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not (self.rows.shape == self.steps.shape == self.values.shape == (len(self.rows),)):
            raise SparsortError(
                f"observations need rows, steps and values of equal length, got shapes {self.rows.shape}, "
                f"{self.steps.shape} and {self.values.shape}."
            )
        if not np.isfinite(self.values).all():
            raise SparsortError("an observation is NaN or infinite; skip values that could not be measured.")

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def join(cls, parts: Iterable[Observations]) -> Observations:
        """Concatenate the parts; without parts the result is empty."""
        parts = list(parts)
        return cls(
            rows=np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)]),
            steps=np.concatenate([np.empty(0, np.int64), *(part.steps for part in parts)]),
            values=np.concatenate([np.empty(0, np.float64), *(part.values for part in parts)]),
        )

    def ordered(self) -> Observations:
        """The observations sorted by step, then row, then value, which does not depend on the order of delivery."""
        return self._at(np.lexsort((self.values, self.rows, self.steps)))

    def split(self, step: int) -> tuple[Observations, Observations]:
        """The observations of steps before `step`, and the rest."""
        before = self.steps < step
        return self._at(before), self._at(~before)

    def _at(self, chosen: NDArray[Any]) -> Observations:
        return Observations(rows=self.rows[chosen], steps=self.steps[chosen], values=self.values[chosen])
