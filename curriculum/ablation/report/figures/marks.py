"""Many marks in one stroke: matplotlib pays by the artist, so a panel's marks, bars and names are drawn together.

Contract: what these functions draw looks as if drawn one by one, and every mark keeps a tip of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.style import Tips, colour, plain

Said = tuple[str, str]


def marks(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    tips: Tips,
    said: Sequence[Said],
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
    """Marks at (x, y): `size` is the diameter and `width` the edge in points; `said` is the tip and the arm of
    each. Markers without an inside take `face` and no `edge`.
    """
    if len(x):
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
        tips.add_each(drawn, said)


def bars(
    axes: Any,
    left: Sequence[float],
    right: Sequence[float],
    y: Sequence[float],
    shades: Sequence[str],
    tips: Tips,
    said: Sequence[Said],
) -> None:
    """Horizontal bars from `left` to `right`, centred on `y`."""
    from matplotlib.collections import PolyCollection

    half = 0.38
    corners = [
        [(start, at - half), (end, at - half), (end, at + half), (start, at + half)]
        for start, end, at in zip(left, right, y, strict=True)
    ]
    drawn = PolyCollection(corners, facecolors=list(shades), edgecolors=colour("paper"), linewidths=0.5)
    axes.add_collection(drawn)
    tips.add_each(drawn, said)


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
    """Horizontal lines from `low` to `high` at `y`, `width` points thick; each belongs to an arm where `arms` are given."""
    if len(y):
        drawn = axes.hlines(y, low, high, colors=shades, linewidth=width, zorder=zorder, capstyle="butt")
        if tips is not None:
            tips.add_each(drawn, [("", arm) for arm in arms])


def names(
    axes: Any,
    at: Mapping[str, float],
    size: float,
    tips: Tips | None = None,
    notes: Mapping[str, str] | None = None,
    others: Sequence[str] = (),
) -> None:
    """Names of rows to the left of `axes`, which loses its own ticks there; with `tips`, each but `others` belongs to its arm."""
    axes.set_yticks([])
    for name, y in at.items():
        text = beside(axes, y, plain(name) + (notes or {}).get(name, ""), size, side="left", shade="ink")
        if tips is not None:
            tips.add(text, name if plain(name) != name else "", "" if name in others else name)


def beside(axes: Any, y: float, text: str, size: float, *, side: str, shade: str, offset: float = 5.0) -> Any:
    """Text at row `y`: ending left of the axes, or ending `offset` points right of them; returns it."""
    left = side == "left"
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
    """Axes of rows: no spines, no ticks but the numbers below; `rows` are the lower and the upper end of y."""
    axes.set_ylim(*rows)
    for spine in ("left", "bottom"):
        axes.spines[spine].set_visible(False)
    axes.tick_params(axis="x", length=0)


def swarm(values: Any, step: float, most: float) -> Any:
    """Small offsets that keep (almost) equal values apart: the n-th of a bin moves by n half steps, up and down in turn."""
    values = np.asarray(values, dtype=float)
    span = float(np.ptp(values)) or 1.0
    bins = np.round((values - values.min()) / span * 40).astype(int)
    seen: dict[int, int] = {}
    offsets = np.zeros(len(values))
    for index in np.argsort(values, kind="stable"):
        turn = seen.get(int(bins[index]), 0)
        seen[int(bins[index])] = turn + 1
        offsets[index] = step * ((turn + 1) // 2) * (1 if turn % 2 else -1)
    return np.clip(offsets, -most, most)
