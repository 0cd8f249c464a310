"""The CPU path of block-sparse attention against the dense reference, with its paths and the sizes of its work forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from selections import check_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsort.kernels.blocksparse import ops
from sparsort.kernels.blocksparse.budgets import Budget, FixedBudget, ThresholdBudget, TopPBudget
from sparsort.kernels.blocksparse.cpu import attend as blockwise
from sparsort.kernels.blocksparse.cpu import dense_map, key_slots, select, tiles
from sparsort.kernels.blocksparse.cpu.align import align_forward
from sparsort.kernels.blocksparse.cpu.attend import attend_backward, attend_forward
from sparsort.kernels.blocksparse.cpu.select import index_select
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.reference import align_ref, attend_ref, index_select_ref, key_positions
from sparsort.kernels.blocksparse.selection import Selection, every_block

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0] * 13, [1] * 13])
LAYOUTS = {
    "one token": Layout.plain(1, 1),
    "plain": Layout.plain(2, 31),
    "packed": Layout.from_lengths([[9, 0, 20, 1], [5, 17]]),
    "left padding": Layout.from_padding(LEFT, 13),
    "right padding": Layout.from_padding(LEFT.flip(1), 13),
    "last queries of a padded cache": Layout.from_padding(LEFT, 4, 16),
    "one query, many keys": Layout.plain(3, 1, 53),
    "few queries, many keys": Layout.plain(2, 3, 40),
    "more keys than queries, in two sequences": Layout(
        spans=(
            Span(row=1, query_start=2, queries=5, key_start=3, keys=20),
            Span(row=1, query_start=8, queries=6, key_start=25, keys=21),
        ),
        batch=2,
        queries=15,
        keys=50,
    ),
}
# Heads of a group, groups, width, index width, block size.
SHAPES = [(1, 2, 4, 4, 5), (3, 1, 32, 8, 16), (8, 2, 16, 4, 4), (2, 2, 8, 3, 1), (4, 1, 4, 4, 128)]
# Bounds of a chunk's logits: every query by itself, a few blocks, and all at once; and as many columns on the dense map.
CHUNKS = [1, 700, 1 << 22]
COLUMNS = {1: 1, 700: 8, 1 << 22: 64}


@dataclass
class Case:
    """Inputs with NaN wherever nothing may read them."""

    layout: Layout
    selection: Selection
    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    index_key: Tensor
    grad: Tensor
    bias: Tensor | None

    def attend_ref(self) -> tuple[Tensor, ...]:
        """Output, log-sum-exp and gradients in float64."""
        given = [self.query, self.key, self.value, *([] if self.bias is None else [self.bias])]
        leaves = [tensor.double().clone().requires_grad_() for tensor in given]
        bias = None if self.bias is None else leaves[3]
        output, lse = attend_ref(*leaves[:3], self.selection, self.layout, scale=0.4, bias=bias)
        padding = self.layout.span_of_query("cpu") < 0
        grad = self.grad.double().masked_fill(padding[:, None, :, None], 0)
        return output.detach(), lse, *torch.autograd.grad(output, leaves, grad)

    def attend_forward(self) -> tuple[Tensor, Tensor]:
        inputs = (self.query, self.key, self.value)
        return attend_forward(*inputs, self.selection, self.layout, scale=0.4, bias=self.bias)

    def attend(self) -> tuple[Tensor, ...]:
        output, lse = self.attend_forward()
        inputs = (self.grad, self.query, self.key, self.value, output, lse, self.selection, self.layout)
        gradients = attend_backward(*inputs, scale=0.4, bias=self.bias)
        return output, lse, *(tensor for tensor in gradients if tensor is not None)

    def align_ref(self) -> tuple[Tensor, ...]:
        leaves = [tensor.double().clone().requires_grad_() for tensor in (self.index_query, self.index_key)]
        scales = {"scale": 0.4, "index_scale": 0.7}
        rows = align_ref(self.query.double(), self.key.double(), *leaves, self.selection, self.layout, **scales)
        return rows.detach(), *torch.autograd.grad(rows.sum(), leaves)

    def align(self, lse: Tensor | None, gradients: bool = True) -> tuple[Tensor | None, ...]:
        inputs = (self.query, self.key, self.index_query, self.index_key, self.selection, self.layout)
        return align_forward(*inputs, scale=0.4, index_scale=0.7, lse=lse, gradients=gradients)


def make(
    layout: Layout,
    shape: tuple[int, ...],
    *,
    kind: str = "random",
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    seed: int = 0,
) -> Case:
    """A case; a `random` selection skips blocks, even local ones, has unused slots anywhere, and has rows without a block."""
    heads, groups, width, index_width, size = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    B, T, S = layout.batch, layout.queries, layout.keys
    if kind == "every":
        selection = every_block(layout, groups, size)
    else:
        own = torch.div(layout.position("cpu"), size, rounding_mode="floor")
        slots = layout.blocks(size) + 1
        order = torch.rand(B, groups, T, slots, generator=generator).argsort(dim=-1)
        used = (order <= own[:, None, :, None]) & (torch.rand(order.shape, generator=generator) < 0.6)
        used &= torch.rand(B, groups, T, 1, generator=generator) < 0.9
        selection = Selection(blocks=torch.where(used, order, -1).int(), block_size=size)
    check_blocks(selection, layout)
    padding = (layout.span_of_query("cpu") < 0)[:, None, :, None]
    unkeyed = (key_positions(layout, "cpu")[0] < 0)[:, None, :, None]
    # Heads after tokens in memory, as the projections of a layer leave them.
    made = {
        "query": normal(B, T, heads * groups, width).transpose(1, 2).masked_fill(padding, torch.nan),
        "key": normal(B, S, groups, width).transpose(1, 2).masked_fill(unkeyed, torch.nan),
        "value": normal(B, groups, S, width).masked_fill(unkeyed, torch.nan),
        "index_query": normal(B, groups, T, index_width).masked_fill(padding, torch.nan),
        "index_key": normal(B, S, index_width).masked_fill(unkeyed[:, 0], torch.nan),
        "grad": normal(B, heads * groups, T, width).masked_fill(padding, torch.nan),
    }
    slot_bias = normal(*selection.blocks.shape).masked_fill(selection.blocks < 0, torch.nan) if bias else None
    return Case(layout=layout, selection=selection, bias=slot_bias, **made)


def assert_close(found: tuple[Tensor | None, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one is not None
        bounds = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(one.double(), other, **bounds, msg=lambda text, n=number: f"result {n}: {text}")


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the size of chunks, and the way: block by block, gathering each query's keys, or on the dense map."""

    def set_to(elements: int, way: Literal["blocks", "gather", "short"]) -> None:
        monkeypatch.setattr(tiles, "CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(select, "_CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(blockwise, "_GATHER_ELEMENTS", elements)
        monkeypatch.setattr(key_slots, "COLUMNS", COLUMNS.get(elements, 16))
        for name in ("attends_short", "scores_short"):
            monkeypatch.setattr(dense_map, name, lambda *_: way == "short")
        monkeypatch.setattr(blockwise, "_is_few", lambda *_: way == "gather")

    return set_to


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_bias_of_minus_infinity_hides_its_slot(layout: Layout, force: Callable[..., None]) -> None:
    case = make(layout, SHAPES[0], kind="random", bias=True, seed=0)
    assert case.bias is not None
    case.bias[:, :, ::3] = -torch.inf
    case.bias[:, :, 1::3, :1] = -torch.inf
    expected = case.attend_ref()
    for way in ("blocks", "short"):
        force(1 << 12, way)
        assert_close(case.attend(), expected, 1e-10)
    force(1 << 12, "gather")
    assert_close(case.attend_forward(), expected[:2], 1e-10)


@pytest.mark.parametrize("elements", CHUNKS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_and_its_gradients_are_the_reference(
    layout: Layout, elements: int, force: Callable[..., None]
) -> None:
    for seed, shape in enumerate(SHAPES):
        for kind, bias in (("random", False), ("random", True), ("every", False)):
            case = make(layout, shape, kind=kind, bias=bias, seed=seed)
            expected = case.attend_ref()
            for way in ("blocks", "short"):
                force(elements, way)
                assert_close(case.attend(), expected, 1e-10)
            force(elements, "gather")
            assert_close(case.attend_forward(), expected[:2], 1e-10)


@pytest.mark.parametrize("elements", CHUNKS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_alignment_and_its_gradients_are_the_reference(
    layout: Layout, elements: int, force: Callable[..., None]
) -> None:
    for seed, shape in enumerate(SHAPES):
        for kind in ("random", "every"):
            case = make(layout, shape, kind=kind, seed=seed)
            expected = case.align_ref()
            for way in ("blocks", "short"):
                force(elements, way)
                assert_close(case.align(None), expected, 1e-10)
                assert_close(case.align(case.attend_forward()[1]), expected, 1e-10)
                rows, *gradients = case.align(None, gradients=False)
                assert gradients == [None, None]
                assert_close((rows,), expected[:1], 1e-10)


@pytest.mark.parametrize("elements", CHUNKS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "budget",
    [FixedBudget(blocks=1), FixedBudget(blocks=4), ThresholdBudget(threshold=0.2, most=3), TopPBudget(p=0.6, most=99)],
    ids=str,
)
def test_the_selection_is_the_reference(
    layout: Layout, budget: Budget, elements: int, force: Callable[..., None]
) -> None:
    for seed, shape in enumerate(SHAPES):
        case = make(layout, shape, seed=seed)
        # Rounded, scores tie and are exact in float32 too; some are no numbers.
        rounded = (case.index_query.round().float(), case.index_key.round().float())
        odd = case.index_key.clone()
        odd[:, ::7, 0], odd[:, 3::11, 0] = torch.nan, torch.inf
        for inputs in ((case.index_query, case.index_key), rounded, (case.index_query, odd)):
            expected = index_select_ref(*inputs, layout, budget, block_size=shape[-1], scale=0.5)
            for way in ("blocks", "short"):
                force(elements, way)
                found = index_select(*inputs, layout, budget, block_size=shape[-1], scale=0.5)
                check_blocks(found, layout)
                torch.testing.assert_close(found.blocks, expected.blocks, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("way", ["blocks", "gather", "short"])
def test_narrower_dtypes(dtype: torch.dtype, tolerance: float, way: str, force: Callable[..., None]) -> None:
    force(1 << 14, way)
    for seed, kind in enumerate(("random", "every")):
        case = make(Layout.from_lengths([[90, 30], [101]]), (4, 2, 32, 16, 16), kind=kind, dtype=dtype, seed=seed)
        found = case.attend()
        assert [tensor.dtype for tensor in found] == [dtype, torch.float32, dtype, dtype, dtype]
        assert_close(found, case.attend_ref(), tolerance)
        aligned = case.align(None)
        assert [tensor.dtype for tensor in aligned if tensor is not None] == [torch.float32, dtype, dtype]
        assert_close(aligned, case.align_ref(), tolerance)


def test_large_logits_neither_overflow_nor_vanish(force: Callable[..., None]) -> None:
    for way in ("blocks", "gather", "short"):
        force(1 << 12, way)
        case = make(Layout.plain(1, 60), (2, 1, 8, 4, 8))
        case.query *= 300
        case.index_query *= 300
        assert_close(case.attend(), case.attend_ref(), 1e-9)
        assert_close(case.align(None), case.align_ref(), 1e-9)


def test_one_query_by_hand() -> None:
    # Two keys of two blocks of one; the last query chose both: weights 1/(1 + e) and e/(1 + e).
    layout = Layout.plain(1, 1, 3)
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 99.0, 1.0]).view(1, 1, 3, 1)
    value = torch.tensor([1.0, 99.0, 2.0]).view(1, 1, 3, 1)
    selection = Selection(blocks=torch.tensor([2, -1, 0], dtype=torch.int32).view(1, 1, 1, 3), block_size=1)
    output, lse = attend_forward(query, key, value, selection, layout, scale=1.0)
    assert output.item() == pytest.approx((1 + 2 * torch.e) / (1 + torch.e))
    assert lse.item() == pytest.approx(1.3132617)


@pytest.mark.parametrize("layout", [Layout.plain(2, 0), Layout(spans=(), batch=2, queries=5, keys=7)], ids=str)
def test_nothing_to_attend_to(layout: Layout) -> None:
    case = make(layout, (2, 2, 4, 4, 4))
    output, lse, *gradients = case.attend()
    assert not output.any()
    assert (lse == -torch.inf).all()
    assert not any(gradient.any() for gradient in gradients)
    rows, *gradients = case.align(None)
    assert not any(tensor.any() for tensor in (rows, *gradients))
    found = index_select(case.index_query, case.index_key, layout, FixedBudget(blocks=3), block_size=4, scale=1.0)
    assert found.blocks.shape == (2, 2, layout.queries, 0)
    assert_close(make_without_slots(layout).attend()[:1], (output,), 0)


def make_without_slots(layout: Layout) -> Case:
    case = make(layout, (2, 2, 4, 4, 4))
    case.selection = Selection(blocks=case.selection.blocks[..., :0], block_size=4)
    return case


def test_no_slots_at_all() -> None:
    for layout in (Layout.plain(1, 9), Layout.plain(1, 1, 9)):
        output, lse, *gradients = make_without_slots(layout).attend()
        assert (lse == -torch.inf).all()
        assert not any(tensor.any() for tensor in (output, *gradients))


@pytest.mark.parametrize("way", ["blocks", "gather"])
def test_blocks_that_nobody_chose_are_not_read(way: str, force: Callable[..., None]) -> None:
    force(1 << 12, way)
    layout = Layout.plain(1, 20, 60)
    case = make(layout, (2, 1, 8, 4, 4))
    unchosen = torch.tensor([number not in (0, 3, 9) for number in range(15)])
    case.selection = Selection(blocks=torch.tensor([9, -1, 0, 3], dtype=torch.int32).expand(1, 1, 20, 4), block_size=4)
    expected = case.attend_ref()
    for tensor in (case.key, case.value):
        tensor[:, :, unchosen.repeat_interleave(4)] = torch.nan
    assert_close(case.attend(), expected, 1e-10)


@pytest.mark.parametrize("way", ["blocks", "short"])
def test_twice_the_same_to_the_bit(way: str, force: Callable[..., None]) -> None:
    force(1 << 22, way)
    case = make(Layout.from_lengths([[300], [150, 150]]), (4, 2, 16, 8, 16), dtype=torch.float32)
    for one, other in zip((*case.attend(), *case.align(None)), (*case.attend(), *case.align(None)), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("way", ["blocks", "short"])
def test_gradcheck(way: str, force: Callable[..., None]) -> None:
    force(400, way)
    case = make(Layout.from_lengths([[7, 4]]), (2, 1, 3, 2, 3), bias=True)
    bias = case.bias.nan_to_num()
    inputs = [tensor.clone().requires_grad_() for tensor in (case.query, case.key, case.value, bias)]

    def output(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return ops.attend(query, key, value, case.selection, case.layout, bias=bias)[0]

    torch.autograd.gradcheck(output, inputs, fast_mode=True)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made (views are not)."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for result, returned in zip(made if isinstance(made, tuple) else (made,), func._schema.returns, strict=False):
            if isinstance(result, Tensor) and returned.alias_info is None:
                self.elements = max(self.elements, result.numel())
        return made


def test_memory_is_that_of_the_inputs(force: Callable[..., None]) -> None:
    force(1 << 14, "blocks")
    layout = Layout.plain(1, 1024)
    case = make(layout, (4, 2, 16, 8, 16), dtype=torch.float32)
    inputs = max(tensor.numel() for tensor in (case.query, case.key))
    with Largest() as largest:
        case.selection = index_select(
            case.index_query, case.index_key, layout, FixedBudget(blocks=4), block_size=16, scale=1.0
        )
        case.attend()
        case.align(None)
    # A group's map of scores has 1024 · 1024 elements, and one query's row in it 4 heads · 1024 keys.
    assert largest.elements <= max(inputs, 1 << 14)


def test_a_decoding_step_makes_nothing_of_the_cache_s_size() -> None:
    case = make(Layout.plain(1, 1, 4096), (4, 2, 16, 8, 16), dtype=torch.float32)
    case.selection = Selection(blocks=torch.arange(8, dtype=torch.int32).expand(1, 2, 1, 8), block_size=16)
    with Largest() as largest:
        attend_forward(case.query, case.key, case.value, case.selection, case.layout, scale=1.0)
    assert largest.elements <= 8 * 16 * 16


@pytest.mark.parametrize("size", [1, 3, 16, 24])
def test_the_highest_score_of_a_block_is_the_same_however_many_columns_there_are(size: int) -> None:
    scores = torch.randn((3 * size + 1, 17, 1), generator=torch.Generator().manual_seed(size))
    scores[size - 1, 5] = -torch.inf
    expected = torch.stack([part.amax(dim=0) for part in scores.split(size)])
    for columns in (1, 2, 7, 16, 17):
        assert torch.equal(select._pool(scores[:, :columns].contiguous(), size), expected[:, :columns])
