"""Which labels are predicted, order by order, against the gold labels.

Left: the share of each label, under gold, under all random orders together, and under every arm. Right: the entropy of those
shares (1: all labels equally often), for every random order of every set and for the arms by set. Below: all random orders one
by one, from the most one-sided to the most even.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.marks import bare, bars, marks
from sparsort.curriculum.ablation.report.figures.marks import names as write_names
from sparsort.curriculum.ablation.report.figures.style import (
    KIND_COLOUR,
    LABEL_COLOURS,
    Tips,
    colour,
    plain,
    text_width,
)
from sparsort.curriculum.ablation.report.numbers.rows import Blocks, kept, percent, places
from sparsort.curriculum.ablation.report.numbers.shape import Cell

# Of the legend, in units of the text's size: a swatch with its gap, and the room between columns.
_SWATCH, _BETWEEN = 1.3, 1.2
GOLD, RANDOM = "gold labels", "random orders"


def label_colours(labels: Sequence[str]) -> list[str]:
    """A colour for every label; those beyond the palette share one."""
    return [colour(LABEL_COLOURS[place] if place < len(LABEL_COLOURS) else "rest") for place in range(len(labels))]


def rows_of(cell: Cell, rows: Blocks) -> Blocks:
    """The rows of a panel: gold, all random orders, then the arms."""
    return [("gold", [GOLD]), ("random", [RANDOM]), *kept(rows, [arm["name"] for arm in cell["arms"]])]


def draw_shares(axes: Any, cell: Cell, rows: Blocks, tips: Tips, *, names: bool = True) -> None:
    """Stacked bars of label shares into `axes`, a row each of `rows_of`."""
    at, bottom = places(rows, gap=0.5)
    shares = {arm["name"]: arm["label_share"] for arm in cell["arms"]}
    shares |= {GOLD: cell["gold_share"], RANDOM: cell["random"]["label_share"]}
    left, right, y_N, shades, said = [], [], [], [], []
    for name, y in at.items():
        edges = 100 * np.concatenate([[0.0], np.cumsum(shares.get(name, []))])
        for label, start, end, shade in zip(
            cell["labels"], edges[:-1], edges[1:], label_colours(cell["labels"]), strict=False
        ):
            left.append(start)
            right.append(end)
            y_N.append(y)
            shades.append(shade)
            said.append((f"{name}: {label} {percent((end - start) / 100)} %", "" if name in (GOLD, RANDOM) else name))
    bars(axes, left, right, y_N, shades, tips, said)
    edge = 0.0
    for share in cell["gold_share"][:-1]:
        edge += 100 * share
        axes.axvline(edge, color=colour("ink"), linewidth=0.7, dashes=(2, 2), zorder=4)
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 25, 50, 75, 100])
    _finish(axes, at, bottom, tips if names else None)


def draw_entropy(axes: Any, cell: Cell, rows: Blocks, tips: Tips) -> None:
    """Entropy of the shares into `axes`, beside the rows of `draw_shares`."""
    at, bottom = places(rows, gap=0.5)
    axes.grid(axis="x", zorder=0)
    gold = np.array(cell["gold_share"])
    held = gold[gold > 0]
    even = float(-(held * np.log(held)).sum() / np.log(max(2, len(gold))))
    axes.axvline(even, color=colour("ink"), linewidth=0.7, dashes=(2, 2), zorder=1)
    spread = np.array(cell["random"]["entropy_by_set"]).ravel()
    jitter = 0.3 * np.sin(np.arange(len(spread)) * 2.4)
    dots = axes.scatter(spread, at[RANDOM] + jitter, s=5, color=colour("random"), alpha=0.6, linewidths=0, zorder=2)
    tips.add(dots, f"random orders: entropy {spread.min():.2f} to {spread.max():.2f}")
    axes.plot([spread.mean()] * 2, [at[RANDOM] - 0.42, at[RANDOM] + 0.42], color=colour("ink"), linewidth=1.4, zorder=3)
    shown = [(at[arm["name"]], arm, arm["label_entropy"]) for arm in cell["arms"] if arm["name"] in at]
    found = [(y, arm, entropy, colour(KIND_COLOUR[arm["kind"]])) for y, arm, entropy in shown if entropy is not None]
    if found:
        small = axes.scatter(
            [value for _, arm, _, _ in found for value in arm["label_entropy_by_set"]],
            [y for y, arm, _, _ in found for _ in arm["label_entropy_by_set"]],
            s=5,
            color=[shade for _, arm, _, shade in found for _ in arm["label_entropy_by_set"]],
            alpha=0.3,
            linewidths=0,
            zorder=2,
        )
        tips.add_each(small, [("", arm["name"]) for _, arm, _, _ in found for _ in arm["label_entropy_by_set"]])
    marks(
        axes,
        [entropy for _, _, entropy, _ in found],
        [y for y, _, _, _ in found],
        tips,
        [(f"{arm['name']}: entropy {entropy:.2f}", arm["name"]) for _, arm, entropy, _ in found],
        marker="|",
        size=7,
        face=[shade for _, _, _, shade in found],
        edge=None,
        width=1.6,
    )
    low = min([even, *spread, *(value for arm in cell["arms"] for value in arm["label_entropy_by_set"])])
    axes.set_xlim(max(0.0, low - 0.05), 1.02)
    axes.xaxis.set_major_locator(_ticks())
    _finish(axes, at, bottom)


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3, steps=[1, 2, 5, 10])


def draw_orders(axes: Any, cell: Cell) -> None:
    """All random orders of all sets as thin stacked columns into `axes`, from the lowest entropy to the highest."""
    share_NL = np.array(cell["random"]["label_share_by_set"]).reshape(-1, len(cell["labels"]))
    order = np.argsort(np.array(cell["random"]["entropy_by_set"]).ravel(), kind="stable")
    edges = np.concatenate([np.zeros((len(order), 1)), np.cumsum(100 * share_NL[order], axis=1)], axis=1)
    x = np.repeat(np.arange(len(order) + 1), 2)[1:-1]
    for place, shade in enumerate(label_colours(cell["labels"])):
        low, high = (np.repeat(edges[:, place + side], 2) for side in (0, 1))
        axes.fill_between(x, low, high, color=shade, linewidth=0)
    edge = 0.0
    for share in cell["gold_share"][:-1]:
        edge += 100 * share
        axes.axhline(edge, color=colour("ink"), linewidth=0.7, dashes=(2, 2))
    axes.set_xlim(0, len(order))
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100])
    axes.set_xticks([])
    for spine in ("left", "bottom"):
        axes.spines[spine].set_visible(False)


def legend_shape(cell: Cell, size: float, wide: float) -> tuple[int, int]:
    """Columns and rows of `legend` in `wide` inches."""
    widths = [text_width([text], size) + _SWATCH * size / 72 for text in _legend_texts(cell)]
    for columns in range(len(widths), 0, -1):
        # Filled column by column, as matplotlib does.
        lines = -(-len(widths) // columns)
        used = [max(widths[start : start + lines]) for start in range(0, len(widths), lines)]
        if sum(used) + (len(used) - 1) * _BETWEEN * size / 72 <= wide + 0.1:
            return len(used), lines
    return 1, len(widths)


def legend(axes: Any, cell: Cell, size: float, columns: int) -> None:
    """The labels with their colours above `axes`."""
    from matplotlib.patches import Patch

    shades = [colour(name) for name in (*LABEL_COLOURS, "rest")]
    handles = [
        Patch(facecolor=shade, linewidth=0, label=text)
        for text, shade in zip(_legend_texts(cell), shades, strict=False)
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=size,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.4,
        columnspacing=_BETWEEN,
        labelspacing=0.35,
        borderaxespad=0.2,
        borderpad=0,
    )


def _legend_texts(cell: Cell) -> list[str]:
    """Label names, and how many more there are than colours."""
    shown = [plain(label, 16) for label in cell["labels"][: len(LABEL_COLOURS)]]
    more = len(cell["labels"]) - len(shown)
    return [*shown, f"{more} more"] if more else shown


def _finish(axes: Any, at: dict[str, float], bottom: float, names: Tips | None = None) -> None:
    bare(axes, rows=(bottom - 0.4, -0.7))
    axes.set_yticks([])
    if names is not None:
        write_names(axes, at, axes.xaxis.label.get_fontsize(), names, others=(GOLD, RANDOM))
