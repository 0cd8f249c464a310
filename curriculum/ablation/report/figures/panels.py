"""One figure for every cell and question, of one width and with aligned axes: what the page shows, side by side.

Contract: a generator, so that a figure can be written and forgotten before the next is drawn; to be run inside `style.styled()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsort.curriculum.ablation.report.figures import forest, paired, pareto, shares, spread
from sparsort.curriculum.ablation.report.figures.style import Picture, Tips, blank, plain, slug, text_width
from sparsort.curriculum.ablation.report.numbers.rows import Blocks, blocks, kept
from sparsort.curriculum.ablation.report.numbers.shape import Cell, Pooled, Report

Section = Literal["forest", "spread", "cost", "calibration", "labels"]

WIDTH = 5.6
SIZE = 8.5
_ROW = 0.178
_POINTS = "points of accuracy against the mean random order"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure with what the page files it under. `task` None: all tasks; `k` None: every k; `calibrated` None: both."""

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
    for alike in (report["pooled"], cells):
        limit = shared_limit(alike)
        for panel in alike:
            if not pareto.points_of(panel):
                continue
            yield _panel("forest", panel, forest_picture(panel, rows, limit, margin))
    for cell in cells:
        limits = spread.limits_of([other for other in cells if other["task"] == cell["task"]])
        yield _panel("spread", cell, _spread(cell, limits))
    every: list[Cell | Pooled] = [*report["pooled"], *cells]
    for panel in every:
        if bought := pareto.points_of(panel):
            yield _panel("cost", panel, _cost(panel, bought))
    for pair in report["calibration"]:
        alike_pairs = [other for other in report["calibration"] if other["task"] == pair["task"]]
        picture = _calibration(pair, rows, paired.limits_of(alike_pairs), margin)
        yield Panel(
            section="calibration",
            task=pair["task"],
            selector=pair["selector"],
            k=pair["k"],
            calibrated=None,
            title=f"{pair['task']}, k = {pair['k']}",
            picture=picture,
        )
    for cell in cells:
        if len(cell["labels"]) > 1:
            yield _panel("labels", cell, _labels(cell, rows, margin))


def shared_limit(alike: Sequence[Cell] | Sequence[Pooled]) -> float:
    """Half the width of the axis of differences that these panels share."""
    return forest.limit_of(arm["difference"] for panel in alike for arm in panel["arms"] if arm["kind"] != "oracle")


def title_of(panel: Cell | Pooled) -> str:
    """A cell or a pooled panel in words."""
    k = "every k" if panel["k"] is None else f"k = {panel['k']}"
    return f"{task_of(panel) or 'all tasks'}, {k}"


def task_of(panel: Cell | Pooled) -> str | None:
    """The task of a cell; None for a pooled panel."""
    if "task" in panel:
        return panel["task"]
    return None


def _panel(section: Section, panel: Cell | Pooled, picture: Picture) -> Panel:
    return Panel(
        section=section,
        task=task_of(panel),
        selector=panel["selector"],
        k=panel["k"],
        calibrated=panel["calibrated"],
        title=title_of(panel),
        picture=picture,
    )


def _margin(rows: Blocks) -> float:
    """Room for the names, in inches: the same in every panel, so that axes line up."""
    names = [plain(name) for _, listed in rows for name in listed]
    return min(0.48 * WIDTH, text_width([*names, paired.RANDOM], SIZE) + 0.1)


def _axes(figure: Any, left: float, bottom: float, right: float, top: float) -> Any:
    """Axes with these margins in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )


def _height(rows: Blocks) -> float:
    return _ROW * (sum(len(listed) for _, listed in rows) + 1.2 * len(rows))


def _name(section: str, panel: Any) -> str:
    return f"{section}-{slug(panel['id'], 120)}"


def forest_picture(panel: Cell | Pooled, rows: Blocks, limit: float, margin: float) -> Picture:
    """One forest plot with its numbers; `limit` from `shared_limit`, `margin` for the names in inches."""
    arms = {arm["name"]: arm["difference"] for arm in panel["arms"] if arm["kind"] != "oracle"}
    figure, tips = blank(WIDTH, _height(rows) + 0.55), Tips()
    notes = {}
    if "tasks" in panel:
        total = len(panel["tasks"])
        had = {arm["name"]: len(arm["tasks"]) for arm in panel["arms"]}
        notes = {name: f" ({count}/{total})" for name, count in had.items() if count < total}
    axes = _axes(figure, margin, 0.42, 1.45, 0.04)
    forest.draw_forest(axes, arms, rows, tips, limit=limit, notes=notes)
    axes.set_xlabel(_POINTS)
    caption = f"{title_of(panel)}: difference of every orderer to the mean random order, with intervals"
    caption += forest.without_interval(arms.values())
    return Picture(name=_name("forest", panel), caption=caption, figure=figure, tips=tips)


def _spread(cell: Cell, limits: tuple[float, float]) -> Picture:
    figure, tips = blank(WIDTH, 0.27 * (cell["sets"] + 2) + 0.5), Tips()
    axes = _axes(figure, 0.6, 0.42, 0.08, 0.04)
    names = [f"set {number}" for number in range(1, cell["sets"] + 1)]
    spread.draw_spread(axes, cell, tips, limits=limits, names=names)
    axes.set_xlabel("accuracy, %")
    caption = f"{title_of(cell)}: accuracy of every random order of every set, and of every orderer"
    return Picture(name=_name("spread", cell), caption=caption, figure=figure, tips=tips)


def _cost(panel: Cell | Pooled, listed: list[pareto.Point]) -> Picture:
    figure, tips = blank(WIDTH, 3.3), Tips()
    axes = _axes(figure, 0.58, 0.42, 0.12, 0.1)
    pareto.draw_pareto(axes, listed, tips)
    axes.set_xlabel("tokens read for an answer, as a multiple of a random order's")
    axes.set_ylabel("points over the mean random order")
    caption = f"{title_of(panel)}: difference to the mean random order against cost"
    return Picture(name=_name("cost", panel), caption=caption, figure=figure, tips=tips)


def _calibration(pair: Any, rows: Blocks, limits: tuple[float, float], margin: float) -> Picture:
    own = paired.rows_of(pair, rows)
    figure, tips = blank(WIDTH, _height(own) + 0.45), Tips()
    axes = _axes(figure, margin, 0.42, 0.5, 0.04)
    paired.draw_paired(axes, pair, own, tips, limits=limits)
    axes.set_xlabel("accuracy, %: without (open) and with (filled)")
    caption = f"{pair['task']}, k = {pair['k']}: accuracy without and with contextual calibration"
    return Picture(name=_name("calibration", pair), caption=caption, figure=figure, tips=tips)


def _labels(cell: Cell, rows: Blocks, margin: float) -> Picture:
    own = shares.rows_of(cell, kept(rows, [arm["name"] for arm in cell["arms"]]))
    columns, lines = shares.legend_shape(cell, SIZE - 0.5, WIDTH - margin)
    strip, legend = 0.75, 0.04 + 0.155 * lines
    main = _ROW * (sum(len(listed) for _, listed in own) + 0.5 * len(own))
    figure, tips = blank(WIDTH, main + strip + legend + 0.85), Tips()
    entropy = 1.15
    bars = _axes(figure, margin, strip + 0.75, entropy + 0.34, legend + 0.05)
    shares.draw_shares(bars, cell, own, tips)
    bars.set_xlabel("share of the predictions, %")
    shares.legend(bars, cell, SIZE - 0.5, columns)
    beside = _axes(figure, WIDTH - entropy - 0.08, strip + 0.75, 0.08, legend + 0.05)
    shares.draw_entropy(beside, cell, own, tips)
    beside.set_xlabel("entropy")
    below = _axes(figure, margin, 0.26, entropy + 0.34, main + legend + 0.85 - 0.24)
    shares.draw_orders(below, cell)
    below.set_ylabel("share, %", rotation=0, ha="right", va="center")
    below.set_xlabel("every random order, from the lowest entropy to the highest", labelpad=7)
    caption = f"{title_of(cell)}: share of each label among the predictions of every orderer, against gold"
    return Picture(name=_name("labels", cell), caption=caption, figure=figure, tips=tips)
