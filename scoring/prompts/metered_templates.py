"""Renders a Jinja chat template within a limit of work and of output.

Contract: the text is that of `tokenizer.apply_chat_template`, or `TooMuchWorkError` is raised. A chat template is a program that
comes with a model. The sandbox of transformers keeps it from files and from the interpreter, but not from memory and time. Here
the same environment counts operators, filters, calls and loops:

- Each character or element that a step builds counts 1, and each iteration of a loop and each call of a macro counts `_STEP`. One
  rendering may count `WORK`, and 64 for each character that it is given. The count is the same on every machine.
- Repetition, powers, numbers that decide a size, widths in format strings, `replace` and `join` are checked before the step, so
  that no template gets gigabytes from one such expression.
- The output is counted piece by piece, as the template writes it.

What remains: other functions are counted after they have returned, a list that holds one long text many times is counted by its
elements until it is written, and a loop's condition (`for … if …`) is not counted. A template written to waste memory or time can
therefore still do so. A guarantee needs a process of its own, with limits of the operating system.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from string import Formatter
from typing import Any

# Characters and elements that all steps of one rendering may build together: at most half a gigabyte of text.
WORK = 2**27
# Characters of a rendered text.
OUTPUT = 2**20
# What is added to both for each character of the turns: real templates write it once or twice, and copy it a few times.
_WORK_EACH, _OUTPUT_EACH = 64, 16
# At this price, loops end after 300,000 iterations, which take seconds.
_STEP = 400
# In format strings: what follows the % of a field, and a field within the specification of another one in braces.
_FLAGS, _FLAGS_AFTER_KEYS = re.compile(r"%([-#0 +.*\d]*)"), re.compile(r"[%)]([-#0 +.*\d]*)")
_INNER_FIELD = re.compile(r"\{[^{}]*\}")
_DIGITS = re.compile(r"\d+")
# Of a text that may be a width.
_WIDTH_CHARS = 64
# Filters, methods and functions (by their own names) whose number arguments decide how much they build. A number is only a value
# to all others, among them macros, `namespace`, `default` and `int`, and a limit to `truncate` and `wordwrap`.
_SIZED = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "indent", "tojson", "batch", "slice", "round"}
_SIZED |= {"lipsum", "generate_lorem_ipsum"}
_RANGES = ("range", "safe_range")
_TEXT_OR_LIST = (str, bytes, list, tuple)

_left: ContextVar[list[int]] = ContextVar("sparsort_template_work")


class TooMuchWorkError(Exception):
    """A template builds or writes more than it may."""


def can_meter(tokenizer: Any) -> bool:
    """Whether a tokenizer renders its chat template by the code of transformers whose environment is metered here."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is PreTrainedTokenizerBase.apply_chat_template and _compiler() is not None


@functools.lru_cache(maxsize=16)
def compile_metered(source: str) -> Any:
    """A template in the metered environment.

    Raises:
        jinja2.TemplateError: it cannot be read.
    """
    return _environment().from_string(source)


def render_metered(template: Any, values: Mapping[str, Any], *, n_chars: int) -> str:
    """The text that a template of `compile_metered` writes.

    Args:
        template: the compiled template.
        values: its variables.
        n_chars: characters of the turns among them, with which the limits grow.

    Raises:
        TooMuchWorkError: the text is too long, or the steps that make it count too much.
        Exception: whatever the template raises.
    """
    token = _left.set([WORK + _WORK_EACH * n_chars])
    try:
        parts, written = [], 0
        for part in template.generate(**values):
            written += len(part)
            check_output(written, n_chars)
            parts.append(part)
        return "".join(parts)
    finally:
        _left.reset(token)


def check_output(written: int, n_chars: int) -> None:
    """Refuse a text of `written` characters that is rendered from turns of `n_chars`.

    Raises:
        TooMuchWorkError: it is too long.
    """
    most = OUTPUT + _OUTPUT_EACH * n_chars
    if written > most:
        raise TooMuchWorkError(f"it writes more than {most:,} characters for turns of {n_chars:,}")


def _compiler() -> Any:
    # Private, but nothing public has the filters, globals and extensions that chat templates may use.
    from transformers.utils import chat_template_utils

    return getattr(chat_template_utils, "_compile_jinja_template", None)


@functools.cache
def _environment() -> Any:
    """The environment of transformers, with everything that can build or repeat much metered."""
    environment = _compiler()("").environment.overlay()
    environment.intercepted_binops = frozenset({"*", "**", "%", "+"})
    environment.binop_table = {
        name: _metered(function, name=name) for name, function in environment.binop_table.items()
    }
    environment.filters = {name: _metered(function, name=name) for name, function in environment.filters.items()}
    environment.call = functools.partial(_call, environment.call)
    environment.concat = _concat
    environment.built = _built
    environment.step = _step
    environment.code_generator_class = _code_generator()
    return environment


def _code_generator() -> Any:
    """Jinja's compiler, which also counts iterations, calls of macros and what `~` joins."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator

    def step(node: Any) -> Any:
        call = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        return nodes.ExprStmt(call, lineno=node.lineno)

    class Metered(CodeGenerator):
        def visit_For(self, node: Any, frame: Any) -> None:
            node.body.insert(0, step(node))
            super().visit_For(node, frame)

        def macro_body(self, node: Any, frame: Any) -> Any:
            node.body.insert(0, step(node))
            return super().macro_body(node, frame)

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.built(")
            super().visit_Concat(node, frame)
            self.write(")")

    return Metered


def _metered(function: Callable[..., Any], *, name: str) -> Callable[..., Any]:
    """An operator or a filter with its work counted."""
    # Such filters take Jinja's context, evaluation context or environment first.
    n_own = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def metered(*args: Any, **options: Any) -> Any:
        _check_before(name, [*args[n_own:], *options.values()])
        return _built(function(*args, **options))

    return metered


def _call(call: Callable[..., Any], context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
    """`environment.call` with its work counted."""
    if function is not _step:
        bound = getattr(function, "__wrapped__", function)
        subject = getattr(bound, "__self__", None)
        _check_before(str(getattr(bound, "__name__", "")), [subject, *args, *options.values()])
    return _built(call(context, function, *args, **options))


def _check_before(name: str, arguments: list[Any]) -> None:
    """Refuse a step that would build more than is left; `arguments` begin with what it is applied to."""
    left = _left.get()[0]
    first, *others = arguments
    expected = 0
    if name in ("*", "**"):
        sizes = [len(value) if isinstance(value, _TEXT_OR_LIST) else value for value in arguments]
        if sizes != arguments:
            expected = sizes[0] * sizes[1]
        elif all(isinstance(value, int) for value in arguments):
            # The time of arithmetic with long numbers grows faster than their length.
            bits = first.bit_length() * others[0] if name == "**" else sum(value.bit_length() for value in arguments)
            expected = bits * _STEP
    elif name in ("replace", "join"):
        expected = _expanded(name, [value for value in arguments if isinstance(value, _TEXT_OR_LIST)])
    elif name in ("%", "format", "format_map"):
        expected = _widest(first, others) if isinstance(first, str) else 0
    elif name in _RANGES:
        expected = _length_of_range(others)
    elif name in _SIZED:
        expected = max((value for value in others if isinstance(value, int)), default=0)
    if expected > left:
        raise TooMuchWorkError("it builds a text or list of more than the memory it may use")


def _expanded(name: str, values: list[Any]) -> int:
    """The size of what `replace` or `join` gives, where it can be known before."""
    if name == "replace" and len(values) >= 3 and all(isinstance(value, str) for value in values[:3]):
        text, old, new = values[:3]
        return len(text) + int(text.count(old)) * len(new)
    if name == "join":
        # The filter has the separator last, if at all, and the method has it first; a text may be joined, too.
        pieces = (len(item) for value in values for item in value if isinstance(item, str))
        return sum(pieces) + len(max(values, key=len, default="")) * len(min(values, key=len, default="")) * (
            len(values) > 1
        )
    return 0


def _widest(template: str, values: list[Any]) -> int:
    """The largest width or precision that a format string writes or takes from its values, of % or of braces."""
    texts = (_FLAGS_AFTER_KEYS if "%(" in template else _FLAGS).findall(template)
    specs = []
    with contextlib.suppress(ValueError):  # a broken field; those before it are formatted
        for _, _, spec, _ in Formatter().parse(template):
            specs.append(spec or "")
    if any("*" in text for text in texts) or any("{" in spec for spec in specs):
        # In braces, a part of a width can be a text, too.
        given = [str(value)[:_WIDTH_CHARS] for value in _flat(values) if isinstance(value, (int, float, str))]
        largest = max((digits for text in given for digits in _DIGITS.findall(text)), key=_number, default="")
        specs = [_INNER_FIELD.sub(largest, spec) for spec in specs] + [largest]
    return max((_number(digits) for text in [*texts, *specs] for digits in _DIGITS.findall(text)), default=0)


def _number(digits: str) -> int:
    # Python refuses to convert more digits, and to format by any number that needs them; only zeros can be in front.
    return int(digits[-4000:] or 0)


def _length_of_range(values: list[Any]) -> int:
    try:
        return len(range(*values))
    except OverflowError:
        return sys.maxsize
    except (TypeError, ValueError):  # raised again by the call
        return 0


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    """The values, with those of tuples, lists and mappings in the place of these."""
    for value in values:
        if isinstance(value, Mapping):
            yield from value.values()
        else:
            yield from value if isinstance(value, (tuple, list)) else (value,)


def _spend(work: int) -> None:
    # Without a rendering, Jinja's optimiser is computing a constant: it takes the error as a no, and the step is counted later.
    left = _left.get()
    left[0] -= work
    if left[0] < 0:
        raise TooMuchWorkError("it repeats or builds more than a chat template may")


def _step() -> None:
    _spend(_STEP)


def _built(value: Any) -> Any:
    if isinstance(value, (*_TEXT_OR_LIST, dict)):
        _spend(len(value))
    return value


def _concat(parts: Iterable[str]) -> str:
    parts = list(parts)
    _spend(sum(map(len, parts)))
    return "".join(parts)
