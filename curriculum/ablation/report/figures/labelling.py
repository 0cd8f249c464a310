"""Names beside marks, where there is room for them: greedy, and silent where there is none.

A name is tried above, beside and below its mark, and is left out when every place would cover
another name or mark, or lie nearer to another mark: the tables and tips hold all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.style import colour, plain

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


def label(
    axes: Any,
    named: Sequence[tuple[str, float, float, str]],
    *,
    marks: Sequence[Place],
    lines: Sequence[tuple[Place, Place]] = (),
    size: float | None = None,
) -> None:
    """Write names into `axes`, whose limits are final. Texts that stand there already are not covered either.

    Args:
        axes: of matplotlib.
        named: name, x, y and colour of each mark, the most important first.
        marks: (x, y) of every mark.
        lines: upright and level lines not to cross, from (x, y) to (x, y).
        size: of the text, in points; by default a little smaller than the axis label.
    """
    size = size or axes.xaxis.label.get_fontsize() - 0.5
    renderer = axes.figure.canvas.get_renderer()
    place = axes.transData.transform
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in map(place, marks)]
    taken += [(*np.minimum(place(start), place(end)), *np.maximum(place(start), place(end))) for start, end in lines]
    taken += [text.get_window_extent(renderer).extents for text in axes.texts]
    frame = axes.get_window_extent()
    for name, x, y, shade in named:
        for right, up, ha, va in _SIDES:
            text = axes.annotate(
                plain(name, 26),
                (x, y),
                xytext=(right, up),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=size,
                color=colour(shade),
                zorder=4,
            )
            box = text.get_window_extent(renderer)
            # A text's box reaches below its letters.
            own = (box.x0, box.y0 + 0.15 * size, box.x1, box.y1)
            inside = frame.x0 <= own[0] and own[2] <= frame.x1 + 8 and frame.y0 <= own[1] and own[3] <= frame.y1 + 4
            near = min((_gap(own, place(mark)) for mark in marks if mark != (x, y)), default=np.inf)
            if inside and _gap(own, place((x, y))) <= near and not any(_touch(own, other) for other in taken):
                taken.append(own)
                break
            text.remove()


def _gap(box: Sequence[float], mark: Sequence[float]) -> float:
    """Distance from a box to a mark."""
    return float(np.hypot(max(box[0] - mark[0], mark[0] - box[2], 0.0), max(box[1] - mark[1], mark[1] - box[3], 0.0)))


def _touch(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
