"""Associative recall at graded distances, inside text: what a model with a local window cannot do, as a corpus from nothing.

A row is a number of episodes. An episode states facts, a name and the city that goes with it, among the words of a text; after
a gap of more text it asks for each: the name again, and the city is to be predicted (multi-query associative recall: Arora et
al., arXiv 2312.04927). The text is made of `graded_text`'s sentences and copies, so that there is a language to be learnt
beside the recall, and it tells nothing about the facts.

    the owl Ada Oslo that the dogs like sees . copy fig oak : fig oak . Ben Rome the hen … where Ben Rome Ada Oslo

A level, 1 to 5, has more facts, spread wider, with a longer gap. Episodes of the first are short, and a row holds many.

Contract:
- The same arguments give the same rows, on any machine; no global random state is touched.
- Every row has exactly `length` words; a word is what stands between single spaces, so that word-level tokens need no more than
  `str.split`.
- A name stands in one episode of a row only, stated once and asked for once: nothing but the fact itself tells the answer, and
  the answer of a row is independent of every other row.
- No text is in both splits (`graded_text.split_of`), and none occurs twice.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sparsort.errors import SparsortError, unknown_choice
from sparsort.recipes.graded_text import Split, copying, sentences, split_of

NAMES = (
    *(
        "Ada",
        "Ali",
        "Amy",
        "Ana",
        "Bea",
        "Ben",
        "Bob",
        "Cal",
        "Cleo",
        "Dan",
        "Dora",
        "Eli",
        "Ella",
        "Emil",
        "Eva",
        "Fay",
    ),
    *(
        "Finn",
        "Gus",
        "Guy",
        "Hal",
        "Hana",
        "Hugo",
        "Ian",
        "Ida",
        "Ines",
        "Ira",
        "Iris",
        "Ivan",
        "Jan",
        "Jane",
        "Jill",
        "Joe",
    ),
    *(
        "Juan",
        "Kai",
        "Kate",
        "Ken",
        "Kim",
        "Lars",
        "Lea",
        "Leo",
        "Lily",
        "Lina",
        "Luis",
        "Mae",
        "Mark",
        "Max",
        "Mia",
        "Milo",
    ),
    *(
        "Mona",
        "Nell",
        "Nico",
        "Nina",
        "Noah",
        "Nora",
        "Olga",
        "Omar",
        "Oscar",
        "Otto",
        "Pam",
        "Paul",
        "Rosa",
        "Ruth",
        "Sam",
        "Zoe",
    ),
)
CITIES = (
    *("Accra", "Athens", "Basel", "Bergen", "Bern", "Bonn", "Cairo", "Dakar", "Delhi", "Doha", "Dublin", "Geneva"),
    *("Hanoi", "Kyiv", "Lagos", "Lima", "Lisbon", "London", "Lyon", "Madrid", "Malmo", "Milan", "Minsk", "Osaka"),
    *("Oslo", "Paris", "Porto", "Prague", "Quito", "Riga", "Rome", "Seoul"),
)
ASK = "where"
_ATTEMPTS = 100
_NAMES, _CITIES = frozenset(NAMES), frozenset(CITIES)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Sizes of an episode: facts, and the least words of text among them and between the last of them and the question."""

    facts: int
    among: int
    gap: int

    @property
    def words(self) -> int:
        """The least that it takes: two words a fact, stated and asked for, and the question's first."""
        return 4 * self.facts + self.among + self.gap + 1


EPISODES: dict[int, Episode] = {
    1: Episode(facts=2, among=0, gap=0),
    2: Episode(facts=4, among=8, gap=8),
    3: Episode(facts=6, among=24, gap=32),
    4: Episode(facts=8, among=40, gap=112),
    5: Episode(facts=12, among=40, gap=128),
}


def recall_rows(
    n: int, seed: int, *, length: int = 256, levels: Iterable[int] = EPISODES, split: Split = "train"
) -> list[dict[str, Any]]:
    """`n` rows in random order, levels as even as n allows.

    Args:
        n: rows.
        seed: any integer; another seed is another sample of the same split.
        length: words of every row.
        levels: of the rows, out of 1 to 5.
        split: "train" or "held_out".

    Returns:
        Rows with `id` (unique within a seed and split), `text`, `level`, and positions among its words: `answers` of the cities
        asked for, and `facts`, for each of them where the same city was stated.

    Raises:
        SparsortError: n below 1, an unknown split or level, or a length that an episode of a level does not fit into.
    """
    if n < 1:
        raise SparsortError(f"n is {n}; expected at least one row.")
    if split not in get_args(Split):
        raise unknown_choice("split", split, get_args(Split))
    levels = tuple(levels)
    for level in levels:
        if level not in EPISODES:
            raise unknown_choice("level", str(level), map(str, EPISODES))
        if EPISODES[level].words > length:
            raise SparsortError(
                f"length is {length}, and an episode of level {level} takes {EPISODES[level].words} words. Make rows longer, or "
                "leave the level out."
            )
    rng = random.Random(f"recall {split} {seed} {length}")
    seen: set[str] = set()
    rows = []
    for number, level in zip(range(n), itertools.cycle(levels), strict=False):
        row = _new_row(rng, level, length, split, seen)
        seen.add(row["text"])
        rows.append({"id": f"recall-{level}-{number:06d}", **row})
    rng.shuffle(rows)
    return rows


def drawn(words: Sequence[str], answers: Iterable[int]) -> list[bool]:
    """Which words of a row were drawn at random, with nothing before them that tells them: names, and cities but for answers."""
    told = set(answers)
    return [(word in _NAMES or word in _CITIES) and place not in told for place, word in enumerate(words)]


def _new_row(rng: random.Random, level: int, length: int, split: Split, seen: set[str]) -> dict[str, Any]:
    for _ in range(_ATTEMPTS):
        row = _row(rng, level, length)
        if row["text"] not in seen and split_of(row["text"]) == split:
            return row
    raise SparsortError(
        f"found no further row of level {level} in {_ATTEMPTS} attempts, after {len(seen)} rows. Ask for fewer."
    )


def _row(rng: random.Random, level: int, length: int) -> dict[str, Any]:
    episode = EPISODES[level]
    many = min(length // episode.words, len(NAMES) // episode.facts)
    names = rng.sample(NAMES, many * episode.facts)
    spare = length - many * episode.words
    words: list[str] = []
    answers: list[int] = []
    facts: list[int] = []
    for number in range(many):
        # What the episodes leave of the length is text among their facts.
        among = episode.among + spare // many + (number < spare % many)
        text = _text(rng, level, among + episode.gap)
        stated: dict[str, tuple[str, int]] = {}
        told = 0
        for name, at in zip(names[number * episode.facts :], _places(rng, episode.facts, among), strict=False):
            words += text[told:at]
            told = at
            city = rng.choice(CITIES)
            words += [name, city]
            stated[name] = city, len(words) - 1
        words += [*text[told:], ASK]
        for name in rng.sample(sorted(stated), len(stated)):
            city, at = stated[name]
            words += [name, city]
            answers.append(len(words) - 1)
            facts.append(at)
    return {"text": " ".join(words), "level": level, "answers": answers, "facts": facts}


def _places(rng: random.Random, facts: int, words: int) -> list[int]:
    """Before which of so many words each fact stands; several may stand before the same."""
    return sorted(rng.choices(range(words + 1), k=facts))


def _text(rng: random.Random, level: int, count: int) -> list[str]:
    """So many words of sentences and copies of a level; the last may end early."""
    words: list[str] = []
    while len(words) < count:
        exercise = rng.choice((sentences, copying))(rng, level)
        words += re.findall(r"\w+|[.:]", exercise)
    return words[:count]
