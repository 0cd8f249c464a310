"""The worked examples of CONTRIBUTING.md: applied to a copy of the tree, they pass their own tests and those of the tables.

A block of code names its file in its first line. A new file is written as it is. In an existing file, imports go after its
imports, entries to the end of its table, with their names in the `Literal` of names, and other code where CONTRIBUTING.md puts
it. The tests in the blocks have values that were computed by hand.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
_COPIED = (
    "README.md",
    "attention",
    "curriculum",
    "docs",
    "kernels",
    "pyproject.toml",
    "recipes",
    "scoring",
    "src",
    "tests",
)
# The tests that look at every entry of a table, and need no model.
_OF_TABLES = (
    "tests/test_doc_tables.py",
    "tests/test_registry.py",
    "tests/curriculum/demos/criteria/test_criteria.py",
    "tests/kernels/sparsity/test_torch_rows.py",
    "tests/recipes/cli/test_option_conditions.py",
)
_BLOCK = re.compile(r"^```python\n# (new file: )?([\w/]+\.py)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TABLES = {
    "a selector": "SelectorName",
    "an order": "Order",
    "a criterion": "CriterionName",
    "a pacing": "PacingKind",
    "a metric": "MetricName",
    "a scorer": "ScorerName",
    "an attention selector": "SelectorKind",
    "a command": "",
}


@dataclass(frozen=True)
class Block:
    """A block of code: what it is an example of, its file, and whether it is all of the file."""

    example: str
    path: str
    is_new: bool
    code: str


def _blocks() -> Iterator[Block]:
    for section in re.split(r"^### ", _GUIDE, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        for new, path, code in _BLOCK.findall(body.split("\n## ")[0]):
            yield Block(title.lower(), path, bool(new), code)


BLOCKS = tuple(_blocks())


def _tests_of_examples() -> list[str]:
    return [block.path for block in BLOCKS if block.is_new and block.path.startswith("tests/")]


def _add(source: str, block: Block) -> str:
    """The source of an existing file with the code of a block added to it."""
    added = []
    module = ast.parse(source)
    for node in ast.parse(block.code).body:
        code = "".join(f"{line}\n" for line in block.code.splitlines()[node.lineno - 1 : node.end_lineno])
        added += list(_places(module, node, code, _TABLES[block.example]))
    lines = [*source.splitlines(keepends=True), ""]
    for (line, column), text in sorted(added, reverse=True):
        lines[line] = lines[line][:column] + text + lines[line][column:]
    return "".join(lines)


def _places(module: ast.Module, node: ast.stmt, code: str, literal: str) -> Iterator[tuple[tuple[int, int], str]]:
    """Where one statement of a block goes, as a line and a column from 0, and its text there."""
    match node:
        case ast.ImportFrom():
            yield max(_end(one) for one in module.body if isinstance(one, ast.ImportFrom)), code
        case ast.Expr(value=ast.Tuple(elts=[ast.Call(keywords=[ast.keyword(value=ast.Constant(value=name)), *_])])):
            names = next(one for one in module.body if literal in _targets(one))
            last = next(reversed([one for one in ast.walk(names) if isinstance(one, ast.Constant)]))
            yield (last.lineno - 1, last.end_col_offset or 0), f', "{name}"'
            tables = (one for one in module.body if isinstance(one, ast.Assign) and _called(one) == "Registry")
            line, _ = _end(next(tables))
            yield (line - 2, 0), code
        case ast.Expr(value=ast.Call(func=called)):
            start = ast.unparse(called).partition("(")[0]
            yield max(_end(one) for one in module.body if ast.unparse(one).startswith(start)), code
        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))]) if name.isupper():
            yield _end(next(one for one in module.body if name in _targets(one))), code
        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))]):
            returns = (one for one in ast.walk(module) if isinstance(one, ast.Return))
            yield next((one.lineno - 1, 0) for one in returns if ast.unparse(one) == f"return {name}"), f"    {code}"
        case _:
            yield _end(module.body[-1]), f"\n\n{code}"


def _targets(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [ast.unparse(target) for target in targets]


def _called(node: ast.Assign) -> str:
    return ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""


def _end(node: ast.stmt) -> tuple[int, int]:
    """The beginning of the line after a statement."""
    assert node.end_lineno is not None
    return node.end_lineno, 0


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source in which every example is applied and the tables of the documentation are made again."""
    root = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)
    for block in BLOCKS:
        path = root / block.path
        assert path.exists() != block.is_new, block.path
        path.write_text(block.code if block.is_new else _add(path.read_text(encoding="utf-8"), block), encoding="utf-8")
    _run(root, "docs/generate_tables.py")
    return root


def _run(root: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_example_has_a_test_and_is_in_the_list_of_what_can_be_added() -> None:
    listed = re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \| .*? \| `?(\w*)`? *\|$", _GUIDE, re.MULTILINE)
    assert {title: name for title, _, name in listed} == _TABLES
    assert all(title.replace(" ", "-") == link for title, link, _ in listed)
    tested = {block.example for block in BLOCKS if block.path in _tests_of_examples()}
    assert {block.example for block in BLOCKS} == tested == set(_TABLES)
    assert len(BLOCKS) == _GUIDE.count("```python\n")


def test_every_path_in_the_guide_is_there() -> None:
    text = _BLOCK.sub("", _GUIDE)
    paths = re.findall(
        r"`((?:attention|benchmarks|curriculum|docs|examples|kernels|recipes|scoring|src|tests)/[\w/.]*)`", text
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_the_examples_pass_their_tests_and_those_of_the_tables(tree: Path) -> None:
    tests = (*_tests_of_examples(), *_OF_TABLES)
    output = _run(tree, "-P", "-m", "pytest", "-q", "-n", "0", "-rA", "-p", "no:cacheprovider", *tests)
    assert set(re.findall(r"^PASSED ([\w/]+\.py)", output, re.MULTILINE)) == set(tests)


@pytest.mark.slow
def test_the_examples_have_the_style_of_the_house(tree: Path) -> None:
    _run(tree, "-m", "ruff", "format", "--quiet", *(block.path for block in BLOCKS if not block.is_new))
    _run(tree, "-m", "ruff", "check", "--no-cache", "--fix", "--exit-zero", "--select", "I", ".")
    _run(tree, "-m", "ruff", "check", "--no-cache", ".")
    _run(tree, "-m", "ruff", "format", "--no-cache", "--check", ".")
