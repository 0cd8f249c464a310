"""Whether a generated answer is right: exact match, GSM8K's number, mathematical equivalence.

Contract: an answer is read as a whole and never by substring, so "12" is not right because the gold answer is "2". What
is compared is told in `Verdict.extracted`; where nothing can be read the answer is wrong. A gold answer that cannot be
read is an error: it would make every prediction wrong.

| judge | right when |
| --- | --- |
| `exact` | the texts are equal once outer spaces are gone and every run of spaces is one; case and punctuation count |
| `number` | the number behind the first `####` equals the gold one; without `####` there is no answer, as in GSM8K |
| `math` | math-verify finds the expressions equivalent: the boxed one, else the last in the text |
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

# math-verify takes so many seconds at most to read one text, and as many to compare two.
_SECONDS = 5

_NUMBER = r"""
    [* \t]* (?P<sign>[-−+]?) [ ]* (?:\\?[$£€])? [ ]* (?P<sign_after>[-−+]?)
    (?P<value> \d[\d,]*(?:\.\d+)? | \.\d+ )
    (?: [ ]* / [ ]* (?P<below>\d+) )?
    (?! \d | [.,]\d | [ ]*[*/^×x+=]+[ ]*[\d(] | [ ]*[-−][ ]*[\d(] )
"""
# Stands before the number that answers, in GSM8K.
MARK = "####"
_MARK = re.compile(r"(?<!\#)\#{4}(?!\#)" + _NUMBER, re.VERBOSE | re.ASCII)
_BARE = re.compile(_NUMBER + r"[*\s.%]*", re.VERBOSE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer is right, and what was read of it (None: nothing)."""

    correct: bool
    extracted: str | None


def judge_exact(predicted: str, gold: str) -> Verdict:
    """Exact match of whole texts; spaces are stripped and runs of them collapsed, nothing else is changed.

    Raises:
        SparsortError: the gold answer is empty.
    """
    wanted = " ".join(gold.split())
    if not wanted:
        raise _unreadable("exact", gold, "a text")
    found = " ".join(predicted.split())
    return Verdict(correct=found == wanted, extracted=found or None)


def judge_number(predicted: str, gold: str) -> Verdict:
    """GSM8K's number, behind the first "####" (arXiv 2110.14168).

    Commas between digits, signs of currency and per cent, a trailing period and zeros behind the point make no
    difference: "$1,234.50." is 1234.5. A fraction is its value. A number that goes on as a formula ("#### 3 * 4") is
    not read.

    Args:
        predicted: the generated text.
        gold: the data's worked answer with its "####", or the number alone.

    Raises:
        SparsortError: the gold answer has no number.
    """
    marked = _MARK.search(gold) or _BARE.fullmatch(gold)
    wanted = _read(marked)
    if wanted is None:
        raise _unreadable("number", gold, "a number, alone or behind ####,")
    first = predicted.find(MARK)
    found = _read(_MARK.match(predicted, first)) if first >= 0 else None
    if found is None:
        return Verdict(correct=False, extracted=None)
    return Verdict(correct=found[0] == wanted[0], extracted=found[1])


def judge_math(predicted: str, gold: str) -> Verdict:
    r"""Mathematical equivalence, by math-verify.

    math-verify bounds its own time by a signal, which Python delivers to the main thread only; called from another
    thread, this asks a process of its own, started once.

    Args:
        predicted: the generated text; its \boxed expressions are read, or the last expression where there is none.
        gold: the expression in LaTeX, without dollar signs.

    Raises:
        SparsortError: math-verify is not installed, or it cannot read the gold answer.
    """
    need_math()
    if threading.current_thread() is threading.main_thread():
        return _verify(predicted, gold)
    return _PROCESS.ask(predicted, gold)


JUDGES: dict[str, Callable[[str, str], Verdict]] = {"exact": judge_exact, "number": judge_number, "math": judge_math}


def judge_of(name: str) -> Callable[[str, str], Verdict]:
    """The judge of that name, ready to be used: what it needs is installed.

    Raises:
        SparsortError: there is none, or math-verify is not installed.
    """
    if name not in JUDGES:
        raise unknown_choice("judge of generated answers", name, JUDGES)
    if name == "math":
        need_math()
    return JUDGES[name]


def check_gold(name: str, gold: str) -> None:
    """Make sure that a judge can read a gold answer.

    Raises:
        SparsortError: it cannot, there is no such judge, or math-verify is not installed.
    """
    judge_of(name)("", gold)


def need_math() -> None:
    """Make sure that math-verify is installed.

    Raises:
        SparsortError: it is not; says how to install it.
    """
    need("math_verify", "eval", "judging mathematical answers")


def _read(match: re.Match[str] | None) -> tuple[Fraction, str] | None:
    """A matched number's value and its plain spelling."""
    if match is None or (match["sign"] and match["sign_after"]):
        return None
    digits = match["value"].replace(",", "")
    value = Fraction(digits)
    if (below := match["below"]) is not None:
        if int(below) == 0:
            return None
        value, digits = value / int(below), f"{digits}/{below}"
    is_negative = (match["sign"] or match["sign_after"]) in ("-", "−")
    return (-value, f"-{digits}") if is_negative else (value, digits)


def _unreadable(judge: str, gold: str, what: str) -> SparsortError:
    return SparsortError(
        f"the judge {judge!r} cannot read the gold answer {gold[-80:]!r}; {what} is needed. "
        "Name the right field as the task's label, or choose another judge."
    )


def _verify(predicted: str, gold: str) -> Verdict:
    """Only in the main thread."""
    library = need("math_verify", "eval", "judging mathematical answers")
    wanted = library.parse(f"\\boxed{{{gold}}}", parsing_timeout=_SECONDS) if gold.strip() else []
    if not wanted:
        raise _unreadable("math", gold, "a mathematical expression in LaTeX")
    # A model's answer may be any text at all; one that cannot be read, or not in time, is a wrong answer.
    found = library.parse(predicted, parsing_timeout=_SECONDS)
    correct = bool(found) and bool(library.verify(wanted, found, timeout_seconds=_SECONDS))
    # Beside the text that was found stands the expression that it was read as, which may be too large to write out.
    return Verdict(correct=correct, extracted=next((item for item in found if isinstance(item, str)), None))


class _Process:
    """A process whose main thread judges, for callers that are in another thread. One question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None

    def ask(self, predicted: str, gold: str) -> Verdict:
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self.stop()
                self._running = self._start()
            reply = self._exchange(self._running, json.dumps([predicted, gold]))
        if "error" in reply:
            raise SparsortError(reply["error"])
        return Verdict(**reply)

    def stop(self) -> None:
        """End the process, if there is one; without the lock, which a thread may hold for good when Python exits."""
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
        if not reply:
            raise SparsortError(
                f"the process that judges mathematical answers ended with code {process.wait()}; it may have run out of "
                "memory. Judge in the main thread, or with fewer processes beside it."
            )
        read: dict[str, Any] = json.loads(reply)
        return read


_PROCESS = _Process()
atexit.register(_PROCESS.stop)


def serve() -> None:
    """Judge what comes in on stdin, a JSON line [predicted, gold] at a time, until it is closed: `_Process`'s other end."""
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = vars(_verify(*json.loads(line)))
        except SparsortError as error:
            reply = {"error": str(error)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
