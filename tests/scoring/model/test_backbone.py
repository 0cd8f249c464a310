"""The backbone against the plain loop: one row at a time, `output_hidden_states=True`, no cache, no padding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.model import backbone as backbone_module
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.sites import blocks_of

FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt"]


def _load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), dtype="float32", device="cpu", **options)


def _rows(vocabulary: int, *, lengths: list[int], shared: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    heads = rng.integers(3, vocabulary, (2, shared)).tolist()
    return [heads[number % 2] + rng.integers(3, vocabulary, length).tolist() for number, length in enumerate(lengths)]


def _collect(body: Backbone, ids: list[list[int]], sites: list[str], **options: Any) -> dict[str, list[torch.Tensor]]:
    """Every real token's state, row by row, put together from the pieces."""
    found = [body.site(name) for name in sites]
    how = body.plan(ids, **options)
    rows = {
        name: [torch.full((len(row), body.width(site)), torch.nan) for row in ids]
        for name, site in zip(sites, found, strict=True)
    }
    for piece in body.walk(ids, how, found):
        for place, number in enumerate(piece.rows):
            targets = np.flatnonzero(how.head_of == number) if piece.is_head else [number]
            span = slice(piece.start, piece.start + int(piece.lengths[place]))
            for name in sites:
                for target in targets:
                    rows[name][target][span] = piece.states[name][place, : piece.lengths[place]].float()
    return rows


@torch.inference_mode()
def _plain(loaded: LoadedModel, body: Backbone, ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
    caught: dict[str, torch.Tensor] = {}
    handle = body.blocks[-1].register_forward_hook(
        lambda _m, _a, out: caught.__setitem__("block", out[0] if isinstance(out, tuple) else out)
    )
    rows: dict[str, list[torch.Tensor]] = {"pre_norm": [], "post_norm": [], "layer:0": []}
    for row in ids:
        result = loaded.model(torch.tensor([row]), output_hidden_states=True, use_cache=False)
        rows["post_norm"].append(result.hidden_states[-1][0])
        rows["layer:0"].append(result.hidden_states[1][0])
        rows["pre_norm"].append(caught["block"][0].clone())
    handle.remove()
    return rows


def _assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(one).all(), "a token was never computed"
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [0, 11])
def test_states_are_those_of_the_plain_loop(family: str, shared: int, make_tiny_model: Callable[..., Path]) -> None:
    loaded = _load(make_tiny_model(family))
    body = Backbone(loaded, token_budget=96)
    # Lengths around the window of 8, of one token, and longer than the budget.
    ids = _rows(loaded.model.config.vocab_size, lengths=[1, 3, 7, 8, 9, 30, 31, 120, 2, 2, 5, 6], shared=shared)
    ours = _collect(body, ids, ["pre_norm", "post_norm", "layer:0"])
    theirs = _plain(loaded, body, ids)
    assert bool(body.plan(ids).depth) == bool(shared)
    for site in theirs:
        _assert_close(ours[site], theirs[site])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_long_row_in_chunks_is_the_row_whole(
    family: str, make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _load(make_tiny_model(family))
    body = Backbone(loaded)
    ids = _rows(loaded.model.config.vocab_size, lengths=[100, 97, 33, 16, 15, 4], shared=6)
    theirs = _plain(loaded, body, ids)
    monkeypatch.setattr(backbone_module, "_CHUNK", 16)
    for site in theirs:
        _assert_close(_collect(body, ids, [site])[site], theirs[site])


def test_a_row_does_not_depend_on_its_mates(make_tiny_model: Callable[..., Path]) -> None:
    loaded = _load(make_tiny_model("gemma3"))
    body = Backbone(loaded, token_budget=400)
    ids = _rows(loaded.model.config.vocab_size, lengths=[20, 19, 18, 20, 17], shared=0)
    together = _collect(body, ids, ["post_norm"])["post_norm"]
    alone = [_collect(body, [row], ["post_norm"])["post_norm"][0] for row in ids]
    _assert_close(together, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_site_is_the_input_of_the_down_projection(family: str, make_tiny_model: Callable[..., Path]) -> None:
    loaded = _load(make_tiny_model(family))
    body = Backbone(loaded)
    names = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h", "opt": "fc2"}
    expected = [
        m
        for path, m in body.blocks[-1].named_modules()
        if path.endswith(names.get(family, "down_proj")) and "attn" not in path
    ]
    assert body.site("mlp").module is expected[-1]
    assert body.width(body.site("mlp")) == (256 if family == "gpt2" else 128)
    ids = _rows(loaded.model.config.vocab_size, lengths=[5, 6], shared=0)
    assert all(torch.isfinite(states).all() for states in _collect(body, ids, ["mlp", "mlp:0"])["mlp"])


def test_a_model_without_a_final_norm(make_tiny_model: Callable[..., Path]) -> None:
    body = Backbone(_load(make_tiny_model("no_norm")))
    assert body.final_norm is None
    assert body.site("pre_norm").reads == "output"
    with pytest.raises(SparsortError, match=r"no final norm.*pre_norm"):
        body.site("post_norm")


@pytest.mark.parametrize(
    ("name", "message"), [("prenorm", "Did you mean 'pre_norm'"), ("layer:9", "3 blocks"), ("layer:x", "unknown site")]
)
def test_sites_that_are_not_there(name: str, message: str, make_tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(SparsortError, match=message):
        Backbone(_load(make_tiny_model("llama"))).site(name)


def test_a_checkpoint_with_nan_weights_names_them(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(make_tiny_model("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparsortError, match=f"not finite.*{name}"):
        Backbone(_load(folder))


def test_a_model_that_sees_later_tokens_is_refused(make_tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(SparsortError, match="not a causal decoder"):
        Backbone(_load(make_tiny_model("gemma3", use_bidirectional_attention=True)))


def test_rotary_embeddings_that_follow_the_length_turn_sharing_off(make_tiny_model: Callable[..., Path]) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = make_tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    body = Backbone(_load(folder))
    ids = _rows(body.config.vocab_size, lengths=[4, 40, 6, 30, 7, 3], shared=5)
    # A fresh model a row: transformers keeps the frequencies of the longest row that a model has seen.
    fresh = [(loaded := _load(folder)) and _plain(loaded, Backbone(loaded), [row])["post_norm"][0] for row in ids]
    _assert_close(_collect(body, ids, ["post_norm"])["post_norm"], fresh)
    assert body.plan(ids).depth == 0
    assert body.chunk is None


@pytest.mark.parametrize("given", [{"dtype": "bf16x"}, {"device": "gpu"}, {"device": "cuda:99"}])
def test_bad_dtype_and_device(given: dict[str, str], make_tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(SparsortError, match=next(iter(given.values()))):
        load_model(str(make_tiny_model("llama")), **{"device": "cpu", **given})


def test_a_checkpoint_that_lacks_weights_is_refused(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    shutil.copytree(make_tiny_model("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparsortError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        _load(folder)


def _linear(n_in: int, n_out: int) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        return torch.nn.Linear(n_in, n_out)


def _changed_forward(loaded: LoadedModel, forward: Callable[..., Any]) -> LoadedModel:
    """The model with a forward pass of its own, which is given the old one."""
    usual = loaded.model.forward
    loaded.model.forward = lambda *args, **kwargs: forward(usual, *args, **kwargs)
    return loaded


def test_a_model_that_needs_more_than_token_ids_is_refused(make_tiny_model: Callable[..., Path]) -> None:
    def needs_images(usual: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("pixel_values must be given.\nSee the documentation.")

    loaded = _changed_forward(_load(make_tiny_model("llama")), needs_images)
    with pytest.raises(SparsortError, match=r"on token ids alone \(pixel_values must be given\)\. Use a causal"):
        Backbone(loaded)


def test_a_model_that_gives_its_blocks_more_than_the_token_ids_is_refused(make_tiny_model: Callable[..., Path]) -> None:
    def with_a_soft_prompt(usual: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        embedded = loaded.model.get_input_embeddings()(input_ids)
        return usual(inputs_embeds=torch.cat([embedded[:, :1] * 0 + 1, embedded], dim=1), **kwargs)

    loaded = _load(make_tiny_model("llama"))
    _changed_forward(loaded, with_a_soft_prompt)
    with pytest.raises(SparsortError, match="passes more than the token ids to its blocks"):
        Backbone(loaded)


@pytest.mark.parametrize("setting", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_configuration_without_sizes_is_refused(setting: str) -> None:
    from types import SimpleNamespace

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 16}
    assert backbone_module.sizes_of(SimpleNamespace(**sizes), "m") == (8, 2, 16)
    del sizes[setting]
    with pytest.raises(SparsortError, match=f"'m' .SimpleNamespace. has no {setting}, so this architecture"):
        backbone_module.sizes_of(SimpleNamespace(**sizes), "m")


def test_a_decoder_with_another_number_of_blocks_than_its_encoder_is_read(make_tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig

    config = BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=5,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    body = Backbone(load_model(model, tokenizer=AutoTokenizer.from_pretrained(make_tiny_model("llama"))))
    assert len(body.blocks) == 2


def test_two_lists_of_blocks_are_refused() -> None:
    blocks = torch.nn.ModuleList(_linear(2, 2) for _ in range(3))
    nested = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"experts": blocks})])})
    assert blocks_of(nested, 3) is blocks
    assert blocks_of(nested, 7) is nested["layers"]
    two = torch.nn.ModuleDict({"slow": blocks, "fast": torch.nn.ModuleList([_linear(2, 2)])})
    with pytest.raises(
        SparsortError, match=r"no list of 7 blocks, so this architecture is not supported\. Use another"
    ):
        blocks_of(two, 7)


def test_a_site_that_holds_no_state_for_each_token_is_refused_when_it_is_named(
    make_tiny_model: Callable[..., Path],
) -> None:
    loaded = _load(make_tiny_model("llama"))

    class Streams(torch.nn.Module):
        """A block that carries two streams of states."""

        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, states: torch.Tensor, **options: Any) -> torch.Tensor:
            return self.block(states[0] if states.dim() == 4 else states, **options)[None].repeat(2, 1, 1, 1)

    class Joined(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, states: torch.Tensor, **options: Any) -> torch.Tensor:
            return self.block(states[0], **options)

    layers = loaded.model.model.layers
    layers[0], layers[1] = Streams(layers[0]), Joined(layers[1])
    body = Backbone(loaded)
    assert body.site("layer:1").name == "layer:1"
    with pytest.raises(SparsortError, match=r"'layer:0' of .* has states of shape \(2, 1, 2, 64\).* Use 'pre_norm'"):
        body.site("layer:0")
    layers[2].unused = _linear(128, 64)
    with pytest.raises(SparsortError, match=r"does not use the module of site 'mlp' \(Linear\)"):
        body.site("mlp")


def test_a_state_of_another_width_before_the_head_is_not_pre_norm(make_tiny_model: Callable[..., Path]) -> None:
    """Without a final norm, `pre_norm` is the last block's output only if that has the model's width."""
    loaded = _load(make_tiny_model("no_norm"))
    assert Backbone(loaded).site("pre_norm").module is Backbone(loaded).blocks[-1]

    class Wide(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **options: Any) -> Any:
            out = self.block(*args, **options)
            return torch.cat([out, out], dim=-1)

    decoder = loaded.model.model.decoder
    decoder.layers[-1] = Wide(decoder.layers[-1])
    decoder.project_out = _linear(128, 64)
    body = Backbone(loaded)
    ids = _rows(body.config.vocab_size, lengths=[5, 3], shared=0)
    ours = _collect(body, ids, ["pre_norm"])["pre_norm"]
    with torch.inference_mode():
        theirs = [loaded.model.model(torch.tensor([row])).last_hidden_state[0] for row in ids]
    _assert_close(ours, theirs)
