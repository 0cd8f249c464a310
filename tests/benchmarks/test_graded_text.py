"""`graded_texts`: every exercise is correct by a second computation, levels have their sizes, and length does not reveal them."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sparsort.errors import SparsortError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from studies.graded_text import KINDS, LEVELS, LONGEST, SHORTEST, graded_texts, split_of
finally:
    sys.path.remove(str(BENCHMARKS))

ROWS = graded_texts(2_000, 0)


def _is_copy(exercise: str, level: int) -> bool:
    found = re.fullmatch(r"copy ([a-z ]+): ([a-z ]+)", exercise)
    return found is not None and found[1] == found[2] and len(found[1].split()) == level


def _is_count(exercise: str, level: int) -> bool:
    numbers = [int(number) for number in exercise.removeprefix("count ").split()]
    return len({after - before for before, after in itertools.pairwise(numbers)}) == 1


def _is_sum(exercise: str, level: int) -> bool:
    terms, _, total = exercise.partition("=")
    numbers = [int(term) for term in terms.split("+")]
    digits = sum(len(term) for term in terms.split("+"))
    return sum(numbers) == int(total) and digits == {1: 2, 2: 2, 3: 3, 4: 4, 5: 6}[level]


def _is_balanced(exercise: str, level: int) -> bool:
    """By taking innermost pairs away; as many rounds as the depth."""
    rounds = 0
    while exercise:
        shorter = re.sub(r"\(\)|\[\]|\{\}|<>", "", exercise)
        if shorter == exercise:
            return False
        exercise, rounds = shorter, rounds + 1
    return 1 <= rounds <= level


def _agrees(exercise: str, level: int) -> bool:
    """By reading from the middle outwards: the last noun belongs to the first verb."""
    words = [word for word in exercise.split() if word not in ("the", "that")]
    nouns, verbs = words[: len(words) // 2], words[len(words) // 2 :]
    pairs = list(zip(reversed(nouns), verbs, strict=True))
    return len(pairs) == level and all(noun.endswith("s") != verb.endswith("s") for noun, verb in pairs)


CHECKS: dict[str, Callable[[str, int], bool]] = {
    "copying": _is_copy,
    "counting": _is_count,
    "adding": _is_sum,
    "brackets": _is_balanced,
    "sentences": _agrees,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_exercise_is_right(kind: str) -> None:
    wrong = [
        exercise
        for row in ROWS
        if row["kind"] == kind
        for exercise in row["text"].removesuffix(".").split(". ")
        if not CHECKS[kind](exercise, row["level"])
    ]
    assert wrong == []


@pytest.mark.parametrize("seed", range(5))
def test_length_does_not_reveal_the_level(seed: int) -> None:
    rows = graded_texts(2_000, seed)
    for kind in (None, *KINDS):
        chosen = [row for row in rows if kind in (None, row["kind"])]
        rho = spearmanr([len(row["text"]) for row in chosen], [row["level"] for row in chosen]).statistic
        assert abs(rho) < (0.1 if kind is None else 0.3), kind


def test_lengths_stay_within_half_an_exercise_of_their_bounds() -> None:
    longest = max(len(exercise) for row in ROWS for exercise in row["text"].split(". "))
    lengths = [len(row["text"]) for row in ROWS]
    assert SHORTEST - longest / 2 - 1 <= min(lengths)
    assert max(lengths) <= LONGEST + longest / 2 + 1
    assert max(lengths) > LONGEST - 10


def test_levels_and_kinds_are_even() -> None:
    counts = Counter((row["level"], row["kind"]) for row in ROWS)
    assert set(counts.values()) == {len(ROWS) // (len(LEVELS) * len(KINDS))}


@given(n=st.integers(1, 80), seed=st.integers(-5, 5), other=st.integers(-5, 5))
@settings(max_examples=30, deadline=None)
def test_same_seed_same_rows_and_no_text_in_both_splits(n: int, seed: int, other: int) -> None:
    train = graded_texts(n, seed)
    held_out = graded_texts(n, other, split="held_out")
    assert train == graded_texts(n, seed)
    assert len(train) == len(held_out) == n
    assert len({row["id"] for row in train}) == len({row["text"] for row in train}) == n
    assert {row["text"] for row in train}.isdisjoint(row["text"] for row in held_out)
    assert {split_of(row["text"]) for row in held_out} == {"held_out"}


def test_rows_are_in_no_order_of_level() -> None:
    rho = spearmanr(range(len(ROWS)), [row["level"] for row in ROWS]).statistic
    assert abs(rho) < 0.1


def test_other_seeds_give_other_rows() -> None:
    assert {row["text"] for row in graded_texts(500, 1)} != {row["text"] for row in graded_texts(500, 2)}


def test_the_rows_are_those_that_were_published() -> None:
    # A figure of docs/results/ holds for these rows: a change of the generator has to be made knowingly.
    assert [row["id"] for row in ROWS[:3]] == FIRST_IDS
    assert graded_texts(1, 0)[0]["text"] == FIRST_TEXT


FIRST_IDS = ["adding-2-001732", "brackets-5-001098", "counting-3-001161"]
FIRST_TEXT = (
    "copy oak: oak. copy elm: elm. copy elm: elm. copy elm: elm. copy fig: fig. copy elm: elm. "
    "copy oak: oak. copy fig: fig. copy elm: elm. copy oak: oak."
)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(SparsortError, match="n is 0"):
        graded_texts(0, 0)
    with pytest.raises(SparsortError, match="Did you mean 'held_out'"):
        graded_texts(1, 0, split="heldout")  # type: ignore[arg-type]
