"""Missing values are treated alike, and nested values are refused, by everything that reads a user's rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sparsort
from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.splits import split_rows
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task, check_rows, task_from_flags
from sparsort.curriculum.demos.pool.pool import DemoPool, field_text
from sparsort.curriculum.demos.pool.rows import id_of, name_of
from sparsort.curriculum.demos.select import select_demos
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError
from sparsort.recipes.ablate import find_source
from sparsort.recipes.adapters.demonstrations import DemoChooser, DemoOptions
from sparsort.recipes.calibrate import _number
from sparsort.recipes.choose.rows import read_rows
from sparsort.recipes.cli.commands.score import text_of
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.order.order import order_file
from sparsort.recipes.score.config import ScorerConfig
from sparsort.scoring.data.digests import digest_of
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import PromptSpec

MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), torch.tensor(float("nan"))]
NESTED: list[tuple[Any, str]] = [
    (["joy"], "a list"),
    ({"lang": "de"}, "a dictionary"),
    ({"joy"}, "a set"),
    (b"joy", "bytes"),
    (np.array(["joy"]), "an array"),
    (object(), "an object"),
]
TEXTS = ["red apples", "green pears", "blue plums", "old wine", "new bread", "warm milk"]


def _rows(column: str, value: Any) -> list[dict[str, Any]]:
    """Six rows with two labels, whose second has the value in a column."""
    rows = [{"id": f"q{n}", "text": text, "label": "ab"[n % 2], "level": n} for n, text in enumerate(TEXTS)]
    return [{**row, column: value} if n == 1 else row for n, row in enumerate(rows)]


def _outcome(call: Callable[[], Any], value: Any) -> Any:
    """What a call gives, or its error with the word for the value taken out."""
    try:
        return call()
    except SparsortError as error:
        words = (
            "null",
            "no value",
            "NaN (a missing value)",
            "NaT (a missing value)",
            "<NA> (a missing value)",
            f"{value} (a missing value)",
        )
        text = str(error)
        for word in sorted(words, key=len, reverse=True):
            text = text.replace(word, "·")
        return text


def _train_text(value: Any) -> Any:
    from sparsort.recipes.train.text import TrainText

    return TrainText(template="{text}").of({"text": value}, None, where="row 1")


READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": lambda v: sparsort.build_prompt(_rows("text", v), {"text": "x"}, prompt="{text}", answer=" {label}"),
    "answer": lambda v: sparsort.build_prompt(_rows("label", v), {"text": "x"}, prompt="{text}", answer=" {label}"),
    "query": lambda v: sparsort.build_prompt(_rows("x", 1), {"text": v}, prompt="{text}", answer=" {label}"),
    "score": lambda v: list(sparsort.CompressionScorer().score(_rows("text", v), "{text}").column("status")),
    "path": lambda v: list(sparsort.CompressionScorer().score([{"x": {"y": v}}, {"x": {"y": "w"}}], "{x.y}").column("status")),
    "column": lambda v: list(sparsort.ColumnScorer("level").score(_rows("level", v)).column("status")),
    "id": lambda v: open_rows(_rows("id", v)).count(),
    "id of a demonstration": lambda v: (id_of({"id": v}, 3), name_of({"id": v}, 3)),
    "score by id": lambda v: sparsort.ColumnScorer("level").score(_rows("x", 1)).difficulty_of([{"id": v, "level": 2}]).tolist(),
    "digest": lambda v: digest_of({"a": 1, "b": v}),
    "labels": lambda v: task_from_flags(_rows("label", v), prompt="{text}"),
    "gold": lambda v: check_rows(_task(), _rows("label", v)),
    "balanced": lambda v: select_demos(_rows("label", v), None, 2, method="balanced", label="label"),
    "compared": lambda v: DemoPool(_rows("text", v), prompt="{text}").word_scores({"text": "apples"}),
    "field": lambda v: field_text({"text": v}, "text", "row 1"),
    "split ids": lambda v: [row["id"] for row in split_rows(_task(), _rows("id", v), n_test=1, n_dev=0).pool],
    "groups of a column": lambda v: plan_curriculum(np.arange(6.0), data=_rows("label", v), groups="label", batch_size=2),
    "groups": lambda v: plan_curriculum(np.arange(6.0), groups=["a", v, "a", "b", "b", "b"], batch_size=2),
    "scores": lambda v: plan_curriculum([0.0, v, 1.0, 2.0], batch_size=2, unscored="last").notes["unscored"],
    "score column": lambda v: DemoChooser(_rows("level", v), DemoOptions(score_column="level", missing="drop")).choose(None, 6),
    "order": lambda v: sparsort.order_demos(_rows("x", 1), scores=[1, v, 0, 2, 3, 4], order="easy_to_hard", missing="last"),
    "level": lambda v: str(_number(v, "here")),
    "train text": _train_text,
    "excerpt": lambda v: text_of(None, {"text": "words", "x": v}),
}  # fmt: skip


def _task() -> Task:
    return Task(name="t", prompt="{text}", answer=" {label}", labels={"a": "a", "b": "b"})


@pytest.mark.parametrize("reader", READERS)
def test_every_form_of_nothing_is_treated_as_none_is(reader: str) -> None:
    wanted = _outcome(lambda: READERS[reader](None), None)
    for value in MISSING[1:]:
        found = _outcome(lambda value=value: READERS[reader](value), value)
        assert found == wanted, value


@pytest.mark.parametrize(
    "reader", [name for name in READERS if name not in ("digest", "excerpt", "id of a demonstration")]
)
def test_nested_values_are_refused_by_every_reader(reader: str) -> None:
    for value, _ in NESTED:
        with pytest.raises(SparsortError):
            READERS[reader](value)


@pytest.mark.parametrize("value", MISSING)
def test_a_missing_system_turn_is_none_and_a_missing_query_or_template_is_named(value: Any) -> None:
    demos, query = [{"text": "red apples", "label": "a"}], {"text": "old wine"}
    templates: dict[str, Any] = {"prompt": "{text}", "answer": " {label}"}
    assert sparsort.build_prompt(demos, query, **templates, system=value) == "red apples a\n\nold wine"
    assert Prompt.of("{text}", system=value, answer=value, chat=True) == Prompt.of("{text}", chat=True)
    for given, changes, message in (
        (value, {}, "the query is .*Pass its text"),
        (query, {"prompt": float("nan")}, r"prompt= is a format string .*not NaN"),
        (query, {"answer": float("nan")}, r"answer= is a format string .*not NaN"),
    ):
        with pytest.raises(SparsortError, match=message):
            sparsort.build_prompt(demos, given, **templates | changes)


@pytest.mark.parametrize("value", [["x"], {"x": 1}, b"x", 5])
def test_a_template_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(SparsortError, match=r"system= is the text of an instruction, not (a|bytes)"):
        sparsort.build_prompt([], "old wine", prompt="{text}", answer=" {label}", system=value)
    for changes in ({"system": value}, {"answer": value}):
        with pytest.raises(SparsortError, match=r"(system|answer) is (a|bytes)"):
            Prompt.of("{text}", chat=True, **changes)
    for turns in (value, [("user", "{text}")], [{"role": "user", "content": value}]):
        with pytest.raises(SparsortError, match="expected a format string such as"):
            Prompt.of(turns)


@pytest.mark.parametrize(("value", "kind"), NESTED)
def test_the_refusal_names_the_row_the_field_and_the_kind(value: Any, kind: str) -> None:
    for reader, field in {
        "prompt": "text",
        "answer": "label",
        "score": "text",
        "labels": "label",
        "compared": "text",
    }.items():
        with pytest.raises(SparsortError, match=rf"(row|demonstration) .*{kind}.* in the field '{field}'"):
            READERS[reader](value)


def test_an_excerpt_shows_only_what_has_a_text() -> None:
    row = {"id": "q", "tags": ["a"], "text": "some words", "gone": float("nan"), "n": 5}
    assert text_of(None, row) == "some words 5"


def test_present_data_keeps_its_digest() -> None:
    # Of a folder that version 0.1.0 scored: text, numbers, nested values, bytes and null.
    row = {"text": "é", "n": 1.5, "tags": ["a", None], "raw": b"x", "gone": None}
    assert digest_of(row) == "c814c215fb5801406e55ef8dd8385a74"
    assert digest_of(row, ["text"]) == "52fae1c9e54bbc073bb6ec1314f35ed4"
    assert digest_of({**row, "gone": float("nan")}) == digest_of(row)


# The inputs that outsiders found


def test_nan_labels_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lab_nan.jsonl"
    rows = _rows("label", float("nan"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "NaN" in path.read_text(encoding="utf-8")
    with pytest.raises(SparsortError, match=r"row 'q1' has NaN \(a missing value\) in the field 'label'"):
        task_from_flags((row.fields for row in open_rows(path).rows()), prompt="{text}")
    assert read_rows(path, prompt="{text}", k=2).counts == {"a": 3, "b": 2}


def test_pandas_rows_with_an_object_column_of_nan() -> None:
    frame = pd.DataFrame(
        {"instruction": ["Name a color", "Add them"], "input": [None, "2 and 3"], "output": ["blue", "5"]}
    )
    frame = frame.assign(input=lambda d: d["input"].astype(object).where(d["input"].notna(), float("nan")))
    rows = frame.to_dict("records")
    with pytest.raises(SparsortError, match=r"demonstration 0 has NaN \(a missing value\) in the field 'input'"):
        sparsort.build_prompt(
            rows,
            {"instruction": "Name a tree", "input": "x"},
            prompt="{instruction}\n{input}\nAnswer:",
            answer=" {output}",
        )
    assert list(sparsort.CompressionScorer().score(rows, "{input}").column("status")) == ["empty", "ok"]


def test_a_label_in_a_list_is_refused_with_the_path_and_read_by_it() -> None:
    rows = [{**row, "label": [row["label"], "x"]} for row in _rows("x", 1)]
    with pytest.raises(
        SparsortError, match=r"row 'q0' has a list in the field 'label'.*\{label\[0\]\}.*without braces"
    ):
        task_from_flags(rows, prompt="{text}")
    task = task_from_flags(rows, prompt="{text}", label="label[0]")
    assert task.label_names() == ["a", "b"]
    assert task.label_texts() == [" a", " b"]
    assert [task.demo_text(row) for row in rows[:2]] == ["red apples a", "green pears b"]
    assert [row["text"] for row in select_demos(rows, None, 2, method="balanced", label="label[0]").demos]


def test_a_column_of_conversations_is_refused_with_both_ways_out() -> None:
    rows = [{"messages": [{"role": "user", "content": "My bike broke."}, {"role": "assistant", "content": "Walk."}]}]
    with pytest.raises(SparsortError, match=r"\{messages\[0\]\.content\}.*--messages"):
        sparsort.CompressionScorer().score(rows, "{messages}")
    assert sparsort.LengthScorer("characters").score(rows, "{messages[0].content}").difficulty.tolist() == [14.0]


# Paths through the rest of the product


def test_paths_in_tasks_pools_and_queries() -> None:
    rows = [
        {"id": str(n), "data": {"text": text, "gold": "ab"[n % 2]}, "the.source": f"s{n}"}
        for n, text in enumerate(TEXTS)
    ]
    task = task_from_flags(rows, prompt="From {[the.source]}: {data.text}", label="data.gold")
    assert task.demo_text(rows[1]) == "From s1: green pears b"
    assert task.content_free_texts()[0] == "From N/A: N/A"
    splits = split_rows(task, rows, n_test=1, n_dev=0)
    assert len(splits.pool) == 3
    query = {"data": {"text": "green pears"}, "the.source": "s1"}
    assert select_demos(rows, query, 5, method="first", prompt=task.prompt).indices == [0, 2, 3, 4, 5]
    text = sparsort.build_prompt(rows[:1], "grey mice", prompt="{data.text} ->", answer=" {data.gold}")
    assert text == "red apples -> a\n\ngrey mice ->"


def test_a_path_that_leads_nowhere_in_every_row_is_a_mistake_and_else_a_row_without_a_score() -> None:
    rows = [{"meta": {"lang": "de"}}, {"meta": {}}, {"meta": None}]
    assert list(sparsort.CompressionScorer().score(rows, "{meta.lang}").column("status")) == ["ok", "empty", "empty"]
    with pytest.raises(SparsortError, match=r"'meta\.lnag' has no value in any row"):
        sparsort.CompressionScorer().score(rows, "{meta.lnag}")


def test_a_score_by_a_path_belongs_to_its_column() -> None:
    rows = [{"id": "a", "meta": {"text": "some words"}, "x": 1}]
    scores = sparsort.CompressionScorer().score(rows, "{meta.text}")
    assert scores.provenance["content"] == ["meta"]
    assert np.isfinite(scores.difficulty_of([{"id": "a", "meta": {"text": "some words"}, "x": 2}])).all()
    with pytest.raises(SparsortError, match="meta differ"):
        scores.difficulty_of([{"id": "a", "meta": {"text": "other words"}}])


def _order(path: Path, config: OrderConfig) -> Any:
    return order_file(path, query="a query", config=config, scorer=ScorerConfig(scorer="length"))


NAN_ROWS = [{"text": f"thing number {n} of many", "label": "yes" if n % 2 else "no"} for n in range(12)]


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("label", float("nan"), "NaN (a missing value) in the field 'label'"),
        ("label", ["joy"], "a list in the field 'label'"),
        ("text", None, "null in the field 'text'"),
        ("text", {"a": 1}, "a dictionary in the field 'text'"),
    ],
)
def test_the_commands_name_the_file_and_the_line_of_a_row(field: str, value: Any, what: str, tmp_path: Path) -> None:
    path, good = tmp_path / "rows.jsonl", tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in NAN_ROWS), encoding="utf-8")
    lines = [json.dumps({**row, field: value} if place == 3 else row) for place, row in enumerate(NAN_ROWS)]
    path.write_text("\n" + "\n".join(lines) + "\n", encoding="utf-8")
    expected = f"{path}: row 3 (line 5) has {what}"
    calls: dict[str, Callable[[], Any]] = {
        "ablate": lambda: find_source(str(path), data=None, test=None, prompt="{text}", label=None, labels=None),
        "ablate --labels": lambda: find_source(
            str(path), data=None, test=None, prompt="{text}", label=None, labels="yes,no"
        ),
        "ablate --test": lambda: TaskData(
            find_source(str(good), data=None, test=path, prompt="{text}", label=None, labels=None)["tasks"][0],
            Ablation(tasks=("mr",)),
        ),
        "choose": lambda: read_rows(path, prompt="{text}"),
        "order": lambda: _order(path, OrderConfig(prompt=PromptSpec("{text}", answer=" {label}"), order="given")),
    }
    if field == "text":
        calls["choose --queries"] = lambda: read_rows(good, path, prompt="{text}")
    else:
        config = OrderConfig(
            prompt=PromptSpec("{text}", answer=" x"), select="balanced", k=2, label="label", order="given"
        )
        calls |= {"order --select balanced": lambda: _order(path, config)} if value == ["joy"] else {}
    for call in calls.values():
        with pytest.raises(SparsortError) as caught:
            call()
        assert str(caught.value).startswith(expected)
