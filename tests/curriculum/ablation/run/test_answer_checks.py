"""Answers that could not be judged are reported, and those that could are accepted in whatever form they are shown."""

from __future__ import annotations

from typing import Any

import pytest

from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.splits import Splits
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.run.checks import check_answers
from sparsort.errors import SparsortError


def check(rows: list[dict[str, Any]], *, choosers: tuple[str, ...] = ("best_on_dev",), **fields: Any) -> list[str]:
    task = Task(**{"name": "toy", "prompt": "Q: {q}\nA:", "answer": " {a}", "label": "a", "judge": "exact"} | fields)
    recipe = Ablation(tasks=(task,), choosers=choosers)
    named = [{"id": str(number), "q": "?", **row} for number, row in enumerate(rows)]
    return check_answers(task, Splits(test=named[:1], dev=named[1:2], pool=named[2:], dropped=[], notes=[]), recipe)


WORDS = [{"a": word} for word in ("one", "two", "three", "four", "five", "six")]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        # A stop that ends an answer cuts nothing off it.
        {"answer": " {a}.", "stop": (".",)},
        {"answer": " {a}\n", "separator": "\n"},
        {"answer": "\n{a}\n", "chat": True},
        {"stop": ()},
    ],
)
def test_answers_that_can_be_read_are_left_alone(fields: dict[str, Any]) -> None:
    assert check(WORDS, **fields) == []


def test_worked_answers() -> None:
    rows = [{"a": f"{n} and {n}\nmake {2 * n}\n#### {2 * n}"} for n in range(6)]
    assert check(rows, judge="number", stop=("\nQ:",)) == []
    assert check([{"a": str(n)} for n in range(6)], judge="number", answer=" so #### {a}\n", stop=("\n",)) == []
    solved = [{"s": f"so $\\boxed{{{n}}}$.", "a": str(n)} for n in range(6)]
    assert check(solved, judge="math", answer=" {s}", stop=()) == []


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (WORDS, {"answer": " It is {a}"}, "The judge 'exact' reads 'It is three' there"),
        (WORDS, {"answer": "\n{a}"}, "reads None there"),
        # None could be read whole, though each stop cuts half of them.
        ([{"a": f"word{'!' if n % 2 else '?'} more"} for n in range(6)], {"stop": ("!", "?")}, "4 of 4 demonstrations"),
        ([{"a": str(n)} for n in range(6)], {"judge": "number"}, "reads the number after '####'"),
    ],
)
def test_a_task_in_which_no_answer_could_be_right_is_refused(
    rows: list[dict[str, Any]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SparsortError) as error:
        check(rows, **fields)
    assert message in str(error.value)
    assert "would be judged wrong" in str(error.value)


def test_some_that_could_not_be_right_are_noted() -> None:
    (note,) = check([*WORDS, {"a": "ten\neleven"}])
    assert note.startswith(
        "1 of 5 demonstrations of the task 'toy' would be judged wrong as they are shown and cut at a stop"
    )
    assert "' ten' against 'ten\\neleven'" in note


def test_gold_answers_are_read_where_they_are_judged() -> None:
    rows = [{"a": f"#### {n}"} for n in range(6)]
    rows[1] = {"a": "no number"}
    with pytest.raises(SparsortError, match=r"row '1' of the task 'toy': the judge 'number' cannot read"):
        check(rows, judge="number")
    assert check(rows, judge="number", choosers=("density",)) == []
    rows[0] = {"a": ""}
    with pytest.raises(SparsortError, match=r"row '0' of the task 'toy'"):
        check(rows, judge="number", choosers=("density",))
