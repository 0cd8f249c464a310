"""`--messages`: conversations scored, calibrated, ordered and trained on, against the chat template applied by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from command_line import run

import sparsort
from sparsort.errors import SparsortError
from sparsort.recipes.train.train import train
from sparsort.scoring.loading.demo_model import load_tokenizer
from sparsort.scoring.store.scores import Scores

# As the file that was reported: a system turn in some rows, several turns in one.
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "My bike broke."},
            {"role": "assistant", "content": "Walking is fine too!"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "I lost a book."},
            {"role": "assistant", "content": "Read another."},
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "Any."},
        ]
    },
]
QUERY = "How many apples are left?"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chat_finetune.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> str:
    return str(make_tiny_model("llama"))


def _template(model: str, turns: list[dict[str, str]], *, ask: bool = True) -> str:
    return str(load_tokenizer(model).apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))


def test_score_records_the_column_and_resumes(file: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    summary = json.loads(run("score", file, "--messages", "messages", "-m", model, "--out", out, "--json").stdout)
    assert summary["status"] == {"ok": 2}
    assert summary["provenance"]["prompt"]["turns"] == [["messages", "messages"]]
    assert summary["provenance"]["content"] == ["messages"]
    texts = [_template(model, row["messages"][:-1]) + row["messages"][-1]["content"] for row in ROWS]
    counts = [len(load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert Scores.load(out).column("n_tokens").tolist() == counts
    assert "2 of 2 rows scored" in run("score", file, "--messages", "messages", "-m", model, "--out", out).stdout
    other = run("score", file, "--prompt", "{messages[0].content}", "--chat", "-m", model, "--out", out, code=2)
    assert "prompt" in other.stderr


def test_order_shows_whole_conversations(file: Path, model: str) -> None:
    made = json.loads(run("order", file, "--messages", "messages", "-m", model, "-q", QUERY, "--json").stdout)
    order = [int(demo["id"]) for demo in made["demonstrations"]]
    system = ROWS[0]["messages"][:1]
    shown = [turn for place in order for turn in ROWS[place]["messages"] if turn["role"] != "system"]
    assert made["prompt"] == _template(model, [*system, *shown, {"role": "user", "content": QUERY}])
    assert made["demonstrations"][order.index(0)]["excerpt"] == "Be kind. My bike broke. Walking is fine too!"
    assert sorted(demo["difficulty"] for demo in made["demonstrations"])[::-1] == [
        demo["difficulty"] for demo in made["demonstrations"]
    ]


def test_the_difficulty_is_that_of_the_conversation_without_its_answer(file: Path, model: str) -> None:
    options = ("--messages", "messages", "-m", model, "--dtype", "float32", "--json")
    made = json.loads(run("order", file, *options, "-q", QUERY).stdout)
    flat = [
        {"id": "0", "a": "Be kind.", "b": "My bike broke."},
    ]
    alone = sparsort.SparsityScorer(model, dtype="float32").score(flat, "{b}", system="{a}", chat=True)
    (found,) = [demo["difficulty"] for demo in made["demonstrations"] if demo["id"] == "0"]
    assert found == pytest.approx(alone.difficulty[0], abs=1e-6)


@pytest.mark.parametrize(
    "query",
    [
        json.dumps([{"role": "user", "content": QUERY}]),
        json.dumps({"messages": [{"from": "human", "value": QUERY}]}),
        json.dumps({"messages": [{"role": "user", "content": QUERY}, {"role": "assistant", "content": "Five."}]}),
    ],
)
def test_a_query_is_text_turns_or_a_row(query: str, file: Path, model: str) -> None:
    options = ("--messages", "messages", "-m", model, "--order", "given", "--json")
    assert (
        json.loads(run("order", file, *options, "-q", query).stdout)["prompt"]
        == json.loads(run("order", file, *options, "-q", QUERY).stdout)["prompt"]
    )


def test_a_query_of_several_turns_keeps_its_earlier_turns(file: Path, model: str) -> None:
    turns = [*ROWS[0]["messages"], {"role": "user", "content": "And now?"}]
    options = ("--messages", "messages", "-m", model, "--order", "given", "--allow-leaks", "--json", "-k", 1)
    result = json.loads(run("order", file, *options, "--select", "first", "-q", json.dumps(turns)).stdout)
    assert result["messages"][-len(turns) + 1 :] == turns[1:]


def test_a_query_among_the_demonstrations_and_other_system_turns_are_refused(file: Path, model: str) -> None:
    options = ("--messages", "messages", "-m", model, "--order", "given")
    assert "its own demonstrations" in run("order", file, *options, "-q", "My bike broke.", code=2).stderr
    turns = json.dumps([{"role": "system", "content": "Be rude."}, {"role": "user", "content": QUERY}])
    assert "different system turns" in run("order", file, *options, "-q", turns, code=2).stderr
    assert "no turn with text" in run("order", file, *options, "-q", "[]", code=2).stderr
    both = run("order", file, *options, "--prompt", "{x}", "-q", QUERY, code=2)
    assert "--messages" in both.stderr
    first = run("order", file, *options, "-k", 1, "--select", "first", "-q", "My bike broke.")
    assert "excluded 0" in first.stderr


def test_build_prompt_of_conversations(model: str) -> None:
    text = sparsort.build_prompt(ROWS[:1], QUERY, messages="messages", tokenizer=load_tokenizer(model))
    assert text == _template(model, [*ROWS[0]["messages"], {"role": "user", "content": QUERY}])
    with pytest.raises(SparsortError, match="demonstration 0 has no assistant turn"):
        sparsort.build_prompt([{"messages": ROWS[0]["messages"][:2]}], QUERY, messages="messages", tokenizer=model)
    with pytest.raises(SparsortError, match="chat turns need a chat template"):
        sparsort.build_prompt(ROWS[:1], QUERY, messages="messages")
    with pytest.raises(SparsortError, match="prompt= and answer="):
        sparsort.build_prompt(ROWS[:1], QUERY)


def test_a_calibration_of_conversations_is_applied_to_conversations(model: str, tmp_path: Path) -> None:
    words = ["red", "green", "blue", "old", "new", "warm", "cold"]
    rows = [
        {
            "id": f"q{n}",
            "messages": [
                {"role": "user", "content": " ".join(words[(n * k) % 7] for k in range(1, 3 + n % 5))},
                {"role": "assistant", "content": words[n % 7]},
            ],
        }
        for n in range(48)
    ]
    out = tmp_path / "calibration.json"
    found = sparsort.calibrate(
        rows, messages="messages", model=model, sites=["pre_norm"], outliers=["none"], n_boot=100, n_perm=99, out=out
    )
    assert found.definition.prompt.messages == "messages"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plain = json.loads(run("score", data, "--calibration", out, "-m", model, "--json").stdout)
    named = json.loads(run("score", data, "--calibration", out, "--messages", "messages", "-m", model, "--json").stdout)
    assert plain["status"] == {"ok": 48}
    assert plain["difficulty_quantiles"] == named["difficulty_quantiles"]
    refused = run("score", data, "--calibration", out, "--prompt", "{messages[0].content}", "-m", model, code=2)
    assert "this calibration is for the prompt" in refused.stderr


def test_train_learns_what_the_chat_template_makes_of_each_conversation(file: Path, model: str, tmp_path: Path) -> None:
    result = json.loads(
        run(
            *("train", file, "--messages", "messages", "--schedule", "shuffle", "--eval-share", 0, "--max-steps", 1),
            *("-m", model, "--out", tmp_path / "run", "--json"),
        ).stdout
    )
    tokenizer = load_tokenizer(model)
    texts = [_template(model, row["messages"], ask=False) for row in ROWS]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    (path,) = (tmp_path / "run" / "tokens").glob("tokens-*.arrow")
    with pa.memory_map(str(path)) as source:
        assert pa.ipc.open_stream(source).read_all()["input_ids"].to_pylist() == wanted
    assert result["tokens"] == sum(map(len, wanted))
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["messages"] == "messages"
    other = run("train", file, "--text", "{messages[0].content}", "--schedule", "shuffle", "--eval-share", 0,
                 "--max-steps", 1, "-m", model, "--out", tmp_path / "run", code=2)  # fmt: skip
    assert "has another run" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither was given"),
        ({"text": "{x}", "messages": "messages"}, "both were given"),
        ({"messages": "mesages"}, "Did you mean 'messages'"),
        ({"messages": "messages"}, "has no chat template"),
    ],
)
def test_mistakes_in_training_on_conversations(
    options: dict[str, Any], message: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SparsortError, match=message):
        train(file, out=tmp_path / "run", curriculum={"schedule": "shuffle"}, **options)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_row_without_a_conversation_stops_training_by_name(model: str, tmp_path: Path) -> None:
    rows = [*ROWS, {"messages": None}]
    with pytest.raises(SparsortError, match=r"1 of 3 rows .*empty text: '2'"):
        train(
            rows,
            messages="messages",
            out=tmp_path / "run",
            model=model,
            curriculum={"schedule": "shuffle"},
            eval_share=0.0,
        )


def test_scores_of_conversations_order_them(file: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    run("score", file, "--messages", "messages", "-m", model, "--out", out)
    made = json.loads(
        run("order", file, "--messages", "messages", "-m", model, "--scores", out, "-q", QUERY, "--json").stdout
    )
    difficulty = Scores.load(out).difficulty
    assert [int(demo["id"]) for demo in made["demonstrations"]] == np.argsort(-difficulty).tolist()
    assert made["notes"] == []
