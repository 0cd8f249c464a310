"""`Known` and `Demonstrator`: what is computed and when, and that the result equals separate calls of each function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsort import assemble, order_demos, select_demos
from sparsort.curriculum.demos.demonstrator import Demonstrator
from sparsort.curriculum.demos.known import Known, RowNumbers
from sparsort.curriculum.demos.order import ORDERS
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.demos.prompt import PromptForm
from sparsort.curriculum.demos.select import SELECTORS
from sparsort.errors import SparsortError

TEXTS = [
    "Who is the oldest of all the gardeners?",
    "Which is the tallest of the old trees in the garden?",
    "How many apples did not fall yet?",
    "What grows beyond the wall?",
    "Is there a gate on the far side of the wall?",
    "Why are leaves red?",
    "Where do the two paths meet?",
]
POOL = [{"id": f"q{at}", "question": text, "answer": f"a{at}", "kind": "ab"[at % 2]} for at, text in enumerate(TEXTS)]
QUERY = {"question": "How many pears fell from the tree beyond the wall?"}
HARD = np.array([4.0, 1, 6, 0, 3, 5, 2])
VECTORS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
QUERY_VECTOR = VECTORS[3] + np.float32(0.2)
PROMPT = {"prompt": "Q: {question}\nA:", "answer": " {answer}"}


def _pool() -> DemoPool:
    return DemoPool(POOL, prompt="{question}", label="kind")


class Counted:
    """Numbers of rows and of the query that say for which rows they were computed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def rows(self, name: str, values: Any) -> RowNumbers:
        def compute(positions: list[int]) -> Any:
            self.calls.append((name, positions))
            return values[positions]

        return RowNumbers(len(values), compute)

    def query(self, name: str, value: Any) -> Any:
        self.calls.append((name, []))
        return value

    def known(self, pool: DemoPool) -> Known:
        return Known(
            pool,
            QUERY,
            difficulty=self.rows("difficulty", HARD),
            embeddings=self.rows("embeddings", VECTORS),
            query_difficulty=lambda: self.query("query difficulty", 3.0),
            query_embedding=lambda: self.query("query embedding", QUERY_VECTOR),
        )


def test_a_column_computes_each_row_once_in_the_order_asked_for() -> None:
    counted = Counted()
    column = counted.rows("x", np.arange(12.0, dtype=np.float32).reshape(6, 2))
    assert column.at([4, 1]).tolist() == [[8, 9], [2, 3]]
    assert column.at([1, 5, 4, 5]).tolist() == [[2, 3], [10, 11], [8, 9], [10, 11]]
    assert column.all.tolist() == [[2.0 * row, 2.0 * row + 1] for row in range(6)]
    assert column.all is column.all
    assert column.all.dtype == np.float32
    assert counted.calls == [("x", [4, 1]), ("x", [5]), ("x", [0, 2, 3])]
    given = [[1.0], [2.0]]
    assert RowNumbers.of(given).all is given
    assert RowNumbers.of(given).at([1]).tolist() == [[2.0]]
    assert RowNumbers(0, lambda positions: np.zeros(len(positions))).all.tolist() == []


def _by_hand(selector: str, order: str) -> tuple[list[str], str]:
    needs = SELECTORS[selector].needs
    near = {"embeddings": VECTORS, "query_embedding": QUERY_VECTOR} if "query_embedding" in needs else {}
    inputs: dict[str, Any] = {"embeddings": VECTORS} if "embeddings" in needs else {}
    inputs |= near | ({"ids": ["q5", "q1", "q3", "q2"]} if "ids" in needs else {})
    inputs |= {"scores": HARD} if "scores" in needs else {}
    inputs |= {"query_difficulty": 3.0} if "query_difficulty" in needs else {}
    chosen = select_demos(_pool(), QUERY, 4, method=selector, seed=2, **inputs)
    of_chosen = VECTORS[chosen.indices].astype(np.float64)
    cosine = of_chosen @ QUERY_VECTOR / np.linalg.norm(of_chosen, axis=1) / np.linalg.norm(QUERY_VECTOR)
    ordered = order_demos(chosen.demos, HARD[chosen.indices], order, similarity=cosine, seed=2)
    return [str(row["id"]) for row in ordered], assemble(ordered, QUERY, **PROMPT).text


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("order", [*ORDERS, "reverse:u_shape"])
def test_it_selects_orders_and_assembles(selector: str, order: str) -> None:
    form = PromptForm(**PROMPT)
    ids = ["q5", "q1", "q3", "q2"] if selector == "ids" else None
    demonstrator = Demonstrator(selector=selector, order=order, k=4, seed=2, ids=ids, own_similarity=True, form=form)
    known = Counted().known(_pool())
    shown = demonstrator.demonstrate(known)
    names, prompt = _by_hand(selector, order)
    assert [row["id"] for row in shown.rows] == [POOL[at]["id"] for at in shown.indices] == names
    assert shown.prompt.text == prompt
    assert demonstrator.positions(known) == shown.indices


def test_nothing_is_computed_that_the_selector_and_the_order_do_not_read() -> None:
    pool = _pool()
    for selector, order, computed in (
        ("first", "length_ascending", []),
        ("bm25", "random", []),
        ("first", "easy_to_hard", ["difficulty"]),
        ("first", "similarity_ascending", ["query embedding", "embeddings"]),
        ("vote_k", "given", ["embeddings"]),
        ("spread", "easy_to_hard", ["difficulty"]),
        ("difficulty_matched", "u_shape", ["difficulty", "query difficulty", "embeddings", "query embedding"]),
    ):
        counted = Counted()
        Demonstrator(selector=selector, order=order, k=3, own_similarity=True).positions(counted.known(pool))
        assert [name for name, _ in counted.calls] == computed
    counted = Counted()
    Demonstrator(selector="first", order="hard_to_easy", k=3).arrange(counted.known(pool), [2, 0])
    assert counted.calls == [("difficulty", [2, 0])]


def test_an_order_by_similarity_ranks_by_words_or_by_embeddings_as_asked() -> None:
    known = Counted().known(_pool())
    by_words = Demonstrator(selector="bm25", order="similarity_descending", k=4)
    assert by_words.positions(known) == by_words.choose(known).indices
    own = Demonstrator(selector="bm25", order="similarity_descending", k=4, own_similarity=True)
    chosen = own.choose(known).indices
    cosine = (VECTORS @ QUERY_VECTOR) / np.linalg.norm(VECTORS, axis=1)
    assert own.positions(known) == sorted(chosen, key=lambda at: -cosine[at]) != chosen


def test_a_missing_input_is_refused_by_name_and_before_anything_is_computed() -> None:
    counted = Counted()
    known = Known(_pool(), QUERY, embeddings=counted.rows("embeddings", VECTORS))
    with pytest.raises(SparsortError, match="'knn' needs query_embedding="):
        Demonstrator(selector="knn", order="given", k=2).choose(known)
    with pytest.raises(SparsortError, match="needs query_embedding= and scores= and query_difficulty="):
        Demonstrator(selector="difficulty_matched", order="given", k=2).choose(known)
    assert counted.calls == []
    with pytest.raises(SparsortError, match="'easy_to_hard' needs scores="):
        Demonstrator(order="easy_to_hard", k=2).positions(Known(_pool(), QUERY))
    with pytest.raises(SparsortError, match="a prompt ends with the query"):
        Demonstrator(order="given", k=2, form=PromptForm(**PROMPT)).demonstrate(Known(_pool()))


def test_names_are_checked_when_a_demonstrator_is_made() -> None:
    with pytest.raises(SparsortError, match="It is called 'knn' here"):
        Demonstrator(selector="topk")
    with pytest.raises(SparsortError, match="Did you mean 'u_shape'"):
        Demonstrator(order="reverse:u_shap")
    with pytest.raises(SparsortError, match="ids were given, and select is 'first'"):
        Demonstrator(selector="first", ids=["q1"])
    assert Demonstrator(ids=["q1"]).selector_entry.names_rows


def test_all_rows_are_shown_where_nothing_says_how_many() -> None:
    known = Counted().known(_pool())
    assert Demonstrator(order="given").positions(known) == list(range(7))
    # Scores without a kind are ordered from the hardest.
    assert Demonstrator().positions(known) == np.argsort(-HARD).tolist()


def test_ids_of_a_pool_may_be_given() -> None:
    pool = DemoPool([{"text": "one apple"}, {"text": "two pears"}], ids=["x", "y"])
    assert pool.ids == ["x", "y"]
    assert pool.name(1) == "demonstration 'y'"
    assert Demonstrator(ids=["y"], order="given").positions(Known(pool, "three plums")) == [1]


def test_columns_that_the_prompt_hides_do_not_count_as_length() -> None:
    rows = [{"text": "aa", "label": "1", "note": "n" * 50}, {"text": "aaaa", "label": "1", "note": ""}]
    demonstrator = Demonstrator(selector="first", order="length_ascending", k=2)
    assert demonstrator.positions(Known(DemoPool(rows, prompt="{text}"), "b c d")) == [0, 1]
    assert demonstrator.positions(Known(DemoPool(rows), None)) == [1, 0]
