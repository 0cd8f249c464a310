"""Buffers of keys and values, compared with a plain record of every row's tokens."""

from __future__ import annotations

import pytest
import torch

from sparsort.scoring.answers.prefix_attention import Tails

HEADS, WIDTH, LAYERS = 2, 3, 2


@pytest.mark.parametrize("seed", range(8))
def test_a_row_keeps_its_own_tokens_whoever_leaves(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = [[integers(1, 6) for _ in range(integers(1, 4))] for _ in range(3)]
    passes = []
    kept: list[list[list[torch.Tensor]]] = []  # row, layer, token: (2, HEADS, WIDTH)
    for part in lengths:
        block = {
            layer: (random(len(part), HEADS, 6, WIDTH), random(len(part), HEADS, 6, WIDTH)) for layer in range(LAYERS)
        }
        passes.append((block, part))
        for row, length in enumerate(part):
            kept.append(
                [
                    [torch.stack([side[row, :, at] for side in block[layer]]) for at in range(length)]
                    for layer in range(LAYERS)
                ]
            )
    tails = Tails(passes, 12, len(kept))
    for _ in range(6):
        new = random(LAYERS, 2, len(kept), HEADS, 1, WIDTH)
        for layer in range(LAYERS):
            for row, tokens in enumerate(kept):
                tokens[layer].append(new[layer, :, row, :, 0])
            keys, values = tails.put(layer, *new[layer])
            assert keys.shape == (len(kept), HEADS, tails.width, WIDTH)
            for row, tokens in enumerate(kept):
                stacked = torch.stack(tokens[layer], dim=2)
                assert torch.equal(keys[row, :, : stacked.shape[2]], stacked[0])
                assert torch.equal(values[row, :, : stacked.shape[2]], stacked[1])
        tails.advance()
        assert tails.lengths_B.tolist() == [len(tokens[0]) for tokens in kept]
        stays = sorted(torch.randperm(len(kept), generator=generator)[: max(len(kept) - integers(0, 3), 1)].tolist())
        order = tails.keep(stays)
        assert sorted(order) == stays
        kept = [kept[row] for row in order]
        assert len(tails) == len(kept)
        assert torch.isfinite(keys).all()
