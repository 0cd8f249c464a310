"""The identity of a model: a digest of all files that transformers may read, and of no others."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsort.scoring.loading.load import load_model


@pytest.fixture
def folder(make_tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_tiny_model("llama"), tmp_path / "model")


def _digest(folder: Path, *files: str) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256((folder / file).read_bytes()).digest())
    digest.update((folder / "config.json").read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _pickle_weights(folder: Path, factor: float = 1.0) -> None:
    """Replace model.safetensors by pytorch_model.bin."""
    from safetensors.torch import load_file

    found = folder / "model.safetensors"
    weights = load_file(found) if found.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: weight * factor for name, weight in weights.items()}, folder / "pytorch_model.bin")
    found.unlink(missing_ok=True)


@pytest.mark.parametrize("neighbour", ["other.safetensors", "other.gguf"])
def test_pickled_weights_count_where_they_are_what_is_read(folder: Path, neighbour: str) -> None:
    shutil.copy(folder / "model.safetensors", folder / neighbour)
    _pickle_weights(folder)
    first = load_model(folder)
    # transformers maps the file into memory, so writing to it would change the first model too.
    before = next(first.model.parameters()).clone()
    _pickle_weights(folder, 2.0)
    second = load_model(folder)
    assert torch.equal(next(second.model.parameters()), before * 2.0)
    assert first.weights != second.weights


def test_usual_folders_keep_their_digest(folder: Path) -> None:
    assert load_model(folder).weights == _digest(folder, "model.safetensors")
    # Not read next to model.safetensors, as in many folders of the hub.
    (folder / "pytorch_model.bin").write_bytes(b"pickled weights")
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert load_model(folder).weights == _digest(folder, "consolidated.safetensors", "model.safetensors")
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()
    _pickle_weights(folder)
    assert load_model(folder).weights == _digest(folder, "pytorch_model.bin")


def test_shards_keep_their_digest(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    (folder / "pytorch_model.bin").write_bytes(b"pickled weights")
    assert load_model(folder).weights == _digest(folder, *shards)
