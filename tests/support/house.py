"""Measures of the code itself, each with the floor that it must hold: the table of `make house`.

    python tests/support/house.py                    # the table
    python tests/support/house.py --json             # one JSON object
    python tests/support/house.py --list words       # every hit of one row, with file and line

`tests/test_house.py` asserts the rows that hold already with the same functions. The library is the five folders and the import
root `src`; tests, benchmarks and examples are not part of it. Everything is read from the files that git tracks or would track,
and nothing is imported, so that the table works in any state of the tree.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import house_words

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("attention", "curriculum", "kernels", "recipes", "scoring")
LIBRARY = (*FOLDERS, "src")
# Bases that add no methods of their own which somebody else would call.
_PLAIN_BASES = {"ABC", "Enum", "Generic", "NamedTuple", "Protocol", "StrEnum", "TypedDict", "object"}


@dataclass(frozen=True, slots=True)
class Hit:
    """One thing that a row counts."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a measure that must be within `least` … `most`.

    Attributes:
        name: what `--list` takes.
        what: the measure in words.
        hits: what is counted, or what is over the floor.
        value: the measure; None for the number of hits.
        least, most: the floor.
    """

    name: str
    what: str
    hits: Callable[[], Sequence[Hit]] = tuple
    value: Callable[[], float] | None = None
    least: float = 0
    most: float = 0

    def facts(self) -> dict[str, object]:
        """The row as values of JSON."""
        value = round(self.value() if self.value else len(self.hits()), 1)
        floor = f"{self.least:g} to {self.most:g}" if self.least else f"≤ {self.most:,.0f}" if self.most else "0"
        return {"what": self.what, "value": value, "floor": floor, "holds": self.least <= value <= self.most}


# The files


@functools.cache
def files() -> tuple[Path, ...]:
    """What git tracks or would track, relative to the root; in an unpacked sdist, everything outside of dotted folders."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return tuple(sorted(path for path in paths if (ROOT / path).is_file() and not (ROOT / path).is_symlink()))


def sources(*folders: str) -> list[Path]:
    """The Python files of these top-level folders, by default of all."""
    return [path for path in files() if path.suffix == ".py" and (not folders or path.parts[0] in folders)]


@functools.cache
def text_of(path: Path) -> str:
    """The text of a file."""
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(text_of(path))


def module_of(path: Path) -> str:
    """The name that a file of the library is imported by."""
    parts = path.with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "src" else ("sparsort", *parts)).removesuffix(".__init__")


# Sizes


def entries_per_folder() -> dict[Path, int]:
    """Entries of every folder of the library, subfolders included; not `__init__`, `py.typed` and links."""
    entries: dict[Path, set[str]] = defaultdict(set)
    for path in files():
        if path.parts[0] in LIBRARY and path.name != "py.typed" and path.stem != "__init__":
            for folder in path.parents:
                if folder != Path():
                    entries[folder].add(path.relative_to(folder).parts[0])
    return {folder: len(names) for folder, names in entries.items()}


def wide_folders(most: int = 12) -> list[Hit]:
    """Folders with more entries than `most`."""
    return [Hit(f, 1, f"{count} entries") for f, count in sorted(entries_per_folder().items()) if count > most]


def long_files(most: int = 500) -> list[Hit]:
    """Files with more lines than `most`, tests and benchmarks included."""
    lengths = ((path, len(text_of(path).splitlines())) for path in sources())
    return [Hit(path, 1, f"{length} lines") for path, length in lengths if length > most]


def long_functions(most: int = 60) -> list[Hit]:
    """Functions of the library, benchmarks and examples with more lines than `most`, docstring and decorators included."""
    hits = []
    for path in sources(*LIBRARY, "benchmarks", "examples"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if (length := (node.end_lineno or start) - start + 1) > most:
                    hits.append(Hit(path, start, f"{node.name} has {length} lines"))
    return hits


def library_lines() -> int:
    """Lines of the library that are not blank."""
    return sum(bool(line.strip()) for path in sources(*LIBRARY) for line in text_of(path).splitlines())


def comment_share() -> float:
    """Percent of all lines, outside of tests, that are nothing but a comment: 1.1 at commit b715bab."""
    comments = lines = 0
    for path in sources(*LIBRARY, "benchmarks", "examples"):
        comments += sum(not token.line[: token.start[1]].strip() for token in _tokens(path) if _is_comment(token))
        lines += len(text_of(path).splitlines())
    return 100 * comments / lines


@functools.cache
def _tokens(path: Path) -> tuple[tokenize.TokenInfo, ...]:
    lines = iter(text_of(path).splitlines(keepends=True))
    return tuple(tokenize.generate_tokens(lambda: next(lines, "")))


def _is_comment(token: tokenize.TokenInfo) -> bool:
    return token.type == tokenize.COMMENT


# Modules and what they import


def imports(tree: ast.AST, *, for_types: bool = True) -> Iterator[tuple[str, ast.stmt]]:
    """Every name that is imported anywhere in a file, by its absolute name; `for_types`: under TYPE_CHECKING too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", node) for alias in node.names)
        elif for_types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imports(node, for_types=for_types)


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Module of the library → the modules of the library that it imports when it runs, within functions too."""
    modules = {module_of(path): path for path in sources(*LIBRARY)}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for name, _ in imports(tree_of(path), for_types=False):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                graph[module].add(target)
    return graph


def import_cycles() -> list[Hit]:
    """Groups of modules that import each other, directly or through others."""
    graph = import_graph()
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            if (module := waiting.pop()) not in seen:
                seen.add(module)
                waiting += graph[module]
        reached[start] = seen
    cycles = {frozenset(m for m in reached[start] if start in reached[m]) for start in graph if start in reached[start]}
    paths = {module_of(path): path for path in sources(*LIBRARY)}
    return [Hit(paths[min(cycle)], 1, " ↔ ".join(sorted(cycle))) for cycle in sorted(cycles, key=min)]


def one_importer() -> list[Hit]:
    """Files that a single file of the library imports: they may belong into it."""
    importers = Counter(target for targets in import_graph().values() for target in targets)
    return [
        Hit(
            path, 1, f"only {next(m for m, targets in import_graph().items() if module_of(path) in targets)} imports it"
        )
        for path in sources(*LIBRARY)
        if importers[module_of(path)] == 1 and path.name != "__init__.py"
    ]


# Names


def shared_class_names() -> list[Hit]:
    """Classes whose name, apart from a leading underscore, another class of the library has."""
    classes = defaultdict(list)
    for path in sources(*LIBRARY):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                classes[node.name.lstrip("_")].append(Hit(path, node.lineno, f"class {node.name}"))
    return [hit for _, hits in sorted(classes.items()) if len(hits) > 1 for hit in hits]


def symbols_of_tests() -> list[Hit]:
    """Functions, classes, methods and constants of the library that only tests use.

    A symbol of a module is used where its own file names it again, where another file imports it or names it on the module, and
    where a string does, since tables name functions in strings. A method is used where any file outside of tests has an attribute
    or a string of its name, so one that shares its name with another method is never listed. What overrides a method of another
    package's class is not listed, nor is what README or a page of docs names.
    """
    users = [path for path in sources() if path.parts[0] != "tests"]
    attributes = frozenset().union(*(_uses(path).attributes | _uses(path).strings for path in users))
    in_tests = frozenset().union(*(_uses(path).names | _uses(path).attributes for path in sources("tests")))
    guides = [path for path in files() if path.suffix == ".md" and path.parts[0] in ("README.md", "docs")]
    documented = {
        word for path in guides if "design" not in path.parts for word in re.findall(r"\w+", "".join(_code_in(path)))
    }
    imported = frozenset().union(*(_uses(path).imported for path in users))
    strings = frozenset().union(*(_uses(path).strings for path in users))
    hits = []
    # What the kernels are compared with is in `reference.py`, for tests alone.
    for path in [path for path in sources(*LIBRARY) if path.name != "reference.py"]:
        for name, line in _definitions(tree_of(path)):
            own = name.rpartition(".")[2]
            if "." in name:
                used = own in attributes or own in _CALLED_BY_OTHERS
            else:
                full = f"{module_of(path)}.{name}"
                used = own in _uses(path).names or full in imported or own in strings or _is_named_on(users, full)
            if not used and own in in_tests and own not in documented:
                hits.append(Hit(path, line, name))
    return hits


# What another program looks up by name: IPython shows an object by `_repr_html_`, and Trainer asks for `total_batch_size`.
_CALLED_BY_OTHERS = frozenset({"_repr_html_", "total_batch_size"})


@dataclass(frozen=True, slots=True)
class _Uses:
    """What a file uses: names that it reads, attributes, words of strings that may name an object, and what it imports."""

    names: frozenset[str]
    attributes: frozenset[str]
    strings: frozenset[str]
    imported: frozenset[str]


@functools.cache
def _uses(path: Path) -> _Uses:
    nodes = list(ast.walk(tree_of(path)))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return _Uses(
        names=frozenset(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)),
        attributes=frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute)),
        strings=frozenset(
            word for text in texts if re.fullmatch(r"[\w.:]+", text) for word in re.findall(r"\w+", text)
        ),
        imported=frozenset(name for name, _ in imports(tree_of(path))),
    )


def _is_named_on(users: Sequence[Path], full: str) -> bool:
    """Whether a file imports the module of this symbol, and has an attribute of its name."""
    module, _, name = full.rpartition(".")
    return any(module in _uses(path).imported and name in _uses(path).attributes for path in users)


def _code_in(path: Path) -> list[str]:
    """What a document has between backticks."""
    return re.findall(r"```.*?```|`[^`\n]+`", text_of(path), flags=re.DOTALL)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The symbols of a module with their lines, methods as `Class.method`."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__"):
            yield node.name, node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((t.id, t.lineno) for t in targets if isinstance(t, ast.Name) and not t.id.startswith("__"))
        if isinstance(node, ast.ClassDef) and _has_own_bases(node):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("__"):
                    yield f"{node.name}.{part.name}", part.lineno


def _has_own_bases(node: ast.ClassDef) -> bool:
    """Whether the class extends only classes of the library."""
    bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
    return bases <= _PLAIN_BASES | _class_names()


@functools.cache
def _class_names() -> frozenset[str]:
    trees = (tree_of(path) for path in sources(*LIBRARY))
    return frozenset(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


# Language


def word_hits() -> list[Hit]:
    """Words and phrases of the list in `house_words`, in names, comments, strings and documents."""
    hits = [
        Hit(path, line + text.count("\n", 0, begin), f"{word}: {_around(text, begin)}")
        for path, line, text in _texts()
        for word, begin in house_words.find(str(path), text)
    ]
    return sorted(hits, key=lambda hit: (str(hit.path), hit.line))


def reasons_used() -> set[str]:
    """The reasons in `house_words` that some text needs."""
    return {reason for path, _, text in _texts() for reason in house_words.reasons_in(str(path), text)}


@functools.cache
def _texts() -> tuple[tuple[Path, int, str], ...]:
    """(file, line, text) of everything that a person wrote, apart from the word list itself."""
    read = [path for path in files() if path.suffix in (".py", ".md") and path.name != "house_words.py"]
    return tuple(
        (path, line, text)
        for path in read
        for line, text in (_prose(path) if path.suffix == ".py" else [(1, text_of(path))])
    )


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string, every block of comments, and every name that a file defines, in words."""
    block: list[str] = []
    start = 0
    for token in _tokens(path):
        if _is_comment(token):
            if block and token.start[0] != start + len(block):
                yield start, "\n".join(block)
                block = []
            start = start if block else token.start[0]
            block.append(token.string)
        elif token.type == tokenize.STRING:
            yield token.start[0], token.string
    if block:
        yield start, "\n".join(block)
    for node in ast.walk(tree_of(path)):
        name = getattr(node, "name", None) or getattr(node, "arg", None)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if isinstance(name, str) and isinstance(node, (ast.stmt, ast.arg, ast.Name)):
            yield node.lineno, " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name))


def _around(text: str, begin: int) -> str:
    return " ".join(text[max(0, begin - 25) : begin + 45].split())


# The table


ROWS = (
    Row("entries", "entries of the largest folder", wide_folders, lambda: max(entries_per_folder().values()), most=12),
    Row("lines", "lines of the library that are not blank", value=library_lines, most=38_500),
    Row("comments", "comment lines, % of lines without tests", value=comment_share, least=3, most=6),
    Row("classes", "classes that share a name", shared_class_names),
    Row("cycles", "groups of modules that import each other", import_cycles),
    Row("importers", "files with exactly one importer", one_importer, most=40),
    Row("words", "hits of the word list", word_hits),
    Row("functions", "functions over 60 lines", long_functions),
    Row("files", "files over 500 lines", long_files),
    Row("symbols", "symbols of the library that only tests use", symbols_of_tests),
)


def main() -> None:
    """Print the table, or the hits of one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", metavar="NAME", choices=[row.name for row in ROWS], help="print every hit of one row")
    arguments = parser.parse_args()
    write = sys.stdout.write
    if arguments.list:
        row = next(row for row in ROWS if row.name == arguments.list)
        write("".join(f"{hit}\n" for hit in row.hits()))
    elif arguments.json:
        write(json.dumps({row.name: row.facts() for row in ROWS}, ensure_ascii=False, indent=1) + "\n")
    else:
        write(f"{'row':<10} {'measure':<44} {'today':>8}  {'floor':<10} holds\n")
        for row in ROWS:
            facts = row.facts()
            holds = "yes" if facts["holds"] else "NO"
            write(f"{row.name:<10} {row.what:<44} {facts['value']:>8,}  {facts['floor']:<10} {holds}\n")


if __name__ == "__main__":
    main()
