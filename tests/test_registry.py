"""The tables of named entries: lookup, what entries need and read, and that no other source branches on their names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from sparsort.attention.selectors import SELECTORS, SelectorKind
from sparsort.curriculum.ablation.recipe.selectors import MODEL_SELECTORS, ModelSelectorName
from sparsort.curriculum.demos.criteria import CRITERIA, CriterionName
from sparsort.curriculum.demos.criteria.label_calibration import LABEL_CALIBRATIONS, LabelCalibrationName
from sparsort.curriculum.demos.export import EXPORTS, ExportFormat
from sparsort.curriculum.demos.order import ORDERS, Order
from sparsort.curriculum.demos.select import SELECTORS as DEMO_SELECTORS
from sparsort.curriculum.demos.select import SelectorName
from sparsort.curriculum.loading.plan.pacing import PACINGS, PacingKind
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRICS, MetricName
from sparsort.registry import Entry, Registry, load
from sparsort.scoring.scorers import SCORERS, ScorerName
from sparsort.trackers import TRACKERS, TrackerName

ROOT = Path(__file__).parent.parent
_SOURCES = ("attention", "curriculum", "kernels", "recipes", "scoring", "src/sparsort")
# Each table with the Literal of its names, and the file that holds it.
_TABLES: dict[str, tuple[Registry[Any], Any]] = {
    "attention/selectors/__init__.py": (SELECTORS, SelectorKind),
    "curriculum/ablation/recipe/selectors.py": (MODEL_SELECTORS, ModelSelectorName),
    "curriculum/demos/criteria/__init__.py": (CRITERIA, CriterionName),
    "curriculum/demos/criteria/label_calibration.py": (LABEL_CALIBRATIONS, LabelCalibrationName),
    "curriculum/demos/export.py": (EXPORTS, ExportFormat),
    "curriculum/demos/order.py": (ORDERS, Order),
    "curriculum/demos/select/__init__.py": (DEMO_SELECTORS, SelectorName),
    "curriculum/loading/plan/pacing.py": (PACINGS, PacingKind),
    "kernels/sparsity/metrics.py": (METRICS, MetricName),
    "scoring/scorers/__init__.py": (SCORERS, ScorerName),
    "src/sparsort/trackers.py": (TRACKERS, TrackerName),
}
# Where a name of a table means something else: an order of training data, a kind of arm, the place of rows without a score, a
# curve of a drawing, an input, a column of a calibration, a field of a file or a log, a chapter of a report.
_OTHER_MEANINGS: dict[str, tuple[str, ...]] = {
    "batch": ("curriculum/loading", "scoring/prompts/metered_templates.py"),
    "column": ("curriculum/loading/loader/verification.py", "scoring/scorers/baselines.py"),
    "compression": ("scoring/store/shard_files.py",),
    "constant": ("recipes/train/loop.py",),
    "contextual": ("recipes/cli/option_conditions.py",),
    "length": (
        "curriculum/demos/order.py",
        "curriculum/loading/inspect/drawing.py",
        "curriculum/loading/plan/files.py",
        "recipes/calibrate.py",
        "recipes/cli/commands/calibrate.py",
    ),
    "entropy": ("scoring/answers/reader.py",),
    "none": (
        "curriculum/ablation",
        "curriculum/demos/export.py",
        "curriculum/loading",
        "kernels",
        "recipes/order",
        "scoring",
    ),
    "oracle": ("curriculum/ablation",),
    "first": (
        "curriculum/demos/order.py",
        "curriculum/loading/plan/ranking.py",
        "curriculum/loading/inspect/description.py",
    ),
    "hard_to_easy": ("curriculum/loading/plan/arrays.py",),
    "ids": ("curriculum/ablation/store/order_notes.py", "curriculum/demos/select/candidates.py", "curriculum/loading"),
    "random": (
        "curriculum/ablation/results/cells.py",
        "curriculum/ablation/report",
        "curriculum/loading",
        "recipes/cli/option_conditions.py",
        "recipes/train/run.py",
    ),
    "sparsity": (
        "curriculum/ablation/store/order_notes.py",
        "recipes/cli/commands/env.py",
        "scoring/scorers/sparsity.py",
    ),
    "spread": ("curriculum/ablation/report",),
    "step": ("recipes/train/loop.py",),
    "window": ("curriculum/loading/online/running_difficulty.py",),
}


def _registry() -> Registry[Entry]:
    return Registry(
        "fruit",
        (
            Entry(name="apple", help="red", source="tree", needs=frozenset({"water"}), reads=frozenset({"size"})),
            Entry(name="pear", help="green", source="tree", reads=frozenset({"size", "age"})),
        ),
    )


def test_a_table_keeps_its_order_and_finds_entries_by_name() -> None:
    table = _registry()
    assert list(table) == ["apple", "pear"]
    assert len(table) == 2
    assert table.check("pear").help == "green"
    assert "plum" not in table


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(
        SparsortError, match=r"unknown fruit 'appel'\. Did you mean 'apple'\? Choose one of: apple, pear\."
    ):
        _registry().check("appel")
    with pytest.raises(SparsortError, match=r"unknown fruit \['apple'\]"):
        _registry().check(["apple"])


def test_needs_and_settings_select_entries() -> None:
    table = _registry()
    assert table.needing("water", "soil") == ("apple",)
    assert table.needing("soil") == ()
    assert table.reading("size") == ("apple", "pear")
    assert table.reading("age") == ("pear",)


def test_names_are_listed_as_a_sentence_has_them() -> None:
    assert _registry().listed() == "apple or pear"
    assert _registry().listed(lambda entry: bool(entry.needs)) == "apple"


def test_two_entries_of_one_name_are_refused() -> None:
    entry = Entry(name="apple", help="red", source="tree")
    with pytest.raises(ValueError, match="two entries named 'apple'"):
        Registry("fruit", (entry, entry))


def test_an_object_is_loaded_by_its_place() -> None:
    assert load("registry:Registry", "sparsort") is Registry


@pytest.mark.parametrize("home", _TABLES)
def test_a_table_holds_the_names_of_its_literal(home: str) -> None:
    table, literal = _TABLES[home]
    assert tuple(table) == get_args(literal)


@pytest.mark.parametrize("home", _TABLES)
def test_every_entry_is_described(home: str) -> None:
    table, _ = _TABLES[home]
    for entry in table.values():
        assert entry.help
        assert not entry.help.endswith(".")
        assert entry.source
        assert not set(entry.aliases) & set(table)


@pytest.mark.parametrize("home", _TABLES)
def test_no_source_outside_a_table_branches_on_its_names(home: str) -> None:
    table, _ = _TABLES[home]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in _SOURCES
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.is_symlink() and path != ROOT / home
        for name, line in _branches(ast.parse(path.read_text()))
        if name in table and not _means_something_else(name, path.relative_to(ROOT))
    ]
    assert not found, "\n".join(found)


def _means_something_else(name: str, path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _OTHER_MEANINGS.get(name, ()))


def test_every_exception_is_needed() -> None:
    names = {name for table, _ in _TABLES.values() for name in table}
    found = {
        (name, path.relative_to(ROOT))
        for folder in _SOURCES
        for path in (ROOT / folder).rglob("*.py")
        for name, _ in _branches(ast.parse(path.read_text()))
        if name in names
    }
    unused = [
        (name, place)
        for name, places in _OTHER_MEANINGS.items()
        for place in places
        if not any(name == other and path.is_relative_to(place) for other, path in found)
    ]
    assert not unused


def test_branches_are_found_in_every_form() -> None:
    source = """
if kind == "a" or "b" != kind or kind in ("c", "d"):
    match kind:
        case "e" | "f":
            pass
table = {"g": 1}
other = dict(default="not a branch")
default = "not one either"
GROUP = ("h", "i")
NAMES: set[str] = {"j"}
DEFAULT_NAMES = ("not one", "either")
"""
    assert sorted(name for name, _ in _branches(ast.parse(source))) == list("abcdefghij")


def _branches(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every string that is compared, matched, the key of a dictionary, or collected under a name, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=others):
                yield from _strings(left, *others)
            case ast.MatchValue(value=value):
                yield from _strings(value)
            case ast.Dict(keys=keys):
                yield from _strings(*(key for key in keys if key is not None))
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=(ast.Tuple() | ast.List() | ast.Set()) as group)
                | ast.AnnAssign(target=ast.Name(id=name), value=(ast.Tuple() | ast.List() | ast.Set()) as group)
            ) if not name.startswith("DEFAULT"):
                yield from _strings(group)


def _strings(*nodes: ast.AST) -> Iterator[tuple[str, int]]:
    for node in nodes:
        match node:
            case ast.Constant(value=str(name)):
                yield name, node.lineno
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
                yield from _strings(*items)
