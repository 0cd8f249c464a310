"""The one way to stdout and stderr: text is made printable and bounded in length before it is written.

Contract: what the command line writes contains no control character but the newline, no mark that changes the direction of
text, and no invisible character that hides it; each is written as its escape (`\\x1b`, `\\u202e`). Ids, labels, column names,
file names and error texts come from other people's files, and a terminal obeys escape sequences. Markup such as `[bold]` has no
meaning here. JSON has the same characters as JSON escapes, so a reader of it gets every value unchanged.
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

# Characters of a message, or of a line of a table, that are printed. No message of ours is as long.
MOST = 4000
# Characters of a prompt that are printed; --out and --json have all of it.
MOST_OF_PROMPT = 1_000_000

# C0 and C1 but the newline; marks and overrides of direction; separators that end a line in some terminals; invisible
# characters, without the two joiners that Persian, Indic scripts and emoji need; halves of surrogate pairs; tags.
_UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
_SPACE = re.compile(r"[^\S\xa0]+")


class OutputError(SparsortError):
    """Nothing can be written to stdout: the disk is full, or stdout is closed."""

    exit_code = 1


def printable(text: str, most: int | None = MOST) -> str:
    """A text as it may be written to a terminal.

    Args:
        text: any text.
        most: characters of it that are kept, at its beginning and its end, where a message has its next step; None for
            all.
    """
    if most is not None and len(text) > most:
        head, tail = most - most // 4, most // 4
        text = f"{text[:head]} … {len(text) - head - tail:,} characters not shown … {text[-tail:] if tail else ''}"
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str, most: int) -> str:
    """The beginning of a text, printable, on one line, with every run of white space as one space; no-break spaces stay.

    Args:
        text: any text.
        most: the most characters of the result, the ellipsis included.
    """
    # Escapes are longer than what they stand for, so `most` characters of text always suffice; white space is dropped.
    start = _SPACE.sub(" ", text[: 20 * most]).strip()
    shown = _UNPRINTABLE.sub(_escape, start[: most + 1])
    return shown if len(shown) <= most and len(text) <= 20 * most else f"{shown[: most - 1].rstrip()}…"


def show(text: str = "", *, most: int | None = MOST) -> None:
    """Write a text and a newline to stdout: results.

    Raises:
        OutputError: stdout cannot be written.
        BrokenPipeError: its reader went away.
    """
    _write_stdout(printable(text, most))


def show_json(value: Any) -> None:
    """Write one JSON object to stdout, on one line. Values are whole; unprintable characters are JSON escapes.

    Raises:
        OutputError: stdout cannot be written.
        BrokenPipeError: its reader went away.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    # Outside strings JSON has no such character, and inside them the escape means the same.
    _write_stdout(_UNPRINTABLE.sub(lambda found: json.dumps(found.group())[1:-1], text))


def note(text: str) -> None:
    """Write a text and a newline to stderr: notes, warnings, errors. Where stderr cannot be written, it is lost."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        _write(stream, printable(text))
    except (OSError, ValueError):
        discard(stream)


def discard(stream: TextIO | None) -> None:
    """Send what is left in a stream's buffer, and all that follows, to nowhere, so that the interpreter's exit is silent."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


@contextlib.contextmanager
def printable_messages() -> Iterator[None]:
    """Inside the block, what is logged and warned of by any library is printable, and a warning is one line without source.

    For the command line: it sets the log records and the warnings of the whole process, and puts both back.
    """
    factory, show_warning = logging.getLogRecordFactory(), warnings.showwarning

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        record.msg, record.args = printable(record.getMessage()), None
        return record

    def one_note(message: Warning | str, *_: Any, **__: Any) -> None:
        note(f"warning: {message}")

    logging.setLogRecordFactory(make_record)
    warnings.showwarning = one_note
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.showwarning = show_warning


def _escape(found: re.Match[str]) -> str:
    return ascii(found.group())[1:-1]


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
    """The message for a standard output that is closed."""
    return "stdout is closed. Direct it somewhere, such as > /dev/null."


def unwritable(error: OSError) -> str:
    """The message for a standard output that cannot be written."""
    return (
        f"the output cannot be written to stdout: {error.strerror or error}. Free some space or direct it elsewhere, and run "
        "the same command again."
    )


def _write(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # An encoding without the character, such as ASCII, gets its escape.
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    # Now, not at the interpreter's exit, where an error can no longer be reported.
    stream.flush()
