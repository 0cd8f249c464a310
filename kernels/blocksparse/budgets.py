"""How many blocks a query token may have: from block scores to a selection.

Contract: the block that a query stands in is always taken and uses one of its slots; blocks it cannot see are never taken;
ties go to the lower block. NaN counts as the lowest score there is, ±∞ as the highest and the lowest number. A query that
sees fewer blocks than its budget takes them all. `choose` knows nothing of where scores come from.

Legend: t queries (any leading axes), N blocks, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class FixedBudget:
    """The `blocks` highest, the local block among them (MSA, arXiv 2606.13392)."""

    blocks: int

    def __post_init__(self) -> None:
        _check_count("blocks", self.blocks)

    @property
    def slots(self) -> int:
        return self.blocks


@dataclass(frozen=True, kw_only=True)
class ThresholdBudget:
    """Every block whose share of the softmax over the visible blocks' scores is at least `threshold`; at most `most`."""

    threshold: float
    most: int

    def __post_init__(self) -> None:
        _check_count("most", self.most)
        if not 0 <= self.threshold <= 1:
            raise SparsortError(f"threshold is {self.threshold}; expected a share between 0 and 1.")

    @property
    def slots(self) -> int:
        return self.most


@dataclass(frozen=True, kw_only=True)
class TopPBudget:
    """The fewest highest blocks whose shares of the softmax sum to `p` or more, the local one counted first; at most `most`."""

    p: float
    most: int

    def __post_init__(self) -> None:
        _check_count("most", self.most)
        if not 0 < self.p <= 1:
            raise SparsortError(f"p is {self.p}; expected a share above 0 and at most 1.")

    @property
    def slots(self) -> int:
        return self.most


Budget: TypeAlias = FixedBudget | ThresholdBudget | TopPBudget


def check_budget(given: object) -> Budget:
    """`given`, if it is a budget.

    Raises:
        SparsortError: it is something else.
    """
    if not isinstance(given, Budget):
        raise SparsortError(
            f"the budget is {given!r}; expected FixedBudget, ThresholdBudget or TopPBudget, such as FixedBudget(blocks=16)."
        )
    return given


def choose(scores: Tensor, own: Tensor, budget: Budget) -> Tensor:
    """The blocks of each query.

    Args:
        scores: (..., t, N) floating point.
        own: (t,) or anything that broadcasts to (..., t), whole numbers: the block each query stands in; −1 for a query that
            sees nothing.
        budget: how many.

    Returns:
        (..., t, K) int32 with K = min(budget's slots, N), highest score first after the local block, −1 in unused slots.
    """
    own = own.expand(scores.shape[:-1]).to(torch.int64)
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    visible, local = numbers <= own[..., None], numbers == own[..., None]
    # In float32 at least: shares of half-precision scores would decide other than those of the same scores in float64.
    wide = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    bounds = torch.finfo(wide.dtype)
    known = wide.nan_to_num(nan=bounds.min, posinf=bounds.max, neginf=bounds.min)
    # The local block above all, what is visible by score, what is not below all.
    ranked = torch.where(visible, known, -torch.inf).masked_fill(local, torch.inf)
    slots = min(budget.slots, scores.shape[-1])
    order = _highest(ranked, slots)
    taken = order <= own[..., None]
    if not isinstance(budget, FixedBudget):
        share = torch.where(visible, known, -torch.inf).softmax(dim=-1).gather(-1, order)
        taken = taken & wanted_slots(share, budget)
    return torch.where(taken, order, -1).to(torch.int32)


def wanted_slots(share: Tensor, budget: ThresholdBudget | TopPBudget) -> Tensor:
    """(..., t, K) bool: the slots that the budget wants, from their shares of the softmax over visible blocks, local first."""
    if isinstance(budget, ThresholdBudget):
        wanted = share >= budget.threshold
    elif budget.p == 1:
        # Rounded shares may reach 1 before the last block.
        wanted = torch.ones_like(share, dtype=torch.bool)
    else:
        # A block is needed while those before it do not reach p; summed in float64, as rounding grows with their number.
        exact = share.double()
        wanted = exact.cumsum(dim=-1) - exact < budget.p
    wanted[..., :1] = True
    return wanted


def _highest(scores: Tensor, slots: int) -> Tensor:
    """Places of the highest scores along the last axis, highest first, the lower place first where scores tie; no NaN."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    # A float's bits ascend with it as a whole number, once those of negative floats are turned about; with the place in the
    # lower half no two are equal, and topk, which knows no order among equals, takes a third of a stable sort's time. Adding
    # 0 makes −0 the 0 that it equals.
    last = scores.shape[-1] - 1
    bits = (scores + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    place_from_last = last - torch.arange(last + 1, device=scores.device)
    return last - (((ascending << 32) | place_from_last).topk(slots, dim=-1).values & 0xFFFFFFFF)


def _check_count(name: str, given: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise SparsortError(f"{name} is {given!r}; expected a whole number of 1 or more: the local block takes one.")
