"""Renders a Jinja chat template with limits on its work and on its output.

Contract: the text is that of `tokenizer.apply_chat_template`, or `TooMuchWorkError` is raised. A chat template is a program that
comes with a model. The sandbox of transformers denies it access to files and to the interpreter, but does not limit memory and
time. Here, the same environment counts the work of operators, filters, calls and loops:

- Each character or element that a step builds costs 1. Each iteration of a loop and each call of a macro costs `_STEP`. One
  rendering may spend `WORK`, plus 64 for each character of its input. The count is the same on every machine.
- Repetition, powers, arguments that determine a size, widths in format strings, `replace` and `join` are checked before the step,
  so that no such expression can allocate gigabytes.
- The output is counted piece by piece, as the template writes it.

Limits of this method: other functions are counted after they have returned; a list that contains one long text many times is
counted by its elements until it is written; the condition of a loop (`for … if …`) is not counted. A template that was written to
waste memory or time can therefore still do so. A guarantee would need a separate process with limits of the operating system.
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

# The number of characters and elements that one rendering may build in all its steps: at most half a gigabyte of text.
WORK = 2**27
# The maximum length of a rendered text, in characters.
OUTPUT = 2**20
# Both limits grow with each character of the turns, because templates write it once or twice, and copy it a few times.
_WORK_EACH, _OUTPUT_EACH = 64, 16
# At this cost, loops end after about 300,000 iterations, which take seconds.
_STEP = 400
# The flags after the % of a field in a format string. After a key, as in "%(name)5d", they follow the bracket.
_FLAGS, _FLAGS_AFTER_KEYS = re.compile(r"%([-#0 +.*\d]*)"), re.compile(r"[%)]([-#0 +.*\d]*)")
# A field in the format specification of another field, as in "{:{width}}".
_INNER_FIELD = re.compile(r"\{[^{}]*\}")
_DIGITS = re.compile(r"\d+")
# The number of characters that are read of a text that may be a width.
_WIDTH_CHARS = 64
# Filters, methods and functions, by name, whose integer arguments determine the size of the result. For all others, an integer is
# a plain value (macros, `namespace`, `default`, `int`) or an upper limit (`truncate`, `wordwrap`).
_SIZED = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "indent", "tojson", "batch", "slice", "round"}
_SIZED |= {"lipsum", "generate_lorem_ipsum"}
_RANGES = ("range", "safe_range")
_TEXT_OR_LIST = (str, bytes, list, tuple)

# The remaining work of the current rendering. The list has one element, which is changed in place.
_left: ContextVar[list[int]] = ContextVar("sparsort_template_work")


class TooMuchWorkError(Exception):
    """A template exceeds its limit of work or of output."""


def can_meter(tokenizer: Any) -> bool:
    """Whether a tokenizer renders its chat template with the environment of transformers, which is metered here."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is PreTrainedTokenizerBase.apply_chat_template and _compiler() is not None


@functools.lru_cache(maxsize=16)
def compile_metered(source: str) -> Any:
    """Compile a template in the metered environment, or raise a `jinja2.TemplateError`."""
    return _environment().from_string(source)


def render_metered(template: Any, values: Mapping[str, Any], *, n_chars: int) -> str:
    """Render a template that `compile_metered` returned.

    Args:
        template: the compiled template.
        values: its variables.
        n_chars: number of characters of the turns among them; the limits grow with it.

    Raises:
        TooMuchWorkError: the text is too long, or its steps cost too much.
        Exception: any error that the template raises.
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
    """Raise a `TooMuchWorkError` if a text of `written` characters is too long for turns of `n_chars` characters."""
    limit = OUTPUT + _OUTPUT_EACH * n_chars
    if written > limit:
        raise TooMuchWorkError(f"it writes more than {limit:,} characters for turns of {n_chars:,}")


def _compiler() -> Any:
    # This function is private, but no public one has the filters, globals and extensions that chat templates may use.
    from transformers.utils import chat_template_utils

    return getattr(chat_template_utils, "_compile_jinja_template", None)


@functools.cache
def _environment() -> Any:
    """The environment of transformers, with meters on all operations that can build or repeat a lot."""
    environment = _compiler()("").environment.overlay()
    # The compiler of the sandbox calls `binop_table` for these operators instead of writing them into the code.
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
    """The compiler of Jinja, extended to count iterations, calls of macros, and the texts that `~` joins."""
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
    """Wrap an operator or a filter so that its work is counted."""
    # The first argument of a filter with this mark is Jinja's context, evaluation context or environment.
    n_own = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def metered(*args: Any, **options: Any) -> Any:
        _check_before(name, [*args[n_own:], *options.values()])
        return _built(function(*args, **options))

    return metered


def _call(call: Callable[..., Any], context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
    """Call a function or method of a template like `environment.call`, and count its work."""
    if function is not _step:
        # The sandbox wraps the methods `format` and `format_map` of a text, so the text is found through the wrapped method.
        bound = getattr(function, "__wrapped__", function)
        subject = getattr(bound, "__self__", None)
        _check_before(str(getattr(bound, "__name__", "")), [subject, *args, *options.values()])
    return _built(call(context, function, *args, **options))


def _check_before(name: str, arguments: list[Any]) -> None:
    """Refuse a step that would cost more than the remaining work; the first argument is the object it is applied to."""
    left = _left.get()[0]
    first, *others = arguments
    expected = 0
    if name in ("*", "**"):
        sizes = [len(value) if isinstance(value, _TEXT_OR_LIST) else value for value in arguments]
        if sizes != arguments:  # a text or a list is repeated
            expected = sizes[0] * sizes[1]
        elif all(isinstance(value, int) for value in arguments):
            # The time of arithmetic with long numbers grows faster than their length, so each bit costs a whole step.
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
        raise TooMuchWorkError("it builds a text or list that exceeds the memory limit of a chat template")


def _expanded(name: str, values: list[Any]) -> int:
    """An upper bound of the length of the result of `replace` or `join`; 0 if it cannot be known beforehand."""
    if name == "replace" and len(values) >= 3 and all(isinstance(value, str) for value in values[:3]):
        text, old, new = values[:3]
        return len(text) + int(text.count(old)) * len(new)
    if name == "join":
        # The separator is the last argument of the filter and the first of the method, and the joined value may be a text as
        # well. So either of the two values may be the separator: its length times the number of items is at most the product.
        pieces = (len(item) for value in values for item in value if isinstance(item, str))
        lengths = sorted(map(len, values))
        return sum(pieces) + (lengths[0] * lengths[-1] if len(values) > 1 else 0)
    return 0


def _widest(template: str, values: list[Any]) -> int:
    """The largest width or precision in a format string of % or of braces, or in the values that it may take one from."""
    texts = (_FLAGS_AFTER_KEYS if "%(" in template else _FLAGS).findall(template)
    specs = []
    with contextlib.suppress(ValueError):  # a field is invalid, but Python formats the fields before it
        for _, _, spec, _ in Formatter().parse(template):
            specs.append(spec or "")
    if any("*" in text for text in texts) or any("{" in spec for spec in specs):
        # Between braces, a text can also be part of a width.
        candidates = [str(value)[:_WIDTH_CHARS] for value in _flat(values) if isinstance(value, (int, float, str))]
        largest = max((digits for text in candidates for digits in _DIGITS.findall(text)), key=_number, default="")
        specs = [_INNER_FIELD.sub(largest, spec) for spec in specs] + [largest]
    return max((_number(digits) for text in [*texts, *specs] for digits in _DIGITS.findall(text)), default=0)


def _number(digits: str) -> int:
    # Python refuses to convert longer texts, and to format with wider fields. A valid width can only have leading zeros there.
    return int(digits[-4000:] or 0)


def _length_of_range(values: list[Any]) -> int:
    try:
        return len(range(*values))
    except OverflowError:
        return sys.maxsize
    except (TypeError, ValueError):  # the call itself raises the same error
        return 0


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    """The values, with tuples, lists and mappings replaced by their elements."""
    for value in values:
        if isinstance(value, Mapping):
            yield from value.values()
        else:
            yield from value if isinstance(value, (tuple, list)) else (value,)


def _spend(work: int) -> None:
    # Outside of a rendering, Jinja's optimiser is evaluating a constant expression, and `get` raises a LookupError. The optimiser
    # then keeps the expression as it is, so that it is counted in the rendering.
    left = _left.get()
    left[0] -= work
    if left[0] < 0:
        raise TooMuchWorkError("it repeats or builds more than a chat template is allowed to")


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
