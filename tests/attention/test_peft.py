"""The index branch under LoRA: it is trained as a whole and saved with the adapter, and its gradient is that without LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from sparsort.attention.attach import load_sparse
from sparsort.attention.training.callback import SparseAttentionCallback, sparse_attention_of

# PEFT looks at an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

BRANCH = ".index_branch."
Sparse = Callable[..., Any]


def _with_lora(model: Any, targets: Any, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options))


def _tokens() -> torch.Tensor:
    return torch.randint(3, 380, (2, 24), generator=torch.Generator().manual_seed(1))


def _branch_gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=_tokens(), labels=_tokens()).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if BRANCH in name and weight.requires_grad}
    # The names that PEFT uses inside a wrapped module.
    return {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): grad
        for name, grad in found.items()
        if grad is not None
    }


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_the_branch_is_trained_whole_and_gets_the_gradient_that_it_has_without_lora(
    sparse: Sparse, targets: Any
) -> None:
    expected = _branch_gradients(sparse("llama"))
    wrapped = _with_lora(sparse("llama"), targets, modules_to_save=["index_branch"])
    assert not [name for name, _ in wrapped.named_parameters() if BRANCH in name and ".lora_" in name]
    # The matrices B of LoRA begin at zero, so the first gradient must be the same.
    found = _branch_gradients(wrapped)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[name], gradient)


def test_an_adapter_contains_the_branch_and_is_loaded_and_merged_with_it(sparse: Sparse, tmp_path: Path) -> None:
    model = _with_lora(sparse("llama"), "all-linear", modules_to_save=["index_branch"], init_lora_weights=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if BRANCH in name and weight.requires_grad:
                weight += 0.5
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = {name.split(".layers.")[1].split(".")[0] for name in stored if BRANCH in name}
    assert layers == {"0", "1", "2"}
    model.eval()
    expected = model(input_ids=_tokens()).logits
    with torch.random.fork_rng(devices=[]):
        again = PeftModel.from_pretrained(sparse("llama"), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=_tokens()).logits, expected)
    assert sparse_attention_of(again) is again.get_base_model().sparse_attention
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=_tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_sparse(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(input_ids=_tokens()).logits, merged(input_ids=_tokens()).logits)


@pytest.mark.parametrize(
    ("targets", "options", "warns"),
    [
        ("all-linear", {"modules_to_save": ["index_branch"]}, False),
        ("all-linear", {}, True),
        (["q_proj", "v_proj"], {}, True),
    ],
)
def test_a_frozen_branch_is_reported(
    sparse: Sparse, tmp_path: Path, caplog: pytest.LogCaptureFixture, targets: Any, options: dict[str, Any], warns: bool
) -> None:
    model = _with_lora(sparse("llama"), targets, **options)
    state = TrainerState(is_world_process_zero=True)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    SparseAttentionCallback().on_train_begin(arguments, state, TrainerControl(), model=model)
    assert ("modules_to_save=['index_branch']" in caplog.text) is warns
