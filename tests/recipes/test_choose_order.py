"""`choose_order` and `sparsort choose`: the criteria applied to a user's own demonstrations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparsort
from sparsort.curriculum.ablation.run import probing
from sparsort.errors import SparsortError
from sparsort.recipes.choose.rows import read_rows
from sparsort.recipes.cli.app import app
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.prompts.spec import DataSpec

DEMOS = [
    {"id": "a", "text": "the screen is bright", "label": "1"},
    {"id": "b", "text": "the train was late and cold", "label": "0"},
    {"id": "c", "text": "apples of five kinds", "label": "1"},
]
QUERIES = [
    {"text": "a review of a train", "label": "0"},
    {"text": "the battery lasts", "label": "1"},
    {"text": "how many are left?", "label": "0"},
    {"text": "Paris is the capital", "label": "1"},
]
ASKED: dict[str, Any] = {"prompt": "Review: {text}\nLabel:", "labels": "0=negative,1=positive"}
ORDERS = list(itertools.permutations(range(3)))


@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("gemma3")), dtype="float32", device="cpu")


def plain(loaded: LoadedModel, order: tuple[int, ...], query: str) -> np.ndarray[Any, Any]:
    """Log-probabilities of both labels by one pass each over the whole prompt, as shares of one."""
    words = {"0": " negative", "1": " positive"}
    demos = "".join(f"Review: {DEMOS[i]['text']}\nLabel:{words[DEMOS[i]['label']]}\n\n" for i in order)
    before = demos + f"Review: {query}\nLabel:"
    found = []
    for word in words.values():
        encoded = loaded.tokenizer(before + word, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        answered = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if end > len(before) and end > begin]
        with torch.inference_mode():
            log_p = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
        found.append(sum(float(log_p[i - 1, ids[0, i]]) for i in answered))
    weights = np.exp(np.array(found) - max(found))
    return weights / weights.sum()


def test_locale_is_the_mean_entropy_of_plain_passes(loaded: LoadedModel) -> None:
    found = sparsort.choose_order(DEMOS, QUERIES, by="locale_unlabelled", model=loaded, **ASKED)
    expected = {}
    for order in ORDERS:
        shares = [plain(loaded, order, row["text"]) for row in QUERIES]
        expected[order] = float(np.mean([-(p * np.log(p)).sum() for p in shares]))
    assert sorted(map(tuple, found.candidates)) == ORDERS
    scores = {tuple(order): score for order, score in zip(found.candidates, found.scores, strict=True)}
    assert scores == pytest.approx(expected, abs=1e-4)
    assert tuple(found.order) == max(expected, key=lambda order: expected[order])
    assert [row["id"] for row in found.demos] == [DEMOS[place]["id"] for place in found.order]
    assert found.scores == sorted(found.scores, reverse=True)


def test_best_on_dev_reads_the_labels(loaded: LoadedModel) -> None:
    found = sparsort.choose_order(DEMOS, QUERIES, by="best_on_dev", model=loaded, **ASKED)
    right = {
        order: float(np.mean([plain(loaded, order, row["text"]).argmax() == int(row["label"]) for row in QUERIES]))
        for order in ORDERS
    }
    scores = {tuple(order): score for order, score in zip(found.candidates, found.scores, strict=True)}
    assert scores == pytest.approx(right)
    with pytest.raises(SparsortError, match="label"):
        sparsort.choose_order(DEMOS, [{"text": "no label here"}], by="best_on_dev", model=loaded, **ASKED)


def test_density_needs_no_labels_and_free_answers_will_do(loaded: LoadedModel) -> None:
    demos = [{"text": row["text"], "answer": f"the answer {n}"} for n, row in enumerate(DEMOS)]
    queries = [{"text": row["text"]} for row in QUERIES]
    found = sparsort.choose_order(
        demos, queries, by="density", prompt="Q: {text}\nA:", answer=" {answer}", label="answer", model=loaded
    )
    assert len(found.scores) == 6
    gain = sparsort.choose_order(
        demos, queries, by="density_gain", prompt="Q: {text}\nA:", answer=" {answer}", label="answer", model=loaded
    )
    assert sorted(map(tuple, gain.candidates)) == ORDERS
    assert np.isfinite(gain.scores).all()


def test_words_of_labels_stand_in_the_prompt_whatever_the_criterion(loaded: LoadedModel) -> None:
    words = [row | {"label": ["negative", "positive"][int(row["label"])]} for row in DEMOS]
    mapped = sparsort.choose_order(DEMOS, QUERIES, by="density", model=loaded, **ASKED)
    shown = sparsort.choose_order(words, QUERIES, by="density", model=loaded, prompt=ASKED["prompt"])
    raw = sparsort.choose_order(DEMOS, QUERIES, by="density", model=loaded, prompt=ASKED["prompt"])
    assert mapped.candidates == shown.candidates
    assert mapped.scores == pytest.approx(shown.scores)
    assert mapped.scores != pytest.approx(raw.scores)


def test_labels_of_queries_are_not_read(loaded: LoadedModel) -> None:
    odd = [row | {"label": "-1"} for row in QUERIES]
    found = sparsort.choose_order(DEMOS, odd, model=loaded, prompt=ASKED["prompt"])
    assert found.provenance["labels"] == {"0": "0", "1": "1"}
    bare = sparsort.choose_order(
        DEMOS, [{"text": row["text"]} for row in QUERIES], model=loaded, prompt=ASKED["prompt"]
    )
    assert found.scores == bare.scores


def test_a_tie_says_what_decided(loaded: LoadedModel) -> None:
    found = sparsort.choose_order(DEMOS, QUERIES[:1], by="best_on_dev", model=loaded, **ASKED)
    assert found.tied > 1
    assert found.notes == [
        f"{found.tied} of 6 orders share the best score; the likelihood of the right labels decided."
    ]


def test_content_free_inputs_take_no_queries(loaded: LoadedModel) -> None:
    found = sparsort.choose_order(DEMOS, by="pdo_null", model=loaded, **ASKED)
    assert found.queries == 0
    assert len(found.scores) == 6


def test_sampled_probes_take_the_place_of_queries(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"texts": ["Review: a written one\nLabel:"], "sampling_tokens": 7}
    monkeypatch.setattr(probing, "probes", lambda *_args: written)
    found = sparsort.choose_order(DEMOS, QUERIES, by="locale", model=loaded, **ASKED)
    assert found.queries == 1
    assert "were not read" in found.notes[0]
    monkeypatch.setattr(probing, "probes", lambda *_args: written | {"texts": []})
    with pytest.raises(SparsortError, match=r"has the form of a query of this prompt.*'locale_unlabelled'"):
        sparsort.choose_order(DEMOS, by="globale", model=loaded, **ASKED)


def test_many_orders_are_a_seeded_sample(loaded: LoadedModel) -> None:
    demos = [{"text": f"{word} film", "label": str(n % 2)} for n, word in enumerate("abcdef")]
    found = sparsort.choose_order(demos, QUERIES, orders=10, seed=3, model=loaded, **ASKED)
    again = sparsort.choose_order(demos, QUERIES, orders=10, seed=3, model=loaded, **ASKED)
    other = sparsort.choose_order(demos, QUERIES, orders=10, seed=4, model=loaded, **ASKED)
    assert len(set(map(tuple, found.candidates))) == 10
    assert found.summary() == again.summary()
    assert sorted(found.candidates) != sorted(other.candidates)


@pytest.mark.parametrize(
    ("demos", "queries", "changes", "message"),
    [
        (DEMOS[:1], QUERIES, {}, "needs at least 2"),
        (DEMOS, [], {}, "none were given"),
        (DEMOS, QUERIES, {"by": "locl"}, "locale"),
        (DEMOS, QUERIES, {"by": "mdl"}, "one order for all"),
        (DEMOS, QUERIES, {"by": "best_on_dev+locale"}, "locale_unlabelled"),
        (DEMOS, QUERIES, {"orders": 0}, "at least 1"),
        (DEMOS, QUERIES, {"seed": -1}, "may not be negative"),
        (DEMOS, [DEMOS[1]], {}, "nearly is, demonstration 'b'.*--allow-leaks"),
        ([], QUERIES, {"labels": None}, "needs at least 2"),
        ([{"text": "x", "label": str(n)} for n in range(70)], QUERIES, {"labels": None}, "at most 64"),
        (DEMOS, [{"words": "no text"}], {}, "text"),
        (DEMOS, QUERIES, {"prompt": "Review:"}, "names no field"),
        ([{"text": "x", "label": "0"}] * 65, QUERIES, {}, "at most 64"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(
    demos: list[Any], queries: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SparsortError, match=message):
        sparsort.choose_order(demos, queries, model="/no/such/model", **{**ASKED, **changes})


def test_the_command_and_what_it_writes(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} of the world", "label": n % 2}
        for n, word in enumerate(["one", "two", "three", "four", "five", "six"])
    ]
    file, ordered = tmp_path / "rows.jsonl", tmp_path / "ordered.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = ["--model", str(make_tiny_model("llama")), "-p", r"Review: {text}\nLabel:"]
    call = ["choose", str(file), "-k", "3", "--labels", "0=bad,1=good", "--out", str(ordered), *model]
    result = CliRunner().invoke(app, [*call, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["queries"], found["by"]) == (3, "pdo")
    written = [json.loads(line) for line in ordered.read_text(encoding="utf-8").splitlines()]
    assert written == found["demos"]
    given = CliRunner().invoke(
        app, ["order", str(ordered), "--order", "given", "-q", "another", "-a", " {label}", *model[2:], "--json"]
    )
    assert given.exit_code == 0, given.output
    assert [row["id"] for row in json.loads(given.stdout)["demonstrations"]] == [row["id"] for row in written]
    whole = CliRunner().invoke(app, ["choose", str(ordered), "--queries", str(file), "--allow-leaks", *model, "--json"])
    assert json.loads(whole.stdout)["prior"]["source"] == "uniform"
    shown = CliRunner().invoke(app, call)
    assert "best of 6 orders over 3 queries" in shown.stdout


def test_rows_of_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"uid": f"u{n}", "id": n, "text": f"{word} of all", "label": n % 2} for n, word in enumerate("abcdefgh")]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"uid": "twin"}]), encoding="utf-8")
    found = read_rows(file, prompt="{text}:", k=2, max_queries=4, data=DataSpec(id_column="uid"))
    assert found.counts == {"0": 5, "1": 4}
    assert len(found.pool) == 9
    assert len(found.queries) == 4
    shown = {row["text"] for row in found.demos}
    assert not shown & {row["text"] for row in found.queries}
    assert {row["id"][0] for row in [*found.demos, *found.queries]} <= {"u", "t"}
    assert read_rows(file, file, prompt="{text}:", k=2, max_queries=4, data=DataSpec(id_column="uid")) == found
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n', encoding="utf-8")
    asked = read_rows(file, other, prompt="{text}:", k=2, max_queries=2, data=DataSpec(id_column="uid")).queries
    assert len(asked) == 2
    assert all(row["text"] in ("one", "two", "three") for row in asked)


def test_free_answers_are_no_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"{number} of all", "label": f"answer {number}"} for number in range(70)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = CliRunner().invoke(app, ["choose", str(file), "-k", "4", "-p", "{text}:", "--model", "/no/such/model"])
    assert told.exit_code == 2
    assert "70 different values" in " ".join(told.output.split())


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n', encoding="utf-8")
    for options, message in (
        ([], "--prompt"),
        (["-p", "{text}:", "-k", "9"], "2 rows"),
        (["-p", "{text}:"], "none were given"),
        (["-p", "{text}:", "--max-queries", "0", "-k", "2"], "at least 1"),
        (["-p", "{text}:", "--queries", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        result = CliRunner().invoke(app, ["choose", str(file), *options])
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split()), result.output
