"""Mistakes that a configuration shows are found before weights are read: no model here has weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import app
from sparsort.scoring.loading import load as loading
from sparsort.scoring.loading.load import load_model
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.early_checks import check_model, outline_of
from sparsort.scoring.scorers.candidates import CandidateScorer
from sparsort.scoring.scorers.pooling import fit_outliers
from sparsort.scoring.scorers.sparsity import SparsityScorer


@pytest.fixture
def without_weights(tmp_path: Path) -> Callable[[Path], Path]:
    def copied(folder: Path) -> Path:
        target = shutil.copytree(folder, tmp_path / folder.name)
        (target / "model.safetensors").unlink()
        return target

    return copied


# family, site, outlier rule; each is wrong for a model of 3 blocks, width 64 and an MLP of width 128
MISTAKES = [
    ("llama", "layer:999", "none"),
    ("llama", "layer:-4", "none"),
    ("gpt2", "mlp:3", "none"),
    ("llama", "layer:x", "none"),
    ("no_norm", "post_norm", "none"),
    ("qwen3", "pre_norm", "drop:64"),
    ("qwen3", "layer:1", "drop:100"),
    ("gemma3", "mlp", "drop:128"),
]


def _with_the_model_in_memory(folder: Path, site: str, rule: str) -> None:
    backbone = Backbone(load_model(folder))
    fit_outliers(rule, np.ones(backbone.width(backbone.site(site))), 1)


@pytest.mark.parametrize(("family", "site", "rule"), MISTAKES)
def test_a_mistake_is_found_without_weights_and_in_the_words_of_a_loaded_model(
    family: str,
    site: str,
    rule: str,
    make_tiny_model: Callable[..., Path],
    without_weights: Callable[[Path], Path],
) -> None:
    folder = make_tiny_model(family)
    with pytest.raises(SparsortError) as loaded:
        _with_the_model_in_memory(folder, site, rule)
    empty = str(without_weights(folder))
    for make in (
        lambda: SparsityScorer(empty, site=site, outliers=rule),
        lambda: CandidateScorer(empty, sites=[site], outliers=[rule]),
        lambda: check_model(empty, sites=[site], outliers=[rule]),
    ):
        with pytest.raises(SparsortError) as early:
            make()
        # A name that is no site's is refused before there is a model whose blocks could be listed.
        assert str(early.value).split(". Choose")[0] == str(loaded.value).split(". Choose")[0]


@pytest.mark.parametrize(
    ("family", "site", "rule"),
    [
        ("llama", "layer:2", "drop:63"),
        ("llama", "layer:-3", "rms"),
        ("llama", "post_norm", "none"),
        ("gemma3", "mlp", "drop:127"),
        ("gpt2", "mlp:2", "drop:3"),
        ("opt", "mlp", "none"),
        ("gpt_neox", "mlp:0", "none"),
        ("no_norm", "pre_norm", "drop:9"),
    ],
)
def test_settings_that_a_model_supports_are_accepted(
    family: str, site: str, rule: str, make_tiny_model: Callable[..., Path]
) -> None:
    folder = make_tiny_model(family)
    check_model(folder, sites=[site], outliers=[rule], max_length=1024)
    SparsityScorer(str(folder), site=site, outliers=rule)


def test_a_mixture_of_experts_has_no_single_mlp(tmp_path: Path, make_tiny_model: Callable[..., Path]) -> None:
    from transformers import MixtralConfig

    folder = shutil.copytree(make_tiny_model("llama"), tmp_path / "mixtral")
    (folder / "model.safetensors").unlink()
    MixtralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(folder)
    with pytest.raises(SparsortError, match="mixture of experts"):
        SparsityScorer(str(folder), site="mlp")


def test_the_context_is_known_without_weights(
    make_tiny_model: Callable[..., Path], without_weights: Callable[[Path], Path]
) -> None:
    folder = without_weights(make_tiny_model("gpt2"))
    with pytest.raises(
        SparsortError, match=r"max_length is 1025, but the context of .* has 1024 tokens\. Pass at most 1024"
    ):
        check_model(folder, max_length=1025)
    check_model(folder, max_length=1024)


def test_a_token_budget_of_nothing_is_refused_first(without_weights: Any, make_tiny_model: Any) -> None:
    with pytest.raises(SparsortError, match="token_budget is 0"):
        SparsityScorer(str(without_weights(make_tiny_model("llama"))), token_budget=0)


def test_a_dtype_that_the_device_lacks_is_refused_before_the_model(
    make_tiny_model: Callable[..., Path],
    without_weights: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty

    def as_on_mps(*size: int, **options: Any) -> torch.Tensor:
        if options.get("dtype") == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return empty(*size, **options)

    monkeypatch.setattr(loading.torch, "empty", as_on_mps)
    with pytest.raises(SparsortError, match=r"cannot compute in float64 on the device 'cpu'.*--dtype auto"):
        load_model(without_weights(make_tiny_model("llama")), dtype="float64", device="cpu")


def test_a_model_without_a_tokenizer_is_refused_before_its_weights(
    make_tiny_model: Callable[..., Path], without_weights: Callable[[Path], Path]
) -> None:
    folder = without_weights(make_tiny_model("llama"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SparsortError, match="tokenizer"):
        load_model(folder)


def test_a_configuration_that_cannot_be_built_is_left_to_loading(
    make_tiny_model: Callable[..., Path], without_weights: Callable[[Path], Path]
) -> None:
    folder = without_weights(make_tiny_model("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "no such function"}))
    outline = outline_of(str(folder))
    assert outline is not None
    assert outline.model is None
    check_model(folder, sites=["mlp"], outliers=["drop:3"])
    (folder / "config.json").write_text("{")
    assert outline_of(str(folder)) is None


INVALID = [
    {"max_position_embeddings": "2048"},
    {"max_position_embeddings": [2048]},
    {"num_attention_heads": "x"},
    {"num_attention_heads": 2.5},
    {"num_attention_heads": 0},
    {"hidden_size": None},
    {"hidden_size": 33},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"rope_parameters": "x"},
    {"rope_parameters": {"rope_type": "x"}},
    {"model_type": 7},
]


@pytest.mark.parametrize("settings", INVALID, ids=lambda settings: json.dumps(settings))
@pytest.mark.parametrize("asked", [{"sites": ["layer:1"]}, {"max_length": 16}], ids=["site", "max_length"])
def test_an_invalid_configuration_is_an_error_of_loading(
    settings: dict[str, Any], asked: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(make_tiny_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))

    def check_and_load() -> None:
        check_model(folder, **asked)
        # What does not show early is left to loading.
        Backbone(load_model(folder))

    with pytest.raises(SparsortError, match=f"{re.escape(str(folder))}|LlamaModel has no list of -?[01] blocks"):
        check_and_load()


def test_building_a_model_moves_no_random_state(make_tiny_model: Callable[..., Path]) -> None:
    before = torch.random.get_rng_state()
    assert outline_of(str(make_tiny_model("llama"))) is not None
    assert torch.equal(torch.random.get_rng_state(), before)


ROWS = [{"id": str(n), "q": f"What is {n}?", "a": f" {n}", "label": "x" if n % 2 else "y"} for n in range(60)]
TRAIN = ["train", "FILE", "--text", "{q}", "--out", "OUT", "--schedule", "shuffle"]
TEXT = ["-p", "Question: {q}"]
QUERY = ["order", "FILE", *TEXT, "-a", "{a}", "-q", "What?", "-k", "2"]
SCORE = ["score", "FILE", *TEXT]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SCORE, "--site", "layer:999"], "the model has 3 blocks"),
        ([*SCORE, "--outliers", "drop:64"], "drops every one of the 64 dimensions"),
        ([*SCORE, "--max-length", "4000"], "has 1024 tokens"),
        ([*SCORE, "--chat"], "no chat template"),
        ([*QUERY, "--site", "layer:999"], "the model has 3 blocks"),
        ([*QUERY, "--chat"], "no chat template"),
        ([*QUERY, "--site", "layers:1"], "unknown site"),
        ([*QUERY, "--dtype", "float31"], "unknown dtype"),
        ([*QUERY, "--device", "meat"], "cannot use the device 'meat'.*Use auto, or a device of this machine: cpu"),
        ([*QUERY, "--pooling", "lst"], "unknown pooling"),
        ([*QUERY, "--outliers", "drop:64"], "drops every one of the 64 dimensions"),
        (["calibrate", "FILE", *TEXT, "-a", "{a}", "--sites", "layer:999"], "the model has 3 blocks"),
        (["calibrate", "FILE", *TEXT, "-a", "{a}", "--max-length", "4000"], "has 1024 tokens"),
        ([*TRAIN, "--cut-length", "2000"], "the model .* takes 1024"),
    ],
)
def test_the_commands_find_mistakes_without_weights(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    make_tiny_model: Callable[..., Path],
    without_weights: Callable[[Path], Path],
) -> None:
    folder = without_weights(make_tiny_model("llama"))
    for path in folder.glob("chat_template*"):
        path.unlink()
    rows = ROWS if arguments[0] != "train" else [*ROWS, {"id": "long", "q": "word " * 3000}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"FILE": str(file), "OUT": str(tmp_path / "out")}
    given = [names.get(argument, argument) for argument in arguments]
    result = CliRunner().invoke(app, [*given, "--model", str(folder)])
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.output.split())), result.output


def test_an_ablation_finds_a_mistake_without_weights(
    make_tiny_model: Callable[..., Path], without_weights: Callable[[Path], Path]
) -> None:
    from sparsort.curriculum.ablation.recipe.ablation import Ablation
    from sparsort.curriculum.ablation.run.model import Engine

    ablation = Ablation(tasks=("trec",), model=str(without_weights(make_tiny_model("llama"))), site="layer:999")
    with pytest.raises(SparsortError, match="the model has 3 blocks"):
        Engine(ablation)
