"""Budgets, which limit the number of blocks of a query token, and the choice of blocks by their scores.

Contract: the block that contains a query (its local block) is always taken and uses one slot. Blocks that the query cannot see
are never taken. Ties go to the lower block. NaN counts as the lowest score, and ±∞ as the highest and the lowest finite number.
A query that sees fewer blocks than its budget takes all of them. `choose` does not depend on the origin of the scores.

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
    """The `blocks` highest-scoring blocks, including the local block (MSA, arXiv 2606.13392)."""

    blocks: int

    def __post_init__(self) -> None:
        _check_count("blocks", self.blocks)

    @property
    def slots(self) -> int:
        return self.blocks


@dataclass(frozen=True, kw_only=True)
class ThresholdBudget:
    """Every block whose share of the softmax over the visible blocks' scores is at least `threshold`; at most `most` blocks."""

    threshold: float
    most: int

    def __post_init__(self) -> None:
        _check_count("most", self.most)
        if not 0 <= self.threshold <= 1:
            raise SparsortError(f"threshold is {self.threshold}; expected a share between 0 and 1, such as 0.01.")

    @property
    def slots(self) -> int:
        return self.most


@dataclass(frozen=True, kw_only=True)
class TopPBudget:
    """The fewest blocks, local block first and then by score, whose softmax shares sum to at least `p`; at most `most` blocks."""

    p: float
    most: int

    def __post_init__(self) -> None:
        _check_count("most", self.most)
        if not 0 < self.p <= 1:
            raise SparsortError(f"p is {self.p}; expected a share above 0 and at most 1, such as 0.9.")

    @property
    def slots(self) -> int:
        return self.most


Budget: TypeAlias = FixedBudget | ThresholdBudget | TopPBudget


def check_budget(given: object) -> Budget:
    """Return `given` if it is a budget.

    Raises:
        SparsortError: `given` is not a budget.
    """
    if not isinstance(given, Budget):
        raise SparsortError(
            f"the budget is {given!r}; expected FixedBudget, ThresholdBudget or TopPBudget, such as FixedBudget(blocks=16)."
        )
    return given


def choose(scores: Tensor, own: Tensor, budget: Budget) -> Tensor:
    """Choose the blocks of each query.

    Args:
        scores: (..., t, N) floating point.
        own: (t,) or a shape that broadcasts to (..., t), whole numbers: each query's local block; −1 for a query that sees
            nothing.
        budget: number of blocks per query.

    Returns:
        (..., t, K) int32 with K = min(budget's slots, N): the local block first, then by descending score, −1 in unused slots.
    """
    own = own.expand(scores.shape[:-1]).to(torch.int64)
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    visible, local = numbers <= own[..., None], numbers == own[..., None]
    # Compute in float32 or wider. Softmax shares in half precision would round differently and change the selection.
    wide = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    bounds = torch.finfo(wide.dtype)
    known = wide.nan_to_num(nan=bounds.min, posinf=bounds.max, neginf=bounds.min)
    # Rank the local block first, then the visible blocks by score, then the blocks that the query cannot see.
    ranked = torch.where(visible, known, -torch.inf).masked_fill(local, torch.inf)
    slots = min(budget.slots, scores.shape[-1])
    order = _highest(ranked, slots)
    taken = order <= own[..., None]
    if not isinstance(budget, FixedBudget):
        share = torch.where(visible, known, -torch.inf).softmax(dim=-1).gather(-1, order)
        taken = taken & wanted_slots(share, budget)
    return torch.where(taken, order, -1).to(torch.int32)


def wanted_slots(share: Tensor, budget: ThresholdBudget | TopPBudget) -> Tensor:
    """Return the slots that the budget takes: (..., t, K) bool.

    Args:
        share: (..., t, K), the slots' shares of the softmax over the visible blocks, local block first.
        budget: the threshold, or the sum of shares to reach.
    """
    if isinstance(budget, ThresholdBudget):
        wanted = share >= budget.threshold
    elif budget.p == 1:
        # Take all blocks without summing: rounded shares may reach 1 before the last block.
        wanted = torch.ones_like(share, dtype=torch.bool)
    else:
        # A block is needed if the ones before it do not reach p. Sum in float64, because the rounding error grows with the
        # number of blocks.
        exact = share.double()
        wanted = exact.cumsum(dim=-1) - exact < budget.p
    # The first slot is the local block, which is always taken.
    wanted[..., :1] = True
    return wanted


def _highest(scores: Tensor, slots: int) -> Tensor:
    """Return the indices of the highest scores (no NaN) along the last axis, highest first, ties by ascending index."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    # Stable top-k through int64 keys: order-preserving float bits in the high half, reversed index in the low half, so ties go
    # to the lower index. This takes a third of the time of a stable sort. Adding 0 turns −0 into 0, which it is equal to.
    last = scores.shape[-1] - 1
    bits = (scores + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    reversed_index = last - torch.arange(last + 1, device=scores.device)
    return last - (((ascending << 32) | reversed_index).topk(slots, dim=-1).values & 0xFFFFFFFF)


def _check_count(name: str, given: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise SparsortError(
            f"{name} is {given!r}; expected a whole number of 1 or more, because the local block takes one slot."
        )
