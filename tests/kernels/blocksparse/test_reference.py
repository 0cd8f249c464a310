"""The reference against plain Python loops over tokens, dense attention, its own gradients' formula, and itself padded."""

from __future__ import annotations

import math

import pytest
import torch
from selections import check_blocks
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from sparsort.kernels.blocksparse import reference
from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget, choose
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.selection import Selection, every_block

LAYOUTS = {
    "plain": Layout.plain(2, 7),
    "left": Layout.from_padding(torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]), 7),
    "right": Layout.from_padding(torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]), 7),
    "packed": Layout.from_lengths([[3, 1, 2], [5]], 7),
    "cache": Layout.from_padding(torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]), 2, keys=8),
    # A row that holds a sequence's queries at other columns than its keys.
    "apart": Layout(spans=(Span(row=0, query_start=1, queries=3, key_start=2, keys=5),), batch=1, queries=5, keys=8),
}
BUDGETS = [FixedBudget(blocks=2), ThresholdBudget(threshold=0.3, most=3), TopPBudget(p=0.6, most=9)]


@pytest.fixture
def tensors(normal):
    """Query, key, value, index query, index key of a layout, in float64."""

    def make(layout, H=4, G=2, D=3, width=2):
        B, T, S = layout.batch, layout.queries, layout.keys
        shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, D), (B, G, T, width), (B, S, width)]
        return [normal(*shape, dtype=torch.float64) for shape in shapes]

    return make


def some_blocks(layout, G, size, seed=0):
    """A random selection with unused slots anywhere, and some queries that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    blocks = every_block(layout, G, size).blocks.clone()
    blocks[torch.rand(blocks.shape, generator=generator) < 0.4] = -1
    order = torch.rand(blocks.shape, generator=generator).argsort(-1)
    return Selection(blocks=blocks.gather(-1, order), block_size=size)


def plain_queries(layout):
    """(row, query column, position, key column of position 0) of every query token."""
    for span in layout.spans:
        for i in range(span.queries):
            yield span.row, span.query_start + i, span.keys - span.queries + i, span.key_start


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def plain_softmax(logits):
    """Of a dictionary, with its log-sum-exp."""
    if not logits:
        return {}, -math.inf
    total = math.log(sum(math.exp(value) for value in logits.values()))
    return {s: math.exp(value - total) for s, value in logits.items()}, total


def plain_attention(query, key, value, index_query, index_key, selection, layout, scale, index_scale, bias=None):
    """Output, log-sum-exp and KL rows by loops over tokens, heads and keys."""
    B, H, T, _ = query.shape
    G = key.shape[1]
    output, lse = torch.zeros_like(query), torch.full((B, H, T), -math.inf, dtype=query.dtype)
    rows = torch.zeros(B, G, T, dtype=query.dtype)
    for b, t, position, first in plain_queries(layout):
        for g in range(G):
            slots = {int(block): k for k, block in enumerate(selection.blocks[b, g, t]) if block >= 0}
            seen = [first + p for p in range(position + 1) if p // selection.block_size in slots]
            heads = []
            for h in range(g * H // G, (g + 1) * H // G):
                logits = {s: dot(query[b, h, t], key[b, g, s]) * scale for s in seen}
                heads.append(plain_softmax(logits)[0])
                if bias is not None:
                    for s in seen:
                        logits[s] += float(bias[b, g, t, slots[(s - first) // selection.block_size]])
                weights, lse[b, h, t] = plain_softmax(logits)
                for s in seen:
                    output[b, h, t] += weights[s] * value[b, g, s]
            student, _ = plain_softmax({s: dot(index_query[b, g, t], index_key[b, s]) * index_scale for s in seen})
            for s in seen:
                P = sum(weights[s] for weights in heads) / len(heads)
                rows[b, g, t] += P * (math.log(P) - math.log(student[s]))
    return output, lse, rows


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("H", "G", "size"), [(4, 2, 2), (3, 1, 3), (2, 2, 16), (5, 1, 1)])
def test_attention_and_alignment_equal_plain_loops(name, H, G, size, tensors, normal):
    layout = LAYOUTS[name]
    query, key, value, index_query, index_key = tensors(layout, H, G)
    selection = some_blocks(layout, G, size)
    check_blocks(selection, layout)
    bias = normal(*selection.blocks.shape, dtype=torch.float64)
    for slot_bias in (None, bias):
        output, lse, rows = plain_attention(
            query, key, value, index_query, index_key, selection, layout, 0.7, 1.3, slot_bias
        )
        found = reference.attend_ref(query, key, value, selection, layout, scale=0.7, bias=slot_bias)
        torch.testing.assert_close(found[0], output)
        torch.testing.assert_close(found[1], lse)
    found = reference.align_ref(query, key, index_query, index_key, selection, layout, scale=0.7, index_scale=1.3)
    torch.testing.assert_close(found, rows)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: type(budget).__name__)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_selection_equals_plain_loops(name, budget, size, tensors):
    layout = LAYOUTS[name]
    *_, index_query, index_key = tensors(layout)
    selection = reference.index_select_ref(index_query, index_key, layout, budget, block_size=size, scale=1.3)
    check_blocks(selection, layout)
    slots = min(budget.slots, layout.blocks(size))
    expected = torch.full((layout.batch, 2, layout.queries, slots), -1, dtype=torch.int32)
    for b, t, position, first in plain_queries(layout):
        for g in range(2):
            scores = [1.3 * dot(index_query[b, g, t], index_key[b, first + p]) for p in range(position + 1)]
            pooled = [max(scores[n : n + size]) for n in range(0, len(scores), size)]
            found = choose(torch.tensor([pooled], dtype=torch.float64), torch.tensor([len(pooled) - 1]), budget)[0]
            expected[b, g, t, : len(found)] = found
    assert selection.blocks.tolist() == expected.tolist()


def test_msa_by_hand():
    # Scores of the last token: 1 3 | 2 0 | 5; blocks 3, 2, and its own.
    index_key = torch.tensor([[[1.0], [3.0], [2.0], [0.0], [5.0]]])
    index_query = torch.ones(1, 1, 5, 1)
    layout = Layout.plain(1, 5)
    made = reference.index_select_ref(index_query, index_key, layout, FixedBudget(blocks=2), block_size=2, scale=1.0)
    assert made.blocks[0, 0].tolist() == [[0, -1], [0, -1], [1, 0], [1, 0], [2, 0]]
    # The one head's attention is even over keys 0, 1 and 4, and the student's is that of scores 1, 3, 5.
    zero = torch.zeros(1, 1, 5, 1)
    output, lse = reference.attend_ref(zero, zero, index_key[:, None], made, layout, scale=1.0)
    assert output[0, 0, 4].item() == pytest.approx(3.0)
    assert lse[0, 0, 4].item() == pytest.approx(math.log(3))
    rows = reference.align_ref(zero, zero, index_query, index_key, made, layout, scale=1.0, index_scale=1.0)
    total = math.log(math.exp(1) + math.exp(3) + math.exp(5))
    assert rows[0, 0, 4].item() == pytest.approx(math.log(1 / 3) - (1 + 3 + 5) / 3 + total, abs=1e-6)


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (6, 1)])
def test_every_block_is_dense_attention(H, G, tensors):
    layout = Layout.plain(2, 7)
    query, key, value, *_ = tensors(layout, H, G)
    output, lse = reference.attend_ref(query, key, value, every_block(layout, G, 3), layout, scale=3**-0.5)
    dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, dense)
    logits = query @ key.repeat_interleave(H // G, 1).mT * 3**-0.5
    torch.testing.assert_close(lse, logits.masked_fill(~torch.ones(7, 7).tril().bool(), -math.inf).logsumexp(-1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_finite_differences(name, tensors, normal):
    layout = LAYOUTS[name]
    inputs = [tensor.requires_grad_() for tensor in tensors(layout, D=2)]
    query, key, value, index_query, index_key = inputs
    selection = some_blocks(layout, 2, 2)
    bias = normal(*selection.blocks.shape, dtype=torch.float64).requires_grad_()

    def attend(query, key, value, bias):
        return reference.attend_ref(query, key, value, selection, layout, scale=0.7, bias=bias)[0]

    def align(index_query, index_key):
        return reference.align_ref(query, key, index_query, index_key, selection, layout, scale=0.7, index_scale=1.3)

    assert gradcheck(attend, (query, key, value, bias))
    assert gradcheck(align, (index_query, index_key))
    # The loss is of the selector alone.
    rows = align(index_query, index_key).sum()
    assert torch.autograd.grad(rows, (query, key), allow_unused=True, retain_graph=True) == (None, None)


@pytest.mark.parametrize("warm_up", [False, True], ids=["selected", "full"])
def test_the_gradient_of_alignment_is_student_minus_teacher(warm_up, tensors):
    layout = LAYOUTS["left"]
    query, key, _, index_query, index_key = tensors(layout)
    selection = every_block(layout, 2, 2) if warm_up else some_blocks(layout, 2, 2)
    index_query.requires_grad_()
    rows = reference.align_ref(query, key, index_query, index_key, selection, layout, scale=0.7, index_scale=1.3)
    rows.sum().backward()
    attended, _ = reference.support(selection, layout)
    student = reference.index_scores(index_query.detach(), index_key, layout, scale=1.3)
    student = student.masked_fill(~attended, -math.inf).softmax(-1).nan_to_num(0.0)
    error = student - reference.teacher(query, key, selection, layout, scale=0.7)
    torch.testing.assert_close(index_query.grad, 1.3 * torch.einsum("bgts,bsi->bgti", error, index_key))


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: type(budget).__name__)
def test_padding_on_either_side_or_none_and_packing_agree(budget, tensors):
    plain = Layout.plain(1, 5)
    inputs = tensors(plain)
    expected = run(inputs, plain, budget)
    for before, after in ((2, 0), (0, 2), (1, 3)):
        mask = torch.tensor([[0] * before + [1] * 5 + [0] * after])
        layout = Layout.from_padding(mask, 5 + before + after)
        padded = [pad(tensor, before, after) for tensor in inputs]
        found = run(padded, layout, budget)
        for name, tensor in expected.items():
            axis = 1 if name == "d_index_key" else 2
            torch.testing.assert_close(found[name].narrow(axis, before, 5), tensor, msg=lambda m, n=name: f"{n}: {m}")
            rest = torch.cat([found[name].narrow(axis, 0, before), found[name].narrow(axis, before + 5, after)], axis)
            empty = {"blocks": -1, "lse": -math.inf}.get(name, 0)
            assert (rest == empty).all(), name
    # Two sequences in a row do not see each other.
    twice = [torch.cat([tensor, tensor], 1 if tensor.ndim == 3 else 2) for tensor in inputs]
    found = run(twice, Layout.from_lengths([[5, 5]]), budget)
    for name, tensor in expected.items():
        axis = 1 if name == "d_index_key" else 2
        for start in (0, 5):
            torch.testing.assert_close(found[name].narrow(axis, start, 5), tensor)


def pad(tensor, before, after):
    """Along the tokens, with NaN: it must reach nothing."""
    axis = 1 if tensor.ndim == 3 else 2
    shape = [list(tensor.shape) for _ in range(2)]
    shape[0][axis], shape[1][axis] = before, after
    return torch.cat([tensor.new_full(shape[0], math.nan), tensor, tensor.new_full(shape[1], math.nan)], axis)


def run(tensors, layout, budget):
    """Everything that comes out, forward and backward."""
    query, key, value, index_query, index_key = inputs = [
        tensor.detach().clone().requires_grad_() for tensor in tensors
    ]
    selection = reference.index_select_ref(index_query, index_key, layout, budget, block_size=2, scale=1.0)
    output, lse = reference.attend_ref(query, key, value, selection, layout, scale=0.7)
    rows = reference.align_ref(query, key, index_query, index_key, selection, layout, scale=0.7, index_scale=1.0)
    (output.square().sum() + rows.sum()).backward()
    gradients = dict(zip(("d_query", "d_key", "d_value", "d_index_query", "d_index_key"), inputs, strict=True))
    made = {"blocks": selection.blocks, "output": output.detach(), "lse": lse, "rows": rows.detach()}
    return made | {name: tensor.grad for name, tensor in gradients.items()}


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_index_scores_that_are_no_numbers_are_the_lowest(bad):
    # Blocks of 2: nothing but such scores, one of them, none. One does not hide the other token's.
    index_key = torch.tensor([[[bad], [bad], [bad], [-8.0], [-9.0], [-9.5], [0.0], [bad]]])
    layout, budget = Layout.plain(1, 8), FixedBudget(blocks=3)
    made = reference.index_select_ref(torch.ones(1, 1, 8, 1), index_key, layout, budget, block_size=2, scale=1.0)
    assert made.blocks[0, 0, 1::2].tolist() == [[0, -1, -1], [1, 0, -1], [2, 1, 0], [3, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(dtype, tensors):
    layout = LAYOUTS["packed"]
    narrow = [tensor.to(dtype) for tensor in tensors(layout)]
    selection = some_blocks(layout, 2, 2)
    output, lse = reference.attend_ref(*narrow[:3], selection, layout, scale=0.7)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    wide = [tensor.double() for tensor in narrow]
    exact, exact_lse = reference.attend_ref(*wide[:3], selection, layout, scale=0.7)
    torch.testing.assert_close(output, exact.to(dtype))
    torch.testing.assert_close(lse, exact_lse.float())


def test_a_bias_of_minus_infinity_hides_its_slot(tensors, normal):
    layout = LAYOUTS["packed"]
    query, key, value, *_ = tensors(layout)
    selection = every_block(layout, 2, 2)
    bias = normal(*selection.blocks.shape, dtype=torch.float64)
    bias[:, :, ::2, 0] = -torch.inf
    # The last tokens of the first sequence of row 0 keep no slot at all.
    bias[0, 1, 1:3] = -torch.inf
    bias.requires_grad_()
    query.requires_grad_()
    without = Selection(blocks=selection.blocks.masked_fill(bias == -torch.inf, -1), block_size=2)
    found = reference.attend_ref(query, key, value, selection, layout, scale=0.7, bias=bias)
    expected = reference.attend_ref(
        query, key, value, without, layout, scale=0.7, bias=bias.masked_fill(bias == -torch.inf, 0.0)
    )
    for made, known in zip(found, expected, strict=True):
        assert torch.equal(made, known)
    assert found[0][0, 2:, 1:3].count_nonzero() == 0
    assert (found[1][0, 2:, 1:3] == -torch.inf).all()
    for made, known in zip(
        torch.autograd.grad(found[0].square().sum(), (query, bias)),
        torch.autograd.grad(expected[0].square().sum(), (query, bias)),
        strict=True,
    ):
        torch.testing.assert_close(made, known, rtol=1e-12, atol=1e-12)
