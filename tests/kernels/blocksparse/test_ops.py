"""The public operations: against the reference, dense attention, transformers' own MSA and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from selections import check_blocks
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sparsort.kernels import backend
from sparsort.kernels.blocksparse import reference
from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.ops import align, attend, index_select
from sparsort.kernels.blocksparse.selection import Selection, every_block

LAYOUTS = {
    "plain": Layout.plain(2, 37),
    "left and right": Layout.from_padding(torch.tensor([[0] * 8 + [1] * 29, [1] * 20 + [0] * 17, [0] * 37]), 37),
    "packed": Layout.from_lengths([[17, 1, 12], [32]], 37),
    "cache": Layout.from_padding(torch.tensor([[0] * 5 + [1] * 40, [1] * 45]), 3, keys=64),
    "decode": Layout.plain(3, 1, 45),
    "one token": Layout.plain(1, 1),
}
NAMES = ("query", "key", "value", "index_query", "index_key", "bias")


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch):
    monkeypatch.delenv("SPARSORT_BLOCKSPARSE", raising=False)


@pytest.fixture
def tensors(normal):
    def make(layout, H=4, G=2, D=8, width=4, dtype=torch.float64):
        B, T, S = layout.batch, layout.queries, layout.keys
        shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, D), (B, G, T, width), (B, S, width)]
        return [normal(*shape, dtype=dtype) for shape in shapes]

    return make


def some_blocks(layout, G, size, seed=0):
    """A random selection with unused slots anywhere, and some queries that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    blocks = every_block(layout, G, size).blocks.clone()
    blocks[torch.rand(blocks.shape, generator=generator) < 0.5] = -1
    blocks[torch.rand(blocks.shape[:-1], generator=generator) < 0.1] = -1
    order = torch.rand(blocks.shape, generator=generator).argsort(-1)
    return Selection(blocks=blocks.gather(-1, order), block_size=size)


def run(tensors, selection, layout, bias=None, grad_output=None, *, by_reference=False):
    """Outputs and gradients of attention and alignment, by the operations or by the reference."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    query, key, value, index_query, index_key = inputs
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    scales = {"scale": query.shape[-1] ** -0.5}
    if by_reference:
        output, lse = reference.attend_ref(query, key, value, selection, layout, bias=bias, **scales)
        index_scale = index_query.shape[-1] ** -0.5
        rows = reference.align_ref(
            query, key, index_query, index_key, selection, layout, index_scale=index_scale, **scales
        )
        loss = rows.sum() / max(layout.tokens * key.shape[1], 1)
    else:
        output, lse = attend(query, key, value, selection, layout, bias=bias)
        loss = align(query, key, index_query, index_key, selection, layout)
    if grad_output is None:
        grad_output = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    torch.autograd.backward((output, loss), (grad_output, None))
    made = {"output": output.detach(), "lse": lse, "loss": loss.detach()}
    inputs = dict(zip(NAMES, (*inputs, bias), strict=True))
    return made | {f"d_{name}": tensor.grad for name, tensor in inputs.items() if tensor is not None}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].isfinite().all() or name == "lse", name
        torch.testing.assert_close(found[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# Against the reference


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("H", "G", "size"), [(4, 2, 8), (3, 1, 5), (2, 2, 64), (12, 2, 16), (7, 7, 1)])
def test_attention_and_alignment_are_the_references(name, H, G, size, tensors, normal):
    layout = LAYOUTS[name]
    inputs = tensors(layout, H, G)
    for selection in (some_blocks(layout, G, size), every_block(layout, G, size)):
        bias = normal(*selection.blocks.shape, dtype=torch.float64)
        for slot_bias in (None, bias):
            expected = run(inputs, selection, layout, slot_bias, by_reference=True)
            assert_same(run(inputs, selection, layout, slot_bias), expected)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "budget",
    [FixedBudget(blocks=3), FixedBudget(blocks=99), ThresholdBudget(threshold=0.2, most=4), TopPBudget(p=0.7, most=99)],
    ids=["fixed", "more than there are", "threshold", "top-p"],
)
@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_selection_is_the_references(name, budget, size, tensors):
    layout = LAYOUTS[name]
    *_, index_query, index_key = tensors(layout)
    found = index_select(index_query, index_key, layout, budget, block_size=size)
    check_blocks(found, layout)
    expected = reference.index_select_ref(index_query, index_key, layout, budget, block_size=size, scale=0.5)
    assert found.block_size == size
    assert found.blocks.tolist() == expected.blocks.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_near_the_float64_reference(dtype, tensors, normal):
    layout = LAYOUTS["left and right"]
    inputs = tensors(layout, dtype=dtype)
    selection = some_blocks(layout, 2, 8)
    bias = normal(*selection.blocks.shape, dtype=dtype)
    grad_output = normal(*inputs[0].shape, dtype=dtype)
    found = run(inputs, selection, layout, bias, grad_output)
    wide = [tensor.double() for tensor in inputs]
    expected = run(wide, selection, layout, bias.double(), grad_output.double(), by_reference=True)
    for name, tensor in expected.items():
        assert found[name].dtype == (torch.float32 if name in ("lse", "loss") else dtype)
        # The root mean square of the error, against what rounding the result and the sums on its way would make.
        error = torch.where(tensor.isfinite(), found[name].double() - tensor, 0.0).square().mean().sqrt()
        size = tensor.where(tensor.isfinite(), 0.0).square().mean().sqrt()
        assert error <= (3 * torch.finfo(found[name].dtype).eps + 10 * torch.finfo(torch.float32).eps) * size, name


def test_strides_do_not_matter(tensors):
    layout = LAYOUTS["packed"]
    inputs = tensors(layout)
    selection = some_blocks(layout, 2, 8)
    expected = run(inputs, selection, layout)
    # As a layer makes them: tokens before heads; and every second coordinate of a wider tensor.
    for change in (
        lambda tensor: tensor.transpose(1, -2).contiguous().transpose(1, -2),
        lambda tensor: torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2],
    ):
        query, key, value, index_query, index_key = (change(tensor).requires_grad_() for tensor in inputs)
        output, lse = attend(query, key, value, selection, layout)
        torch.testing.assert_close(output, expected["output"])
        torch.testing.assert_close(lse, expected["lse"])
        loss = align(query, key, index_query, index_key, selection, layout)
        torch.testing.assert_close(loss, expected["loss"])
        # A gradient that is one number everywhere has no memory of its own.
        output.sum().backward()
        assert query.grad.isfinite().all()


# Against finite differences, dense attention, and another's MSA


SMALL = {
    "plain": Layout.plain(1, 5),
    "left and right": Layout.from_padding(torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]), 6),
    "packed": Layout.from_lengths([[3, 4], [5]], 8),
    "cache": Layout.from_padding(torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]), 2, keys=8),
    "decode": Layout.plain(2, 1, 7),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_finite_differences(name, tensors, normal):
    layout = SMALL[name]
    inputs = [tensor.requires_grad_() for tensor in tensors(layout, D=2, width=2)]
    query, key, value, index_query, index_key = inputs
    selection = some_blocks(layout, 2, 2)
    bias = normal(*selection.blocks.shape, dtype=torch.float64).requires_grad_()
    # The fast mode compares the Jacobians along a random direction.
    fast = {"fast_mode": name != "plain"}
    assert gradcheck(lambda *a: attend(*a[:3], selection, layout, bias=a[3])[0], (query, key, value, bias), **fast)
    assert gradcheck(lambda *a: attend(*a, selection, layout, scale=0.3)[0], (query, key, value), **fast)
    assert gradcheck(lambda *a: align(query, key, *a, selection, layout), (index_query, index_key), **fast)


@pytest.mark.parametrize(("H", "G"), [(4, 4), (8, 2), (6, 1)])
def test_every_block_is_dense_attention(H, G, tensors):
    layout = Layout.plain(2, 37)
    inputs = [tensor.requires_grad_() for tensor in tensors(layout, H, G)[:3]]
    output, _ = attend(*inputs, every_block(layout, G, 8), layout)
    dense = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, dense)
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
    found = torch.autograd.grad((output * weight).sum(), inputs)
    for mine, theirs in zip(found, torch.autograd.grad((dense * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("padding", [0, 9])
def test_selection_and_attention_are_those_of_transformers_msa(padding, normal):
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as theirs
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    config = MiniMaxM3VLTextConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1,
        index_n_heads=2, index_head_dim=8, index_block_size=4, index_topk_blocks=3, index_local_blocks=1,
        layer_types=["minimax_m3_sparse"], mlp_layer_types=["dense"], attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    with torch.random.fork_rng():
        layer = theirs.MiniMaxM3VLAttention(config, 0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(normal(*weight.shape) * 0.3)
        layer.o_proj.weight.copy_(torch.eye(32))
    T = 37
    hidden = normal(2, T, 32).requires_grad_()
    position = torch.arange(T).expand(2, T)
    rotary = theirs.MiniMaxM3VLRotaryEmbedding(config)(hidden, position)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, T - padding :] = False
    seen = torch.ones(T, T, dtype=torch.bool).tril() & mask[:, None, None]
    expected, _ = layer(hidden, rotary, seen, position_ids=position)
    blocks = layer.indexer(hidden, rotary, None, position)

    def heads(tensor, norm):
        tensor = tensor.unflatten(-1, (-1, 8))
        return (tensor if norm is None else norm(tensor)).transpose(1, 2)

    query, key = theirs.apply_rotary_pos_emb(
        heads(layer.q_proj(hidden), layer.q_norm), heads(layer.k_proj(hidden), layer.k_norm), *rotary
    )
    index = layer.indexer
    index_query, index_key = theirs.apply_rotary_pos_emb(
        heads(index.q_proj(hidden), index.q_norm), heads(index.k_proj(hidden), index.k_norm), *rotary
    )
    layout = Layout.from_padding(mask, T)
    selection = index_select(index_query, index_key[:, 0], layout, FixedBudget(blocks=3), block_size=4, scale=1.0)
    for row, length in ((0, T), (1, T - padding)):
        assert selection.blocks[row, :, :length].tolist() == blocks[row, :, :length].tolist()
    output, _ = attend(query, key, heads(layer.v_proj(hidden), None), selection, layout)
    output = output.transpose(1, 2).flatten(2)
    torch.testing.assert_close(output[mask], expected[mask])
    assert (output[~mask] == 0).all()
    weight = normal(int(mask.sum()), 32)
    found, wanted = (torch.autograd.grad((made[mask] * weight).sum(), hidden)[0] for made in (output, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Padding, nothing, and numbers that are none


def test_values_of_padding_have_no_effect(tensors, normal):
    layout = LAYOUTS["left and right"]
    clean = tensors(layout)
    selection = some_blocks(layout, 2, 8)
    bias, grad_output = (
        normal(*selection.blocks.shape, dtype=torch.float64),
        normal(*clean[0].shape, dtype=torch.float64),
    )
    expected = run(clean, selection, layout, bias, grad_output)
    padding = layout.span_of_query("cpu") < 0

    def poisoned(tensor, value):
        hidden = padding if tensor.ndim == 3 else padding[:, None]
        return tensor.masked_fill(hidden[..., None], value)

    for value in (math.nan, math.inf):
        found = run(
            [poisoned(tensor, value) for tensor in clean],
            selection,
            layout,
            poisoned(bias, value).masked_fill(selection.blocks < 0, value),
            poisoned(grad_output, value),
        )
        assert_same(found, expected, rtol=0, atol=0)
        dirty = [poisoned(tensor, value) for tensor in clean[3:]]
        for budget in (FixedBudget(blocks=3), TopPBudget(p=0.6, most=4)):
            blocks = [index_select(*pair, layout, budget, block_size=8).blocks for pair in (clean[3:], dirty)]
            assert torch.equal(*blocks)
    for name, tensor in expected.items():
        if name in ("output", "d_query", "d_key", "d_value", "d_index_query", "d_bias"):
            assert (tensor.movedim(-2, 1)[padding] == 0).all(), name


def test_a_query_that_sees_nothing_has_zero_and_minus_infinity(tensors):
    layout = Layout.plain(1, 6)
    selection = Selection(blocks=torch.full((1, 2, 6, 2), -1, dtype=torch.int32), block_size=2)
    selection.blocks[0, 1, 5, 1] = 0
    found = run(tensors(layout), selection, layout)
    rest = torch.ones(1, 4, 6, dtype=torch.bool)
    rest[0, 2:, 5] = False
    assert (found["output"][rest] == 0).all()
    assert (found["lse"][rest] == -math.inf).all()
    assert (found["d_query"][rest] == 0).all()
    assert (found["output"][~rest] != 0).all()
    assert (found["d_key"][0, 0] == 0).all()
    assert (found["d_key"][0, 1, 2:] == 0).all()
    assert (found["d_value"][0, 1, :2] != 0).any()


@pytest.mark.parametrize(
    "layout",
    [
        Layout.plain(0, 5),
        Layout.plain(2, 0),
        Layout.from_padding(torch.zeros(2, 5), 5),
        Layout.from_padding(torch.ones(2, 5), 0),
    ],
    ids=["batch 0", "length 0", "all padding", "no queries"],
)
def test_a_batch_without_tokens_gives_nothing(layout, tensors):
    inputs = [tensor.fill_(math.nan) for tensor in tensors(layout)]
    selection = index_select(*inputs[3:], layout, FixedBudget(blocks=2), block_size=4)
    assert selection.blocks.shape == (layout.batch, 2, layout.queries, 0)
    for blocks in (
        selection,
        Selection(blocks=selection.blocks.new_full((*selection.blocks.shape[:3], 2), -1), block_size=4),
    ):
        found = run(inputs, blocks, layout, torch.full(blocks.blocks.shape, math.nan, dtype=torch.float64))
        assert (found.pop("lse") == -math.inf).all()
        for name, tensor in found.items():
            assert (tensor == 0).all(), name


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_index_scores_that_are_no_numbers_are_the_lowest(bad):
    # Blocks of 2: nothing but such scores, one of them, none. One does not hide the other token's.
    index_key = torch.tensor([[[bad], [bad], [bad], [-8.0], [-9.0], [-9.5], [0.0], [bad]]])
    index_query = torch.ones(1, 1, 8, 1)
    layout = Layout.plain(1, 8)
    found = index_select(index_query, index_key, layout, FixedBudget(blocks=3), block_size=2)
    assert found.blocks[0, 0, 1::2].tolist() == [[0, -1, -1], [1, 0, -1], [2, 1, 0], [3, 1, 2]]
    found = index_select(index_query, index_key, layout, TopPBudget(p=1.0, most=3), block_size=2)
    assert found.blocks[0, 0, 7].tolist() == [3, 1, 2]


# What flows back, and where


def test_alignment_teaches_the_selector_alone(tensors):
    layout = LAYOUTS["packed"]
    inputs = [tensor.requires_grad_() for tensor in tensors(layout)]
    query, key, _, index_query, index_key = inputs
    selection = some_blocks(layout, 2, 8)
    loss = align(query, key, index_query, index_key, selection, layout)
    grads = torch.autograd.grad(loss, (query, key, index_query, index_key), allow_unused=True)
    assert grads[:2] == (None, None)
    doubled = align(query, key, index_query, index_key, selection, layout) * 2
    for one, two in zip(grads[2:], torch.autograd.grad(doubled, (index_query, index_key)), strict=True):
        torch.testing.assert_close(2 * one, two)
    # Either alone has the same gradient as with the other.
    loss = align(query, key, index_query.detach(), index_key, selection, layout)
    torch.testing.assert_close(torch.autograd.grad(loss, index_key)[0], grads[3], rtol=0, atol=0)
    # Nobody asks: no gradient is made.
    assert not align(query, key, index_query.detach(), index_key.detach(), selection, layout).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(align(query, key, index_query, index_key, selection, layout), loss.detach())
    _, lse = attend(*inputs[:3], selection, layout)
    assert not lse.requires_grad
    torch.testing.assert_close(align(query, key, index_query, index_key, selection, layout, lse=lse), loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_survive_checkpointing(reentrant, tensors):
    layout = LAYOUTS["left and right"]
    inputs = [tensor.requires_grad_() for tensor in tensors(layout)]
    selection = some_blocks(layout, 2, 8)

    def layer(query, key, value, index_query, index_key):
        output, lse = attend(query, key, value, selection, layout)
        return output.square().sum() + align(query, key, index_query, index_key, selection, layout, lse=lse)

    expected = torch.autograd.grad(layer(*inputs), inputs)
    checkpoint(layer, *inputs, use_reentrant=reentrant).backward()
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=0)


def test_autocast_casts_as_dense_attention_does(tensors):
    layout = Layout.plain(2, 37)
    query, key, value, index_query, index_key = (
        tensor.requires_grad_() for tensor in tensors(layout, dtype=torch.float32)
    )
    selection, one = every_block(layout, 2, 8), every_block(Layout.plain(2, 1, 37), 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, lse = attend(query, key.bfloat16(), value.bfloat16(), selection, layout)
        loss = align(query, key, index_query.bfloat16(), index_key, selection, layout)
        last = attend(query[:, :, -1:], key, value, one, Layout.plain(2, 1, 37))[0]
        chosen = index_select(index_query, index_key.bfloat16(), layout, FixedBudget(blocks=2), block_size=8)
        dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        # Backward under autocast too: what runs inside keeps its precision.
        (output.float().sum() + loss).backward()
    assert output.dtype == dense.dtype == torch.bfloat16
    assert lse.dtype == loss.dtype == torch.float32
    assert query.grad.dtype == index_query.grad.dtype == torch.float32
    torch.testing.assert_close(output, dense, rtol=2e-2, atol=2e-2)
    wide = (query, key, value, index_query, index_key)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in wide]
    outside = attend(*narrow[:3], selection, layout)[0], align(*narrow[:2], *narrow[3:], selection, layout)
    assert torch.equal(output, outside[0])
    assert torch.equal(loss, outside[1])
    assert torch.equal(last, attend(narrow[0][:, :, -1:], *narrow[1:3], one, Layout.plain(2, 1, 37))[0])
    assert torch.equal(chosen.blocks, index_select(*narrow[3:], layout, FixedBudget(blocks=2), block_size=8).blocks)
    (outside[0].float().sum() + outside[1]).backward()
    for tensor, other in zip(wide, narrow, strict=True):
        assert torch.equal(tensor.grad, other.grad.float())


def test_two_runs_are_bitwise_the_same(tensors):
    layout = LAYOUTS["packed"]
    inputs = tensors(layout, dtype=torch.float32)
    selection = some_blocks(layout, 2, 4)
    assert_same(run(inputs, selection, layout), run(inputs, selection, layout), rtol=0, atol=0)


# Which implementation runs


def test_the_cpu_runs_torch_and_says_why(monkeypatch):
    assert backend.blocksparse_implementation("cpu") == backend.Decision("torch", "Triton has no cpu backend")
    monkeypatch.setenv("SPARSORT_BLOCKSPARSE", "torch")
    assert backend.blocksparse_implementation("cuda") == backend.Decision("torch", "SPARSORT_BLOCKSPARSE=torch")
    # Each has its own variable.
    monkeypatch.setenv("SPARSORT_SPARSITY", "nonsense")
    assert backend.blocksparse_implementation("cpu").value == "torch"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_answers_as_torch_does(monkeypatch, tensors, normal):
    # On a GPU, or in Triton's interpreter: the kernels' own tests try more than that they are wired up.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = Layout.from_padding(torch.tensor([[0] * 3 + [1] * 16, [1] * 18 + [0]]), 19)
    inputs = [tensor.to(device) for tensor in tensors(layout, D=16, width=16, dtype=torch.float32)]
    selection = some_blocks(layout, 2, 16)
    bias = normal(*selection.blocks.shape).to(device)
    selection = Selection(blocks=selection.blocks.to(device), block_size=16)
    budget = FixedBudget(blocks=2)
    made = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("SPARSORT_BLOCKSPARSE", name)
        made[name] = run(inputs, selection, layout, bias)
        made[name]["blocks"] = index_select(*inputs[3:], layout, budget, block_size=16).blocks
    assert_same(made["triton"], made["torch"], rtol=1e-4, atol=1e-5)


# torch's own, where it goes back to Python in the middle of a function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_goes_around_the_operations(tensors):
    layout = Layout.plain(2, 13)
    inputs = [tensor.requires_grad_() for tensor in tensors(layout, dtype=torch.float32)]

    def step(query, key, value, index_query, index_key):
        selection = index_select(index_query, index_key, layout, FixedBudget(blocks=2), block_size=4)
        output, lse = attend(query, key, value, selection, layout)
        return output.square().sum() + align(query, key, index_query, index_key, selection, layout, lse=lse)

    expected = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, backend="aot_eager")
    for mine, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
