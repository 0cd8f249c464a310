"""The description of what was run, as pairs of a name and a value: the head of the page and of the Markdown.

Contract: nothing recorded is lost. `facts` shows the provenance that has a name here, and `rest_of` everything else, including
the full form of values that `facts` shortens.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparsort.curriculum.ablation.report.numbers.rows import count
from sparsort.curriculum.ablation.report.numbers.shape import Report

_NAMES = {
    "model": "Model",
    "revision": "Revision",
    "weights": "Weights",
    "dtype": "Precision",
    "device": "Device",
    "machine": "Machine",
    "tokens": "Tokens read",
    "seconds": "Time of all processes",
    "date": "Date",
    "sparsort": "sparsort",
    "versions": "Versions",
}
# The names above that come before the description of the study; the others come after it.
_FIRST = ("model", "revision", "weights", "dtype")


def facts(report: Report) -> list[tuple[str, str]]:
    """Names and values in the order of the page."""
    cells, provenance = report["cells"], report["provenance"]
    kind_of = {arm["name"]: arm["kind"] for cell in cells for arm in cell["arms"]}
    rules, chosen, oracles = (list(kind_of.values()).count(kind) for kind in ("named", "chosen", "oracle"))
    calibrated = tuple(sorted({cell["calibrated"] for cell in cells}))
    study = [
        ("Tasks", ", ".join(report["tasks"])),
        (
            "Demonstrations",
            f"k = {_values(cell['k'] for cell in cells)}, {_values(cell['selector'] for cell in cells)}",
        ),
        ("Demonstration sets", _values(cell["sets"] for cell in cells) + " per cell"),
        ("Random orders", _values(cell["orders"] for cell in cells) + " per set"),
        ("Orderers", f"{rules} rules, {chosen} chosen with the model, {oracles} oracles"),
        ("Test items", _values(cell["items"] for cell in cells) + " per cell"),
        ("Contextual calibration", {(False,): "off", (True,): "on", (False, True): "off and on"}[calibrated]),
    ]
    recorded = {key: (name, _value(key, provenance[key])) for key, name in _NAMES.items() if provenance.get(key)}
    first = [fact for key, fact in recorded.items() if key in _FIRST]
    return [*first, *study, *(fact for key, fact in recorded.items() if key not in _FIRST)]


def rest_of(provenance: Mapping[str, Any]) -> str:
    """The provenance that `facts` omits or shortens, as indented JSON; empty if there is none."""
    # A shortened value ends with an ellipsis.
    rest = {key: value for key, value in provenance.items() if key not in _NAMES or _value(key, value).endswith("…")}
    return json.dumps(rest, indent=2, ensure_ascii=False, default=str) if rest else ""


def duration(seconds: float) -> str:
    """Seconds in words: 38 s, 12 min, 2 h 32 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _value(key: str, value: Any) -> str:
    if key == "seconds" and isinstance(value, int | float):
        return duration(value)
    if key == "date":
        try:
            moment = datetime.datetime.fromisoformat(str(value))
        except ValueError:
            return str(value)
        # A date without a time would be printed as midnight.
        return moment.strftime("%d %B %Y, %H:%M" if "T" in str(value) else "%d %B %Y").lstrip("0")
    if key == "tokens" and isinstance(value, int | float):
        return count(value)
    # The beginning of a digest is enough to compare two reports by eye.
    if key == "weights" and re.fullmatch(r"(\w+:)?[0-9a-f]{20,}", str(value)):
        return f"{str(value)[:19]}…"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value)


def _values(values: Iterable[Any]) -> str:
    """The distinct values as one phrase; more than two numbers become a range."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int) for value in distinct):
        distinct.sort()
        if len(distinct) > 2:
            return f"{distinct[0]} to {distinct[-1]}"
    return " and ".join(map(str, distinct))
