"""Each selector against a second implementation of its definition, token by token, on a module made for the purpose."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsort.attention.attach import make_selector
from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors.base import LayerInputs, Selector
from sparsort.attention.selectors.fixed import hashed
from sparsort.attention.selectors.index_branch import IndexBranch, apply_rotary
from sparsort.kernels.blocksparse.budgets import Budget, FixedBudget, ThresholdBudget
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.ops import attend
from sparsort.kernels.blocksparse.reference import align_ref, attend_ref, index_select_ref

C, H, G, D, W, T = 12, 4, 2, 6, 4, 14
R = H // G


class Attention(nn.Module):
    """What a selector reads of an attention module, and no more."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=C, num_attention_heads=H, num_key_value_heads=G)
        self.layer_idx, self.head_dim = 3, D
        for name, heads in (("q_proj", H), ("k_proj", G), ("v_proj", G)):
            linear = nn.Linear(C, heads * D, bias=False, device="meta")
            weight = torch.randn(heads * D, C, dtype=torch.float64, generator=generator)
            linear.weight = nn.Parameter(weight / C**0.5)
            setattr(self, name, linear)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _draw(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _inputs(generator: torch.Generator, budget: Budget, *, full: bool = False) -> LayerInputs:
    """One sequence; queries, keys and values of no connection to the hidden states, with larger logits than 0.02 makes."""
    return LayerInputs(
        module=Attention(generator),
        hidden=_draw(generator, 1, T, C),
        rotary=None,
        query=2 * _draw(generator, 1, H, T, D),
        key=_draw(generator, 1, G, T, D),
        value=_draw(generator, 1, G, T, D),
        layout=Layout.plain(1, T),
        scale=0.4,
        full=full,
        budget=budget,
    )


def _made(inputs: LayerInputs, name: Any, **fields: Any) -> Any:
    selector = make_selector(inputs.module, SparseAttentionConfig(selector=name, block_size=W, **fields))
    return selector.double()


def _chosen(selector: Selector, inputs: LayerInputs) -> list[list[set[int]]]:
    """[group][token], as sets."""
    index_keys = selector.index_keys(inputs.module, inputs.hidden, inputs.rotary)
    blocks = selector.choose(inputs, index_keys).selection.blocks[0]
    return [[set(row) - {-1} for row in group] for group in blocks.tolist()]


def _best(scores: dict[int, float], own: int, blocks: int) -> set[int]:
    others = sorted((n for n in scores if n != own), key=lambda n: (-scores[n], n))
    return {own, *others[: blocks - 1]}


def _pieces(t: int) -> list[range]:
    """The visible positions of each block that t sees."""
    return [range(start, min(start + W, t + 1)) for start in range(0, t + 1, W)]


# The index branch


@pytest.mark.parametrize("index_norm", [True, False])
def test_the_index_branch_is_the_reference_on_its_projections(generator: torch.Generator, index_norm: bool) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=2))
    branch = _made(inputs, "index_branch", index_dim=8, index_norm=index_norm)
    query = (inputs.hidden @ branch.query_proj.weight.mT).reshape(1, T, G, 8).transpose(1, 2)
    key = inputs.hidden @ branch.key_proj.weight.mT
    if index_norm:
        query, key = (functional.rms_norm(states, (8,), eps=1e-6) for states in (query, key))
    index_keys = branch.index_keys(inputs.module, inputs.hidden, None)
    choice = branch.choose(inputs, index_keys)
    scale = 8**-0.5
    expected = index_select_ref(query, key, inputs.layout, inputs.budget, block_size=W, scale=scale)
    assert choice.selection.blocks.sort().values.tolist() == expected.blocks.sort().values.tolist()
    _, lse = attend(inputs.query, inputs.key, inputs.value, expected, inputs.layout, scale=inputs.scale)
    loss = branch.loss(inputs, index_keys, choice, lse)
    rows = align_ref(
        inputs.query, inputs.key, query, key, expected, inputs.layout, scale=inputs.scale, index_scale=scale
    )
    torch.testing.assert_close(loss, rows.mean())
    found = torch.autograd.grad(loss, (branch.query_proj.weight, branch.key_proj.weight))
    wanted = torch.autograd.grad(rows.mean(), (branch.query_proj.weight, branch.key_proj.weight))
    torch.testing.assert_close(found, wanted)


def test_the_index_branch_selects_what_transformers_own_does() -> None:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as theirs

    tokens, blocks = 45, 3
    config = SimpleNamespace(
        index_head_dim=16, index_n_heads=2, index_block_size=W, index_topk_blocks=blocks, index_local_blocks=1,
        hidden_size=C, rms_norm_eps=1e-6, num_attention_heads=H, num_key_value_heads=G, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        indexer = theirs.MiniMaxM3VLIndexer(config, 0).double()
    generator = torch.Generator().manual_seed(3)
    module = Attention(generator)
    module.config = config  # type: ignore[assignment]
    fields = {"block_size": W, "blocks": blocks, "index_dim": 16}
    branch = make_selector(module, SparseAttentionConfig(**fields)).double()  # type: ignore[arg-type]
    assert isinstance(branch, IndexBranch)
    with torch.no_grad():
        indexer.q_proj.weight.copy_(branch.query_proj.weight)
        indexer.k_proj.weight.copy_(branch.key_proj.weight)
    places = torch.arange(tokens)[None]
    # Partial rotary embedding: 8 of the 16 coordinates.
    angles = places[..., None].double() * 10_000.0 ** (-torch.arange(4) / 4)
    rotary = (torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin())
    hidden = _draw(generator, 1, tokens, C)
    expected = indexer(hidden, rotary, None, places)[0]
    inputs = LayerInputs(
        module=module, hidden=hidden, rotary=rotary, query=_draw(generator, 1, H, tokens, D),
        key=_draw(generator, 1, G, tokens, D), value=_draw(generator, 1, G, tokens, D),
        layout=Layout.plain(1, tokens), scale=1.0, full=False, budget=FixedBudget(blocks=blocks),
    )  # fmt: skip
    wanted = [[set(row) - {-1} for row in group] for group in expected.tolist()]
    assert _chosen(branch, inputs) == wanted


def _table(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Llama's cosines and sines."""
    angles = places[:, None] * 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    both = torch.cat([angles, angles], dim=-1)[None]
    return both.cos(), both.sin()


@pytest.mark.parametrize(("width", "table"), [(8, 8), (8, 16), (8, 32), (12, 8), (6, 8), (2, 8)])
def test_rotary_embedding_keeps_lengths_and_products_at_equal_distance(
    generator: torch.Generator, width: int, table: int
) -> None:
    places = torch.arange(40, dtype=torch.float64)
    states = _draw(generator, 1, 2, 1, width)
    turned = apply_rotary(states.expand(1, 2, 40, width), _table(places, table))
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1).expand(1, 2, 40))
    products = turned[0, 0] @ turned[0, 1].mT
    for distance in range(-20, 20, 3):
        found = products.diagonal(distance)
        torch.testing.assert_close(found, found[:1].expand_as(found))
    assert (products[0] - products[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("table", [8, 16, 32])
def test_rotary_embedding_of_narrow_states_uses_a_table_of_their_width(generator: torch.Generator, table: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    places = torch.arange(40, dtype=torch.float64)
    states = _draw(generator, 1, 3, 40, 8)
    expected, _ = apply_rotary_pos_emb(states, states, *_table(places, 8))
    torch.testing.assert_close(apply_rotary(states, _table(places, table)), expected)


# MoBA


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_moba_takes_the_blocks_of_the_best_mean_keys(generator: torch.Generator, blocks: int) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=blocks))
    found = _chosen(_made(inputs, "moba"), inputs)
    for g in range(G):
        query = inputs.query[0, g * R : (g + 1) * R].sum(0)
        for t in range(T):
            means = [inputs.key[0, g, piece.start : piece.stop].mean(0) for piece in _pieces(t)]
            scores = {n: float(query[t] @ mean) for n, mean in enumerate(means)}
            assert found[g][t] == _best(scores, t // W, blocks)


def test_moba_shares_a_threshold_over_what_is_visible(generator: torch.Generator) -> None:
    inputs = _inputs(generator, ThresholdBudget(threshold=0.3, most=4))
    found = _chosen(_made(inputs, "moba"), inputs)
    for g in range(G):
        query = inputs.query[0, g * R : (g + 1) * R].mean(0) * inputs.scale
        for t in range(T):
            means = torch.stack([inputs.key[0, g, piece.start : piece.stop].mean(0) for piece in _pieces(t)])
            shares = (means @ query[t]).softmax(0)
            assert found[g][t] == {t // W, *(shares >= 0.3).nonzero().flatten().tolist()}


# SeerAttention


def _seer(gate: Any, inputs: LayerInputs) -> tuple[list[list[Tensor]], Tensor]:
    """Scores [group][token] over the visible blocks, and the loss."""
    hidden, module, width = inputs.hidden[0], inputs.module, gate.width
    queries = (hidden @ module.q_proj.weight.mT).reshape(T, H, D).detach()  # type: ignore[operator, union-attr]
    keys = (hidden @ module.k_proj.weight.mT).reshape(T, G, D).detach()  # type: ignore[operator, union-attr]

    def turned(states: Tensor, place: int) -> Tensor:
        pairs = torch.view_as_complex(torch.stack([states[: width // 2], states[width // 2 :]], dim=-1))
        angles = place * 10_000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])

    scores, losses = [], []
    for g in range(G):
        scores.append([])
        for t in range(T):
            query = turned(gate.query_weight[g] @ queries[t, g * R : (g + 1) * R].flatten(), t // W)
            row = []
            for n, piece in enumerate(_pieces(t)):
                held = keys[piece.start : piece.stop, g]
                pooled = torch.cat([held.amax(0), held.amin(0), held.mean(0)])
                row.append(query @ turned(gate.key_weight[g] @ pooled, n) / math.sqrt(width))
            scores[g].append(torch.stack(row))
            truth = torch.zeros(len(row), dtype=torch.float64)
            for h in range(g * R, (g + 1) * R):
                attention = (inputs.key[0, g, : t + 1] @ inputs.query[0, h, t] * inputs.scale).softmax(0)
                truth += torch.stack([attention[piece.start : piece.stop].max() for piece in _pieces(t)]) / R
            truth = truth / truth.sum()
            losses.append((truth * (truth.log() - scores[g][t].log_softmax(0))).sum())
    return scores, torch.stack(losses).mean()


@pytest.mark.parametrize("index_dim", [None, 4])
def test_seer_scores_and_learns_as_defined(generator: torch.Generator, index_dim: int | None) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=2))
    gate = _made(inputs, "seer", index_dim=index_dim)
    scores, expected = _seer(gate, inputs)
    found = _chosen(gate, inputs)
    for g in range(G):
        for t in range(T):
            assert found[g][t] == _best(dict(enumerate(scores[g][t].tolist())), t // W, 2)
    index_keys = gate.index_keys(inputs.module, inputs.hidden, None)
    choice = gate.choose(inputs, index_keys)
    loss = gate.loss(inputs, index_keys, choice, torch.zeros(()))
    torch.testing.assert_close(loss, expected)
    weights = (gate.query_weight, gate.key_weight)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, weights), torch.autograd.grad(3 * expected, weights))


# NSA


def test_nsa_selects_and_mixes_as_defined(generator: torch.Generator) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=2))
    selector = _made(inputs, "nsa", blocks=3)
    with torch.no_grad():
        # So that φ is more than a mean.
        for compression in (selector.key_compression, selector.value_compression):
            compression.down.weight.copy_(_draw(generator, D, D))
            compression.place.copy_(_draw(generator, W, D))
    found = _chosen(selector, inputs)
    choice = selector.choose(inputs, None)
    output, _ = attend(inputs.query, inputs.key, inputs.value, choice.selection, inputs.layout, scale=inputs.scale)
    mixed = selector.mix(inputs, None, choice, output)

    def compressed(compression: Any, states: Tensor) -> Tensor:
        up, down = compression.up, compression.down
        blocks = [states[start : start + W] for start in range(0, T - W + 1, W)]
        made = [
            functional.gelu((block + compression.place) @ up.weight.mT + up.bias) @ down.weight.mT for block in blocks
        ]
        return torch.stack([block.mean(0) + more.mean(0) for block, more in zip(blocks, made, strict=True)])

    gates = (inputs.hidden[0] @ selector.gates.weight.mT + selector.gates.bias).sigmoid().reshape(T, H, 3)
    for g in range(G):
        keys = compressed(selector.key_compression, inputs.key[0, g])
        values = compressed(selector.value_compression, inputs.value[0, g])
        for t in range(T):
            whole, own = (t + 1) // W, t // W
            shares = torch.zeros(whole, dtype=torch.float64)
            for h in range(g * R, (g + 1) * R):
                probabilities = (keys[:whole] @ inputs.query[0, h, t] * inputs.scale).softmax(0)
                shares += probabilities.detach()
                near = slice(max(0, own - 1) * W, t + 1)
                slid = (inputs.key[0, g, near] @ inputs.query[0, h, t] * inputs.scale).softmax(0)
                parts = torch.stack([probabilities @ values[:whole], output[0, h, t], slid @ inputs.value[0, g, near]])
                torch.testing.assert_close(mixed[0, h, t], gates[t, h] @ parts)
            assert found[g][t] == _best(dict(enumerate(shares.tolist())), own, 2)


def test_the_lm_loss_trains_every_part_of_nsa(generator: torch.Generator) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=2))
    selector = _made(inputs, "nsa", blocks=3)
    choice = selector.choose(inputs, None)
    output, _ = attend(inputs.query, inputs.key, inputs.value, choice.selection, inputs.layout, scale=inputs.scale)
    selector.mix(inputs, None, choice, output).square().sum().backward()
    # The MLP's first layer and its places come alive once its last layer is no longer 0.
    still = {name for name, weight in selector.named_parameters() if not weight.grad.any()}
    assert still == {
        f"{of}_compression.{name}" for of in ("key", "value") for name in ("place", "up.weight", "up.bias")
    }


# The selector that the LM loss teaches


@pytest.mark.parametrize("full", [False, True])
def test_the_lm_trained_branch_has_the_gradient_of_its_scores_in_the_logits(
    generator: torch.Generator, full: bool
) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=2), full=full)
    branch = _made(inputs, "lm_trained")
    weights = (branch.query_proj.weight, branch.key_proj.weight, branch.query_norm.weight, branch.key_norm.weight)
    index_keys = branch.index_keys(inputs.module, inputs.hidden, None)
    choice = branch.choose(inputs, index_keys)
    sizes = _draw(generator, 1, H, T, D)
    run = {"scale": inputs.scale}
    output, _ = attend(inputs.query, inputs.key, inputs.value, choice.selection, inputs.layout, bias=choice.bias, **run)
    bare, _ = attend(inputs.query, inputs.key, inputs.value, choice.selection, inputs.layout, **run)
    assert not choice.bias.any()
    torch.testing.assert_close(output, bare)
    found = torch.autograd.grad((output * sizes).sum(), weights, retain_graph=True)
    # The same by autograd: every block's score by a maximum over its visible keys, and s − sg(s) in the dense reference.
    queries = branch.index_queries(inputs)
    blocks = choice.selection.blocks
    rows = []
    for g in range(G):
        for t in range(T):
            products = index_keys[0] @ queries[0, g, t] / math.sqrt(D)
            best = torch.stack([products[piece.start : piece.stop].max() for piece in _pieces(t)])
            rows.append(best[blocks[0, g, t].long().clamp(min=0)])
    scores = torch.stack(rows).reshape(1, G, T, -1)
    bias = scores - scores.detach()
    output, _ = attend_ref(inputs.query, inputs.key, inputs.value, choice.selection, inputs.layout, bias=bias, **run)
    expected = torch.autograd.grad((output * sizes).sum(), weights)
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_without_gradients_there_is_no_bias(generator: torch.Generator) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=2))
    branch = _made(inputs, "lm_trained")
    with torch.no_grad():
        choice = branch.choose(inputs, branch.index_keys(inputs.module, inputs.hidden, None))
    assert choice.bias is None


# Plain ones


@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
def test_a_window_selects_the_last_blocks(generator: torch.Generator, blocks: int) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=blocks))
    last = [set(range(max(0, t // W - blocks + 1), t // W + 1)) for t in range(T)]
    assert _chosen(_made(inputs, "window"), inputs) == [last] * G
    with_first = [{0, *sorted(row)[-(blocks - 1) :]} if blocks > 1 and len(row) == blocks else row for row in last]
    assert _chosen(_made(inputs, "sink_window"), inputs) == [with_first] * G


def test_the_oracle_takes_the_blocks_with_most_attention(generator: torch.Generator) -> None:
    inputs = _inputs(generator, FixedBudget(blocks=2))
    shared = _inputs(torch.Generator().manual_seed(7), ThresholdBudget(threshold=0.2, most=4))
    found, above = _chosen(_made(inputs, "oracle"), inputs), _chosen(_made(shared, "oracle"), shared)
    for g in range(G):
        for t in range(T):
            mass = torch.zeros(t // W + 1, dtype=torch.float64)
            for h in range(g * R, (g + 1) * R):
                attention = (inputs.key[0, g, : t + 1] @ inputs.query[0, h, t] * inputs.scale).softmax(0)
                mass += torch.stack([attention[piece.start : piece.stop].sum() for piece in _pieces(t)]) / R
            assert found[g][t] == _best(dict(enumerate(mass.tolist())), t // W, 2)
            assert above[g][t] == {t // W, *(mass >= 0.2).nonzero().flatten().tolist()}


def _random(tokens: int, blocks: int, **fields: Any) -> Tensor:
    """How often each block was chosen by the queries that see 10 of them, (G, 10)."""
    generator = torch.Generator().manual_seed(0)
    inputs = LayerInputs(
        module=Attention(generator), hidden=torch.zeros(1, tokens, C), rotary=None,
        query=torch.zeros(1, H, tokens, D), key=torch.zeros(1, G, tokens, D), value=torch.zeros(1, G, tokens, D),
        layout=Layout.plain(1, tokens), scale=1.0, full=False, budget=FixedBudget(blocks=blocks),
    )  # fmt: skip
    config = SparseAttentionConfig(selector="random", block_size=tokens // 10, **fields)
    selection = make_selector(inputs.module, config).choose(inputs, None).selection
    return functional.one_hot(selection.blocks[0, :, -(tokens // 10) :].long(), 10).sum((1, 2))


def test_random_blocks_are_equally_likely_and_depend_on_the_seed() -> None:
    tokens, blocks = 20_000, 4
    counts = _random(tokens, blocks).double()
    trials, share = tokens // 10, (blocks - 1) / 9
    assert (counts[:, 9] == trials).all()
    # Hypergeometric: within 4.5 standard deviations, for 18 counts.
    assert ((counts[:, :9] - trials * share).abs() < 4.5 * (trials * share * (1 - share)) ** 0.5).all()
    assert not torch.equal(counts[0], counts[1])
    assert torch.equal(_random(tokens, blocks).double(), counts)
    assert not torch.equal(_random(tokens, blocks, seed=1).double(), counts)


def test_the_hash_flips_half_of_its_bits_for_any_bit_that_changes() -> None:
    numbers = torch.arange(4096)
    for bit in range(12):
        changed = hashed(5, numbers) ^ hashed(5, numbers ^ (1 << bit))
        flips = torch.stack([(changed >> place) & 1 for place in range(32)]).double().mean(1)
        assert flips.min() > 0.3
        assert flips.max() < 0.7
    assert hashed(5, numbers).unique().numel() == 4096
    assert int(hashed(5, numbers).max()) < 1 << 32
