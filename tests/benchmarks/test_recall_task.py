"""`recall_rows`: a reader that uses only the words finds every answer, its fact, and the gaps."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from studies.graded_text import split_of
    from studies.recall_task import ASK, CITIES, EPISODES, NAMES, drawn, recall_rows
finally:
    sys.path.remove(str(BENCHMARKS))

ROWS = recall_rows(500, 0)


def _read(words: list[str]) -> list[tuple[int, int]]:
    """(answer, fact): a single name is a question, followed by its answer, which an earlier fact stated."""
    stated: dict[str, int] = {}
    found = []
    for place, word in enumerate(words):
        if word in NAMES:
            found.append((place + 1, stated.pop(word)))
        elif "-" in word and words[place - 1] not in NAMES:
            name, city = word.split("-")
            assert name in NAMES
            assert city in CITIES
            assert name not in stated
            stated[name] = place
    return found


def _stated(words: list[str]) -> list[int]:
    return [place for place, word in enumerate(words) if "-" in word and words[place - 1] not in NAMES]


@pytest.mark.parametrize("level", EPISODES)
def test_reading_the_words_gives_the_answers_and_their_facts(level: int) -> None:
    for row in (row for row in ROWS if row["level"] == level):
        words = row["text"].split(" ")
        read = _read(words)
        assert read == list(zip(row["answers"], row["facts"], strict=True))
        assert [words[answer] for answer, _ in read] == [words[fact] for _, fact in read]
        # Half of the facts are not asked for.
        assert len(_stated(words)) == 2 * len(read)


@pytest.mark.parametrize("length", [256, 300, 512])
def test_rows_have_the_length_and_the_facts_and_gaps_of_their_level(length: int) -> None:
    for row in recall_rows(50, 3, length=length):
        words, episode = row["text"].split(" "), EPISODES[row["level"]]
        assert len(words) == length
        asked = episode.facts // 2
        assert len(row["answers"]) % asked == 0
        # The text between the last fact and the word that asks, and nothing else.
        facts_left = _stated(words)
        for first in range(0, len(row["answers"]), asked):
            own, facts_left = facts_left[: episode.facts], facts_left[episode.facts :]
            assert set(row["facts"][first : first + asked]) <= set(own)
            between = words[own[-1] + 1 : row["answers"][first] - 1]
            assert len(between) > episode.gap
            assert between[-1] == ASK
            assert not any(word.split("-")[0] in NAMES for word in between)
        assert facts_left == []


def test_cities_are_alike_likely_and_names_are_stated_once() -> None:
    answers: Counter[str] = Counter()
    for row in ROWS:
        words = row["text"].split(" ")
        assert set(Counter(words[place].split("-")[0] for place in _stated(words)).values()) == {1}
        answers.update(words[place].split("-")[1] for place in row["answers"])
    expected = sum(answers.values()) / len(CITIES)
    assert set(answers) == set(CITIES)
    # Five standard deviations.
    assert max(abs(count - expected) for count in answers.values()) < 5 * expected**0.5


@pytest.mark.parametrize("level", [4, 5])
def test_nearby_words_do_not_reveal_the_answer(level: int) -> None:
    """Guessing by order, by what was answered last, or by the commonest city is little better than chance."""
    hits: Counter[str] = Counter()
    total = 0
    for row in recall_rows(400, 5, levels=[level]):
        words = row["text"].split(" ")
        stated = [words[place].split("-")[1] for place in _stated(words)]
        common = Counter(stated).most_common(1)[0][0]
        for number, answer in enumerate(row["answers"]):
            total += 1
            city = words[answer].split("-")[1]
            hits["order"] += city == stated[number]
            hits["last fact"] += city == stated[-1]
            hits["common"] += city == common
            hits["before"] += number > 0 and city == words[answer - 2].split("-")[1]
    chance = 1 / len(CITIES)
    assert max(hits["order"], hits["last fact"]) / total < chance + 1 / EPISODES[level].facts + 0.04
    assert hits["before"] / total < chance + 0.04
    # Of k draws the commonest has more than its share: a model that sees the facts and does not match names gets this.
    assert hits["common"] / total < 0.45


def test_drawn_words_are_facts_and_the_names_that_are_asked_for() -> None:
    row = next(row for row in ROWS if row["level"] == 2)
    words = row["text"].split(" ")
    expected = _stated(words) + [place - 1 for place in row["answers"]]
    assert [place for place, random_one in enumerate(drawn(words, row["answers"])) if random_one] == sorted(expected)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(), split=st.sampled_from(["train", "held_out"]))
def test_rows_are_reproducible_and_belong_to_their_split(n: int, seed: int, split: Any) -> None:
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
    others = {word for word in text - set(NAMES) - set(CITIES) if "-" not in word}
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
def test_impossible_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        recall_rows(**{"seed": 0, **arguments})
