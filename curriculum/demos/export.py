"""Demonstrations in a fixed order, as a file that another program reads: the entries of `EXPORTS`.

Contract: a file shows exactly these demonstrations, in exactly this order, to every query. Every format except DSPy's renders
them as the same text or chat turns as `assemble`; DSPy writes its own prompt around the fields. Under the key "sparsort", a file
has the version, the templates, the ids of the demonstrations, and the caller's provenance (seed, model, criterion, cost). The
other programs need not be installed. What a format cannot express is refused before a file is written.

Shapes: K demonstrations.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparsort.curriculum.demos.blocks import demo_turns
from sparsort.curriculum.demos.budget import Messages
from sparsort.curriculum.demos.pool.rows import Row, id_of, name_of
from sparsort.curriculum.demos.prompt import PromptForm
from sparsort.errors import SparsortError
from sparsort.paths import is_index, parse_field
from sparsort.registry import Entry, Registry
from sparsort.scoring.prompts.functions import PROMPT_TEMPLATE
from sparsort.storage.files import write_atomically
from sparsort.templates import Piece, fields_of, pieces, render
from sparsort.values import put, text_at

ExportFormat = Literal["lm-eval", "dspy", "langchain", "openai"]

# The key of our own data in every file.
_KEY = "sparsort"
# Names that Jinja reads as constants, besides the keywords of Python.
_JINJA_CONSTANTS = {"true", "false", "none"}
# In Jinja's literal text a brace may begin an expression, and a carriage return becomes a newline.
_JINJA_SPECIAL = re.compile(r"[{\r]")
# LangChain refuses variables with these characters.
_NOT_IN_LANGCHAIN = re.compile(r"[.\[\]{}:!]")


@dataclass(frozen=True, kw_only=True)
class PinnedDemos:
    """Demonstrations in a fixed order, and the form of their prompt.

    Attributes:
        rows: the K demonstrations, first to last; the last one is next to the query.
        form: the templates or the column of conversations, as in `assemble`. Its budget is not read.
        label: the field of the label; None if answers are free text.
        labels: value in the data → words in the prompt; None if answers are free text.
        provenance: how the order was chosen, as JSON values.
    """

    rows: Sequence[Row]
    form: PromptForm
    label: str | None = None
    labels: Mapping[str, str] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of prompt: "plain", "chat" or "conversation"."""
        if self.form.messages is not None:
            return "conversation"
        return "chat" if self.form.chat else "plain"

    @property
    def prompt(self) -> str:
        """The template of the question. There is one unless the prompt consists of conversations."""
        return str(self.form.prompt)

    @property
    def answer(self) -> str:
        """The template of the answer; a chat turn has no spaces around it."""
        return str(self.form.answer).strip() if self.form.chat else str(self.form.answer)

    def shown(self) -> list[Row]:
        """The rows, with each label in the words of the prompt."""
        if self.labels is None or self.label is None:
            return list(self.rows)
        names = [name_of(row, place) for place, row in enumerate(self.rows)]
        values = [text_at(row, self.label, where=name) for row, name in zip(self.rows, names, strict=True)]
        for value, name in zip(values, names, strict=True):
            if value not in self.labels:
                raise SparsortError(
                    f"{name} has the label {value!r}; the labels are {', '.join(map(repr, self.labels))}."
                )
        return [put(row, self.label, self.labels[value]) for row, value in zip(self.rows, values, strict=True)]

    def pairs(self) -> list[tuple[str, str]]:
        """The question and the answer of each demonstration, as rendered."""
        return [
            (render(self.prompt, row, where=name_of(row, at)), render(self.answer, row, where=name_of(row, at)))
            for at, row in enumerate(self.shown())
        ]

    def turns(self) -> Messages:
        """The system turn, if there is one, and the turns of all demonstrations."""
        if self.form.messages is not None:
            conversations = [
                demo_turns(row, self.form.messages, where=name_of(row, at)) for at, row in enumerate(self.rows)
            ]
            shown = [turn for conversation in conversations for turn in conversation]
            systems = list(dict.fromkeys(turn["content"] for turn in shown if turn["role"] == "system"))
            if len(systems) > 1:
                raise SparsortError(
                    f"the conversations have different system turns, such as {systems[0]!r:.80} and {systems[1]!r:.80}, and a "
                    "prompt has one. Select demonstrations whose system turns agree."
                )
            first: Messages = [{"role": "system", "content": system} for system in systems]
            return [*first, *(turn for turn in shown if turn["role"] != "system")]
        turns: Messages = [{"role": "system", "content": self.form.system}] if self.form.system else []
        for question, answer in self.pairs():
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
        return turns

    def about(self) -> dict[str, Any]:
        """The data under the key "sparsort"."""
        from sparsort import __version__

        form = {"prompt": self.form.prompt, "answer": self.form.answer, "messages": self.form.messages}
        return {
            "version": __version__,
            **{name: value for name, value in form.items() if value is not None},
            "demonstrations": [id_of(row, place) for place, row in enumerate(self.rows)],
            **_plain(self.provenance),
        }


@dataclass(frozen=True, kw_only=True)
class ExportEntry(Entry):
    """One format.

    Attributes:
        suffix: the end of a file's name that stands for this format.
        kinds: the kinds of prompt that the format can express.
        refusal: what to do with a prompt of another kind, as a sentence.
        function: the text of the file, from the demonstrations and the stem of the file's name.
    """

    suffix: str
    kinds: frozenset[str]
    refusal: str
    function: Callable[[PinnedDemos, str], str]


def export_demonstrations(
    demos: Sequence[Row],
    path: str | Path,
    *,
    format: ExportFormat | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    messages: str | None = None,
    system: str | None = None,
    separator: str = "\n\n",
    chat: bool = False,
    label: str | None = None,
    labels: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write demonstrations in their order for another program.

    Args:
        demos: the K demonstrations, first to last.
        path: the file.
        format: a name in `EXPORTS`; None for the format that the file's name ends in, such as demos.yaml for
            lm-evaluation-harness or demos.openai.json.
        prompt, answer, messages, system, separator, chat: as in `assemble`.
        label: the field of the label, with `labels`.
        labels: value in the data → words in the prompt, for an answer that is one of a few labels.
        provenance: how the order was chosen, as JSON values: the seed, the model, the criterion, the tokens read.

    Raises:
        SparsortError: an unknown format, a prompt that the format cannot express, or a demonstration that cannot be shown.

    Example:
        >>> export_demonstrations(demos, "demos.openai.json", prompt="{question}", answer="{answer}", chat=True)
    """
    form = PromptForm(prompt=prompt, answer=answer, messages=messages, system=system, separator=separator, chat=chat)
    if messages is None and (prompt is None or answer is None):
        raise SparsortError("an export needs prompt= and answer=, or messages=, the column of whole conversations.")
    pinned = PinnedDemos(rows=demos, form=form, label=label, labels=labels, provenance=provenance or {})
    write_pinned(pinned, path, format)


def write_pinned(pinned: PinnedDemos, path: str | Path, format: ExportFormat | None = None) -> None:
    """Write pinned demonstrations; see `export_demonstrations`."""
    entry = check_export(path, format, pinned.kind, pinned.form.prompt)
    target = Path(path).expanduser()
    text = entry.function(pinned, target.name.removesuffix(entry.suffix).removesuffix(target.suffix))
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(target) as temporary:
        # Half of a surrogate pair cannot be encoded. "backslashreplace" writes it as the escape that JSON has for it.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_export(path: str | Path, format: ExportFormat | None, kind: str, prompt: Any = None) -> ExportEntry:
    """The format of an export.

    Args:
        path: the file.
        format: a name in `EXPORTS`, or None for the one that the name of the file ends in.
        kind: as `PinnedDemos.kind`.
        prompt: the prompt, as in `PromptForm`; None for whole conversations, or if it is not known yet.

    Raises:
        SparsortError: the prompt is a function, the format is unknown, or it cannot express this kind of prompt.
    """
    if callable(prompt) or prompt == PROMPT_TEMPLATE:
        raise SparsortError(
            "an export needs a template, and the prompt is a function, which another program cannot call. Pass a format string "
            "such as '{question}' as prompt=; the text that the function writes can be a column of the data."
        )
    if format is not None:
        entry = EXPORTS.check(format)
    else:
        fitting = [entry for entry in EXPORTS.values() if Path(path).name.endswith(entry.suffix)]
        if not fitting:
            endings = ", ".join(f"{entry.suffix} ({name})" for name, entry in EXPORTS.items())
            raise SparsortError(
                f"the name {Path(path).name!r} does not say in which format to export. Name the format with format= "
                f"(--export-format), or end the file's name in one of: {endings}."
            )
        entry = fitting[0]
    if kind not in entry.kinds:
        raise SparsortError(f"the format {entry.name!r} cannot express this prompt. {entry.refusal}")
    return entry


def _lm_eval(pinned: PinnedDemos, stem: str) -> str:
    """A task whose few-shot samples are the demonstrations. The user replaces the test data."""
    import yaml

    form, answers = pinned.form, [answer for _, answer in pinned.pairs()]
    answer = pinned.answer.lstrip()
    # The harness compares what follows this text, and in chat it omits the text.
    delimiter = pinned.answer[: len(pinned.answer) - len(answer)]
    columns = dict.fromkeys(parse_field(name)[0] for name in [*fields_of(pinned.prompt), *fields_of(answer)])
    task: dict[str, Any] = {
        "task": re.sub(r"\W+", "_", stem) or "demonstrations",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "test_split": "test",
        "num_fewshot": len(pinned.rows),
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [{column: _plain(row[column]) for column in columns} for row in pinned.rows],
        },
        "doc_to_text": _jinja(pinned.prompt),
        "doc_to_target": _jinja(answer),
        "target_delimiter": delimiter,
        "fewshot_delimiter": form.separator,
    }
    if form.system:
        task["description"] = _JINJA_SPECIAL.sub(_jinja_literal, form.system + ("" if form.chat else form.separator))
    if pinned.labels is not None and pinned.label is not None:
        texts = [render(answer, put({}, pinned.label, words), where="the label") for words in pinned.labels.values()]
        values = json.dumps(list(pinned.labels))
        task |= {
            "output_type": "multiple_choice",
            "doc_to_choice": texts,
            # The index of the label. The text of a label would be read as an index if it were a number.
            "doc_to_target": f"{{{{ {values}.index({_jinja_field(pinned.label)}|string) }}}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        if odd := next(
            (answer.strip() for answer in answers if re.fullmatch(r"\s*\[.*\]\s*", answer, re.DOTALL)), None
        ):
            raise SparsortError(
                f"lm-evaluation-harness reads an answer in brackets as a list: {odd!r:.80}. Add words to the answer."
            )
        task |= {
            "output_type": "generate_until",
            "generation_kwargs": {"until": _stops(answers, form), "do_sample": False},
            "filter_list": [
                {"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    task["metadata"] = {"version": 1.0, _KEY: pinned.about()}
    run = "lm_eval run --include_path FOLDER --tasks"
    if form.chat:
        run = "lm_eval run --include_path FOLDER --apply_chat_template --fewshot_as_multiturn true --tasks"
    head = (
        "# Replace dataset_path, dataset_kwargs and test_split by your test data, or include this file in a task of your own.\n"
        f"# {run} {task['task']} …\n"
    )
    return head + str(yaml.safe_dump(task, sort_keys=False, allow_unicode=True, width=1000))


def _stops(answers: Sequence[str], form: PromptForm) -> list[str]:
    """The strings that end a generated answer."""
    if not any("\n" in answer.strip() for answer in answers):
        return ["\n"]
    return [] if form.chat else [form.separator]


def _jinja(template: str) -> str:
    """A template in Jinja's notation."""
    parts = []
    for piece in pieces(template):
        parts.append(_JINJA_SPECIAL.sub(_jinja_literal, piece.literal))
        if piece.field is None:
            continue
        value = _jinja_field(piece.field)
        if piece.spec or piece.conversion:
            value = f"{json.dumps('{0' + _how(piece) + '}')}.format({value})"
        parts.append(f"{{{{ {value} }}}}")
    return "".join(parts)


def _jinja_literal(match: re.Match[str]) -> str:
    return f"{{{{ {json.dumps(match[0])} }}}}"


def _jinja_field(name: str) -> str:
    column, *steps = parse_field(name)
    if not column.isidentifier() or keyword.iskeyword(column) or column in _JINJA_CONSTANTS:
        raise SparsortError(
            f"the column {column!r} is not a name in the templates of lm-evaluation-harness. Rename it."
        )
    return column + "".join(f"[{step if is_index(step) else json.dumps(step)}]" for step in steps)


def _how(piece: Piece) -> str:
    """The conversion and the format of a field, as Python writes them."""
    return (f"!{piece.conversion}" if piece.conversion else "") + (f":{piece.spec}" if piece.spec else "")


def _dspy(pinned: PinnedDemos, stem: str) -> str:
    """The state of a `dspy.Predict` whose inputs are the fields of the question, and whose outputs are those of the answer."""
    inputs, outputs = fields_of(pinned.prompt), fields_of(pinned.answer)
    for name in [*inputs, *outputs]:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise SparsortError(
                f"DSPy names its fields like variables, and {name!r} is not one. Put its value into a column."
            )
    demos = [
        {name: text_at(row, name, where=name_of(row, place)) for name in [*inputs, *outputs]}
        for place, row in enumerate(pinned.shown())
    ]
    given, wanted = (", ".join(f"`{name}`" for name in names) for names in (inputs, outputs))
    state = {
        "traces": [],
        "train": [],
        "demos": demos,
        # Without descriptions of the fields, `load` keeps those of the program's signature.
        "signature": {
            "instructions": pinned.form.system or f"Given the fields {given}, produce the fields {wanted}.",
            "fields": [],
        },
        "lm": None,
    }
    about = {"signature": f"{', '.join(inputs)} -> {', '.join(outputs)}", **pinned.about()}
    return _json({**state, "metadata": {"dependency_versions": {}, _KEY: about}})


def _langchain(pinned: PinnedDemos, stem: str) -> str:
    """A `PromptTemplate`, or for chat a `ChatPromptTemplate`, in which only the query is variable."""
    metadata = {_KEY: pinned.about()}
    if pinned.kind == "plain":
        form = pinned.form
        blocks = [form.system] if form.system else []
        blocks += [question + answer for question, answer in pinned.pairs()]
        literal = "".join(_braces(block + form.separator) for block in blocks)
        return _json(
            _langchain_prompt(literal + _langchain_template(pinned.prompt), fields_of(pinned.prompt), metadata)
        )
    kinds = {"system": "SystemMessage", "user": "HumanMessage", "assistant": "AIMessage"}
    messages = [
        _langchain_object("schema", "messages", kinds[turn["role"]], content=turn["content"]) for turn in pinned.turns()
    ]
    if pinned.kind == "chat":
        variables = fields_of(pinned.prompt)
        query = _langchain_prompt(_langchain_template(pinned.prompt), variables)
        messages.append(_langchain_object("prompts", "chat", "HumanMessagePromptTemplate", prompt=query))
    else:
        # A conversation has no template: the query is a list of turns.
        variables = ["messages"]
        messages.append(_langchain_object("prompts", "chat", "MessagesPlaceholder", variable_name="messages"))
    return _json(
        _langchain_object(
            "prompts", "chat", "ChatPromptTemplate", input_variables=variables, messages=messages, metadata=metadata
        )
    )


def _langchain_prompt(
    template: str, variables: Sequence[str], metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    more = {} if metadata is None else {"metadata": metadata}
    return _langchain_object(
        "prompts",
        "prompt",
        "PromptTemplate",
        input_variables=list(variables),
        template=template,
        template_format="f-string",
        **more,
    )


def _langchain_object(*place: str, **values: Any) -> dict[str, Any]:
    return {"lc": 1, "type": "constructor", "id": ["langchain", *place], "kwargs": values}


def _langchain_template(template: str) -> str:
    parts = []
    for piece in pieces(template):
        parts.append(_braces(piece.literal))
        if piece.field is None:
            continue
        if _NOT_IN_LANGCHAIN.search(piece.field):
            raise SparsortError(
                f"a variable of LangChain has a plain name, and {piece.field!r} is a path. Put its value into a column."
            )
        parts.append(f"{{{piece.field}{_how(piece)}}}")
    return "".join(parts)


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _openai(pinned: PinnedDemos, stem: str) -> str:
    return _json({"messages": pinned.turns(), _KEY: pinned.about()})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _plain(value: Any) -> Any:
    """A value as JSON has it; one that JSON lacks, such as a date, as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


_PLAIN_AND_CHAT = frozenset({"plain", "chat"})

EXPORTS = Registry(
    "export format",
    (
        ExportEntry(
            name="lm-eval",
            help="a task of lm-evaluation-harness, whose few-shot samples are the demonstrations",
            source="lm-evaluation-harness 0.4.13",
            aliases=("lm_eval", "lm_evaluation_harness", "harness", "yaml"),
            suffix=".yaml",
            kinds=_PLAIN_AND_CHAT,
            refusal="A task has one question and one answer for each row: use templates instead of conversations.",
            function=_lm_eval,
        ),
        ExportEntry(
            name="dspy",
            help="the state of a dspy.Predict, for its method load",
            source="DSPy 3.4",
            suffix=".dspy.json",
            kinds=_PLAIN_AND_CHAT,
            refusal="A DSPy program has named fields: use templates instead of conversations.",
            function=_dspy,
        ),
        ExportEntry(
            name="langchain",
            help="a PromptTemplate or ChatPromptTemplate, for langchain_core.load.load",
            source="langchain-core 1.7",
            suffix=".langchain.json",
            kinds=frozenset({"plain", "chat", "conversation"}),
            refusal="",
            function=_langchain,
        ),
        ExportEntry(
            name="openai",
            help="chat turns, to which the query's turn is added",
            source="OpenAI chat completions",
            aliases=("chat", "messages"),
            suffix=".openai.json",
            kinds=frozenset({"chat", "conversation"}),
            refusal="It consists of chat turns, and this prompt is plain text: make it a chat prompt with chat=True (--chat).",
            function=_openai,
        ),
    ),
)
