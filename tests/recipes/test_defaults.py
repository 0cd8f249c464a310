"""Python and the command line have the same defaults, and the order that is taken by default follows the scorer."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import sparsort
from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.demos.order import default_order, order_demos
from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.errors import SparsortError
from sparsort.options import unescape
from sparsort.recipes.calibrate import calibrate
from sparsort.recipes.choose.choose import choose_order
from sparsort.recipes.choose.rows import read_rows
from sparsort.recipes.cli.app import app
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.plan import PlanOptions
from sparsort.recipes.report import make_report
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.score import score_file
from sparsort.recipes.train.config import TrainConfig
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec

GROUP: Any = typer.main.get_command(app)
ROWS = [
    {"id": f"q{n}", "question": " ".join(f"word{n * k % 7}" for k in range(n + 1)), "answer": str(n)} for n in range(6)
]


def _options(command: str) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in GROUP.commands[command].params}


def _defaults(function: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(function):
        # The dataclasses in one are compared by themselves.
        return {
            field.name: field.default
            for field in dataclasses.fields(function)
            if not dataclasses.is_dataclass(field.default)
        }
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("command", "functions", "renamed"),
    [
        ("score", [ScorerConfig, PromptSpec, ModelSpec, score_file, sparsort.SparsityScorer], {}),
        ("order", [ScorerConfig, OrderConfig, PromptSpec, ModelSpec, sparsort.assemble], {}),
        # `queries` is a file on the command line and the rows themselves in `choose_order`.
        ("choose", [choose_order, read_rows], {}),
        ("calibrate", [calibrate], {"draws": "n_boot"}),
        ("ablate", [Ablation], {}),
        ("plan", [PlanOptions, CurriculumSettings], {}),
        ("train", [TrainConfig], {}),
        ("report", [make_report], {}),
    ],
)
def test_defaults_are_the_same(command: str, functions: list[Any], renamed: dict[str, str]) -> None:
    options = {renamed.get(name, name): default for name, default in _options(command).items()}
    compared = 0
    for function in functions:
        for name, default in _defaults(function).items():
            # None is the option that was not given: whoever takes it uses the default of the setting.
            if name not in options or options[name] is None or (name, function) == ("queries", choose_order):
                continue
            given = unescape(options[name]) if isinstance(options[name], str) else options[name]
            assert _plain(given) == _plain(default), (command, name, function)
            compared += 1
    assert compared >= {"report": 0, "ablate": 2}.get(command, 3)


def _plain(value: Any) -> Any:
    """A list on the command line is one text with commas."""
    return ",".join(value) if isinstance(value, (list, tuple)) else value


def test_the_other_number_of_draws_follows_the_first() -> None:
    assert _defaults(calibrate)["n_perm"] == _options("calibrate")["draws"] - 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("scorer", "order"),
    [
        ("sparsity", "sparse_to_dense"),
        ("compression", "hard_to_easy"),
        ("length", "hard_to_easy"),
        ("random", "hard_to_easy"),
        ("answer_loss", "hard_to_easy"),
    ],
)
def test_the_default_order_follows_the_scorer(
    scorer: str, order: str, file: Path, make_tiny_model: Callable[..., Path]
) -> None:
    model = [] if scorer in ("compression", "random") else ["--model", str(make_tiny_model("llama"))]
    asked = ["order", str(file), "-q", "What?", "--scorer", scorer, *model, "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["order"] == order
    difficulty = [demo["difficulty"] for demo in found["demonstrations"]]
    assert difficulty == sorted(difficulty, reverse=True)


def test_an_order_that_does_not_go_with_the_scorer_is_the_mistake_that_is_told(file: Path, tmp_path: Path) -> None:
    asked = ["order", str(file), "-q", "What?", "--scorer", "compression"]
    told = CliRunner().invoke(app, [*asked, "--order", "sparse_to_dense"])
    assert told.exit_code == 2
    assert "'sparse_to_dense' is by sparsity, but these scores are of kind 'compression'" in told.stderr
    told = CliRunner().invoke(app, [*asked, "--metric", "gini"])
    assert told.stderr.startswith("sparsort: --metric gini has no effect: sparsity reads it")
    told = CliRunner().invoke(app, ["order", str(file), "-q", "What?", "--scorer", "compresion"])
    assert "Did you mean 'compression'" in told.stderr
    # Scores made before bring their kind.
    sparsort.CompressionScorer().score(str(file), "{question}").save(tmp_path / "scores")
    found = CliRunner().invoke(app, ["order", str(file), "-q", "What?", "--scores", str(tmp_path / "scores"), "--json"])
    assert json.loads(found.stdout)["order"] == "hard_to_easy"


def test_python_takes_the_same_order() -> None:
    table = sparsort.CompressionScorer().score(ROWS, "{question}")
    hardest_first = [row["id"] for row in order_demos(ROWS, table)]
    assert hardest_first == table.ranked()[::-1]
    assert [row["id"] for row in order_demos(ROWS, [1, 2, 3, 4, 5, 6])] == [row["id"] for row in ROWS[::-1]]
    assert (default_order("sparsity"), default_order(None), default_order("column")) == (
        "sparse_to_dense",
        "sparse_to_dense",
        "hard_to_easy",
    )


def test_the_help_of_dtype_lists_what_the_check_accepts() -> None:
    import torch

    from sparsort.scoring.loading.load import check_dtype

    for name in ("score", "order", "calibrate", "choose", "ablate"):
        option = next(each for each in GROUP.commands[name].params if each.name == "dtype")
        offered = option.help.rstrip(".").replace(" or ", ", ").split(", ")
        for dtype in offered:
            check_dtype(dtype)
            assert dtype == "auto" or isinstance(getattr(torch, dtype), torch.dtype)
        with pytest.raises(SparsortError) as caught:
            check_dtype("float31")
        assert str(caught.value).endswith(f"Choose one of: {', '.join(offered)}.")
