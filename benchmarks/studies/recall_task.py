"""Associative recall at graded distances, inside text: what a model with a local window cannot do, as a corpus from nothing.

A row is a number of episodes. An episode states facts, words made of a name and a city, among the words of a text; after a gap
of more text it asks for half of them: the name, and the fact is to be predicted (after multi-query associative recall: Arora
et al., arXiv 2312.04927). The other half distracts. The text is made of `graded_text`'s sentences and copies, so that there is
a language to be learnt beside the recall, and it tells nothing about the facts.

    the owl Ada-Oslo that the dogs Ben-Rome like sees . copy fig oak : fig oak . the hen … where Ben Ben-Rome the cow …

A fact is one word, and so recalling it takes one layer: look from the name for a word that has it in it. A model that sees no
facts is right once in eight times, as often as there are cities. With a name and a city as two words recall would take two
layers that fit together, an induction head, and a model of a hundred thousand weights far more tokens than minutes have.

A level, 1 to 5, has more facts, spread wider, with a longer gap. Episodes of the first are short, and a row holds many.

Contract:
- The same arguments give the same rows, on any machine; no global random state is touched.
- Every row has exactly `length` words; a word is what stands between single spaces, so that word-level tokens need no more than
  `str.split`.
- A name stands in one fact of a row, and is asked for once or not at all; cities are drawn independently: nothing but the fact
  itself tells the answer.
- No text is in both splits (`graded_text.split_of`), and none occurs twice.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from studies.graded_text import Split, copying, sentences, split_of

from sparsort.errors import SparsortError, unknown_choice

NAMES = (
    *("Ada", "Amy", "Bea", "Ben", "Bob", "Cal", "Dan", "Eli", "Eva", "Fay", "Finn", "Gus", "Hal", "Hugo", "Ida", "Ira"),
    *(
        "Ivan",
        "Jan",
        "Joe",
        "Kai",
        "Kim",
        "Lea",
        "Leo",
        "Mae",
        "Max",
        "Mia",
        "Noah",
        "Olga",
        "Otto",
        "Paul",
        "Ruth",
        "Sam",
    ),
)
CITIES = ("Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome", "Seoul")
ASK = "where"
_NAMES = frozenset(NAMES)
_ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Sizes of an episode: facts, of which half are asked for, and the least words of text among them and behind the last."""

    facts: int
    among: int
    gap: int

    @property
    def words(self) -> int:
        """The least that it takes: a word a fact, two a question, and the one that the questions begin with."""
        return 2 * self.facts + self.among + self.gap + 1


EPISODES: dict[int, Episode] = {
    1: Episode(facts=2, among=0, gap=0),
    2: Episode(facts=4, among=8, gap=8),
    3: Episode(facts=6, among=24, gap=32),
    4: Episode(facts=8, among=40, gap=112),
    5: Episode(facts=16, among=80, gap=112),
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
        Rows with `id` (unique within a seed and split), `text`, `level`, and positions among its words: `answers` of the facts
        asked for, and `facts`, for each of them where it was stated.

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
    """Which words of a row were drawn at random, so that nothing before tells them: facts as stated, and names asked for."""
    told = set(answers)
    return [place not in told and word.partition("-")[0] in _NAMES for place, word in enumerate(words)]


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
        stated: dict[str, int] = {}
        told = 0
        for name, at in zip(names[number * episode.facts :], _places(rng, episode.facts, among), strict=False):
            words += text[told:at]
            told = at
            stated[name] = len(words)
            words.append(f"{name}-{rng.choice(CITIES)}")
        words += [*text[told:], ASK]
        for name in rng.sample(sorted(stated), len(stated) // 2):
            answers.append(len(words) + 1)
            facts.append(stated[name])
            words += [name, words[stated[name]]]
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
