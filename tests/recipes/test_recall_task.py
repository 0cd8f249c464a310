"""`recall_rows`: a reader who goes through the words by themselves finds every answer, one fact for each, and the distances."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.recipes.graded_text import split_of
from sparsort.recipes.recall_task import ASK, CITIES, EPISODES, NAMES, drawn, recall_rows

ROWS = recall_rows(500, 0)


def _read(words: list[str]) -> list[tuple[int, int]]:
    """(answer, fact): where a name stands again it is asked for."""
    stated: dict[str, int] = {}
    found = []
    for place, word in enumerate(words):
        if word in NAMES:
            if word in stated:
                found.append((place + 1, stated.pop(word)))
            else:
                stated[word] = place + 1
    assert stated == {}
    return found


@pytest.mark.parametrize("level", EPISODES)
def test_reading_the_words_gives_the_answers_and_their_facts(level: int) -> None:
    for row in (row for row in ROWS if row["level"] == level):
        words = row["text"].split(" ")
        read = _read(words)
        assert read == list(zip(row["answers"], row["facts"], strict=True))
        assert [words[answer] for answer, _ in read] == [words[fact] for _, fact in read]


@pytest.mark.parametrize("length", [256, 300, 512])
def test_rows_have_the_length_and_the_facts_and_gaps_of_their_level(length: int) -> None:
    for row in recall_rows(50, 3, length=length):
        words, episode = row["text"].split(" "), EPISODES[row["level"]]
        assert len(words) == length
        assert len(row["answers"]) % episode.facts == 0
        for first in range(0, len(row["answers"]), episode.facts):
            asked, last_fact = row["answers"][first], max(row["facts"][first : first + episode.facts])
            between = words[last_fact + 1 : asked - 1]
            assert len(between) > episode.gap
            assert between[-1] == ASK
            assert not set(between) & {*NAMES, *CITIES}


def test_a_name_stands_twice_and_a_city_tells_nothing_by_how_often_it_stands() -> None:
    answers: Counter[str] = Counter()
    for row in ROWS:
        words = row["text"].split(" ")
        names = Counter(word for word in words if word in NAMES)
        assert set(names.values()) == {2}
        answers.update(words[place] for place in row["answers"])
    total = sum(answers.values())
    # Cities are alike likely: 5 standard deviations.
    expected = total / len(CITIES)
    assert set(answers) == set(CITIES)
    assert max(abs(count - expected) for count in answers.values()) < 5 * expected**0.5


@pytest.mark.parametrize("level", EPISODES)
def test_what_lies_between_does_not_tell_the_answer(level: int) -> None:
    """The word after the fact, and the last city before the question, are right as often as chance."""
    near = right = 0
    for row in recall_rows(400, 5, levels=[level]):
        words = row["text"].split(" ")
        for answer in row["answers"]:
            before = next(word for word in reversed(words[: answer - 1]) if word in CITIES)
            near += before == words[answer]
            right += 1
    chance = 1 / len(CITIES)
    share = near / right
    if level == 1:
        # Of two facts the last is asked for first in half of the rows, that is a quarter of the questions.
        assert 0.2 < share < 0.35
    else:
        assert share < 1 / EPISODES[level].facts + chance + 0.05


def test_drawn_words_are_names_and_stated_cities() -> None:
    row = next(row for row in ROWS if row["level"] == 2)
    words = row["text"].split(" ")
    expected = [place for place, word in enumerate(words) if word in NAMES]
    expected += row["facts"]
    assert [place for place, random_one in enumerate(drawn(words, row["answers"])) if random_one] == sorted(expected)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(), split=st.sampled_from(["train", "held_out"]))
def test_rows_are_the_same_again_and_of_their_split(n: int, seed: int, split: Any) -> None:
    state = random.getstate()
    rows = recall_rows(n, seed, split=split)
    assert random.getstate() == state
    assert rows == recall_rows(n, seed, split=split)
    assert {split_of(row["text"]) for row in rows} == {split}
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == n
    counts = Counter(row["level"] for row in rows)
    assert max(counts.values()) - min(counts[level] for level in EPISODES) <= 1


def test_no_word_means_two_things() -> None:
    text = {word for row in ROWS for word in row["text"].split(" ")}
    assert len(set(NAMES)) == len(NAMES)
    assert len(set(CITIES)) == len(CITIES)
    assert not set(NAMES) & set(CITIES)
    others = text - set(NAMES) - set(CITIES)
    assert ASK in others
    assert all(word == word.lower() for word in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 2, "split": "heldout"}, "held_out"),
        ({"n": 2, "levels": [7]}, "level"),
        ({"n": 2, "length": 100}, "level 4 takes"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        recall_rows(**{"seed": 0, **arguments})
