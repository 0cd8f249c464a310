"""Every option that a message names is one that the command has, whichever command the message can come from.

How the claim is checked: a message is a string constant in the source. The tree is read as a graph of definitions (functions,
methods, classes and constants of a module) with an edge for every name that a definition uses, through imports. A method is
reached if its class is reached and its name is used anywhere in what is reached. A command reaches more in this graph than it
ever runs, so an option that all commands have which reach its message is right wherever the message appears. `EXCEPT` lists what
the graph cannot know, with reasons, and an entry that is not needed fails. In a message, an option is one of the command in whose
example it is (`sparsort calibrate … --out`), or that is named after it (`--out of sparsort calibrate`), or else of the command
that runs.
"""

from __future__ import annotations

import ast
import functools
import gc
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest
import typer.main
from typer.testing import CliRunner

from sparsort.recipes.cli import option_conditions
from sparsort.recipes.cli.app import app

ROOT = Path(__file__).parents[3]
_OURS = tuple(str(ROOT / name) for name in ("attention", "curriculum", "kernels", "recipes", "scoring", "src"))
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_COMPUTED = re.compile(r"(?:^|[\s('\"])--$")
# A command whose options follow, within one example; and the commands that are named after an option.
_BEFORE = re.compile(r"(?:\bsparsort |^')([a-z]+)\b[^().:;]*$")
_AFTER = re.compile(r"(?: [^\s()]+)? of sparsort ([a-z]+(?:(?:, | and )[a-z]+)*)")
_PLACE = re.compile(r"[\w.]+:\w+")
_OTHER_PROGRAM = re.compile(r"\b(?:pip|torchrun|iconv|lm_eval)\b[^().:;]*$")

# What declares an option; `test_the_help_of_an_option_names_options_of_its_command` reads what it says.
_DECLARES = ("option", "same_option", "shares", "whole_numbers")

_NO_CONVERSATIONS = "the command passes templates, never a column of conversations"
_STOPPED = "sparsort.recipes.cli.app._stopped"
# (definition, command): the reason why the command never gives this message.
EXCEPT: dict[tuple[str, str], str] = {
    ("sparsort.scoring.prompts.prompt._SYSTEM_WITHOUT_CHAT", "train"): "train reads no system turn",
    (
        "sparsort.scoring.scorers.base.Request.need_prompt",
        "ablate",
    ): "ablate refuses a source without a prompt before it scores",
    ("sparsort.scoring.prompts.conversations.conversation_fields", "ablate"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.conversations.conversation_fields", "choose"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.conversations.conversation_fields", "classify"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.conversations._items", "ablate"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.conversations._items", "choose"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.conversations._items", "classify"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.prompt.Prompt.given", "ablate"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.prompt.Prompt.given", "choose"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.prompt.Prompt.given", "classify"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.prompt._USE_MESSAGES", "ablate"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.prompt._USE_MESSAGES", "choose"): _NO_CONVERSATIONS,
    ("sparsort.scoring.prompts.prompt._USE_MESSAGES", "classify"): _NO_CONVERSATIONS,
    (
        "sparsort.recipes.score.config.ScorerConfig.__post_init__",
        "calibrate",
    ): "calibrate shares one option with this configuration, and makes no such configuration",
}


@dataclass
class Definition:
    """A function, method, class body or constant, with what it uses."""

    name: str
    uses: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    texts: list[tuple[str, int]] = field(default_factory=list)


class Tree:
    """The definitions of the package, by dotted names such as "sparsort.scoring.prompts.prompt.Prompt.of"."""

    def __init__(self) -> None:
        self.definitions: dict[str, Definition] = {}
        self.methods: dict[str, dict[str, str]] = defaultdict(dict)
        self.bases: dict[str, list[str]] = {}
        self.aliases: dict[str, dict[str, str]] = {}
        modules = dict(_modules())
        for module, tree in modules.items():
            self.aliases[module] = dict(_imports(tree, module)) | {
                name: f"{module}.{name}" for node in tree.body for name in _names(node)
            }
        for module, tree in modules.items():
            self._read(module, tree)

    def reached(self, roots: list[str]) -> set[str]:
        """The definitions that some roots use, directly or not."""
        found: set[str] = set()
        used: set[str] = set()
        # The methods of classes that were found, by the name that is not used yet.
        unused: dict[str, list[str]] = defaultdict(list)
        waiting = list(roots)
        while waiting:
            name = self.resolve(waiting.pop())
            if name is None or name in found:
                continue
            found.add(name)
            definition = self.definitions[name]
            waiting += definition.uses
            for attribute in definition.attributes - used:
                used.add(attribute)
                waiting += unused.pop(attribute, [])
            # A framework calls the methods of its subclasses by names that are nowhere here.
            outside = self._extends_outside(name)
            for owner in (name, *self._bases(name)) if outside else (name,):
                for short, method in self.methods.get(owner, {}).items():
                    if outside or short in used or short.startswith("__"):
                        waiting.append(method)
                    else:
                        unused[short].append(method)
        return found

    def _bases(self, owner: str) -> set[str]:
        """The classes of the package that a class extends, directly or not."""
        own = {base for name in self.bases.get(owner, []) if (base := self.resolve(name)) in self.bases}
        return own.union(*map(self._bases, own)) if own else own

    def _extends_outside(self, owner: str) -> bool:
        return any(
            self.resolve(base) is None for name in (owner, *self._bases(owner)) for base in self.bases.get(name, [])
        )

    def resolve(self, name: str) -> str | None:
        """The definition that a dotted name leads to, through what packages import again."""
        for _ in range(8):
            if name in self.definitions:
                return name
            module, _, rest = name.rpartition(".")
            if module in self.aliases and rest in self.aliases[module] and self.aliases[module][rest] != name:
                name = self.aliases[module][rest]
                continue
            owner = self.resolve(module) if module in self.definitions else None
            if owner in self.methods and rest in self.methods[owner]:
                return self.methods[owner][rest]
            # `Scores.open`, where Scores was imported from elsewhere.
            outer, _, short = module.rpartition(".")
            if outer in self.aliases and short in self.aliases[outer] and self.aliases[outer][short] != module:
                name = f"{self.aliases[outer][short]}.{rest}"
                continue
            return None
        return None

    def _read(self, module: str, tree: ast.Module) -> None:
        own = [f"{module}.{name}" for node in tree.body for name in _names(node)]
        for node in tree.body:
            for name in _names(node):
                self._define(f"{module}.{name}", node, module)
        # What a table of entries names by its place ("module:class"), its entries load.
        loading = [self.definitions[name] for name in (*own, *(m for one in own for m in self.methods[one].values()))]
        for definition in loading:
            if "sparsort.registry.load" in definition.uses:
                definition.uses |= set(_places(tree, module))

    def _define(self, name: str, node: ast.AST, module: str) -> None:
        definition = self.definitions[name] = Definition(name)
        inner: list[ast.AST] = [node]
        if isinstance(node, ast.ClassDef):
            inner = [*node.bases, *node.keywords, *node.decorator_list]
            names = [_dotted(base).partition(".") for base in node.bases]
            self.bases[name] = [self.aliases[module].get(first, first) + dot + rest for first, dot, rest in names]
            for child in node.body:
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    self._define(f"{name}.{child.name}", child, module)
                    self.methods[name][child.name] = f"{name}.{child.name}"
                else:
                    inner.append(child)
        local = self.aliases[module]
        children = [child for part in inner for child in ast.walk(part)]
        for child in children:
            if isinstance(child, ast.Import | ast.ImportFrom):
                local = {**local, **dict(_imported(child, module))}
        own = set(_bound(node)) - set(local.keys() - self.aliases[module].keys())
        skipped = {id(one) for child in children for one in _without_effect(child)}
        for child in children:
            if id(child) in skipped:
                continue
            if isinstance(child, ast.Name) and child.id in local and child.id not in own:
                definition.uses.add(local[child.id])
            elif isinstance(child, ast.Attribute):
                definition.attributes.add(child.attr)
                if (dotted := _dotted(child)) and dotted.partition(".")[0] in local:
                    first, _, rest = dotted.partition(".")
                    definition.uses.add(f"{local[first]}.{rest}")
            elif isinstance(child, ast.Constant) and isinstance(child.value, str):
                definition.texts.append((child.value, child.lineno))
                # getattr(self, name), and tables of names of methods.
                if child.value.isidentifier():
                    definition.attributes.add(child.value)


def _modules() -> Iterator[tuple[str, ast.Module]]:
    package = ROOT / "src/sparsort"
    own = [path for path in package.iterdir() if not path.is_symlink()]
    folders = [path for path in own if path.is_dir()]
    folders += [ROOT / folder for folder in ("attention", "curriculum", "kernels", "recipes", "scoring")]
    paths = [path for path in own if path.suffix == ".py"]
    for path in sorted([*paths, *(path for folder in folders for path in folder.rglob("*.py"))]):
        base = package if path.is_relative_to(package) else ROOT
        parts = path.relative_to(base).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        yield ".".join(("sparsort", *parts)), ast.parse(path.read_text(encoding="utf-8"))


def _places(tree: ast.Module, module: str) -> Iterator[str]:
    """The dotted names of "module:name" in a table, whose modules are next to it or in the package that contains it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _PLACE.fullmatch(node.value):
            for package in (module, module.rpartition(".")[0]):
                yield f"{package}.{node.value.replace(':', '.')}"


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _imports(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        # `if TYPE_CHECKING:` holds imports, too.
        for child in [node, *getattr(node, "body", [])] if isinstance(node, ast.If) else [node]:
            yield from _imported(child, module)


def _imported(node: ast.AST, module: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsort"):
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("sparsort"):
                yield alias.asname or "sparsort", alias.name if alias.asname else "sparsort"


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a function binds itself, which are not those of its module."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    yield from (argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        child = waiting.pop()
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(child)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def _without_effect(node: ast.AST) -> list[ast.expr]:
    """What a node holds that is neither a message nor used: a docstring, the class in `fields(Settings)`, an option's texts."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _DECLARES:
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        texts = [item for value in given for item in (value.elts if isinstance(value, ast.Tuple) else [value])]
        return [text for text in texts if isinstance(text, ast.Constant)]
    is_fields = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fields"
    return node.args if is_fields else []  # type: ignore[union-attr]


@functools.cache
def _commands() -> dict[str, tuple[str, set[str]]]:
    """Each command: the function that it calls, and its options."""
    group = typer.main.get_command(app)
    # Options that come before the name of the command.
    shared = {"--help", *(flag for parameter in group.params for flag in parameter.opts)}
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        callback = command.callback.__wrapped__ if hasattr(command.callback, "__wrapped__") else command.callback
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        found[name] = (f"{callback.__module__}.{callback.__name__}", flags | shared)
    return found


@functools.cache
def _reach() -> tuple[Tree, dict[str, set[str]]]:
    tree, reach = Tree(), {}
    module = option_conditions.__name__
    # Each command looks up its own table of conditions.
    tree.definitions[f"{module}.COMMANDS"].uses.clear()
    for name, (function, _) in _commands().items():
        command = option_conditions.COMMANDS.get(name)
        own = [f"{module}.{name.upper()}", f"{module}.{command.resolve.__name__}"] if command else []
        reach[name] = tree.reached([function, *own, *_EVERY])
    return tree, reach


# What runs for every command.
_EVERY = [
    "sparsort.recipes.cli.app._Commands",
    "sparsort.recipes.cli.app._root",
    "sparsort.recipes.cli.app._version",
    "sparsort.recipes.cli.app.CheckedCommand",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"id": f"r{n}", "text": f"the {'cat' if n % 2 else 'dog'} {n * n} sat", "label": n % 2, "n": n}
        for n in range(40)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_a_command_runs_is_in_its_graph(data: Path, tmp_path: Path) -> None:
    """The graph against the interpreter: every function that a command calls is one that the graph says it reaches."""
    _, reach = _reach()
    scores, text = tmp_path / "scores", ["-p", "{text}"]
    calls = [
        ["score", data, *text, "--scorer", "compression", "--out", scores],
        ["score", data, *text, "--scorer", "compression", "--id-column", "nowhere"],
        ["order", data, *text, "-a", " {label}", "-q", "a cat", "-k", "3", "--select", "bm25", "--scores", scores],
        ["order", data, *text, "-a", " {label}", "-q", "a cat", "-k", "3", "--select", "topk"],
        ["plan", scores, "--data", data, "--batch-size", "4", "--show-groups", "label"],
        ["plan", scores, "--batch-size", "4", "--mode", "pool"],
        ["ablate", data, *text, "--label", "kind", "-k", "2", "--dry-run"],
        ["choose", data, *text, "--labels", "0,1", "--criterion", "nothing"],
        ["report", tmp_path],
    ]
    for call in calls:
        arguments = [str(part) for part in call]
        called = _called(lambda arguments=arguments: CliRunner().invoke(app, arguments))  # type: ignore[misc]
        assert len(called) > 5
        assert called - reach[arguments[0]] == set(), arguments


def _called(run: Callable[[], object]) -> set[str]:
    """The functions and methods of the package that a call runs, by dotted names."""
    found = set()

    importing = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal importing
        code = frame.f_code
        if code.co_name == "<module>":
            importing += {"call": 1, "return": -1}.get(event, 0)
        # What a module calls while it is imported is not the command's.
        elif event == "call" and not importing and code.co_filename.startswith(_OURS):
            name = code.co_qualname.partition(".<locals>")[0]
            if "<" not in name:
                found.add(f"{frame.f_globals['__name__']}.{name}")

    # A generator that an earlier call left unfinished would run when it is collected.
    gc.collect()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def test_every_option_in_a_message_is_one_of_the_command() -> None:
    tree, reach = _reach()
    commands = _commands()
    wrong, excused = [], set()
    for definition in tree.definitions.values():
        reaching = [command for command, names in reach.items() if definition.name in names]
        for text, line in definition.texts:
            for option in _OPTION.finditer(text):
                if _OTHER_PROGRAM.search(text[: option.start()]):
                    continue
                for command in _asked(text, option) or reaching:
                    if option[0] in commands[command][1]:
                        continue
                    # Only an interrupted score says what is kept without --out.
                    if definition.name == _STOPPED and option[0] == "--out":
                        continue
                    if (definition.name, command) in EXCEPT:
                        excused.add((definition.name, command))
                    else:
                        wrong.append(f"{definition.name}:{line}: {option[0]} is no option of {command}")
    assert not wrong, "\n".join(wrong)
    assert excused == set(EXCEPT)


def test_the_help_of_an_option_names_options_of_its_command() -> None:
    group = typer.main.get_command(app)
    helps = [
        (name, getattr(parameter, "help", None) or "")
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        for parameter in command.params
    ]
    wrong = [
        f"{name}: {text}"
        for name, text in helps
        for option in _OPTION.finditer(text)
        for asked in _asked(text, option) or [name]
        if option[0] not in _commands()[asked][1]
    ]
    assert wrong == []


def test_no_message_computes_the_name_of_an_option() -> None:
    tree, _ = _reach()
    assert [
        f"{definition.name}:{line}"
        for definition in tree.definitions.values()
        # Names of CSS variables begin with two hyphens, too, and flags are made from the names of fields.
        if not definition.name.startswith(
            ("sparsort.curriculum.ablation.report.write.", "sparsort.recipes.cli.options.")
        )
        for text, line in definition.texts
        if _COMPUTED.search(text)
    ] == []


def test_a_message_names_the_argument_of_python_before_the_option() -> None:
    """In files that the command line does not own, an option is in parentheses, or part of an example of a command."""
    tree, _ = _reach()
    wrong = []
    for definition in tree.definitions.values():
        if definition.name.startswith(("sparsort.recipes.cli.", "sparsort.terminal.printing")):
            continue
        for text, line in definition.texts:
            for option in _OPTION.finditer(text):
                before = text[: option.start()]
                in_parentheses = before.rfind("(") > before.rfind(")")
                if not (in_parentheses or _asked(text, option) or _OTHER_PROGRAM.search(before)):
                    wrong.append(f"{definition.name}:{line}: {option[0]}")
    assert not wrong, "\n".join(wrong)


def _asked(text: str, option: re.Match[str]) -> list[str]:
    """The commands that a text says an option is of; none for that which is running."""
    commands = _commands()
    after = _AFTER.match(text, option.end())
    before = _BEFORE.search(text[: option.start()])
    named = re.split(", | and ", after[1]) if after else [before[1]] if before else []
    return [name for name in named if name in commands]
