"""When the layers are sparse, and with what budget: a function of the step.

Contract: for `warmup_steps` both branches work over every visible block (MSA's warm-up, arXiv 2606.13392); after that the
budget goes in a straight line from `start` to the configured one in `anneal_steps`. A pure function, so that a resumed run
does what an uninterrupted one does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import Budget, FixedBudget, ThresholdBudget


@dataclass(frozen=True, kw_only=True)
class SparseSchedule:
    """The course of sparsity over a training run.

    Attributes:
        warmup_steps: optimiser steps over the full support.
        start: with `anneal_steps`, what the budget's number (blocks, threshold or p) begins with.
        anneal_steps: steps behind the warm-up in which it reaches the configured one.
    """

    warmup_steps: int = 0
    start: float | None = None
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "anneal_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise SparsortError(f"{name} must be a whole number of at least 0, not {value!r}.")
        if (self.start is None) != (self.anneal_steps == 0):
            raise SparsortError(
                f"start={self.start!r} and anneal_steps={self.anneal_steps!r} belong together: the budget goes from start to the "
                "configured one in so many steps. Give both, or neither."
            )
        start = self.start
        number = isinstance(start, int | float) and not isinstance(start, bool)
        if start is not None and not (number and 0 < start < math.inf):
            raise SparsortError(f"start must be a number above 0, not {start!r}.")

    def full(self, step: int) -> bool:
        """Whether every visible block is taken at optimiser step `step`, counted from 0."""
        return step < self.warmup_steps

    def budget(self, step: int, final: Budget) -> Budget:
        """The budget at a step.

        Raises:
            SparsortError: `start` is nothing that this budget can be.
        """
        behind = step - self.warmup_steps
        if self.start is None or behind >= self.anneal_steps:
            return final
        done = max(0, behind) / self.anneal_steps
        if isinstance(final, FixedBudget):
            if self.start < 1:
                raise SparsortError(f"start={self.start!r} is no number of blocks; expected 1 or more.")
            return FixedBudget(blocks=round(self.start + done * (final.blocks - self.start)))
        if isinstance(final, ThresholdBudget):
            return replace(final, threshold=self.start + done * (final.threshold - self.start))
        return replace(final, p=self.start + done * (final.p - self.start))
