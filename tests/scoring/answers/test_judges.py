"""Judges: whole answers only, never a substring; each against its definition."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.scoring.answers import judges
from sparsort.scoring.answers.judges import JUDGES, Verdict, judge_exact, judge_math, judge_number, judge_of

# Exact


@pytest.mark.parametrize(
    ("predicted", "gold", "correct"),
    [
        ("Paris", "Paris", True),
        ("  New \t York\n", "New York", True),
        ("paris", "Paris", False),
        ("Paris.", "Paris", False),
        ("Paris, France", "Paris", False),
        ("12", "2", False),
        ("NewYork", "New York", False),
        ("", "Paris", False),
    ],
)
def test_exact_match_is_of_whole_texts_but_for_spaces(predicted: str, gold: str, correct: bool) -> None:
    assert judge_exact(predicted, gold).correct is correct


def test_exact_match_says_what_it_compared() -> None:
    assert judge_exact(" a  b ", "c") == Verdict(correct=False, extracted="a b")
    assert judge_exact(" \n", "c") == Verdict(correct=False, extracted=None)


@given(st.text(), st.text().filter(lambda text: text.strip()))
def test_exact_match_agrees_with_comparing_the_words(predicted: str, gold: str) -> None:
    assert judge_exact(predicted, gold).correct == (predicted.split() == gold.split())


def test_exact_match_refuses_an_empty_gold_answer() -> None:
    with pytest.raises(SparsortError, match="cannot read the gold answer"):
        judge_exact("x", " \n")


# Number


@pytest.mark.parametrize(
    ("predicted", "read"),
    [
        ("48/2 = <<48/2=24>>24, 48+24 = 72\n#### 72", "72"),
        ("#### 72.", "72"),
        ("####72", "72"),
        ("#### $1,234.50.", "1234.50"),
        (r"#### \$5", "5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### −3", "-3"),
        ("#### +3", "3"),
        ("#### **72**", "72"),
        ("#### 72 clips", "72"),
        ("#### 50%", "50"),
        ("#### .5", ".5"),
        ("#### 1/2", "1/2"),
        ("#### 72\n\nQuestion: 5 apples", "72"),
        ("#### 7\n#### 8", "7"),
        ("72", None),
        ("The answer is 72.", None),
        ("#### seventy-two", None),
        ("####", None),
        ("####\n72", None),
        ("### 72", None),
        ("##### 72", None),
        ("#### 3 * 4", None),
        ("#### 3 - 2", None),
        ("#### 3x4", None),
        ("#### 1.2.3", None),
        ("#### 1/0", None),
        ("#### --3", None),
        ("#### seventy\n#### 72", None),
        ("", None),
    ],
)
def test_only_the_number_after_the_mark_is_read(predicted: str, read: str | None) -> None:
    assert judge_number(predicted, "0").extracted == read


@pytest.mark.parametrize(
    ("predicted", "gold", "correct"),
    [
        ("#### 1,234.50", "#### 1234.5", True),
        ("#### 72.0", "steps 3 + 4\n#### 72", True),
        ("#### 72", "72", True),
        ("#### 0.50", "1/2", True),
        ("#### 172", "#### 72", False),
        ("#### 7", "#### 72", False),
        ("#### -72", "#### 72", False),
        ("so it is 72", "#### 72", False),
        ("#### 9007199254740993", "9007199254740992", False),
    ],
)
def test_numbers_are_equal_by_value(predicted: str, gold: str, correct: bool) -> None:
    assert judge_number(predicted, gold).correct is correct


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3),
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3),
)
def test_a_written_number_is_right_exactly_when_it_is_the_gold_one(predicted: Decimal, gold: Decimal) -> None:
    assert judge_number(f"steps\n#### ${predicted:,}.", f"{gold:f}").correct == (predicted == gold)
    assert judge_number(f"#### {gold:,}", f"#### {gold:f}").correct


@given(st.text())
def test_any_text_can_be_judged(predicted: str) -> None:
    assert judge_number("####" + predicted, "3").correct in (True, False)


@pytest.mark.parametrize("gold", ["", "####", "none", "72 clips and 3", "3 + 4"])
def test_a_gold_answer_without_a_number_is_an_error(gold: str) -> None:
    with pytest.raises(SparsortError, match=r"cannot read the gold answer .*label"):
        judge_number("#### 3", gold)


# By name


def test_judges_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge_of("number") is judge_number
    assert set(JUDGES) == {"exact", "number", "math"}
    with pytest.raises(SparsortError, match=r"unknown judge .*'exakt'.*Did you mean 'exact'"):
        judge_of("exakt")


@pytest.mark.parametrize("call", [lambda: judge_of("math"), lambda: judge_math("1", "1")])
def test_without_math_verify_the_extra_is_named(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(SparsortError, match=r"pip install 'sparsort\[eval\]'"):
        call()


# Mathematical equivalence


@pytest.fixture
def math() -> Callable[[str, str], Verdict]:
    pytest.importorskip("math_verify")
    return judge_math


@pytest.mark.parametrize(
    ("predicted", "gold", "correct"),
    [
        (r"Hence $x = \boxed{\frac{2}{4}}$.", "0.5", True),
        (r"\boxed{2x + 2}", "2(x+1)", True),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{90}", r"90^\circ", True),
        ("The answer is $5$.", "5", True),
        (r"\boxed{12}", "2", False),
        ("The answer is 12.", "2", False),
        (r"\boxed{(1,2)}", "(2,1)", False),
        (r"It is 5, no: \boxed{6}", "5", False),
        ("Evelyn", r"\text{Evelyn}", False),
        ("no idea", "7", False),
        (r"\boxed{5", "6", False),
        ("", "5", False),
    ],
)
def test_equivalent_expressions_are_right(
    math: Callable[[str, str], Verdict], predicted: str, gold: str, correct: bool
) -> None:
    assert math(predicted, gold).correct is correct


def test_the_math_judge_says_what_it_read(math: Callable[[str, str], Verdict]) -> None:
    assert math(r"so \boxed{\frac{1}{2}}", "1").extracted == r"\frac{1}{2}"
    assert math("no idea", "1").extracted is None


@settings(max_examples=25, deadline=None)
@given(a=st.integers(-99, 99), b=st.integers(1, 99), c=st.integers(-99, 99), d=st.integers(1, 99))
def test_fractions_are_right_exactly_when_they_are_equal(a: int, b: int, c: int, d: int) -> None:
    pytest.importorskip("math_verify")
    assert judge_math(rf"\boxed{{\frac{{{a}}}{{{b}}}}}", rf"\frac{{{c}}}{{{d}}}").correct == (a * d == c * b)


def test_a_gold_expression_that_cannot_be_read_is_an_error(math: Callable[[str, str], Verdict]) -> None:
    with pytest.raises(SparsortError, match="cannot read the gold answer"):
        math("5", " ")


def _in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except SparsortError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_gets_the_same_verdicts_and_errors(math: Callable[[str, str], Verdict]) -> None:
    for predicted, gold in [(r"\boxed{\frac{2}{4}}", "0.5"), (r"\boxed{3}", "0.5"), ("naïve ∑\ud800", "1")]:
        assert _in_a_thread(lambda p=predicted, g=gold: math(p, g)) == math(predicted, gold)
    assert "cannot read the gold answer" in str(_in_a_thread(lambda: math("5", "")))
    assert _in_a_thread(lambda: math("$5$", "5")).correct


def test_a_process_that_has_ended_is_started_again(math: Callable[[str, str], Verdict]) -> None:
    assert _in_a_thread(lambda: math("$5$", "5")).correct
    first = judges._PROCESS._running
    assert first is not None
    first.kill()
    first.wait()
    assert _in_a_thread(lambda: math("$5$", "5")).correct
    assert judges._PROCESS._running is not first


def test_a_process_that_ends_over_a_question_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    process = judges._JudgeProcess()
    end = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)"]
    monkeypatch.setattr(
        process, "_start", lambda: subprocess.Popen(end, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    with pytest.raises(SparsortError, match="ended with code 3"):
        process.ask("5", "5")
    process.stop()


def test_a_gold_answer_that_is_not_read_in_time_is_not_called_unreadable(
    math: Callable[[str, str], Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = importlib.import_module("math_verify")

    def never_ends(text: str, **_: Any) -> Any:
        raise library.errors.TimeoutException(text)

    monkeypatch.setattr(library, "parse", never_ends)
    with pytest.raises(SparsortError, match="did not read the gold answer '5' within 5 s"):
        math("5", "5")


@pytest.mark.parametrize("where", ["main thread", "other thread"])
def test_an_expression_without_end_is_wrong_after_some_seconds(
    where: str, math: Callable[[str, str], Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsort.scoring.answers.judges._SECONDS", 1)
    endless = r"\boxed{9^{9^{9^{9}}}}"
    verdict = math(endless, "5") if where == "main thread" else _in_a_thread(lambda: math(endless, "5"))
    assert verdict == Verdict(correct=False, extracted="9^{9^{9^{9}}}")
