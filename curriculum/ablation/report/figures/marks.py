"""Many marks as one artist, because matplotlib's time grows with the number of artists.

Contract: the result looks as if the marks were drawn one by one, and each mark has its own tooltip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.style import Tip, Tips, colour, plain


def marks(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    tips: Tips,
    texts: Sequence[Tip],
    *,
    marker: str = "o",
    size: float = 4.4,
    face: str | Sequence[str],
    edge: str | Sequence[str] | None,
    width: float = 1.0,
    alpha: float | None = None,
    zorder: float = 3,
    clip: bool = True,
) -> None:
    """Draw marks at (x, y).

    Args:
        axes: of matplotlib, as are `marker`, `alpha` and `zorder`.
        x, y: the coordinates of each mark.
        tips: the tooltips of the figure.
        texts: the tooltip of each mark.
        size, width: the diameter of a mark and the width of its edge, in points.
        face, edge: the colours of the inside and of the edge; a shape without an inside has the colour `face` and no edge.
        clip: whether marks are cut at the axes.
    """
    if len(x):
        # matplotlib takes the area of a mark, in points².
        drawn = axes.scatter(
            x,
            y,
            s=size**2,
            marker=marker,
            facecolors=face,
            **({} if edge is None else {"edgecolors": edge}),
            linewidths=width,
            alpha=alpha,
            zorder=zorder,
            clip_on=clip,
        )
        tips.add_each(drawn, texts)


def bars(
    axes: Any,
    left: Sequence[float],
    right: Sequence[float],
    y: Sequence[float],
    shades: Sequence[str],
    tips: Tips,
    texts: Sequence[Tip],
) -> None:
    """Draw horizontal bars from `left` to `right`, centred on `y`."""
    from matplotlib.collections import PolyCollection

    # Rows are one unit apart, so 0.24 units remain between bars.
    half = 0.38
    corners = [
        [(start, at - half), (end, at - half), (end, at + half), (start, at + half)]
        for start, end, at in zip(left, right, y, strict=True)
    ]
    drawn = PolyCollection(corners, facecolors=list(shades), edgecolors=colour("paper"), linewidths=0.5)
    axes.add_collection(drawn)
    tips.add_each(drawn, texts)


def segments(
    axes: Any,
    low: Sequence[float],
    high: Sequence[float],
    y: Sequence[float],
    shades: Any,
    width: float,
    *,
    zorder: float = 2,
    tips: Tips | None = None,
    arms: Sequence[str] = (),
) -> None:
    """Draw horizontal lines from `low` to `high` at `y`, `width` points thick; with `tips`, each belongs to one of `arms`."""
    if len(y):
        # Without "butt" the ends would reach half a line width beyond the values.
        drawn = axes.hlines(y, low, high, colors=shades, linewidth=width, zorder=zorder, capstyle="butt")
        if tips is not None:
            tips.add_each(drawn, [("", arm) for arm in arms])


def names(
    axes: Any,
    y_of: Mapping[str, float],
    size: float,
    tips: Tips | None = None,
    notes: Mapping[str, str] | None = None,
    others: Sequence[str] = (),
) -> None:
    """Write the names of rows to the left of `axes`, in place of its ticks.

    Args:
        axes: of matplotlib.
        y_of: the row of each name.
        size: of the text, in points.
        tips: the tooltips of the figure; a name that is cut gets one with the whole name.
        notes: a text after the name, by name.
        others: the names that are not those of arms.
    """
    axes.set_yticks([])
    for name, y in y_of.items():
        text = margin_text(axes, y, plain(name) + (notes or {}).get(name, ""), size, side="left", shade="ink")
        if tips is not None:
            tips.add(text, name if plain(name) != name else "", "" if name in others else name)


def margin_text(axes: Any, y: float, text: str, size: float, *, side: str, shade: str, offset: float = 5.0) -> Any:
    """Write a text outside the axes at row `y`; its right end is `offset` points from the axes on either side."""
    left = side == "left"
    # The transform takes x as a share of the width of the axes, and y in the units of the data.
    return axes.annotate(
        text,
        (0.0 if left else 1.0, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-offset if left else offset, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=size,
        color=colour(shade),
        annotation_clip=False,
    )


def bare(axes: Any, *, rows: tuple[float, float]) -> None:
    """Remove everything from axes of rows except the numbers below them; `rows` are the lower and the upper end of y."""
    axes.set_ylim(*rows)
    for spine in ("left", "bottom"):
        axes.spines[spine].set_visible(False)
    axes.tick_params(axis="x", length=0)


def swarm(values: Any, step: float, most: float) -> Any:
    """Vertical offsets that separate marks of equal or almost equal values: the marks of one bin alternate up and down.

    Args:
        values: (N,) numbers.
        step: the distance between neighbours in a bin.
        most: the largest offset.
    """
    values = np.asarray(values, dtype=float)
    # Equal values have no range; any divisor then puts all of them into one bin.
    span = float(np.ptp(values)) or 1.0
    bins = np.round((values - values.min()) / span * 40).astype(int)
    used: dict[int, int] = {}
    offsets = np.zeros(len(values))
    for index in np.argsort(values, kind="stable"):
        turn = used.get(int(bins[index]), 0)
        used[int(bins[index])] = turn + 1
        offsets[index] = step * ((turn + 1) // 2) * (1 if turn % 2 else -1)
    return np.clip(offsets, -most, most)
