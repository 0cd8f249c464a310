"""The next step that an error names works: each mistake is made, its advice is followed, and the same command gets further."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_results import simulate
from transformers import Trainer
from typer.testing import CliRunner

import sparsort
from sparsort.curriculum.ablation.recipe.selectors import check_selector
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.demos.select import SELECTORS
from sparsort.curriculum.loading.trainer.trainer import CurriculumMixin
from sparsort.errors import SparsortError, unknown_choice
from sparsort.recipes.cli.app import app

WORDS = [
    "river",
    "lamp",
    "stone",
    "apple",
    "cloud",
    "paper",
    "forest",
    "window",
    "mirror",
    "ladder",
    "button",
    "candle",
]


def _run(*arguments: Any, code: int = 2) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output if code else result.stdout


def _rows(n: int, **fields: Callable[[int], Any]) -> list[dict[str, Any]]:
    # Every text has words of its own, so that no row nearly is another.
    rng = np.random.default_rng(0)
    return [
        {name: make(at) for name, make in fields.items()}
        | {"text": " ".join(f"{word}{at}" for word in rng.choice(WORDS, 6)), "label": ["no", "yes"][at % 2]}
        for at in range(n)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def ablate(make_tiny_model: Callable[..., Path]) -> list[Any]:
    """The options of an ablation that is only planned."""
    return [
        "-p",
        r"Text: {text}\nKind:",
        "-k",
        "2",
        "--test-rows",
        "8",
        "--dev-rows",
        "4",
        "--model",
        make_tiny_model(),
        "--dry-run",
    ]


def test_duplicate_ids_of_an_ablation_are_left_by_id_column(tmp_path: Path, ablate: list[Any]) -> None:
    file = _write(tmp_path / "rows.jsonl", _rows(40, id=lambda at: at // 2, key=lambda at: f"k{at}"))
    output = _run("ablate", file, *ablate)
    assert "'0' stands twice" in output
    assert "name another one with id_column (--id-column)" in output
    _run("ablate", file, *ablate, "--id-column", "key", code=0)


def test_duplicate_ids_of_the_data_of_a_plan_are_left_by_id_column(tmp_path: Path) -> None:
    rows = _rows(12, id=lambda at: at // 2, key=lambda at: f"k{at}")
    file, scores = _write(tmp_path / "rows.jsonl", rows), tmp_path / "scores"
    _run("score", file, "-p", "{text}", "--scorer", "compression", "--id-column", "key", "--out", scores, code=0)
    plan = ["plan", scores, "--data", file, "--batch-size", "4", "--out", tmp_path / "plan"]
    assert "(--id-column)" in _run(*plan)
    _run(*plan, "--id-column", "key", code=0)


def test_a_missing_label_column_is_named_with_its_option(tmp_path: Path, ablate: list[Any]) -> None:
    rows = [{"text": row["text"], "kind": row["label"]} for row in _rows(40)]
    file = _write(tmp_path / "rows.jsonl", rows)
    for options in ([], ["--labels", "no,yes"], ["--judge", "exact"]):
        output = _run("ablate", file, *ablate, *options)
        assert "no field 'label'. It has: text, kind" in output
        assert "The column of the label or answer is named by label (--label" in output
    _run("ablate", file, *ablate, "--label", "kind", code=0)
    output = _run("choose", file, "-p", "{text}", "-k", "2", "--criterion", "globale")
    assert "is named by label (--label" in output


def test_rows_left_out_are_counted_by_reason_and_the_steps_name_options(tmp_path: Path, ablate: list[Any]) -> None:
    file = _write(tmp_path / "rows.jsonl", _rows(30))
    output = _run("ablate", file, *ablate, "--test", file)
    assert "30 left out (30: it is, or nearly is, a test row)" in output.replace("\n", " ")
    assert "Give more training rows that do not repeat each other or the test rows" in output
    # Where fewer dev rows leave enough, the step names the option, and works.
    file = _write(tmp_path / "few.jsonl", _rows(12))
    assert "ask for fewer dev rows with dev_rows (--dev-rows)" in _run("ablate", file, *ablate, "--dev-rows", "6")
    _run("ablate", file, *ablate, "--dev-rows", "2", code=0)
    assert "raise max_demo_chars (--max-demo-chars)" in _run("ablate", file, *ablate, "--max-demo-chars", "3")


@pytest.mark.parametrize("name", ["topk", "TopK", "top-k", "KATE"])
def test_the_name_of_the_literature_leads_to_ours(name: str, tmp_path: Path) -> None:
    output = _run(
        "order", _write(tmp_path / "rows.jsonl", _rows(6)), "-q", "x", "-p", "{text}", "-a", "{label}", "--select", name
    )
    assert f"unknown selection method '{name}'. It is called 'knn' here." in output
    with pytest.raises(SparsortError, match="It is called 'knn' here"):
        sparsort.select_demos(_rows(6), "x", 2, method=name, prompt="{text}")
    with pytest.raises(SparsortError, match="It is called 'knn' here"):
        check_selector(name)


def test_aliases_lead_to_names_and_shadow_none() -> None:
    aliases = {alias: entry.name for entry in SELECTORS.values() for alias in entry.aliases}
    assert len(aliases) == sum(len(entry.aliases) for entry in SELECTORS.values())
    assert not set(aliases) & set(SELECTORS)
    # An alias of a choice that is not among these suggests nothing, and any other name the nearest.
    assert "called" not in str(unknown_choice("method", "topk", ["random"], aliases=aliases))
    assert "Did you mean 'vote_k'?" in str(unknown_choice("method", "vote", SELECTORS, aliases=aliases))


@pytest.mark.parametrize(
    "prompt", ['Answer as {"kind": 1}. {text}', "The set {x, y}: {text}", "{x} {text}", "{} {text}", "{a {b}} {text}"]
)
def test_braces_in_a_template_get_the_hint_to_double_them(prompt: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "rows.jsonl", _rows(4))
    assert "{{" in _run("score", file, "--scorer", "compression", "-p", prompt)
    row = _rows(1)[0]
    with pytest.raises(SparsortError, match=r"\{\{"):
        sparsort.build_prompt([row], row["text"], prompt=prompt, answer=" {label}", allow_leaks=True)
    doubled = prompt.replace("{", "{{").replace("}", "}}").replace("{{text}}", "{text}")
    _run("score", file, "--scorer", "compression", "-p", doubled, code=0)


def test_a_field_that_is_misspelt_is_no_literal_brace(tmp_path: Path) -> None:
    output = _run("score", _write(tmp_path / "rows.jsonl", _rows(4)), "--scorer", "compression", "-p", "{txt}")
    assert "Did you mean 'text'?" in output
    assert "{{" not in output


def test_results_load_from_the_folder_of_the_ablation(tmp_path: Path) -> None:
    results = simulate(["mr"], shots=(2,), sets=3, orders=2, items=8, arms=["pdo"], calibrated=(False,))
    results.save(tmp_path / "out" / "results")
    for folder in (tmp_path / "out", tmp_path / "out" / "results", tmp_path / "out" / "results" / "results.json"):
        assert Results.load(folder).groups[0].task == results.groups[0].task
    with pytest.raises(SparsortError, match=r"no results in .*Expected the folder of sparsort ablate --out"):
        Results.load(tmp_path)


def test_pool_mode_without_a_pacing_names_what_train_has(tmp_path: Path) -> None:
    file = _write(tmp_path / "rows.jsonl", _rows(8, id=lambda at: f"r{at}"))
    _run("score", file, "-p", "{text}", "--scorer", "compression", "--out", tmp_path / "scores", code=0)
    output = _run("plan", tmp_path / "scores", "--mode", "pool", "--batch-size", "4")
    assert "(--steps 1000 of sparsort plan)" in output.replace("\n", " ")


def test_a_mixin_after_the_trainer_is_refused_where_the_class_is_made() -> None:
    class Own(Trainer):  # type: ignore[misc]
        pass

    with pytest.raises(SparsortError, match=r"Put the mixin first: class Mine\(CurriculumMixin, Own\)"):
        type("Mine", (Own, CurriculumMixin), {})
    made = type("Mine", (CurriculumMixin, Own), {})
    # A class that is made from it may come first.
    assert issubclass(type("Last", (made,), {}), CurriculumMixin)


@pytest.mark.parametrize(
    "command",
    [
        ["order", "rows.jsonl", "--query", "hello", "--out", ""],
        ["train", "rows.jsonl", "--text", "{text}", "--out="],
        ["score", "rows.jsonl", "-o", ""],
        ["plan", ""],
    ],
)
def test_an_empty_path_is_refused(command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "is empty; expected a path" in result.stderr
