"""The example data equal the output of their generator, and their answers are right by a second computation."""

from __future__ import annotations

import collections
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy.stats import spearmanr

EXAMPLES = Path(__file__).parents[2] / "examples"
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", EXAMPLES / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_same_seed_gives_the_same_bytes(
    make_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--seed", "0", "--out", str(tmp_path)])
    make_data.main()
    for name in ("graded.jsonl", "reviews.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()


def test_another_seed_gives_other_rows(make_data: ModuleType) -> None:
    questions = {row["question"] for row in make_data.graded(0)}
    assert len(questions & {row["question"] for row in make_data.graded(1)}) < 5


def test_the_graded_questions_are_balanced_and_distinct() -> None:
    rows = _rows("graded.jsonl")
    assert len(rows) >= 240
    assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == len(rows)
    per_cell = collections.Counter((row["kind"], row["steps"]) for row in rows)
    assert {steps for _, steps in per_cell} == set(range(1, 7))
    assert len(set(per_cell.values())) == 1


def test_the_length_of_a_question_says_little_of_its_steps() -> None:
    rows = _rows("graded.jsonl")
    rho = spearmanr([row["steps"] for row in rows], [len(row["question"]) for row in rows]).statistic
    assert abs(rho) <= 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_answer_follows_from_the_text_of_its_question(make_data: ModuleType, seed: int) -> None:
    for row in make_data.graded(seed):
        answer, steps = SOLVERS[row["kind"]](row["question"])
        assert (answer, steps) == (row["answer"], row["steps"]), row


def test_the_reviews_are_balanced_and_no_two_nearly_the_same() -> None:
    rows = _rows("reviews.jsonl")
    assert len(rows) >= 120
    assert len(set(collections.Counter(row["label"] for row in rows).values())) == 1
    assert len({row["id"] for row in rows}) == len(rows)
    triples = [
        {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        for words in (row["text"].lower().split() for row in rows)
    ]
    for i, one in enumerate(triples):
        assert all(len(one & other) / len(one | other) < 0.5 for other in triples[:i]), rows[i]


# Solvers that read the question's text alone; each gives the answer and the number of operations that it took.


def _count(question: str) -> tuple[str, int]:
    (start,) = re.findall(r"holds (\d+) ", question)
    held, steps = int(start), 0
    for sentence in re.findall(r"Then ([^.]*)\.", question):
        number = int((re.findall(r"\d+", sentence) or ["0"])[0])
        if sentence.endswith("put in"):
            held += number
        elif sentence.endswith("taken out"):
            held -= number
        elif sentence.endswith("doubled"):
            held += held
        else:
            assert sentence.startswith("half")
            assert held % 2 == 0
            held -= held // 2
        assert held > 0
        steps += 1
    return str(held), steps


def _clock(question: str) -> tuple[str, int]:
    ((verb, hour, minute),) = re.findall(r"(begins|ends) at (\d+):(\d+)\.", question)
    parts = [int(n) for n in re.findall(r"(\d+) minutes", question)]
    sign = 1 if verb == "begins" else -1
    assert question.endswith("end?" if sign > 0 else "begin?")
    hours, minutes = divmod(int(hour) * 60 + int(minute) + sign * sum(parts), 60)
    assert 0 <= hours < 24
    return f"{hours}:{minutes:02d}", len(parts)


def _weekday(question: str) -> tuple[str, int]:
    (first,) = re.findall(r"The (\w+) is on a (\w+)\.", question)
    day = {first[0]: DAYS.index(first[1])}
    relations = re.findall(r"The (\w+) is (\d) days? (after|before) the (\w+)\.", question)
    for event, number, side, known in relations:
        day[event] = (day[known] + (int(number) if side == "after" else -int(number))) % 7
    (asked,) = re.findall(r"is the (\w+)\?", question)
    return DAYS[day[asked]], len(relations)


def _ranking(question: str) -> tuple[str, int]:
    up = {"taller", "older", "faster", "heavier"}
    below: dict[str, str] = {}
    relations = re.findall(r"(\w+) is (\w+er) than (\w+)\.", question)
    for one, word, other in relations:
        high, low = (one, other) if word in up else (other, one)
        below[high] = low
    (top,) = set(below) - set(below.values())
    chain = [top]
    while chain[-1] in below:
        chain.append(below[chain[-1]])
    assert len(chain) == len(relations) + 1
    (asked,) = re.findall(r"Who is the (\w+)est\?", question)
    return chain[0] if f"{asked}er" in up else chain[-1], len(relations)


def _letters(question: str) -> tuple[str, int]:
    (text,) = re.findall(r'"(\w+)"', question)
    word, steps = list(text), 0
    for move in re.findall(r"(Reverse|Swap|Double|Remove its first|Remove its last)\b", question):
        before = list(word)
        if move == "Reverse":
            word.reverse()
        elif move == "Swap":
            word[0], word[-1] = word[-1], word[0]
        elif move == "Double":
            word.append(word[-1])
        else:
            word.pop(0 if move.endswith("first") else -1)
        assert word != before
        steps += 1
    return "".join(word), steps


SOLVERS = {"count": _count, "clock": _clock, "weekday": _weekday, "ranking": _ranking, "letters": _letters}
