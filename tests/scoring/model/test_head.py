"""Heads that cannot be read are refused when the head is made, which is before any row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.model.head import Head


@pytest.fixture
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("llama")), dtype="float32", device="cpu")


def _head(loaded: LoadedModel) -> Head:
    return Head(loaded.model, loaded.model.config, "m")


@pytest.mark.parametrize("output", [None, torch.nn.ModuleList()])
def test_a_head_that_is_not_one_matrix_is_refused(
    output: Any, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.model, "get_output_embeddings", lambda: output)
    with pytest.raises(SparsortError, match=r"'m' has no language-model head of one matrix.* Use a sparsity, length"):
        _head(loaded)


def test_a_model_that_makes_no_logits_of_token_ids_is_refused(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_options: Any) -> None:
        raise RuntimeError("labels are needed.\nin line 3")

    monkeypatch.setattr(loaded.model, "forward", fail)
    with pytest.raises(SparsortError, match=r"computes no logits from token ids alone \(labels are needed\)\. Use a"):
        _head(loaded)


@pytest.mark.parametrize("name", ["final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap"])
def test_a_cap_is_applied_whatever_it_is_called(
    name: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = loaded.model.forward

    def capped(**options: Any) -> Any:
        output = usual(**options)
        output.logits = 0.25 * torch.tanh(output.logits / 0.25)
        return output

    monkeypatch.setattr(loaded.model, "forward", capped)
    with pytest.raises(SparsortError, match="computes its logits in a way"):
        _head(loaded)
    setattr(loaded.model.config, name, 0.25)
    states = torch.linspace(-3, 3, 128).view(2, 64)
    expected = 0.25 * torch.tanh(loaded.model.lm_head(states) / 0.25)
    torch.testing.assert_close(_head(loaded).logits(states), expected)


def test_a_cap_of_an_unknown_name_is_refused_by_its_name(loaded: LoadedModel) -> None:
    loaded.model.config.gate_soft_cap = 15.0
    _head(loaded)
    loaded.model.config.other_soft_cap = 15.0
    with pytest.raises(SparsortError, match=r"does not know \(other_soft_cap\)"):
        _head(loaded)
