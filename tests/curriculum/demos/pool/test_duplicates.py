"""Demonstrations that are in a prompt twice: every function that returns or assembles them says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsort.curriculum.demos.order import order_demos
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.prompt import assemble, build_prompt
from sparsort.curriculum.demos.select import select_demos
from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import app

ROWS = [
    {"id": "a", "question": "Who painted it?", "answer": "Ana"},
    {"id": "b", "question": "Where is the station?", "answer": "north"},
    {"id": "c", "question": "Who painted it?", "answer": "Ana"},
    {"id": "d", "question": "Who painted it?", "answer": "Ben"},
]
SAME = "2 demonstrations have the same content: 'a', 'c'."
TWICE = [ROWS[0], ROWS[1], {**ROWS[1], "id": "a"}]
PROMPT = {"prompt": "{question}", "answer": " {answer}"}


def test_one_sentence_for_each_set_of_duplicates() -> None:
    assert duplicates(ROWS[1:]) == []
    assert duplicates(ROWS) == [SAME]
    assert duplicates([{"q": "x"}, {"q": "x"}, {"q": "y"}, {"q": "x"}]) == [
        "3 demonstrations have the same content: '0', '1', '3'."
    ]
    assert duplicates(TWICE) == [
        "2 demonstrations have the id 'a': they are at the positions 0, 2, counted from 0.",
        "2 demonstrations have the same content: 'b', 'a'.",
    ]
    # The same row given twice is reported once, and a position is not the id of another row.
    assert duplicates([ROWS[0], ROWS[0]]) == [
        "2 demonstrations have the id 'a': they are at the positions 0, 1, counted from 0."
    ]
    assert duplicates([{"q": "x"}, {"q": "y", "id": 0}]) == []


def test_what_a_prompt_does_not_show_makes_no_difference() -> None:
    demos = [{**row, "source": n} for n, row in enumerate(ROWS)]
    assert duplicates(demos) == []
    assert assemble(demos, "Why?", **PROMPT).notes == [SAME]


def test_selections_and_prompts_report_duplicates_and_keep_them(caplog: pytest.LogCaptureFixture) -> None:
    chosen = select_demos(ROWS, None, 4, method="first")
    assert (chosen.notes, len(chosen.demos)) == ([SAME], 4)
    assert select_demos(ROWS, None, 2, method="first").notes == []
    with caplog.at_level(logging.WARNING, "sparsort"):
        ordered = order_demos(ROWS, [1, 2, 3, 4], "easy_to_hard")
        assert [row["id"] for row in ordered] == ["a", "b", "c", "d"]
        assert build_prompt(ROWS, "Why?", **PROMPT).count("Ana") == 2
    assert [record.getMessage() for record in caplog.records] == [SAME, SAME]
    caplog.clear()
    # Those that a budget drops are in no prompt.
    count = len
    short = assemble(ROWS, "Why?", **PROMPT, max_tokens=60, tokenizer=count)
    assert short.kept == [2, 3]
    assert short.notes == []


def test_the_commands_report_them_on_stderr_and_in_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    asked = ["order", str(file), "-q", "Why?", "--order", "given", "-p", "{question}"]
    result = CliRunner().invoke(app, asked)
    assert SAME in result.stderr
    assert result.exit_code == 0
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert SAME in found["notes"]
    assert len(found["demonstrations"]) == 4
    twice = CliRunner().invoke(app, [*asked, "--ids", "a,b,a"])
    assert twice.exit_code == 2
    assert "the id 'a' is listed 2 times; list each demonstration once" in twice.stderr


def test_an_id_that_is_named_twice_is_refused() -> None:
    with pytest.raises(SparsortError, match="listed 2 times"):
        select_demos(ROWS, None, method="ids", ids=["b", "b"])


def test_choose_and_the_adapters_report_them(
    make_tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sparsort.recipes.adapters.demonstrations import DemoChooser, DemoOptions
    from sparsort.recipes.choose.choose import choose_order

    with caplog.at_level(logging.WARNING, "sparsort"):
        DemoChooser(ROWS, DemoOptions(order="given"))
    assert [record.getMessage() for record in caplog.records] == [f"the pool of demonstrations: {SAME.rstrip('.')}"]
    demos = [{"text": text, "label": label} for text, label in (("red", 0), ("blue", 1), ("red", 0))]
    chosen = choose_order(
        demos, [{"text": "green sky"}], prompt="{text}:", by="pdo", orders=2, model=str(make_tiny_model("llama"))
    )
    assert "2 demonstrations have the same content: '0', '2'." in chosen.notes
    assert "same content" in str(chosen.summary()["notes"])
