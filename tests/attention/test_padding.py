"""The place of sequences in a batch changes nothing: left, right and no padding, rows packed by position_ids.

The oracle is each sequence by itself, without a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsort.errors import SparsortError

Make = Callable[..., Any]
LENGTHS = (23, 9, 1, 16)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def _logits(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(*args, **kwargs).logits
    return logits


def _alone(model: Any, sequences: list[Tensor]) -> list[Tensor]:
    return [_logits(model, ids[None])[0] for ids in sequences]


def _padded(sequences: list[Tensor], starts: list[int], width: int) -> tuple[Tensor, Tensor]:
    ids, mask = (
        torch.zeros(len(sequences), width, dtype=torch.long),
        torch.zeros(len(sequences), width, dtype=torch.long),
    )
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        ids[row, start : start + len(sequence)] = sequence
        mask[row, start : start + len(sequence)] = 1
    return ids, mask


@pytest.fixture
def sequences(tokens: Make) -> list[Tensor]:
    return [tokens(n, seed=n) for n in LENGTHS]


@pytest.mark.parametrize("mode", ["sparse", "full"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(side: str, mode: str, family: str, sparse: Make, sequences: list[Tensor]) -> None:
    model = sparse(family)
    model.sparse_attention.mode = mode
    width = max(LENGTHS) + 3
    starts = [{"left": width - n, "right": 0, "both": (width - n) // 2}[side] for n in LENGTHS]
    ids, mask = _padded(sequences, starts, width)
    got = _logits(model, ids, attention_mask=mask)
    assert got.isfinite().all()
    for row, (start, expected) in enumerate(zip(starts, _alone(model, sequences), strict=True)):
        torch.testing.assert_close(got[row, start : start + len(expected)], expected, **CLOSE)


@pytest.mark.parametrize("selector", ["moba", "seer", "nsa", "window", "sink_window", "oracle"])
def test_padding_moves_no_selector(selector: str, sparse: Make, sequences: list[Tensor]) -> None:
    model = sparse("qwen3", selector=selector)
    starts = [26 - n for n in LENGTHS]
    ids, mask = _padded(sequences, starts, 26)
    got = _logits(model, ids, attention_mask=mask)
    for row, expected in enumerate(_alone(model, sequences)):
        torch.testing.assert_close(got[row, starts[row] :], expected, **CLOSE)


def test_packed_rows(family: str, sparse: Make, sequences: list[Tensor]) -> None:
    """Two rows of two sequences. Where the caller says nothing of a cache, none is made: it could not tell them apart."""
    model = sparse(family)
    rows = [sequences[0], sequences[1]], [sequences[3], sequences[0][:16]]
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(ids)) for ids in row]) for row in rows])
    with torch.no_grad():
        outputs = model(ids, position_ids=positions)
    assert outputs.past_key_values is None
    for row, parts in enumerate(rows):
        expected = torch.cat(_alone(model, list(parts)))
        torch.testing.assert_close(outputs.logits[row], expected, **CLOSE)
    one = _logits(model, ids[:1], position_ids=positions[:1], use_cache=False)
    torch.testing.assert_close(one, outputs.logits[:1], **CLOSE)


def test_a_batch_shares_positions_of_one_row(sparse: Make, sequences: list[Tensor]) -> None:
    model = sparse("qwen3")
    ids = torch.stack([sequences[0], sequences[0].flip(0)])
    positions = torch.cat([torch.arange(9), torch.arange(14)])
    got = _logits(model, ids, position_ids=positions[None])
    for row in range(2):
        expected = torch.cat(_alone(model, [ids[row, :9], ids[row, 9:]]))
        torch.testing.assert_close(got[row], expected, **CLOSE)


def test_padding_reaches_no_gradient_and_no_loss(sparse: Make, sequences: list[Tensor]) -> None:
    """The values of padding may be anything: the loss and its gradients do not depend on them."""
    model = sparse("qwen3").train()
    found = []
    for filler in (0, 300):
        ids, mask = _padded(sequences, [26 - n for n in LENGTHS], 26)
        ids = ids.masked_fill(mask == 0, filler)
        # The first token of a row would be the label of the padding before it.
        labels = ids.masked_fill(mask.cumsum(dim=1) < 2, -100)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found.append((loss.detach(), [weight.grad.clone() for weight in model.parameters()]))
        model.zero_grad()
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)


def test_a_row_of_padding_only(sparse: Make, sequences: list[Tensor]) -> None:
    model = sparse()
    ids, mask = _padded([sequences[1], sequences[2]], [0, 0], 9)
    mask[1] = 0
    got = _logits(model, ids, attention_mask=mask)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], _alone(model, [sequences[1]])[0], **CLOSE)
    nothing = model.train()(ids, attention_mask=torch.zeros_like(mask)).logits
    assert nothing.isfinite().all()


def test_one_token(sparse: Make, dense: Make, tokens: Make) -> None:
    ids = tokens(2, 1)
    torch.testing.assert_close(_logits(sparse(), ids), _logits(dense(), ids), **CLOSE)


def test_masks_that_are_refused(sparse: Make, tokens: Make) -> None:
    model, ids = sparse(), tokens(2, 9)
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(SparsortError, match=r"padding only, as \(batch, tokens\).*position_ids"):
        model(ids, attention_mask=causal)
    hole = torch.ones_like(ids)
    hole[1, 4] = 0
    with pytest.raises(SparsortError, match="padding between tokens"):
        model(ids, attention_mask=hole)
    with pytest.raises(SparsortError, match="covers 5 tokens; expected 9"):
        model(ids, attention_mask=torch.ones(2, 5), past_key_values=_cache())
    for size in [(9,), (3, 9), (1, 9), (2, 1, 9)]:
        with pytest.raises(SparsortError, match=r"attention mask has shape .*; expected \(2, tokens"):
            model(ids, attention_mask=torch.ones(size))
    for size in [(9,), (2, 8), (3, 9), (1, 2, 9)]:
        with pytest.raises(SparsortError, match=r"position_ids have shape .*; expected \(2, 9\)"):
            model(ids, position_ids=torch.zeros(size, dtype=torch.long))


def _cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def test_packed_rows_with_a_cache_are_refused(sparse: Make, tokens: Make) -> None:
    model, ids = sparse(), tokens(1, 9)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    for wish in ({"use_cache": True}, {"past_key_values": _cache()}):
        with pytest.raises(SparsortError, match=r"a cache keeps a row as one.*use_cache=False"):
            model(ids, position_ids=positions, **wish)


def test_no_dense_mask_is_made_for_sparse_layers(sparse: Make, sequences: list[Tensor]) -> None:
    """A layer is handed the padding as it came: (B, T), and nothing where there is none."""
    model = sparse("llama")
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    ids, mask = _padded(sequences, [0] * 4, 23)
    _logits(model, ids, attention_mask=mask)
    assert [tuple(found.shape) for found in seen] == [(4, 23)] * 3
    seen.clear()
    _logits(model, ids)
    assert seen == [None] * 3
