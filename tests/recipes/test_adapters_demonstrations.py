"""What the adapters share, against select_demos and order_demos called by hand; and what a missing package says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort import LengthScorer, order_demos, select_demos
from sparsort.errors import SparsortError
from sparsort.recipes.adapters.demonstrations import SELECTORS, DemoChooser, DemoOptions

POOL = [
    {"id": f"q{at}", "question": f"{text} of the {at + 3} in the garden?", "answer": "yes", "kind": "ab"[at % 2]}
    for at, text in enumerate(
        [
            "Who is the oldest of all the gardeners",
            "Which is the tallest of the old trees",
            "How many apples did not fall yet",
            "What grows behind the wall",
            "Is there a gate on the far side",
            "Why are leaves red",
            "Where do the two paths meet",
        ]
    )
]
QUERY = {"question": "How many pears fell from the tree behind the house?"}
HARD = {row["id"]: float(value) for row, value in zip(POOL, [4, 1, 6, 0, 3, 5, 2], strict=True)}


def embed(texts: list[str]) -> list[list[float]]:
    """Letters counted: no model, and no two of the texts above are alike."""
    return [[float(text.count(letter)) for letter in "aehiorst "] for text in texts]


NEEDS: dict[str, dict[str, Any]] = {
    "balanced": {"label": "kind"},
    "knn": {"embed": embed},
    "mmr": {"embed": embed},
    "kdpp": {"embed": embed},
    "vote_k": {"embed": embed},
    "difficulty_matched": {"embed": embed, "query_difficulty": lambda _: 3.0},
}


def _by_hand(select: str, order: str, k: int, seed: int) -> list[str]:
    vectors = np.asarray(embed([str(row["question"]) for row in POOL]))
    inputs: dict[str, Any] = {}
    if "embed" in NEEDS.get(select, {}) or order.endswith("similarity_ascending"):
        inputs = {"embeddings": vectors, "query_embedding": np.asarray(embed([QUERY["question"]]))[0]}
    chosen = select_demos(
        POOL,
        QUERY,
        k,
        method=select,
        seed=seed,
        label="kind",
        scores=HARD,
        query_difficulty=3.0,
        prompt="{question}",
        **inputs,
    )
    return [str(row["id"]) for row in order_demos(chosen.demos, HARD, order, similarity=chosen.similarity, seed=seed)]


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize(
    "order", ["easy_to_hard", "reverse:u_shape", "length_descending", "random", "given", "reverse:similarity_ascending"]
)
def test_it_is_select_demos_and_then_order_demos(select: str, order: str) -> None:
    needs: dict[str, Any] = {"embed": embed, **NEEDS.get(select, {})}
    options = DemoOptions(order=order, select=select, scores=HARD, prompt="{question}", seed=3, **needs)
    chooser = DemoChooser(POOL, options)
    for _ in range(2):  # what was kept from the first time gives the same
        assert [POOL[at]["id"] for at in chooser.choose(QUERY, 4)] == _by_hand(select, order, 4, seed=3)


@given(
    hard=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12),
    data=st.data(),
)
def test_positions_are_distinct_and_rise_in_difficulty(hard: list[float], data: st.DataObject) -> None:
    rows = [{"question": f"number {at}", "hard": value} for at, value in enumerate(hard)]
    k = data.draw(st.integers(0, len(rows)))
    seed = data.draw(st.integers(0, 5))
    chosen = DemoChooser(rows, DemoOptions(order="easy_to_hard", score_column="hard")).choose(None, k, seed=seed)
    assert len(set(chosen)) == len(chosen) == k
    assert [hard[at] for at in chosen] == sorted(hard[at] for at in chosen)
    scored = DemoChooser(rows, DemoOptions(order="easy_to_hard", scores=hard)).choose(None, k, seed=seed)
    assert scored == chosen


def test_the_query_and_what_nearly_is_it_never_stand_among_its_demonstrations() -> None:
    query = {"question": POOL[2]["question"].upper() + "!"}
    options = {"order": "given", "select": "first"}
    assert DemoChooser(POOL, DemoOptions(**options)).choose(query, 6) == [0, 1, 3, 4, 5, 6]
    assert DemoChooser(POOL, DemoOptions(**options)).choose(None, 7) == list(range(7))
    assert DemoChooser(POOL, DemoOptions(**options, allow_leaks=True)).choose(query, 7) == list(range(7))
    with pytest.raises(SparsortError, match="7 demonstrations were asked for, but only 6"):
        DemoChooser(POOL, DemoOptions(**options)).choose(query, 7)


def test_held_out_rows_are_left_out_and_the_others_keep_their_positions_and_scores() -> None:
    held_out = [{"question": POOL[0]["question"]}, {"question": "Something else altogether, is it not?"}]
    options = DemoOptions(order="hard_to_easy", select="first", scores=list(HARD.values()))
    chooser = DemoChooser(POOL, options, held_out=held_out)
    assert chooser.choose(None, 6) == [2, 5, 4, 6, 1, 3]
    with pytest.raises(SparsortError, match="1 of the pool's 7 rows are in the held-out set"):
        chooser.choose(None, 7)
    allowed = DemoOptions(order="given", select="first", allow_leaks=True)
    assert DemoChooser(POOL, allowed, held_out=held_out).choose(None, 7) == list(range(7))


def test_scores_from_a_file_find_their_rows_by_id_and_by_content(tmp_path: Path) -> None:
    table = LengthScorer("characters").score(POOL, prompt="{question}")
    table.to_parquet(tmp_path / "scores.parquet")
    table.save(tmp_path / "folder")
    by_length = sorted(range(7), key=lambda at: len(POOL[at]["question"]))
    assert len({len(row["question"]) for row in POOL}) == 7
    for path in (tmp_path / "scores.parquet", tmp_path / "folder"):
        options = DemoOptions(order="easy_to_hard", select="first", scores=path)
        assert DemoChooser(POOL, options).choose(None, 7) == by_length
        # A framework's rows have no id, other fields, and another order.
        shuffled = [{"question": row["question"], "index": 5} for row in reversed(POOL)]
        assert DemoChooser(shuffled, options).choose(None, 7) == [6 - at for at in by_length]
    with pytest.raises(SparsortError, match="no score"):
        DemoChooser([*POOL, {"question": "new"}], options)
    with pytest.raises(SparsortError, match="by sparsity, but these scores are of kind 'length'"):
        DemoOptions(order="sparse_to_dense", scores=tmp_path / "scores.parquet")
    assert DemoOptions(scores=tmp_path / "scores.parquet").order == "hard_to_easy"


def test_missing_scores_are_refused_or_treated_as_told() -> None:
    rows = [{"question": f"number {at}", "hard": value} for at, value in enumerate([2.0, None, 1.0])]
    options: dict[str, Any] = {"order": "easy_to_hard", "select": "first", "score_column": "hard"}
    with pytest.raises(SparsortError, match="1 of 3 have NaN"):
        DemoChooser(rows, DemoOptions(**options)).choose(None, 3)
    assert DemoChooser(rows, DemoOptions(**options, missing="drop")).choose(None, 3) == [2, 0]
    assert DemoChooser(rows, DemoOptions(**options, missing="first")).choose(None, 3) == [1, 2, 0]
    with pytest.raises(
        SparsortError, match=r"demonstration 1 has no field 'hard'.*of 2 rows 1 lack it.*it has: question\."
    ):
        DemoChooser([rows[0], {"question": "x"}], DemoOptions(**options))
    with pytest.raises(SparsortError, match="the column 'question'"):
        DemoChooser(rows, DemoOptions(order="given", score_column="question"))


def test_the_seed_of_the_options_goes_before_the_frameworks() -> None:
    free, fixed = (DemoChooser(POOL, DemoOptions(order="random", seed=seed)) for seed in (None, 1))
    drawn = {tuple(free.choose(None, 4, seed=seed)) for seed in range(8)}
    assert len(drawn) > 1
    assert {tuple(fixed.choose(None, 4, seed=seed)) for seed in range(8)} == {tuple(free.choose(None, 4, seed=1))}


def test_a_length_is_that_of_the_text_given() -> None:
    rows = [{"question": "a" * n, "answer": "b" * (10 - 2 * n)} for n in (1, 2, 3)]
    assert DemoChooser(rows, DemoOptions(order="length_ascending", select="first")).choose(None, 3) == [2, 1, 0]
    options = DemoOptions(order="length_ascending", select="first", text=lambda row: str(row["question"]))
    assert DemoChooser(rows, options).choose(None, 3) == [0, 1, 2]


def test_embeddings_of_the_wrong_shape_are_told() -> None:
    options = DemoOptions(order="given", select="knn", embed=lambda texts: np.ones(len(texts)))
    with pytest.raises(SparsortError, match=r"shape \(7,\) for 7 texts"):
        DemoChooser(POOL, options).choose(QUERY, 2)


def test_what_nothing_reads_is_not_embedded() -> None:
    def refuse(texts: list[str]) -> Any:
        raise AssertionError(texts)

    assert len(DemoChooser(POOL, DemoOptions(order="random", embed=refuse)).choose(QUERY, 3)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'sparse_to_dense' needs scores="),
        ({"order": "sparse_to_dens", "scores": [1.0]}, "Did you mean 'sparse_to_dense'"),
        ({"order": "similarity_up"}, "unknown order"),
        ({"order": "given", "select": "ids"}, "unknown selection method 'ids'"),
        ({"order": "given", "select": "knn"}, "'knn' needs embed="),
        ({"order": "given", "select": "balanced"}, "'balanced' needs label="),
        ({"order": "given", "select": "spread"}, "'spread' needs scores= or score_column="),
        ({"order": "given", "select": "difficulty_matched"}, "score_column= and embed= and query_difficulty="),
        ({"order": "reverse:similarity_ascending"}, "needs embed="),
        ({"order": "given", "missing": "ignore"}, "unknown treatment"),
        ({"scores": [1.0], "score_column": "hard"}, "Give one of them"),
        ({"order": "given", "missing": "drop"}, "missing='drop' has no effect"),
        ({"order": "random", "text": str}, "only the orders by length read a text"),
        ({"scores": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_options_are_checked_when_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        DemoOptions(**options)


@pytest.mark.parametrize(
    ("adapter", "package", "extra"),
    [("lm_eval", "lm_eval", "lm-eval"), ("langchain", "langchain_core", "langchain"), ("dspy", "dspy", "dspy")],
)
def test_without_its_package_an_adapter_says_what_to_install(
    adapter: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"sparsort.recipes.adapters.{adapter}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SparsortError, match=rf"{package} is needed for .*pip install 'sparsort\[{extra}\]'"):
        importlib.import_module(name)
