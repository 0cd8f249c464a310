"""`--export` of `sparsort order` and `sparsort choose`: the same demonstrations as in the prompt, and how they were ordered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import run

ROWS = [
    {"id": "a", "text": "a much longer review of a train that was late", "label": "0"},
    {"id": "b", "text": "short", "label": "1"},
    {"id": "c", "text": "the battery lasts a day", "label": "1"},
]
TEXT = ["--prompt", "Review: {text}\nLabel:", "--answer", " {label}"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_order_exports_the_prompt_that_it_prints(rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "demos.langchain.json"
    arguments = [
        "order",
        rows,
        *TEXT,
        "-q",
        "is it {this}",
        "--scorer",
        "length",
        "--model",
        "demo",
        "--export",
        file,
        "--json",
    ]
    printed = json.loads(run(*arguments).stdout)
    template = json.loads(file.read_text())["kwargs"]
    assert template["template"].format(text="is it {this}") == printed["prompt"]
    about = template["metadata"]["sparsort"]
    assert about["demonstrations"] == ["a", "c", "b"]
    assert (about["order"], about["scorer"], about["seed"]) == ("hard_to_easy", "length", 0)
    assert about["tokens_read"] > 0
    assert printed["export"] == str(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--select", "bm25", "-k", "2"], "selection by 'bm25' depends on the query"),
        (["--order", "similarity_ascending"], "the order 'similarity_ascending' depends on the query"),
        (["--max-tokens", "100"], "the token budget (--max-tokens) depends on the query"),
        (["--export-format", "openai"], "this prompt is plain text"),
        (["--export-format", "lmeval"], "lm-eval, dspy, langchain"),
    ],
)
def test_order_refuses_what_cannot_be_pinned(options: list[str], message: str, rows: Path, tmp_path: Path) -> None:
    result = run("order", rows, *TEXT, "-q", "x", "--export", tmp_path / "d.yaml", *options, code=2)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "d.yaml").exists()


def test_choose_exports_a_task_in_the_words_of_the_labels(
    rows: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    model, file, openai = make_tiny_model("gemma3"), tmp_path / "demos.yaml", tmp_path / "demos.openai.json"
    more = ["--model", model, "--labels", "0=bad,1=good", "--criterion", "pdo_null", "--orders", "2", "--seed", "5"]
    result = run("choose", rows, "--prompt", TEXT[1], *more, "--export", file, "--json")
    chosen = json.loads(result.stdout)
    task = yaml.safe_load(file.read_text())
    by_text = [row["text"] for row in chosen["demos"]]
    assert [sample["text"] for sample in task["fewshot_config"]["samples"]] == by_text
    assert task["doc_to_choice"] == ["bad", "good"]
    about = task["metadata"]["sparsort"]
    assert (about["criterion"], about["seed"], about["tokens_read"]) == ("pdo_null", 5, chosen["tokens_read"])
    run("choose", rows, "--prompt", TEXT[1], *more, "--chat", "--export", openai)
    turns = json.loads(openai.read_text())["messages"]
    assert {turn["content"] for turn in turns if turn["role"] == "assistant"} == {"bad", "good"}
    assert turns[0]["content"].startswith("Review: ")
