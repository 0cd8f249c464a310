"""The alignment loss in Triton against autograd on the dense reference in float64: on a GPU, else in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from selections import check_blocks

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.reference import align_ref, attend_ref, key_positions
from sparsort.kernels.blocksparse.selection import Selection, every_block

pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 was not set before Triton loaded", allow_module_level=True)

from sparsort.kernels.blocksparse.triton import align as module  # noqa: E402
from sparsort.kernels.blocksparse.triton.align import align_forward_triton  # noqa: E402

# In the interpreter NumPy warns of the logarithm of 0 where a query sees no key of a program.
pytestmark = [pytest.mark.gpu] if CUDA else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if CUDA else "cpu"
# Of the gradients, as root mean square of the difference over that of the reference. Rounding of student − P and of the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}

LAYOUTS = {
    "plain": Layout.plain(2, 30),
    "left and right padding, and all padding": Layout.from_padding(
        torch.tensor([[0] * 7 + [1] * 16, [1] * 9 + [0] * 14, [0] * 23]), 23
    ),
    "packed, one of length 1": Layout.from_lengths([[13, 1, 9], [5, 11]], 25),
    "cache longer than filled": Layout(
        spans=(
            Span(row=0, query_start=1, queries=2, key_start=5, keys=41),
            Span(row=1, query_start=0, queries=3, key_start=0, keys=23),
        ),
        batch=2,
        queries=3,
        keys=50,
    ),
}


def selected(layout, groups, slots, block_size, seed=0):
    """Random blocks in any order, with unused slots anywhere, and rows without any."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.full((layout.batch, groups, layout.queries, slots), -1, dtype=torch.int32)
    position = layout.position("cpu").tolist()
    for b in range(layout.batch):
        for t, at in enumerate(position[b]):
            for g in range(groups if at >= 0 else 0):
                visible = torch.randperm(at // block_size + 1, generator=generator)[:slots].int()
                places = torch.randperm(slots, generator=generator)[: len(visible)]
                blocks[b, g, t, places] = visible
                keep = torch.rand(slots, generator=generator) < 0.8
                blocks[b, g, t] = blocks[b, g, t].where(keep, -1)
    selection = Selection(blocks=blocks, block_size=block_size)
    check_blocks(selection, layout)
    return selection


def on_device(selection):
    return Selection(blocks=selection.blocks.to(DEVICE), block_size=selection.block_size)


def inputs(layout, groups, heads, width, index_width, dtype, normal):
    """query, key, index_query, index_key; NaN in padding."""
    no_query = (layout.span_of_query("cpu") < 0)[:, None, :, None]
    no_key = (key_positions(layout, "cpu")[0] < 0)[:, None, :, None]
    query = normal(layout.batch, groups * heads, layout.queries, width).masked_fill(no_query, torch.nan)
    key = normal(layout.batch, groups, layout.keys, width).masked_fill(no_key, torch.nan)
    index_query = normal(layout.batch, groups, layout.queries, index_width).masked_fill(no_query, torch.nan)
    index_key = normal(layout.batch, layout.keys, index_width).masked_fill(no_key[:, 0], torch.nan)
    return [tensor.to(dtype).to(DEVICE) for tensor in (query, key, index_query, index_key)]


SCALES = {"scale": 0.3, "index_scale": 0.2}


def error(ours, wanted):
    assert ours.shape == wanted.shape
    return ((ours.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def assert_agrees(tensors, selection, layout, *, lse=None, tolerance=1e-5):
    selection = on_device(selection)
    query, key, index_query, index_key = (tensor.double() for tensor in tensors)
    index_query.requires_grad_()
    index_key.requires_grad_()
    wanted = align_ref(query, key, index_query, index_key, selection, layout, **SCALES)
    gradients = torch.autograd.grad(wanted.sum(), (index_query, index_key))
    rows, d_index_query, d_index_key = align_forward_triton(
        *tensors, selection, layout, **SCALES, lse=lse, gradients=True
    )
    assert rows.dtype == torch.float32
    # A KL near 0 is a difference of numbers near 1.
    torch.testing.assert_close(rows.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
    assert rows[selection.counts == 0].eq(0).all()
    assert d_index_query.dtype == tensors[2].dtype
    allowed = max(TOLERANCE[tensors[0].dtype], tolerance)
    assert error(d_index_query, gradients[0]) < allowed
    assert error(d_index_key, gradients[1]) < allowed
    return rows, d_index_query, d_index_key


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(layout, normal):
    tensors = inputs(layout, 2, 2, 16, 16, torch.float32, normal)
    assert_agrees(tensors, selected(layout, 2, 3, 4), layout)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype(dtype, normal):
    layout = LAYOUTS["packed, one of length 1"]
    assert_agrees(inputs(layout, 2, 3, 16, 16, dtype, normal), selected(layout, 2, 3, 4), layout)


# Groups of one head and of several; widths and blocks that are no powers of two; blocks larger than a tile of keys, which
# for float32 has 32, and larger than the sequence.
@pytest.mark.parametrize(
    ("groups", "heads", "width", "index_width", "block_size"),
    [(1, 1, 8, 1, 1), (3, 1, 40, 20, 7), (1, 5, 33, 3, 16), (2, 2, 16, 64, 40), (1, 2, 16, 16, 100)],
)
def test_odd_shapes(groups, heads, width, index_width, block_size, normal):
    layout = Layout.from_lengths([[70]] if block_size > 30 else [[21], [8, 5]])
    tensors = inputs(layout, groups, heads, width, index_width, torch.float32, normal)
    assert_agrees(tensors, selected(layout, groups, 3, block_size), layout)


def test_full_support(normal):
    layout = Layout.plain(1, 20)
    assert_agrees(inputs(layout, 2, 2, 16, 16, torch.float32, normal), every_block(layout, 2, 8), layout)


@pytest.mark.parametrize(("kilobytes", "processors"), [(2, 1), (6, 3)], ids=["chunks", "chunks of two parts"])
def test_chunks_of_queries_change_nothing(kilobytes, processors, normal, monkeypatch):
    """As a long sequence is worked off, and split for a GPU: with what is between them bounded to a few KiB."""
    layout = LAYOUTS["packed, one of length 1"]
    tensors = inputs(layout, 1, 2, 16, 16, torch.float32, normal)
    selection = selected(layout, 1, 3, 4)
    whole = align_forward_triton(*tensors, on_device(selection), layout, **SCALES, gradients=True)
    monkeypatch.setattr(module, "_CHUNK_BYTES", kilobytes << 10)
    monkeypatch.setattr(module, "processors", lambda _: processors)
    parts = assert_agrees(tensors, selection, layout)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_given_log_sum_exp(normal):
    layout = LAYOUTS["left and right padding, and all padding"]
    tensors = inputs(layout, 2, 2, 16, 16, torch.float32, normal)
    selection = selected(layout, 2, 3, 4)
    _, lse = attend_ref(tensors[0], tensors[1], tensors[1], on_device(selection), layout, scale=SCALES["scale"])
    assert_agrees(tensors, selection, layout, lse=lse)
    assert_agrees(tensors, selection, layout, lse=lse.transpose(1, 2).contiguous().transpose(1, 2))


def test_strides(normal):
    layout = Layout.plain(2, 12)
    query, key, index_query, index_key = inputs(layout, 2, 2, 32, 32, torch.float32, normal)
    tensors = [
        query.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2],
        key[:1].expand(2, -1, -1, -1)[..., :16],
        index_query.flip(2)[..., 1::2],
        index_key.transpose(0, 1).contiguous().transpose(0, 1)[..., :16],
    ]
    assert_agrees(tensors, selected(layout, 2, 2, 4), layout)


def test_a_student_that_equals_the_teacher_has_no_loss(normal):
    """One head, and index scores that are its logits: KL and gradients are 0."""
    layout = Layout.plain(1, 20)
    query, key = normal(1, 1, 20, 16).to(DEVICE), normal(1, 1, 20, 16).to(DEVICE)
    selection = on_device(selected(layout, 1, 3, 4))
    rows, *gradients = align_forward_triton(
        query, key, query, key[:, 0], selection, layout, scale=0.3, index_scale=0.3, gradients=True
    )
    for found in (rows, *gradients):
        assert found.abs().max() < 1e-5


def test_large_logits_underflow_to_nothing(normal):
    """Probabilities that are 0 in float32: 0 · log 0 = 0, and the student's own share of them is still pushed down."""
    layout = Layout.plain(1, 24)
    tensors = inputs(layout, 1, 2, 16, 16, torch.float32, normal)
    tensors[0] *= 300
    # Logits near 1000 have a rounding of 6e-5 in float32.
    selection = selected(layout, 1, 3, 4)
    rows, d_index_query, d_index_key = assert_agrees(tensors, selection, layout, tolerance=1e-3)
    assert rows.isfinite().all()
    assert d_index_query.isfinite().all()
    assert d_index_key.isfinite().all()


def test_without_gradients(normal):
    layout = Layout.plain(1, 20)
    tensors = inputs(layout, 2, 2, 16, 16, torch.float32, normal)
    selection = selected(layout, 2, 3, 4)
    rows, *_ = assert_agrees(tensors, selection, layout)
    alone, *gradients = align_forward_triton(*tensors, on_device(selection), layout, **SCALES, gradients=False)
    assert gradients == [None, None]
    assert torch.equal(alone, rows)


def test_two_runs_are_bitwise_equal(normal):
    layout = LAYOUTS["packed, one of length 1"]
    tensors = inputs(layout, 2, 2, 16, 16, torch.float32, normal)
    selection = on_device(selected(layout, 2, 3, 4))
    runs = [align_forward_triton(*tensors, selection, layout, **SCALES, gradients=True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize(
    ("layout", "slots"),
    [(Layout(spans=(), batch=1, queries=3, keys=4), 2), (Layout.plain(1, 5), 0), (Layout.plain(1, 5), 2)],
    ids=["no token", "no slot", "no block chosen"],
)
def test_nothing_to_align(layout, slots, normal):
    tensors = inputs(layout, 2, 2, 16, 16, torch.float32, normal)
    blocks = torch.full((1, 2, layout.queries, slots), -1, dtype=torch.int32, device=DEVICE)
    selection = Selection(blocks=blocks, block_size=4)
    found = align_forward_triton(*tensors, selection, layout, **SCALES, gradients=True)
    for tensor, shape in zip(found, [(1, 2, layout.queries), tensors[2].shape, tensors[3].shape], strict=True):
        assert tensor.shape == shape
        assert tensor.eq(0).all()


def test_unsupported_arguments_are_refused():
    layout = Layout.plain(1, 4)
    tensors = [torch.ones(shape, dtype=torch.float64) for shape in [(1, 1, 4, 8)] * 3 + [(1, 4, 8)]]
    with pytest.raises(SparsortError, match="float64"):
        align_forward_triton(*tensors, every_block(layout, 1, 2), layout, **SCALES, gradients=True)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("groups", "heads", "width", "index_width", "block_size"),
    [(2, 8, 128, 128, 128), (1, 16, 64, 64, 64), (3, 1, 256, 256, 128), (2, 3, 80, 40, 100), (2, 2, 32, 16, 16)],
)
def test_model_shapes(groups, heads, width, index_width, block_size, dtype, normal, monkeypatch):
    layout = Layout.from_lengths([[1000], [300, 600]], 1010)
    tensors = inputs(layout, groups, heads, width, index_width, dtype, normal)
    selection = selected(layout, groups, 4, block_size)
    assert_agrees(tensors, selection, layout)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 20)
    runs = [assert_agrees(tensors, selection, layout) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
