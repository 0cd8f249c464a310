"""Makes the parameters of a command from the dataclasses that it takes, and the dataclasses from the values of a call.

Contract: a command is a function whose parameters are of two kinds. One whose annotation is a dataclass with options (see
`sparsort.options`) stands for all of these, in the order of the fields; every other one is a parameter of typer as it is. A
retired flag is read as the present one, with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import typer

from sparsort.options import Option, escape, has_options, option_of, parameter_of
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.terminal.printing import note

Command = TypeVar("Command", bound=Callable[..., None])

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_CONTEXT = "context"


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which fields of a dataclass a parameter stands for, as a part of its annotation.

    Attributes:
        of: the dataclass.
        without: names of options that the command does not have.
        given: whether the command takes, in place of the dataclass, a mapping from name to value with only the fields that were
            given on the command line.
    """

    of: type
    without: tuple[str, ...] = ()
    given: bool = False


# A prompt of demonstrations and a query is made from columns, and is read whole or refused.
NOT_IN_FEW_SHOT = ("messages", "truncation", "max_length")
FewShotPrompt = Annotated[PromptSpec, Fields(of=PromptSpec, without=NOT_IN_FEW_SHOT)]


def generated(function: Command) -> Command:
    """The function as typer can read it, with a parameter for every option of the dataclasses in its signature."""
    groups: dict[str, Fields] = {}
    parameters = [inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        fields = _fields_of(hints[name])
        if fields is None:
            kept = {"kind": inspect.Parameter.KEYWORD_ONLY, "annotation": hints[name]}
            parameters.append(parameter.replace(**kept))
        else:
            groups[name] = fields
            parameters += _parameters(fields.of, fields.without)

    @functools.wraps(function)
    def run(**values: Any) -> None:
        context = values.pop(_CONTEXT)
        taken = {name: _take(fields, values, context) for name, fields in groups.items()}
        function(**values, **taken)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return typing.cast(Command, run)


def retired_flags(function: Callable[..., Any] | None) -> dict[str, str]:
    """Retired flag → present one, for a function that `generated` made."""
    found: dict[str, str] = {}
    for hint in typing.get_type_hints(inspect.unwrap(typing.cast(Any, function)), include_extras=True).values():
        if (fields := _fields_of(hint)) is not None:
            for _, field, shown in _options(fields.of, fields.without):
                found |= dict.fromkeys(shown.retired, _flag(field, shown))
    return found


def replace_retired(flags: dict[str, str], params: Sequence[Any], args: Sequence[str]) -> list[str]:
    """The arguments with the present flag in place of each retired one, and a warning for it.

    Args:
        flags: retired flag → present one.
        params: the parameters of the command.
        args: what follows the name of the command.
    """
    with_value = {flag for one in params if not getattr(one, "is_flag", True) for flag in one.opts}
    with_value |= {old for old, present in flags.items() if present in with_value}
    found: list[str] = []
    is_value = False
    for place, text in enumerate(args):
        if text == "--" and not is_value:
            return [*found, *args[place:]]
        flag, equals, value = text.partition("=")
        if not is_value and flag in flags:
            note(f"warning: {flag} is now called {flags[flag]}; the old name works until the next release.")
            text = f"{flags[flag]}{equals}{value}"
        found.append(text)
        is_value = not is_value and not equals and flag in with_value
    return found


def _fields_of(hint: Any) -> Fields | None:
    if typing.get_origin(hint) is Annotated:
        return next((one for one in typing.get_args(hint)[1:] if isinstance(one, Fields)), None)
    return Fields(of=hint) if has_options(hint) else None


def _options(kind: type, without: Sequence[str]) -> Iterator[tuple[type, dataclasses.Field[Any], Option]]:
    """Each field that has an option, those of the dataclasses in a dataclass included, with the dataclass that holds it."""
    for field in dataclasses.fields(kind):
        if has_options(type(field.default)):
            yield from _options(type(field.default), without)
        elif (shown := option_of(field)) is not None and parameter_of(field) not in without:
            yield kind, field, shown


def _parameters(kind: type, without: Sequence[str]) -> Iterator[inspect.Parameter]:
    for holder, field, shown in _options(kind, without):
        names = [_flag(field, shown), *([shown.short] if shown.short else [])]
        declared = typer.Option(*names, help=shown.help, rich_help_panel=shown.panel)
        yield inspect.Parameter(
            parameter_of(field),
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field, shown),
            annotation=Annotated[_kind(holder, field, shown), declared],
        )


def _default(field: dataclasses.Field[Any], shown: Option) -> Any:
    """The default as the command line reads it; None for a list, whose help text says what it is."""
    if isinstance(field.default, tuple):
        return None
    return escape(field.default) if isinstance(field.default, str) and shown.read else field.default


def _flag(field: dataclasses.Field[Any], shown: Option) -> str:
    return shown.flag or f"--{parameter_of(field).replace('_', '-')}"


def _kind(holder: type, field: dataclasses.Field[Any], shown: Option) -> Any:
    """The type that the command line reads: text for a choice, which is checked with all other settings, by our own error."""
    if shown.kind is not None:
        return shown.kind
    owner = next(one for one in holder.__mro__ if field.name in inspect.get_annotations(one))
    # The field alone: other annotations may name what only a type checker imports.
    alone = types.SimpleNamespace(__annotations__={field.name: field.type})
    hint = typing.get_type_hints(alone, vars(sys.modules[owner.__module__]))[field.name]
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [str if typing.get_origin(part) is Literal else part for part in parts]
    return functools.reduce(lambda left, right: left | right, plain)


def _take(fields: Fields, values: dict[str, Any], context: typer.Context) -> Any:
    """The dataclass of a parameter, or the mapping of what was given; its values are removed from those of the call."""
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(fields.of):
        name = parameter_of(field)
        if has_options(type(field.default)):
            inner = dataclasses.replace(fields, of=type(field.default))
            taken[field.name] = _take(inner, values, context)
        elif (shown := option_of(field)) is not None and name not in fields.without:
            value = values.pop(name)
            source = context.get_parameter_source(name)
            if not fields.given or (source is not None and source.name != "DEFAULT"):
                taken[field.name] = value if shown.read is None else shown.read(value)
    return taken if fields.given else fields.of(**taken)
