"""Shared fixtures of the tests of attention: tiny models of every family, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
BLOCK, BLOCKS = 4, 2
_SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def dense_folder(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`dense_folder(family, **overrides)`: the folder of a dense checkpoint without a token that ends generation."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **overrides: Any) -> Path:
        from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

        if family not in ("qwen2", "mistral"):
            return make_tiny_model(family, **{"eos_token_id": None, **overrides})
        key = f"{family} {sorted(overrides.items())}"
        if key not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                size: dict[str, Any] = {**_SMALL, "pad_token_id": 0, "eos_token_id": None, **overrides}
                model: Any = (
                    Qwen2ForCausalLM(Qwen2Config(**size))
                    if family == "qwen2"
                    else MistralForCausalLM(MistralConfig(**{"sliding_window": None, **size}))
                )
                with torch.no_grad():
                    for weight in model.parameters():
                        weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.05)
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def dense(dense_folder: Callable[..., Path]) -> Callable[..., Any]:
    """`dense(family, **overrides)`: a fresh dense model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    def load(family: str = "llama", **overrides: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(dense_folder(family, **overrides), dtype=torch.float32).eval()

    return load


@pytest.fixture
def sparse(dense: Callable[..., Any]) -> Callable[..., Any]:
    """`sparse(family, model={}, **changes)`: the same with an index branch, blocks of 4 keys and 2 of them for a query."""
    from sparsort.attention.attach import attach_index_branch

    def make(family: str = "llama", *, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        indexed = changes.get("selector", "index_branch") in ("index_branch", "seer", "lm_trained")
        settings = {"block_size": BLOCK, "blocks": BLOCKS, **({"index_dim": 8} if indexed else {}), **changes}
        return attach_index_branch(dense(family, **(model or {})), **settings)

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """`tokens(*size)`: the same token ids every time, without special tokens."""

    def draw(*size: int, seed: int = 0) -> Tensor:
        return torch.randint(3, 384, size, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
