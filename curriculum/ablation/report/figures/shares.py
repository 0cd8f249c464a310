"""The shares of labels among the predictions under each order, compared with the gold labels.

Left: the share of each label among the gold labels, among the predictions of all random orders together, and among those of every
arm. Right: the entropy of those shares (1 if all labels are equally frequent), for every random order of every set, and for every
arm on every set. Below: the shares under each random order, from the most one-sided to the most even.
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
from sparsort.curriculum.ablation.report.numbers.rows import Blocks, only, percent, y_positions
from sparsort.curriculum.ablation.report.numbers.shape import CellNumbers

# Widths in the legend, as multiples of the size of its text: a swatch with its gap, and the gap between columns.
_SWATCH, _BETWEEN = 1.3, 1.2
GOLD, RANDOM = "gold labels", "random orders"


def label_colours(labels: Sequence[str]) -> list[str]:
    """A colour for every label; if there are more labels than colours, the last ones share one."""
    return [colour(LABEL_COLOURS[place] if place < len(LABEL_COLOURS) else "rest") for place in range(len(labels))]


def rows_of(cell: CellNumbers, rows: Blocks) -> Blocks:
    """The rows of a panel: the gold labels, all random orders together, then the cell's arms."""
    return [("gold", [GOLD]), ("random", [RANDOM]), *only(rows, [arm["name"] for arm in cell["arms"]])]


def draw_shares(axes: Any, cell: CellNumbers, rows: Blocks, tips: Tips, *, names: bool = True) -> None:
    """Draw the label shares into `axes` as stacked bars, one for each row of `rows_of`."""
    y_of, bottom = y_positions(rows, gap=0.5)
    shares = {arm["name"]: arm["label_share"] for arm in cell["arms"]}
    shares |= {GOLD: cell["gold_share"], RANDOM: cell["random"]["label_share"]}
    left, right, y_N, shades, texts = [], [], [], [], []
    for name, y in y_of.items():
        # A sheet has the rows of all cells; an arm that this cell lacks has no shares, and its row stays empty.
        edges = 100 * np.concatenate([[0.0], np.cumsum(shares.get(name, []))])
        for label, start, end, shade in zip(
            cell["labels"], edges[:-1], edges[1:], label_colours(cell["labels"]), strict=False
        ):
            left.append(start)
            right.append(end)
            y_N.append(y)
            shades.append(shade)
            texts.append((f"{name}: {label} {percent((end - start) / 100)} %", "" if name in (GOLD, RANDOM) else name))
    bars(axes, left, right, y_N, shades, tips, texts)
    for edge in _gold_edges(cell):
        axes.axvline(edge, color=colour("ink"), linewidth=0.7, dashes=(2, 2), zorder=4)
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 25, 50, 75, 100])
    _finish(axes, y_of, bottom, tips if names else None)


def draw_entropy(axes: Any, cell: CellNumbers, rows: Blocks, tips: Tips) -> None:
    """Draw the entropy of the shares into `axes`, next to the rows of `draw_shares`."""
    from matplotlib.ticker import MaxNLocator

    y_of, bottom = y_positions(rows, gap=0.5)
    axes.grid(axis="x", zorder=0)
    gold = np.array(cell["gold_share"])
    # A label without gold answers contributes nothing to the entropy, while its logarithm is infinite.
    present = gold[gold > 0]
    gold_entropy = float(-(present * np.log(present)).sum() / np.log(max(2, len(gold))))
    axes.axvline(gold_entropy, color=colour("ink"), linewidth=0.7, dashes=(2, 2), zorder=1)
    spread = np.array(cell["random"]["entropy_by_set"]).ravel()
    # A fixed pattern in place of random jitter, so that equal numbers give equal figures.
    jitter = 0.3 * np.sin(np.arange(len(spread)) * 2.4)
    # There may be hundreds of random orders, so they have one tooltip.
    dots = axes.scatter(spread, y_of[RANDOM] + jitter, s=5, color=colour("random"), alpha=0.6, linewidths=0, zorder=2)
    tips.add(dots, f"random orders: entropy {spread.min():.2f} to {spread.max():.2f}")
    axes.plot(
        [spread.mean()] * 2, [y_of[RANDOM] - 0.42, y_of[RANDOM] + 0.42], color=colour("ink"), linewidth=1.4, zorder=3
    )
    arms = [
        (y_of[arm["name"]], arm, arm["label_entropy"], colour(KIND_COLOUR[arm["kind"]]))
        for arm in cell["arms"]
        if arm["name"] in y_of and arm["label_entropy"] is not None
    ]
    by_set = [(value, y, shade, arm["name"]) for y, arm, _, shade in arms for value in arm["label_entropy_by_set"]]
    if by_set:
        x_N, y_N, shades, names = zip(*by_set, strict=True)
        small = axes.scatter(x_N, y_N, s=5, color=shades, alpha=0.3, linewidths=0, zorder=2)
        tips.add_each(small, [("", name) for name in names])
    marks(
        axes,
        [entropy for _, _, entropy, _ in arms],
        [y for y, _, _, _ in arms],
        tips,
        [(f"{arm['name']}: entropy {entropy:.2f}", arm["name"]) for _, arm, entropy, _ in arms],
        marker="|",
        size=7,
        face=[shade for _, _, _, shade in arms],
        edge=None,
        width=1.6,
    )
    # The axis begins just below the lowest entropy, because small differences near 1 matter.
    low = min([gold_entropy, *spread, *(value for arm in cell["arms"] for value in arm["label_entropy_by_set"])])
    axes.set_xlim(max(0.0, low - 0.05), 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    _finish(axes, y_of, bottom)


def draw_orders(axes: Any, cell: CellNumbers) -> None:
    """Draw all random orders of all sets into `axes` as thin stacked columns, from the lowest entropy to the highest."""
    share_NL = np.array(cell["random"]["label_share_by_set"]).reshape(-1, len(cell["labels"]))
    order = np.argsort(np.array(cell["random"]["entropy_by_set"]).ravel(), kind="stable")
    edges = np.concatenate([np.zeros((len(order), 1)), np.cumsum(100 * share_NL[order], axis=1)], axis=1)
    # Every column is two points at the same height, so that the areas have steps and no slopes.
    x = np.repeat(np.arange(len(order) + 1), 2)[1:-1]
    for place, shade in enumerate(label_colours(cell["labels"])):
        low, high = (np.repeat(edges[:, place + side], 2) for side in (0, 1))
        axes.fill_between(x, low, high, color=shade, linewidth=0)
    for edge in _gold_edges(cell):
        axes.axhline(edge, color=colour("ink"), linewidth=0.7, dashes=(2, 2))
    axes.set_xlim(0, len(order))
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100])
    axes.set_xticks([])
    for spine in ("left", "bottom"):
        axes.spines[spine].set_visible(False)


def legend_shape(cell: CellNumbers, size: float, wide: float) -> tuple[int, int]:
    """The number of columns and rows of `legend` that fit into `wide` inches, with as many columns as possible."""
    widths = [text_width([text], size) + _SWATCH * size / 72 for text in _legend_texts(cell)]
    for columns in range(len(widths), 0, -1):
        # matplotlib fills a legend column by column.
        lines = -(-len(widths) // columns)
        used = [max(widths[start : start + lines]) for start in range(0, len(widths), lines)]
        if sum(used) + (len(used) - 1) * _BETWEEN * size / 72 <= wide + 0.1:
            return len(used), lines
    return 1, len(widths)


def legend(axes: Any, cell: CellNumbers, size: float, columns: int) -> None:
    """Write the labels with their colours above `axes`."""
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


def _legend_texts(cell: CellNumbers) -> list[str]:
    """The names of the labels that have a colour of their own, and the number of the others."""
    texts = [plain(label, 16) for label in cell["labels"][: len(LABEL_COLOURS)]]
    more = len(cell["labels"]) - len(texts)
    return [*texts, f"{more} more"] if more else texts


def _gold_edges(cell: CellNumbers) -> list[float]:
    """The boundaries between the stacked shares of the gold labels, in per cent."""
    edges: list[float] = np.cumsum([100 * share for share in cell["gold_share"][:-1]]).tolist()
    return edges


def _finish(axes: Any, y_of: dict[str, float], bottom: float, name_tips: Tips | None = None) -> None:
    """Remove the frame and ticks; with `name_tips`, write the names of the rows and add their tooltips to it."""
    bare(axes, rows=(bottom - 0.4, -0.7))
    axes.set_yticks([])
    if name_tips is not None:
        write_names(axes, y_of, axes.xaxis.label.get_fontsize(), name_tips, others=(GOLD, RANDOM))
