"""Probe queries out of text that a model sampled after its demonstrations (arXiv 2104.08786, "probing set").

Contract: a text becomes a query only if the prompt's template reads back out of it in one way; a cut-off or garbled text
becomes None, never a guess. The label that the model wrote behind the query is thrown away, as in the paper: nothing
makes it right. Pure text; sampling is elsewhere.

The paper samples once after every candidate order (the demonstrations alone as prompt, at most 128 tokens, temperature
2, no repeated n-grams) and puts the probes of all orders together, so that orders are compared on the same ones. A small
model at temperature 2 over its whole vocabulary writes nothing that reads as a query; at 1 nearly all of it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparsort.curriculum.demos.pool.rows import Row
from sparsort.errors import SparsortError
from sparsort.templates import fields_of, pieces
from sparsort.values import text_if_any


@dataclass(frozen=True, kw_only=True)
class ProbingSet:
    """The probes of a set of sampled texts.

    Attributes:
        rows: field to text of the queries, each once, in the order of their first appearance; `sparsort.values.row_of` makes
            a row of one.
        sampled: how many texts there were.
        unparsed: how many did not read as a query.
        repeated: how many repeated an earlier probe.
        copied: how many copied a demonstration.
    """

    rows: list[dict[str, str]]
    sampled: int
    unparsed: int
    repeated: int
    copied: int


def probing_set(
    samples: Iterable[str], prompt_template: str, separator: str, *, demos: Sequence[Row] = (), ended: bool = False
) -> ProbingSet:
    """The distinct queries among sampled texts.

    Args:
        samples: what the model wrote, one text for every candidate order or more.
        prompt_template: format string of a query, such as "Question: {question}\\nAnswer:".
        separator: what stands between two demonstrations.
        demos: rows whose copies are left out: their answer stands in the prompt, so they tell nothing of the order.
        ended: as `parse_probe`, for all texts.

    Raises:
        SparsortError: the template or the separator cannot be used.
    """
    names = list(dict.fromkeys(part.field for part in _split(prompt_template)[1]))
    shown = {tuple(_shown(demo, name) for name in names) for demo in demos}
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    sampled = unparsed = repeated = copied = 0
    for sample in samples:
        sampled += 1
        probe = parse_probe(sample, prompt_template, separator, ended=ended)
        if probe is None:
            unparsed += 1
            continue
        key = tuple(probe[name] for name in names)
        copied += key in shown
        repeated += key in rows
        if key not in shown:
            rows.setdefault(key, probe)
    return ProbingSet(rows=list(rows.values()), sampled=sampled, unparsed=unparsed, repeated=repeated, copied=copied)


def parse_probe(text: str, prompt_template: str, separator: str, *, ended: bool = False) -> dict[str, str] | None:
    """Field to text of the first query in a sampled text, or None where it does not read as one.

    A query reads as the template's words in their order with something in every field. Spaces around the text and
    around fields are dropped. None where a field is empty; holds the separator or words of the template, so that another
    reading would do as well; differs between two uses; or where the template's last words are missing, as in a text that
    was cut off. Behind those words anything may follow: a label, the separator, further queries.

    Args:
        text: what the model wrote behind the last separator. Where the prompt ended with `opening_of(prompt_template)`,
            put that in front.
        prompt_template: format string over the query's fields.
        separator: what stands between two demonstrations.
        ended: whether the text ended by itself (at the separator or an end token, which may have been stripped), and not at
            a limit of length. It matters only for a template that ends in a field.

    Raises:
        SparsortError: the template has no field, formats a field, or has two fields with nothing between them; an empty
            separator.
    """
    if not separator:
        raise SparsortError(
            "the separator is empty, so the end of a demonstration cannot be seen. Give one, such as '\\n\\n'."
        )
    opening, parts = _split(prompt_template)
    words = [literal for literal in (opening, *(part.literal for part in parts)) if literal.strip()]
    rest = text.lstrip()
    if not rest.startswith(opening.lstrip()):
        return None
    rest = rest.removeprefix(opening.lstrip())
    found: dict[str, str] = {}
    before = ""
    for field, literal in parts:
        end = _end_of_field(rest, literal, separator, ended=ended)
        if end is None:
            return None
        value = rest[:end].strip()
        if not value or found.setdefault(field, value) != value:
            return None
        # Words that are spaces only may stand in a field, but not in the one behind them: it could begin at either.
        if any(word in rest[:end] for word in words) or (before and before in rest[:end]):
            return None
        rest, before = rest[end + len(literal) :], literal
    label = rest.split(separator, 1)[0]
    return None if any(word in label for word in words) else found


def opening_of(prompt_template: str) -> str:
    """The template's words before its first field, without the spaces at their end, to prompt the model for a query.

    A prompt that ends with them makes nearly every sample a query, where the paper leaves them to the model. The space is the
    model's to write: it belongs to its next token.

    Raises:
        SparsortError: as `parse_probe`.
    """
    return _split(prompt_template)[0].rstrip(" ")


def _shown(demo: Row, field: str) -> str:
    """What a demonstration has in a field; "" where it has nothing."""
    return (text_if_any(demo, field, where="a demonstration") or "").strip()


class _Part(NamedTuple):
    field: str
    literal: str


def _split(template: str) -> tuple[str, list[_Part]]:
    """The words before the first field, and every field with the words behind it."""
    if not fields_of(template):
        raise SparsortError(
            f"the template {template!r} has no field, so no query reads out of it. Write one as {{question}}."
        )
    opening, parts = "", list[_Part]()
    for literal, field, spec, conversion in pieces(template):
        if not parts:
            opening += literal
        else:
            parts[-1] = _Part(parts[-1].field, parts[-1].literal + literal)
        if field is None:
            continue
        if spec or conversion:
            raise SparsortError(
                f"the template {template!r} formats the field {field!r}, which cannot be undone. Write {{{field}}}, or take "
                "the probes from data."
            )
        if parts and not parts[-1].literal:
            raise SparsortError(
                f"the template {template!r} has nothing between {parts[-1].field!r} and {field!r}, so the end of the first "
                "cannot be seen. Put some words between them, or take the probes from data."
            )
        parts.append(_Part(field, ""))
    return opening, parts


def _end_of_field(rest: str, literal: str, separator: str, *, ended: bool) -> int | None:
    """Where the field at the head of `rest` ends, or None where that cannot be told."""
    if not literal:
        end = rest.find(separator)
        return end if end >= 0 else len(rest) if ended else None
    end = rest.find(literal)
    if end < 0 or 0 <= rest.find(separator) < end:
        return None
    # Words that overlap themselves: in "a:::b" the field before "::" may be "a" or "a:".
    again = rest.find(literal, end + 1)
    return None if 0 <= again < end + len(literal) else end
