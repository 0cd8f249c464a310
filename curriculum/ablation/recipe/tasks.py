"""Tasks: the templates of question and answer, the labels, and the judge of an answer.

Contract: a task is plain data, read from a TOML file (the built-in ones are in `task_files/`) or created from options. A query is
`query_text`. A demonstration is `query_text` followed directly by the answer template, filled with the row and with its label in
the words of `labels`. Mistakes within a task are reported when it is created, and mistakes between a task and its data by
`check_rows`, before any model runs.

A label whose text is the beginning of another's ("number", "number of") is allowed; see `Texts.answers`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

from sparsort.curriculum.ablation.recipe import tables
from sparsort.errors import SparsortError, did_you_mean, unknown_choice
from sparsort.paths import canonical, column_of
from sparsort.templates import fields_of, render
from sparsort.values import is_missing, missing_field, put, row_of, text_at

Row = Mapping[str, Any]
Judge = Literal["labels", "exact", "number", "math"]
JUDGES: tuple[str, ...] = get_args(Judge)

_LABEL_COLUMN = "The column of the label or answer is named by label (--label; in a task file, label = …)."
_LABEL_PATH = "A label (--label; in a task file, label = …) is written without braces."
_TASK_FILES = Path(__file__).parent / "task_files"
# A column with more distinct values than this contains free answers, not labels.
MOST_LABELS = 64
# The judges of answers that show their work, with the default of `max_new_tokens`.
_WORKED = {"number": 256, "math": 512}
# Fields that change no outcome: names, and where the data is.
_NOT_IN_DIGEST = ("name", "train", "test", "id_column", "columns")


class TaskOptions(TypedDict, total=False):
    """The fields of `Task` that `task_from_flags` passes on unchanged."""

    separator: str
    instruction: str
    chat: bool
    system: str | None
    train: str | None
    test: str | None
    id_column: str | None
    columns: Sequence[str] | None
    stop: Sequence[str]
    max_new_tokens: int
    content_free: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A few-shot task.

    Attributes:
        name: the name in reports.
        prompt: template of the question, such as "Question: {sentence}\\nType:".
        answer: template of the answer that follows it, such as " {label}". The field that `label` names is filled with the
            label's words. A generation task may use another field here (worked steps) than the one that is judged.
        label: the field of the gold label or gold answer: a column, or a path as in a template ("meta.label").
        labels: value in the data → words in the prompt, in the order of the label indices; None for generation.
        judge: "labels" if the most probable label is the answer; otherwise how generated text is compared with the gold
            answer: "exact", "number" (the number after ####, as in GSM8K) or "math" (mathematical equivalence).
        separator: the text between the instruction, the demonstrations and the query.
        instruction: the first block of the prompt, unless it is empty.
        chat: whether the prompt consists of user and assistant turns, rendered by the model's chat template.
        system: the system turn, for chat only.
        train, test: paths relative to the data folder. Without `test`, part of `train` is set aside.
        id_column: the field of a row's id; None for "id" if the rows have it, else the position.
        columns: the column names of CSV or TSV files without a header.
        stop: strings that end a generated answer and are cut off.
        max_new_tokens: the maximum number of generated tokens.
        content_free: inputs without content, for contextual calibration (arXiv 2102.09690).

    Raises:
        SparsortError: a template, a label or a number is invalid, or two settings exclude each other.
    """

    name: str
    prompt: str
    answer: str
    label: str = "label"
    labels: Mapping[str, str] | None = None
    judge: Judge = "labels"
    separator: str = "\n\n"
    instruction: str = ""
    chat: bool = False
    system: str | None = None
    train: str | None = None
    test: str | None = None
    id_column: str | None = None
    columns: tuple[str, ...] | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 32
    content_free: tuple[str, ...] = ("N/A", "", "[MASK]")

    def __post_init__(self) -> None:
        _refuse_function(self.prompt)
        tables.coerce(self, f"the task {self.name!r}")
        self._check_templates()
        self._check_labels()
        if self.system is not None and not self.chat:
            raise self._error("has a system turn, but chat is off. Turn chat on, or write it as the instruction.")
        if self.instruction and self.chat:
            raise self._error("has an instruction, but chat is on, where this is the system turn. Write it as system.")
        if self.max_new_tokens < 1:
            raise self._error(f"has max_new_tokens = {self.max_new_tokens}; at least 1 is needed.")
        if "" in self.stop:
            raise self._error("has an empty stop string, which would end every answer before it begins. Take it out.")

    def __hash__(self) -> int:
        # The generated hash would fail, because a mapping of labels is not hashable.
        return hash((self.name, self.prompt, self.answer))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the prompt, in the order of their use."""
        return tuple(fields_of(self.prompt))

    @property
    def is_generation(self) -> bool:
        """Whether answers are generated, rather than chosen among labels."""
        return self.labels is None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of every field that can change an outcome."""
        hashed = {name: value for name, value in tables.plain(self).items() if name not in _NOT_IN_DIGEST}
        # `sort_keys` would discard the order of the labels, which is that of their indices.
        hashed["labels"] = None if self.labels is None else list(self.labels.items())
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def label_names(self) -> list[str]:
        """The words of each label, (L,); empty for generation."""
        return [] if self.labels is None else list(self.labels.values())

    def label_texts(self) -> list[str]:
        """The text that follows the query for each label, (L,), such as " description"; empty for generation."""
        return [self._answer({}, words, "the label") for words in self.label_names()]

    def query_text(self, row: Row) -> str:
        """The text of a row up to its answer.

        Raises:
            SparsortError: the row lacks a field of the prompt.
        """
        return render(self.prompt, row, where=_name(row))

    def answer_text(self, row: Row) -> str:
        """The answer in a demonstration of this row."""
        return self._answer(row, self.gold_text(row), _name(row))

    def demo_text(self, row: Row) -> str:
        """A row as a demonstration: question and answer."""
        return self.query_text(row) + self.answer_text(row)

    def gold_text(self, row: Row) -> str:
        """The words of the row's gold label, or its gold answer.

        Raises:
            SparsortError: the row has no gold value, or one that is not among the labels.
        """
        return self._gold(row) if self.labels is None else self.label_names()[self.gold_index(row)]

    def gold_index(self, row: Row) -> int:
        """The index of the row's gold label; -1 for generation.

        Raises:
            SparsortError: as `gold_text`.
        """
        value = self._gold(row)
        if self.labels is None:
            return -1
        values = list(self.labels)
        if value not in self.labels:
            hint = did_you_mean(value, values)
            raise SparsortError(
                f"{_name(row)} has {value!r} in the field {self.label!r}, but the labels of the task {self.name!r} are: "
                f"{', '.join(map(repr, values))}.{hint} Add it to the labels, or remove the row."
            )
        return values.index(value)

    def check_row(self, row: Row, where: str) -> None:
        """Refuse a row whose question or label has no text.

        Args:
            row: the row.
            where: the row's name in an error, such as "data.jsonl: row 0 (line 1)".

        Raises:
            SparsortError: a field of the prompt, or the label, is missing or has no text.
        """
        check_row(row, where, prompt=self.prompt, label=self.label)

    def content_free_texts(self) -> list[str]:
        """The queries of contextual calibration: for each content-free input, the prompt with this input in every field."""
        return [
            render(self.prompt, row_of(dict.fromkeys(self.fields, text)), where=f"the content-free input {text!r}")
            for text in self.content_free
        ]

    def _answer(self, row: Row, words: str, where: str) -> str:
        if self.labels is None:
            # A demonstration of a generation task shows the row's own text; `words` is the part that the judge compares.
            _check_label_column(row, self.label, where)
            return render(self.answer, row, where=where)
        return render(self.answer, put(row, self.label, words), where=where)

    def _gold(self, row: Row) -> str:
        return _label_text(row, self.label, _name(row))

    def _check_templates(self) -> None:
        in_prompt, in_answer, label = fields_of(self.prompt), fields_of(self.answer), canonical(self.label)
        if not in_prompt:
            raise self._error(
                f"has the prompt {self.prompt!r}, which names no field of the data, so all queries would be the same. "
                "Put a field's name in braces, for example 'Question: {question}\\nAnswer:'."
            )
        if label in in_prompt:
            raise self._error(
                f"has the label field {self.label!r} in its prompt {self.prompt!r}, which gives the answer away. "
                "Name it in the answer only."
            )
        if not in_answer or (self.judge == "labels" and label not in in_answer):
            raise self._error(
                f"has the answer template {self.answer!r} without its field: write {{{label}}} in place of the answer, "
                f"for example ' {{{label}}}'."
            )
        if self.judge == "labels" and len(in_answer) > 1:
            others = ", ".join(repr(name) for name in in_answer if name != label)
            raise self._error(
                f"has {others} in its answer template {self.answer!r}. The scored text may depend on the label only: keep "
                f"{{{label}}} and fixed words."
            )
        # Rendering reports fields that a content-free text cannot fill.
        self.content_free_texts()

    def _check_labels(self) -> None:
        if self.judge != "labels":
            if self.labels is not None:
                raise self._error(f"has labels, but the judge {self.judge!r} reads generated text. Use judge 'labels'.")
            return
        if not self.labels:
            raise self._error(
                "has no labels. Give value = words for each, or the judge 'exact', 'number' or 'math' for generation."
            )
        if len(self.labels) < 2:
            raise self._error(
                f"has the single label {next(iter(self.labels))!r}, and a classification needs at least two. Give rows of "
                "every label, or name the labels (labels=, --labels)."
            )
        value_of: dict[str, str] = {}
        for value, words in self.labels.items():
            if not words.strip():
                raise self._error(
                    f"gives the value {value!r} an empty text. Give it the words that the prompt should contain."
                )
            if words.strip() in value_of:
                raise self._error(
                    f"gives the values {value_of[words.strip()]!r} and {value!r} the same text {words.strip()!r}, so no "
                    "prediction could tell them apart. Give each its own."
                )
            value_of[words.strip()] = value

    def _error(self, mistake: str) -> SparsortError:
        return SparsortError(f"the task {self.name!r} {mistake}")


def task_names() -> list[str]:
    """The names of the built-in tasks."""
    return sorted(path.stem for path in _TASK_FILES.glob("*.toml"))


def load_task(name: str | Path | Task) -> Task:
    """Load a built-in task by its name, or a task from a TOML file.

    Raises:
        SparsortError: there is no such task or file, or it is invalid.
    """
    if isinstance(name, Task):
        return name
    path = _TASK_FILES / f"{name}.toml" if str(name) in task_names() else Path(name).expanduser()
    if path.suffix != ".toml":
        raise unknown_choice("task", str(name), [*task_names(), "<a file>.toml"])
    table = tables.read(path)
    # A task file may omit the name.
    return tables.build(Task, {"name": path.stem, **table}, kind="task", where=path.name)


def task_from_flags(
    rows: Iterable[Row],
    *,
    prompt: str,
    answer: str | None = None,
    label: str = "label",
    labels: str | Mapping[str, str] | None = None,
    judge: Judge = "labels",
    name: str = "data",
    **options: Unpack[TaskOptions],
) -> Task:
    """Create a task for any dataset.

    Args:
        rows: the training rows, from which labels are taken if none are given.
        prompt: template of the question.
        answer: template of the answer; by default a space and the label.
        label: the field of the gold label or gold answer.
        labels: "0=negative,1=positive", or a mapping from value to words. None uses every value of the data as its own words,
            sorted as numbers if all are whole numbers, else as text. Only for the judge "labels".
        judge: as `Task.judge`.
        name: the name in reports.
        options: the other fields of `Task`. Answers for the judges "number" and "math" have several lines. Their default stop
            string is therefore the beginning of the next question (the separator if the prompt begins with a field; none in
            chat), and the default of `max_new_tokens` is 256 and 512.

    Raises:
        SparsortError: as `Task`, or the label field is missing or has too many values for labels.
    """
    _refuse_function(prompt)
    if isinstance(labels, str):
        labels = parse_labels(labels)
    if judge == "labels" and labels is None:
        labels = {value: value for value in _discover(rows, label)}
    table: dict[str, Any] = {
        "name": name,
        "prompt": prompt,
        "answer": answer or f" {{{canonical(label)}}}",
        "label": label,
        "judge": judge,
    }
    if judge in _WORKED:
        # The words before the first field begin the next question, should the model write one.
        opening = prompt.partition("{")[0].strip()
        # In chat the model ends its own turn. The separator is no stop string there, because worked answers have empty lines.
        stop = () if options.get("chat") else (f"\n{opening}" if opening else options.get("separator", "\n\n"),)
        table |= {"max_new_tokens": _WORKED[judge], "stop": stop}
    return tables.build(Task, {**table, "labels": labels, **options}, kind="task", where="the flags")


def _refuse_function(prompt: object) -> None:
    if callable(prompt):
        raise SparsortError(
            "the prompt is a function, but a task is stored as data, so its prompt is a format string. Put the text of the "
            "function into a column of the data, such as 'question', and pass prompt='{question}'."
        )


def parse_labels(text: str) -> dict[str, str]:
    """Parse labels written as "0=negative,1=positive". A value without "=" is its own words.

    Raises:
        SparsortError: a value is given twice, or one side is empty.
    """
    labels: dict[str, str] = {}
    for part in text.split(","):
        value, equals, words = (side.strip() for side in part.partition("="))
        words = words if equals else value
        if not value or not words:
            raise SparsortError(
                f"the labels {text!r} contain {part!r}, in which the value or its words are empty. "
                "Write value=words, separated by commas: 0=negative,1=positive."
            )
        if value in labels:
            raise SparsortError(f"the labels {text!r} give the value {value!r} twice. Give it once.")
        labels[value] = words
    return labels


def check_row(row: Row, where: str, *, prompt: str, label: str) -> None:
    """The same as `Task.check_row`, for callers that have no task yet."""
    _label_text(row, label, where)
    render(prompt, row, where=where)


def check_rows(task: Task, rows: Sequence[Row], noun: str = "the data") -> list[str]:
    """Check that every row fits the task, and that the labels are plausible.

    Args:
        task: the task.
        rows: its rows.
        noun: a name for the rows in messages ("the test rows").

    Returns:
        Warnings, one sentence each: only one label occurs, or some label never does.

    Raises:
        SparsortError: there are no rows, a row lacks a field, or its gold value is empty or not among the labels.
    """
    if not rows:
        raise SparsortError(f"{noun} of the task {task.name!r} are empty. Give at least one row.")
    counts: Counter[str] = Counter()
    for row in rows:
        # Rendering is the check that every field is there.
        task.demo_text(row)
        gold = task.gold_text(row)
        if not gold.strip():
            raise SparsortError(f"{_name(row)} has an empty answer in the field {task.label!r}. Remove the row.")
        counts[gold] += 1
    if task.is_generation:
        return []
    if len(counts) == 1:
        only = next(iter(counts))
        return [
            f"{noun} of the task {task.name!r} have only the label {only!r}, so a model that always predicts it is always right. "
            "Some public copies of test splits, SST-2's among them, have a placeholder instead of labels."
        ]
    absent = [repr(words) for words in task.label_names() if words not in counts]
    return [f"{noun} of the task {task.name!r} have no row of the label {', '.join(absent)}."] if absent else []


def _discover(rows: Iterable[Row], label: str) -> list[str]:
    """The distinct values of the label field, in ascending order."""
    values: dict[str, None] = {}
    for position, row in enumerate(rows):
        values.setdefault(_label_text(row, label, _name(row, position)))
        if len(values) > MOST_LABELS:
            raise SparsortError(
                f"the field {label!r} has more than {MOST_LABELS} different values, so it does not look like a label. "
                "For free answers choose the judge 'exact', 'number' or 'math'; for labels name each of them."
            )
    return sorted(values, key=int if all(value.removeprefix("-").isdecimal() for value in values) else None)


def _label_text(row: Row, label: str, where: str) -> str:
    _check_label_column(row, label, where)
    return text_at(row, label, where=where, way_out=_LABEL_PATH)


def _check_label_column(row: Row, label: str, where: str) -> None:
    if column_of(canonical(label)) not in row:
        raise SparsortError(f"{missing_field(label, row, where)} {_LABEL_COLUMN}")


def _name(row: Row, position: int | None = None) -> str:
    given = row.get("id")
    given = position if is_missing(given) else given
    return "a row without an id" if given is None else f"row {given!r}"
