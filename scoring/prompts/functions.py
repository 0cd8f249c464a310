"""Prompts that a Python function writes: row → text or chat turns.

Contract: the function is called with a copy of the row, with copies of its lists and dictionaries, and its errors become
`SparsortError`s that name the row. Its identity is a hash of its source and of what it reads besides the row: default arguments,
variables of the enclosing function, global variables, and its own attributes. These may be None, numbers, texts, bytes, lists,
tuples, dictionaries and sets of such values, compiled regular expressions, modules, functions and `functools.partial`. A function
that they name is hashed in the same way, a module by its file, and a package by the files of all its modules that are loaded.
What is part of Python or of an installed package is hashed by its name alone, so another version of it goes unnoticed.

Anything else has no stable hash: objects, frames, classes of the caller, bound methods, functions whose source cannot be read,
such as built-in ones, and functions that import a module of the caller when they are called. A prompt function with such a part
may score rows in memory. A run with a folder refuses it, because nothing could tell whether the prompt has changed when the run
resumes. A change in a file that the function opens, or in a module that it imports by `importlib`, goes unnoticed.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from sparsort.errors import SparsortError
from sparsort.scoring.prompts.conversations import Turn, question_text, turns_of
from sparsort.values import is_list, is_missing, kind_of

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource

# The form of `PromptFunction.description`. A template that has no field is refused, so no template has this form.
_DESCRIPTION = re.compile(r"function .+ \[(sha256:[0-9a-f]{64}|source unknown)\]", re.DOTALL)
# The column for the text of a function in a prompt that is built from templates, and the template that shows it.
PROMPT_COLUMN = "prompt()"
PROMPT_TEMPLATE = f"{{{PROMPT_COLUMN}}}"
_GLOBAL_READS = ("LOAD_GLOBAL", "LOAD_NAME")
_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes)


class _NoHashError(Exception):
    """A part of a function has no stable hash; the text is the clause that says why."""


class PromptFunction:
    """A function that writes the prompt of a row.

    Args:
        function: takes a row as a dictionary; returns text, chat turns such as `[{"role": "user", "content": "…"}]`, or None for
            a row without a prompt.
    """

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self.function = function

    @classmethod
    def of(cls, function: Any) -> PromptFunction:
        """The function as a prompt; a `PromptFunction` is returned unchanged."""
        return function if isinstance(function, PromptFunction) else cls(function)

    def __call__(self, row: dict[str, Any]) -> Any:
        return self.function(row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptFunction) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)

    def __repr__(self) -> str:
        return self.description

    @property
    def name(self) -> str:
        """The name in messages."""
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        return str(getattr(function, "__qualname__", type(function).__name__))

    @functools.cached_property
    def description(self) -> str:
        """The function in the provenance: its name and its hash, or that its source is unknown."""
        return f"function {self.name} [{self._hash_or_reason[0] or 'source unknown'}]"

    @functools.cached_property
    def _hash_or_reason(self) -> tuple[str, str]:
        """The hash of the function and "", or "" and the reason why it has none."""
        try:
            parts = json.dumps(_identity(self.function, self.name, {}))
        except _NoHashError as error:
            return "", str(error)
        return f"sha256:{hashlib.sha256(parts.encode('utf-8', 'surrogatepass')).hexdigest()}", ""

    def need_hash(self, purpose: str) -> None:
        """Refuse a function without a stable hash.

        Args:
            purpose: what needs the hash, such as "a run with a folder (out=)".

        Raises:
            SparsortError: the function, or something that it reads, has no stable hash.
        """
        if reason := self._hash_or_reason[1]:
            raise SparsortError(
                f"the prompt is the function {self.name}, and {reason}. {purpose.capitalize()} must be able to tell whether the "
                "prompt has changed. Write the function with def in a file or a notebook cell, let it read only the row and "
                "plain values such as texts, numbers and lists, or put its text into a column of the data."
            )

    def write(self, fields: Mapping[str, Any], *, where: str) -> str | list[Turn] | None:
        """The text or the chat turns of a row; None, or no turns, if the row has no prompt.

        Args:
            fields: the row.
            where: the name of the row in error messages, such as "row 7 (id 'q7')".

        Raises:
            SparsortError: the function raised an error, or returned something else.
        """
        result = self._call(_copied(fields), where)
        if isinstance(result, str) or is_missing(result):
            return result if isinstance(result, str) else None
        if is_list(result):
            return turns_of({"turns": result}, "turns", where=f"{where}: the result of the prompt function {self.name}")
        raise SparsortError(
            f"{where}: the prompt function {self.name} returned {kind_of(result)}; expected text, or chat turns such as "
            '[{"role": "user", "content": "…"}].'
        )

    def _call(self, row: dict[str, Any], where: str) -> Any:
        try:
            return self.function(row)
        except Exception as error:  # the caller's code, which can raise any error
            names = ", ".join(map(str, dict.keys(row)))
            raise SparsortError(
                f"{where}: the prompt function {self.name} raised {type(error).__name__}: {error}. "
                f"The row has the fields {names or 'none'}."
            ) from error

    def returns_turns(self, source: RowSource) -> bool:
        """Whether the function returns chat turns for the first row that has a prompt.

        Raises:
            SparsortError: as `write`.
        """
        results = (self.write(row.fields, where=f"{source.name}: {row.name}") for row in source.rows())
        return isinstance(next((result for result in results if result), None), list)

    def turns(self, fields: Mapping[str, Any], role: str, *, where: str) -> list[tuple[str, str]]:
        """The (role, text) pairs of a row; none if they have no text.

        Args:
            fields: the row.
            role: the role of a text that is not a turn: "user", or "text" for a plain prompt.
            where: the name of the row in error messages.

        Raises:
            SparsortError: as `write`, or the function returned chat turns in a plain prompt.
        """
        written = self.write(fields, where=where)
        if isinstance(written, str):
            return [(role, written)] if written.strip() else []
        turns = [(turn["role"], turn["content"]) for turn in written or []]
        if turns and role == "text":
            raise SparsortError(
                f"{where}: the prompt function {self.name} returned chat turns here, and text for the first row. Let it return "
                "turns for every row, or pass chat=True."
            )
        return turns if any(text.strip() for turn_role, text in turns if turn_role != "system") else []

    def add_column(self, rows: Iterable[Mapping[str, Any]], noun: str = "row") -> list[dict[str, Any]]:
        """The rows with their texts in the column `PROMPT_COLUMN`, for code that fills the template `PROMPT_TEMPLATE`.

        Raises:
            SparsortError: as `write`, or the function returned chat turns, which have no place in one turn of a prompt.
        """
        texts = []
        rows = list(rows)
        for number, row in enumerate(rows):
            where = f"{noun} {row['id']!r}" if "id" in row else f"{noun} {number}"
            text = self.write(row, where=where)
            if isinstance(text, list):
                raise SparsortError(
                    f"{where}: the prompt function {self.name} returned chat turns, and a demonstration here is one question and "
                    "one answer. Return text, and pass chat=True to make it the user's turn."
                )
            texts.append(text)
        return [{**row, PROMPT_COLUMN: text} for row, text in zip(rows, texts, strict=True)]

    def columns_read(self, fields: Mapping[str, Any], *, where: str) -> set[str] | None:
        """The columns that the function reads from this row, whether the row has them or not; None if it iterates over the row.

        Raises:
            SparsortError: as `write`.
        """
        row = _RecordingRow(_copied(fields))
        self._call(row, where)
        return None if row.is_iterated else row.read

    def question(self, fields: Mapping[str, Any], *, where: str) -> str:
        """The text by which a row is compared with others: the prompt, without system turns.

        Raises:
            SparsortError: as `write`, or the row has no prompt.
        """
        written = self.write(fields, where=where)
        text = written if isinstance(written, str) else question_text(written or [])
        if not text.strip():
            raise SparsortError(f"{where}: the prompt function {self.name} returned no text. Remove the row.")
        return text


def _copied(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row, with copies of its lists and dictionaries at any depth."""
    return {name: _copied_value(value) for name, value in fields.items()}


def _copied_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied_value(inner) for key, inner in value.items()}
    # A tuple may contain a list. One with named items is left as it is.
    if isinstance(value, list) or type(value) is tuple:
        items = map(_copied_value, value)
        return list(items) if isinstance(value, list) else tuple(items)
    return value


class _RecordingRow(dict[str, Any]):
    """A row that records which of its columns are read, and whether all of them are."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.read: set[str] = set()
        self.is_iterated = False

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.read.add(name)
        return super().pop(name, *default)

    def __iter__(self) -> Iterator[str]:
        # Unpacking and copying a dictionary whose iteration is its own goes through `keys` and `__getitem__`.
        self.is_iterated = True
        return super().__iter__()

    def keys(self) -> Any:
        self.is_iterated = True
        return super().keys()

    def items(self) -> Any:
        self.is_iterated = True
        return super().items()

    def values(self) -> Any:
        self.is_iterated = True
        return super().values()


def function_of(prompt: Any) -> PromptFunction | None:
    """The function that writes a prompt; None if `prompt` is something else, such as a format string."""
    return PromptFunction.of(prompt) if callable(prompt) else None


def is_description(template: str) -> bool:
    """Whether a template in a record is the description of a function."""
    return _DESCRIPTION.fullmatch(template) is not None


def _identity(value: Any, name: str, seen: dict[int, str]) -> Any:
    """A JSON value that is the same in every process for equal values, and differs for different ones.

    Args:
        value: the value.
        name: what it is called in the reason for which it has no hash.
        seen: the names of the functions that are being hashed, by their `id`, since functions may call each other.

    Raises:
        _NoHashError: there is no such JSON value.
    """
    kind = type(value).__name__
    if type(value) in _PLAIN_TYPES:
        return [kind, repr(value)]
    if type(value) in (list, tuple):
        return [kind, [_identity(item, name, seen) for item in value]]
    if type(value) in (set, frozenset):
        # The iteration order of a set of texts differs between processes.
        return [kind, sorted(json.dumps(_identity(item, name, seen)) for item in value)]
    if type(value) is dict:
        return [kind, [[_identity(part, name, seen) for part in item] for item in value.items()]]
    if isinstance(value, re.Pattern):
        return [kind, repr(value.pattern), value.flags]
    if isinstance(value, functools.partial):
        return ["partial", *(_identity(part, name, seen) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, ModuleType):
        return ["module", value.__name__, "" if _is_installed(value.__name__) else _module_hashes(value)]
    if not inspect.isroutine(value) and not inspect.isclass(value):
        raise _NoHashError(f"it uses {name!r}, of the type {kind}, whose value has no stable hash")
    module = getattr(value, "__module__", None)
    if module is not None and _is_installed(module):
        return ["installed", module, value.__qualname__]
    if not isinstance(value, FunctionType):
        raise _NoHashError(f"{name!r} is a {kind}, not a function whose source can be read")
    if id(value) in seen:
        return ["again", seen[id(value)]]
    seen[id(value)] = value.__qualname__
    _refuse_own_imports(value, name)
    reads = [["defaults", _identity([value.__defaults__, value.__kwdefaults__], name, seen)]]
    reads += [[inner, _identity(read, inner, seen)] for inner, read in sorted(_reads(value), key=lambda item: item[0])]
    if value.__dict__:
        reads.append(["its attributes", _identity(value.__dict__, name, seen)])
    return ["function", _source(value), reads]


def _reads(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of enclosing functions and of the module that a function reads, with their values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    for name in _global_names(function.__code__):
        # Other names are built in, or the function will fail when it is called.
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _global_names(code: CodeType) -> set[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in _GLOBAL_READS}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _refuse_own_imports(function: FunctionType, name: str) -> None:
    """Refuse a function that imports a module of the caller when it is called: before that, the module cannot be hashed."""
    for module in _imports(function.__code__):
        if module.startswith(".") or not _is_installed(module):
            raise _NoHashError(f"{name!r} imports {module!r} when it is called, and not at the top of its file")


def _imports(code: CodeType) -> Iterator[str]:
    """The modules that a function and the functions inside it import, a relative name with its dots."""
    before: list[Any] = []
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            # The two instructions before it load the number of dots and the imported names.
            yield "." * before[-2] + step.argval
        if step.opname != "EXTENDED_ARG":
            before.append(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _imports(inner)


def _source(function: FunctionType) -> str:
    """The source of one function, without the rest of its lines, so that an edit next to a lambda does not change it."""
    unreadable = _NoHashError("its source cannot be read, because it was not defined in a file or a notebook cell")
    try:
        lines, _ = inspect.findsource(function)
        text = "".join(lines)
        nodes = [node for node in _functions(text) if _is_at(node, function.__code__)]
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise unreadable from error
    if len(nodes) > 1:
        nodes = [node for node in nodes if _spans(node, function.__code__)][-1:]
    segment = ast.get_source_segment(text, nodes[0], padded=True) if nodes else None
    if segment is None:
        raise unreadable
    return textwrap.dedent(segment).strip()


_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@functools.lru_cache(maxsize=8)
def _functions(text: str) -> tuple[_FunctionNode, ...]:
    """The functions of a module, an inner one after the function that contains it."""
    return tuple(node for node in ast.walk(ast.parse(text)) if isinstance(node, _FunctionNode))


def _is_at(node: _FunctionNode, code: CodeType) -> bool:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
    return (
        name == code.co_name
        and min(node.lineno, *(each.lineno for each in decorators), node.lineno) == code.co_firstlineno
    )


def _spans(node: _FunctionNode, code: CodeType) -> bool:
    """Whether all instructions come from the body of this function, one of several that begin on the same line."""
    if not isinstance(node, ast.Lambda):
        return True
    body = node.body
    start, end = (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)
    # The first instructions of a function belong to no expression, and have no column or the column 0.
    places = [(line, column) for line, _, column, _ in code.co_positions() if line is not None and column]
    return all(start <= place < end for place in places)


def _module_hashes(module: ModuleType) -> list[list[str]]:
    """The hash of a module's file; for a package, those of all its modules that are loaded, by name."""
    modules = {module.__name__: module}
    if hasattr(module, "__path__"):
        inside = f"{module.__name__}."
        modules |= {name: each for name, each in sys.modules.items() if name.startswith(inside) and each is not None}
    # A folder without an __init__.py is a package that has no file.
    return [[name, _file_hash(modules[name])] for name in sorted(modules) if not _is_folder(modules[name])]


def _is_folder(module: ModuleType) -> bool:
    return hasattr(module, "__path__") and getattr(module, "__file__", None) is None


def _file_hash(module: ModuleType) -> str:
    try:
        return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    except (AttributeError, OSError) as error:
        raise _NoHashError(f"it uses the module {module.__name__!r}, whose file cannot be read") from error


@functools.lru_cache(maxsize=256)
def _is_installed(module: str) -> bool:
    """Whether a module belongs to Python or to an installed package."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None and top not in sys.modules and (spec := importlib.util.find_spec(top)) is not None:
        file = spec.origin
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return file is not None and any(Path(file).resolve().is_relative_to(folder) for folder in folders)
