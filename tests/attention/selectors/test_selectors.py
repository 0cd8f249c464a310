"""The contract of every selector: a valid selection for every budget, the same one wherever padding
is, however much is cached and however the work is cut up, and gradients only where they belong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from selections import check_blocks
from torch import Tensor, nn
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from sparsort.attention.attach import make_selector
from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors import SELECTORS, chunks, lm_trained
from sparsort.attention.selectors.base import BlockChoice, LayerInputs, Selector
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import Budget, FixedBudget, ThresholdBudget, TopPBudget
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.ops import attend
from sparsort.kernels.blocksparse.selection import every_block

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "intermediate_size": 8,
}
BLOCK = 4
LENGTHS = (19, 8, 1)
BUDGETS: dict[str, Budget] = {
    "fixed": FixedBudget(blocks=3),
    "threshold": ThresholdBudget(threshold=0.25, most=4),
    "top_p": TopPBudget(p=0.6, most=4),
}
LEARNED_BY_LOSS = ("index_branch", "seer")
LEARNED_BY_LM = ("nsa", "lm_trained")


@dataclasses.dataclass
class Layer:
    """An attention module of transformers, in float64, with its rotary embedding."""

    module: Any
    rotary: Any
    turn: Any

    def inputs(
        self, selector: Selector, hidden: Tensor, positions: Tensor, layout: Layout, budget: Budget, full: bool = False
    ) -> tuple[LayerInputs, Tensor | None]:
        """A pass over `hidden` (B, S, C), of which the last `layout.queries` columns are the queries."""
        module, S, T = self.module, hidden.shape[1], layout.queries
        rotary = self.rotary(hidden, positions)
        query, key, value = (
            getattr(module, f"{name}_proj")(hidden).unflatten(-1, (-1, module.head_dim)) for name in ("q", "k", "v")
        )
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = self.turn(query.transpose(1, 2), key.transpose(1, 2), *rotary)
        tables = (rotary[0][:, -T:], rotary[1][:, -T:])
        # Index keys as a cache has them: made in two passes.
        parts = [
            selector.index_keys(module, hidden[:, part], (rotary[0][:, part], rotary[1][:, part]))
            for part in (slice(0, S - T), slice(S - T, S))
        ]
        index_keys = None if parts[1] is None else torch.cat([part for part in parts if part is not None], dim=1)
        inputs = LayerInputs(
            module=module,
            hidden=hidden[:, -T:],
            rotary=tables,
            query=query[:, :, -T:],
            key=key,
            value=value.transpose(1, 2),
            layout=layout,
            scale=module.scaling,
            full=full,
            budget=budget,
        )
        return inputs, index_keys


@pytest.fixture(scope="module")
def layer() -> Layer:
    return _layer("qwen3")


def _layer(family: str) -> Layer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "qwen3":
            config = Qwen3Config(**SIZES)
            found = (modeling_qwen3.Qwen3Attention(config, 1), modeling_qwen3.Qwen3RotaryEmbedding(config))
            return Layer(found[0].double(), found[1], modeling_qwen3.apply_rotary_pos_emb)
        if family == "llama":
            config = LlamaConfig(**SIZES)
            found = (modeling_llama.LlamaAttention(config, 1), modeling_llama.LlamaRotaryEmbedding(config))
            return Layer(found[0].double(), found[1], modeling_llama.apply_rotary_pos_emb)
        config = Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 2)
        embedding = modeling_gemma3.Gemma3RotaryEmbedding(config)
        module = modeling_gemma3.Gemma3Attention(config, 1).double()
        return Layer(
            module, lambda x, places: embedding(x, places, "full_attention"), modeling_gemma3.apply_rotary_pos_emb
        )


def _selector(layer: Layer, name: Any, **fields: Any) -> Selector:
    return make_selector(layer.module, SparseAttentionConfig(selector=name, block_size=BLOCK, blocks=4, **fields))


def _sequences(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, SIZES["hidden_size"], dtype=torch.float64, generator=generator) for length in lengths]


def _laid_out(sequences: list[Tensor], how: str) -> tuple[Tensor, Tensor, Layout]:
    """Hidden states, positions and layout of sequences side by side."""
    lengths = [len(sequence) for sequence in sequences]
    if how == "packed":
        hidden = torch.cat(sequences)[None]
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        return hidden, places, Layout.from_lengths([lengths])
    longest = max(lengths) + 2
    hidden = torch.zeros(len(lengths), longest, sequences[0].shape[1], dtype=torch.float64)
    places = torch.zeros(len(lengths), longest, dtype=torch.long)
    spans = []
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if how == "left" else 0
        hidden[row, start : start + len(sequence)] = sequence
        places[row, start : start + len(sequence)] = torch.arange(len(sequence))
        span = {"query_start": start, "queries": len(sequence), "key_start": start, "keys": len(sequence)}
        spans.append(Span(row=row, **span))
    return hidden, places, Layout(spans=tuple(spans), batch=len(lengths), queries=longest, keys=longest)


def _with_garbage(inputs: LayerInputs, index_keys: Tensor | None) -> tuple[LayerInputs, Tensor | None]:
    """NaN wherever no token is."""
    layout = inputs.layout
    held = torch.zeros(layout.batch, layout.keys, dtype=torch.bool)
    for span in layout.spans:
        held[span.row, span.key_start : span.key_start + span.keys] = True
    asked = layout.span_of_query("cpu") >= 0
    inputs = dataclasses.replace(
        inputs,
        query=inputs.query.masked_fill(~asked[:, None, :, None], torch.nan),
        key=inputs.key.masked_fill(~held[:, None, :, None], torch.nan),
        value=inputs.value.masked_fill(~held[:, None, :, None], torch.nan),
    )
    return inputs, None if index_keys is None else index_keys.masked_fill(~held[..., None], torch.nan)


def _run(
    selector: Selector, inputs: LayerInputs, index_keys: Tensor | None
) -> tuple[BlockChoice, Tensor, Tensor | None]:
    choice = selector.choose(inputs, index_keys)
    output, lse = attend(
        inputs.query,
        inputs.key,
        inputs.value,
        choice.selection,
        inputs.layout,
        scale=inputs.scale,
        bias=choice.bias,
    )
    return choice, selector.mix(inputs, index_keys, choice, output), selector.loss(inputs, index_keys, choice, lse)


def _by_sequence(blocks: Tensor, layout: Layout) -> list[list[set[int]]]:
    """Of each sequence, group and token, the blocks as a set."""
    found = []
    for span in layout.spans:
        rows = blocks[span.row, :, span.query_start : span.query_start + span.queries].flatten(0, 1)
        found.append([set(row.tolist()) - {-1} for row in rows])
    return found


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_selection_has_only_blocks_that_its_queries_may_see(layer: Layer, name: str, budget: str) -> None:
    hidden, places, layout = _laid_out(_sequences(), "left")
    selector = _selector(layer, name)
    inputs, index_keys = layer.inputs(selector, hidden, places, layout, BUDGETS[budget])
    selection = selector.choose(inputs, index_keys).selection
    check_blocks(selection, layout)
    own = torch.div(layout.position("cpu"), BLOCK, rounding_mode="floor")[:, None]
    most = torch.minimum(own + 1, torch.tensor(BUDGETS[budget].slots))
    assert selection.blocks.shape == (3, 2, layout.queries, BUDGETS[budget].slots)
    assert ((selection.blocks == own[..., None]).any(-1) | (own < 0)).all()
    if budget == "fixed" or name in ("window", "sink_window", "random"):
        assert torch.equal(selection.counts, most.expand_as(selection.counts))
    else:
        assert (selection.counts <= most).all()


@pytest.mark.parametrize("budget", ["threshold", "top_p"])
@pytest.mark.parametrize("name", ["index_branch", "moba", "seer", "nsa", "oracle"])
def test_an_adaptive_budget_takes_more_for_some_queries_than_for_others(layer: Layer, name: str, budget: str) -> None:
    hidden, places, layout = _laid_out(_sequences((40,)), "right")
    selector = _selector(layer, name)
    inputs, index_keys = layer.inputs(selector, hidden, places, layout, BUDGETS[budget])
    inputs = dataclasses.replace(inputs, query=4 * inputs.query)
    counts = selector.choose(inputs, index_keys).selection.counts[0, :, 20:40]
    assert counts.unique().numel() > 1


@pytest.mark.parametrize("name", SELECTORS)
def test_warm_up_selects_every_block(layer: Layer, name: str) -> None:
    hidden, places, layout = _laid_out(_sequences(), "right")
    selector = _selector(layer, name)
    inputs, index_keys = layer.inputs(selector, hidden, places, layout, BUDGETS["fixed"], full=True)
    selection = selector.choose(inputs, index_keys).selection
    assert torch.equal(selection.blocks, every_block(layout, 2, BLOCK).blocks)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SELECTORS)
def test_padding_on_either_side_and_packing_agree_and_may_hold_nan(layer: Layer, name: str, budget: str) -> None:
    sequences = _sequences()
    selector = _selector(layer, name)
    expected: list[Any] = []
    total = 0.0
    for sequence in sequences:
        hidden, places = sequence[None], torch.arange(len(sequence))[None]
        inputs, index_keys = layer.inputs(selector, hidden, places, Layout.plain(1, len(sequence)), BUDGETS[budget])
        choice, output, loss = _run(selector, inputs, index_keys)
        expected.append((_by_sequence(choice.selection.blocks, inputs.layout)[0], output[0]))
        total += 0.0 if loss is None else loss.item() * len(sequence)
    for how in ("left", "right", "packed"):
        hidden, places, layout = _laid_out(sequences, how)
        inputs, index_keys = _with_garbage(*layer.inputs(selector, hidden, places, layout, BUDGETS[budget]))
        choice, output, loss = _run(selector, inputs, index_keys)
        assert _by_sequence(choice.selection.blocks, layout) == [blocks for blocks, _ in expected]
        for span, (_, alone) in zip(layout.spans, expected, strict=True):
            found = output[span.row, :, span.query_start : span.query_start + span.queries]
            torch.testing.assert_close(found, alone)
        if loss is not None:
            assert loss.item() == pytest.approx(total / sum(LENGTHS), rel=1e-9)


@pytest.mark.parametrize("name", LEARNED_BY_LOSS + LEARNED_BY_LM)
def test_what_is_learned_does_not_depend_on_padding(layer: Layer, name: str) -> None:
    sequences = _sequences()
    selector = _selector(layer, name)

    def learned(parts: list[Tensor], how: str) -> tuple[Tensor, ...]:
        hidden, places, layout = _laid_out(parts, how)
        inputs, index_keys = _with_garbage(*layer.inputs(selector, hidden, places, layout, BUDGETS["fixed"]))
        _, output, loss = _run(selector, inputs, index_keys)
        held = output.transpose(1, 2)[layout.span_of_query("cpu") >= 0]
        objective = held.square().sum() + (0 if loss is None else loss * layout.tokens)
        return torch.autograd.grad(objective, list(selector.parameters()))

    alone = [learned([sequence], "right") for sequence in sequences]
    expected = tuple(sum(parts, torch.zeros(())) for parts in zip(*alone, strict=True))
    for how in ("left", "right", "packed"):
        torch.testing.assert_close(learned(sequences, how), expected)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SELECTORS)
def test_cached_decoding_selects_and_answers_as_the_whole_pass(layer: Layer, name: str, budget: str) -> None:
    sequence = _sequences((19,))[0]
    selector = _selector(layer, name)
    hidden, places = sequence[None], torch.arange(19)[None]
    whole = layer.inputs(selector, hidden, places, Layout.plain(1, 19), BUDGETS[budget])
    choice, output, _ = _run(selector, *whole)
    expected = _by_sequence(choice.selection.blocks, whole[0].layout)[0]
    for queries in (1, 3):
        for seen in (queries, 4, 7, 8, 18, 19):
            start = seen - queries
            layout = Layout.plain(1, queries, seen)
            inputs, index_keys = layer.inputs(selector, hidden[:, :seen], places[:, :seen], layout, BUDGETS[budget])
            # A static cache is longer than what is filled, with anything in the rest.
            unfilled = {
                name: nn.functional.pad(getattr(inputs, name), (0, 0, 0, 6), value=torch.nan)
                for name in ("key", "value")
            }
            held = dataclasses.replace(layout.spans[0])
            layout = Layout(spans=(held,), batch=1, queries=queries, keys=seen + 6)
            inputs = dataclasses.replace(inputs, layout=layout, **unfilled)
            if index_keys is not None:
                index_keys = nn.functional.pad(index_keys, (0, 0, 0, 6), value=torch.nan)
            again, found, _ = _run(selector, inputs, index_keys)
            rows = _by_sequence(again.selection.blocks, layout)[0]
            assert rows == [expected[group * 19 + t] for group in range(2) for t in range(start, seen)]
            torch.testing.assert_close(found, output[:, :, start:seen])


@pytest.mark.parametrize("name", SELECTORS)
def test_dividing_the_queries_into_chunks_changes_nothing(
    layer: Layer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, places, layout = _laid_out(_sequences(), "left")
    selector = _selector(layer, name)

    def run() -> list[Tensor]:
        inputs, index_keys = layer.inputs(selector, hidden, places, layout, BUDGETS["top_p"])
        choice, output, loss = _run(selector, inputs, index_keys)
        weights = [weight for weight in selector.parameters() if weight.requires_grad]
        learned = (output.square().sum() if name in LEARNED_BY_LM else torch.zeros(())) + (0 if loss is None else loss)
        gradients = torch.autograd.grad(learned, weights) if weights else ()
        return [choice.selection.blocks, output, *gradients]

    whole = run()
    monkeypatch.setattr(chunks, "ELEMENTS", 400)
    monkeypatch.setattr(lm_trained, "ELEMENTS", 400)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", SELECTORS)
def test_gradients_go_where_they_belong(layer: Layer, name: str, full: bool) -> None:
    hidden, places, layout = _laid_out(_sequences(), "right")
    hidden.requires_grad_()
    selector = _selector(layer, name)
    inputs, index_keys = layer.inputs(selector, hidden, places, layout, BUDGETS["fixed"], full)
    choice, output, loss = _run(selector, inputs, index_keys)
    own = list(selector.parameters())
    others = [hidden, inputs.query, inputs.key, inputs.value, *layer.module.parameters()]
    assert bool(own) == (name in LEARNED_BY_LOSS + LEARNED_BY_LM)
    assert (loss is not None) == (name in LEARNED_BY_LOSS)
    by_lm = torch.autograd.grad(output.square().sum(), own, retain_graph=True, allow_unused=True) if own else ()
    assert all((gradient is not None) == (name in LEARNED_BY_LM) for gradient in by_lm)
    if loss is not None:
        assert loss > 0
        gradients = torch.autograd.grad(loss, [*own, *others], allow_unused=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients[: len(own)])
        assert all(gradient is None for gradient in gradients[len(own) :])
    if choice.bias is not None:
        assert not choice.bias.any()
        gradients = torch.autograd.grad(choice.bias.sum(), [*own, *others], allow_unused=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients[: len(own)])
        assert all(gradient is None for gradient in gradients[len(own) :])


@pytest.mark.parametrize("name", LEARNED_BY_LOSS)
def test_training_by_the_loss_lowers_it(layer: Layer, name: str) -> None:
    hidden, places, layout = _laid_out(_sequences((40, 33)), "left")
    selector = _selector(layer, name)
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        inputs, index_keys = layer.inputs(selector, 3 * hidden, places, layout, BUDGETS["fixed"], full=True)
        loss = _run(selector, inputs, index_keys)[2]
        assert loss is not None
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_joins_every_family_in_its_dtype(name: str, family: str) -> None:
    layer = _layer(family)
    hidden, places, layout = _laid_out(_sequences(), "left")
    layer.module.bfloat16()
    selector = _selector(layer, name)
    assert all(weight.dtype == torch.bfloat16 for weight in selector.parameters())
    inputs, index_keys = layer.inputs(selector, hidden.bfloat16(), places, layout, BUDGETS["fixed"])
    choice, output, loss = _run(selector, inputs, index_keys)
    check_blocks(choice.selection, layout)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert loss is None or loss.isfinite()


@pytest.mark.parametrize("name", LEARNED_BY_LOSS + LEARNED_BY_LM)
def test_initial_weights_depend_only_on_the_seed_and_the_layer(layer: Layer, name: str) -> None:
    def weights(**fields: Any) -> list[Tensor]:
        return [weight.detach().clone() for weight in _selector(layer, name, **fields).parameters()]

    first, again, other_seed = weights(), weights(), weights(seed=1)
    layer.module.layer_idx = 0
    other_layer = weights()
    layer.module.layer_idx = 1
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(first, other_seed, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(first, other_layer, strict=True))


@pytest.mark.parametrize("name", SELECTORS)
def test_a_layer_without_data_gives_a_selector_without_data(name: str) -> None:
    with torch.device("meta"):
        module = modeling_llama.LlamaAttention(LlamaConfig(**SIZES), 0)
    selector = make_selector(module, SparseAttentionConfig(selector=name))  # type: ignore[arg-type]
    assert all(weight.is_meta for weight in selector.parameters())


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 5]])
def test_a_batch_without_tokens_selects_nothing(layer: Layer, name: str, lengths: list[int]) -> None:
    layout = Layout.from_lengths([[length] for length in lengths], columns=5)
    hidden = torch.ones(len(lengths), 5, SIZES["hidden_size"], dtype=torch.float64)
    selector = _selector(layer, name)
    inputs, index_keys = layer.inputs(selector, hidden, torch.arange(5)[None], layout, BUDGETS["fixed"])
    choice, output, loss = _run(selector, *_with_garbage(inputs, index_keys))
    check_blocks(choice.selection, layout)
    assert output.isfinite().all()
    assert loss is None or loss.isfinite()


def test_a_module_of_another_kind_is_refused() -> None:
    with pytest.raises(SparsortError, match="a selector cannot be added to Identity"):
        make_selector(nn.Identity(), SparseAttentionConfig())


def test_heads_that_do_not_fit_are_refused(layer: Layer) -> None:
    module = nn.Module()
    module.q_proj = module.k_proj = layer.module.q_proj
    module.layer_idx = 0
    module.config = LlamaConfig(**{**SIZES, "num_key_value_heads": 4, "num_attention_heads": 6})
    with pytest.raises(SparsortError, match="to be a multiple"):
        make_selector(module, SparseAttentionConfig())
    module.config, module.head_dim = LlamaConfig(**SIZES), 7
    with pytest.raises(SparsortError, match="index_dim=8"):
        make_selector(module, SparseAttentionConfig())
    assert isinstance(make_selector(module, SparseAttentionConfig(index_dim=8)), Selector)
