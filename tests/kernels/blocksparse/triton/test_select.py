"""Index scoring with top-k in Triton against the dense reference: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from selections import check_blocks

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.reference import block_scores, index_scores, index_select_ref, key_positions

pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 was not set before Triton loaded", allow_module_level=True)

from sparsort.kernels.blocksparse.triton.select import _highest, index_select_triton  # noqa: E402

# In the interpreter NumPy warns where a block holds nothing but NaN, or the lowest number is exceeded.
pytestmark = [pytest.mark.gpu] if CUDA else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if CUDA else "cpu"

LAYOUTS = {
    "plain": Layout.plain(2, 40),
    "left and right padding, and all padding": Layout.from_padding(
        torch.tensor([[0] * 9 + [1] * 24, [1] * 17 + [0] * 16, [0] * 33]), 33
    ),
    "packed, one of length 1": Layout.from_lengths([[20, 1, 13], [5, 11]], 36),
    "cache longer than filled": Layout(
        spans=(
            Span(row=0, query_start=1, queries=2, key_start=5, keys=71),
            Span(row=1, query_start=0, queries=3, key_start=0, keys=33),
        ),
        batch=2,
        queries=3,
        keys=80,
    ),
    "one token": Layout.plain(1, 1),
}
BUDGETS = (
    FixedBudget(blocks=3),
    FixedBudget(blocks=50),
    ThresholdBudget(threshold=0.12, most=4),
    TopPBudget(p=0.7, most=5),
)


def tied(layout, groups, width, seed=0):
    """Whole numbers, whose scores are exact in float32 and tie often; NaN in padding."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float()

    index_query = whole(layout.batch, groups, layout.queries, width)
    index_key = whole(layout.batch, layout.keys, width)
    index_query.masked_fill_((layout.span_of_query("cpu") < 0)[:, None, :, None], torch.nan)
    index_key.masked_fill_((key_positions(layout, "cpu")[0] < 0)[..., None], torch.nan)
    return index_query, index_key


def assert_same(index_query, index_key, layout, budget, block_size, scale=0.25):
    wanted = index_select_ref(index_query, index_key, layout, budget, block_size=block_size, scale=scale)
    ours = index_select_triton(
        index_query.to(DEVICE), index_key.to(DEVICE), layout, budget, block_size=block_size, scale=scale
    )
    assert ours.block_size == block_size
    assert ours.blocks.dtype == torch.int32
    assert torch.equal(ours.blocks.cpu(), wanted.blocks)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_and_budget_equals_the_reference(layout, budget):
    assert_same(*tied(layout, 2, 16), layout, budget, 8)


# Blocks of one key, odd, as large as a tile of keys, larger, and larger than the sequence; one group, an odd number of them.
@pytest.mark.parametrize(
    ("block_size", "groups", "width"), [(1, 1, 16), (7, 3, 20), (64, 2, 5), (100, 1, 40), (128, 2, 1)]
)
def test_odd_shapes(block_size, groups, width):
    layout = Layout.from_lengths([[150], [61, 80]] if block_size > 50 else [[30], [21, 8]], 150)
    assert_same(*tied(layout, groups, width), layout, FixedBudget(blocks=2), block_size)
    assert_same(*tied(layout, groups, width, 1), layout, TopPBudget(p=0.5, most=9), block_size)


def test_a_batch_without_tokens():
    layout = Layout(spans=(), batch=1, queries=3, keys=4)
    for budget in BUDGETS:
        chosen = index_select_triton(
            *(t.to(DEVICE) for t in tied(layout, 2, 16)), layout, budget, block_size=8, scale=1.0
        )
        assert chosen.blocks.shape == (1, 2, 3, 0)


def test_negative_and_zero_scales():
    layout = Layout.plain(1, 40)
    for scale in (-0.5, 0.0):
        assert_same(*tied(layout, 2, 16), layout, FixedBudget(blocks=2), 4, scale)


def test_strides():
    layout = Layout.plain(2, 30)
    index_query, index_key = tied(layout, 2, 32)
    assert_same(index_query[..., ::2], index_key.flip(1)[..., 1::2], layout, FixedBudget(blocks=2), 4)
    turned = index_query.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(turned, index_key[:1].expand(2, -1, -1), layout, FixedBudget(blocks=2), 4)


@pytest.mark.parametrize("budget", BUDGETS)
def test_scores_that_are_no_number_count_as_lowest(budget):
    layout = Layout.plain(1, 48)
    index_query, index_key = tied(layout, 2, 16)
    index_query, index_key = index_query.abs() + 1, index_key.abs()
    index_key[0, 3] = torch.inf
    index_key[0, 8:12] = torch.nan
    index_key[0, 21] = -torch.inf
    index_key[0, 16:20] = torch.inf
    index_query[0, 1, 30] = torch.nan
    assert_same(index_query, index_key, layout, budget, 4)
    assert_same(torch.full_like(index_query, torch.nan), index_key, layout, budget, 4)


def test_a_negative_zero_ties_with_zero():
    """Scores that are too small for float32 keep their sign."""
    for block_size in (4, 64):
        layout = Layout.plain(1, 2, 6 * block_size)
        index_query = torch.full((1, 1, 2, 1), 1e-15)
        index_key = torch.tensor([-1.0, 1.0, -1e30, 1.0, -1.0, 1.0]).repeat_interleave(block_size)[None, :, None]
        assert_same(index_query, index_key, layout, FixedBudget(blocks=3), block_size, 1e-35)


@pytest.mark.parametrize("keys", [31, 32, 33, 34, 64, 65])
def test_a_tile_that_begins_near_the_end_of_a_step(keys):
    """Only a budget by share sees it if a query is shown a key of its own block that comes after it."""
    layout = Layout.plain(1, 3, keys)
    index_query, index_key = tied(layout, 2, 16)
    index_query[:], index_key[:, -2:] = 1.0, 5.0
    assert_same(index_query, index_key, layout, ThresholdBudget(threshold=0.1, most=4), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_within_a_tie_band(dtype, normal):
    """As sets: who is chosen scores no less, up to rounding, than who is not."""
    layout = Layout.from_lengths([[70], [33, 30]], 70)
    index_query, index_key = normal(2, 2, 70, 24).to(dtype), normal(2, 70, 24).to(dtype)
    chosen = index_select_triton(
        index_query.to(DEVICE), index_key.to(DEVICE), layout, FixedBudget(blocks=4), block_size=8, scale=0.2
    )
    check_blocks(chosen, layout)
    blocks = chosen.blocks.cpu().long()
    scores = index_scores(index_query.double(), index_key.double(), layout, scale=0.2)
    scores = block_scores(scores, layout, block_size=8)
    own = layout.position("cpu").long()[:, None] // 8
    taken = torch.zeros(*scores.shape[:-1], scores.shape[-1] + 1, dtype=torch.bool)
    taken = taken.scatter(-1, blocks.where(blocks >= 0, scores.shape[-1]), True)[..., :-1]
    visible = torch.arange(scores.shape[-1]) <= own[..., None]
    assert torch.equal(taken.sum(-1), visible.sum(-1).clamp(max=4).expand_as(taken.sum(-1)))
    local = torch.arange(scores.shape[-1]) == own[..., None]
    assert taken[local.expand_as(taken)].all()
    least = scores.masked_fill(~taken | local, torch.inf).amin(-1)
    most = scores.masked_fill(taken | ~visible, -torch.inf).amax(-1)
    assert (most <= least + 1e-5).all()


@pytest.mark.parametrize("splits", [2, 5])
def test_splitting_the_keys_changes_nothing(splits):
    """What decoding does on a GPU: the candidates of each part of the keys are merged."""
    layout = LAYOUTS["cache longer than filled"]
    index_query, index_key = (tensor.to(DEVICE) for tensor in tied(layout, 2, 16))
    arguments = (index_query, index_key, layout, 4, 2, 0.25)
    whole = _highest(*arguments, scored=True, splits=1)
    split = _highest(*arguments, scored=True, splits=splits)
    real = (layout.span_of_query(DEVICE) >= 0)[:, None].expand_as(whole.total)
    assert torch.equal(split.blocks, whole.blocks)
    assert torch.equal(split.scores, whole.scores)
    assert torch.equal(split.highest[real], whole.highest[real])
    torch.testing.assert_close(split.total[real], whole.total[real], rtol=1e-6, atol=0)


def test_scores_and_their_log_sum_exp(normal):
    layout = Layout.from_lengths([[50]], 52)
    index_query, index_key = normal(1, 2, 52, 16), normal(1, 52, 16)
    found = _highest(index_query.to(DEVICE), index_key.to(DEVICE), layout, 3, 4, 0.5, scored=True)
    scores = index_scores(index_query.double(), index_key.double(), layout, scale=0.5)
    scores = block_scores(scores, layout, block_size=4)[:, :, :50]
    lse = (found.highest + found.total.log()).cpu().double()[:, :, :50]
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    blocks = found.blocks.cpu().long()[:, :, :50]
    wanted = scores.gather(-1, blocks.clamp(min=0)).masked_fill(blocks < 0, -torch.inf)
    torch.testing.assert_close(found.scores.cpu().double()[:, :, :50], wanted, rtol=1e-5, atol=1e-5)


def test_two_runs_are_bitwise_equal(normal):
    layout = Layout.plain(2, 60)
    index_query, index_key = normal(2, 2, 60, 16).to(DEVICE), normal(2, 60, 16).to(DEVICE)
    runs = [_highest(index_query, index_key, layout, 4, 8, 0.3, scored=True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_unsupported_arguments_are_refused():
    layout = Layout.plain(1, 4)
    for dtype, width in ((torch.float64, 16), (torch.float32, 300)):
        with pytest.raises(SparsortError, match=r"width up to 256.*SPARSORT_BLOCKSPARSE=torch"):
            index_select_triton(
                torch.ones(1, 1, 4, width, dtype=dtype, device=DEVICE),
                torch.ones(1, 4, width, dtype=dtype, device=DEVICE),
                layout,
                FixedBudget(blocks=1),
                block_size=2,
                scale=1.0,
            )


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block_size", "width", "slots"), [(128, 128, 16), (64, 64, 32), (16, 256, 64), (100, 80, 5)])
def test_long_sequences_of_ties(dtype, block_size, width, slots):
    """Whole numbers are exact in every dtype: the selection must be the reference's to the block."""
    layout = Layout.from_lengths([[2500], [1000, 1400]], 2500)
    index_query, index_key = (tensor.to(dtype).to(DEVICE) for tensor in tied(layout, 4, width))
    for budget in (FixedBudget(blocks=slots), FixedBudget(blocks=1)):
        wanted = index_select_ref(index_query, index_key, layout, budget, block_size=block_size, scale=1.0)
        for _ in range(2):
            ours = index_select_triton(index_query, index_key, layout, budget, block_size=block_size, scale=1.0)
            assert torch.equal(ours.blocks, wanted.blocks)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_splits_the_keys(dtype):
    layout = Layout.plain(2, 1, 30_000)
    index_query, index_key = (tensor.to(dtype).to(DEVICE) for tensor in tied(layout, 4, 128))
    budget = FixedBudget(blocks=16)
    wanted = index_select_ref(index_query, index_key, layout, budget, block_size=128, scale=1.0)
    ours = index_select_triton(index_query, index_key, layout, budget, block_size=128, scale=1.0)
    assert torch.equal(ours.blocks, wanted.blocks)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_no_map_of_scores_is_made():
    """16K tokens of 8 groups: the map would take 4 GiB in bfloat16 and the block scores 64 MiB."""
    layout = Layout.plain(1, 16384)
    index_query = torch.randn(1, 8, 16384, 64, dtype=torch.bfloat16, device=DEVICE)
    index_key = torch.randn(1, 16384, 64, dtype=torch.bfloat16, device=DEVICE)
    index_select_triton(index_query, index_key, layout, FixedBudget(blocks=16), block_size=128, scale=1.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index_select_triton(index_query, index_key, layout, FixedBudget(blocks=16), block_size=128, scale=1.0)
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**20
