"""Accuracy against cost: the gain of each order, and how many tokens the model reads for it.

Cost is the number of tokens that the model reads for one answer under an arm, where the tokens read to choose the order are
divided among the items. The line joins the arms that no cheaper arm matches (Pareto), starting at the mean random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.marks import marks
from sparsort.curriculum.ablation.report.figures.style import KIND_COLOUR, KIND_MARKER, Tips, colour, plain
from sparsort.curriculum.ablation.report.numbers.rows import points
from sparsort.curriculum.ablation.report.numbers.shape import CellNumbers, Difference, Pooled

# Half the width of an axis of differences if all differences on it are almost zero: a tenth of a point of accuracy.
_LEAST = 0.001
# Candidate positions of a name relative to its mark, in order of preference: offset in points, and alignment.
_SIDES = (
    (4, 3, "left", "bottom"),
    (-4, 3, "right", "bottom"),
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (5, -5, "left", "top"),
    (-5, -5, "right", "top"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
)

Place = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm: its cost as a multiple of that of a random order, and its difference from the mean random order."""

    name: str
    kind: str
    cost: float
    difference: Difference

    @property
    def gain(self) -> float:
        """The difference in points."""
        return 100 * self.difference["value"]


def points_of(panel: CellNumbers | Pooled) -> list[Point]:
    """The arms of a cell or of a pooled panel, without the oracles, which have no cost in practice."""
    arms = []
    for arm in panel["arms"]:
        if arm["kind"] != "oracle":
            cost = arm["cost"] if "cost" in arm else arm["tokens_per_answer"] / panel["random"]["tokens"]  # type: ignore[typeddict-item]
            arms.append(Point(name=arm["name"], kind=arm["kind"], cost=cost, difference=arm["difference"]))
    return arms


def frontier(arms: Sequence[Point]) -> list[Point]:
    """The arms that beat both the mean random order and every other arm that costs no more, the cheapest first."""
    front: list[Point] = []
    # Among arms of equal cost the best comes first, so the others do not exceed it.
    for point in sorted(arms, key=lambda arm: (arm.cost, -arm.difference["value"])):
        if point.difference["value"] > (front[-1].difference["value"] if front else 0.0):
            front.append(point)
    return front


def draw_pareto(
    axes: Any, arms: Sequence[Point], tips: Tips, *, limits: tuple[float, float] | None = None, every: bool = True
) -> None:
    """Draw into `axes`: cost on a horizontal logarithmic axis, and the difference in points on the vertical one.

    Args:
        axes: the matplotlib axes.
        arms: from `points_of`.
        tips: the tooltips of the figure.
        limits: the limits of the differences, from `limits_of`; None to fit these arms.
        every: whether to name arms off the line too, if there is room.
    """
    front = frontier(arms)
    costs = [1.0, *(point.cost for point in arms)]
    # On the right there is room for the name of the most expensive arm.
    low, high = min(costs) / 1.18, max(costs) * 1.7
    axes.set_xscale("log")
    axes.grid(axis="y", zorder=0)
    axes.axhline(0, color=colour("ink"), linewidth=0.8, zorder=1)
    steps = _steps(front, high)
    if front:
        corners = [steps[0][0], *(end for _, end in steps)]
        axes.plot(*zip(*corners, strict=True), color=colour("random"), linewidth=1.0, zorder=1.5)
    arms = [*front, *(point for point in arms if point not in front)]
    shifts = _apart(arms, float(np.log(high / low)))
    shifted = [point.cost * float(np.exp(shift)) for point, shift in zip(arms, shifts, strict=True)]
    _draw_arms(axes, arms, shifted, len(front), tips)
    axes.set_xlim(low, high)
    if limits is not None:
        axes.set_ylim(100 * limits[0], 100 * limits[1])
    _set_ticks(axes, low, high)
    marked = [(x, point.gain) for x, point in zip(shifted, arms, strict=True)]
    lines = steps + _intervals(front)
    named = list(zip(arms, marked, strict=True))
    # Names on the line are written first, so that they get the room.
    _write_names(axes, named[: len(front)], marked, lines)
    if every:
        # The names of the arms that cost no more than a random order would crowd the left edge.
        on_line = {point.name for point in front}
        rest = [(point, mark) for point, mark in named if point.name not in on_line and point.cost > 1.02]
        _write_names(axes, rest, marked, [*lines, ((low, 0.0), (high, 0.0))])


def _steps(front: Sequence[Point], high: float) -> list[tuple[Place, Place]]:
    """The horizontal and vertical parts of the line, from the mean random order to the cost `high`."""
    parts, x, y = [], 1.0, 0.0
    for point in front:
        parts += [((x, y), (point.cost, y)), ((point.cost, y), (point.cost, point.gain))]
        x, y = point.cost, point.gain
    return [*parts, ((x, y), (high, y))] if front else []


def _intervals(front: Sequence[Point]) -> list[tuple[Place, Place]]:
    """The vertical lines of the intervals in the plot."""
    ends = [(point.cost, point.difference["low"], point.difference["high"]) for point in front]
    return [((x, 100 * low), (x, 100 * high)) for x, low, high in ends if low is not None and high is not None]


def _set_ticks(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import MaxNLocator

    choices = (1, 1.5, 2, 3, 5) if high / low < 8 else (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    ticks = [tick for tick in choices if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    # A logarithmic axis has labelled minor ticks by default.
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda tick, _place: points(tick / 100, 0 if tick == round(tick) else 1))


def _draw_arms(axes: Any, arms: Sequence[Point], x: Sequence[float], front: int, tips: Tips) -> None:
    """Draw the marks of all arms; the first `front` of them are on the line and have intervals."""
    for point, at in zip(arms[:front], x, strict=False):
        low, high = point.difference["low"], point.difference["high"]
        if low is not None and high is not None:
            shade = colour(KIND_COLOUR[point.kind])
            axes.vlines([at], [100 * low], [100 * high], colors=shade, linewidth=0.9, alpha=0.5, zorder=1.8)
    # One artist has one shape of mark, so the kinds are drawn separately.
    for kind in ("named", "chosen"):
        of_kind = [(point, at) for point, at in zip(arms, x, strict=True) if point.kind == kind]
        marks(
            axes,
            [at for _, at in of_kind],
            [point.gain for point, _ in of_kind],
            tips,
            [
                (
                    f"{point.name}: {points(point.difference['value'])} points at {point.cost:.2f}× the tokens"
                    + (", no interval" if point.difference["low"] is None else ""),
                    point.name,
                )
                for point, _ in of_kind
            ],
            marker=KIND_MARKER[kind],
            size=5 if kind == "named" else 4.6,
            face=colour(KIND_COLOUR[kind]),
            edge=colour("paper"),
            width=0.5,
        )


def _apart(arms: Sequence[Point], span: float) -> list[float]:
    """Shifts in log cost, so that the marks of arms with the same cost and almost the same gain do not cover each other.

    Args:
        arms: the arms; earlier ones are shifted less.
        span: the width of the axis in log cost.
    """
    height = max((abs(point.difference["value"]) for point in arms), default=0.0) or 1.0
    taken: list[Place] = []
    shifts = []
    for point in arms:
        at, value = float(np.log(point.cost)), point.difference["value"]
        # If every place is taken, the last shift is used.
        for step in (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0):
            shift = 0.018 * span * step
            if all(abs(at + shift - x) > 0.016 * span or abs(value - y) > 0.07 * height for x, y in taken):
                break
        taken.append((at + shift, value))
        shifts.append(shift)
    return shifts


def limits_of(panels: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """The limits of an axis of differences that these panels share."""
    ends = [
        end
        for arms in panels
        for point in arms
        for end in (point.difference["low"], point.difference["high"], point.difference["value"])
        if end is not None
    ]
    # Quantiles, because one very wide interval would compress everything else.
    low, high = float(np.quantile(ends, 0.01)), float(np.quantile(ends, 0.99))
    low, high = min(low, 0.0) * 1.05, max(high, 0.0) * 1.12
    # If nothing differs from the random orders, the axis still needs a width.
    return (low, high) if high - low >= _LEAST else (-_LEAST, _LEAST)


# Names next to marks


def _write_names(
    axes: Any, named: Sequence[tuple[Point, Place]], marked: Sequence[Place], lines: Sequence[tuple[Place, Place]]
) -> None:
    """Write the names of arms next to their marks, greedily, where they cover nothing.

    A name is omitted if, in every position, it would cover another name, a mark or a line, or would be nearer to another mark;
    the tables and tooltips have all names. Existing texts in `axes` are not covered either.

    Args:
        axes: the matplotlib axes, with their final limits.
        named: each arm to name with the place of its mark, the most important first.
        marked: the places of all marks.
        lines: horizontal and vertical lines, from (x, y) to (x, y).
    """
    size = axes.xaxis.label.get_fontsize() - 0.5
    renderer = axes.figure.canvas.get_renderer()
    # All boxes are in pixels: (left, bottom, right, top).
    pixels = axes.transData.transform
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in map(pixels, marked)]
    taken += [
        (*np.minimum(pixels(start), pixels(end)), *np.maximum(pixels(start), pixels(end))) for start, end in lines
    ]
    taken += [text.get_window_extent(renderer).extents for text in axes.texts]
    frame = axes.get_window_extent()
    for point, (x, y) in named:
        for right, up, ha, va in _SIDES:
            text = axes.annotate(
                plain(point.name, 26),
                (x, y),
                xytext=(right, up),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=size,
                color=colour(KIND_COLOUR[point.kind]),
                zorder=4,
            )
            extent = text.get_window_extent(renderer)
            # The extent of a text reaches below its letters.
            box = (extent.x0, extent.y0 + 0.15 * size, extent.x1, extent.y1)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 + 8 and frame.y0 <= box[1] and box[3] <= frame.y1 + 4
            nearest = min((_distance(box, pixels(mark)) for mark in marked if mark != (x, y)), default=np.inf)
            is_free = not any(_overlap(box, other) for other in taken)
            if inside and is_free and _distance(box, pixels((x, y))) <= nearest:
                taken.append(box)
                break
            text.remove()


def _distance(box: Sequence[float], mark: Sequence[float]) -> float:
    """The distance from a box to a point; 0 inside the box."""
    return float(np.hypot(max(box[0] - mark[0], mark[0] - box[2], 0.0), max(box[1] - mark[1], mark[1] - box[3], 0.0)))


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
