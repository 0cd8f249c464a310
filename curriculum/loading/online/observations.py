"""What training showed of its examples: values of rows at steps, before anything is made of them (NumPy only).

Contract: `ordered` gives one order whoever delivered what first, so that ranks need not agree on anything else.
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
    """What was measured: n values, each of a row at a step.

    Attributes:
        rows: (n,) row numbers of the data.
        steps: (n,) number of the optimiser step, counted over all epochs.
        values: (n,) finite, higher is harder, in the metric's own units.

    Raises:
        SparsortError: arrays of unequal length, or a value that is not finite.
    """

    rows: NDArray[np.int64]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not (self.rows.shape == self.steps.shape == self.values.shape == (len(self.rows),)):
            raise SparsortError(
                f"observations need rows, steps and values of one length, got shapes {self.rows.shape}, "
                f"{self.steps.shape} and {self.values.shape}."
            )
        if not np.isfinite(self.values).all():
            raise SparsortError("an observation is NaN or infinite; leave out what could not be measured.")

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def join(cls, parts: Iterable[Observations]) -> Observations:
        """All of the parts, one behind the other; none make an empty one."""
        parts = list(parts)
        return cls(
            rows=np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)]),
            steps=np.concatenate([np.empty(0, np.int64), *(part.steps for part in parts)]),
            values=np.concatenate([np.empty(0, np.float64), *(part.values for part in parts)]),
        )

    def ordered(self) -> Observations:
        """The same by step, then row, then value: the order does not depend on who delivered what first."""
        return self._at(np.lexsort((self.values, self.rows, self.steps)))

    def split(self, step: int) -> tuple[Observations, Observations]:
        """Those of steps before `step`, and the rest."""
        before = self.steps < step
        return self._at(before), self._at(~before)

    def _at(self, chosen: NDArray[Any]) -> Observations:
        return Observations(rows=self.rows[chosen], steps=self.steps[chosen], values=self.values[chosen])
