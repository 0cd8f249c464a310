"""Leaks: equal and nearly equal texts, and that MinHash finds the same as a full comparison."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.demos.pool.fingerprints import fingerprints, tokens
from sparsort.curriculum.demos.pool.leaks import find_leaks, signatures
from sparsort.curriculum.demos.pool.pool import leaking_rows
from sparsort.errors import SparsortError

WORDS = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "rho", "tau", "mu", "nu"]), max_size=40).map(
    " ".join
)


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    width = min(3, len(words))
    return {tuple(words[at : at + width]) for at in range(len(words) - width + 1)} if words else set()


def jaccard(left: str, right: str) -> float:
    a, b = shingle_set(left), shingle_set(right)
    return len(a & b) / len(a | b) if a | b else 0.0


@pytest.mark.parametrize(
    ("query", "demo", "kind"),
    [
        ("What is 2+3?", "what is  2 + 3 ?", "exact"),
        ("What is 2+3?", "What is 2+4?", None),
        ("What is 2+3?", "What is 2-3?", None),
        ("What is 12 + 7 - 3 + 4 * 2 + 5?", "What is 12 + 7 - 3 + 4 * 2 + 6?", None),
        ("Compute 2*(3+4).", "Compute 2*3+4.", None),
        ("Compute 10².", "Compute 102.", None),
        ("What is 3!?", "What is 3?", None),
        ("The “well-known” ﬁgure, Straße", "the well known figure STRASSE!", "exact"),
        ("$x+1$", "x + 1", "exact"),
        ("今天天气很好吗？", "今天天气很好吗", "exact"),
        ("", "", None),
        ("??", "??", "exact"),
        ("\ud800 broken", "\ud800 Broken", "exact"),
        ("a", "b", None),
        ("the cat sat on the mat and looked at me", "the cat sat on the mat and looked at me again", "near"),
    ],
)
def test_pairs(query: str, demo: str, kind: str | None) -> None:
    for search in ("direct", "minhash"):
        found = find_leaks([query], [demo], search=search)  # type: ignore[arg-type]
        assert [leak.kind for leak in found] == ([kind] if kind else [])


def test_a_changed_number_in_a_long_text_is_near() -> None:
    long = " ".join(f"word{'abcdefghij'[at % 10]}{'klmnopqrst'[at // 10]}" for at in range(40))
    (leak,) = find_leaks([long + " 7 " + long], [long + " 8 " + long])
    assert leak.kind == "near"
    assert leak.similarity >= 0.8


@given(WORDS, WORDS)
def test_jaccard_against_sets(left: str, right: str) -> None:
    prints = fingerprints([right, left, right])
    ours = prints.jaccard_with(fingerprints([left]).shingles_of(0))
    assert ours == pytest.approx([jaccard(left, right), 1.0 if left else 0.0, jaccard(left, right)])


@settings(max_examples=30)
@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6), st.sampled_from([0.5, 0.8, 1.0]))
def test_no_false_positive_and_no_exact_duplicate_missed(queries: list[str], pool: list[str], threshold: float) -> None:
    expected = {
        (at, to)
        for at, query in enumerate(queries)
        for to, demo in enumerate(pool)
        if query and (query == demo or jaccard(query, demo) >= threshold)
    }
    direct = find_leaks(queries, pool, threshold=threshold, search="direct")
    assert {(leak.query, leak.demo) for leak in direct} == expected
    by_minhash = find_leaks(queries, pool, threshold=threshold, search="minhash")
    assert set(by_minhash) <= set(direct)
    assert {leak for leak in direct if leak.kind == "exact"} <= set(by_minhash)


def test_minhash_estimates_jaccard_without_bias() -> None:
    generator = random.Random(0)
    vocabulary = [f"w{at}" for at in range(400)]
    errors = []
    for _ in range(60):
        words = [generator.choice(vocabulary) for _ in range(80)]
        other = [generator.choice(vocabulary) if generator.random() < 0.08 else word for word in words]
        left, right = " ".join(words), " ".join(other)
        pair = signatures(fingerprints([left, right]), 512, seed=generator.randrange(1000))
        errors.append(float((pair[0] == pair[1]).mean()) - jaccard(left, right))
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(len(errors)) + 1e-3
    assert np.std(errors) < 1.5 * 0.5 / np.sqrt(512)


def test_minhash_agrees_with_the_direct_comparison_on_a_pool() -> None:
    generator = random.Random(1)
    vocabulary = [f"w{at}" for at in range(3000)]
    pool = [" ".join(generator.choices(vocabulary, k=50)) for _ in range(1500)]
    queries = []
    for at in range(60):
        words = pool[at * 20].split()
        for _ in range(at % 3):
            words[generator.randrange(50)] = "changed"
        queries.append(" ".join(words))
    direct = find_leaks(queries, pool, search="direct")
    assert direct == find_leaks(queries, pool, search="minhash")
    assert len(direct) >= 40


def test_hashes_do_not_depend_on_the_process() -> None:
    assert fingerprints(["What is 2 + 3?"]).exact.tolist() == [HASH_OF_WHAT_IS_2_PLUS_3]


HASH_OF_WHAT_IS_2_PLUS_3 = 16393279722105137604


def test_tokens_of_scripts_without_spaces() -> None:
    assert tokens("東京 is 10²") == ["東", "京", "is", "10", "^", "2"]


def test_every_input_field_must_leak() -> None:
    passage = " ".join(f"sentence{'abcdefghijklmnopqrstuvwxyz'[at % 26]}" for at in range(60))
    demos = [
        {"passage": passage, "question": "Who was king?"},
        {"passage": passage.upper(), "question": "who was queen?"},
        {"passage": "another", "question": "Who was queen?"},
    ]
    found = leaking_rows(demos, {"passage": passage, "question": "Who was queen?"}, ["passage", "question"])
    assert [(leak.demo, leak.kind) for leak in found] == [(1, "exact")]


def test_blank_fields_neither_leak_nor_save() -> None:
    demos = [
        {"context": "", "question": "Who?"},
        {"context": "", "question": "Where?"},
        {"context": "x", "question": "Who?"},
    ]
    found = leaking_rows(demos, {"context": "", "question": "who"}, ["context", "question"])
    assert [leak.demo for leak in found] == [0]


def test_bad_arguments() -> None:
    with pytest.raises(SparsortError, match="Did you mean 'minhash'"):
        find_leaks([], [], search="min_hash")  # type: ignore[arg-type]
    with pytest.raises(SparsortError, match="threshold"):
        find_leaks([], [], threshold=0.0)
    assert find_leaks([], ["a"]) == find_leaks(["a"], []) == []
