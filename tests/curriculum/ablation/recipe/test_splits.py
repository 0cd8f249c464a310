"""Splits and sets: disjoint, without leaks, seeded, and unchanged when a study grows."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import count_calls

from sparsort.curriculum.ablation.recipe.selectors import SELECTORS
from sparsort.curriculum.ablation.recipe.splits import draw_sets, read_rows, split_rows
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.demos.pool.leaks import find_leaks
from sparsort.errors import SparsortError

TASK = Task(name="moods", prompt="Review: {text}\nMood:", answer=" {label}", labels={"0": "bad", "1": "good"})
PAIRS = Task(name="pairs", prompt="{premise} / {hypothesis}:", answer=" {label}", labels={"0": "no", "1": "yes"})


def sentence(seed: int) -> str:
    words = random.Random(seed)
    return " ".join("".join(words.choices("abcdefghij", k=5)) for _ in range(12))


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": sentence(start + at), "label": at % 2} for at in range(count)]


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in found]


def test_every_training_row_is_in_one_place() -> None:
    splits = split_rows(TASK, rows(100), rows(40, 1000), n_test=10, n_dev=8)
    assert (len(splits.test), len(splits.dev), len(splits.pool)) == (10, 8, 92)
    placed = [*ids(splits.dev), *ids(splits.pool), *(item.id for item in splits.dropped)]
    assert sorted(placed) == sorted(f"train:{at}" for at in range(100))
    assert all(name.startswith("test:") for name in ids(splits.test))
    assert splits.notes == []


def test_without_test_rows_half_of_the_training_rows_are_set_aside() -> None:
    splits = split_rows(TASK, rows(101), n_test=20, n_dev=5)
    assert (len(splits.test), len(splits.dev), len(splits.pool)) == (20, 5, 46)
    assert len({*ids(splits.test), *ids(splits.dev), *ids(splits.pool)}) == 71
    assert "50 of the 101 training rows were set aside" in splits.notes[0]


@pytest.mark.parametrize("test", [None, rows(60, 1000)])
def test_a_study_can_grow(test: list[dict[str, Any]] | None) -> None:
    few, many = (split_rows(TASK, rows(120), test, n_test=n, n_dev=8) for n in (10, 50))
    assert many.test[:10] == few.test
    assert (many.pool, many.dev) == (few.pool, few.dev)


def test_splits_are_seeded() -> None:
    again, other = (split_rows(TASK, rows(60), rows(60, 1000), n_test=10, n_dev=5, seed=seed) for seed in (0, 1))
    assert again == split_rows(TASK, rows(60), rows(60, 1000), n_test=10, n_dev=5)
    assert ids(again.test) != ids(other.test)
    assert ids(again.pool) != ids(other.pool)


def test_rows_that_nearly_are_a_test_or_dev_row_are_dropped_and_reported() -> None:
    train, test = rows(60), rows(20, 1000)
    train[7]["text"] = test[3]["text"].upper() + "!"
    train[8]["text"] = test[4]["text"] + " indeed"
    splits = split_rows(TASK, train, test, n_test=5, n_dev=5)
    reasons = {item.id: item.reason for item in splits.dropped}
    assert "nearly is, a test row (test:3, similarity 1.00)" in reasons.pop("train:7")
    assert "nearly is, a test row (test:4, similarity 0." in reasons.pop("train:8")
    assert reasons == {}
    assert splits.notes == ["2 training rows were excluded: it is, or nearly is, a test row."]


def test_a_near_duplicate_of_a_dev_row_is_not_a_demonstration() -> None:
    train = rows(30) + rows(30)
    splits = split_rows(TASK, train, rows(5, 1000), n_test=5, n_dev=10)
    dev = {int(name.removeprefix("train:")) for name in ids(splits.dev)}
    twins = {(at + 30) % 60 for at in dev} - dev
    assert len(twins) > 5
    assert {item.id for item in splits.dropped} == {f"train:{at}" for at in twins}
    assert all(item.reason.startswith("it is, or nearly is, a dev row (train:") for item in splits.dropped)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 8))
def test_no_demonstration_leaks_into_a_query(seed: int, variety: int) -> None:
    generator = np.random.default_rng(seed)

    def draw(count: int) -> list[dict[str, Any]]:
        # Few different texts, so that many rows are one another.
        return [{"text": sentence(int(generator.integers(variety * 10))), "label": 0} for _ in range(count)]

    train, test = draw(60), draw(8)
    try:
        splits = split_rows(TASK, train, test, n_test=4, n_dev=3, seed=seed)
    except SparsortError as error:
        assert "are left" in str(error)  # noqa: PT017
        return
    texts = {name: [row["text"] for row in getattr(splits, name)] for name in ("test", "dev", "pool")}
    assert find_leaks(texts["test"], texts["pool"], search="direct") == []
    assert find_leaks(texts["dev"], texts["pool"], search="direct") == []
    assert find_leaks(texts["test"], texts["dev"], search="direct") == []
    assert not {text.casefold() for text in texts["pool"]} & {row["text"].casefold() for row in test}


def test_of_several_fields_every_one_must_leak() -> None:
    test = [{"premise": sentence(1), "hypothesis": sentence(2), "label": 0}]
    train = [
        {"premise": sentence(1), "hypothesis": sentence(3), "label": 0},
        {"premise": sentence(4), "hypothesis": sentence(2), "label": 0},
        {"premise": sentence(1), "hypothesis": sentence(2), "label": 1},
    ]
    assert [item.id for item in split_rows(PAIRS, train, test, n_test=1, n_dev=0).dropped] == ["train:2"]


def test_a_field_that_is_blank_on_both_sides_does_not_distinguish_rows() -> None:
    test = [{"premise": "", "hypothesis": sentence(2), "label": 0}]
    train = [{"premise": " ", "hypothesis": sentence(2), "label": 0}, {"premise": "", "hypothesis": "", "label": 0}]
    assert [item.id for item in split_rows(PAIRS, train, test, n_test=1, n_dev=0).dropped] == ["train:0"]


def test_long_demonstrations_leave_the_pool() -> None:
    train = rows(20)
    train[3]["text"] += " long" * 100
    splits = split_rows(TASK, train, rows(5, 1000), n_test=5, n_dev=0, max_demo_chars=200)
    assert [item.id for item in splits.dropped] == ["train:3"]
    assert splits.notes == ["1 training row was excluded: it is longer than 200 characters as a demonstration."]
    exact = len(TASK.demo_text(train[0]))
    kept = split_rows(TASK, train[:3], rows(5, 1000), n_test=5, n_dev=0, max_demo_chars=exact)
    assert "train:0" in ids(kept.pool)


def test_too_few_test_rows_are_a_note() -> None:
    splits = split_rows(TASK, rows(20), rows(5, 1000), n_test=256, n_dev=2)
    assert len(splits.test) == 5
    assert splits.notes == ["256 test rows were asked for; there are 5."]


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (rows(5), {"n_dev": 6}, "5 of 6 dev rows and 0 rows for the pool are left"),
        (rows(5), {"n_dev": 5}, "0 rows for the pool are left"),
        ([], {"n_dev": 0}, "0 training rows"),
        (rows(5), {"n_test": 0}, "at least 1 test row"),
        (rows(5), {"max_demo_chars": 0}, "at least 1 is needed"),
        ([{"txt": "x", "label": 0}] * 3, {"n_dev": 0}, "no value in the field 'text'"),
    ],
)
def test_data_that_cannot_be_split_is_refused(
    train: list[dict[str, Any]], options: dict[str, int], message: str
) -> None:
    with pytest.raises(SparsortError, match=message):
        split_rows(TASK, train, rows(5, 1000), **options)


def test_ids_of_the_rows_are_kept() -> None:
    train = [{**row, "id": f"own-{at}"} for at, row in enumerate(rows(10))]
    assert sorted(ids(split_rows(TASK, train, rows(3, 1000), n_test=3, n_dev=0).pool)) == [
        f"own-{at}" for at in range(10)
    ]


def test_twice_the_rows_are_twice_the_work() -> None:
    def work(n: int) -> int:
        train, test = rows(10 * n), rows(n, 10**6)
        return count_calls(lambda: split_rows(TASK, train, test, n_dev=32))

    assert work(200) < 2.5 * work(100)


# Files


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def test_rows_are_read_with_their_ids(tmp_path: Path) -> None:
    write(tmp_path / "sub" / "a.jsonl", rows(3))
    task = Task(**{**vars(TASK), "train": "sub/a.jsonl"})
    assert ids(read_rows(task, tmp_path, "train") or []) == ["train:0", "train:1", "train:2"]
    # The folder that holds the files themselves will do.
    assert read_rows(task, tmp_path / "sub", "train") == read_rows(task, tmp_path, "train")
    assert read_rows(task, tmp_path, "test") is None
    named = Task(**{**vars(task), "id_column": "text"})
    assert ids(read_rows(named, tmp_path, "train") or []) == [row["text"] for row in rows(3)]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=r"there is no file .*none\.jsonl"):
        read_rows(Task(**{**vars(TASK), "train": "none.jsonl"}), tmp_path, "train")


# Sets


def test_random_sets_are_seeded_and_differ() -> None:
    pool = rows(50)
    sets = draw_sets(TASK, pool, "random", 4, range(10))
    assert all(len(set(chosen)) == 4 for chosen in sets)
    assert len({tuple(chosen) for chosen in sets}) == 10
    # A set hangs on its own seed alone.
    assert draw_sets(TASK, pool, "random", 4, [7, 3]) == [sets[7], sets[3]]


def test_balanced_sets_have_an_even_share_of_each_label() -> None:
    pool = rows(50)
    for chosen in draw_sets(TASK, pool, "balanced", 6, range(5)):
        assert Counter(pool[at]["label"] for at in chosen) == {0: 3, 1: 3}


def test_spread_sets_go_from_easy_to_hard() -> None:
    for chosen in draw_sets(TASK, rows(40), "spread", 4, range(3), scores=np.arange(40.0)):
        assert [at // 10 for at in chosen] == [0, 1, 2, 3]


def test_vote_k_sets_differ_though_no_seed_changes_the_method() -> None:
    embeddings = np.random.default_rng(0).normal(size=(40, 6))
    sets = draw_sets(TASK, rows(40), "vote_k", 4, range(6), embeddings=embeddings)
    assert len({tuple(chosen) for chosen in sets}) > 1
    assert all(len(set(chosen)) == 4 and max(chosen) < 40 for chosen in sets)
    assert sets == draw_sets(TASK, rows(40), "vote_k", 4, range(6), embeddings=embeddings)
    assert sorted(draw_sets(TASK, rows(4), "vote_k", 4, [0], embeddings=embeddings[:4])[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("selector", SELECTORS.names(lambda entry: entry.looks_at_query))
def test_a_selector_that_looks_at_the_query_draws_no_common_set(selector: str) -> None:
    with pytest.raises(SparsortError, match="chooses for each query"):
        draw_sets(TASK, rows(10), selector, 2, [0])


@pytest.mark.parametrize(
    ("selector", "k", "message"),
    [
        ("randm", 2, "Did you mean 'random'"),
        ("first", 2, "gives one set only"),
        ("random", 0, "at least 1 demonstration"),
        ("random", 11, "only 10 of the pool's 10"),
        ("vote_k", 2, "needs embeddings="),
        ("spread", 2, "needs scores="),
    ],
)
def test_sets_that_cannot_be_drawn_are_refused(selector: str, k: int, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        draw_sets(TASK, rows(10), selector, k, [0])
