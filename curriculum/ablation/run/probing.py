"""Probes for criteria, sampled from the model after each random order of a set (arXiv 2104.08786).

Contract: seeded. The probes of all orders form one list, and the orders are compared on the whole of it. A sampled text that
is no valid query, repeats another, or copies a demonstration is excluded and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.task_data import SetDemos
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.demos.pool.rows import Row
from sparsort.errors import SparsortError
from sparsort.scoring.answers.generation import sample_probes
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.templates import fields_of, pieces
from sparsort.values import row_of, text_if_any


def probes(
    reader: AnswerReader, texts: Texts, set_demos: SetDemos, orders_RK: NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """Sample one probe after each of the R random orders of a set that all queries share.

    Returns:
        A note for the store. texts: the queries; tokens: their mean length; sampling_tokens: tokens read and generated to sample
        them; sampled, unparsed, repeated, copied: counts, see `ProbingSet`.
    """
    task = texts.task
    prefixes = [texts.prefix(set_demos.demos(0, order)) for order in orders_RK]
    samples = sample_probes(
        reader,
        prefixes,
        opening=opening_of(task.prompt),
        separator=task.separator,
        # Every probe has these words, so the ban on repeated runs of tokens must not apply to them.
        words=_fixed_words(task.prompt) + task.separator + " ".join(task.label_texts()),
        seed=seed,
    )
    parsed = probing_set(samples, task.prompt, task.separator, demos=set_demos.rows)
    queries = [task.query_text(row_of(row)) for row in parsed.rows]
    count = reader.encoder.count
    counts = {name: getattr(parsed, name) for name in ("sampled", "unparsed", "repeated", "copied")}
    return {
        "texts": queries,
        "tokens": float(np.mean([count(text) for text in queries])) if queries else 0.0,
        "sampling_tokens": sum(count("".join(chunks)) for chunks in prefixes) + sum(count(text) for text in samples),
        **counts,
    }


def _fixed_words(template: str) -> str:
    """A template without its fields."""
    return "".join(piece.literal + (" " if piece.field is not None else "") for piece in pieces(template))


# From a sampled text to a query


@dataclass(frozen=True, kw_only=True)
class ProbingSet:
    """The probes from several sampled texts.

    Attributes:
        rows: the distinct queries, each as field → text, in the order of their first occurrence; `sparsort.values.row_of`
            makes a row of one.
        sampled: number of texts.
        unparsed: number of texts that are not a query.
        repeated: number of texts that repeated an earlier probe.
        copied: number of texts that copied a demonstration.
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
        samples: the sampled texts, at least one for each candidate order.
        prompt_template: format string of a query, such as "Question: {question}\\nAnswer:".
        separator: the text between two demonstrations.
        demos: rows whose copies are excluded. The prompt contains their answers, so they do not distinguish orders.
        ended: as in `parse_probe`, for all texts.

    Raises:
        SparsortError: the template or the separator is invalid.
    """
    names = list(dict.fromkeys(part.field for part in _split(prompt_template)[1]))
    demo_keys = {
        tuple((text_if_any(demo, name, where="a demonstration") or "").strip() for name in names) for demo in demos
    }
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    sampled = unparsed = repeated = copied = 0
    for sample in samples:
        sampled += 1
        probe = parse_probe(sample, prompt_template, separator, ended=ended)
        if probe is None:
            unparsed += 1
            continue
        key = tuple(probe[name] for name in names)
        copied += key in demo_keys
        repeated += key in rows
        if key not in demo_keys:
            rows.setdefault(key, probe)
    return ProbingSet(rows=list(rows.values()), sampled=sampled, unparsed=unparsed, repeated=repeated, copied=copied)


def parse_probe(text: str, prompt_template: str, separator: str, *, ended: bool = False) -> dict[str, str] | None:
    """The first query in a sampled text, as field → text, or None if the text does not begin with a query.

    A query is the words of the template in their order, with a text in each field. Spaces around the text and around fields
    are removed. The result is None if a field is empty, has two different values, or contains the separator or words of the
    template, so that another reading is possible; and if the last words of the template are missing, as in a text that was
    cut off. Anything may follow those words: a label, the separator, further queries.

    Args:
        text: the text that the model wrote after the last separator. If the prompt ended with `opening_of(prompt_template)`,
            put that in front.
        prompt_template: format string over the query's fields.
        separator: the text between two demonstrations.
        ended: whether the text ended by itself (at the separator or an end token, which may have been stripped), and not at
            a limit of length. This matters only if the template ends with a field.

    Raises:
        SparsortError: the template has no field, formats a field, or has two fields with nothing between them; or the separator
            is empty.
    """
    if not separator:
        raise SparsortError(
            "the separator is empty, so the end of a demonstration cannot be found. Pass one, such as '\\n\\n'."
        )
    opening, parts = _split(prompt_template)
    words = [literal for literal in (opening, *(part.literal for part in parts)) if literal.strip()]
    rest = text.lstrip()
    if not rest.startswith(opening.lstrip()):
        return None
    rest = rest.removeprefix(opening.lstrip())
    query: dict[str, str] = {}
    before = ""
    for field, literal in parts:
        end = _end_of_field(rest, literal, separator, ended=ended)
        if end is None:
            return None
        value = rest[:end].strip()
        if not value or query.setdefault(field, value) != value:
            return None
        # A literal of spaces only (`words` lacks it) may occur in a field, but not in the field that follows it: that field
        # could begin after either occurrence.
        if any(word in rest[:end] for word in words) or (before and before in rest[:end]):
            return None
        rest, before = rest[end + len(literal) :], literal
    # If the label contains words of the template, the query could also end there.
    label = rest.split(separator, 1)[0]
    return None if any(word in label for word in words) else query


def opening_of(prompt_template: str) -> str:
    """The words of the template before its first field, which prompt the model for a query.

    In the paper the model writes them itself; if the prompt ends with them, nearly every sample is a query.

    Raises:
        SparsortError: as `parse_probe`.
    """
    # A space at the end is part of the first token that the model writes.
    return _split(prompt_template)[0].rstrip(" ")


class _FieldAndLiteral(NamedTuple):
    """A field of a template, and the literal text up to the next field."""

    field: str
    literal: str


def _split(template: str) -> tuple[str, list[_FieldAndLiteral]]:
    """The words before the first field, and the fields, each with the words after it."""
    if not fields_of(template):
        raise SparsortError(
            f"the template {template!r} has no field, so it contains no query. Write a field as {{question}}."
        )
    opening, parts = "", list[_FieldAndLiteral]()
    for literal, field, spec, conversion in pieces(template):
        if not parts:
            opening += literal
        else:
            parts[-1] = parts[-1]._replace(literal=parts[-1].literal + literal)
        # Text after the last field.
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
                "cannot be found. Put some words between them, or take the probes from data."
            )
        parts.append(_FieldAndLiteral(field, ""))
    return opening, parts


def _end_of_field(rest: str, literal: str, separator: str, *, ended: bool) -> int | None:
    """The end of the field at the beginning of `rest`, or None if it cannot be determined."""
    if not literal:
        end = rest.find(separator)
        return end if end >= 0 else len(rest) if ended else None
    end = rest.find(literal)
    # A separator before the literal ends the demonstration, so the field is incomplete.
    if end < 0 or 0 <= rest.find(separator) < end:
        return None
    # Literals can overlap themselves: in "a:::b", the field before "::" may be "a" or "a:".
    second = rest.find(literal, end + 1)
    return None if 0 <= second < end + len(literal) else end
