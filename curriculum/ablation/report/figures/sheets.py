"""Figures for a paper: one sheet for every question, all tasks and shots side by side on shared axes.

Contract: as `panels`, a generator to be run inside `style.styled(SIZE)`. A sheet holds one selector with or without contextual
calibration; tasks stand in columns, shots in rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sparsort.curriculum.ablation.report.figures import forest, paired, pareto, shares, spread
from sparsort.curriculum.ablation.report.figures.marks import beside
from sparsort.curriculum.ablation.report.figures.panels import forest_picture, shared_limit
from sparsort.curriculum.ablation.report.figures.style import (
    Picture,
    Tips,
    blank,
    colour,
    plain,
    slug,
    text_width,
)
from sparsort.curriculum.ablation.report.numbers.rows import Blocks, blocks
from sparsort.curriculum.ablation.report.numbers.shape import Cell, Pooled, Report

SIZE = 7.0
COLUMNS = 6
_LEAST = 5.4

Key = tuple[str, dict[str, Any]]

_ROW = 0.15


def sheets(report: Report) -> Iterator[Picture]:
    """Every sheet."""
    rows = blocks(report)
    names = [plain(name) for _, listed in rows for name in listed]
    margin = 1.05 * text_width([*names, paired.RANDOM], SIZE) + 0.12
    views = list(dict.fromkeys((cell["selector"], cell["calibrated"]) for cell in report["cells"]))
    selectors = list(dict.fromkeys(selector for selector, _ in views))
    several = len(selectors) > 1
    # Names from data reach a file name only as letters, digits and the like, and are told apart by their place.
    slugs = {selector: f"-{place}-{slug(selector)}" for place, selector in enumerate(selectors, 1)}
    for selector, calibrated in views:
        cells = [cell for cell in report["cells"] if (cell["selector"], cell["calibrated"]) == (selector, calibrated)]
        pooled = [pool for pool in report["pooled"] if (pool["selector"], pool["calibrated"]) == (selector, calibrated)]
        view = f"{slugs[selector] if several else ''}{'-calibrated' if calibrated else ''}"
        said = f"{f', {selector}' if several else ''}{', with contextual calibration' if calibrated else ''}"
        grid = _grid(cells)
        if pooled and pooled[0]["arms"]:
            drawn = forest_picture(pooled[0], rows, shared_limit(pooled), margin)
            over = "every k" if pooled[0]["k"] is None else f"k = {pooled[0]['k']}"
            caption = f"Difference of every orderer to the mean random order, all tasks, {over}{said}."
            caption += forest.without_interval(arm["difference"] for arm in pooled[0]["arms"])
            yield replace(drawn, name=f"pooled{view}", caption=caption)
        yield _spread(grid, view, said)
        if any(arm["kind"] != "oracle" for cell in cells for arm in cell["arms"]):
            yield _forest(grid, pooled, rows, margin, view, said)
            yield _cost(grid, pooled, view, said)
        labelled = [[cell for cell in line if len(cell["labels"]) > 1] for line in grid]
        if any(labelled):
            yield _labels([line for line in labelled if line], rows, margin, view, said)
    for selector in dict.fromkeys(pair["selector"] for pair in report["calibration"]):
        pairs = [pair for pair in report["calibration"] if pair["selector"] == selector]
        yield _calibration(_grid(pairs), rows, margin, slugs[selector] if several else "")


def _grid(cells: Sequence[Any]) -> list[list[Any]]:
    """Cells in lines: a line a k, cut where it would be too long."""
    lines = []
    for k in dict.fromkeys(cell["k"] for cell in cells):
        line = [cell for cell in cells if cell["k"] == k]
        lines += [line[start : start + COLUMNS] for start in range(0, len(line), COLUMNS)]
    return lines


def _head(panel: Any) -> str:
    """What stands above a panel: as much of the task as has room there, and k."""
    k = "every k" if panel["k"] is None else f"k = {panel['k']}"
    return f"{plain(panel.get('task', 'all tasks'), 12)}, {k}"


class _Sheet:
    """Axes in a grid, measured in inches: `left` holds names, `right` what is written beside the last column."""

    def __init__(
        self,
        lines: Sequence[Sequence[Any]],
        heights: Sequence[float],
        *,
        wide: float,
        left: float,
        gap: float,
        tops: Sequence[float] | None = None,
        foot: float = 0.78,
    ) -> None:
        columns = max(len(line) for line in lines)
        # Few panels are drawn wider, so that there is room for what stands below them.
        wide = max(wide, min(4.6, (_LEAST - left - (columns - 1) * gap) / columns))
        self.tops, self.between, self.foot = tops or [0.24] * len(lines), 0.42, foot
        width = left + columns * wide + (columns - 1) * gap + 0.12
        height = sum(heights) + sum(self.tops) + (len(lines) - 1) * self.between + self.foot
        self.figure, self.tips = blank(width, height), Tips()
        self.size, self.heights, self.wide, self.left, self.gap = (width, height), heights, wide, left, gap

    def axes(self, line: int, column: int) -> Any:
        above = sum(self.heights[: line + 1]) + sum(self.tops[: line + 1]) + line * self.between
        x, y = self.left + column * (self.wide + self.gap), self.size[1] - above
        return self.figure.add_axes(
            (x / self.size[0], y / self.size[1], self.wide / self.size[0], self.heights[line] / self.size[1])
        )

    def picture(self, name: str, caption: str, x_label: str, keys: Sequence[Key]) -> Picture:
        """The sheet with one label for all horizontal axes, and a key below it."""
        from matplotlib.lines import Line2D

        width, height = self.size
        middle = (self.left + width - 0.12) / 2 / width
        self.figure.text(
            middle, (self.foot - 0.34) / height, x_label, ha="center", va="bottom", fontsize=SIZE, color=colour("muted")
        )
        handles = [Line2D([], [], label=text, **{"linestyle": "none", **look}) for text, look in keys]
        if handles:
            room = [text_width([text], SIZE - 0.5) + 0.42 for text, _ in keys]
            self.figure.legend(
                handles=handles,
                loc="lower center",
                bbox_to_anchor=(0.5 if sum(room) > 2 * (1 - middle) * width else middle, 0.0),
                ncols=len(keys) if sum(room) < width else (len(keys) + 1) // 2,
                frameon=False,
                fontsize=SIZE - 0.5,
                handlelength=1.6,
                handletextpad=0.7,
                columnspacing=1.4,
                labelspacing=0.3,
                borderpad=0.3,
            )
        return Picture(name=name, caption=caption, figure=self.figure, tips=self.tips)


_MARKS: list[Key] = [
    ("random orders", {"marker": "o", "markersize": 3, "color": colour("random")}),
    ("their mean", {"marker": "|", "markersize": 8, "markeredgewidth": 1.4, "color": colour("ink")}),
    ("orderers that are rules", {"marker": "o", "markersize": 4.2, "color": colour("named")}),
    ("orderers chosen with the model", {"marker": "D", "markersize": 3.8, "color": colour("chosen")}),
]
_INTERVALS: list[Key] = [
    ("helps", {"marker": "o", "markersize": 4.4, "color": colour("helps")}),
    ("hurts", {"marker": "o", "markersize": 4.4, "color": colour("hurts")}),
    (
        "shows nothing, after Holm's correction",
        {"marker": "o", "markersize": 4.4, "markeredgecolor": colour("muted"), "markerfacecolor": colour("paper")},
    ),
    ("95 % interval", {"linestyle": "-", "linewidth": 2.2, "color": colour("muted")}),
    ("corrected for the number of orderers", {"linestyle": "-", "linewidth": 0.8, "color": colour("muted")}),
    ("too small to be seen", {"linestyle": "-", "linewidth": 7, "color": colour("band")}),
]
_CHANGE: list[Key] = [
    (
        "without",
        {"marker": "o", "markersize": 4.4, "markeredgecolor": colour("muted"), "markerfacecolor": colour("paper")},
    ),
    ("with", {"marker": "o", "markersize": 4.4, "color": colour("muted")}),
    ("raises", {"marker": "o", "markersize": 4.4, "color": colour("helps")}),
    ("lowers, after Holm's correction", {"marker": "o", "markersize": 4.4, "color": colour("hurts")}),
    ("one sd over random orders", {"linestyle": "-", "linewidth": 1.4, "color": colour("random")}),
]


def _forest(
    grid: list[list[Cell]], pooled: Sequence[Pooled], rows: Blocks, margin: float, view: str, said: str
) -> Picture:
    lines: list[list[Cell | Pooled]] = []
    for line in grid:
        ending = line is [other for other in grid if other[0]["k"] == line[0]["k"]][-1]
        lines.append([*line, *(pool for pool in pooled if ending and pool["k"] == line[0]["k"])])
    height = _ROW * (sum(len(listed) for _, listed in rows) + 1.2 * len(rows))
    sheet = _Sheet(lines, [height] * len(lines), wide=1.12, left=margin, gap=0.14)
    limit = shared_limit([panel for line in grid for panel in line])
    for number, across in enumerate(lines):
        for column, panel in enumerate(across):
            axes = sheet.axes(number, column)
            arms = {arm["name"]: arm["difference"] for arm in panel["arms"] if arm["kind"] != "oracle"}
            forest.draw_forest(axes, arms, rows, sheet.tips, limit=limit, names=column == 0, numbers=False)
            axes.set_title(_head(panel), fontsize=SIZE)
    caption = f"Difference of every orderer to the mean random order of the same demonstration sets{said}."
    shown = [arm for across in lines for panel in across for arm in panel["arms"] if arm["kind"] != "oracle"]
    caption += forest.without_interval(arm["difference"] for arm in shown)
    return sheet.picture(f"forest{view}", caption, "points of accuracy against the mean random order", _INTERVALS)


def _spread(grid: list[list[Cell]], view: str, said: str) -> Picture:
    sheet = _Sheet(
        grid, [0.19 * (max(cell["sets"] for cell in line) + 2) for line in grid], wide=1.75, left=0.42, gap=0.24
    )
    for number, line in enumerate(grid):
        for column, cell in enumerate(line):
            axes = sheet.axes(number, column)
            alike = [other for every in grid for other in every if other["task"] == cell["task"]]
            rows = max(other["sets"] for other in line)
            spread.draw_spread(axes, cell, sheet.tips, limits=spread.limits_of(alike), ends=False, sets=rows)
            axes.set_title(_head(cell), fontsize=SIZE)
            if column == 0:
                beside(axes, 0.0, "mean", SIZE, side="left", shade="ink")
                beside(axes, (rows + 2.2) / 2, "sets", SIZE, side="left", shade="ink")
    caption = f"Accuracy of every random order (grey) and every orderer, by demonstration set{said}."
    return sheet.picture(f"spread{view}", caption, "accuracy, %", _MARKS)


def _cost(grid: list[list[Cell]], pooled: Sequence[Pooled], view: str, said: str) -> Picture:
    lines: list[list[Cell | Pooled]] = [
        [*line, *(pool for pool in pooled if pool["k"] == line[0]["k"] and line[0] in _last_lines(grid))]
        for line in grid
    ]
    bought = [[pareto.points_of(panel) for panel in line] for line in lines]
    sheet = _Sheet(lines, [1.35] * len(lines), wide=1.75, left=0.42, gap=0.16)
    limits = pareto.limits_of([listed for line in bought for listed in line])
    for number, across in enumerate(lines):
        for column, panel in enumerate(across):
            axes = sheet.axes(number, column)
            pareto.draw_pareto(axes, bought[number][column], sheet.tips, limits=limits, every=False)
            axes.set_title(_head(panel), fontsize=SIZE)
            if column:
                axes.set_yticklabels([])
            else:
                axes.set_ylabel("points over random")
    caption = f"Difference to the mean random order against the tokens read for an answer{said}."
    return sheet.picture(
        f"cost{view}", caption, "tokens read for an answer, as a multiple of a random order's", _MARKS[2:]
    )


def _last_lines(grid: list[list[Cell]]) -> list[Cell]:
    """The first cells of the lines that end a k."""
    return list({line[0]["k"]: line[0] for line in grid}.values())


def _labels(grid: list[list[Cell]], rows: Blocks, margin: float, view: str, said: str) -> Picture:
    own = shares.rows_of(grid[0][0], rows)
    whole = [*own[:2], *rows]
    count = sum(len(listed) for _, listed in whole) + 0.5 * len(whole)
    wide, gap = 1.3, 0.16
    keys = [[shares.legend_shape(cell, SIZE - 1.2, wide) for cell in line] for line in grid]
    tops = [0.3 + 0.125 * max(lines for _, lines in line) for line in keys]
    sheet = _Sheet(grid, [_ROW * count] * len(grid), wide=wide, left=margin, gap=gap, tops=tops, foot=0.42)
    for number, line in enumerate(grid):
        for column, cell in enumerate(line):
            axes = sheet.axes(number, column)
            shares.draw_shares(axes, cell, whole, sheet.tips, names=column == 0)
            shares.legend(axes, cell, SIZE - 1.2, keys[number][column][0])
            axes.set_title(_head(cell), fontsize=SIZE, pad=72 * tops[number] - 15)
    caption = f"Share of each label among the predictions of every orderer; dashes: gold{said}."
    return sheet.picture(f"labels{view}", caption, "share of the predictions, %", [])


def _calibration(grid: list[list[Any]], rows: Blocks, margin: float, view: str) -> Picture:
    whole: Blocks = [("random", [paired.RANDOM]), *rows]
    height = _ROW * (sum(len(listed) for _, listed in whole) + 1.2 * len(whole))
    sheet = _Sheet(grid, [height] * len(grid), wide=1.3, left=margin, gap=0.16)
    for number, line in enumerate(grid):
        for column, pair in enumerate(line):
            axes = sheet.axes(number, column)
            alike = [other for every in grid for other in every if other["task"] == pair["task"]]
            paired.draw_paired(
                axes, pair, whole, sheet.tips, limits=paired.limits_of(alike), names=column == 0, numbers=False
            )
            axes.set_title(_head(pair), fontsize=SIZE)
    caption = "Accuracy without (open) and with (filled) contextual calibration. Grey lines: one sd over random orders."
    return sheet.picture(f"calibration{view}", caption, "accuracy, %", _CHANGE)
