"""An index branch in models of transformers: what it computes, what it leaves unchanged, and what it refuses.

Two oracles: the dense model under transformers' own SDPA, for every layer that sees all blocks or is dense; and for sparse
layers the same model with the dense map masked to the blocks that were chosen, by the reference of `kernels/blocksparse`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsort
from sparsort.attention.attach import attach_index_branch, detach
from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors.base import Selector
from sparsort.attention.selectors.chunks import in_blocks
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.reference import support

Make = Callable[..., Any]
EVERY = 64  # blocks: more than any sequence here has


def _logits(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(*args, **kwargs).logits
    return logits


def _branches(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Selector)]


# What it computes


def test_with_every_block_it_is_the_dense_model(family: str, dense: Make, sparse: Make, tokens: Make) -> None:
    ids = tokens(2, 37)
    model = sparse(family, blocks=EVERY)
    torch.testing.assert_close(_logits(model, ids), _logits(dense(family), ids), atol=1e-5, rtol=1e-5)
    model.sparse_attention.budget = FixedBudget(blocks=2)
    assert (_logits(model, ids) - _logits(dense(family), ids)).abs().max() > 1e-2
    model.sparse_attention.mode = "full"
    torch.testing.assert_close(_logits(model, ids), _logits(dense(family), ids), atol=1e-5, rtol=1e-5)


def test_a_sparse_layer_attends_to_the_chosen_blocks(
    family: str, sparse: Make, dense: Make, tokens: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model, every sparse layer's map masked to the selection that the sparse model made there."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ids = tokens(2, 37)
    model = sparse(family)
    masks: dict[int, Tensor] = {}
    model.sparse_attention.observers.append(
        lambda layer, inputs, choice: masks.update({layer: support(choice.selection, inputs.layout)[0]})
    )
    got = _logits(model, ids)

    def masked(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        chosen = masks.get(module.layer_idx)
        if chosen is not None:
            mask = chosen.repeat_interleave(module.num_key_value_groups, dim=1)
        elif mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    # Under the name "sdpa", because layers with a window get their mask by that name.
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", masked)
    expected = _logits(dense(family), ids)
    assert len(masks) == (1 if family == "gemma3" else 3)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selector", ["moba", "seer", "nsa", "lm_trained", "window", "sink_window", "random", "oracle"])
def test_every_selector_runs_trains_and_saves(selector: str, sparse: Make, tokens: Make) -> None:
    model = sparse("qwen3", selector=selector).train()
    ids = tokens(2, 21)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    for name, weight in model.named_parameters():
        if "index_branch" in name:
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
    assert (len(model.sparse_attention.alignment) == 3) == (selector in ("seer",))


def test_layers_not_named_stay_dense(dense: Make, sparse: Make, tokens: Make) -> None:
    model = sparse("llama", layers=[1])
    assert _branches(model) == ["model.layers.1.self_attn.index_branch"]
    seen: list[int] = []
    model.sparse_attention.observers.append(lambda layer, inputs, choice: seen.append(layer))
    _logits(model, tokens(1, 9))
    assert seen == [1]
    assert _branches(sparse("gemma3")) == ["model.layers.2.self_attn.index_branch"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("case", ["plain", "left", "right", "packed", "cache", "chunks", "static"])
def test_dense_layers_are_those_of_sdpa(family: str, case: str, dense: Make, sparse: Make, tokens: Make) -> None:
    """A model of dense layers and of sparse layers that see every block equals the dense model, whatever the mask."""
    from transformers import DynamicCache, StaticCache

    ids = tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if case == "left" else slice(14, 19)] = 0
    found = []
    layers = [2] if family == "gemma3" else [1]
    for model in (sparse(family, blocks=EVERY, layers=layers), dense(family)):
        if case in ("left", "right"):
            found.append(_logits(model, ids, attention_mask=mask)[mask.bool()])
        elif case == "packed":
            positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
            found.append(_logits(model, ids, position_ids=positions, use_cache=False))
        elif case == "plain":
            found.append(_logits(model, ids))
        else:
            static = {"config": model.config, "max_cache_len": 24}
            cache = StaticCache(**static) if case == "static" else DynamicCache(config=model.config)
            cuts = [0, 7, 15, 19] if case == "chunks" else [0, 16, 17, 18, 19]
            steps = [ids[:, start:end] for start, end in itertools.pairwise(cuts)]
            found.append(torch.cat([_logits(model, step, past_key_values=cache) for step in steps], dim=1))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


# What stays as it was


def test_attach_is_in_place_and_detach_undoes_it(family: str, dense: Make, tokens: Make) -> None:
    model, ids = dense(family), tokens(2, 19)
    before = {
        "logits": _logits(model, ids),
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
        "config": model.config.to_dict(),
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "loss": model.loss_function,
    }
    assert attach_index_branch(model, block_size=4, blocks=2) is model
    assert model.config.sparse_attention == SparseAttentionConfig(block_size=4, blocks=2).to_json()
    assert set(before["weights"]) < set(model.state_dict())
    assert detach(model) is model
    assert torch.equal(_logits(model, ids), before["logits"])
    assert list(model.state_dict()) == list(before["weights"])
    assert model.config.to_dict() == before["config"]
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before["hooks"]
    assert model.loss_function is before["loss"]
    with pytest.raises(SparsortError, match="no index branch to detach"):
        detach(model)
    attach_index_branch(model, block_size=2, selector="moba")
    assert model.config.sparse_attention["selector"] == "moba"


def test_detach_gives_back_a_loss_and_an_implementation_of_the_users_own(dense: Make, tokens: Make) -> None:
    def doubled(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return 2 * logits.float().mean()

    model, ids = dense(), tokens(1, 9)
    model.loss_function = doubled
    model.set_attn_implementation("eager")
    attach_index_branch(model, block_size=4)
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.loss, 2 * outputs.logits.mean())
    detach(model)
    assert model.loss_function is doubled
    assert model.config._attn_implementation == "eager"


def test_attached_twice_is_refused_and_nothing_moves(sparse: Make, tokens: Make) -> None:
    model, ids = sparse(), tokens(1, 19)
    before = _logits(model, ids)
    with pytest.raises(SparsortError, match=r"has an index branch already.*detach"):
        attach_index_branch(model, blocks=7)
    assert torch.equal(_logits(model, ids), before)


def test_a_copy_is_a_model_of_its_own(sparse: Make, tokens: Make) -> None:
    model, ids = sparse(), tokens(2, 19)
    twin = copy.deepcopy(model)
    assert torch.equal(_logits(twin, ids), _logits(model, ids))
    twin.sparse_attention.budget = FixedBudget(blocks=EVERY)
    full = _logits(twin, ids)
    assert (full - _logits(model, ids)).abs().max() > 1e-2
    twin.train()
    twin(ids, labels=ids).loss.backward()
    assert twin.sparse_attention.alignment
    assert not model.sparse_attention.alignment
    detach(twin)
    torch.testing.assert_close(_logits(twin.eval(), ids), full, atol=1e-5, rtol=1e-5)
    assert _branches(model)
    assert not _branches(twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_before_and_after(dtype: torch.dtype, dense: Make, sparse: Make, tokens: Make) -> None:
    ids = tokens(2, 19)
    expected = _logits(sparse(), ids)
    after = sparse().to(dtype)
    before = attach_index_branch(dense().to(dtype), block_size=4, blocks=2, index_dim=8)
    for model in (after, before):
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        logits = _logits(model, ids)
        assert logits.dtype == dtype
        # A block may be chosen otherwise on a near tie, so that single logits can differ by more than rounding.
        close = ((logits.double() - expected.double()).abs() < 0.1).double().mean()
        assert close > 0.95
        model.train()
        model(ids, labels=ids).loss.backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name


def test_autocast(sparse: Make, tokens: Make) -> None:
    model, ids = sparse("qwen3").train(), tokens(2, 19)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, atol=0.1, rtol=0.05)


def test_wrappers_that_call_forward_lose_nothing(sparse: Make, tokens: Make) -> None:
    """PEFT calls `forward` of the causal model, past any hook on it."""

    class Wrapper(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model.forward(*args, **kwargs)

    model, ids = sparse().train(), tokens(2, 19)
    direct = model(ids, labels=ids)
    wrapped = Wrapper(model)(ids, labels=ids)
    assert torch.equal(direct.loss, wrapped.loss)
    assert len(model.sparse_attention.alignment) == 3
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert torch.equal(as_tuple[0], direct.loss)
    torch.testing.assert_close(
        direct.loss, model.sparse_attention.lm_loss + sum(model.sparse_attention.alignment.values())
    )


def test_the_decoder_alone_is_sparse(sparse: Make, tokens: Make) -> None:
    model, ids = sparse(), tokens(2, 19)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), _logits(model, ids))


def test_settings_between_steps(sparse: Make) -> None:
    state = sparse(blocks=3).sparse_attention
    assert (state.mode, state.budget, state.alignment_weight) == ("sparse", FixedBudget(blocks=3), 1.0)
    with pytest.raises(SparsortError, match=r"unknown mode of sparse attention 'ful'.*Did you mean 'full'"):
        state.mode = "ful"
    with pytest.raises(SparsortError, match=r"budget is 4; expected a FixedBudget"):
        state.budget = 4
    for wrong in ("1", None, float("nan"), -1):
        with pytest.raises(SparsortError, match=f"alignment_weight is {wrong!r}|alignment_weight is {wrong}"):
            state.alignment_weight = wrong
    assert (state.budget, state.alignment_weight) == (FixedBudget(blocks=3), 1.0)


def test_public_names() -> None:
    assert sparsort.attach_index_branch is attach_index_branch
    assert sparsort.SparseAttentionConfig is SparseAttentionConfig
    assert sparsort.load_sparse.__module__ == "sparsort.attention.attach"


def test_a_table_is_a_configuration(dense: Make) -> None:
    model = attach_index_branch(dense(), {"selector": "moba", "block_size": 4}, blocks=3)
    expected = SparseAttentionConfig(selector="moba", block_size=4, blocks=3)
    assert model.sparse_attention.config == expected
    for wrong in ("moba", SparseAttentionConfig, 3):
        with pytest.raises(SparsortError, match="read from a table"):
            attach_index_branch(dense(), wrong)


def test_models_with_one_configuration_do_not_share_state(dense: Make) -> None:
    one = dense()
    with torch.random.fork_rng(devices=[]):
        other = type(one)(one.config)
    attach_index_branch(one, block_size=4)
    assert one.config._attn_implementation == one.model.config._attn_implementation == "sparsort"
    assert other.config._attn_implementation == "sdpa"
    assert not hasattr(other.config, "sparse_attention")


def test_a_derived_class(dense: Make, tokens: Make) -> None:
    from transformers import LlamaForCausalLM

    class Mine(LlamaForCausalLM):  # type: ignore[misc]
        pass

    model, ids = dense(), tokens(1, 19)
    with torch.random.fork_rng(devices=[]):
        mine = Mine(model.config).eval()
    mine.load_state_dict(model.state_dict())
    attach_index_branch(mine, block_size=4, blocks=EVERY)
    torch.testing.assert_close(_logits(mine, ids), _logits(model, ids), atol=1e-5, rtol=1e-5)


def test_a_block_larger_than_the_sequence(dense: Make, tokens: Make) -> None:
    """A sequence is one block; what is held goes by its tokens."""
    ids = tokens(1, 9)
    assert in_blocks(torch.ones(2, 9, 3), 2**20, 0.0).shape == (2, 1, 9, 3)
    for selector in ("moba", "seer", "oracle"):
        model = attach_index_branch(dense(), selector=selector, block_size=2**20)
        torch.testing.assert_close(_logits(model, ids), _logits(dense(), ids), atol=1e-5, rtol=1e-5)


# What it refuses


def test_a_wrapper_is_refused(dense: Make) -> None:
    class PeftModelForCausalLM(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.base_model, self.config = model, model.config

    with pytest.raises(SparsortError, match=r"PeftModelForCausalLM wraps a model.*before it is wrapped"):
        attach_index_branch(PeftModelForCausalLM(dense()))  # type: ignore[arg-type]


def test_another_attention_implementation_is_refused(sparse: Make, tokens: Make) -> None:
    model, ids = sparse(), tokens(1, 19)
    before = _logits(model, ids)
    model.set_attn_implementation("sdpa")
    with pytest.raises(SparsortError, match=r"set to 'sdpa'.*set_attn_implementation\('sparsort'\)"):
        model(ids)
    model.set_attn_implementation("sparsort")
    assert torch.equal(_logits(model, ids), before)


def test_wrong_settings_are_refused(dense: Make) -> None:
    model = dense()
    for changes, message in [
        ({"block": 4}, "unknown setting of sparse attention 'block'"),
        ({"layers": [3]}, "names layer 3, but this model has 3 layers"),
        ({"layers": []}, "names no layer"),
        ({"selector": "msa"}, "unknown selector"),
    ]:
        with pytest.raises(SparsortError, match=message):
            attach_index_branch(model, **changes)
    assert not _branches(model)
    assert model.config._attn_implementation == "sdpa"


def test_sliding_windows_are_kept(dense: Make) -> None:
    with pytest.raises(SparsortError, match="layer 0 has a sliding window"):
        attach_index_branch(dense("gemma3"), layers=[0, 2])
    with pytest.raises(SparsortError, match=r"every layer .* sliding window.*sliding_window to None"):
        attach_index_branch(dense("mistral", sliding_window=8))
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = attach_index_branch(dense("qwen2", **windows), block_size=4)
    assert _branches(model) == ["model.layers.0.self_attn.index_branch"]


def test_other_models(dense: Make, make_tiny_model: Make) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

    for name in ("gpt2", "gpt_neox", "opt"):
        with pytest.raises(SparsortError, match=r"cannot be given an index branch.*llama"):
            attach_index_branch(AutoModelForCausalLM.from_pretrained(make_tiny_model(name)))
    with torch.random.fork_rng(devices=[]):
        encoder = BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(SparsortError, match="cannot be given an index branch"):
        attach_index_branch(encoder)
    with pytest.raises(SparsortError, match=r"LlamaModel .* cannot be given an index branch"):
        attach_index_branch(AutoModel.from_pretrained(make_tiny_model("llama")))
    with pytest.raises(SparsortError, match="cannot be given an index branch"):
        attach_index_branch(nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(SparsortError, match="both directions"):
        attach_index_branch(dense("gemma3", use_bidirectional_attention=True))
    with pytest.raises(SparsortError, match="softcaps"):
        attach_index_branch(dense("gemma3", attn_logit_softcapping=30.0))


def test_sinks_and_other_shapes(dense: Make) -> None:
    model = dense()
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(SparsortError, match="layer 1 has attention sinks"):
        attach_index_branch(model)
    model = dense()
    del model.model.layers[2].self_attn.q_proj
    with pytest.raises(SparsortError, match=r"layer 2.*has no q_proj"):
        attach_index_branch(model)
    assert not _branches(model)


def test_dropout_is_refused_in_training_only(dense: Make, tokens: Make) -> None:
    model, ids = attach_index_branch(dense(attention_dropout=0.1), block_size=4), tokens(1, 9)
    _logits(model, ids)
    with pytest.raises(SparsortError, match=r"drops out 0\.1"):
        model.train()(ids)


def test_attention_weights_are_not_there(sparse: Make, tokens: Make) -> None:
    with pytest.raises(SparsortError, match="no attention weights to return"):
        sparse()(tokens(1, 9), output_attentions=True)


def test_a_layer_outside_its_model(sparse: Make) -> None:
    layer = sparse().model.layers[0]
    hidden = torch.zeros(1, 4, 64)
    rotary = (torch.ones(1, 4, 16), torch.zeros(1, 4, 16))
    with pytest.raises(SparsortError, match="outside its model's decoder"):
        layer(hidden, position_embeddings=rotary)
