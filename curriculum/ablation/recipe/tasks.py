"""Tasks: what a row's question and answer look like in a prompt, which answers there are, and who judges them.

Contract: a task is data, read from a TOML file (ready ones stand in `task_files/`) or made from flags. A demonstration
is `query_text` and, directly behind it, the answer template filled with the row, its label in the words of `labels`; a
query is `query_text` alone. Everything that can be wrong with a task is said when it is made, and everything that can
be wrong between a task and its data by `check_rows`, before any model runs.

A label whose text begins another's ("number", "number of") is allowed: what follows it decides, see `texts.Texts`.
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
_READY = Path(__file__).parent / "task_files"
# More different values than this in a label column are answers, not labels.
MOST_LABELS = 64
# Judges of answers that show their work, and the most tokens of such an answer.
_WORKED = {"number": 256, "math": 512}
# Where the data lies and what it is called there change no outcome.
_NOT_IN_DIGEST = ("name", "train", "test", "id_column", "columns")


class TaskOptions(TypedDict, total=False):
    """The fields of `Task` that `task_from_flags` passes on as they are."""

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
        name: what reports call it.
        prompt: format string of a row's question, such as "Question: {sentence}\\nType:".
        answer: format string of what follows it, such as " {label}". The field named by `label` is filled with the
            label's words; a generation task may show another field here (worked steps) than the one that is judged.
        label: the field that holds the gold label, or the gold answer: a column, or a path as in a template ("meta.label").
        labels: value in the data to words in the prompt, in the order of the label indices; None for generation.
        judge: "labels" (the most probable one is the answer), or how generated text is compared with the gold answer:
            "exact", "number" (GSM8K's, behind ####) or "math" (equivalence).
        separator: what stands between the instruction, the demonstrations and the query.
        instruction: the first block of the prompt; none where it is empty.
        chat: make user and assistant turns of it, by the model's chat template.
        system: the system turn; in chat only.
        train, test: files below the data folder; without `test` a part of `train` is set aside.
        id_column: the field of a row's id; None for "id" where there is one, else the position.
        columns: names of the columns of the files, if these are CSV or TSV without a header.
        stop: generation ends where one of these begins, and it is cut off.
        max_new_tokens: generation ends after as many.
        content_free: inputs without content, for contextual calibration (arXiv 2102.09690).
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
        tables.coerce(self, f"the task {self.name!r}")
        self._check_templates()
        self._check_labels()
        if self.system is not None and not self.chat:
            raise self._error("has a system turn, but chat is off. Turn chat on, or write it as the instruction.")
        if self.instruction and self.chat:
            raise self._error("has an instruction, but chat is on, where it is the system turn. Write it as system.")
        if self.max_new_tokens < 1:
            raise self._error(f"has max_new_tokens = {self.max_new_tokens}; at least 1 is needed.")
        if "" in self.stop:
            raise self._error("has an empty stop string, which would end every answer before it begins. Take it out.")

    def __hash__(self) -> int:
        return hash((self.name, self.prompt, self.answer))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the question, in the order of their use."""
        return tuple(fields_of(self.prompt))

    @property
    def is_generation(self) -> bool:
        """Whether answers are generated text rather than one of some labels."""
        return self.labels is None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that changes an outcome: not the name, nor where the data lies."""
        told = {name: value for name, value in tables.plain(self).items() if name not in _NOT_IN_DIGEST}
        told["labels"] = None if self.labels is None else list(self.labels.items())
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def label_names(self) -> list[str]:
        """The words of each label, (L,); empty for generation."""
        return [] if self.labels is None else list(self.labels.values())

    def label_texts(self) -> list[str]:
        """What stands behind the query for each label, (L,), such as " description"; empty for generation."""
        return [self._answer({}, words, "the label") for words in self.label_names()]

    def query_text(self, row: Row) -> str:
        """The question of a row, up to where its answer begins.

        Raises:
            SparsortError: the row lacks a field of the prompt.
        """
        return render(self.prompt, row, where=_name(row))

    def answer_text(self, row: Row) -> str:
        """What a demonstration of this row shows behind its question."""
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
                f"{_name(row)} has {value!r} in the field {self.label!r}, which is none of the values that the task "
                f"{self.name!r} gives words to: {', '.join(map(repr, values))}.{hint} "
                "Add it to the labels, or leave the row out."
            )
        return values.index(value)

    def check_row(self, row: Row, where: str) -> None:
        """Refuse a row whose question or label has no text.

        Args:
            row: the row.
            where: what the row is called in an error, such as "data.jsonl: row 0 (line 1)".

        Raises:
            SparsortError: a field of the prompt, or the label, is missing or has no text of its own.
        """
        check_row(row, where, prompt=self.prompt, label=self.label)

    def content_free_texts(self) -> list[str]:
        """The question with every field filled with each content-free input."""
        return [
            render(self.prompt, row_of(dict.fromkeys(self.fields, text)), where=f"the content-free input {text!r}")
            for text in self.content_free
        ]

    def _answer(self, row: Row, words: str, where: str) -> str:
        # Generation shows the row's own field, which the judge may read otherwise than it stands there.
        if self.labels is None:
            _check_label_column(row, self.label, where)
        filled = row if self.labels is None else put(row, self.label, words)
        return render(self.answer, filled, where=where)

    def _gold(self, row: Row) -> str:
        return _label_text(row, self.label, _name(row))

    def _check_templates(self) -> None:
        asked, shown, label = fields_of(self.prompt), fields_of(self.answer), canonical(self.label)
        if not asked:
            raise self._error(
                f"has the prompt {self.prompt!r}, which names no field of the data, so every query would read alike. "
                "Put a field's name in braces, for example 'Question: {question}\\nAnswer:'."
            )
        if label in asked:
            raise self._error(
                f"has the label field {self.label!r} in its prompt {self.prompt!r}, which gives the answer away. "
                "Name it in the answer only."
            )
        if not shown or (self.judge == "labels" and label not in shown):
            raise self._error(
                f"has the answer template {self.answer!r} without its field: write {{{label}}} where the answer "
                f"stands, for example ' {{{label}}}'."
            )
        if self.judge == "labels" and len(shown) > 1:
            others = ", ".join(repr(name) for name in shown if name != label)
            raise self._error(
                f"has {others} in its answer template {self.answer!r}; a label is scored with nothing beside it but "
                f"fixed words. Leave {{{label}}} only."
            )
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
        first: dict[str, str] = {}
        for value, words in self.labels.items():
            if not words.strip():
                raise self._error(
                    f"gives the value {value!r} an empty text. Give it the words that stand in the prompt."
                )
            if words.strip() in first:
                raise self._error(
                    f"gives the values {first[words.strip()]!r} and {value!r} the same text {words.strip()!r}, so no "
                    "prediction could tell them apart. Give each its own."
                )
            first[words.strip()] = value

    def _error(self, what: str) -> SparsortError:
        return SparsortError(f"the task {self.name!r} {what}")


def task_names() -> list[str]:
    """The names of the ready tasks."""
    return sorted(path.stem for path in _READY.glob("*.toml"))


def load_task(name: str | Path | Task) -> Task:
    """A ready task by its name, or one from a TOML file.

    Raises:
        SparsortError: no such task or file, or a mistake in it.
    """
    if isinstance(name, Task):
        return name
    path = _READY / f"{name}.toml" if str(name) in task_names() else Path(name).expanduser()
    if path.suffix != ".toml":
        raise unknown_choice("task", str(name), [*task_names(), "<a file>.toml"])
    table = tables.read(path)
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
    """A task for any dataset.

    Args:
        rows: the training rows, from which the labels are taken where none are given.
        prompt: format string of the question.
        answer: format string of what follows it; by default a space and the label.
        label: the field of the gold label or answer.
        labels: "0=negative,1=positive", or a mapping from value to words; None: every value that the data has, in its
            own words, numbers in their order and texts in the alphabet's. Only for the judge "labels".
        judge: as `Task.judge`.
        name: what reports call it.
        options: the other fields of `Task`. For the judges "number" and "math", whose answers are worked ones of several
            lines, the stop is by default the next question's first words (the separator, where it has none; nothing in
            chat), and up to 256 and 512 tokens are written.

    Raises:
        SparsortError: as `Task`; or the label field is missing or has too many values for labels.
    """
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
        opening = prompt.partition("{")[0].strip()
        # In chat the turn's own end is enough, and worked answers hold empty lines.
        stop = () if options.get("chat") else (f"\n{opening}" if opening else options.get("separator", "\n\n"),)
        table |= {"max_new_tokens": _WORKED[judge], "stop": stop}
    return tables.build(Task, {**table, "labels": labels, **options}, kind="task", where="the flags")


def parse_labels(text: str) -> dict[str, str]:
    """Labels written as "0=negative,1=positive", as a mapping; a value without "=" stands for itself.

    Raises:
        SparsortError: a value is given twice, or one side is empty.
    """
    labels: dict[str, str] = {}
    for part in text.split(","):
        value, equals, words = (side.strip() for side in part.partition("="))
        words = words if equals else value
        if not value or not words:
            raise SparsortError(
                f"the labels {text!r} hold {part!r}, where a value or its words are empty. "
                "Write value=words, separated by commas: 0=negative,1=positive."
            )
        if value in labels:
            raise SparsortError(f"the labels {text!r} give the value {value!r} twice. Give it once.")
        labels[value] = words
    return labels


def check_row(row: Row, where: str, *, prompt: str, label: str) -> None:
    """As `Task.check_row`, before there is a task."""
    _label_text(row, label, where)
    render(prompt, row, where=where)


def check_rows(task: Task, rows: Sequence[Row], what: str = "the data") -> list[str]:
    """Check that every row fits the task, and say what is odd about them.

    Args:
        task: the task.
        rows: its rows.
        what: what they are, for the warnings ("the test rows").

    Returns:
        Warnings, one sentence each: only one label occurs; some label never does.

    Raises:
        SparsortError: there are no rows; a row lacks a field, its gold value is not among the labels, or is empty.
    """
    if not rows:
        raise SparsortError(f"{what} of the task {task.name!r} hold no rows. Give at least one.")
    counts: Counter[str] = Counter()
    for row in rows:
        task.demo_text(row)
        gold = task.gold_text(row)
        if not gold.strip():
            raise SparsortError(f"{_name(row)} has an empty answer in the field {task.label!r}. Leave the row out.")
        counts[gold] += 1
    if task.is_generation:
        return []
    if len(counts) == 1:
        only = next(iter(counts))
        return [
            f"{what} of the task {task.name!r} have one label only, {only!r}, so that a prompt that always says it is "
            "right every time. Some public copies of test splits, SST-2's among them, carry a placeholder for labels."
        ]
    absent = [repr(words) for words in task.label_names() if words not in counts]
    return [f"{what} of the task {task.name!r} have no row of the label {', '.join(absent)}."] if absent else []


def _discover(rows: Iterable[Row], label: str) -> list[str]:
    found: dict[str, None] = {}
    for position, row in enumerate(rows):
        found.setdefault(_label_text(row, label, _name(row, position)))
        if len(found) > MOST_LABELS:
            raise SparsortError(
                f"the field {label!r} has more than {MOST_LABELS} different values, so it does not look like a label. "
                "For free answers choose the judge 'exact', 'number' or 'math'; for labels name each of them."
            )
    if all(value.removeprefix("-").isdecimal() for value in found):
        return sorted(found, key=int)
    return sorted(found)


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
