"""An edit of a model that sparsort loaded is detected before its values count as those of its files; running it is no edit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsort.scoring.loading.load import load_model
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.scorers.sparsity import SparsityScorer
from sparsort.scoring.store.row_cache import obstacle

ROWS = [{"q": f"How many apples are {number} apples?"} for number in range(12)]


@pytest.fixture
def backbone(make_tiny_model: Callable[..., Path]) -> Backbone:
    """A backbone whose model nobody was handed."""
    backbone = Backbone(load_model(make_tiny_model("llama"), dtype="float32"))
    backbone.mark_as_own()
    return backbone


def _layer(model: Any) -> Any:
    return model.model.layers[0]


def _new_data(model: Any) -> None:
    weight = next(model.parameters())
    weight.data = weight.data * 1.5


def _changed_epsilon(model: Any) -> None:
    model.config.rms_norm_eps = _layer(model).input_layernorm.variance_epsilon = 0.5


def _changed_in_training(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def _to_and_fro(model: Any) -> None:
    # Rounds the weights, and gives memory back that the next conversion may use.
    model.bfloat16().float()


def _with_another_class(model: Any) -> None:
    _layer(model).mlp.__class__ = type("Other", (type(_layer(model).mlp),), {})


def _pruned(model: Any) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(_layer(model).mlp.down_proj, "weight", amount=0.5)


def _attached(selector: str) -> Callable[[Any], None]:
    def attach(model: Any) -> None:
        from sparsort.attention.attach import attach_index_branch

        attach_index_branch(model, selector=selector)

    return attach


EDITS: dict[str, Callable[[Any], Any]] = {
    "parameter": _changed_in_training,
    "data": _new_data,
    "dtype": lambda model: model.bfloat16(),
    "dtype and back": _to_and_fro,
    "buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2.0),
    "hook": lambda model: _layer(model).register_forward_hook(lambda *_: None),
    "pre-hook": lambda model: _layer(model).mlp.register_forward_pre_hook(lambda *_: None),
    "pruned": _pruned,
    "config": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "epsilon": _changed_epsilon,
    "module's epsilon": lambda model: setattr(_layer(model).input_layernorm, "variance_epsilon", 0.5),
    "activation": lambda model: setattr(_layer(model).mlp, "act_fn", torch.nn.ReLU()),
    "forward": lambda model: setattr(_layer(model), "forward", lambda hidden, **_: hidden),
    "class": _with_another_class,
    "training": lambda model: model.train(),
    "fewer layers": lambda model: model.model.layers.__delitem__(-1),
    "window": _attached("window"),
    "moba": _attached("moba"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_refused(edit: str, backbone: Backbone) -> None:
    assert obstacle(backbone) is None
    EDITS[edit](backbone.loaded.model)
    expected = "index branch" if edit in ("window", "moba") else "has changed since it was loaded"
    assert expected in str(obstacle(backbone))


def test_a_hook_on_all_modules_and_a_replaced_method_of_a_class_are_edits(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "has changed" in str(obstacle(backbone))
    finally:
        handle.remove()
    assert obstacle(backbone) is None
    monkeypatch.setattr(type(backbone.blocks[0]), "forward", lambda self, hidden, **_: hidden)
    assert "has changed" in str(obstacle(backbone))


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3", "opt", "gpt_neox", "no_norm", "longrope"])
def test_running_a_model_is_no_edit(family: str, make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny_model("llama" if family == "longrope" else family)
    if family == "longrope":
        # It computes its frequencies in every pass.
        folder = shutil.copytree(folder, tmp_path / "longrope")
        config = json.loads((folder / "config.json").read_text())
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "factor": 8.0}
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12, **factors}
        config["rope_parameters"] = rope
        (folder / "config.json").write_text(json.dumps(config))
    scorer = SparsityScorer(str(folder), site="layer:1")
    for rows in (ROWS, ROWS[:1]):
        assert len(scorer.score(rows, "{q}", shard_rows=5).difficulty) == len(rows)
        assert obstacle(scorer.backbone) is None
