"""Whether a generated answer is right: exact match, GSM8K's number, mathematical equivalence.

Contract: a judge compares whole values and never searches for a substring, so "12" is wrong if the gold answer is "2".
`Verdict.extracted` reports the value that was compared. An answer from which no value can be read is wrong. A gold answer that
cannot be read is an error, because it would make every prediction wrong.

| judge | an answer is right if |
| --- | --- |
| `exact` | the texts are equal after spaces are stripped at both ends and collapsed within; case and punctuation count |
| `number` | the number after the first `####` equals the gold number; without `####` there is no answer, as in GSM8K |
| `math` | math-verify finds the expressions equivalent: the boxed one, else the last one in the text |
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sparsort.errors import SparsortError, unknown_choice
from sparsort.extras import need

# The most seconds that math-verify may take to read one text, and to compare two.
_SECONDS = 5

# A number with a sign before or after the currency, digits with commas, and a fraction. The last line refuses a match that is
# only the beginning of a longer number or of a formula.
_NUMBER = r"""
    [* \t]* (?P<sign>[-−+]?) [ ]* (?:\\?[$£€])? [ ]* (?P<sign_after>[-−+]?)
    (?P<value> \d[\d,]*(?:\.\d+)? | \.\d+ )
    (?: [ ]* / [ ]* (?P<below>\d+) )?
    (?! \d | [.,]\d | [ ]*[*/^×x+=]+[ ]*[\d(] | [ ]*[-−][ ]*[\d(] )
"""
# GSM8K writes this before the number that is the answer.
MARK = "####"
_MARK = re.compile(r"(?<!\#)\#{4}(?!\#)" + _NUMBER, re.VERBOSE | re.ASCII)
_BARE = re.compile(_NUMBER + r"[*\s.%]*", re.VERBOSE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer is right, and the value that was read from it (None if there was none)."""

    correct: bool
    extracted: str | None


def judge_exact(predicted: str, gold: str) -> Verdict:
    """Compare whole texts, in which spaces are stripped at both ends and collapsed; nothing else is changed.

    Raises:
        SparsortError: the gold answer is empty.
    """
    wanted = " ".join(gold.split())
    if not wanted:
        raise _unreadable("exact", gold, "a text")
    text = " ".join(predicted.split())
    return Verdict(correct=text == wanted, extracted=text or None)


def judge_number(predicted: str, gold: str) -> Verdict:
    """Compare the number after the first "####", as in GSM8K (arXiv 2110.14168).

    Commas between digits, currency and percent signs, a final period and trailing zeros make no difference: "$1,234.50." is
    1234.5. A fraction is read as its value. A number that begins a formula ("#### 3 * 4") is not read.

    Args:
        predicted: the generated text.
        gold: the data's worked answer with its "####", or the number alone.

    Raises:
        SparsortError: the gold answer has no number.
    """
    marked = _MARK.search(gold) or _BARE.fullmatch(gold)
    wanted = _read(marked)
    if wanted is None:
        raise _unreadable("number", gold, "a number, alone or after ####,")
    first = predicted.find(MARK)
    number = _read(_MARK.match(predicted, first)) if first >= 0 else None
    if number is None:
        return Verdict(correct=False, extracted=None)
    return Verdict(correct=number[0] == wanted[0], extracted=number[1])


def judge_math(predicted: str, gold: str) -> Verdict:
    r"""Compare mathematical expressions with math-verify.

    math-verify limits its own time by a signal, which Python delivers to the main thread only. Calls from other threads go to
    the main thread of a separate process, which is started once.

    Args:
        predicted: the generated text; its \boxed expressions are read, or the last expression if there are none.
        gold: the expression in LaTeX, without dollar signs.

    Raises:
        SparsortError: math-verify is not installed, or it cannot read the gold answer, or not in time.
    """
    _math_verify()
    if threading.current_thread() is threading.main_thread():
        return _verify(predicted, gold)
    return _PROCESS.ask(predicted, gold)


JUDGES: dict[str, Callable[[str, str], Verdict]] = {"exact": judge_exact, "number": judge_number, "math": judge_math}


def judge_of(name: str) -> Callable[[str, str], Verdict]:
    """Return the judge of this name, or raise `SparsortError` if there is none or if math-verify is needed and missing."""
    if name not in JUDGES:
        raise unknown_choice("judge of generated answers", name, JUDGES)
    if name == "math":
        _math_verify()
    return JUDGES[name]


def check_gold(name: str, gold: str) -> None:
    """Raise `SparsortError` if a judge cannot read a gold answer, or if `judge_of` would raise it."""
    judge_of(name)("", gold)


def _math_verify() -> Any:
    """Import math-verify, or raise `SparsortError` with the command that installs it."""
    return need("math_verify", "eval", "judging mathematical answers")


def _read(match: re.Match[str] | None) -> tuple[Fraction, str] | None:
    """Return the value and the plain spelling of a matched number; None if there is none."""
    if match is None or (match["sign"] and match["sign_after"]):
        return None
    digits = match["value"].replace(",", "")
    value = Fraction(digits)
    if (below := match["below"]) is not None:
        if int(below) == 0:
            return None
        value, digits = value / int(below), f"{digits}/{below}"
    # The second character is the minus sign of Unicode, which models write too.
    is_negative = (match["sign"] or match["sign_after"]) in ("-", "−")
    return (-value, f"-{digits}") if is_negative else (value, digits)


def _unreadable(judge: str, gold: str, what: str) -> SparsortError:
    return SparsortError(
        f"the judge {judge!r} cannot read the gold answer {gold[-80:]!r}; {what} is needed. "
        "Name the right field as the task's label, or choose another judge."
    )


def _verify(predicted: str, gold: str) -> Verdict:
    """Compare with math-verify; must be called in the main thread."""
    library = _math_verify()
    wanted = _parse_gold(library, gold) if gold.strip() else []
    if not wanted:
        raise _unreadable("math", gold, "a mathematical expression in LaTeX")
    # The answer of a model may be any text. One that cannot be read, or not in time, is a wrong answer.
    parsed = library.parse(predicted, parsing_timeout=_SECONDS)
    correct = bool(parsed) and bool(library.verify(wanted, parsed, timeout_seconds=_SECONDS))
    # The result lists an expression as an object and as its text. The object may be too large to print, so the text is kept.
    return Verdict(correct=correct, extracted=next((item for item in parsed if isinstance(item, str)), None))


def _parse_gold(library: Any, gold: str) -> list[Any]:
    """The expressions in a gold answer; [] if it cannot be read."""
    parsed: list[Any] = []
    try:
        # Whatever else makes math-verify fail on a text, the text cannot be read.
        with contextlib.suppress(Exception):
            parsed = library.parse(f"\\boxed{{{gold}}}", parsing_timeout=_SECONDS, raise_on_error=True)
    except library.errors.TimeoutException as error:
        raise SparsortError(
            f"the judge 'math' did not read the gold answer {gold[-80:]!r} within {_SECONDS} s. Judge while fewer other "
            "processes run, or shorten the answer."
        ) from error
    return parsed


class _JudgeProcess:
    """A process whose main thread judges, for callers in other threads; it answers one question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None

    def ask(self, predicted: str, gold: str) -> Verdict:
        with self._lock:
            # A process that has ended, for example for lack of memory, is replaced.
            if self._running is None or self._running.poll() is not None:
                self.stop()
                self._running = self._start()
            reply = self._exchange(self._running, json.dumps([predicted, gold]))
        if "error" in reply:
            raise SparsortError(reply["error"])
        return Verdict(**reply)

    def stop(self) -> None:
        """End the process if there is one. It does not take the lock, which a thread may never release when Python exits."""
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "from sparsort.scoring.answers.judges import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def _exchange(self, process: subprocess.Popen[str], line: str) -> dict[str, Any]:
        reply = ""
        if process.stdin is not None and process.stdout is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
            reply = process.stdout.readline()
        # The end of the process closes its standard output, and `readline` returns an empty text.
        if not reply:
            raise SparsortError(
                f"the process that judges mathematical answers ended with code {process.wait()}; it may have run out of "
                "memory. Judge in the main thread, or while fewer other processes run."
            )
        parsed: dict[str, Any] = json.loads(reply)
        return parsed


_PROCESS = _JudgeProcess()
atexit.register(_PROCESS.stop)


def serve() -> None:
    """Answer the questions of `_JudgeProcess`: read JSON lines [predicted, gold] from stdin until it is closed."""
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = vars(_verify(*json.loads(line)))
        except SparsortError as error:
            reply = {"error": str(error)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
