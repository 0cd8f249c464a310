"""Which arm stands in which row, the same in every figure and table, and how numbers are written.

Contract: blocks by kind, rules first; within a block from the largest gain to the smallest: over all tasks where there are
several, and without contextual calibration where there is such a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsort.curriculum.ablation.report.numbers.shape import Cell, Pooled, Report

Blocks = list[tuple[str, list[str]]]


def blocks(report: Report, *, kinds: Sequence[str] = ("named", "chosen")) -> Blocks:
    """Arms by kind, each from the largest gain to the smallest in the first panel that has the arm; empty kinds are left out."""
    kind_of = {arm["name"]: arm["kind"] for cell in report["cells"] for arm in cell["arms"]}
    panels: list[Cell | Pooled] = [*report["pooled"], *report["cells"]]
    gains: dict[str, float] = {}
    for panel in sorted(panels, key=lambda one: one["calibrated"]):
        for arm in panel["arms"]:
            gains.setdefault(arm["name"], arm["difference"]["value"])
    found = [(kind, sorted((n for n in gains if kind_of[n] == kind), key=lambda n: -gains[n])) for kind in kinds]
    return [(kind, names) for kind, names in found if names]


def kept(found: Blocks, names: Iterable[str]) -> Blocks:
    """The blocks with only these names."""
    wanted = set(names)
    cut = [(kind, [name for name in listed if name in wanted]) for kind, listed in found]
    return [(kind, listed) for kind, listed in cut if listed]


def places(found: Blocks, gap: float = 1.2) -> tuple[dict[str, float], float]:
    """The y of every arm, downwards from 0, with a gap in front of every block; and the y behind the last."""
    at, y = {}, -gap
    for _, listed in found:
        y += gap
        for name in listed:
            at[name] = y
            y += 1.0
    return at, y


def points(value: float | None, digits: int = 1) -> str:
    """A difference of accuracies in points, signed: +5.5, −0.3."""
    if value is None:
        return "–"
    shown = f"{100 * value:+.{digits}f}"
    return (shown if float(shown) else f"{0:.{digits}f}").replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """An accuracy or share in per cent, without the sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def probability(value: float | None) -> str:
    """A p value: three decimals, below a thousandth as such."""
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def count(value: float | None) -> str:
    """A count with thin spaces between thousands; above a hundred without decimals."""
    if value is None:
        return "–"
    shown = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    return shown.replace(",", "\u202f")
