"""A model with an index branch, saved and read back: by `load_sparse` whole, by transformers as the dense model it also is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sparsort import load_sparse
from sparsort.attention.attach import attach_index_branch, detach
from sparsort.attention.state import SparseAttention
from sparsort.errors import SparsortError

Make = Callable[..., Any]


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def _shaken(model: Any) -> Any:
    """With index weights that no fresh index branch would have."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "index_branch" in name:
                weight += torch.randn(weight.shape, generator=generator)
    return model


def test_round_trip(family: str, sparse: Make, tokens: Make, tmp_path: Path) -> None:
    model, ids = _shaken(sparse(family, layers=[2], blocks=3)), tokens(2, 29)
    before = _logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = load_sparse(tmp_path)
    assert torch.equal(_logits(loaded, ids), before)
    assert not torch.equal(_logits(sparse(family, layers=[2], blocks=3), ids), before)
    assert type(loaded) is type(model)
    assert isinstance(loaded.sparse_attention, SparseAttention)
    assert loaded.sparse_attention.config == model.sparse_attention.config
    assert not loaded.training
    with pytest.raises(SparsortError, match="has an index branch already"):
        attach_index_branch(loaded)


def test_saved_again_and_trained_on(sparse: Make, tokens: Make, tmp_path: Path) -> None:
    model, ids = _shaken(sparse("qwen3")), tokens(2, 29)
    model.save_pretrained(tmp_path / "first")
    loaded = load_sparse(tmp_path / "first")
    loaded.train()(ids, labels=ids).loss.backward()
    assert len(loaded.sparse_attention.alignment) == 3
    assert all(weight.grad is not None for weight in loaded.parameters())
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("first", "second"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["Qwen3ForCausalLM"]
        assert config["sparse_attention"]["block_size"] == 4
        assert "sparsort" not in json.dumps(config)


def test_shards_dtypes_and_arguments_of_from_pretrained(sparse: Make, tokens: Make, tmp_path: Path) -> None:
    model, ids = _shaken(sparse("llama")), tokens(1, 29)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(_logits(load_sparse(tmp_path), ids), _logits(model, ids))
    half = load_sparse(str(tmp_path), dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    placed = load_sparse(tmp_path, device_map="cpu")
    assert torch.equal(_logits(placed, ids), _logits(model, ids))
    config = AutoConfig.from_pretrained(tmp_path)
    config.sparse_attention = {**config.sparse_attention, "blocks": 64}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        _logits(load_sparse(tmp_path, config=config), ids), _logits(dense, ids), atol=1e-5, rtol=1e-5
    )


def test_transformers_reads_the_dense_model(
    family: str, sparse: Make, dense: Make, tokens: Make, tmp_path: Path
) -> None:
    model, ids = sparse(family), tokens(2, 29)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all("index_branch" in name for name in report["unexpected_keys"])
    assert len(report["unexpected_keys"]) == sum("index_branch" in name for name in model.state_dict())
    assert torch.equal(_logits(loaded, ids), _logits(dense(family), ids))


def test_attached_to_a_dense_checkpoint_only_the_index_weights_are_new(sparse: Make, dense: Make) -> None:
    old, new = dense("qwen3").state_dict(), sparse("qwen3").state_dict()
    assert all("index_branch" in name for name in set(new) - set(old))
    assert set(old) <= set(new)
    assert all(torch.equal(new[name], old[name]) for name in old)
    again = sparse("qwen3").state_dict()
    assert all(torch.equal(new[name], again[name]) for name in new)


def test_from_scratch(dense_folder: Make, tokens: Make, tmp_path: Path) -> None:
    """A model made from its configuration, no checkpoint."""
    config = AutoConfig.from_pretrained(dense_folder("llama"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    attach_index_branch(model, block_size=4, blocks=2, index_dim=8).eval()
    model.save_pretrained(tmp_path)
    ids = tokens(1, 29)
    assert torch.equal(_logits(load_sparse(tmp_path), ids), _logits(model, ids))


def test_detached_and_saved_it_is_dense_again(sparse: Make, dense_folder: Make, tmp_path: Path) -> None:
    detach(sparse("llama")).save_pretrained(tmp_path)
    assert "sparse_attention" not in json.loads((tmp_path / "config.json").read_text())
    old, new = (load_file(folder / "model.safetensors") for folder in (dense_folder("llama"), tmp_path))
    assert list(old) == list(new)
    assert all(torch.equal(old[name], new[name]) for name in old)


# What is refused


def test_a_dense_checkpoint(dense_folder: Make) -> None:
    with pytest.raises(SparsortError, match=r"has no index branch.*attach_index_branch"):
        load_sparse(dense_folder("llama"))


@pytest.fixture
def _drawn_on() -> Iterator[None]:
    """transformers draws weights that are not there, before we refuse the model."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.usefixtures("_drawn_on")
def test_another_width(sparse: Make, tmp_path: Path) -> None:
    sparse("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sparse_attention"]["index_dim"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsortError, match=r"index_branch.* has shape .*8.* configuration says .*16.*index_dim"):
        load_sparse(tmp_path)


@pytest.mark.usefixtures("_drawn_on")
def test_weights_without_the_index_branch(sparse: Make, tmp_path: Path) -> None:
    sparse("llama").save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.self_attn.index_branch" not in name}
    save_file(kept, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparsortError, match=r"lacks 4 weights of the index branch .*layers\.1\."):
        load_sparse(tmp_path / "part")


@pytest.mark.parametrize("changes", [{"selector": "moba"}, {"layers": [0]}, {"index_norm": False}])
def test_weights_that_would_be_dropped(changes: dict[str, Any], sparse: Make, tmp_path: Path) -> None:
    sparse("llama").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.sparse_attention = {**config.sparse_attention, **changes}
    with pytest.raises(SparsortError, match=r"weights of an index branch, such as .*saved with") as caught:
        load_sparse(tmp_path, config=config)
    assert f"{next(iter(changes))}=" in str(caught.value)
    config.save_pretrained(tmp_path)
    with pytest.raises(SparsortError, match=r"weights of an index branch, such as"):
        load_sparse(tmp_path)


def test_settings_that_cannot_be_read(sparse: Make, tmp_path: Path) -> None:
    sparse("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in [({"blok": 4}, "unknown setting"), (7, "table such as"), ({"blocks": 0}, "blocks is 0")]:
        (tmp_path / "config.json").write_text(json.dumps({**config, "sparse_attention": wrong}))
        with pytest.raises(SparsortError, match=message):
            load_sparse(tmp_path)
    for name in ("attn_implementation", "output_loading_info"):
        with pytest.raises(SparsortError, match=f"does not take {name}"):
            load_sparse(tmp_path, **{name: "eager"})
