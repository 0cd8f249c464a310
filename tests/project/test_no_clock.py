"""No test waits for a time or asserts on one: on a loaded machine every limit is too short, and every pause misses its moment.

The code that tests run in other processes is read too: it is in strings. What to use instead is in `tests/support`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLOCKS = {"sleep", "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
CLOCKS |= {"process_time", "process_time_ns", "thread_time", "thread_time_ns"}
MODULES = {"time", "asyncio", "timeit", "sched"}
# Methods whose only positional argument, or the argument of this name, is a limit in seconds.
LIMITS = {"timeout", "seconds", "deadline"}
WAITS = {"wait", "join", "acquire", "communicate"}
# Where a clock is unavoidable: the file, and why.
ALLOWED = {"project/test_no_clock.py": "the examples below, which the check has to find"}


def _trees(tree: ast.AST) -> Iterator[ast.AST]:
    """The tree itself, and that of every string in it that is a program."""
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                yield ast.parse(node.value)
            except SyntaxError:
                continue


def _clocks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every use of a clock and every limit in seconds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from ((node.lineno, f"from {node.module} import {alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in MODULES and node.attr in CLOCKS:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, f"{ast.unparse(node.func)}({text})") for text in _limits(node))


def _limits(call: ast.Call) -> Iterator[str]:
    for keyword in call.keywords:
        if keyword.arg in LIMITS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is None):
            yield ast.unparse(keyword)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    for argument in call.args if name in WAITS else []:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int | float):
            yield ast.unparse(argument)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_reads_a_clock_or_has_a_limit_in_seconds(path: Path) -> None:
    name = path.relative_to(TESTS).as_posix()
    found = [use for tree in _trees(ast.parse(path.read_text(encoding="utf-8"))) for use in _clocks(tree)]
    assert bool(found) == (name in ALLOWED), found


@pytest.mark.parametrize(
    "code",
    [
        "import time\ntime.sleep(0.1)",
        "import time\nassert time.monotonic() < 5",
        "from time import sleep",
        "process.communicate(timeout=60)",
        "process.wait(30)",
        "event.wait(0.5)",
        "CHILD = '''\nimport time\ntime.sleep(1)\n'''",
    ],
)
def test_a_clock_is_found(code: str) -> None:
    assert [use for tree in _trees(ast.parse(code)) for use in _clocks(tree)]


@pytest.mark.parametrize(
    "code", ["settings(deadline=None)", "process.wait()", "time = dict(time=1)", "datetime.time(12)", '", ".join(x)']
)
def test_code_without_a_clock_is_accepted(code: str) -> None:
    assert not [use for tree in _trees(ast.parse(code)) for use in _clocks(tree)]
