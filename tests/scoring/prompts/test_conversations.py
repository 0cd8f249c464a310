"""Conversations in every common form become the same turns, and content that is not text is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import sparsort
from sparsort.errors import SparsortError
from sparsort.scoring.loading.demo_model import load_tokenizer
from sparsort.scoring.prompts.conversations import split_answer, turns_of
from sparsort.scoring.prompts.prompt import LAST_ASSISTANT, Prompt

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "My bike broke."},
    {"role": "assistant", "content": "Walking is fine too!"},
]
SHARE_GPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "My bike broke."},
    {"from": "gpt", "value": "Walking is fine too!", "weight": None},
]
PARTS = [
    {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "My bike ", "image_url": None},
            {"type": "text", "text": "broke."},
        ],
    },
    {"role": "assistant", "content": ["Walking is fine too!"], "tool_calls": None},
]
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"messages": TURNS}, "messages"),
    ({"messages": tuple(TURNS)}, "messages"),
    ({"messages": np.array(TURNS, dtype=object)}, "messages"),
    ({"conversations": SHARE_GPT}, "conversations"),
    ({"messages": PARTS}, "messages"),
    ({"data": {"turns": TURNS}}, "data.turns"),
    ({"my.turns": TURNS}, "[my.turns]"),
    ({"prompt": TURNS[:2], "completion": TURNS[2:]}, "prompt,completion"),
    ({"prompt": TURNS[:2], "a,b": TURNS[2:]}, "prompt, [a,b]"),
    ({"messages": {"role": [t["role"] for t in TURNS], "content": [t["content"] for t in TURNS]}}, "messages"),
    ({"messages": {"from": ["system", "human", "gpt"], "value": [t["content"] for t in TURNS]}}, "messages"),
    (pa.table({"messages": [PARTS[:1] and TURNS]}).to_pylist()[0], "messages"),
    (pd.DataFrame({"messages": [TURNS]}).to_dict("records")[0], "messages"),
]


@pytest.mark.parametrize(("row", "messages"), FORMS)
def test_every_form_is_the_same_conversation(row: dict[str, Any], messages: str) -> None:
    assert turns_of(row, messages, where="row 0") == TURNS


@pytest.mark.parametrize("nothing", [None, float("nan"), pd.NA, [], [{"role": "user", "content": None}]])
def test_a_conversation_that_is_missing_has_no_turns(nothing: Any) -> None:
    assert turns_of({"messages": nothing}, "messages", where="row 0") == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "has a text in the field 'messages', where a conversation was expected"),
        (5, "has a number"),
        ({"lang": "de"}, "has a dictionary"),
        (["text"], r"turn 0 of 'messages' is a text"),
        ([{"text": "x"}], "has the keys text; expected role and content"),
        ([{"role": "usr", "content": "x"}], "unknown role 'usr'.*Did you mean 'user'"),
        ([{"role": 3, "content": "x"}], "unknown role '3'"),
        ([{"role": "tool", "content": "5"}], "tool call"),
        ([{"from": "observation", "value": "5"}], "tool call"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "tool call"),
        ([{"role": "user", "content": {"text": "x"}}], "has a dictionary as its content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "'image_url', but only text",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "'text', but only text"),
        ([{"role": "user", "content": [5]}], "a number, but only text"),
    ],
)
def test_a_conversation_with_other_content_than_text_is_refused_with_the_row(value: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=rf"(?s)row 4.*{message}"):
        turns_of({"messages": value}, "messages", where="row 4")


def test_the_answer_is_the_last_assistant_turn_and_what_follows_is_not_read() -> None:
    user, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert split_answer([user, reply, user, reply, user]) == ([user, reply, user], "a")
    assert split_answer([user]) == ([user], None)
    assert split_answer([]) == ([], None)


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> str:
    return str(make_tiny_model("llama"))


def test_a_conversation_is_read_through_the_models_chat_template(folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    rendered = Prompt.of_messages("messages").render({"messages": TURNS}, where="row 0", tokenizer=tokenizer)
    asked = tokenizer.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert rendered.text == asked + "Walking is fine too!"
    assert rendered.text[rendered.answer_start :] == "Walking is fine too!"
    alone = Prompt.of_messages("messages", answer=False).render({"messages": TURNS}, where="row 0", tokenizer=tokenizer)
    assert alone.text == asked


def test_rows_that_lack_something_stay_without_a_score(folder: str) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": TURNS},
        {"messages": None},
        {"messages": float("nan")},
        {"messages": TURNS[:2]},
        {"messages": TURNS[2:]},
        {"messages": [TURNS[1], {"role": "assistant", "content": None}]},
    ]
    scores = sparsort.LengthScorer(model=folder).score(rows, messages="messages")
    assert list(scores.column("status")) == ["ok", "empty", "empty", "empty", "empty", "empty"]
    reasons = list(scores.column("reason"))
    assert "no assistant turn" in reasons[3]
    assert "no turn with text before its answer" in reasons[4]
    assert scores.provenance["prompt"] == {"turns": [["messages", "messages"]], "answer": LAST_ASSISTANT}


def test_a_row_that_the_chat_template_refuses_has_no_score(folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    prompt = Prompt.of_messages("messages")
    refused = prompt.render({"messages": TURNS}, where="row 0", tokenizer=tokenizer)
    assert refused.problem is not None
    assert refused.problem[0] == "invalid"
    assert "no system" in refused.problem[1]
    assert prompt.render({"messages": TURNS[1:]}, where="row 1", tokenizer=tokenizer).problem is None
    tokenizer.chat_template = None
    with pytest.raises(SparsortError, match="has no chat template"):
        prompt.render({"messages": TURNS}, where="row 0", tokenizer=tokenizer)


def test_the_scores_are_those_of_the_same_turns_as_templates(folder: str) -> None:
    rows = [
        {"id": str(n), "messages": [*TURNS[:1], {"role": "user", "content": f"Question {n}?"}, TURNS[2]]}
        for n in range(4)
    ]
    flat = [
        {"id": row["id"], "system": "Be kind.", "question": f"Question {row['id']}?", "answer": TURNS[2]["content"]}
        for row in rows
    ]
    scorer = sparsort.LossScorer(folder)
    one = scorer.score(rows, messages="messages")
    other = scorer.score(flat, "{question}", answer="{answer}", system="{system}", chat=True)
    assert one.difficulty.tolist() == other.difficulty.tolist()


def test_every_row_of_a_table_is_looked_at_before_a_model_runs(folder: str) -> None:
    turns = [TURNS, TURNS, [{"role": "tool", "content": "5"}]]
    with pytest.raises(SparsortError, match=r"row 2: turn 0 of 'messages' contains a tool call"):
        sparsort.LengthScorer(model=folder).score(pa.table({"messages": turns}), messages="messages")


@pytest.mark.parametrize("other", [{"prompt": "{x}"}, {"answer": "{x}"}, {"system": "Be kind."}])
def test_a_conversation_and_a_template_exclude_each_other(other: dict[str, str], folder: str) -> None:
    with pytest.raises(SparsortError, match=rf"and {next(iter(other))} were given"):
        sparsort.LengthScorer(model=folder).score([{"messages": TURNS, "x": "y"}], messages="messages", **other)
    with pytest.raises(SparsortError, match="names no column"):
        Prompt.of_messages(" , ")
