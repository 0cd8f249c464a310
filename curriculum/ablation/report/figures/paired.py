"""The effect of contextual calibration: the accuracy of every arm without (open) and with it (filled), and the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsort.curriculum.ablation.report.figures.marks import bare, margin_text, marks, segments
from sparsort.curriculum.ablation.report.figures.marks import names as write_names
from sparsort.curriculum.ablation.report.figures.style import Tips, colour
from sparsort.curriculum.ablation.report.numbers.rows import (
    Blocks,
    is_significant,
    only,
    percent,
    points,
    y_positions,
)
from sparsort.curriculum.ablation.report.numbers.shape import CalibrationArm, CalibrationCell

RANDOM = "mean random order"


def rows_of(cell: CalibrationCell, rows: Blocks) -> Blocks:
    """The rows of a panel: the mean random order, then the cell's arms."""
    return [("random", [RANDOM]), *only(rows, [arm["name"] for arm in cell["arms"]])]


def limits_of(cells: Sequence[CalibrationCell]) -> tuple[float, float]:
    """The limits of an accuracy axis that has room for all arms and spreads of these cells."""
    values = [value for cell in cells for arm in cell["arms"] for value in (arm["off"], arm["on"])]
    for cell in cells:
        random = next(arm for arm in cell["arms"] if arm["kind"] == "random")
        for middle, sd in ((random["off"], cell["spread_off"]), (random["on"], cell["spread_on"])):
            values += [middle - (sd or 0), middle + (sd or 0)]
    # The limits leave room for the mark of an accuracy of exactly 0 or 1.
    room = max(0.01, 0.06 * (max(values) - min(values)))
    return max(-0.01, min(values) - room), min(1.01, max(values) + room)


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
        axes: the matplotlib axes.
        cell: an entry of the report's `calibration`.
        rows: from `rows_of`.
        tips: the tooltips of the figure.
        limits: the limits of the accuracy axis, from `limits_of`.
        names: whether to write the names of the arms on the left.
        numbers: whether to write the changes on the right.
    """
    y_of, bottom = y_positions(rows)
    size = axes.xaxis.label.get_fontsize()
    present = [(RANDOM if arm["kind"] == "random" else arm["name"], arm) for arm in cell["arms"]]
    # Oracles have no row.
    present = [(name, arm) for name, arm in present if name in y_of]
    axes.grid(axis="x", zorder=0)
    axes.set_xlim(100 * limits[0], 100 * limits[1])
    bare(axes, rows=(bottom - 0.4, -0.8))
    shades = [_shade(arm) for _, arm in present]
    y_N = [y_of[name] for name, _ in present]
    ends = ([100 * arm["off"] for _, arm in present], [100 * arm["on"] for _, arm in present])
    segments(axes, *ends, y_N, shades, 1.4, tips=tips, arms=[_name_of(arm) for _, arm in present])
    _accuracies(axes, present, shades, y_of, tips)
    for name, arm in present:
        if arm["kind"] == "random":
            _whiskers(axes, y_of[name], (100 * arm["off"], cell["spread_off"]), (100 * arm["on"], cell["spread_on"]))
            axes.axvline(100 * arm["off"], color=colour("faint"), linewidth=0.8, zorder=0.5)
        if numbers:
            shade = str(arm["change"]["verdict"]) if is_significant(arm["change"]) else "ink"
            margin_text(
                axes, y_of[name], points(arm["change"]["value"]), size, side="right", shade=shade, offset=3.9 * size
            )
    axes.set_yticks([])
    if names:
        write_names(axes, y_of, size, tips, others=(RANDOM,))


def _accuracies(
    axes: Any,
    present: Sequence[tuple[str, CalibrationArm]],
    shades: Sequence[str],
    y_of: Mapping[str, float],
    tips: Tips,
) -> None:
    """Draw the two marks of every row: empty without contextual calibration, filled with it."""
    # One artist has one shape of mark, so the kinds are drawn separately.
    for kinds, marker, size_of_mark in ((("random", "named", "oracle"), "o", 4.6), (("chosen",), "D", 4.0)):
        drawn = [(name, arm, shade) for (name, arm), shade in zip(present, shades, strict=True) if arm["kind"] in kinds]
        for side, when in (("off", "without"), ("on", "with")):
            values = [arm["off"] if side == "off" else arm["on"] for _, arm, _ in drawn]
            marks(
                axes,
                [100 * value for value in values],
                [y_of[name] for name, _, _ in drawn],
                tips,
                [
                    (f"{name} {when} contextual calibration: {percent(value)} %", _name_of(arm))
                    for (name, arm, _), value in zip(drawn, values, strict=True)
                ],
                marker=marker,
                size=size_of_mark,
                face=[colour("paper") if side == "off" else shade for _, _, shade in drawn],
                edge=[shade for _, _, shade in drawn],
            )


def _name_of(arm: CalibrationArm) -> str:
    """The arm that a mark belongs to; the mean random order is not an arm."""
    return "" if arm["kind"] == "random" else arm["name"]


def _shade(arm: CalibrationArm) -> str:
    return colour(str(arm["change"]["verdict"]) if is_significant(arm["change"]) else "muted")


def _whiskers(axes: Any, y: float, *sides: tuple[float, float | None]) -> None:
    """Draw one standard deviation over random orders around each mean: above the row for calibration off, below it for on."""
    for (middle, sd), shift in zip(sides, (-0.3, 0.3), strict=True):
        if sd is not None:
            segments(axes, [middle - 100 * sd], [middle + 100 * sd], [y + shift], colour("random"), 1.4, zorder=1)
