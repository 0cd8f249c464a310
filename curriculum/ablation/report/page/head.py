"""What was run, as pairs of a name and a value: the head of the page and of the Markdown.

Provenance that has a name here is shown under it; the rest, and what is shown short, stands in
`rest_of`: nothing recorded is lost.
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


def facts(report: Report) -> list[tuple[str, str]]:
    """Name and value, in the order to be shown; values are text."""
    cells, known = report["cells"], report["provenance"]
    shown = [
        (_NAMES[key], _value(key, known[key])) for key in ("model", "revision", "weights", "dtype") if known.get(key)
    ]
    arms = {arm["name"]: arm["kind"] for cell in cells for arm in cell["arms"]}
    kinds = [sum(kind == one for kind in arms.values()) for one in ("named", "chosen", "oracle")]
    calibrated = sorted({cell["calibrated"] for cell in cells})
    shown += [
        ("Tasks", ", ".join(report["tasks"])),
        (
            "Demonstrations",
            f"k = {_values(cell['k'] for cell in cells)}, {_values(cell['selector'] for cell in cells)}",
        ),
        ("Demonstration sets", _values(cell["sets"] for cell in cells) + " a cell"),
        ("Random orders", _values(cell["orders"] for cell in cells) + " a set"),
        ("Orderers", f"{kinds[0]} rules, {kinds[1]} chosen with the model, {kinds[2]} oracles"),
        ("Test items", _values(cell["items"] for cell in cells) + " a cell"),
        ("Contextual calibration", {(False,): "off", (True,): "on", (False, True): "off and on"}[tuple(calibrated)]),
    ]
    late = ("device", "machine", "tokens", "seconds", "date", "sparsort", "versions")
    return shown + [(_NAMES[key], _value(key, known[key])) for key in late if known.get(key)]


def rest_of(provenance: Mapping[str, Any]) -> str:
    """Everything recorded that `facts` does not show, as indented JSON; empty for nothing."""
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
            return moment.strftime("%d %B %Y, %H:%M" if "T" in str(value) else "%d %B %Y").lstrip("0")
        except ValueError:
            return str(value)
    if key == "tokens" and isinstance(value, int | float):
        return count(value)
    if key == "weights" and re.fullmatch(r"(\w+:)?[0-9a-f]{20,}", str(value)):
        return f"{str(value)[:19]}…"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return str(value)


def _values(values: Iterable[Any]) -> str:
    found = list(dict.fromkeys(values))
    if all(isinstance(one, int) for one in found) and len(found) > 2:
        return f"{min(found)} to {max(found)}"
    return " and ".join(str(one) for one in (sorted(found) if all(isinstance(one, int) for one in found) else found))
