"""The figures for a paper: one sheet for each kind of figure, with all tasks and shots side by side on shared axes.

Contract: `sheets` is a generator that must run inside `style.styled(SIZE)`, like `panels`. A sheet has the cells of one selector
with or without contextual calibration; its columns are tasks, and its rows are numbers of shots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sparsort.curriculum.ablation.report.figures import forest, paired, pareto, shares, spread
from sparsort.curriculum.ablation.report.figures.marks import margin_text
from sparsort.curriculum.ablation.report.figures.panels import forest_picture, shared_limit, shots_of
from sparsort.curriculum.ablation.report.figures.style import (
    Picture,
    Tips,
    blank,
    colour,
    plain,
    slug,
    text_width,
)
from sparsort.curriculum.ablation.report.numbers.rows import Blocks, blocks, tested_arms
from sparsort.curriculum.ablation.report.numbers.shape import CellNumbers, Difference, Pooled, Report

# Widths and heights are in inches; SIZE is the size of text in points.
SIZE = 7.0
COLUMNS = 6
# If a sheet has few columns, its panels are widened until the sheet has its minimal width or they have their maximal width.
_MIN_SHEET_WIDTH, _MAX_PANEL_WIDTH = 5.4, 4.6
_ROW = 0.15

# An entry of a legend: its text, and the properties of a line or marker of matplotlib.
Key = tuple[str, dict[str, Any]]


def sheets(report: Report) -> Iterator[Picture]:
    """Every sheet."""
    rows = blocks(report)
    names = [plain(name) for _, listed in rows for name in listed]
    margin = 1.05 * text_width([*names, paired.RANDOM], SIZE) + 0.12
    views = list(dict.fromkeys((cell["selector"], cell["calibrated"]) for cell in report["cells"]))
    selectors = list(dict.fromkeys(selector for selector, _ in views))
    several = len(selectors) > 1
    # `slug` replaces special characters, so two selectors may have the same slug; the number before it keeps file names distinct.
    slugs = {selector: f"-{place}-{slug(selector)}" for place, selector in enumerate(selectors, 1)}
    for selector, calibrated in views:
        cells = [cell for cell in report["cells"] if (cell["selector"], cell["calibrated"]) == (selector, calibrated)]
        pooled = [pool for pool in report["pooled"] if (pool["selector"], pool["calibrated"]) == (selector, calibrated)]
        view = f"{slugs[selector] if several else ''}{'-calibrated' if calibrated else ''}"
        ending = f"{f', {selector}' if several else ''}{', with contextual calibration' if calibrated else ''}."
        grid = _grid(cells)
        if pooled and pooled[0]["arms"]:
            picture = forest_picture(pooled[0], rows, shared_limit(pooled), margin)
            caption = f"{forest.CAPTION}, all tasks, {shots_of(pooled[0])}{ending}"
            caption += forest.without_interval(tested_arms(pooled[0]).values())
            yield replace(picture, name=f"pooled{view}", caption=caption)
        yield _spread(grid, view, ending)
        if any(map(tested_arms, cells)):
            yield _forest(grid, pooled, rows, margin, view, ending)
            yield _cost(grid, pooled, view, ending)
        labelled = [[cell for cell in line if len(cell["labels"]) > 1] for line in grid]
        if any(labelled):
            yield _labels([line for line in labelled if line], rows, margin, view, ending)
    for selector in dict.fromkeys(pair["selector"] for pair in report["calibration"]):
        pairs = [pair for pair in report["calibration"] if pair["selector"] == selector]
        yield _calibration(_grid(pairs), rows, margin, slugs[selector] if several else "")


def _grid(cells: Sequence[Any]) -> list[list[Any]]:
    """Cells in lines: one line for each k, or several if it has more than `COLUMNS` cells."""
    lines = []
    for k in dict.fromkeys(cell["k"] for cell in cells):
        line = [cell for cell in cells if cell["k"] == k]
        lines += [line[start : start + COLUMNS] for start in range(0, len(line), COLUMNS)]
    return lines


def _with_pooled(grid: list[list[CellNumbers]], pooled: Sequence[Pooled]) -> list[list[CellNumbers | Pooled]]:
    """The grid with the pooled panels: the one of each k is added at the end of the last line that has this k."""
    last_line = {line[0]["k"]: number for number, line in enumerate(grid)}
    return [
        [*line, *(pool for pool in pooled if pool["k"] == line[0]["k"] and last_line[line[0]["k"]] == number)]
        for number, line in enumerate(grid)
    ]


def _alike(grid: list[list[Any]], panel: Any) -> list[Any]:
    """The panels of the same task as `panel`, whose axes have the same limits."""
    return [other for line in grid for other in line if other["task"] == panel["task"]]


class _Sheet:
    """A figure with a grid of axes, one for each panel. All sizes are in inches.

    Args:
        grid: the panels in lines.
        heights: the height of the axes in each line.
        wide: the smallest width of the axes of a panel.
        left: the width of the left margin, where the names of arms are.
        gap: the width of the gap between columns.
        tops: for each line, the height of the space above its axes, with the titles at its top; None if it has only the titles.
        foot: the height of the space below the last line.
    """

    def __init__(
        self,
        grid: Sequence[Sequence[Any]],
        heights: Sequence[float],
        *,
        wide: float,
        left: float,
        gap: float,
        tops: Sequence[float] | None = None,
        foot: float = 0.78,
    ) -> None:
        columns = max(len(line) for line in grid)
        # A few panels are drawn wider, so that the sheet has room for the legend.
        wide = max(wide, min(_MAX_PANEL_WIDTH, (_MIN_SHEET_WIDTH - left - (columns - 1) * gap) / columns))
        self.tops, self.between, self.foot = tops or [0.24] * len(grid), 0.42, foot
        # For each line, the distance in points between the axes and the title; None for matplotlib's default.
        self.pads = [None if tops is None else 72 * top - 15 for top in self.tops]
        width = left + columns * wide + (columns - 1) * gap + 0.12
        height = sum(heights) + sum(self.tops) + (len(grid) - 1) * self.between + self.foot
        self.figure, self.tips = blank(width, height), Tips()
        self.size, self.heights, self.wide, self.left, self.gap = (width, height), heights, wide, left, gap
        self.grid = grid

    def panels(self) -> Iterator[tuple[Any, Any, int, int]]:
        """New titled axes for each panel, with the panel, its line and its column."""
        for number, line in enumerate(self.grid):
            for column, panel in enumerate(line):
                axes = self._axes(number, column)
                title = f"{plain(panel.get('task', 'all tasks'), 12)}, {shots_of(panel)}"
                axes.set_title(title, fontsize=SIZE, pad=self.pads[number])
                yield axes, panel, number, column

    def _axes(self, line: int, column: int) -> Any:
        above = sum(self.heights[: line + 1]) + sum(self.tops[: line + 1]) + line * self.between
        x, y = self.left + column * (self.wide + self.gap), self.size[1] - above
        # matplotlib expects fractions of the figure's size, measured from its lower left corner.
        return self.figure.add_axes(
            (x / self.size[0], y / self.size[1], self.wide / self.size[0], self.heights[line] / self.size[1])
        )

    def picture(self, name: str, caption: str, x_label: str, keys: Sequence[Key]) -> Picture:
        """The sheet with one label for all horizontal axes, and a legend below it."""
        from matplotlib.lines import Line2D

        width, height = self.size
        middle = (self.left + width - 0.12) / 2 / width
        self.figure.text(
            middle, (self.foot - 0.34) / height, x_label, ha="center", va="bottom", fontsize=SIZE, color=colour("muted")
        )
        # The legend has its own handles, since no single panel has marks of every kind.
        handles = [Line2D([], [], label=text, **{"linestyle": "none", **look}) for text, look in keys]
        if handles:
            # The legend is centred below the axes if it fits there, else below the whole sheet, in two rows if necessary.
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


def _filled(text: str, shade: str) -> Key:
    return text, {"marker": "o", "markersize": 4.4, "color": colour(shade)}


def _open(text: str) -> Key:
    return text, {
        "marker": "o",
        "markersize": 4.4,
        "markeredgecolor": colour("muted"),
        "markerfacecolor": colour("paper"),
    }


def _line(text: str, width: float, shade: str) -> Key:
    return text, {"linestyle": "-", "linewidth": width, "color": colour(shade)}


_MARKS: list[Key] = [
    ("random orders", {"marker": "o", "markersize": 3, "color": colour("random")}),
    ("their mean", {"marker": "|", "markersize": 8, "markeredgewidth": 1.4, "color": colour("ink")}),
    ("orderers that are rules", {"marker": "o", "markersize": 4.2, "color": colour("named")}),
    ("orderers chosen with the model", {"marker": "D", "markersize": 3.8, "color": colour("chosen")}),
]
_INTERVALS = [
    _filled("helps", "helps"),
    _filled("hurts", "hurts"),
    _open("no significant difference after Holm's correction"),
    _line("95 % interval", 2.2, "muted"),
    _line("corrected for the number of orderers", 0.8, "muted"),
    _line("too small to detect", 7, "band"),
]
_CHANGE = [
    _open("without"),
    _filled("with", "muted"),
    _filled("raises", "helps"),
    _filled("lowers, after Holm's correction", "hurts"),
    _line("one sd over random orders", 1.4, "random"),
]


def _forest(
    grid: list[list[CellNumbers]], pooled: Sequence[Pooled], rows: Blocks, margin: float, view: str, ending: str
) -> Picture:
    lines = _with_pooled(grid, pooled)
    height = _ROW * (sum(len(names) for _, names in rows) + 1.2 * len(rows))
    sheet = _Sheet(lines, [height] * len(lines), wide=1.12, left=margin, gap=0.14)
    # The limit is computed from the single cells. Differences over tasks have the same limit, and are usually smaller.
    limit = shared_limit([panel for line in grid for panel in line])
    differences: list[Difference] = []
    for axes, panel, _, column in sheet.panels():
        arms = tested_arms(panel)
        forest.draw_forest(axes, arms, rows, sheet.tips, limit=limit, names=column == 0, numbers=False)
        differences.extend(arms.values())
    caption = f"{forest.CAPTION} of the same demonstration sets{ending}"
    caption += forest.without_interval(differences)
    return sheet.picture(f"forest{view}", caption, "points of accuracy against the mean random order", _INTERVALS)


def _spread(grid: list[list[CellNumbers]], view: str, ending: str) -> Picture:
    sets = [max(cell["sets"] for cell in line) for line in grid]
    sheet = _Sheet(grid, [0.19 * (number + 2) for number in sets], wide=1.75, left=0.42, gap=0.24)
    for axes, cell, line, column in sheet.panels():
        limits = spread.limits_of(_alike(grid, cell))
        spread.draw_spread(axes, cell, sheet.tips, limits=limits, ends=False, sets=sets[line])
        if column == 0:
            margin_text(axes, 0.0, "mean", SIZE, side="left", shade="ink")
            margin_text(axes, (sets[line] + 2.2) / 2, "sets", SIZE, side="left", shade="ink")
    caption = f"Accuracy of each random order (grey) and each orderer, by demonstration set{ending}"
    return sheet.picture(f"spread{view}", caption, "accuracy, %", _MARKS)


def _cost(grid: list[list[CellNumbers]], pooled: Sequence[Pooled], view: str, ending: str) -> Picture:
    lines = _with_pooled(grid, pooled)
    sheet = _Sheet(lines, [1.35] * len(lines), wide=1.75, left=0.42, gap=0.16)
    limits = pareto.limits_of([pareto.points_of(panel) for line in lines for panel in line])
    for axes, panel, _, column in sheet.panels():
        pareto.draw_pareto(axes, pareto.points_of(panel), sheet.tips, limits=limits, every=False)
        if column:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("points over random")
    caption = f"Difference from the mean random order against the tokens read for an answer{ending}"
    return sheet.picture(
        f"cost{view}", caption, "tokens read for an answer, as a multiple of a random order's", _MARKS[2:]
    )


def _labels(grid: list[list[CellNumbers]], rows: Blocks, margin: float, view: str, ending: str) -> Picture:
    # Every panel has the rows of all arms, so that they are at the same height in all columns. The first two blocks of `rows_of`
    # are the gold labels and the random orders.
    whole = [*shares.rows_of(grid[0][0], rows)[:2], *rows]
    height = _ROW * (sum(len(names) for _, names in whole) + 0.5 * len(whole))
    wide, size = 1.3, SIZE - 1.2
    legends = [[shares.legend_shape(cell, size, wide) for cell in line] for line in grid]
    # The legend is between the axes and the title.
    tops = [0.3 + 0.125 * max(lines for _, lines in line) for line in legends]
    sheet = _Sheet(grid, [height] * len(grid), wide=wide, left=margin, gap=0.16, tops=tops, foot=0.42)
    for axes, cell, line, column in sheet.panels():
        shares.draw_shares(axes, cell, whole, sheet.tips, names=column == 0)
        shares.legend(axes, cell, size, legends[line][column][0])
    caption = f"Share of each label among the predictions of each orderer; dashed: gold labels{ending}"
    return sheet.picture(f"labels{view}", caption, "share of the predictions, %", [])


def _calibration(grid: list[list[Any]], rows: Blocks, margin: float, view: str) -> Picture:
    whole: Blocks = [("random", [paired.RANDOM]), *rows]
    height = _ROW * (sum(len(names) for _, names in whole) + 1.2 * len(whole))
    sheet = _Sheet(grid, [height] * len(grid), wide=1.3, left=margin, gap=0.16)
    for axes, pair, _, column in sheet.panels():
        limits = paired.limits_of(_alike(grid, pair))
        paired.draw_paired(axes, pair, whole, sheet.tips, limits=limits, names=column == 0, numbers=False)
    caption = "Accuracy without (open) and with (filled) contextual calibration. Grey lines: one sd over random orders."
    return sheet.picture(f"calibration{view}", caption, "accuracy, %", _CHANGE)
