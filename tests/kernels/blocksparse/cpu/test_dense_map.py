"""When the dense map of short sequences is used, its size, and random layouts against the reference.

That its functions are the reference's on every kind of layout, selection and dtype is in test_blockwise.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsort.kernels.blocksparse import ops
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.cpu import dense_map, key_slots, tiles
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.reference import align_ref, attend_ref, index_select_ref
from sparsort.kernels.blocksparse.selection import Selection, every_block

LAYOUTS = st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=3)


def slots(layout: Layout, count: int, groups: int = 2, block_size: int = 16) -> Selection:
    """A selection without any block, for what follows from its shape."""
    blocks = torch.full((layout.batch, groups, layout.queries, count), -1, dtype=torch.int32)
    return Selection(blocks=blocks, block_size=block_size)


def test_short_batches_take_it_and_long_or_decoding_ones_do_not() -> None:
    study = Layout.plain(8, 256)
    assert dense_map.attends_short(slots(study, 4), study, 4)
    assert dense_map.scores_short(study, 2, 16)
    # Every block of a warm-up: there is nothing to save.
    warm_up = Layout.plain(8, 1024)
    assert dense_map.attends_short(slots(warm_up, 64), warm_up, 4)
    # 128 of 4096 keys in large blocks: much to save, and little to pay for it.
    long = Layout.plain(1, 4096)
    assert not dense_map.attends_short(slots(long, 2, block_size=64), long, 8)
    for layout in (Layout.plain(8, 1, 256), Layout.plain(2, 0), Layout(spans=(), batch=2, queries=5, keys=5)):
        assert not dense_map.attends_short(slots(layout, 4), layout, 4)
        assert not dense_map.scores_short(layout, 2, 16)


def test_packed_rows_of_short_sequences_are_not_a_long_sequence() -> None:
    one, packed = Layout.from_lengths([[2048]]), Layout.from_lengths([[64] * 32])
    assert dense_map.attends_short(slots(one, 32, block_size=64), one, 8)
    # On the dense map of the row, 31 of 32 logits would be between sequences.
    assert not dense_map.attends_short(slots(packed, 32, block_size=64), packed, 8)
    # Each of these takes a whole block, so that they have 64 times the places of their columns.
    single = Layout.from_lengths([[1] * 1024] * 8)
    assert not dense_map.scores_short(single, 2, 64)
    assert dense_map.scores_short(Layout.plain(8, 1024), 2, 64)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made (views are not)."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for result, returned in zip(made if isinstance(made, tuple) else (made,), func._schema.returns, strict=False):
            if isinstance(result, Tensor) and returned.alias_info is None:
                self.elements = max(self.elements, result.numel())
        return made


@pytest.mark.parametrize(("length", "count"), [(128, 8), (256, 16), (384, 24), (1024, 2)])
def test_every_operation_takes_it_where_it_pays_and_holds_no_more_than_a_chunk(
    length: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CHUNK_ELEMENTS", 1 << 17)
    taken = []
    for name in ("index_select", "attend_forward", "attend_backward", "align_forward"):
        monkeypatch.setattr(dense_map, name, noting(taken, name, getattr(dense_map, name)))
    layout = Layout.plain(2, length)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=generator, requires_grad=True)
    key, index_query = (torch.randn(2, 2, length, 8, generator=generator) for _ in range(2))
    with Largest() as largest:
        selection = ops.index_select(index_query, key[:, 0], layout, FixedBudget(blocks=count), block_size=16)
        ops.attend(query, key, key, selection, layout)[0].sum().backward()
        ops.align(query, key, index_query, key[:, 0], selection, layout)
    # Scores have half the heads, so that they fit for twice the length.
    assert taken[:1] == ["index_select"][: length <= 512]
    assert taken[1:] == (["attend_forward", "attend_backward", "align_forward"] if length <= 256 else [])
    assert length > 256 or largest.elements <= 1 << 17


def noting(taken: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        taken.append(name)
        return function(*args, **kwargs)

    return noted


@pytest.mark.parametrize("taken", [True, False])
def test_blocks_that_a_query_cannot_see_count_for_nothing(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_map, "attends_short", lambda *_: taken)
    layout = Layout.from_lengths([[6, 9], [13]])
    query, key = (torch.randn(2, 2, 15, 4, generator=torch.Generator().manual_seed(n)) for n in range(2))
    own = every_block(layout, 2, 4).blocks
    beyond = torch.where(own < 0, torch.arange(4, dtype=torch.int32) + 2**24, own)
    output, _ = ops.attend(query, key, key, Selection(blocks=beyond, block_size=4), layout)
    torch.testing.assert_close(output, attend_ref(query, key, key, every_block(layout, 2, 4), layout, scale=0.5)[0])


def on_the_map(patch: pytest.MonkeyPatch, columns: int) -> None:
    patch.setattr(key_slots, "COLUMNS", columns)
    for name in ("attends_short", "scores_short"):
        patch.setattr(dense_map, name, lambda *_: True)


@settings(max_examples=60, deadline=None)
@given(
    lengths=LAYOUTS,
    beyond=st.integers(0, 3),
    size=st.integers(1, 9),
    count=st.integers(1, 4),
    columns=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_any_packing_is_the_reference(
    lengths: list[list[int]], beyond: int, size: int, count: int, columns: int, seed: int
) -> None:
    total = max(map(sum, lengths)) + beyond
    layout = Layout.from_lengths(lengths, total)
    if not layout.spans:
        return
    generator = torch.Generator().manual_seed(seed)
    padding = (layout.span_of_query("cpu") < 0)[:, None, :, None]

    def normal(heads: int) -> Tensor:
        made = torch.randn(len(lengths), heads, total, 4, generator=generator, dtype=torch.float64)
        return made.masked_fill(padding, torch.nan)

    query, key, value, index_query, index_key = normal(4), normal(2), normal(2), normal(2), normal(1)[:, 0]
    budget = FixedBudget(blocks=count)
    with pytest.MonkeyPatch.context() as patch:
        on_the_map(patch, columns)
        chosen = ops.index_select(index_query, index_key, layout, budget, block_size=size)
        expected = index_select_ref(index_query, index_key, layout, budget, block_size=size, scale=0.5)
        assert torch.equal(chosen.blocks, expected.blocks)
        for selection in (chosen, every_block(layout, 2, size)):
            leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, index_query, index_key)]
            copies = [tensor.clone().requires_grad_() for tensor in leaves]
            output, lse = ops.attend(*leaves[:3], selection, layout)
            loss = ops.align(*leaves[:2], *leaves[3:], selection, layout, lse=lse)
            output_ref, lse_ref = attend_ref(*copies[:3], selection, layout, scale=0.5)
            rows = align_ref(*copies[:2], *copies[3:], selection, layout, scale=0.5, index_scale=0.5)
            loss_ref = rows.sum() / (layout.tokens * 2)
            weight = torch.arange(output.numel()).view(output.shape) % 7
            found = torch.autograd.grad((output * weight).sum() + loss, leaves)
            wanted = torch.autograd.grad((output_ref * weight).sum() + loss_ref, copies)
            for one, other in zip((output, lse, loss, *found), (output_ref, lse_ref, loss_ref, *wanted), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_side_of_the_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_map(monkeypatch, 16)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 2, 21, 4, generator=generator)
    index = torch.randn(1, 1, 21, 4, generator=generator)

    def run(before: int, after: int) -> tuple[Tensor, Tensor]:
        def padded(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (0, 0, before, after), value=torch.nan)

        mask = torch.tensor([[0] * before + [1] * 21 + [0] * after])
        layout = Layout.from_padding(mask, mask.shape[1])
        indices = padded(index)
        selection = ops.index_select(indices, indices[:, 0], layout, FixedBudget(blocks=2), block_size=4)
        output, _ = ops.attend(padded(query), padded(query[:, :1]), padded(query[:, 1:]), selection, layout)
        return selection.blocks[:, :, before : before + 21], output[:, :, before : before + 21]

    blocks, output = run(0, 0)
    for before, after in ((1, 0), (3, 0), (0, 5), (6, 2)):
        found_blocks, found = run(before, after)
        assert torch.equal(found_blocks, blocks)
        torch.testing.assert_close(found, output)
