"""Forest plot: the paired difference of every arm from the mean random order, with its interval.

The thick line is the interval at the report's level, and the thin line is widened for the number of arms. A filled mark differs
from zero after Holm's correction. The band around zero contains the differences that a study of this size detects with less than
80 % power. An arm without an interval has a mark without a line, and the figure states that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.marks import bare, margin_text, marks, segments
from sparsort.curriculum.ablation.report.figures.marks import names as write_names
from sparsort.curriculum.ablation.report.figures.style import KIND_NAME, Tips, colour
from sparsort.curriculum.ablation.report.numbers.rows import (
    Blocks,
    is_significant,
    points,
    probability,
    y_positions,
)
from sparsort.curriculum.ablation.report.numbers.shape import Difference

CAPTION = "Difference between each orderer and the mean random order"
_NO_INTERVAL = "no interval"
_COLOUR = {"helps": "helps", "hurts": "hurts", "nothing": "muted", None: "muted"}


def limit_of(differences: Iterable[Difference]) -> float:
    """Half the width of an axis, in accuracy, that has room for all values and nearly all intervals."""
    shown = list(differences)
    most = max((abs(one["value"]) for one in shown), default=0.0)
    plain = _most_ends(end for one in shown for end in (one["low"], one["high"]))
    corrected = _most_ends(end for one in shown for end in (one["adjusted_low"], one["adjusted_high"]))
    # Corrected intervals may be much wider than the others; beyond this factor they are cut and end in an arrow.
    return float(np.clip(1.04 * max(most, plain, min(corrected, 1.7 * plain)), 0.01, 1.0))


def _most_ends(ends: Iterable[float | None]) -> float:
    """The absolute value that 97 % of the ends are within, so that a few wide intervals do not compress all others."""
    known = [abs(end) for end in ends if end is not None]
    return float(np.quantile(known, 0.97)) if known else 0.0


def draw_forest(
    axes: Any,
    arms: Mapping[str, Difference],
    rows: Blocks,
    tips: Tips,
    *,
    limit: float,
    names: bool = True,
    numbers: bool = True,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Draw into `axes`.

    Args:
        axes: of matplotlib.
        arms: the difference of each arm; the row of an arm without one is empty.
        rows: from `rows.blocks`.
        tips: the tooltips of the figure.
        limit: half the width of the axis, from `limit_of` for all panels that share the axis.
        names: whether to write the names of the arms on the left.
        numbers: whether to write differences and intervals on the right.
        notes: a text after the name, by arm.
    """
    y_of, bottom = y_positions(rows)
    # All texts follow the size of the axis label, which `styled` sets.
    size = axes.xaxis.label.get_fontsize()
    wide = 100 * limit
    visible = [one["smallest_visible"] for one in arms.values() if one["smallest_visible"] is not None]
    # Each arm has a limit of its own, but one band for all of them is easier to read.
    if visible:
        reach = min(100 * float(np.median(visible)), wide)
        axes.axvspan(-reach, reach, color=colour("band"), linewidth=0, zorder=0)
    axes.grid(axis="x", zorder=0.5)
    axes.axvline(0, color=colour("ink"), linewidth=0.8, zorder=1)
    axes.set_xlim(-wide, wide)
    bare(axes, rows=(bottom - 0.4, -1.3))
    present = [(name, arms[name], y) for name, y in y_of.items() if name in arms]
    _intervals(axes, present, wide, tips)
    _differences(axes, present, tips)
    axes.set_yticks([])
    if names:
        write_names(axes, y_of, size, tips, notes)
    if numbers:
        for name, y in y_of.items():
            _write_numbers(axes, arms.get(name), y, size)
    elif present and all(one["low"] is None for _, one, _ in present):
        axes.text(0.98, 0.01, _NO_INTERVAL, transform=axes.transAxes, ha="right", va="bottom", fontsize=size - 1)
    for kind, listed in rows:
        # Every block except the first has a line above it.
        if y_of[listed[0]]:
            axes.axhline(y_of[listed[0]] - 1.35, color=colour("faint"), linewidth=0.6, zorder=0.6)
        if names and len(rows) > 1:
            margin_text(axes, y_of[listed[0]] - 0.85, KIND_NAME[kind], size - 1, side="left", shade="muted")


def _differences(axes: Any, present: Sequence[tuple[str, Difference, float]], tips: Tips) -> None:
    shades = [colour(_COLOUR[one["verdict"]]) for _, one, _ in present]
    marks(
        axes,
        [100 * one["value"] for _, one, _ in present],
        [y for _, _, y in present],
        tips,
        [(f"{name}: {describe(one)}", name) for name, one, _ in present],
        face=[
            shade if is_significant(one) else colour("paper")
            for shade, (_, one, _) in zip(shades, present, strict=True)
        ],
        edge=shades,
        # A mark at the edge of the axes is drawn whole.
        clip=False,
    )


def _intervals(axes: Any, present: Sequence[tuple[str, Difference, float]], wide: float, tips: Tips) -> None:
    """Draw both intervals of every row, with an arrow at the end of one that exceeds the axes."""
    # The thin line comes first, because the thick one covers its middle.
    for kind, width in (("adjusted_", 0.8), ("", 2.2)):
        low, high, y_N, shades, arms = [], [], [], [], []
        for name, one, y in present:
            ends = (one["adjusted_low"], one["adjusted_high"]) if kind else (one["low"], one["high"])
            if ends[0] is not None and ends[1] is not None:
                low.append(100 * ends[0])
                high.append(100 * ends[1])
                y_N.append(y)
                shades.append(colour(_COLOUR[one["verdict"]]))
                arms.append(name)
        clipped = (np.clip(low, -wide, wide).tolist(), np.clip(high, -wide, wide).tolist())
        segments(axes, *clipped, y_N, shades, width, tips=tips, arms=arms)
        # The plain interval is within the adjusted one, so arrows for the latter suffice.
        if kind:
            for sign, end, mark in ((-1, low, "<"), (1, high, ">")):
                beyond = [(y, shade) for value, y, shade in zip(end, y_N, shades, strict=True) if sign * value > wide]
                _arrows(axes, sign * wide, beyond, mark)


def _arrows(axes: Any, x: float, beyond: Sequence[tuple[float, str]], mark: str) -> None:
    if beyond:
        axes.scatter(
            [x] * len(beyond),
            [y for y, _ in beyond],
            s=9,
            marker=mark,
            c=[shade for _, shade in beyond],
            linewidths=0,
            clip_on=False,
            zorder=2,
        )


def without_interval(arms: Iterable[Difference]) -> str:
    """A sentence for a caption with the reasons why arms have no interval; empty if all have one."""
    reasons = dict.fromkeys(one["reason"] for one in arms if one["low"] is None and one["reason"])
    return f" A mark without a line has no interval: {'; '.join(map(str, reasons))}." if reasons else ""


def describe(one: Difference) -> str:
    """A difference in points with its interval and p-values, or with the reason why it has none."""
    text = f"{points(one['value'])} points"
    if one["low"] is None:
        return f"{text}; {one['reason']}" if one["reason"] else text
    text += f" [{points(one['low'])}, {points(one['high'])}]"
    if one["p_adjusted"] is not None:
        text += f", p {probability(one['p'])}, after Holm {probability(one['p_adjusted'])}"
    return text


def _write_numbers(axes: Any, one: Difference | None, y: float, size: float) -> None:
    if one is None:
        margin_text(axes, y, "not run", size - 0.5, side="right", shade="muted", offset=11.6 * size)
        return
    shade = _COLOUR[one["verdict"]] if is_significant(one) else "ink"
    margin_text(axes, y, points(one["value"]), size, side="right", shade=shade, offset=3.9 * size)
    interval = _NO_INTERVAL if one["low"] is None else f"{points(one['low'])} to {points(one['high'])}"
    margin_text(axes, y, interval, size - 0.5, side="right", shade="muted", offset=11.6 * size)
