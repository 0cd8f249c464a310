"""The schedule of sparse training: mode and budget as a function of the step.

Contract: for `warmup_steps`, attention and the selector use every visible block (MSA's warm-up, arXiv 2606.13392). After that,
the budget changes linearly from `start` to the configured one within `anneal_steps`. The schedule is a pure function of the
step, so a resumed run does the same as an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import Budget, FixedBudget, ThresholdBudget


@dataclass(frozen=True, kw_only=True)
class SparseSchedule:
    """The mode and the budget over a training run.

    Attributes:
        warmup_steps: number of optimiser steps with every visible block.
        start: initial value of the budget's number (blocks, threshold or p); requires `anneal_steps`.
        anneal_steps: number of steps after the warm-up until the budget reaches its configured value.

    Raises:
        SparsortError: a number is out of range, or only one of `start` and `anneal_steps` is given.
    """

    warmup_steps: int = 0
    start: float | None = None
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "anneal_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise SparsortError(f"{name} is {value!r}; expected a whole number of at least 0.")
        if (self.start is None) != (self.anneal_steps == 0):
            raise SparsortError(
                f"start={self.start!r} and anneal_steps={self.anneal_steps!r} belong together: the budget changes from start to "
                "its configured value within anneal_steps. Pass both, or neither."
            )
        start = self.start
        number = isinstance(start, int | float) and not isinstance(start, bool)
        if start is not None and not (number and 0 < start < math.inf):
            raise SparsortError(f"start is {start!r}; expected a number above 0.")

    def full(self, step: int) -> bool:
        """Whether every visible block is used at optimiser step `step`, counted from 0."""
        return step < self.warmup_steps

    def budget(self, step: int, final: Budget) -> Budget:
        """Return the budget at optimiser step `step`.

        Args:
            step: number of the optimiser step, from 0.
            final: the configured budget, which is reached after `anneal_steps`.

        Raises:
            SparsortError: `start` is not a valid value for this kind of budget.
        """
        annealed_steps = step - self.warmup_steps
        if self.start is None or annealed_steps >= self.anneal_steps:
            return final
        # During the warm-up the budget is not used, and it stays at `start`.
        progress = max(0, annealed_steps) / self.anneal_steps
        if isinstance(final, FixedBudget):
            if self.start < 1:
                raise SparsortError(f"start={self.start!r} is not a number of blocks; expected 1 or more.")
            return FixedBudget(blocks=round(self.start + progress * (final.blocks - self.start)))
        if isinstance(final, ThresholdBudget):
            return replace(final, threshold=self.start + progress * (final.threshold - self.start))
        return replace(final, p=self.start + progress * (final.p - self.start))
