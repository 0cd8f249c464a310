"""A pool of demonstrations with what every query needs of it, made once: texts, fingerprints, the word index.

Contract: rows are copied at the start and do not change. What a query is compared by is its input: the fields of the
prompt template where one is given; else a function of the row; else the text fields that the query and the pool share,
without `id`, `label` and `answer`. The answer takes no part, so a query that carries its own cannot find its way by it.

Leaks: of a template's fields every one must leak. Without a template nothing says which field is the question, so one
is enough: a row is left out where any of its text fields is a bare query, or where a text field that it shares with a
query is the same or nearly so. Not told apart by such a field, and so passed over unless all fields leak: a field that
is the same in every row, and in a query with fields a value of under three words, such as a category.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sparsort.curriculum.demos.pool.fingerprints import Fingerprints, fingerprints, tokens
from sparsort.curriculum.demos.pool.leaks import Leak, leaks_of
from sparsort.curriculum.demos.pool.rows import ANSWER_FIELDS, Row, TextOf, id_of, name_of, text_fields, text_of
from sparsort.curriculum.demos.pool.similarity import WordIndex
from sparsort.errors import SparsortError
from sparsort.paths import column_of, spell
from sparsort.templates import fields_of
from sparsort.values import text_if_any

Query = Mapping[str, Any] | str
InputTexts = dict[str, str]
T = TypeVar("T")

# A function's result has no field name; no template can name this.
_WHOLE = ""
# A value of fewer says what kind of row it is ("math", "grade 3"), not which.
_TELLING_WORDS = 3


class DemoPool:
    """Rows to choose demonstrations from. Keep one for many queries: `select_demos(pool, query, k)`.

    Embeddings and scores that are given again as the same object are read once, so do not change them in between.

    Args:
        rows: the rows, as a list or a dataset.
        prompt: the prompt template; its fields are the input that a query is compared by.
        text: instead, a function from a row to the text that it is compared by.
        label: the field that holds the label, excluded from the comparison; a column, or a path as in a template.
        ids: each row's id as text; by default its field "id", or else its position.

    Raises:
        SparsortError: both `prompt` and `text` are given, or the template names no field.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        prompt: str | None = None,
        text: TextOf | None = None,
        label: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        if prompt is not None and text is not None:
            raise SparsortError("prompt= and text= both say what a query is compared by. Give one of them.")
        self.rows: list[dict[str, Any]] = [dict(row) for row in rows]
        self._has_ids = ids is not None
        self.ids = [id_of(row, at) for at, row in enumerate(self.rows)] if ids is None else list(ids)
        self.label = label
        self._fields = None if prompt is None else input_fields(prompt)
        self._text = text
        self._texts: dict[str, list[str]] = {}
        self._prints: dict[str, Fingerprints] = {}
        self._words: dict[tuple[str, ...], WordIndex] = {}
        self._columns: dict[str, Fingerprints] | None = None
        self._kept: dict[str, tuple[object, tuple[Hashable, ...], Any]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        """What an error calls a row."""
        if self._has_ids:
            return f"demonstration {self.ids[position]!r}"
        return name_of(self.rows[position], position)

    def input_of(self, query: Query) -> InputTexts:
        """The texts of a query that are compared to the pool's, by field.

        Raises:
            SparsortError: a field of the prompt is missing, or query and pool share no text field.
        """
        if isinstance(query, str):
            return {_WHOLE if self._fields is None else only_field(self._fields): query}
        if self._text is not None:
            return {_WHOLE: self._text(query)}
        fields = self._fields
        if fields is None:
            names = text_fields(query, self._hidden())
            fields = [spell([name]) for name in names if not self.rows or name in self.rows[0]]
        if not fields:
            has = ", ".join(map(str, self.rows[0])) if self.rows else "no rows"
            raise SparsortError(
                f"the query ({', '.join(map(str, query)) or 'no fields'}) and the pool ({has}) share no text field to "
                "compare by. Give the prompt template as prompt=, or a function from a row to its text as text=."
            )
        return {field: field_text(query, field, "the query") for field in fields}

    def leaks(self, inputs: InputTexts) -> list[Leak]:
        """The rows that are the query itself or nearly so, or without a template one field of it."""
        found = {leak.demo: leak for leak in self._leaks_of_all(inputs)}
        if self._fields is None and self._text is None:
            for field, text, prints in self._single_fields(inputs):
                for leak in leaks_of([(fingerprints([text]), 0, prints)]):
                    found.setdefault(leak.demo, dataclasses.replace(leak, field=field))
        return [found[demo] for demo in sorted(found)]

    def kept(self, name: str, source: object, make: Callable[[], T], *options: Hashable) -> T:
        """What `make` gives for `source`, made again only for another object or other options; the last one is held."""
        held = self._kept.get(name)
        if held is None or held[0] is not source or held[1] != options:
            held = self._kept[name] = (source, options, make())
        value: T = held[2]
        return value

    def word_scores(self, inputs: InputTexts) -> Any:
        """BM25 of every row for the query, (N,)."""
        fields = tuple(inputs)
        if fields not in self._words:
            columns = [self._column(field) for field in fields]
            self._words[fields] = WordIndex(["\n".join(parts) for parts in zip(*columns, strict=True)])
        return self._words[fields].scores("\n".join(inputs.values()))

    def _leaks_of_all(self, inputs: InputTexts) -> list[Leak]:
        return leaks_of([(fingerprints([text]), 0, self._fingerprints(field)) for field, text in inputs.items()])

    def _single_fields(self, inputs: InputTexts) -> list[tuple[str, str, Fingerprints]]:
        """The fields that can give a query away alone: name, the query's text for it, the pool's fingerprints."""
        if _WHOLE in inputs:
            single = [(field, inputs[_WHOLE], prints) for field, prints in self._text_columns().items()]
        else:
            single = [
                (field, text, self._fingerprints(field))
                for field, text in inputs.items()
                if len(tokens(text)) >= _TELLING_WORDS
            ]
        return [
            (field, text, prints)
            for field, text, prints in single
            if len(prints) == 1 or (prints.exact != prints.exact[:1]).any()
        ]

    def _text_columns(self) -> dict[str, Fingerprints]:
        """The fingerprints of every text field that some row has, blank where a row has none."""
        if self._columns is None:
            texts = [{spell([name]): row[name] for name in text_fields(row, self._hidden())} for row in self.rows]
            names = dict.fromkeys(field for fields in texts for field in fields)
            self._columns = {name: fingerprints([fields.get(name, "") for fields in texts]) for name in names}
        return self._columns

    def _hidden(self) -> set[str]:
        return {*ANSWER_FIELDS, *([column_of(self.label)] if self.label else [])}

    def _column(self, field: str) -> list[str]:
        if field not in self._texts:
            if field != _WHOLE:
                texts = [field_text(row, field, self.name(position)) for position, row in enumerate(self.rows)]
            elif self._text is not None:
                texts = [self._text(row) for row in self.rows]
            else:
                texts = [text_of(row, position, self._hidden()) for position, row in enumerate(self.rows)]
            self._texts[field] = texts
        return self._texts[field]

    def _fingerprints(self, field: str) -> Fingerprints:
        if field not in self._prints:
            self._prints[field] = fingerprints(self._column(field))
        return self._prints[field]


def input_fields(prompt: str) -> list[str]:
    """The fields of a prompt template, which are a row's input.

    Raises:
        SparsortError: the template names no field, so that every prompt would be the same.
    """
    fields = fields_of(prompt)
    if not fields:
        raise SparsortError(
            f"the prompt {prompt!r} names no field of the data, so every row would read alike. "
            "Put a field's name in braces, for example 'Question: {question}\\nAnswer:'."
        )
    return fields


def only_field(fields: Sequence[str]) -> str:
    """The field that a query given as bare text fills.

    Raises:
        SparsortError: the prompt has several.
    """
    if len(fields) > 1:
        raise SparsortError(
            f"the query is bare text, but the prompt has the fields {', '.join(fields)}. "
            "Pass the query as a mapping from field to value. Braces that are meant literally are doubled: {{ and }}."
        )
    return fields[0]


def field_text(row: Row, field: str, where: str) -> str:
    """One field of a row as text.

    Raises:
        SparsortError: the row lacks it, or it has no text of its own.
    """
    text = text_if_any(row, field, where=where)
    if text is None:
        raise SparsortError(
            f"{where} has no value in the field {field!r}, which it is compared by; "
            f"it has: {', '.join(map(str, row)) or 'no fields'}."
        )
    return text


def leaking_rows(demos: Sequence[Row], query: Row, fields: Sequence[str]) -> list[Leak]:
    """The demonstrations that are the query itself or nearly so, by the given input fields."""
    pool = [dict(row) for row in demos]
    pairs = []
    for field in fields:
        texts = [field_text(row, field, name_of(row, position)) for position, row in enumerate(pool)]
        pairs.append((fingerprints([field_text(query, field, "the query")]), 0, fingerprints(texts)))
    return leaks_of(pairs)
