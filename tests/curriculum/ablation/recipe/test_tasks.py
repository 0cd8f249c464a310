"""Tasks: ready ones, those from files and flags, and mistakes in a task or in its data."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toml_text import dump

from sparsort.curriculum.ablation.recipe import tables
from sparsort.curriculum.ablation.recipe.tasks import (
    Task,
    check_rows,
    load_task,
    parse_labels,
    task_from_flags,
    task_names,
)
from sparsort.errors import SparsortError

BASE: dict[str, Any] = {
    "name": "moods",
    "prompt": "Review: {text}\nMood:",
    "answer": " {label}",
    "labels": {"0": "negative", "1": "positive"},
}
ROWS = [
    {"id": "a", "text": "It shines.", "label": 1},
    {"id": "b", "text": "It rusts.", "label": 0},
]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def task(**changes: Any) -> Task:
    return Task(**{**BASE, **changes})


# The ready tasks

LABELS = {
    "trec": ["description", "entity", "expression", "human", "location", "number"],
    "mr": ["negative", "positive"],
    "sst5": ["terrible", "bad", "okay", "good", "great"],
    "rte": ["true", "false"],
    "cb": ["true", "false", "neither"],
}
EXAMPLES = {
    "trec": (
        {"sentence": "How did serfdom develop ?", "label": "0"},
        "Question: How did serfdom develop ?\nType: description",
    ),
    "mr": ({"sentence": "a joy .", "label": "1"}, "Review: a joy .\nSentiment: positive"),
    "sst5": ({"sentence": "a joy .", "label": "4"}, "Review: a joy .\nSentiment: great"),
    "rte": (
        {"sentence_1": "A cat sat.", "sentence_2": "A cat flew.", "label": "not_entailment"},
        "premise: A cat sat.\nhypothesis: A cat flew.\nprediction: false",
    ),
    "cb": (
        {"premise": "He may go.", "hypothesis": "he goes", "label": "neutral", "idx": 3},
        "premise: He may go.\nhypothesis: he goes\nprediction: neither",
    ),
    "gsm8k": (
        {"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        "Question: What is 3 + 4?\nAnswer: 3 + 4 = <<3+4=7>>7\n#### 7",
    ),
    "math": (
        {"problem": "Halve $1$.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
        "Problem: Halve $1$.\nSolution: It is $\\boxed{\\frac{1}{2}}$.",
    ),
}


def test_the_ready_tasks_are_those_that_are_promised() -> None:
    assert task_names() == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_ready_task_shows_a_row_as_it_should(name: str) -> None:
    row, text = EXAMPLES[name]
    ready = load_task(name)
    assert ready.name == name
    assert ready.demo_text(row) == text
    assert ready.query_text(row) + ready.answer_text(row) == text
    assert ready.label_names() == LABELS.get(name, [])
    assert ready.is_generation == (name not in LABELS)
    if name in LABELS:
        assert ready.demo_text(row) == ready.query_text(row) + ready.label_texts()[ready.gold_index(row)]


def test_generation_is_judged_by_the_gold_field_whatever_a_demonstration_shows() -> None:
    row, _ = EXAMPLES["math"]
    assert load_task("math").gold_text(row) == "\\frac{1}{2}"
    assert load_task("math").gold_index(row) == -1
    assert load_task("gsm8k").judge == "number"
    # A demonstration must not be able to end an answer before it is complete.
    for name in ("gsm8k", "math"):
        ready = load_task(name)
        assert not any(stop in ready.answer_text(EXAMPLES[name][0]) for stop in ready.stop)
        assert any(stop in ready.separator + ready.query_text(EXAMPLES[name][0]) for stop in ready.stop)


# What a task says


def test_the_texts_of_a_task() -> None:
    moods = task(answer=" It is {label}.")
    assert moods.fields == ("text",)
    assert moods.label_texts() == [" It is negative.", " It is positive."]
    assert [moods.gold_index(row) for row in ROWS] == [1, 0]
    assert moods.gold_text(ROWS[0]) == "positive"
    assert moods.content_free_texts() == ["Review: N/A\nMood:", "Review: \nMood:", "Review: [MASK]\nMood:"]


def test_every_field_is_filled_with_the_content_free_text() -> None:
    both = task(prompt="{text} / {other}:", content_free=("N/A",))
    assert both.content_free_texts() == ["N/A / N/A:"]


def test_the_values_in_the_data_may_be_numbers_or_text() -> None:
    assert task().gold_index({"label": 1}) == task().gold_index({"label": "1"}) == 1
    assert task(labels={0: "negative", 1: "positive"}) == task()


def test_a_label_may_begin_another() -> None:
    assert task(labels={"0": "number", "1": "number of"}).label_texts() == [" number", " number of"]


def test_braces_in_the_data_are_text() -> None:
    assert task().query_text({"text": "{label}"}) == "Review: {label}\nMood:"


def test_the_digest_covers_what_changes_an_outcome() -> None:
    base = task().digest
    assert len(base) == 64
    for same in ({"name": "other"}, {"train": "a.jsonl"}, {"test": "b.jsonl"}, {"id_column": "key"}):
        assert task(**same).digest == base
    changes: list[dict[str, Any]] = [
        {"prompt": "{text}"},
        {"answer": "{label}"},
        {"separator": "\n"},
        {"instruction": "Rate."},
        {"labels": {"1": "positive", "0": "negative"}},
        {"labels": {"0": "bad", "1": "positive"}},
        {"content_free": ("N/A",)},
        {"chat": True},
        {"stop": (".",)},
        {"max_new_tokens": 5},
        {"labels": None, "judge": "exact"},
        {"labels": None, "judge": "number"},
    ]
    digests = [task(**change).digest for change in changes]
    assert len({base, *digests}) == len(changes) + 1


def test_equal_tasks_have_equal_hashes() -> None:
    turned = task(labels={"1": "positive", "0": "negative"})
    assert turned == task()
    assert hash(turned) == hash(task())
    assert turned.digest != task().digest


# Files


def test_a_task_survives_its_file(tmp_path: Path) -> None:
    for ready in [*map(load_task, task_names()), task(chat=True, system='Say "no" \\ \t\x7f é {}', stop=("\n", "Ä"))]:
        path = tmp_path / f"{ready.name}.toml"
        path.write_text(dump(tables.plain(ready)), encoding="utf-8")
        again = load_task(path)
        assert again == ready
        assert again.digest == ready.digest


@given(text=TEXT, inner=st.dictionaries(TEXT, TEXT))
def test_any_text_survives_toml(text: str, inner: dict[str, str]) -> None:
    table = {"a": text, "b": [text, [True, 3, -1.5]], "c": inner, "d": [inner], "e": None}
    assert tomllib.loads(dump(table)) == {key: value for key, value in table.items() if value is not None}


def test_a_task_file_is_named_for_its_task_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('prompt = "{q}"\nanswer = " {a}"\nlabel = "a"\njudge = "exact"\n')
    assert load_task(path).name == load_task(str(path)).name == "mine"
    path.write_text('name = "ours"\n' + path.read_text())
    assert load_task(path).name == "ours"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt = "{q}"', r"mine\.toml: the task has no 'answer'"),
        ('promt = "{q}"', r"mine\.toml: there is no 'promt' in a task\. Did you mean 'prompt'\?"),
        ('prompt = 3\nanswer = "{a}"', r"mine\.toml: prompt is 3, but text is expected"),
        ('prompt = "{q}"\nanswer = "{a}"\nstop = "x"', r"stop is 'x', but a list \(of text\) is expected"),
        ('prompt = "{q}"\nanswer = "{a}"\nchat = 1', r"chat is 1, but true or false is expected"),
        ('prompt = "{q}"\nanswer = "{a}"\nmax_new_tokens = true', r"max_new_tokens is True, but a whole number"),
        ('prompt = "{q}"\nanswer = "{a}"\nlabels = ["x"]', r"labels is \['x'\], but a table of texts is expected"),
        ('prompt = "{q}"\nanswer = "{a}"\nlabels = {0 = 1}', r"labels is .*, but a table of texts is expected"),
        ('prompt = "{q}"\nanswer = "{a}"\njudge = "nummer"', r"unknown judge 'nummer'.*Did you mean 'number'\?"),
        ("prompt = ", r"mine\.toml is not valid TOML"),
    ],
)
def test_a_broken_task_file_is_refused_with_the_fault_and_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SparsortError, match=message):
        load_task(path)


def test_a_missing_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=r"unknown task 'trek'\. Did you mean 'trec'\?"):
        load_task("trek")
    with pytest.raises(SparsortError, match=r"cannot read .*none\.toml"):
        load_task(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'prompt = "\xe9"')
    with pytest.raises(SparsortError, match="not valid UTF-8"):
        load_task(tmp_path / "latin.toml")


def test_a_task_is_its_own_name() -> None:
    assert load_task(task()) == task()


# What can be wrong with a task


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Mood:"}, "names no field of the data"),
        ({"prompt": "{text} {label}"}, "gives the answer away"),
        ({"prompt": "{text"}, "cannot be read"),
        ({"answer": " yes"}, r"without its field: write \{label\}"),
        ({"answer": " {text}"}, r"without its field: write \{label\}"),
        ({"answer": " {label} {text}"}, "has 'text' in its answer template"),
        ({"labels": None}, "has no labels"),
        ({"labels": {}}, "has no labels"),
        ({"labels": {"0": "bad"}}, "the single label '0', and a classification needs at least two"),
        ({"labels": {"0": "  ", "1": "x"}}, "gives the value '0' an empty text"),
        ({"labels": {"0": "x", "1": "x "}}, "gives the values '0' and '1' the same text 'x'"),
        ({"judge": "exact"}, "has labels, but the judge 'exact'"),
        ({"judge": "exact", "labels": None, "answer": " yes"}, "without its field"),
        ({"judge": "exakt"}, "Did you mean 'exact'"),
        ({"system": "Be kind."}, "chat is off"),
        ({"chat": True, "instruction": "Rate."}, "chat is on"),
        ({"max_new_tokens": 0}, "at least 1 is needed"),
        ({"stop": ("\n", "")}, "empty stop string"),
        ({"stop": "\n"}, r"a list \(of text\) is expected"),
        ({"prompt": "{text:.2f}"}, "content-free input 'N/A'"),
    ],
)
def test_a_wrong_task_is_refused_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        task(**changes)


# What can be wrong between a task and its data


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "c", "text": "x", "label": "2"}, r"row 'c' has '2' in the field 'label'.*'0', '1'"),
        ({"id": "c", "text": "x", "label": -1}, r"row 'c' has '-1'"),
        ({"id": "c", "text": "x"}, r"row 'c' has no field 'label'"),
        ({"id": "c", "text": "x", "label": None}, r"row 'c' has null in the field 'label'"),
        ({"id": "c", "txt": "x", "label": "1"}, r"row 'c' has no field 'text'\. Did you mean 'txt'\?"),
        ({"txt": "x", "label": "1"}, "a row without an id has no field 'text'"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        check_rows(task(), [*ROWS, row])


def test_rows_that_fit_give_no_warning() -> None:
    assert check_rows(task(), ROWS) == []


def test_one_label_only_is_a_warning() -> None:
    (warning,) = check_rows(task(), ROWS[:1] * 3, "the test rows")
    assert warning.startswith("the test rows of the task 'moods' have only the label 'positive'")
    assert "SST-2" in warning


def test_a_label_without_rows_is_a_warning() -> None:
    three = task(labels=BASE["labels"] | {"2": "mixed"})
    assert check_rows(three, ROWS, "the pool") == ["the pool of the task 'moods' have no row of the label 'mixed'."]


def test_no_rows_and_empty_answers_are_errors() -> None:
    with pytest.raises(SparsortError, match="are empty"):
        check_rows(task(), [])
    free = task(labels=None, judge="exact")
    with pytest.raises(SparsortError, match=r"row 'd' has an empty answer"):
        check_rows(free, [{"id": "d", "text": "x", "label": " "}])
    assert check_rows(free, ROWS) == []


# Flags


def test_labels_are_taken_from_the_data() -> None:
    rows = [{"q": "x", "kind": kind} for kind in (10, 2, 2, -1)]
    made = task_from_flags(rows, prompt="{q}:", label="kind")
    assert made.labels == {"-1": "-1", "2": "2", "10": "10"}
    assert made.label_texts() == [" -1", " 2", " 10"]
    words = [{"q": "x", "kind": kind} for kind in ("spam", "ham", "spam")]
    assert task_from_flags(words, prompt="{q}:", label="kind").label_names() == ["ham", "spam"]


def test_labels_are_taken_from_the_flag() -> None:
    made = task_from_flags(ROWS, prompt="{text}:", answer=" -> {label}", labels="1=up,0=down", name="mine", stop=["."])
    assert list((made.labels or {}).items()) == [("1", "up"), ("0", "down")]
    assert (made.name, made.stop, made.answer_text(ROWS[0])) == ("mine", (".",), " -> up")


def test_free_answers_need_no_labels() -> None:
    made = task_from_flags([], prompt="{q}:", label="answer", judge="number")
    assert made.is_generation
    assert made.demo_text({"q": "3 + 4", "answer": "#### 7"}) == "3 + 4: #### 7"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "0=down,0=up"}, "give the value '0' twice"),
        ({"labels": "0="}, "contain '0='"),
        ({"labels": "0=down,,1=up"}, "are empty"),
        ({"label": "mood"}, "row 'a' has no field 'mood'"),
        ({"label": "id", "prompt": "{id}"}, "gives the answer away"),
        ({"nme": "x"}, r"the flags: there is no 'nme' in a task\. Did you mean 'name'"),
        ({"answer": "yes"}, "without its field"),
    ],
)
def test_wrong_flags_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        task_from_flags(ROWS, **{"prompt": "{text}:", **options})


def test_a_label_column_with_too_many_values_is_one_of_answers() -> None:
    rows = [{"text": "x", "label": number} for number in range(65)]
    with pytest.raises(SparsortError, match=r"does not look like a label.*judge 'exact'"):
        task_from_flags(rows, prompt="{text}:")
    assert len(task_from_flags(rows[:64], prompt="{text}:").label_names()) == 64


def test_labels_may_stand_for_themselves() -> None:
    assert parse_labels("ham, spam") == {"ham": "ham", "spam": "spam"}
    assert parse_labels("a=b=c") == {"a": "b=c"}


# Tables


def test_plain_values_are_json() -> None:
    assert json.loads(json.dumps(tables.plain(task()))) == tables.plain(task())
    assert set(tables.plain(task())) == {field.name for field in dataclasses.fields(Task)}


@pytest.mark.parametrize("text", ["seed = " + "1" * 5000, "a = " + "[" * 20_000])
def test_a_file_that_python_cannot_parse_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_text(text)
    with pytest.raises(
        SparsortError, match=r"task\.toml contains a number with too many digits, or is nested too deeply"
    ):
        tables.read(tmp_path / "task.toml")
