"""`sparsort train --recipe`: from the command line to a sparse model, also through a kill."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import ForkServer
from typer.testing import CliRunner

import sparsort
from sparsort.recipes.cli.app import app
from sparsort.recipes.cli.commands import train as cli_train
from sparsort.recipes.train.recipe import RECIPES

ROOT = Path(__file__).parents[3]
TEXT = "{question} {answer}"
RECIPE = """
[train]
max_length = 32
learning_rate = 2e-3
max_steps = 14
save_steps = 4
[curriculum]
stages = 2
batch_size = 4
[attention]
block_size = 4
blocks = 2
index_dim = 8
[schedule]
warmup_share = 0.25
start = 6
anneal_share = 0.5
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = (ROOT / "examples" / "graded.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:32]), encoding="utf-8")
    (folder / "mine.toml").write_text(RECIPE, encoding="utf-8")
    asked = ["score", folder / "rows.jsonl", "--prompt", TEXT, "--scorer", "compression", "--out", folder / "scores"]
    assert CliRunner().invoke(app, [str(part) for part in asked]).exit_code == 0
    return folder


def _command(data: Path, out: Path, *more: Any) -> list[str]:
    asked = (data / "rows.jsonl", "--text", TEXT, "--scores", data / "scores", "--recipe", data / "mine.toml")
    return [str(part) for part in (*asked, "--out", out, *more)]


def _cli(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def _run(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return found


# `sparsort` that dies as soon as its first checkpoint is sealed; argv: its arguments.
_KILLED = """
from handshake import die
from sparsort.storage import manifests
from sparsort.__main__ import main
plain = manifests.write_manifest
def write_manifest(folder, **options):
    plain(folder, **options)
    if folder.name == "checkpoint-4":
        die()
manifests.write_manifest = write_manifest
main()
"""


def test_a_killed_run_continues_and_ends_the_same(data: Path, tmp_path: Path, forks: ForkServer) -> None:
    straight = json.loads(_cli(*_command(data, tmp_path / "straight", "--json")).stdout)
    assert straight["sparse"]["saving"] > 0
    assert 0 < straight["sparse"]["mass"] < 1
    command = _command(data, tmp_path / "run")
    assert forks.run(tmp_path / "killed", (_KILLED, ["train", *command], {})) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "result.json").exists()
    shown = _cli(*command).stdout
    for phrase in ("held-out loss", "selector's loss (KL)", "attention mass caught", "block recall", "attention FLOPs"):
        assert phrase in shown
    assert "Resumed from step" in shown
    for name in ("history.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert sparsort.load_sparse(tmp_path / "run" / "model").sparse_attention.config.block_size == 4
    other = _cli(*command[:-4], "--recipe", "sparse", "--out", tmp_path / "run", code=2)
    assert "has another run" in other.stderr


def test_options_go_before_the_recipe_and_the_recipe_before_defaults(data: Path, tmp_path: Path) -> None:
    _cli(*_command(data, tmp_path / "a", "--max-steps", 1))
    found = _run(tmp_path / "a")
    assert (found["learning_rate"], found["max_length"], found["steps"]) == (2e-3, 32, 1)
    assert found["curriculum"]["stages"] == 2
    # Also where an option has the default's value.
    options = ("--lr", 5e-4, "--cut-length", 1024, "--schedule", "shuffle", "--epochs", 1, "--batch-size", 8)
    _cli(*_command(data, tmp_path / "b", *options))
    found = _run(tmp_path / "b")
    assert (found["learning_rate"], found["max_length"], found["steps"]) == (5e-4, 1024, 4)
    assert (found["curriculum"]["schedule"], found["curriculum"]["stages"]) == ("shuffle", None)
    assert found["curriculum"]["batch_size"] == 8


def test_a_plan_replaces_the_recipes_curriculum(data: Path, tmp_path: Path) -> None:
    asked = ("plan", data / "scores", "--batch-size", 4, "--stages", 4, "--out", tmp_path / "plan")
    planned = CliRunner().invoke(app, [str(part) for part in asked])
    assert planned.exit_code == 0, planned.output
    command = [part for part in _command(data, tmp_path / "run", "--max-steps", 1) if part != "--scores"]
    command.remove(str(data / "scores"))
    _cli(*command, "--plan", tmp_path / "plan")
    assert _run(tmp_path / "run")["curriculum"]["stages"] == 4


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("sparse_mobba", "Did you mean 'sparse_moba'"),
        ("sparse_retrofit", "Name a checkpoint with model (--model)"),
        ("nowhere.toml", "cannot read nowhere.toml"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(recipe: str, message: str, data: Path, tmp_path: Path) -> None:
    result = _cli(*_command(data, tmp_path / "run"), "--recipe", recipe, code=2)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_another_branch_leaves_the_folder_to_the_right_one(data: Path, tmp_path: Path) -> None:
    options = ("--max-steps", 1, "--cut-length", 64, "--stages", 2)
    _cli(*_command(data, tmp_path / "first", *options), "--recipe", "sparse")
    again = (*_command(data, tmp_path / "again", *options), "--model", tmp_path / "first" / "model", "--recipe")
    message = " ".join(_cli(*again, "sparse_retrofit", code=2).stderr.split())
    assert "selector ('index_branch' there, 'seer' in the recipe)" in message
    assert "remove sparse_attention from the config.json" in message
    _cli(*again, "sparse")


def test_a_run_without_a_recipe_says_nothing_of_sparse_attention(data: Path, tmp_path: Path) -> None:
    asked = (data / "rows.jsonl", "--text", TEXT, "--schedule", "shuffle", "--max-steps", 1, "--cut-length", 16)
    shown = _cli(*asked, "--out", tmp_path).stdout
    assert "FLOPs" not in shown
    assert json.loads(_cli(*asked, "--out", tmp_path, "--json").stdout)["sparse"] is None


def test_the_help_shows_every_recipe_and_an_example_that_runs_and_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom sparsort.__main__ import main\nsys.argv = ['sparsort', 'train', '--help']\n"
        "try: main()\nexcept SystemExit as done: assert not done.code, done.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--recipe" in done.stdout
    assert all(name in done.stdout for name in RECIPES)
    example = cli_train.EXAMPLE.rpartition("`sparsort ")[2].rstrip("`")
    assert f"sparsort {example}" in done.stdout
    command, file, *options = shlex.split(example)
    assert (command, file) == ("train", "examples/graded.jsonl")
    place = options.index("run/")
    options[place] = str(tmp_path / "run")
    _cli(ROOT / file, *options, "--max-steps", 1)
    assert _run(tmp_path / "run")["attention selector"] == "index_branch"


def test_the_defaults_of_the_command_are_those_of_the_configuration() -> None:
    import inspect
    from dataclasses import fields

    from sparsort.recipes.train.config import TrainConfig

    signature = inspect.signature(cli_train.train).parameters
    for field in fields(TrainConfig):
        assert signature[field.name].default == field.default, field.name
