"""One span of tokens per row: selects the states in the span from each piece of a walk, and computes means over the span.

Contract: spans are given in tokens of the row, with an exclusive end. A shared head is read once and counts for every row that
has it. Rows that share a head must agree on the tokens of the head that are in their spans.

Shape suffixes: N rows of the plan, B rows and T tokens of a piece, K selected tokens, W values per token, H width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsort.scoring.model.backbone import StateChunk
from sparsort.scoring.model.batching import Plan


def states_at(states_BTH: Tensor, batch: NDArray[np.int64], token: NDArray[np.int64]) -> Tensor:
    """Return the states of token `token[k]` of row `batch[k]` of a piece, (K, H)."""
    device = states_BTH.device
    return states_BTH[torch.from_numpy(batch).to(device), torch.from_numpy(token).to(device)]


class RowSpans:
    """The tokens first … end - 1 of each row of a plan, and sums over them.

    Args:
        first_N: first token of each row's span.
        end_N: the token after the span. A row with an empty span is ignored, even if its head has tokens.
        plan: the plan.

    Attributes:
        counts: (N,) tokens in each span.
    """

    def __init__(self, first_N: NDArray[np.int64], end_N: NDArray[np.int64], plan: Plan) -> None:
        self.counts = np.maximum(end_N - first_N, 0)
        self._first, self._end = first_N, end_N
        self._heads_of = np.where(self.counts > 0, plan.head_of, -1)
        self._shares = self._heads_of >= 0
        self._head_first, self._head_end = np.zeros((2, len(plan.heads)), dtype=np.int64)
        # Rows of one head write the same numbers to the same place, because they agree on the tokens within the head.
        self._head_first[self._heads_of[self._shares]] = np.minimum(first_N, plan.depth)[self._shares]
        self._head_end[self._heads_of[self._shares]] = np.minimum(end_N, plan.depth)[self._shares]
        # Both are keyed by `StateChunk.is_head`: False for the rows' own tokens, True for the tokens of the shared heads.
        self._sums: dict[bool, Tensor] = {}
        self._reasons = {False: torch.zeros(len(first_N)).long(), True: torch.zeros(len(plan.heads)).long()}

    def pick(self, piece: StateChunk) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (batch index, token index), each (K,), of the states in `piece` that are in the span, row by row."""
        begin = (self._head_first if piece.is_head else self._first)[piece.rows]
        end = (self._head_end if piece.is_head else self._end)[piece.rows]
        positions = piece.start + np.arange(int(piece.lengths.max(initial=0)))
        end = np.minimum(end, piece.start + piece.lengths)
        batch, token = np.nonzero((positions >= begin[:, None]) & (positions < end[:, None]))
        return batch, token

    def shares(self, piece: StateChunk) -> NDArray[np.int64]:
        """Return the number of rows that each row of a piece counts for, (B,): more than one in a shared head."""
        if not piece.is_head:
            return np.ones(len(piece.rows), dtype=np.int64)
        return np.bincount(self._heads_of[self._shares], minlength=len(self._head_first))[piece.rows]

    def add(self, piece: StateChunk, batch: NDArray[np.int64], values_KW: Tensor, reasons_K: Tensor) -> None:
        """Add the values of K tokens, the k-th of which is in row `batch[k]` of the piece.

        A row's reason code is the largest of its tokens' codes, and 0 if all of them have a value.
        """
        side = piece.is_head
        if side not in self._sums:
            shape = (len(self._reasons[side]), values_KW.shape[1])
            self._sums[side] = torch.zeros(shape, dtype=torch.float64, device=values_KW.device)
        target = torch.from_numpy(piece.rows[batch])
        self._sums[side].index_add_(0, target.to(values_KW.device), values_KW.double())
        self._reasons[side].scatter_reduce_(0, target, reasons_K.cpu().long(), "amax")

    def means(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the mean over each row's span, (N, W), NaN for an empty span, and each row's reason code, (N,)."""
        total, reasons = self._sums.get(False), self._reasons[False]
        if True in self._sums:
            heads = self._sums[True]
            # If all spans end within their heads, no row has a sum of its own.
            if total is None:
                total = heads.new_zeros((len(reasons), heads.shape[1]))
            rows = torch.from_numpy(np.flatnonzero(self._shares))
            which = torch.from_numpy(self._heads_of[self._shares])
            total = total.index_add(0, rows.to(total.device), heads[which.to(total.device)])
            reasons = reasons.index_put((rows,), torch.maximum(reasons[rows], self._reasons[True][which]))
        sums = total.cpu().numpy() if total is not None else np.zeros((len(reasons), 0))
        return sums / np.where(self.counts, self.counts, np.nan)[:, None], reasons.numpy()
