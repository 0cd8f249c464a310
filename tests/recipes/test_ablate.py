"""What the command line's SOURCE stands for: a recipe, a task file, ready tasks or a data file; and what is no such thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.errors import SparsortError
from sparsort.recipes.ablate import find_source

NOTHING: dict[str, Any] = dict.fromkeys(("data", "test", "prompt", "label", "labels", "answer", "judge", "chat"))


def source(name: str | Path, **options: Any) -> dict[str, Any]:
    return find_source(str(name), **{**NOTHING, **options})


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    rows = [{"text": f"film {number}", "mark": number % 2, "label": "x"} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_data_file(reviews: Path) -> None:
    (task,) = source(reviews, prompt="Review: {text}\nMark:", label="mark")["tasks"]
    assert isinstance(task, Task)
    assert (task.name, task.answer, task.train) == ("reviews", " {mark}", str(reviews))
    assert task.labels == {"0": "0", "1": "1"}


def test_an_answer_in_chat_is_scored_as_it_is_shown(reviews: Path) -> None:
    (task,) = source(reviews, prompt="Review: {text}", label="mark", chat=True)["tasks"]
    assert task.chat
    assert task.label_texts() == ["0", "1"]


def test_ready_tasks_also_beside_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trec").mkdir()
    monkeypatch.chdir(tmp_path)
    assert source("trec, mr", data=Path("there")) == {"tasks": ("trec", "mr"), "data": Path("there")}
    assert source("trec", data=Path("there"))["tasks"] == ("trec",)


def test_a_recipe_and_a_task_file(tmp_path: Path) -> None:
    recipe, task = tmp_path / "recipe.toml", tmp_path / "task.toml"
    recipe.write_text('tasks = ["trec"]\nsets = 3\n', encoding="utf-8")
    task.write_text('prompt = "T: {text}"\nanswer = " {label}"\nlabels = {a = "tasks", b = "no"}\n', encoding="utf-8")
    assert source(recipe, data=Path("there"))["sets"] == 3
    assert source(recipe, data=Path("there"))["data"] == Path("there")
    assert [one.name for one in source(task)["tasks"]] == ["task"]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("nothing.jsonl", {"prompt": "{text}"}, "neither a file nor a ready task"),
        ("trek", {}, "ready tasks"),
        ("latin.toml", {}, "not valid UTF-8"),
        ("broken.toml", {}, "not valid TOML"),
        ("none.toml", {}, "cannot read"),
        ("reviews.jsonl", {}, "which columns make the prompt"),
        ("reviews.jsonl", {"prompt": "{text}", "labels": "0=,1=good"}, "empty"),
    ],
)
def test_what_is_no_source_is_told(
    name: str, options: dict[str, Any], told: str, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reviews.parent)
    Path("latin.toml").write_bytes(b'prompt = "\xe9"\n')
    Path("broken.toml").write_text("tasks = [\n", encoding="utf-8")
    with pytest.raises(SparsortError, match=told):
        source(name, **options)
