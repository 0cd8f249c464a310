"""The positions of a batch's sequences among its queries and keys.

Contract: tensors keep their shape (batch, heads, tokens, width), and a `Layout` lists the sequences in them. The same table
describes padding on the left, padding on the right, no padding, several sequences packed into a row, and a cache that is longer
than its filled part. The queries of a sequence are its last keys: query i of n, with m keys, has position m − n + i and sees the
keys at positions up to its own. Blocks are counted from a sequence's first key, so padding does not change them.

Legend: B batch, T query columns, S key columns, n sequences.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class Span:
    """One sequence: its batch row, and the first column and the number of its queries and of its keys."""

    row: int
    query_start: int
    queries: int
    key_start: int
    keys: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sequences of a batch.

    Attributes:
        spans: the sequences, ordered by row and column; a row may have no sequence (only padding) or several (packed).
        batch, queries, keys: B, T and S, the sizes of the tensors.

    Raises:
        SparsortError: a span exceeds the tensors, has more queries than keys, or overlaps another span.
    """

    spans: tuple[Span, ...]
    batch: int
    queries: int
    keys: int
    # Not part of the value: excluded from comparison, so that equal layouts stay equal whatever was computed from them.
    _tables: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends: dict[int, tuple[int, int]] = {}
        for span in self.spans:
            query_end, key_end = ends.get(span.row, (0, 0))
            inside = 0 <= span.row < self.batch and span.query_start >= query_end and span.key_start >= key_end
            if not inside or span.queries < 1 or span.keys < span.queries:
                raise SparsortError(
                    f"{span} does not fit: a sequence needs 1 ≤ queries ≤ keys, a row below {self.batch}, and a start at or "
                    f"after the column where the previous one ended (query column {query_end}, key column {key_end})."
                )
            ends[span.row] = (span.query_start + span.queries, span.key_start + span.keys)
        for row, (query_end, key_end) in ends.items():
            if query_end > self.queries or key_end > self.keys:
                raise SparsortError(
                    f"the sequences of row {row} end at query column {query_end} and key column {key_end}, but the tensors have "
                    f"{self.queries} and {self.keys} columns. Shorten the sequences, or enlarge queries and keys."
                )

    @classmethod
    def plain(cls, batch: int, queries: int, keys: int | None = None) -> Layout:
        """Build the layout of one sequence per row without padding. If there are more keys than queries, queries come last."""
        keys = queries if keys is None else keys
        spans = (Span(row=row, query_start=0, queries=queries, key_start=0, keys=keys) for row in range(batch))
        return cls(spans=tuple(spans) if queries else (), batch=batch, queries=queries, keys=keys)

    @classmethod
    def from_padding(cls, mask: Tensor, queries: int, keys: int | None = None) -> Layout:
        """Build the layout of one sequence per row from a padding mask.

        Args:
            mask: (B, M), nonzero at keys. M may be less than `keys`; later columns are not filled yet (static cache).
            queries: T, the number of query columns, which are the mask's last T columns.
            keys: S, the number of key columns; None: M.

        Raises:
            SparsortError: a row has padding between its tokens, or the mask has the wrong shape.
        """
        mask = mask.detach().bool()
        seen = mask.shape[1] if mask.ndim == 2 else -1
        keys = seen if keys is None else keys
        if not queries <= seen <= keys:
            raise SparsortError(
                f"the padding mask has shape {tuple(mask.shape)}; expected (batch, columns) with {queries} ≤ columns ≤ {keys}."
            )
        # argmax fails on rows without columns.
        if seen == 0:
            return cls(spans=(), batch=mask.shape[0], queries=queries, keys=keys)
        mask = mask.cpu()
        filled = mask.sum(dim=1).tolist()
        # argmax returns the first maximum, so on the flipped mask it counts the padding on the right.
        first = mask.int().argmax(dim=1).tolist()
        last = (seen - mask.flip(1).int().argmax(dim=1)).tolist()
        spans = []
        for row, (count, start, end) in enumerate(zip(filled, first, last, strict=True)):
            if count == 0:
                continue
            if end - start != count:
                raise SparsortError(
                    f"row {row} of the padding mask has {count} tokens between columns {start} and {end - 1}: padding between "
                    "tokens. Pad on the left or on the right, or pack sequences with position_ids."
                )
            column = max(start, seen - queries)
            # With right padding and a cache, the new columns of a row may be padding only.
            if end > column:
                queries_of_row = {"query_start": column - (seen - queries), "queries": end - column}
                spans.append(Span(row=row, key_start=start, keys=count, **queries_of_row))
        return cls(spans=tuple(spans), batch=len(filled), queries=queries, keys=keys)

    @classmethod
    def packed(cls, position_ids: Tensor, batch: int | None = None) -> Layout:
        """Build the layout of packed sequences: one starts wherever a position is not its predecessor plus one.

        Two or more sequences of one token each at the end of a row count as padding. Packing writes padding in this way
        (positions 0, 0, …), and a token without a successor has no label to learn from.

        Args:
            position_ids: (B or 1, T) whole numbers.
            batch: B, if one row of positions applies to all rows.

        Raises:
            SparsortError: the positions have the wrong shape.
        """
        positions = position_ids.detach().cpu()
        if positions.ndim != 2 or (batch is not None and positions.shape[0] not in (1, batch)):
            raise SparsortError(
                f"position_ids have shape {tuple(positions.shape)}; expected ({'batch' if batch is None else batch}, tokens). "
                "Pass one row of positions for each row of tokens."
            )
        columns = positions.shape[1]
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        lengths = []
        for row in starts:
            edges = [*row.nonzero().flatten().tolist(), columns]
            sizes = [end - start for start, end in itertools.pairwise(edges)]
            # The number of sequences of one token at the end of the row.
            ones = next((n for n, size in enumerate(reversed(sizes)) if size != 1), len(sizes))
            lengths.append(sizes[: len(sizes) - ones] if 1 < ones < len(sizes) else sizes)
        if batch is not None and len(lengths) == 1:
            lengths *= batch
        return cls.from_lengths(lengths, columns)

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], columns: int | None = None) -> Layout:
        """Build the layout of adjacent sequences with the given lengths, which start at column 0 of each row.

        Args:
            lengths: for each row, the lengths of its sequences in tokens.
            columns: T, the number of columns; None: that of the longest row.

        Raises:
            SparsortError: `lengths` is not a list of whole numbers for each row.
        """
        if not isinstance(lengths, Sequence) or not all(_is_lengths(sizes) for sizes in lengths):
            raise SparsortError(
                f"lengths is {lengths!r}; expected, for each row, the lengths of its sequences, such as [[3, 4], [7]]."
            )
        spans = []
        for row, sizes in enumerate(lengths):
            start = 0
            for size in sizes:
                if size:
                    spans.append(Span(row=row, query_start=start, queries=size, key_start=start, keys=size))
                start += size
        columns = max((sum(sizes) for sizes in lengths), default=0) if columns is None else columns
        return cls(spans=tuple(spans), batch=len(lengths), queries=columns, keys=columns)

    @property
    def tokens(self) -> int:
        """The number of query tokens that are not padding."""
        return sum(span.queries for span in self.spans)

    @property
    def longest(self) -> int:
        """The number of keys of the longest sequence."""
        return max((span.keys for span in self.spans), default=0)

    def blocks(self, block_size: int) -> int:
        """Return the number of blocks of the longest sequence, including an incomplete last block."""
        return -(-self.longest // block_size)

    def first_blocks(self, block_size: int) -> tuple[tuple[int, ...], int]:
        """Number the blocks across the sequences of each row.

        Returns:
            The number of each sequence's first block in its row, and the number of blocks of the row that has the most.
        """
        next_block = [0] * self.batch
        first = []
        for span in self.spans:
            first.append(next_block[span.row])
            next_block[span.row] += -(-span.keys // block_size)
        return tuple(first), max(next_block, default=0)

    def table(self, device: torch.device | str) -> Tensor:
        """Return row, query_start, queries, key_start and keys of each sequence: (n, 5) int32."""
        rows = [[span.row, span.query_start, span.queries, span.key_start, span.keys] for span in self.spans]
        return self._cached("table", device, lambda: torch.tensor(rows, dtype=torch.int32).reshape(-1, 5))

    def span_of_query(self, device: torch.device | str) -> Tensor:
        """Return the number of each query's sequence: (B, T) int32, −1 for padding."""
        return self._cached("span", device, lambda: self._by_query(lambda n, span: torch.tensor(n)))

    def position(self, device: torch.device | str) -> Tensor:
        """Return the position of each query among its sequence's keys: (B, T) int32, −1 for padding."""
        return self._cached(
            "position",
            device,
            lambda: self._by_query(lambda n, span: torch.arange(span.keys - span.queries, span.keys)),
        )

    def _by_query(self, values: Callable[[int, Span], Tensor]) -> Tensor:
        by_query = torch.full((self.batch, self.queries), -1, dtype=torch.int32)
        for n, span in enumerate(self.spans):
            by_query[span.row, span.query_start : span.query_start + span.queries] = values(n, span).int()
        return by_query

    def _cached(self, name: str, device: torch.device | str, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that is built once per device, because every layer of a forward pass needs it."""
        key = (name, str(device))
        if key not in self._tables:
            # Autograd refuses tensors that were created in inference mode, and a cached one may be used in training later.
            with torch.inference_mode(False):
                self._tables[key] = make().to(device)
        return self._tables[key]


def _is_lengths(sizes: object) -> bool:
    return isinstance(sizes, Sequence) and all(isinstance(size, numbers.Integral) and int(size) >= 0 for size in sizes)
