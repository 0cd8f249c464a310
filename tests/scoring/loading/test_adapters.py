"""Adapters of PEFT as models: scored as the merged model, and identified by the weights of base and adapter together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsort import SparsityScorer
from sparsort.errors import SparsortError
from sparsort.recipes.train.model import make_tokenizer
from sparsort.scoring.loading.load import load_model

# PEFT looks at an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def base(make_tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(make_tiny_model("llama"), tmp_path / "base")


def _adapter(base: Path, folder: Path) -> Path:
    """Writes the adapter to `folder`, and the merged model to `folder`-merged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        options = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        wrapped = get_peft_model(model, LoraConfig(r=2, **options))
    wrapped.save_pretrained(folder)
    merged = f"{folder}-merged"
    wrapped.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    return folder


def test_an_adapter_is_scored_as_the_merged_model(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    rows = [{"text": "one two"}, {"text": "three"}, {"text": "a longer text than the others"}]
    scored = {
        name: SparsityScorer(str(name), dtype="float32").score(rows, prompt="{text}").difficulty
        for name in (base, adapter, f"{adapter}-merged")
    }
    assert scored[adapter].tolist() == pytest.approx(scored[f"{adapter}-merged"].tolist(), rel=1e-4)
    assert scored[adapter].tolist() != pytest.approx(scored[base].tolist(), rel=1e-4)


def test_an_adapter_is_identified_with_its_base(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    first = load_model(adapter, dtype="float32")
    assert first.weights == load_model(adapter, dtype="float32").weights
    assert first.weights != load_model(base, dtype="float32").weights
    # The folder of the adapter stays as it is.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(base)
    assert load_model(adapter, dtype="float32").weights != first.weights


def test_an_adapter_uses_its_own_tokenizer_or_that_of_its_base(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    assert load_model(adapter).tokenizer_hash == load_model(base).tokenizer_hash
    own = AutoTokenizer.from_pretrained(base)
    own.add_tokens(["<own>"])
    own.save_pretrained(adapter)
    assert "<own>" in load_model(adapter).tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("value", "message"), [(None, "does not name its base model"), ("no/such base", "does not exist")]
)
def test_an_adapter_without_a_base_is_refused(base: Path, tmp_path: Path, value: object, message: str) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": value}))
    with pytest.raises(SparsortError, match=message):
        load_model(adapter)


def test_the_train_command_refuses_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    with pytest.raises(
        SparsortError, match=r"is an adapter of PEFT, and this command trains all weights.*merge_and_unload"
    ):
        make_tokenizer(str(adapter))
