"""Generates the parameters of a command from the dataclasses that it takes, and the dataclasses from the values of a call.

Contract: a command is a function with two kinds of parameters. A parameter whose annotation is a dataclass with options (see
`sparsort.options`) becomes one parameter per option, in the order of the fields. Every other parameter is passed to typer
unchanged. A retired flag is read as the present one, with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, cast

import typer

from sparsort.options import Option, escape, has_options, option, option_of, parameter_of
from sparsort.registry import listed, load
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.terminal.printing import note, show
from sparsort.trackers import NO_TRACKER, TRACKERS

if TYPE_CHECKING:
    from sparsort.curriculum.demos.export import ExportFormat

Command = TypeVar("Command", bound=Callable[..., None])

RowsArgument = Annotated[
    Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv, .parquet, or a saved datasets folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_CONTEXT = "context"


def report_to_option() -> Any:
    """The field for the trackers to which a command reports its progress."""
    return option(NO_TRACKER, f"Trackers for the progress, separated by commas: {TRACKERS.listed()}.")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """An annotation that names the dataclass whose fields become the options of a command.

    Attributes:
        of: the dataclass.
        without: names of options that the command does not have.
        given: whether the command receives, instead of the dataclass, a mapping from field name to value that contains only the
            options given on the command line.
    """

    of: type
    without: tuple[str, ...] = ()
    given: bool = False


# A prompt that contains demonstrations is rendered from columns, and is never cut.
NOT_IN_FEW_SHOT = ("messages", "truncation", "max_length")
FewShotPrompt = Annotated[PromptSpec, Fields(of=PromptSpec, without=NOT_IN_FEW_SHOT)]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of a command that writes its demonstrations for another program."""

    export: Path | None = option(None, "Write the demonstrations in this order to this file, for another program.")
    export_format: str | None = option(
        None,
        "The program: {names} [default: by the end of the name: .yaml, .dspy.json, .langchain.json, .openai.json].",
        names="curriculum.demos.export:EXPORTS",
    )

    @property
    def format(self) -> ExportFormat | None:
        """The format, which `check_export` checks."""
        return cast("ExportFormat | None", self.export_format)

    def to_json(self) -> dict[str, str | None]:
        """The file that was written."""
        return {"export": None if self.export is None else str(self.export)}

    def show(self) -> None:
        """Print the name of the file that was written."""
        if self.export is not None:
            show(f"Demonstrations for another program: {self.export}")


def generated(function: Command) -> Command:
    """Decorate a command so that typer sees one parameter per option of the dataclasses in its signature."""
    groups: dict[str, Fields] = {}
    parameters = [inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        fields = _fields_of(hints[name])
        if fields is None:
            # Keyword-only, because a generated parameter with a default may precede one without.
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
        else:
            groups[name] = fields
            parameters += _parameters(fields)

    @functools.wraps(function)
    def run(**values: Any) -> None:
        context = values.pop(_CONTEXT)
        configs = {name: _take(fields, values, context) for name, fields in groups.items()}
        function(**values, **configs)

    # typer reads the signature for defaults and the annotations for types; `wraps` copied those of the original.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return typing.cast(Command, run)


def complete_help(function: Callable[..., Any] | None, params: Sequence[Any]) -> None:
    """Replace `{names}` in the help texts of a decorated function's options by the names of their tables.

    Args:
        function: the function that `generated` decorated.
        params: the parameters of the command; their help texts are changed.
    """
    by_name = {param.name: param for param in params}
    for field, shown in _all_options(function):
        if shown.names is not None:
            table = load(shown.names, "sparsort")
            names = typing.get_args(table) or tuple(table)
            by_name[parameter_of(field)].help = shown.help.replace("{names}", listed(names))


class Retired(NamedTuple):
    """What replaces a retired flag.

    Attributes:
        flag: the present flag.
        applies: for a flag that now belongs to another option, whether a value has the earlier meaning; None for any value.
    """

    flag: str
    applies: Callable[[str], bool] | None = None


def retired_flags(function: Callable[..., Any] | None) -> dict[str, Retired]:
    """The retired flags of a function that `generated` decorated."""
    return {
        old: Retired(_flag(field, shown), shown.retired_for)
        for field, shown in _all_options(function)
        for old in shown.retired
    }


def replace_retired(flags: Mapping[str, Retired], params: Sequence[Any], args: Sequence[str]) -> list[str]:
    """Replace each retired flag by the present one, with a warning on stderr.

    Args:
        flags: the retired flags.
        params: the parameters of the command.
        args: the arguments after the name of the command.
    """
    with_value = {flag for param in params if not getattr(param, "is_flag", True) for flag in param.opts}
    with_value |= {old for old, retired in flags.items() if retired.flag in with_value}
    replaced: list[str] = []
    # An argument that is the value of the flag before it is never a flag itself, even if it looks like one.
    is_value = False
    for place, text in enumerate(args):
        if text == "--" and not is_value:
            return [*replaced, *args[place:]]
        flag, equals, value = text.partition("=")
        if not is_value and flag in flags:
            present, applies = flags[flag]
            if applies is None:
                note(f"warning: {flag} is now called {present}; the old name works until the next release.")
                text = f"{present}{equals}{value}"
            elif applies(old := value if equals else "".join(args[place + 1 : place + 2])):
                note(f"warning: {flag} {old} is now {present} {old}; the old form works until the next release.")
                text = f"{present}{equals}{value}"
        replaced.append(text)
        is_value = not is_value and not equals and flag in with_value
    return replaced


def _all_options(function: Callable[..., Any] | None) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """Yield the fields, with their options, of all dataclasses in the signature of a decorated function."""
    for hint in typing.get_type_hints(inspect.unwrap(typing.cast(Any, function)), include_extras=True).values():
        if (fields := _fields_of(hint)) is not None:
            for _, field, shown in _options(fields.of, fields.without):
                yield field, shown


def _fields_of(hint: Any) -> Fields | None:
    if typing.get_origin(hint) is Annotated:
        return next((extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Fields)), None)
    return Fields(of=hint) if has_options(hint) else None


def _options(kind: type, without: Sequence[str]) -> Iterator[tuple[type, dataclasses.Field[Any], Option]]:
    """Yield each field that has an option, including those of nested dataclasses, with the dataclass that declares it."""
    for field in dataclasses.fields(kind):
        if has_options(type(field.default)):
            yield from _options(type(field.default), without)
        elif (shown := option_of(field)) is not None and parameter_of(field) not in without:
            yield kind, field, shown


def _parameters(fields: Fields) -> Iterator[inspect.Parameter]:
    for holder, field, shown in _options(fields.of, fields.without):
        names = [_flag(field, shown), *([shown.short] if shown.short else [])]
        declared = typer.Option(*names, help=shown.help, rich_help_panel=shown.panel)
        yield inspect.Parameter(
            parameter_of(field),
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field, shown),
            annotation=Annotated[_kind(holder, field, shown), declared],
        )


def _default(field: dataclasses.Field[Any], shown: Option) -> Any:
    """The default in the form in which the command line reads it; None for a list, whose help text states the default."""
    if field.default is dataclasses.MISSING:
        return inspect.Parameter.empty
    if isinstance(field.default, tuple):
        return None
    return escape(field.default) if isinstance(field.default, str) and shown.read else field.default


def _flag(field: dataclasses.Field[Any], shown: Option) -> str:
    return shown.flag or f"--{parameter_of(field).replace('_', '-')}"


def _kind(holder: type, field: dataclasses.Field[Any], shown: Option) -> Any:
    """The type of the value on the command line, with text in place of a `Literal`.

    typer would reject a wrong choice by itself, without the nearest name. The code that reads the setting reports it better.
    """
    if shown.kind is not None:
        return shown.kind
    # Only this annotation is evaluated, because others may refer to imports for type checkers. An option is declared in the
    # module of its dataclass, never inherited from another module.
    only = types.SimpleNamespace(__annotations__={field.name: field.type})
    hint = typing.get_type_hints(only, vars(sys.modules[holder.__module__]))[field.name]
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [str if typing.get_origin(part) is Literal else part for part in parts]
    return functools.reduce(lambda left, right: left | right, plain)


def _take(fields: Fields, values: dict[str, Any], context: typer.Context) -> Any:
    """Build the dataclass of a parameter, or the mapping of the options given, and remove its values from those of the call."""
    config: dict[str, Any] = {}
    for field in dataclasses.fields(fields.of):
        name = parameter_of(field)
        if has_options(type(field.default)):
            inner = dataclasses.replace(fields, of=type(field.default))
            config[field.name] = _take(inner, values, context)
        elif (shown := option_of(field)) is not None and name not in fields.without:
            value = values.pop(name)
            source = context.get_parameter_source(name)
            is_given = source is not None and source.name != "DEFAULT"
            # The default of a list is None on the command line, which is not its value: the dataclass has it.
            if is_given or not (fields.given or isinstance(field.default, tuple)):
                config[field.name] = value if shown.read is None else shown.read(value)
    return config if fields.given else fields.of(**config)
