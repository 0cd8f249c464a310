"""The spread over random orders: for every demonstration set what each random order scored, and where every arm stands in it.

One row a set, from the worst mean to the best. Upper lane: the random orders, from oracle worst to oracle best, with their
mean. Lower lane: every arm under that set. At the top, the mean over sets of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.marks import bare, marks, segments, swarm
from sparsort.curriculum.ablation.report.figures.marks import names as write_names
from sparsort.curriculum.ablation.report.figures.style import KIND_COLOUR, KIND_MARKER, Tips, colour, plain
from sparsort.curriculum.ablation.report.numbers.rows import percent
from sparsort.curriculum.ablation.report.numbers.shape import ArmNumbers, Cell

# Distance of a lane from its row's middle, and how much more the row of means has, which holds names too.
_LANE, _ROOM = 0.18, 0.12


def draw_spread(
    axes: Any,
    cell: Cell,
    tips: Tips,
    *,
    limits: tuple[float, float],
    names: Sequence[str] | None = None,
    ends: bool = True,
    sets: int | None = None,
) -> None:
    """Draw into `axes`.

    Args:
        axes: of matplotlib.
        cell: one of the report's.
        tips: collects what the marks say.
        limits: of the accuracy axis, 0 to 1.
        names: of the sets, to write on the left; None for none.
        ends: whether to name the ends of the mean range.
        sets: rows to leave room for, by default those of the cell.
    """
    by_set = np.array(cell["random"]["accuracy_by_set"]) * 100
    means = by_set.mean(axis=1)
    order = np.argsort(means, kind="stable").tolist()
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
    reach = [2 * _LANE + _ROOM, *[2 * _LANE] * len(rows)]
    y_mean = [0.0, *rows]
    axes.vlines(
        [mean, *means[order]],
        [y - one for y, one in zip(y_mean, reach, strict=True)],
        [y + one for y, one in zip(y_mean, reach, strict=True)],
        colors=colour("ink"),
        linewidth=1.4,
        zorder=4,
    )
    for y, place in zip(rows, order, strict=True):
        height = y - _LANE - swarm(by_set[place], 0.07, 0.2)
        dots = axes.scatter(by_set[place], height, s=9, color=colour("random"), alpha=0.75, linewidths=0, zorder=2)
        ends_of_set = f"{percent(low_S[place] / 100)} to {percent(high_S[place] / 100)} %"
        tips.add(dots, f"set {place + 1}: random orders {ends_of_set}, mean {percent(means[place] / 100)} %")
    _arms(axes, cell, order, rows, tips)
    if ends:
        _beside(axes, low, -_LANE - _ROOM, "worst orders", "right", "muted")
        _beside(axes, high, -_LANE - _ROOM, "best orders", "left", "muted")
    if shown := _shown(cell):
        for arm, side in ((min(shown, key=_accuracy), "right"), (max(shown, key=_accuracy), "left")):
            _beside(axes, 100 * arm["accuracy"], _LANE + _ROOM, plain(arm["name"], 28), side, KIND_COLOUR[arm["kind"]])
    if names is not None:
        at = dict(zip([names[place] for place in order], rows, strict=True))
        write_names(axes, {"mean": 0.0} | at, axes.xaxis.label.get_fontsize())


def limits_of(cells: Sequence[Cell]) -> tuple[float, float]:
    """Limits of an accuracy axis that holds all orders and arms of these cells."""
    seen = [value for cell in cells for values in cell["random"]["accuracy_by_set"] for value in values]
    seen += [value for cell in cells for arm in cell["arms"] for value in arm["accuracy_by_set"]]
    room = max(0.05, 0.05 * (max(seen) - min(seen)))
    return max(-0.01, min(seen) - room), min(1.01, max(seen) + room)


def _shown(cell: Cell) -> list[ArmNumbers]:
    return [arm for arm in cell["arms"] if arm["kind"] != "oracle"]


def _accuracy(arm: ArmNumbers) -> float:
    return arm["accuracy"]


def _arms(axes: Any, cell: Cell, order: Sequence[int], rows: Sequence[float], tips: Tips) -> None:
    """The lower lanes: one mark an arm and set, and one an arm for its mean."""
    for kind in ("named", "chosen"):
        own = [arm for arm in _shown(cell) if arm["kind"] == kind]
        found = [(_LANE + _ROOM, arm["accuracy"], "mean over sets", arm["name"]) for arm in own]
        for y, place in zip(rows, order, strict=True):
            found += [(y + _LANE, arm["accuracy_by_set"][place], f"set {place + 1}", arm["name"]) for arm in own]
        marks(
            axes,
            [100 * value for _, value, _, _ in found],
            [y for y, _, _, _ in found],
            tips,
            [(f"{where}: {name} {percent(value)} %", name) for _, value, where, name in found],
            marker=KIND_MARKER[kind],
            size=3.8 if kind == "chosen" else 4.2,
            face=colour(KIND_COLOUR[kind]),
            edge=colour("paper"),
            width=0.4,
            alpha=0.9,
        )


def _beside(axes: Any, x: float, y: float, text: str, side: str, shade: str) -> None:
    """A name beyond a mark that stands outermost, where nothing else is; none where it would leave the axes."""
    size = axes.xaxis.label.get_fontsize() - 0.5
    low, high = axes.get_xlim()
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
