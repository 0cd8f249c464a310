"""Where the sequences of a batch lie among its queries and keys.

Contract: tensors stay as they are handed over, (batch, heads, tokens, width), and a `Layout` names the sequences in them.
Padding on the left, on the right or none, several sequences packed in a row, and a cache longer than what is filled are one
table. The queries of a sequence are its last keys: query i of n, with m keys, stands at position m − n + i and sees the keys
at positions up to its own. Blocks are counted from a sequence's first key, so that padding cannot move them.

Legend: B batch, T query columns, S key columns, n sequences.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class Span:
    """One sequence: its batch row, and where its queries and its keys start and how many they are."""

    row: int
    query_start: int
    queries: int
    key_start: int
    keys: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sequences of a batch.

    Attributes:
        spans: in the order of rows and columns; a row may hold none (all of it padding) or several (packed).
        batch, queries, keys: sizes of the tensors: B, T, S.

    Raises:
        SparsortError: a span leaves the tensors, has more queries than keys, or overlaps another.
    """

    spans: tuple[Span, ...]
    batch: int
    queries: int
    keys: int

    def __post_init__(self) -> None:
        ends: dict[int, tuple[int, int]] = {}
        for span in self.spans:
            query_end, key_end = ends.get(span.row, (0, 0))
            inside = 0 <= span.row < self.batch and span.query_start >= query_end and span.key_start >= key_end
            if not inside or span.queries < 1 or span.keys < span.queries:
                raise SparsortError(
                    f"{span} does not fit: a sequence needs 1 ≤ queries ≤ keys, a row below {self.batch}, and starts after the "
                    f"one before it ended (query column {query_end}, key column {key_end})."
                )
            ends[span.row] = (span.query_start + span.queries, span.key_start + span.keys)
        for row, (query_end, key_end) in ends.items():
            if query_end > self.queries or key_end > self.keys:
                raise SparsortError(
                    f"the sequences of row {row} end at query column {query_end} and key column {key_end}, and the tensors have "
                    f"{self.queries} and {self.keys}."
                )

    @classmethod
    def plain(cls, batch: int, queries: int, keys: int | None = None) -> Layout:
        """One sequence a row, without padding; with more keys than queries the queries are the last."""
        keys = queries if keys is None else keys
        spans = (Span(row=row, query_start=0, queries=queries, key_start=0, keys=keys) for row in range(batch))
        return cls(spans=tuple(spans) if queries else (), batch=batch, queries=queries, keys=keys)

    @classmethod
    def from_padding(cls, mask: Tensor, queries: int, keys: int | None = None) -> Layout:
        """One sequence a row from a padding mask.

        Args:
            mask: (B, M), nonzero where a key is. M may be below `keys`: columns after it are not filled yet (a static cache).
            queries: T; they are the keys at the mask's last T columns.
            keys: S; M unless given.

        Raises:
            SparsortError: a row with padding between its tokens, or a mask of another size.
        """
        mask = mask.detach().bool()
        keys = int(mask.shape[-1]) if keys is None else keys
        if mask.ndim != 2 or not queries <= mask.shape[1] <= keys:
            raise SparsortError(
                f"the padding mask has shape {tuple(mask.shape)}; expected (batch, columns) with {queries} ≤ columns ≤ {keys}."
            )
        seen = mask.shape[1]
        found = mask.cpu()
        filled = found.sum(dim=1).tolist()
        first = found.int().argmax(dim=1).tolist()
        last = (seen - found.flip(1).int().argmax(dim=1)).tolist() if seen else [0] * len(filled)
        spans = []
        for row, (count, start, end) in enumerate(zip(filled, first, last, strict=True)):
            if count == 0:
                continue
            if end - start != count:
                raise SparsortError(
                    f"row {row} of the padding mask has {count} tokens between columns {start} and {end - 1}: padding between "
                    "tokens. Pad on the left or on the right, or pack sequences by position_ids."
                )
            column = max(start, seen - queries)
            if end > column:
                place = {"query_start": column - (seen - queries), "queries": end - column}
                spans.append(Span(row=row, key_start=start, keys=count, **place))
        return cls(spans=tuple(spans), batch=len(filled), queries=queries, keys=keys)

    @classmethod
    def packed(cls, position_ids: Tensor) -> Layout:
        """Sequences packed in rows: one starts wherever a position is not one more than the position before it.

        Args:
            position_ids: (B, T) whole numbers.
        """
        found = position_ids.detach().cpu()
        starts = torch.ones_like(found, dtype=torch.bool)
        starts[:, 1:] = found[:, 1:] != found[:, :-1] + 1
        columns = found.shape[1]
        lengths = []
        for row in starts:
            edges = [*row.nonzero().flatten().tolist(), columns]
            lengths.append([end - start for start, end in itertools.pairwise(edges)])
        return cls.from_lengths(lengths, columns)

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], columns: int | None = None) -> Layout:
        """Sequences of these lengths, row by row, each right after the one before it; T is `columns`, or the longest row."""
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
        """Query tokens that are not padding."""
        return sum(span.queries for span in self.spans)

    @property
    def longest(self) -> int:
        """Keys of the longest sequence."""
        return max((span.keys for span in self.spans), default=0)

    def blocks(self, block_size: int) -> int:
        """Blocks of the longest sequence, the last of them perhaps not full."""
        return -(-self.longest // block_size)

    def table(self, device: torch.device | str) -> Tensor:
        """(n, 5) int32: row, query_start, queries, key_start, keys of each sequence."""
        return _table(self, torch.device(device))

    def span_of_query(self, device: torch.device | str) -> Tensor:
        """(B, T) int32: the number of the sequence that a query belongs to, −1 for padding."""
        return _places(self, torch.device(device))[0]

    def position(self, device: torch.device | str) -> Tensor:
        """(B, T) int32: the position of each query among its sequence's keys, −1 for padding."""
        return _places(self, torch.device(device))[1]


@functools.lru_cache(maxsize=16)
def _table(layout: Layout, device: torch.device) -> Tensor:
    rows = [[span.row, span.query_start, span.queries, span.key_start, span.keys] for span in layout.spans]
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 5)


@functools.lru_cache(maxsize=16)
def _places(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    number = torch.full((layout.batch, layout.queries), -1, dtype=torch.int32)
    position = torch.full((layout.batch, layout.queries), -1, dtype=torch.int32)
    for n, span in enumerate(layout.spans):
        columns = slice(span.query_start, span.query_start + span.queries)
        number[span.row, columns] = n
        position[span.row, columns] = torch.arange(span.keys - span.queries, span.keys, dtype=torch.int32)
    return number.to(device), position.to(device)
