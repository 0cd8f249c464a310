"""The word list of the house: words and phrases with a plainer equivalent, and the uses that are right.

They are looked for in names, comments, strings and documents. `tests/test_house.py` refuses an entry of `RIGHT` that matches
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch

# What is looked for, as a pattern of words → what to write instead.
WORDS = {
    "behind": "after",
    "stands?|stood": "is",
    "lies": "is",
    "told": "reported, passed",
    "said": "reported",
    "anew": "again",
    "once more": "again",
    "(go|goes|going|went) on": "continue, resume",
    "mend(s|ed|ing)?": "fix",
    "beside": "next to, with",
    "none of": "not one of",
    "asks? the model": "query the model",
    "(leave|leaves|leaving|left) ((it|them|that|this) )?out": "skip, exclude",
}
# (files, a text with the word in it, why the word is right there)
RIGHT = [
    ("*", r"\bst(ands?|ood) (in )?for\b", "the idiom for 'represents' or 'replaces'"),
    ("*", r"\b(cannot|can|could|be) be told (from|apart)\b", "the idiom for 'is distinguishable'"),
    ("tests/test_house.py", r"behind|lies", "the test of this list"),
    ("*", r"--beside", "the retired flag of plan --compare"),
    ("docs/results/ordering-study.md", r"26-year-old said\b", "a row of the data, in a prompt"),
    ("scoring/calibration/calibration.py", r"^left out$", "the field left_out of files that users have"),
]

_WORDS = {word: re.compile(rf"\b(?:{word})\b".replace(" ", r"[\s#]+"), re.IGNORECASE) for word in WORDS}


def find(path: str, text: str) -> Iterator[tuple[str, int]]:
    """(word, offset) of every hit in a text of this file, apart from the uses that are right."""
    yield from ((word, begin) for word, begin, reasons in _matches(path, text) if not reasons)


def reasons_in(path: str, text: str) -> set[str]:
    """Why words in a text of this file are right."""
    return {reason for _, _, reasons in _matches(path, text) for reason in reasons}


def _matches(path: str, text: str) -> Iterator[tuple[str, int, list[str]]]:
    for word, pattern in _WORDS.items():
        for match in pattern.finditer(text):
            begin, end = match.span()
            right = [
                reason
                for files, uses, reason in RIGHT
                if fnmatch(path, files) and any(m.start() <= begin and end <= m.end() for m in re.finditer(uses, text))
            ]
            yield word, begin, right
