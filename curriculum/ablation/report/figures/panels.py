"""The figures of the HTML page, by section: one for each cell, and in some sections one over all tasks.

All figures have the same width, and their axes are aligned.

Contract: `panels` is a generator, so that each figure can be written and freed before the next one is drawn. It must run inside
`style.styled(SIZE)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsort.curriculum.ablation.report.figures import forest, paired, pareto, shares, spread
from sparsort.curriculum.ablation.report.figures.style import Picture, Tips, blank, plain, slug, text_width
from sparsort.curriculum.ablation.report.numbers.rows import Blocks, blocks, tested_arms
from sparsort.curriculum.ablation.report.numbers.shape import CalibrationCell, CellNumbers, Pooled, Report

Section = Literal["forest", "spread", "cost", "calibration", "labels"]
AnyPanel = CellNumbers | Pooled | CalibrationCell

# Widths and heights are in inches; SIZE is the size of text in points.
WIDTH = 5.6
SIZE = 8.5
_ROW = 0.178
_POINTS = "points of accuracy against the mean random order"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure with the values by which the page's filters show or hide it.

    Attributes:
        task: the task; None if the figure covers all tasks.
        k: the number of shots; None if the figure covers all of them.
        calibrated: whether contextual calibration is on; None if the figure compares on with off.
    """

    section: Section
    task: str | None
    selector: str
    k: int | None
    calibrated: bool | None
    title: str
    picture: Picture


def panels(report: Report) -> Iterator[Panel]:
    """Every panel of the page, section by section."""
    rows = blocks(report)
    margin = _margin(rows)
    cells = report["cells"]
    # Differences over tasks are smaller than those of single cells, so the two have different axes.
    for group in (report["pooled"], cells):
        limit = shared_limit(group)
        for panel in group:
            if tested_arms(panel):
                yield _panel("forest", panel, forest_picture(panel, rows, limit, margin))
    for cell in cells:
        limits = spread.limits_of([other for other in cells if other["task"] == cell["task"]])
        yield _panel("spread", cell, _spread(cell, limits))
    every: list[CellNumbers | Pooled] = [*report["pooled"], *cells]
    for panel in every:
        if arms := pareto.points_of(panel):
            yield _panel("cost", panel, _cost(panel, arms))
    for pair in report["calibration"]:
        limits = paired.limits_of([other for other in report["calibration"] if other["task"] == pair["task"]])
        yield _panel("calibration", pair, _calibration(pair, rows, limits, margin))
    for cell in cells:
        if len(cell["labels"]) > 1:
            yield _panel("labels", cell, _labels(cell, rows, margin))


def shared_limit(group: Sequence[CellNumbers] | Sequence[Pooled]) -> float:
    """Half the width of the axis of differences that these panels share."""
    return forest.limit_of(difference for panel in group for difference in tested_arms(panel).values())


def title_of(panel: AnyPanel) -> str:
    """The title of a panel."""
    return f"{_task_of(panel) or 'all tasks'}, {shots_of(panel)}"


def shots_of(panel: AnyPanel) -> str:
    """The number of shots of a panel, as it is written in titles."""
    return "every k" if panel["k"] is None else f"k = {panel['k']}"


def _task_of(panel: AnyPanel) -> str | None:
    # `panel.get` has no type for a key that only some of these types have.
    if "task" in panel:
        return panel["task"]
    return None


def _panel(section: Section, panel: AnyPanel, picture: Picture) -> Panel:
    return Panel(
        section=section,
        task=_task_of(panel),
        selector=panel["selector"],
        k=panel["k"],
        # Only a `CalibrationCell` has this key; it compares on with off.
        calibrated=None if "spread_off" in panel else panel["calibrated"],
        title=title_of(panel),
        picture=picture,
    )


def _margin(rows: Blocks) -> float:
    """The width of the left margin, where the names of arms are; it is the same in every panel, so that axes line up."""
    names = [plain(name) for _, listed in rows for name in listed]
    # Long names are already shortened to a number of characters, but wide characters could still leave no room for the axes.
    return min(0.48 * WIDTH, text_width([*names, paired.RANDOM], SIZE) + 0.1)


def _axes(figure: Any, left: float, bottom: float, right: float, top: float) -> Any:
    """New axes with these margins."""
    width, height = figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )


def _height(rows: Blocks) -> float:
    return _ROW * (sum(len(listed) for _, listed in rows) + 1.2 * len(rows))


def _name(section: str, panel: Any) -> str:
    return f"{section}-{slug(panel['id'], 120)}"


def forest_picture(panel: CellNumbers | Pooled, rows: Blocks, limit: float, margin: float) -> Picture:
    """One forest plot with its numbers; `limit` is from `shared_limit`, and `margin` is the width of the names."""
    arms = tested_arms(panel)
    figure, tips = blank(WIDTH, _height(rows) + 0.55), Tips()
    notes = {}
    if "tasks" in panel:
        total = len(panel["tasks"])
        # If an arm was run on only some of the tasks, the number of these tasks follows its name.
        notes = {a["name"]: f" ({len(a['tasks'])}/{total})" for a in panel["arms"] if len(a["tasks"]) < total}
    axes = _axes(figure, margin, 0.42, 1.45, 0.04)
    forest.draw_forest(axes, arms, rows, tips, limit=limit, notes=notes)
    axes.set_xlabel(_POINTS)
    caption = f"{title_of(panel)}: {forest.CAPTION.lower()}, with intervals"
    caption += forest.without_interval(arms.values())
    return Picture(name=_name("forest", panel), caption=caption, figure=figure, tips=tips)


def _spread(cell: CellNumbers, limits: tuple[float, float]) -> Picture:
    figure, tips = blank(WIDTH, 0.27 * (cell["sets"] + 2) + 0.5), Tips()
    axes = _axes(figure, 0.6, 0.42, 0.08, 0.04)
    names = [f"set {number}" for number in range(1, cell["sets"] + 1)]
    spread.draw_spread(axes, cell, tips, limits=limits, names=names)
    axes.set_xlabel("accuracy, %")
    caption = f"{title_of(cell)}: accuracy of each random order of each set, and of each orderer"
    return Picture(name=_name("spread", cell), caption=caption, figure=figure, tips=tips)


def _cost(panel: CellNumbers | Pooled, arms: list[pareto.Point]) -> Picture:
    figure, tips = blank(WIDTH, 3.3), Tips()
    axes = _axes(figure, 0.58, 0.42, 0.12, 0.1)
    pareto.draw_pareto(axes, arms, tips)
    axes.set_xlabel("tokens read for an answer, as a multiple of a random order's")
    axes.set_ylabel("points over the mean random order")
    caption = f"{title_of(panel)}: difference from the mean random order against cost"
    return Picture(name=_name("cost", panel), caption=caption, figure=figure, tips=tips)


def _calibration(pair: CalibrationCell, rows: Blocks, limits: tuple[float, float], margin: float) -> Picture:
    present = paired.rows_of(pair, rows)
    figure, tips = blank(WIDTH, _height(present) + 0.45), Tips()
    axes = _axes(figure, margin, 0.42, 0.5, 0.04)
    paired.draw_paired(axes, pair, present, tips, limits=limits)
    axes.set_xlabel("accuracy, %: without (open) and with (filled)")
    caption = f"{title_of(pair)}: accuracy without and with contextual calibration"
    return Picture(name=_name("calibration", pair), caption=caption, figure=figure, tips=tips)


def _labels(cell: CellNumbers, rows: Blocks, margin: float) -> Picture:
    present = shares.rows_of(cell, rows)
    columns, lines = shares.legend_shape(cell, SIZE - 0.5, WIDTH - margin)
    # The height of the strip of random orders below, the height of the legend above, and the width of the entropies on the right.
    strip, legend, entropy = 0.75, 0.04 + 0.155 * lines, 1.15
    # The height of the rows.
    main = _ROW * (sum(len(names) for _, names in present) + 0.5 * len(present))
    figure, tips = blank(WIDTH, main + strip + legend + 0.85), Tips()
    bars = _axes(figure, margin, strip + 0.75, entropy + 0.34, legend + 0.05)
    shares.draw_shares(bars, cell, present, tips)
    bars.set_xlabel("share of the predictions, %")
    shares.legend(bars, cell, SIZE - 0.5, columns)
    entropies = _axes(figure, WIDTH - entropy - 0.08, strip + 0.75, 0.08, legend + 0.05)
    shares.draw_entropy(entropies, cell, present, tips)
    entropies.set_xlabel("entropy")
    below = _axes(figure, margin, 0.26, entropy + 0.34, main + legend + 0.85 - 0.24)
    shares.draw_orders(below, cell)
    below.set_ylabel("share, %", rotation=0, ha="right", va="center")
    below.set_xlabel("every random order, from the lowest entropy to the highest", labelpad=7)
    caption = f"{title_of(cell)}: share of each label among the predictions of each orderer, and among the gold labels"
    return Picture(name=_name("labels", cell), caption=caption, figure=figure, tips=tips)
