"""A pool of demonstrations, with everything that all queries share and that is computed once: texts, fingerprints, word index.

Contract: rows are copied at the start and do not change. A query is compared by its input: the fields of the prompt template if
there is one; or else a function of the row; or else the text fields that the query and the pool share, without `id`, `label` and
`answer`. With a prompt function, the input is the columns that it reads. If it reads no column of text, or different columns from
different rows, the prompts that it writes are compared. The answer takes no part, so a query whose row contains its answer gains
nothing from it.

Leaks: if there is a template, all of its fields must leak. Without a template, nothing says which field is the question, so one
field is enough: a row is excluded if one of its text fields is the bare query, or if it shares a text field with the query that
is the same or nearly so. Some fields cannot identify a row and are ignored unless all fields leak: a field that is the same in
every row, and, in a query with fields, a value of fewer than three words, such as a category.

Shapes: N rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from sparsort.curriculum.demos.pool.fingerprints import Fingerprints, fingerprints, tokens
from sparsort.curriculum.demos.pool.leaks import Leak, leaks_of
from sparsort.curriculum.demos.pool.rows import (
    ANSWER_FIELDS,
    ID_FIELD,
    Row,
    TextOf,
    id_of,
    name_of,
    text_fields,
    text_of,
)
from sparsort.curriculum.demos.pool.similarity import WordIndex
from sparsort.errors import SparsortError
from sparsort.paths import column_of, spell
from sparsort.scoring.data.rows import rows_of
from sparsort.scoring.prompts.functions import function_of
from sparsort.scoring.prompts.types import PromptWriter
from sparsort.templates import pieces, render
from sparsort.values import has_text, is_missing, text_if_any, value_at

Query = Mapping[str, Any] | str
InputTexts = dict[str, str]
T = TypeVar("T")

# Used in place of a field's name for the whole text of a row. No template can name it.
_WHOLE = ""
# A value with fewer words says what kind of row it is ("math", "grade 3"), and not which row.
_IDENTIFYING_WORDS = 3


class DemoPool:
    """Rows from which demonstrations are chosen. Keep one for many queries: `select_demos(pool, query, k)`.

    Embeddings and scores that are passed again as the same object are read only once, so do not modify them in between.

    Args:
        rows: the rows, in any form that `open_rows` reads.
        prompt: the prompt template, or a function from a row to its prompt; the fields that it reads are the input by which a
            query is compared.
        text: alternatively, a function from a row to the text by which it is compared.
        label: the field that contains the label, excluded from the comparison; a column, or a path as in a template.
        ids: each row's id as text; by default its field "id", or else its position.

    Raises:
        SparsortError: both `prompt` and `text` are given, or the template names no field.
    """

    def __init__(
        self,
        rows: Any,
        *,
        prompt: str | PromptWriter | None = None,
        text: TextOf | None = None,
        label: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        if prompt is not None and text is not None:
            raise SparsortError("prompt= and text= both say how a query is compared. Pass one of them.")
        self.rows: list[dict[str, Any]] = [dict(row) for row in rows_of(rows)]
        self._has_ids = ids is not None
        self.ids = [id_of(row, position) for position, row in enumerate(self.rows)] if ids is None else list(ids)
        self.label = label
        self._function = function = function_of(prompt)
        # None for a function means that whole prompts are compared.
        self._fields: list[str] | None = None if prompt is None else input_fields(prompt, self.rows, label) or None
        self._text = text
        if function is not None:
            self._text = lambda row: function.question(row, where="a demonstration or the query")
        # Name → the source object, the options, and the result that they gave.
        self._results: dict[Hashable, tuple[object, tuple[Hashable, ...], Any]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        """The name of a row in error messages."""
        return f"demonstration {self.ids[position]!r}" if self._has_ids else name_of(self.rows[position], position)

    def input_of(self, query: Query) -> InputTexts:
        """The texts of a query that are compared with those of the pool, by field.

        Raises:
            SparsortError: a field of the prompt is missing, or the query and the pool share no text field.
        """
        if isinstance(query, str):
            return {_WHOLE if self._fields is None else only_field(self._fields): query}
        fields = self._fields
        if self._function is not None and fields is not None:
            # An error of the function names the query, since its call comes first.
            self._function.write(query, where="the query")
            shared = input_fields(self._function, [query, *self.rows[:1]], self.label)
            fields = [field for field in fields if field in shared] or None
        if fields is None and self._text is not None:
            return {_WHOLE: self._text(query)}
        if fields is None:
            # The first row represents the pool, so that a query can be checked without reading all rows.
            names = text_fields(query, self._answer_columns)
            shared = [spell([name]) for name in names if not self.rows or name in self.rows[0]]
            if not shared:
                columns = ", ".join(map(str, self.rows[0])) if self.rows else "no rows"
                raise SparsortError(
                    f"the query ({', '.join(map(str, query)) or 'no fields'}) and the pool ({columns}) share no text field to "
                    "compare by. Pass the prompt template as prompt=, or a function from a row to its text as text=."
                )
            fields = shared
        return {field: field_text(query, field, "the query") for field in fields}

    def leaks(self, inputs: InputTexts) -> list[Leak]:
        """The rows that are the query itself or nearly so, or, without a template, that share an identifying field with it."""
        whole = leaks_of([(fingerprints([text]), 0, self._fingerprints(field)) for field, text in inputs.items()])
        by_row = {leak.demo: leak for leak in whole}
        if self._fields is None and self._text is None:
            for field, text, prints in self._identifying_fields(inputs):
                for leak in leaks_of([(fingerprints([text]), 0, prints)]):
                    by_row.setdefault(leak.demo, dataclasses.replace(leak, field=field))
        return [by_row[row] for row in sorted(by_row)]

    def shown_text(self, position: int) -> str:
        """The text of a row that a prompt shows: the input by which it is compared, the label and the answer; without a prompt,
        all text fields except the id.

        Raises:
            SparsortError: no field has a text.
        """
        row = self.rows[position]
        if self._fields is None and self._function is None:
            return text_of(row, position)
        answers = [spell([name]) for name in row if name in ANSWER_FIELDS]
        fields = dict.fromkeys([*(self._fields or []), *([] if self.label is None else [self.label]), *answers])
        texts = [_text_if_any(row, field, self.name(position)) for field in fields]
        if self._fields is None and self._text is not None:
            texts.insert(0, self._text(row))
        return "\n".join(text for text in texts if text is not None)

    def cached(self, name: Hashable, source: object, make: Callable[[], T], *options: Hashable) -> T:
        """The result of `make`, which is called again only for another `source` object or other options.

        Only the last result under each name is kept.
        """
        last = self._results.get(name)
        # Compared by identity: a comparison of arrays would read all of their elements.
        if last is None or last[0] is not source or last[1] != options:
            last = self._results[name] = (source, options, make())
        result: T = last[2]
        return result

    def word_scores(self, inputs: InputTexts) -> Any:
        """The BM25 score of each row for the query, (N,)."""

        def index() -> WordIndex:
            columns = [self._texts(field) for field in inputs]
            return WordIndex(["\n".join(texts) for texts in zip(*columns, strict=True)])

        # One index over all fields of the input, since a word of the query may occur in another field of a row.
        return self.cached(("words", *inputs), None, index).scores("\n".join(inputs.values()))

    def _identifying_fields(self, inputs: InputTexts) -> list[tuple[str, str, Fingerprints]]:
        """The fields that can identify the query alone: name, the query's text for it, the fingerprints of the pool's texts."""
        if _WHOLE in inputs:
            # A bare query may be the value of any field.
            single = [(field, inputs[_WHOLE], prints) for field, prints in self._text_columns.items()]
        else:
            single = [
                (field, text, self._fingerprints(field))
                for field, text in inputs.items()
                if len(tokens(text)) >= _IDENTIFYING_WORDS
            ]
        return [
            (field, text, prints)
            for field, text, prints in single
            if len(prints) == 1 or (prints.exact != prints.exact[:1]).any()
        ]

    @functools.cached_property
    def _text_columns(self) -> dict[str, Fingerprints]:
        """The fingerprints of every text field that at least one row has; a row without the field has an empty text."""
        texts = [{spell([name]): row[name] for name in text_fields(row, self._answer_columns)} for row in self.rows]
        names = dict.fromkeys(field for fields in texts for field in fields)
        return {name: fingerprints([fields.get(name, "") for fields in texts]) for name in names}

    @functools.cached_property
    def _answer_columns(self) -> set[str]:
        return {*ANSWER_FIELDS, *([column_of(self.label)] if self.label else [])}

    def _texts(self, field: str) -> list[str]:
        return self.cached(("texts", field), None, lambda: self._read_texts(field))

    def _read_texts(self, field: str) -> list[str]:
        """The text of each row in a field, or its whole text."""
        if field != _WHOLE:
            return [field_text(row, field, self.name(position)) for position, row in enumerate(self.rows)]
        if self._text is not None:
            return [self._text(row) for row in self.rows]
        return [text_of(row, position, self._answer_columns) for position, row in enumerate(self.rows)]

    def _fingerprints(self, field: str) -> Fingerprints:
        return self.cached(("fingerprints", field), None, lambda: fingerprints(self._texts(field)))


def input_fields(prompt: str | PromptWriter, rows: Sequence[Row] = (), label: str | None = None) -> list[str]:
    """The fields of a prompt template, or those that a prompt function reads, which are the input of a row.

    Args:
        prompt: the template or the function.
        rows: the rows, for a function.
        label: the field of the label, which a function does not share with a query.

    Returns:
        For a template, its fields, each with its conversion, as in "tags!r". For a function, the columns that it reads and that
        all rows have as text; none if it reads different columns from different rows, so that only the prompts that it writes
        can be compared.

    Raises:
        SparsortError: the template names no field, so that all prompts would be the same; or the function fails.
    """
    if (function := function_of(prompt)) is not None:
        hidden = {ID_FIELD, *ANSWER_FIELDS, *([column_of(label)] if label else [])}
        reads = {_read(function.columns_read(row, where=name_of(row, at)), hidden) for at, row in enumerate(rows)}
        if len(reads) != 1:
            return []
        (read,) = reads
        names = [name for name in rows[0] if name not in hidden and (read is None or name in read)]
        return [spell([name]) for name in names if all(_has_text(row.get(name)) for row in rows)]
    shown = [piece for piece in pieces(str(prompt)) if piece.field is not None]
    fields = list(dict.fromkeys(f"{each.field}{f'!{each.conversion}' if each.conversion else ''}" for each in shown))
    if not fields:
        raise SparsortError(
            f"the prompt {prompt!r} names no field of the data, so every row would read alike. "
            "Put a field's name in braces, for example 'Question: {question}\\nAnswer:'."
        )
    return fields


def only_field(fields: Sequence[str]) -> str:
    """The field into which a query that is bare text goes.

    Raises:
        SparsortError: the prompt has several fields.
    """
    names = list(dict.fromkeys(_piece(field)[0] for field in fields))
    if len(names) > 1:
        raise SparsortError(
            f"the query is bare text, but the prompt has the fields {', '.join(names)}. "
            "Pass the query as a mapping from field to value. Double braces that are meant literally: {{ and }}."
        )
    return names[0]


def field_text(row: Row, field: str, where: str) -> str:
    """The text of one field of a row; with a conversion after the field, as in "tags!r", the text that a template shows.

    Raises:
        SparsortError: the row lacks the field, or its value has no text of its own.
    """
    text = _text_if_any(row, field, where)
    if text is None:
        raise SparsortError(
            f"{where} has no value in the field {_piece(field)[0]!r}, by which it is compared; "
            f"it has: {', '.join(map(str, row)) or 'no fields'}."
        )
    return text


def _text_if_any(row: Row, field: str, where: str) -> str | None:
    name, conversion = _piece(field)
    if conversion is None:
        return text_if_any(row, name, where=where)
    if column_of(name) not in row or is_missing(value_at(row, name, where=where)):
        return None
    return render(f"{{{field}}}", row, where=where)


def _piece(field: str) -> tuple[str, str | None]:
    """A field of `input_fields`, as the name of the field and its conversion."""
    (piece,) = pieces(f"{{{field}}}")
    return str(piece.field), piece.conversion


def _read(columns: set[str] | None, hidden: set[str]) -> frozenset[str] | None:
    return None if columns is None else frozenset(columns - hidden)


def _has_text(value: Any) -> bool:
    return not is_missing(value) and has_text(value)


def leaking_rows(demos: Sequence[Row], query: Row, fields: Sequence[str]) -> list[Leak]:
    """The demonstrations that are the query itself or nearly so, by the given input fields."""
    pairs = []
    for field in fields:
        texts = [field_text(row, field, name_of(row, position)) for position, row in enumerate(demos)]
        pairs.append((fingerprints([field_text(query, field, "the query")]), 0, fingerprints(texts)))
    return leaks_of(pairs)
