"""Associative recall at graded distances inside generated text: a task that a model with a local window cannot solve.

A row consists of episodes. An episode states facts among the words of a text; each fact is a word made of a name and a city.
After a gap of more text it asks for half of them: it gives the name, and the fact is to be predicted (after multi-query
associative recall: Arora et al., arXiv 2312.04927). The other half are distractors. The text consists of `graded_text`'s
sentences and copies. It is a language to learn in addition to the recall, and has no information about the facts.

    the owl Ada-Oslo that the dogs Ben-Rome like sees . copy fig oak : fig oak . the hen … where Ben Ben-Rome the cow …

A fact is one word, and so one layer can recall it: it attends from the name to the word that contains the name. A model that sees
no facts is right once in eight times, because there are eight cities. If name and city were two words, recall would need two
layers that work together (an induction head), which a model of a hundred thousand weights does not learn within minutes.

Each level, 1 to 5, has more facts, farther apart, and a longer gap. Episodes of the first level are short, and a row has many.

Contract:
- The same arguments give the same rows, on any machine; no global random state is touched.
- Every row has exactly `length` words; words are separated by single spaces, so that `str.split` suffices as a word-level
  tokenizer.
- A name occurs in one fact of a row, and is asked for at most once. Cities are drawn independently, so that only the fact itself
  determines the answer.
- No text is in both splits (`graded_text.split_of`), and no text occurs twice.
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
    """Sizes of an episode: facts, of which half are asked for, and the least number of words among and after the facts."""

    facts: int
    among: int
    gap: int

    @property
    def words(self) -> int:
        """The least length in words: one per fact, two per question, and the word that begins the questions."""
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
        length: number of words of every row.
        levels: levels of the rows, out of 1 to 5.
        split: "train" or "held_out".

    Returns:
        Rows with `id` (unique within a seed and split), `text`, `level`, and positions among its words: `answers`, where each
        answer is, and `facts`, where the fact of each answer was stated.

    Raises:
        SparsortError: n below 1, an unknown split or level, or a length that is too short for an episode of a level.
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
                "omit the level."
            )
    # A string seeds `random` by its hash digest, which is the same on every machine.
    rng = random.Random(f"recall {split} {seed} {length}")
    seen: set[str] = set()
    rows = []
    for number, level in zip(range(n), itertools.cycle(levels), strict=False):
        row = _new_row(rng, level, length, split, seen)
        seen.add(row["text"])
        rows.append({"id": f"recall-{level}-{number:06d}", **row})
    # Otherwise the levels would alternate in a fixed pattern.
    rng.shuffle(rows)
    return rows


def drawn(words: Sequence[str], answers: Iterable[int]) -> list[bool]:
    """Which words of a row are random and cannot be predicted from the words before: stated facts, and names asked for."""
    recalled = set(answers)
    return [place not in recalled and word.partition("-")[0] in _NAMES for place, word in enumerate(words)]


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
    # As many episodes as fit, but no more than there are different names for their facts.
    many = min(length // episode.words, len(NAMES) // episode.facts)
    names = rng.sample(NAMES, many * episode.facts)
    spare = length - many * episode.words
    words: list[str] = []
    answers: list[int] = []
    facts: list[int] = []
    for number in range(many):
        # The rest of the length is divided into further text among the facts, equally but for one word.
        among = episode.among + spare // many + (number < spare % many)
        text = _text(rng, level, among + episode.gap)
        stated: dict[str, int] = {}
        position = 0
        for name, at in zip(names[number * episode.facts :], _places(rng, episode.facts, among), strict=False):
            words += text[position:at]
            position = at
            stated[name] = len(words)
            words.append(f"{name}-{rng.choice(CITIES)}")
        words += [*text[position:], ASK]
        for name in rng.sample(sorted(stated), len(stated) // 2):
            # The name comes first, and its fact, which is the answer, one word later.
            answers.append(len(words) + 1)
            facts.append(stated[name])
            words += [name, words[stated[name]]]
    return {"text": " ".join(words), "level": level, "answers": answers, "facts": facts}


def _places(rng: random.Random, facts: int, words: int) -> list[int]:
    """The position of each fact among `words` words; several facts may have the same position."""
    return sorted(rng.choices(range(words + 1), k=facts))


def _text(rng: random.Random, level: int, count: int) -> list[str]:
    """`count` words of sentences and copies of a level; the last one may be cut."""
    words: list[str] = []
    while len(words) < count:
        exercise = rng.choice((sentences, copying))(rng, level)
        words += re.findall(r"\w+|[.:]", exercise)
    return words[:count]
