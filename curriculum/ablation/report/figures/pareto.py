"""Accuracy against cost: what a better order gains, and how many tokens more it reads for that.

Cost is what the model reads for one answer under an arm, the choosing of the order shared out over the items that were asked.
The line joins the arms that no cheaper arm matches (Pareto), beginning at the mean random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.labelling import label
from sparsort.curriculum.ablation.report.figures.marks import marks
from sparsort.curriculum.ablation.report.figures.style import KIND_COLOUR, KIND_MARKER, Tips, colour
from sparsort.curriculum.ablation.report.numbers.rows import points
from sparsort.curriculum.ablation.report.numbers.shape import Cell, Difference, Pooled

# A tenth of a point of accuracy.
_LEAST = 0.001


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm: its cost as a multiple of a random order's, and its difference to the mean random order."""

    name: str
    kind: str
    cost: float
    difference: Difference


def points_of(panel: Cell | Pooled) -> list[Point]:
    """The arms of a cell or of a pooled panel; oracles, which nobody can buy, are left out."""
    found = []
    for arm in panel["arms"]:
        if arm["kind"] != "oracle":
            cost = arm["cost"] if "cost" in arm else arm["tokens_per_answer"] / panel["random"]["tokens"]  # type: ignore[typeddict-item]
            found.append(Point(name=arm["name"], kind=arm["kind"], cost=cost, difference=arm["difference"]))
    return found


def frontier(listed: Sequence[Point]) -> list[Point]:
    """The arms better than the mean random order and than every arm that costs no more, from cheap to dear."""
    found: list[Point] = []
    for point in sorted(listed, key=lambda one: (one.cost, -one.difference["value"])):
        best = found[-1].difference["value"] if found else 0.0
        if point.difference["value"] > best:
            found.append(point)
    return found


def draw_pareto(
    axes: Any, listed: Sequence[Point], tips: Tips, *, limits: tuple[float, float] | None = None, every: bool = True
) -> None:
    """Draw into `axes`: cost on a logarithmic axis, difference in points upwards.

    Args:
        axes: of matplotlib.
        listed: from `points_of`.
        tips: collects what the marks say.
        limits: of the differences, 0 to 1; None fits them.
        every: whether to name arms off the line too, where there is room.
    """
    from matplotlib.ticker import MaxNLocator

    best = frontier(listed)
    axes.set_xscale("log")
    axes.grid(axis="y", zorder=0)
    axes.axhline(0, color=colour("ink"), linewidth=0.8, zorder=1)
    costs = [1.0, *(point.cost for point in listed)]
    low, high = min(costs) / 1.18, max(costs) * 1.7
    if best:
        corners = [(1.0, 0.0), *((point.cost, 100 * point.difference["value"]) for point in best)]
        x = [corner[0] for corner in corners for _ in range(2)][1:]
        y = [corner[1] for corner in corners for _ in range(2)][:-1]
        axes.plot(
            [*x, high],
            [*y, y[-1] if len(y) == 1 else corners[-1][1]],
            color=colour("random"),
            linewidth=1.0,
            zorder=1.5,
        )
    listed = [*best, *(point for point in listed if point not in best)]
    shifted = [
        point.cost * float(np.exp(shift))
        for point, shift in zip(listed, _apart(listed, np.log(high / low)), strict=True)
    ]
    _draw(axes, listed, shifted, len(best), tips)
    axes.set_xlim(low, high)
    if limits is not None:
        axes.set_ylim(100 * limits[0], 100 * limits[1])
    choice = (1, 1.5, 2, 3, 5) if high / low < 8 else (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    ticks = [tick for tick in choice if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda tick, _place: points(tick / 100, 0 if tick == round(tick) else 1))
    on_line = {point.name for point in best}
    rest = [point for point in listed if point.name not in on_line and point.cost > 1.02] if every else []
    marked = [(x, 100 * point.difference["value"]) for x, point in zip(shifted, listed, strict=True)]
    for first, named in ((True, best), (False, rest)):
        label(
            axes,
            [
                (point.name, x, 100 * point.difference["value"], KIND_COLOUR[point.kind])
                for x, point in zip(shifted, listed, strict=True)
                if point in named
            ],
            marks=marked,
            lines=_lines(best, high) if first else [*_lines(best, high), ((low, 0.0), (high, 0.0))],
        )


def _lines(best: Sequence[Point], high: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The parts of the line and the intervals on it, which names are not to cross."""
    found, x, y = [], 1.0, 0.0
    for point in best:
        above = 100 * point.difference["value"]
        found += [((x, y), (point.cost, y)), ((point.cost, y), (point.cost, above))]
        x, y = point.cost, above
    for point in best:
        ends = point.difference["low"], point.difference["high"]
        if ends[0] is not None and ends[1] is not None:
            found.append(((point.cost, 100 * ends[0]), (point.cost, 100 * ends[1])))
    return [*found, ((x, y), (high, y))] if best else []


def _draw(axes: Any, listed: Sequence[Point], x: Sequence[float], best: int, tips: Tips) -> None:
    """Marks of all arms, the first `best` of which are on the line and show their intervals."""
    for point, at in zip(listed[:best], x, strict=False):
        low, high = point.difference["low"], point.difference["high"]
        if low is not None and high is not None:
            shade = colour(KIND_COLOUR[point.kind])
            axes.vlines([at], [100 * low], [100 * high], colors=shade, linewidth=0.9, alpha=0.5, zorder=1.8)
    for kind in ("named", "chosen"):
        own = [(point, at) for point, at in zip(listed, x, strict=True) if point.kind == kind]
        marks(
            axes,
            [at for _, at in own],
            [100 * point.difference["value"] for point, _ in own],
            tips,
            [
                (
                    f"{one.name}: {points(one.difference['value'])} points at {one.cost:.2f}× the tokens"
                    + (", no interval" if one.difference["low"] is None else ""),
                    one.name,
                )
                for one, _ in own
            ],
            marker=KIND_MARKER[kind],
            size=5 if kind == "named" else 4.6,
            face=colour(KIND_COLOUR[kind]),
            edge=colour("paper"),
            width=0.5,
        )


def _apart(listed: Sequence[Point], span: float) -> list[float]:
    """Shifts in log cost that keep the marks of arms of equal cost and almost equal gain from covering each other."""
    height = max((abs(point.difference["value"]) for point in listed), default=0.0) or 1.0
    taken: list[tuple[float, float]] = []
    shifts = []
    for point in listed:
        at, value = float(np.log(point.cost)), point.difference["value"]
        for step in (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0):
            shift = 0.018 * span * step
            free = all(abs(at + shift - x) > 0.016 * span or abs(value - y) > 0.07 * height for x, y in taken)
            if free:
                break
        taken.append((at + shift, value))
        shifts.append(shift)
    return shifts


def limits_of(panels: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Limits of a shared axis of differences."""
    ends = [
        end
        for listed in panels
        for point in listed
        for end in (point.difference["low"], point.difference["high"], point.difference["value"])
        if end is not None
    ]
    low, high = float(np.quantile(ends, 0.01)), float(np.quantile(ends, 0.99))
    low, high = min(low, 0.0) * 1.05, max(high, 0.0) * 1.12
    # Where nothing differs from the random orders, the axis still needs a width.
    return (low, high) if high - low >= _LEAST else (-_LEAST, _LEAST)
