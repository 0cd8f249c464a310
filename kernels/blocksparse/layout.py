"""Where the sequences of a batch lie among its queries and keys.

Contract: tensors stay as they are handed over, (batch, heads, tokens, width), and a `Layout` names the sequences in them.
Padding on the left, on the right or none, several sequences packed in a row, and a cache longer than what is filled are one
table. The queries of a sequence are its last keys: query i of n, with m keys, stands at position m − n + i and sees the keys
at positions up to its own. Blocks are counted from a sequence's first key, so that padding cannot move them.

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
    _tables: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        seen = mask.shape[1] if mask.ndim == 2 else -1
        keys = seen if keys is None else keys
        if not queries <= seen <= keys:
            raise SparsortError(
                f"the padding mask has shape {tuple(mask.shape)}; expected (batch, columns) with {queries} ≤ columns ≤ {keys}."
            )
        if seen == 0:
            return cls(spans=(), batch=mask.shape[0], queries=queries, keys=keys)
        found = mask.cpu()
        filled = found.sum(dim=1).tolist()
        first = found.int().argmax(dim=1).tolist()
        last = (seen - found.flip(1).int().argmax(dim=1)).tolist()
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
    def packed(cls, position_ids: Tensor, batch: int | None = None) -> Layout:
        """Sequences packed in rows: one starts wherever a position is not one more than the position before it.

        Several sequences of one token at the end of a row are padding: so packing writes it (positions 0, 0, …), and nothing
        could be learnt of a token without a next one.

        Args:
            position_ids: (B or 1, T) whole numbers.
            batch: B, where one row of positions stands for all.

        Raises:
            SparsortError: positions of another shape.
        """
        found = position_ids.detach().cpu()
        if found.ndim != 2 or (batch is not None and found.shape[0] not in (1, batch)):
            raise SparsortError(
                f"position_ids have shape {tuple(found.shape)}; expected ({'batch' if batch is None else batch}, tokens)."
            )
        columns = found.shape[1]
        starts = torch.ones_like(found, dtype=torch.bool)
        starts[:, 1:] = found[:, 1:] != found[:, :-1] + 1
        lengths = []
        for row in starts:
            edges = [*row.nonzero().flatten().tolist(), columns]
            sizes = [end - start for start, end in itertools.pairwise(edges)]
            ones = next((n for n, size in enumerate(reversed(sizes)) if size != 1), len(sizes))
            lengths.append(sizes[: len(sizes) - ones] if 1 < ones < len(sizes) else sizes)
        if batch is not None and len(lengths) == 1:
            lengths *= batch
        return cls.from_lengths(lengths, columns)

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], columns: int | None = None) -> Layout:
        """Sequences of these lengths, row by row, each right after the one before it; T is `columns`, or the longest row.

        Raises:
            SparsortError: lengths that are not a list of whole numbers for each row.
        """
        if not isinstance(lengths, Sequence) or not all(_is_lengths(sizes) for sizes in lengths):
            raise SparsortError(
                f"lengths are {lengths!r}; expected for each row the lengths of its sequences, such as [[3, 4], [7]]."
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
        rows = [[span.row, span.query_start, span.queries, span.key_start, span.keys] for span in self.spans]
        return self._kept("table", device, lambda: torch.tensor(rows, dtype=torch.int32).reshape(-1, 5))

    def span_of_query(self, device: torch.device | str) -> Tensor:
        """(B, T) int32: the number of the sequence that a query belongs to, −1 for padding."""
        return self._kept("span", device, lambda: self._by_query(lambda n, span: torch.tensor(n)))

    def position(self, device: torch.device | str) -> Tensor:
        """(B, T) int32: the position of each query among its sequence's keys, −1 for padding."""
        return self._kept(
            "position",
            device,
            lambda: self._by_query(lambda n, span: torch.arange(span.keys - span.queries, span.keys)),
        )

    def _by_query(self, values: Callable[[int, Span], Tensor]) -> Tensor:
        found = torch.full((self.batch, self.queries), -1, dtype=torch.int32)
        for n, span in enumerate(self.spans):
            found[span.row, span.query_start : span.query_start + span.queries] = values(n, span).int()
        return found

    def _kept(self, name: str, device: torch.device | str, make: Callable[[], Tensor]) -> Tensor:
        """Made once for a device: every layer of a pass asks."""
        key = (name, str(device))
        if key not in self._tables:
            # What is kept serves training too, which takes no tensor that was made in inference mode.
            with torch.inference_mode(False):
                self._tables[key] = make().to(device)
        return self._tables[key]


def _is_lengths(sizes: object) -> bool:
    return isinstance(sizes, Sequence) and all(isinstance(size, numbers.Integral) and int(size) >= 0 for size in sizes)
