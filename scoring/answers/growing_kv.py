"""Keys and values of rows that grow token by token behind a shared prefix, in buffers with room for what is to come.

Contract: a token's column is its place behind the prefix, whatever the other rows hold, so a row's mask is its own causality
and nothing else: columns past its end hold padding of the first pass, another row's leavings or zeros, and no query sees
them. A step writes one column a row; nothing is copied but where a row has left.

Shapes: B rows, K heads of keys and values, R columns of room, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Keys = tuple[Tensor, Tensor]


class Tails:
    """What B rows have added to their prefix.

    Args:
        passes: for each pass over some of the rows: its layers' keys and values (b, K, S, D), and the rows' real lengths.
        room: most tokens that a row may come to hold.

    Attributes:
        lengths_B: tokens of each row so far.
    """

    def __init__(self, passes: Iterable[tuple[dict[int, Keys], Sequence[int]]], room: int, rows: int) -> None:
        self._layers: dict[int, Keys] = {}
        lengths: list[int] = []
        for layers, real in passes:
            begin = len(lengths)
            lengths += real
            for number, new in layers.items():
                if number not in self._layers:
                    # Zeros: a column that is masked still enters the products, where NaN would spread.
                    self._layers[number] = tuple(  # type: ignore[assignment]
                        part.new_zeros(rows, part.shape[1], room, part.shape[3]) for part in new
                    )
                for kept, part in zip(self._layers[number], new, strict=True):
                    kept[begin : begin + len(part), :, : part.shape[2]] = part
        some = next(iter(self._layers.values()))[0]
        self.lengths_B = torch.tensor(lengths, device=some.device)
        self._n_rows, self._longest = rows, max(lengths)

    def __len__(self) -> int:
        return self._n_rows

    @property
    def width(self) -> int:
        """Columns that the next token of any row may see, its own among them."""
        return self._longest + 1

    def put(self, layer: int, keys_BK1D: Tensor, values_BK1D: Tensor) -> Keys:
        """Write the next token of every row; returns all columns, (B, K, width, D)."""
        rows = torch.arange(self._n_rows, device=keys_BK1D.device)
        kept = tuple(part[: self._n_rows] for part in self._layers[layer])
        for part, new in zip(kept, (keys_BK1D, values_BK1D), strict=True):
            part[rows, :, self.lengths_B] = new[:, :, 0]
        return kept[0][:, :, : self.width], kept[1][:, :, : self.width]

    def advance(self) -> None:
        """Count the tokens that every layer has put."""
        self.lengths_B = self.lengths_B + 1
        self._longest += 1

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these; returns which row now stands at each place.

        The last rows move into the holes, so that no more is copied than must be.
        """
        stays = set(rows)
        count = len(stays)
        order = list(range(count))
        holes = [place for place in order if place not in stays]
        movers = sorted(stays - set(order))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            for layers in self._layers.values():
                for part in layers:
                    part[holes, :, : self._longest] = part[movers, :, : self._longest]
        self.lengths_B = self.lengths_B[order]
        self._n_rows, self._longest = count, int(self.lengths_B.max())
        return order
