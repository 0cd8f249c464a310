"""Fill the tables of the documentation from the tables of entries in the source: `make tables`.

A page marks the place of a table with two comments, each on a line of its own:

    <!-- table: metrics -->
    <!-- end -->

Whatever is between them is replaced. To document another table, add a line to `TABLES`; to add or change a column, change that
line. `tests/test_doc_tables.py` fails when a page is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsort.attention.selectors import SELECTORS
from sparsort.curriculum.demos.criteria import CRITERIA, Criterion
from sparsort.curriculum.demos.criteria.label_calibration import LABEL_CALIBRATIONS
from sparsort.curriculum.demos.export import EXPORTS
from sparsort.curriculum.demos.order import ORDERS, OrderEntry
from sparsort.curriculum.demos.select import SELECTORS as DEMO_SELECTORS
from sparsort.curriculum.loading.plan.pacing import PACINGS
from sparsort.errors import unknown_choice
from sparsort.kernels.sparsity.metrics import METRICS
from sparsort.registry import Entry, Registry
from sparsort.scoring.scorers import SCORERS, ScorerEntry
from sparsort.terminal.printing import show
from sparsort.trackers import TRACKERS

ROOT = Path(__file__).parent.parent
_PLACE = re.compile(r"^<!-- table: ([^\n]+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
_LEARNS_BY = {"nothing": "nothing", "alignment_loss": "the alignment loss (KL)", "lm_loss": "the LM loss"}

_KINDS = ("plain", "chat", "conversation")
_READS = {"content_free": "inputs without content", "rows": "rows that are not the queries", "gold": "their labels"}

Columns = Mapping[str, Callable[[Any], str]]


def _name(entry: Entry) -> str:
    return f"`{entry.name}`"


def _help(entry: Entry) -> str:
    return entry.help


def _source(entry: Entry) -> str:
    return entry.source


def _class(entry: ScorerEntry) -> str:
    arguments = ", ".join(f'{name}="{value}"' for name, value in entry.arguments.items())
    return f"`{entry.place.partition(':')[2]}{f'({arguments})' if arguments else ''}`"


def _ranks_by(order: OrderEntry) -> str:
    """What an order ranks by, with the kinds of score that it accepts."""
    kinds = " or ".join(f"`{kind}`" for kind in order.kinds)
    return f"{order.ranks_by}, by scores of the kind {kinds} only" if kinds else order.ranks_by


def _queries(criterion: Criterion) -> str:
    """Which queries a criterion reads."""
    if criterion.chooses == "demonstrations":
        return "each query under every candidate, without its label"
    if "sampled" in criterion.needs:
        return "probes sampled from the model; no queries"
    if "gold" in criterion.needs:
        return "queries with labels"
    if "log_p" in criterion.needs:
        return "queries without labels"
    return "queries; no label set, so generation too" if "features" in criterion.needs else "no queries"


TABLES: dict[str, tuple[Registry[Any], Columns]] = {
    "metrics": (
        METRICS,
        {
            "name": _name,
            "meaning": _help,
            "formula": lambda entry: entry.formula,
            "sparser": lambda entry: "higher" if entry.higher_is_sparser else "lower",
            "source": _source,
        },
    ),
    "scorers": (
        SCORERS,
        {
            "`--scorer`": _name,
            "class": _class,
            "difficulty": _help,
            "needs": lambda entry: ", ".join(sorted(entry.needs, reverse=True)) or "nothing",
            "runs a model": lambda entry: "yes" if entry.runs_model else "no",
        },
    ),
    "criteria": (
        CRITERIA,
        {"criterion": _name, "takes the order under which …": _help, "reads": _queries, "source": _source},
    ),
    "demonstration selectors": (
        DEMO_SELECTORS,
        {
            "method": _name,
            "chooses": _help,
            "needs": lambda entry: ", ".join(f"`{need}`" for need in sorted(entry.needs)) or "nothing",
            "seeded": lambda entry: "yes" if entry.is_seeded else "no",
            "source": _source,
        },
    ),
    "orders": (
        ORDERS,
        {"order": _name, "first to last": _help, "ranks by": _ranks_by, "source": _source},
    ),
    "exports": (
        EXPORTS,
        {
            "`--export-format`": _name,
            "file name": lambda entry: f"`*{entry.suffix}`",
            "what it is": _help,
            "prompts": lambda entry: ", ".join(kind for kind in _KINDS if kind in entry.kinds),
        },
    ),
    "label calibrations": (
        LABEL_CALIBRATIONS,
        {
            "calibration": _name,
            "what it does": _help,
            "reads": lambda entry: ", ".join(_READS[need] for need in sorted(entry.needs)) or "nothing",
            "source": _source,
        },
    ),
    "pacings": (
        PACINGS,
        {"kind": _name, "f": lambda entry: entry.formula, "the share": _help, "source": _source},
    ),
    "trackers": (TRACKERS, {"tracker": _name, "what it is": _help, "extra": lambda entry: f"`sparsort[{entry.name}]`"}),
    "attention selectors": (
        SELECTORS,
        {
            "`selector`": _name,
            "chooses": _help,
            "learns by": lambda entry: _LEARNS_BY[entry.learns_by],
            "source": _source,
        },
    ),
}


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def markdown(name: str) -> str:
    """One table.

    Raises:
        SparsortError: there is no table of this name.
    """
    if name not in TABLES:
        raise unknown_choice("table", name, TABLES)
    registry, columns = TABLES[name]
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[cell(entry).replace("|", "\\|") for cell in columns.values()] for entry in registry.values()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def fill(page: str) -> str:
    """The text of a page with every table that it marks as it is today."""
    return _PLACE.sub(lambda found: f"<!-- table: {found[1]} -->\n\n{markdown(found[1])}\n<!-- end -->", page)


def main() -> None:
    """Rewrite the pages that are out of date."""
    for path in pages():
        before = path.read_text(encoding="utf-8")
        if (after := fill(before)) != before:
            path.write_text(after, encoding="utf-8")
            show(f"rewrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
