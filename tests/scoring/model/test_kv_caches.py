"""The possible uses of a model's cache, probed with short windows against the whole text, without a change to the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsort.scoring.loading.load import load_model
from sparsort.scoring.model.kv_caches import CacheUse, probe_cache

IDS = torch.arange(8)[None]


def _made(model_type: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, vocab_size=64, **sizes, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn_like(weight) * 0.2
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_common_caches_serve_both_uses(family: str, make_tiny_model: Callable[..., Path]) -> None:
    model = load_model(str(make_tiny_model(family)), dtype="float32", device="cpu").model
    assert probe_cache(model.model if family != "gpt2" else model.transformer, model.config, IDS) == CacheUse(
        gathers=True, steps=True
    )


@pytest.mark.parametrize("window", [None, 6, 4096])
def test_a_window_that_masks_and_cache_share_serves_both_uses(window: int | None) -> None:
    model = _made("mistral", intermediate_size=64, sliding_window=window)
    assert probe_cache(model.model, model.config, IDS) == CacheUse(gathers=True, steps=True)


def test_a_cache_cut_to_a_window_that_whole_texts_lack_is_found_far_below_the_window() -> None:
    # Moshi masks no window, and transformers cuts its cache to `sliding_window` all the same.
    model = _made("moshi", ffn_dim=64, sliding_window=3000)
    assert probe_cache(model.model, model.config, IDS) == CacheUse(gathers=False, steps=False)


def test_the_probe_leaves_the_model_as_it_was(make_tiny_model: Callable[..., Path]) -> None:
    model = load_model(str(make_tiny_model("gemma3")), dtype="float32", device="cpu").model
    weights = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    windows = [module.sliding_window for module in model.modules() if hasattr(module, "sliding_window")]
    assert 8 in windows
    probe_cache(model.model, model.config, IDS)
    assert model.config.sliding_window == 8
    assert windows == [module.sliding_window for module in model.modules() if hasattr(module, "sliding_window")]
    assert weights == {name: weight.data_ptr() for name, weight in model.named_parameters()}


def test_modules_that_cannot_be_copied_are_probed_as_they_are() -> None:
    model = _made("mistral", intermediate_size=64, sliding_window=100)
    model.model.uncopyable = (number for number in range(3))
    assert probe_cache(model.model, model.config, IDS) == CacheUse(gathers=True, steps=True)


def test_a_cache_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise ValueError("no such layer")

    model = _made("llama", intermediate_size=64)
    monkeypatch.setattr(DynamicCache, "get_seq_length", fail)
    assert probe_cache(model.model, model.config, IDS) == CacheUse(gathers=False, steps=False)


def test_rounding_is_that_of_the_whole_row(demo_model: Path) -> None:
    # In bf16 the first token's state is ten times as large as later ones, and its rounding reaches them.
    model = load_model(str(demo_model), dtype="bfloat16", device="cpu").model
    assert probe_cache(model.model, model.config, IDS) == CacheUse(gathers=True, steps=True)
