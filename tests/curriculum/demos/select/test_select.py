"""Selection: every method gives exactly k rows or says why not, and no query chooses itself."""

from __future__ import annotations

import math
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sparsort.curriculum.demos.pool import similarity
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.demos.pool.similarity import WordIndex, sentence_embeddings
from sparsort.curriculum.demos.select import SELECTORS, select_demos, selectors
from sparsort.errors import SparsortError

TEXTS = [
    "How many apples are left when two of seven apples are eaten?",
    "How many pears are left?",
    "Which river flows through Paris?",
    "What is the capital of France?",
    "What is 2 + 3?",
    "A train leaves at noon and arrives at four; how long does it travel?",
    "Name the largest planet.",
    "What is 12 * 12?",
]
POOL = [
    {"id": f"q{at}", "question": text, "answer": f"secret {at}", "label": "abc"[at % 3]}
    for at, text in enumerate(TEXTS)
]
QUERY = {"id": "new", "question": "How many apples are left when one of nine apples is eaten?", "answer": "secret 5"}
EMBEDDINGS = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
INPUTS: dict[str, Any] = {
    "ids": ["q3", "q1", "q0"],
    "label": "label",
    "scores": np.arange(8.0),
    "query_difficulty": 3.0,
    "embeddings": EMBEDDINGS,
    "query_embedding": EMBEDDINGS[2] + 0.1,
}
NEEDS = {
    "ids": ["ids"],
    "balanced": ["label"],
    "knn": ["embeddings", "query_embedding"],
    "mmr": ["embeddings", "query_embedding"],
    "kdpp": ["embeddings", "query_embedding"],
    "vote_k": ["embeddings"],
    "spread": ["scores"],
    "difficulty_matched": ["scores", "query_difficulty", "embeddings", "query_embedding"],
}


def choose(method: str, k: int | None = 3, query: Any = QUERY, pool: Any = POOL, **options: Any) -> list[int]:
    needed = {name: INPUTS[name] for name in NEEDS.get(method, [])}
    return select_demos(pool, query, k, method=method, **{**needed, **options}).indices


@pytest.mark.parametrize("method", SELECTORS)
def test_exactly_k_distinct_rows_the_same_every_time(method: str) -> None:
    chosen = choose(method)
    assert len(set(chosen)) == 3
    assert chosen == choose(method)
    selection = select_demos(POOL, QUERY, 3, method=method, **{n: INPUTS[n] for n in NEEDS.get(method, [])})
    assert [demo["id"] for demo in selection.demos] == [f"q{at}" for at in chosen]
    assert selection.method == method


@pytest.mark.parametrize("method", SELECTORS)
def test_the_table_says_what_a_selector_needs_and_whether_it_draws(method: str) -> None:
    entry = SELECTORS[method]
    assert entry.needs - {"query"} == set(NEEDS.get(method, []))
    assert entry.looks_at_query == (method in ("bm25", "knn", "mmr", "kdpp", "difficulty_matched"))
    assert (len({tuple(choose(method, query=QUERY, seed=seed)) for seed in range(20)}) > 1) == entry.is_seeded


@pytest.mark.parametrize("method", sorted(set(SELECTORS) - {"ids"}))
def test_none_all_and_too_many(method: str) -> None:
    assert choose(method, 0) == []
    if method not in ("balanced", "kdpp"):
        assert sorted(choose(method, 8)) == list(range(8))
    with pytest.raises(SparsortError, match="9 demonstrations were asked for, but only 8 of the pool's 8"):
        choose(method, 9)
    with pytest.raises(SparsortError, match="k is -1"):
        choose(method, -1)


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in NEEDS.items() for name in names])
def test_a_missing_input_is_named(method: str, name: str) -> None:
    with pytest.raises(SparsortError, match=f"{name}="):
        choose(method, **{name: None})


def test_bm25_needs_a_query_and_others_do_not() -> None:
    with pytest.raises(SparsortError, match="needs query="):
        choose("bm25", query=None)
    for method in ("random", "first", "balanced", "vote_k", "spread", "ids"):
        assert len(choose(method, query=None)) == 3


@pytest.mark.parametrize("method", SELECTORS)
def test_the_query_is_never_its_own_demonstration(method: str) -> None:
    query = {**POOL[2], "id": "another", "question": "which river  flows through PARIS"}
    needed = {name: INPUTS[name] for name in NEEDS.get(method, [])}
    if method == "ids":
        with pytest.raises(SparsortError, match="'q2' cannot be chosen because it is the query itself"):
            select_demos(POOL, query, method="ids", ids=["q1", "q2"])
        return
    if method not in ("balanced", "kdpp"):
        selection = select_demos(POOL, query, 7, method=method, **needed)
        assert sorted(selection.indices) == [0, 1, 3, 4, 5, 6, 7]
    selection = select_demos(POOL, query, 3, method=method, **needed)
    assert [(row.id, row.position) for row in selection.excluded] == [("q2", 2)]
    assert "query itself" in selection.excluded[0].reason
    with pytest.raises(
        SparsortError, match=r"only 7 of the pool's 8 can be chosen \(1 excluded because it is the query"
    ):
        select_demos(POOL, query, 8, method=method, **needed)
    assert select_demos(POOL, query, 3, method=method, allow_leaks=True, **needed).excluded == []


def test_random_first_and_ids() -> None:
    assert choose("first") == [0, 1, 2]
    assert choose("ids", None) == [3, 1, 0]
    assert choose("ids", 3, ids=["q0", "q1", "q2"]) == [0, 1, 2]
    assert len({tuple(choose("random", seed=seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["q33"], "no row with the id 'q33'. Did you mean 'q3'"),
        (["q1", "q1"], "listed 2 times"),
    ],
)
def test_bad_ids(ids: list[str], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        choose("ids", None, ids=ids)
    with pytest.raises(SparsortError, match="2 rows of the pool have the id 'q1'"):
        choose("ids", None, ids=["q1"], pool=[*POOL, {**POOL[1], "question": "other"}])
    with pytest.raises(SparsortError, match="k is 2, but ids= lists 1"):
        choose("ids", 2, ids=["q1"])


def test_balanced() -> None:
    for k, counts in [(3, [1, 1, 1]), (6, [2, 2, 2]), (2, [1, 1]), (7, [2, 2, 3])]:
        labels = [POOL[at]["label"] for at in choose("balanced", k)]
        assert sorted(Counter(labels).values()) == counts
    nine = [*POOL, {**POOL[0], "id": "extra", "question": "Another one entirely"}]
    with pytest.raises(SparsortError, match=r"9 demonstrations over 3 labels need 3 of each.*: 'c' \(2\)"):
        choose("balanced", 9, pool=nine)
    with pytest.raises(SparsortError, match="no value in the label field 'lable'"):
        choose("balanced", 3, label="lable")
    assert len({tuple(choose("balanced", seed=seed)) for seed in range(20)}) > 5


def test_knn_is_by_cosine_and_gives_the_similarities() -> None:
    query = EMBEDDINGS[2] + 0.1
    cosine = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in EMBEDDINGS]
    expected = sorted(range(8), key=lambda at: -cosine[at])[:3]
    selection = select_demos(POOL, QUERY, 3, method="knn", embeddings=EMBEDDINGS * 7, query_embedding=query)
    assert selection.indices == expected
    assert selection.similarity == pytest.approx([cosine[at] for at in expected], rel=1e-5)


def okapi(texts: list[list[str]], query: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for words in texts:
        total = 0.0
        for word in query:
            n = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            tf = words.count(word)
            total += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
        scores.append(total)
    return scores


def test_bm25_against_the_formula() -> None:
    def split(text: str) -> list[str]:
        for mark in "?.;":
            text = text.replace(mark, " ")
        return text.lower().split()

    expected = okapi([split(text) for text in TEXTS], split(QUERY["question"]))
    assert WordIndex(TEXTS).scores(QUERY["question"]) == pytest.approx(expected)
    ranked = sorted(range(8), key=lambda at: -expected[at])
    selection = select_demos(POOL, QUERY, 8, method="bm25")
    assert selection.indices == ranked
    assert selection.similarity == pytest.approx([expected[at] for at in ranked])


def test_bm25_ties_and_no_shared_word_go_by_position() -> None:
    assert choose("bm25", 3, query="zebra") == [0, 1, 2]
    assert WordIndex(["", "?!"]).scores("anything").tolist() == [0.0, 0.0]


def test_the_answer_takes_no_part() -> None:
    query = {"question": "Name a river.", "answer": "What is 12 * 12? secret 7"}
    assert choose("bm25", 1, query=query) == choose("bm25", 1, query={"question": "Name a river."})
    leaky = {"question": "Say something new.", "answer": POOL[0]["answer"]}
    assert select_demos(POOL, leaky, 8).excluded == []


def test_prompt_fields_and_text_decide_what_is_compared() -> None:
    assert choose("bm25", 1, query="apples pears eaten", prompt="{question}") == [0]
    query = {"answer": "secret 6"}
    assert select_demos(POOL, query, 1, method="bm25", prompt="{answer}", allow_leaks=True).indices == [6]
    assert select_demos(POOL, query, 1, method="bm25", text=lambda row: row["answer"], allow_leaks=True).indices == [6]
    with pytest.raises(SparsortError, match="the query has no value in the field 'question'"):
        select_demos(POOL, query, 1, prompt="{question}")
    with pytest.raises(SparsortError, match="share no text field"):
        select_demos(POOL, {"answer": "x", "number": 3}, 1)
    with pytest.raises(SparsortError, match="bare text"):
        select_demos(POOL, "x", 1, prompt="{question} {answer}")
    with pytest.raises(SparsortError, match="Pass one of them"):
        select_demos(POOL, QUERY, 1, prompt="{question}", text=str)


def test_rows_without_score_or_embedding_are_not_selected() -> None:
    scores = np.arange(8.0)
    scores[3] = np.nan
    embeddings = EMBEDDINGS.copy()
    embeddings[5] = 0.0
    embeddings[6, 1] = np.inf
    options = {"scores": scores, "embeddings": embeddings}
    assert sorted(choose("spread", 7, scores=scores)) == [0, 1, 2, 4, 5, 6, 7]
    selection = select_demos(POOL, QUERY, 5, method="difficulty_matched", **{**INPUTS, "ids": None, **options})
    assert sorted(selection.indices) == [0, 1, 2, 4, 7]
    assert [(row.position, row.reason.split()[1]) for row in selection.excluded] == [
        (3, "has"),
        (5, "embedding"),
        (6, "embedding"),
    ]
    with pytest.raises(SparsortError, match="only 5 of the pool's 8"):
        choose("difficulty_matched", 6, **options)
    with pytest.raises(SparsortError, match="query_difficulty is nan"):
        choose("difficulty_matched", query_difficulty=math.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": EMBEDDINGS[:3]}, r"shape \(3, 5\).*\(8, D\)"),
        ({"embeddings": [["a"]] * 8}, "floats of shape"),
        ({"embeddings": [[1.0], [1.0, 2.0]]}, "array of numbers"),
        ({"query_embedding": np.ones(4)}, "width 4, but embeddings have width 5"),
        ({"query_embedding": np.zeros(5)}, "zero or not finite"),
    ],
)
def test_bad_embeddings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        choose("knn", **options)


def test_unknown_method_and_trade_off() -> None:
    with pytest.raises(SparsortError, match="Did you mean 'difficulty_matched'"):
        select_demos(POOL, QUERY, 3, method="difficulty_match")
    with pytest.raises(SparsortError, match="trade_off is 2"):
        choose("mmr", trade_off=2)


def test_a_pool_is_made_once_for_many_queries() -> None:
    pool = DemoPool(POOL, prompt="{question}")
    for query in (QUERY, {"question": "What is the capital of Spain?"}, POOL[4]):
        for method in ("bm25", "random"):
            assert choose(method, pool=pool, query=query) == choose(method, query=query, prompt="{question}")
    with pytest.raises(SparsortError, match="own way to compare"):
        choose("random", pool=pool, prompt="{question}")


CRAWLED = [
    {
        "url": f"https://example.org/{at}",
        "kind": "math" if at % 2 else "geography",
        "task": "Answer the question in one word.",
        **row,
    }
    for at, row in enumerate(POOL)
]


@pytest.mark.parametrize("at", range(8))
def test_without_a_prompt_one_leaking_field_is_enough(at: int) -> None:
    question = TEXTS[at].upper()
    mapping = {"url": "https://elsewhere.net/a/b", "kind": "math", "task": CRAWLED[0]["task"], "question": question}
    for query in (question, mapping):
        excluded = select_demos(CRAWLED, query, 7).excluded
        assert [row.position for row in excluded] == [at]
        assert "its 'question' is the query's" in excluded[0].reason
    long = "A train with many a passenger leaves the old station at noon and arrives at four; how long does it travel?"
    crawled = [*CRAWLED, {**CRAWLED[0], "id": "long", "question": long}]
    for query in (long.removeprefix("A "), {**mapping, "question": long.removeprefix("A ")}):
        reasons = {row.position: row.reason for row in select_demos(crawled, query, 8).excluded}
        assert list(reasons) == [8]
        assert "its 'question' nearly is the query's (similarity 0." in reasons[8]


def test_what_many_rows_share_is_no_leak() -> None:
    new = {
        "url": "https://elsewhere.net/a/b",
        "kind": "math",
        "task": CRAWLED[0]["task"],
        "question": "A new one here?",
    }
    for query in (new, new["question"], new["task"]):
        assert select_demos(CRAWLED, query, 8).excluded == []
    copies = [{"id": "a", "question": "Who is it?", "url": "x/1"}, {"id": "b", "question": "Who is it?", "url": "x/1"}]
    assert len(select_demos(copies, {"question": "who is it", "url": "x/1"}, 0).excluded) == 2
    passages = [{"passage": "One long passage for all to read.", "question": text} for text in TEXTS]
    passages.append({"passage": "Quite another passage appears here.", "question": "Where?"})
    query = {"passage": passages[0]["passage"], "question": "What does it say?"}
    assert select_demos(passages, query, 9, prompt="{passage} {question}").excluded == []
    assert [row.position for row in select_demos(passages, query, 1).excluded] == list(range(8))


def test_rows_of_different_fields_are_compared_by_those_they_have() -> None:
    rows = [{"text": TEXTS[0]}, {"question": TEXTS[1], "number": 3}, {"question": TEXTS[2], "text": "More."}]
    assert [row.position for row in select_demos(rows, TEXTS[1], 2).excluded] == [1]
    assert [row.position for row in select_demos(rows, TEXTS[2], 2).excluded] == [2]


def test_embeddings_and_scores_are_read_once_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            calls[name] += len(args) > 1  # a query's embedding comes alone
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    class Table:
        kind = "length"

        def difficulty_of(self, rows: Any) -> Any:
            calls["difficulty_of"] += 1
            return np.arange(float(len(rows)))

    counted(similarity, "unit_rows")
    counted(selectors, "neighbour_graph")
    pool, scores, other = DemoPool(POOL, prompt="{question}"), Table(), EMBEDDINGS[::-1].copy()
    for query in (QUERY, {"question": "What is the capital of Spain?"}, POOL[4]):
        for method in ("vote_k", "knn", "spread"):
            expected = choose(method, query=query, prompt="{question}", scores=np.arange(8.0), embeddings=EMBEDDINGS)
            assert choose(method, pool=pool, query=query, scores=scores, embeddings=EMBEDDINGS) == expected
    calls.clear()
    choose("vote_k", pool=pool, embeddings=EMBEDDINGS)
    choose("spread", pool=pool, scores=scores)
    assert calls["unit_rows"] == calls["neighbour_graph"] == calls["difficulty_of"] == 0
    assert choose("vote_k", pool=pool, embeddings=other) == choose("vote_k", embeddings=other)
    assert choose("vote_k", pool=pool, embeddings=other, neighbours=2) == choose(
        "vote_k", embeddings=other, neighbours=2
    )


class FakeSentenceTransformer:
    """A substitute for the real class, whose import takes seconds and draws from the global generator."""

    def __init__(self, name: str) -> None:
        if name != "here":
            raise OSError("no such model")

    def encode(self, texts: list[str], **options: Any) -> Any:
        assert options["normalize_embeddings"]
        return np.array([[len(text), 1] for text in texts])


def test_sentence_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeSentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    vectors = sentence_embeddings(("a", "bc"), "here")
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 1], [2, 1]]
    with pytest.raises(SparsortError, match="'gone' cannot be loaded: no such model"):
        sentence_embeddings(["a"], "gone")
