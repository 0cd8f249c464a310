"""All output to stdout and stderr: text is made printable and limited in length before it is written.

Contract: the output of the command line contains no control character except the newline, no mark that changes the direction of
text, and no invisible character that hides text; each is written as its escape (`\\x1b`, `\\u202e`). The reason is that ids,
labels, column names, file names and error texts come from other people's files, and a terminal obeys escape sequences. Markup
such as `[bold]` has no meaning here. In JSON output these characters are JSON escapes, so a parser gets every value unchanged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from sparsort.errors import SparsortError

# The longest message, and the longest line of a table, in characters. No message of sparsort itself is that long.
MOST = 4000
# The most characters of a prompt that are printed; --out and --json write the whole prompt.
MOST_OF_PROMPT = 1_000_000

# C0 and C1 controls except the newline; direction marks and overrides; separators that end a line in some terminals; invisible
# characters, except the two joiners that Persian, Indic scripts and emoji need; halves of surrogate pairs; tag characters.
_UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
_SPACE = re.compile(r"[^\S\xa0]+")


class OutputError(SparsortError):
    """stdout cannot be written: the disk is full, or stdout is closed."""

    exit_code = 1


def printable(text: str, most: int | None = MOST) -> str:
    """A text in a form that is safe to write to a terminal.

    Args:
        text: any text.
        most: number of characters that are kept, at the beginning and at the end, where a message gives the next step; None
            for all.
    """
    if most is not None and len(text) > most:
        head, tail = most - most // 4, most // 4
        text = f"{text[:head]} … {len(text) - head - tail:,} characters not shown … {text[-tail:] if tail else ''}"
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str, most: int) -> str:
    """The beginning of a text as one printable line; every run of white space becomes one space, except no-break spaces.

    Args:
        text: any text.
        most: the most characters of the result, including the ellipsis.
    """
    # An escape is longer than its character, so `most` characters always suffice. The text is cut at 20 times that length
    # first, since collapsing white space makes it shorter.
    start = _SPACE.sub(" ", text[: 20 * most]).strip()
    printed = _UNPRINTABLE.sub(_escape, start[: most + 1])
    return printed if len(printed) <= most and len(text) <= 20 * most else f"{printed[: most - 1].rstrip()}…"


def show(text: str = "", *, most: int | None = MOST) -> None:
    """Write a text and a newline to stdout. This is for results.

    Raises:
        OutputError: stdout cannot be written.
        BrokenPipeError: the reader of the pipe has closed it.
    """
    _write_stdout(printable(text, most))


def show_json(value: Any) -> None:
    """Write one JSON object to stdout, on one line. Values are not shortened; unprintable characters are JSON escapes.

    Raises:
        OutputError: stdout cannot be written.
        BrokenPipeError: the reader of the pipe has closed it.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    # JSON has such characters only inside strings, where the escape has the same meaning.
    _write_stdout(_UNPRINTABLE.sub(lambda match: json.dumps(match.group())[1:-1], text))


def note(text: str) -> None:
    """Write a text and a newline to stderr, for notes, warnings and errors. They are lost if stderr cannot be written."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        _write(stream, printable(text))
    except (OSError, ValueError):
        discard(stream)


def discard(stream: TextIO | None) -> None:
    """Discard the rest of a stream's buffer and all later output, so that the interpreter does not report an error at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


@contextlib.contextmanager
def printable_messages(level: int = logging.WARNING) -> Iterator[None]:
    """Inside the block, write the records of sparsort's logger to stderr, and make the messages of every library printable.

    A warning is shown on one line without source, and not at all if `level` is above that of warnings. This is for the command
    line: it changes logging and warnings for the whole process, and restores both afterwards.

    Args:
        level: the lowest level of the records that are written.
    """
    # A record factory applies to the records of all loggers; a filter on a logger does not apply to those below it.
    factory, show_warning = logging.getLogRecordFactory(), warnings.showwarning

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        # The arguments are already part of the message, and must not be inserted a second time.
        record.msg, record.args = printable(record.getMessage()), None
        return record

    def one_note(message: Warning | str, *_: Any, **__: Any) -> None:
        if level <= logging.WARNING:
            note(f"warning: {message}")

    logger, handler = logging.getLogger("sparsort"), _Notes()
    level_before = logger.level
    logging.setLogRecordFactory(make_record)
    warnings.showwarning = one_note
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(level_before)
        logger.removeHandler(handler)
        logging.setLogRecordFactory(factory)
        warnings.showwarning = show_warning


class _Notes(logging.Handler):
    """Writes the message of each record to stderr, which may be another stream at every record."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _escape(match: re.Match[str]) -> str:
    return ascii(match.group())[1:-1]


def _write_stdout(text: str) -> None:
    if sys.stdout is None:
        raise OutputError(closed())
    try:
        _write(sys.stdout, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise OutputError(unwritable(error)) from error


def closed() -> str:
    """The error message for a closed stdout."""
    return "stdout is closed. Direct it somewhere, such as > /dev/null."


def unwritable(error: OSError) -> str:
    """The error message for a stdout that cannot be written."""
    return (
        f"the output cannot be written to stdout: {error.strerror or error}. Free some space or direct it elsewhere, and run "
        "the same command again."
    )


def _write(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A character that the encoding lacks, such as "é" in ASCII, is written as its escape.
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    # Flush now: at the interpreter's exit, an error could no longer be reported.
    stream.flush()
