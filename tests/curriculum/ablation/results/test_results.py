"""Results: what is refused on construction, and that saved results load unchanged."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.ablation.results.cells import Arm, Cell, SetInfo
from sparsort.curriculum.ablation.results.results import ARRAYS, RESULTS, Results
from sparsort.errors import SparsortError


def make_arm(
    name: str = "a", kind: Any = "named", *, S: int = 2, gold: Any = (0, 1, 1), L: int = 2, k: int = 3, **changes: Any
) -> Arm:
    rng = np.random.default_rng([len(name), S, L, k])
    log_p = rng.normal(size=(S, len(gold), L))
    predicted = log_p.argmax(axis=2) if L else np.full((S, len(gold)), -1)
    fields: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "order": [rng.permutation(k).tolist() for _ in range(S)],
        "log_p": log_p,
        "predicted": predicted,
        "correct": predicted == np.array(gold) if L else rng.random((S, len(gold))) < 0.5,
        "tokens": rng.uniform(10, 20, S),
        "choosing_tokens": np.zeros(S),
    }
    return Arm(**fields | changes)


def make_group(*, S: int = 2, L: int = 2, k: int = 3, **changes: Any) -> Cell:
    gold = [index % max(L, 1) for index in (0, 1, 1)]
    fields: dict[str, Any] = {
        "task": "toy",
        "selector": "random",
        "k": k,
        "contextual": False,
        "labels": [f"label {index}" for index in range(L)],
        "items": ["x", "y", "z"],
        "gold": [f"label {index}" for index in gold],
        "sets": [
            SetInfo(
                seed=s,
                demo_ids=[f"d{s}{j}" for j in range(k)],
                demo_labels=[],
                demo_tokens=[5] * k,
                prompt="p \u2028 é",
            )
            for s in range(S)
        ],
        "random": [make_arm("random", "random", S=S, gold=gold, L=L, k=k) for _ in range(3)],
        "arms": [make_arm("a", S=S, gold=gold, L=L, k=k), make_arm("best", "oracle", S=S, gold=gold, L=L, k=k)],
        "demo_texts": {"d00": "a\nb"},
        "item_texts": ["one", "two", "\u2028"],
    }
    return Cell(**fields | changes)


def assert_same(found: Results, given: Results, *, exact: bool) -> None:
    assert found.provenance == given.provenance
    assert len(found.cells) == len(given.cells)
    for one, other in zip(found.cells, given.cells, strict=True):
        for name in ("key", "labels", "items", "gold", "sets", "demo_ids_of_item", "demo_texts", "item_texts"):
            assert getattr(one, name) == getattr(other, name), name
        pairs = [*zip(one.random, other.random, strict=True), *zip(one.arms, other.arms, strict=True)]
        for arm, expected in pairs:
            assert (arm.name, arm.kind, arm.order) == (expected.name, expected.kind, expected.order)
            for name in ("predicted", "correct", "tokens", "choosing_tokens"):
                np.testing.assert_array_equal(getattr(arm, name), getattr(expected, name))
                assert getattr(arm, name).dtype == getattr(expected, name).dtype
            np.testing.assert_allclose(arm.log_p, expected.log_p, rtol=0 if exact else 1e-6)
            assert arm.log_p.shape == expected.log_p.shape
            if expected.order_of_item is None:
                assert arm.order_of_item is None
            else:
                np.testing.assert_array_equal(arm.order_of_item, expected.order_of_item)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "chosn"}, "Did you mean 'chosen'"),
        ({"name": ""}, "no name"),
        ({"log_p": np.zeros((2, 3))}, r"\(sets, items, labels\)"),
        ({"log_p": np.full((2, 3, 2), np.nan)}, "NaN"),
        ({"predicted": np.zeros((2, 4), int)}, "predicted has the shape"),
        ({"predicted": np.full((2, 3), 2)}, "0 to 1"),
        ({"predicted": np.full((2, 3), -1)}, "0 to 1"),
        ({"correct": np.zeros((2, 3))}, "correct is float64"),
        ({"correct": np.zeros((3, 2), bool)}, "correct has the shape"),
        ({"tokens": np.array([1.0, -1.0])}, "not negative"),
        ({"tokens": np.array([1.0, np.inf])}, "finite"),
        ({"choosing_tokens": np.zeros(3)}, "choosing_tokens has the shape"),
        ({"order": [[0, 1, 2]]}, "each of the 2 sets"),
        ({"order": [[0, 1, 1], [0, 1, 2]]}, "permutation"),
        ({"order_of_item": np.zeros((2, 3, 3), int)}, "not both"),
        ({"order": None, "order_of_item": np.zeros((2, 3, 3), int)}, "permutations"),
        ({"order": None, "order_of_item": np.zeros((2, 4, 3), int)}, r"expected \(2, 3, k\)"),
    ],
)
def test_an_arm_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        make_arm(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"labels": ["x", "x"]}, "labels are not distinct"),
        ({"items": ["x", "x", "y"]}, "items are not distinct"),
        ({"gold": ["label 0"]}, "1 gold"),
        ({"item_texts": ["one"]}, "1 item_texts for 3 items"),
        ({"gold": ["label 0", "label 1", "label 7"]}, "label 7"),
        ({"sets": []}, "at least one of each"),
        ({"random": []}, "at least one of each"),
        (
            {"sets": [SetInfo(seed=0, demo_ids=["a"], demo_labels=[], demo_tokens=[], prompt="")] * 2},
            "names 1 demonstrations",
        ),
        (
            {"sets": [SetInfo(seed=0, demo_ids=["a", "b", "c"], demo_labels=["x"], demo_tokens=[], prompt="")] * 2},
            "1 demo_labels",
        ),
        ({"demo_ids_of_item": [[["a"] * 3] * 3] * 2}, "none in the set"),
        ({"arms": [make_arm("a"), make_arm("a")]}, "the same name"),
        ({"arms": [make_arm("a", "random")]}, "belong in `random`"),
        ({"random": [make_arm("a")]}, "belong in `random`"),
        ({"arms": [make_arm("a", S=3)]}, r"expected \(2, 3, 2\)"),
        ({"arms": [make_arm("a", k=2)]}, "orders 2 demonstrations, expected 3"),
        ({"arms": [make_arm("a", gold=(1, 1, 1))]}, "correct differs from predicted == gold"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        make_group(**changes)


def test_results_need_distinct_cells() -> None:
    with pytest.raises(SparsortError, match="without a single finished cell"):
        Results(cells=[], provenance={})
    with pytest.raises(SparsortError, match="two cells of toy, random, k = 3"):
        Results(cells=[make_group(), make_group()], provenance={})
    assert len(Results(cells=[make_group(), make_group(contextual=True)], provenance={}).cells) == 2


def test_an_arm_is_found_by_its_name() -> None:
    group = make_group()
    assert group.arm("best").kind == "oracle"
    with pytest.raises(SparsortError, match="Did you mean 'best'"):
        group.arm("bst")
    assert group.random_correct.shape == (3, 2, 3)


@given(
    S=st.integers(1, 3),
    L=st.integers(0, 4),
    k=st.integers(1, 4),
    by_item=st.booleans(),
    word=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
@settings(deadline=None, max_examples=40)
def test_what_is_saved_is_what_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, S: int, L: int, k: int, by_item: bool, word: str
) -> None:
    group = make_group(S=S, L=L, k=k)
    rng = np.random.default_rng(S)
    arm = replace(group.arms[0], name="by query", order=None, order_of_item=np.argsort(rng.random((S, 3, k)), axis=2))
    changes: dict[str, Any] = {"arms": [*group.arms, arm]}
    if by_item:
        changes["sets"] = [replace(one, demo_ids=[], demo_tokens=[], prompt=word) for one in group.sets]
        changes["demo_ids_of_item"] = [[[f"{word}{j}" for j in range(k)] for _ in range(3)] for _ in range(S)]
    results = Results(
        cells=[replace(group, **changes), make_group(contextual=True)], provenance={"model": word, "n": [1]}
    )
    assert_same(Results.from_dict(json.loads(json.dumps(results.to_dict()))), results, exact=True)
    folder = tmp_path_factory.mktemp("results")
    results.save(folder)
    assert_same(Results.load(folder), results, exact=False)


def test_saving_twice_gives_the_same_bytes_and_no_pickle(tmp_path: Path) -> None:
    results = Results(cells=[make_group(), make_group(L=0, task="free")], provenance={})
    for name in ("one", "two"):
        results.save(tmp_path / name)
    for file in (RESULTS, ARRAYS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with zipfile.ZipFile(tmp_path / "one" / ARRAYS) as archive:
        heads = [archive.read(name)[:128] for name in archive.namelist()]
    assert heads
    assert not any(b"|O" in head for head in heads)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [ARRAYS, RESULTS]


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    Results(cells=[make_group()], provenance={}).save(tmp_path)
    Results(cells=[make_group(S=3)], provenance={}).save(tmp_path / "other")
    (tmp_path / ARRAYS).write_bytes((tmp_path / "other" / ARRAYS).read_bytes())
    with pytest.raises(SparsortError, match="stopped between writing the two"):
        Results.load(tmp_path)
    (tmp_path / ARRAYS).unlink()
    with pytest.raises(SparsortError, match=f"{ARRAYS} is missing"):
        Results.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no results.json"),
        ("{", "is not JSON"),
        ("[]", "'list'"),
        ('{"format": "sparsort results 9"}', "results 9"),
    ],
)
def test_a_folder_without_results_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / RESULTS).write_text(text, encoding="utf-8")
    with pytest.raises(SparsortError, match=message):
        Results.load(tmp_path)


def test_a_dictionary_with_a_hole_is_refused() -> None:
    whole = Results(cells=[make_group()], provenance={}).to_dict()
    for missing in ("groups", "arrays", "provenance"):
        with pytest.raises(SparsortError, match="without"):
            Results.from_dict({name: value for name, value in whole.items() if name != missing})
    whole["arrays"].pop("0/arms/correct")
    with pytest.raises(SparsortError, match="not written completely"):
        Results.from_dict(whole)
