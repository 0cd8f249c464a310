"""Generated text of known difficulty: a corpus for training a small language model offline.

A text is a sequence of exercises of one kind and one level, 1 to 5. Each level extends the exercise of the level below: a copy of
one more word out of a larger vocabulary, a sum of larger numbers, brackets of one more depth, one more nested clause.
`curriculum_study` trains on these texts; `examples/make_data.py` generates questions with answers, for scoring and prompting.

Contract:
- The same (n, seed, split) gives the same rows, on any machine; no global random state is touched.
- Length does not reveal the level: a text's length is drawn before its exercises, and their number follows from it (many short
  ones or few long ones). Spearman's ρ of bytes and level is below 0.1 for 2,000 rows; the test requires 0.3.
- No text occurs twice in a split, and no text is in both splits: a digest of the text itself decides to which one it belongs,
  whatever the seed and the number of rows. Exercises do recur, because there are few of the easiest.
- Levels and kinds are as even as n allows.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import Any, Literal, get_args

from sparsort.errors import SparsortError, unknown_choice

Split = Literal["train", "held_out"]
LEVELS = range(1, 6)
# The length of a text in bytes is drawn uniformly from this range. A text ends with the exercise that comes nearest to it,
# and so its length is up to half an exercise off.
SHORTEST, LONGEST = 80, 160
# One text in _HELD_OUT is held out.
_HELD_OUT = 5
_ATTEMPTS = 1_000

_NOUNS = ["cat", "dog", "pig", "owl", "bee", "hen", "ram", "rat", "cow", "ant"]
_VERBS = ["see", "hear", "like", "fear", "seek", "call", "help", "pull", "meet", "tell"]
_WORDS = [
    *("fig", "oak", "elm", "ivy", "red", "sun", "sea", "ice", "map", "key", "cup", "jar", "pen", "box", "hat", "bag"),
    *("rope", "lamp", "drum", "coin", "leaf", "sand", "bell", "nest", "road", "wall", "gate", "ship", "moon", "star"),
    *("river", "stone", "table", "chair", "bread", "plant", "cloud", "light", "music", "paper", "glass", "train"),
    *("window", "basket", "silver", "garden", "castle", "winter"),
]
_BRACKETS = [("(", ")"), ("[", "]"), ("{", "}"), ("<", ">")]


def copying(rng: random.Random, level: int) -> str:
    """Repeated words: each level has one more word and twice the vocabulary."""
    words = [rng.choice(_WORDS[: 3 * 2 ** (level - 1)]) for _ in range(level)]
    return f"copy {' '.join(words)}: {' '.join(words)}."


def counting(rng: random.Random, level: int) -> str:
    """Numbers at equal steps: at first by one and below ten, then larger, with larger steps, and backwards."""
    step = rng.choice([(1,), (1, 2), (2, 3, 5), (3, 4, 6, 7), (6, 7, 8, 9)][level - 1])
    start = rng.randint(0, (3, 12, 40, 99, 400)[level - 1])
    run = [start + step * place for place in range(4 + level // 2)]
    if level >= 3 and rng.random() < 0.5:
        run.reverse()
    return f"count {' '.join(map(str, run))}."


def adding(rng: random.Random, level: int) -> str:
    """Sums of digits without and with a carry, of two-digit numbers, and of three numbers."""
    terms = {1: (4, 4), 2: (9, 9), 3: (99, 9), 4: (99, 99), 5: (99, 99, 99)}[level]
    numbers = [rng.randint(0 if most < 10 else 10, most) for most in terms]
    return f"{'+'.join(map(str, numbers))}={sum(numbers)}."


def brackets(rng: random.Random, level: int) -> str:
    """Balanced brackets as deep as the level, of one kind at first and of four at the end, with further pairs in between."""
    kinds = _BRACKETS[: min(level, len(_BRACKETS))]

    def inside(depth: int) -> str:
        if not depth:
            return ""
        opening, closing = rng.choice(kinds)
        sibling = "".join(rng.choice(kinds)) if rng.random() < 0.3 else ""
        return opening + inside(depth - 1) + closing + sibling

    return f"{inside(level)}."


def sentences(rng: random.Random, level: int) -> str:
    """Subject and verb that agree in number; each further level nests one more relative clause between them."""
    vocabulary = 2 * level
    plural = [rng.random() < 0.5 for _ in range(level)]
    nouns = [rng.choice(_NOUNS[:vocabulary]) + "s" * many for many in plural]
    verbs = [rng.choice(_VERBS[:vocabulary]) + "s" * (not many) for many in plural]
    return f"the {' that the '.join(nouns)} {' '.join(reversed(verbs))}."


KINDS: dict[str, Callable[[random.Random, int], str]] = {
    "copying": copying,
    "counting": counting,
    "adding": adding,
    "brackets": brackets,
    "sentences": sentences,
}


def graded_texts(n: int, seed: int, *, split: Split = "train") -> list[dict[str, Any]]:
    """`n` texts with their level, in random order.

    Args:
        n: rows.
        seed: any integer; another seed is another sample of the same split.
        split: "train" or "held_out"; no text is in both, for whatever seeds.

    Returns:
        Rows with `id` (unique within a seed and split), `text`, `level` (1, easiest, to 5) and `kind`.

    Raises:
        SparsortError: n below 1, an unknown split, or more texts than there are of the easiest kind.
    """
    if n < 1:
        raise SparsortError(f"n is {n}; expected at least one text.")
    if split not in get_args(Split):
        raise unknown_choice("split", split, get_args(Split))
    rng = random.Random(f"graded text {split} {seed}")
    seen: set[str] = set()
    rows = []
    # All combinations in turn, so that levels and kinds are as even as possible.
    cells = itertools.cycle(itertools.product(LEVELS, KINDS))
    for number, (level, kind) in zip(range(n), cells, strict=False):
        text = _new_text(rng, kind, level, split, seen)
        seen.add(text)
        rows.append({"id": f"{kind}-{level}-{number:06d}", "text": text, "level": level, "kind": kind})
    # Otherwise the levels would be in a fixed pattern.
    rng.shuffle(rows)
    return rows


def split_of(text: str) -> Split:
    """The split of a text, which depends on the text alone: one in five is held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % _HELD_OUT == 0 else "train"


def _new_text(rng: random.Random, kind: str, level: int, split: Split, seen: set[str]) -> str:
    for _ in range(_ATTEMPTS):
        text = _text(rng, kind, level)
        # Texts of the other split are rejected, so no text can be in both, whatever the seeds.
        if text not in seen and split_of(text) == split:
            return text
    raise SparsortError(
        f"found no further text of kind {kind!r} and level {level} in {_ATTEMPTS} attempts, after {len(seen)} texts. "
        "Ask for fewer."
    )


def _text(rng: random.Random, kind: str, level: int) -> str:
    """Exercises up to a length drawn in advance; the last one is kept if the text is nearer to that length with it."""
    target = rng.randint(SHORTEST, LONGEST)
    text = KINDS[kind](rng, level)
    while True:
        longer = f"{text} {KINDS[kind](rng, level)}"
        if len(longer) - target >= target - len(text):
            return text
        text = longer
