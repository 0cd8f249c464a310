"""The spread over random orders: the accuracy of each random order and of each arm, for every demonstration set.

Each set has a row, from the lowest mean to the highest. The upper lane has the random orders, from the worst to the best, with
their mean. The lower lane has the arms. The top row has the means over sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.marks import bare, marks, segments, swarm
from sparsort.curriculum.ablation.report.figures.marks import names as write_names
from sparsort.curriculum.ablation.report.figures.style import KIND_COLOUR, KIND_MARKER, Tips, colour, plain
from sparsort.curriculum.ablation.report.numbers.rows import percent
from sparsort.curriculum.ablation.report.numbers.shape import ArmNumbers, CellNumbers

# The distance of a lane from the middle of its row, and the additional distance in the row of means, which also has names.
_LANE, _ROOM = 0.18, 0.12


def draw_spread(
    axes: Any,
    cell: CellNumbers,
    tips: Tips,
    *,
    limits: tuple[float, float],
    names: Sequence[str] | None = None,
    ends: bool = True,
    sets: int | None = None,
) -> None:
    """Draw into `axes`.

    Args:
        axes: the matplotlib axes.
        cell: one of the report's `cells`.
        tips: the tooltips of the figure.
        limits: the limits of the accuracy axis, from `limits_of`.
        names: the names of the sets, to write on the left; None to write none.
        ends: whether to name the ends of the random orders' mean range.
        sets: the number of rows that the axes have room for; by default the number of sets.
    """
    by_set = np.array(cell["random"]["accuracy_by_set"]) * 100
    means = by_set.mean(axis=1)
    order = np.argsort(means, kind="stable").tolist()
    # Row 0 has the means; the other rows are 0.6 units further down, below a line.
    rows = [row + 0.6 for row in range(1, len(order) + 1)]
    low_S, high_S = by_set.min(axis=1), by_set.max(axis=1)
    low, high, mean = float(low_S.mean()), float(high_S.mean()), float(means.mean())
    axes.grid(axis="x", zorder=0)
    axes.set_xlim(100 * limits[0], 100 * limits[1])
    bare(axes, rows=((sets or len(order)) + 1.25, -0.8))
    axes.set_yticks([])
    axes.axhline(0.98, color=colour("faint"), linewidth=0.6)

    segments(axes, [low], [high], [-_LANE - _ROOM], colour("random"), 2.4, zorder=1)
    segments(axes, low_S[order], high_S[order], [y - _LANE for y in rows], colour("random"), 0.8, zorder=1)
    half_heights = np.array([2 * _LANE + _ROOM, *[2 * _LANE] * len(rows)])
    y_mean = np.array([0.0, *rows])
    axes.vlines(
        [mean, *means[order]],
        y_mean - half_heights,
        y_mean + half_heights,
        colors=colour("ink"),
        linewidth=1.4,
        zorder=4,
    )
    for y, place in zip(rows, order, strict=True):
        height = y - _LANE - swarm(by_set[place], 0.07, 0.2)
        # One tooltip for the set, since its random orders have no names.
        dots = axes.scatter(by_set[place], height, s=9, color=colour("random"), alpha=0.75, linewidths=0, zorder=2)
        set_range = f"{percent(low_S[place] / 100)} to {percent(high_S[place] / 100)} %"
        tips.add(dots, f"set {place + 1}: random orders {set_range}, mean {percent(means[place] / 100)} %")
    _draw_arms(axes, cell, order, rows, tips)
    _name_ends(axes, cell, (low, high) if ends else None)
    if names is not None:
        y_of = dict(zip([names[place] for place in order], rows, strict=True))
        write_names(axes, {"mean": 0.0} | y_of, axes.xaxis.label.get_fontsize())


def _name_ends(axes: Any, cell: CellNumbers, ends: tuple[float, float] | None) -> None:
    """Name the ends of the random orders' mean range, if they are given, and the worst and the best arm."""
    if ends is not None:
        _name_outermost(axes, ends[0], -_LANE - _ROOM, "worst orders", "right", "muted")
        _name_outermost(axes, ends[1], -_LANE - _ROOM, "best orders", "left", "muted")
    if arms := _without_oracles(cell):
        worst = min(arms, key=lambda arm: arm["accuracy"])
        best = max(arms, key=lambda arm: arm["accuracy"])
        for arm, side in ((worst, "right"), (best, "left")):
            name = plain(arm["name"], 28)
            _name_outermost(axes, 100 * arm["accuracy"], _LANE + _ROOM, name, side, KIND_COLOUR[arm["kind"]])


def limits_of(cells: Sequence[CellNumbers]) -> tuple[float, float]:
    """The limits of an accuracy axis that has room for all orders and arms of these cells."""
    values = [value for cell in cells for values in cell["random"]["accuracy_by_set"] for value in values]
    values += [value for cell in cells for arm in cell["arms"] for value in arm["accuracy_by_set"]]
    # The limits leave room for the mark of an accuracy of exactly 0 or 1.
    room = max(0.05, 0.05 * (max(values) - min(values)))
    return max(-0.01, min(values) - room), min(1.01, max(values) + room)


def _without_oracles(cell: CellNumbers) -> list[ArmNumbers]:
    return [arm for arm in cell["arms"] if arm["kind"] != "oracle"]


def _draw_arms(axes: Any, cell: CellNumbers, order: Sequence[int], rows: Sequence[float], tips: Tips) -> None:
    """Draw the lower lanes: one mark for each arm and set, and one for each arm's mean."""
    for kind in ("named", "chosen"):
        arms = [arm for arm in _without_oracles(cell) if arm["kind"] == kind]
        values = [(_LANE + _ROOM, arm["accuracy"], "mean over sets", arm["name"]) for arm in arms]
        for y, place in zip(rows, order, strict=True):
            values += [(y + _LANE, arm["accuracy_by_set"][place], f"set {place + 1}", arm["name"]) for arm in arms]
        marks(
            axes,
            [100 * value for _, value, _, _ in values],
            [y for y, _, _, _ in values],
            tips,
            [(f"{where}: {name} {percent(value)} %", name) for _, value, where, name in values],
            marker=KIND_MARKER[kind],
            size=3.8 if kind == "chosen" else 4.2,
            face=colour(KIND_COLOUR[kind]),
            edge=colour("paper"),
            width=0.4,
            alpha=0.9,
        )


def _name_outermost(axes: Any, x: float, y: float, text: str, side: str, shade: str) -> None:
    """Write a name on the outer side of an outermost mark, where nothing else is, unless it would exceed the axes."""
    size = axes.xaxis.label.get_fontsize() - 0.5
    low, high = axes.get_xlim()
    # The width of the text in units of the axis; a character is about 0.62 times as wide as the font size.
    wide = 0.62 * size * len(text) / (axes.bbox.width * 72 / axes.figure.dpi) * (high - low)
    if x - wide > low if side == "right" else x + wide < high:
        axes.annotate(
            text,
            (x, y),
            xytext=(-5 if side == "right" else 5, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=size,
            color=colour(shade),
        )
