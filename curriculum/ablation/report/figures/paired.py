"""What contextual calibration changes: for every arm its accuracy without (open) and with it (filled), and the change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsort.curriculum.ablation.report.figures.marks import bare, beside, marks, segments
from sparsort.curriculum.ablation.report.figures.marks import names as write_names
from sparsort.curriculum.ablation.report.figures.style import Tips, colour
from sparsort.curriculum.ablation.report.numbers.rows import Blocks, kept, percent, places, points
from sparsort.curriculum.ablation.report.numbers.shape import CalibrationArm, CalibrationCell

RANDOM = "mean random order"


def rows_of(cell: CalibrationCell, rows: Blocks) -> Blocks:
    """The rows of a panel: the mean random order, then the arms in the order of every figure."""
    return [("random", [RANDOM]), *kept(rows, [arm["name"] for arm in cell["arms"]])]


def limits_of(cells: Sequence[CalibrationCell]) -> tuple[float, float]:
    """Limits of an accuracy axis that holds every arm of these cells."""
    seen = [value for cell in cells for arm in cell["arms"] for value in (arm["off"], arm["on"])]
    for cell in cells:
        for side in ("off", "on"):
            sd = cell["spread_off"] if side == "off" else cell["spread_on"]
            middle = next(arm[side] for arm in cell["arms"] if arm["kind"] == "random")
            seen += [middle - (sd or 0), middle + (sd or 0)]
    room = max(0.01, 0.06 * (max(seen) - min(seen)))
    return max(-0.01, min(seen) - room), min(1.01, max(seen) + room)


def draw_paired(
    axes: Any,
    cell: CalibrationCell,
    rows: Blocks,
    tips: Tips,
    *,
    limits: tuple[float, float],
    names: bool = True,
    numbers: bool = True,
) -> None:
    """Draw into `axes`.

    Args:
        axes: of matplotlib.
        cell: one of the report's `calibration`.
        rows: from `rows_of`.
        tips: collects what the marks say.
        limits: of the accuracy axis, 0 to 1.
        names: whether to write the arms' names on the left.
        numbers: whether to write the change on the right.
    """
    at, bottom = places(rows)
    size = axes.xaxis.label.get_fontsize()
    present = [(RANDOM if arm["kind"] == "random" else arm["name"], arm) for arm in cell["arms"]]
    present = [(name, arm) for name, arm in present if name in at]
    axes.grid(axis="x", zorder=0)
    axes.set_xlim(100 * limits[0], 100 * limits[1])
    bare(axes, rows=(bottom - 0.4, -0.8))
    shades = [_shade(arm) for _, arm in present]
    y_N = [at[name] for name, _ in present]
    ends = ([100 * arm["off"] for _, arm in present], [100 * arm["on"] for _, arm in present])
    segments(axes, *ends, y_N, shades, 1.4, tips=tips, arms=[_own(arm) for _, arm in present])
    for kinds, marker, size_of_mark in ((("random", "named", "oracle"), "o", 4.6), (("chosen",), "D", 4.0)):
        own = [(name, arm, shade) for (name, arm), shade in zip(present, shades, strict=True) if arm["kind"] in kinds]
        for side, when in (("off", "without"), ("on", "with")):
            values = [arm["off"] if side == "off" else arm["on"] for _, arm, _ in own]
            marks(
                axes,
                [100 * value for value in values],
                [at[name] for name, _, _ in own],
                tips,
                [
                    (f"{name} {when} contextual calibration: {percent(value)} %", _own(arm))
                    for (name, arm, _), value in zip(own, values, strict=True)
                ],
                marker=marker,
                size=size_of_mark,
                face=[colour("paper") if side == "off" else shade for _, _, shade in own],
                edge=[shade for _, _, shade in own],
            )
    for name, arm in present:
        if arm["kind"] == "random":
            _whiskers(axes, at[name], (100 * arm["off"], cell["spread_off"]), (100 * arm["on"], cell["spread_on"]))
            axes.axvline(100 * arm["off"], color=colour("faint"), linewidth=0.8, zorder=0.5)
        if numbers:
            shade = str(arm["change"]["verdict"]) if _found(arm) else "ink"
            beside(axes, at[name], points(arm["change"]["value"]), size, side="right", shade=shade, offset=3.9 * size)
    axes.set_yticks([])
    if names:
        write_names(axes, at, size, tips, others=(RANDOM,))


def _found(arm: CalibrationArm) -> bool:
    return arm["change"]["verdict"] in ("helps", "hurts")


def _own(arm: CalibrationArm) -> str:
    """The arm that a mark belongs to; the mean random order is none."""
    return "" if arm["kind"] == "random" else arm["name"]


def _shade(arm: CalibrationArm) -> str:
    return colour(str(arm["change"]["verdict"]) if _found(arm) else "muted")


def _whiskers(axes: Any, y: float, *sides: tuple[float, float | None]) -> None:
    """One sd over random orders around the mean, off above and on below the row."""
    for (middle, sd), shift in zip(sides, (-0.3, 0.3), strict=True):
        if sd is not None:
            segments(axes, [middle - 100 * sd], [middle + 100 * sd], [y + shift], colour("random"), 1.4, zorder=1)
