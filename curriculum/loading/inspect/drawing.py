"""The figure of a plan: difficulty, available share, length and groups of its batches over training, plans side by side.

Contract: the figure uses at most `BATCHES` batches of the plan, so a plan of 100 million rows is drawn in seconds. Neighbouring
batches share a point; there is no other smoothing. Each column is a plan and each row a quantity with one scale for all plans, so
that curricula are easy to compare. This needs matplotlib, from the extra `plots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sparsort.curriculum.ablation.report.figures.style import LABEL_COLOURS, blank, colour, plain, styled
from sparsort.curriculum.loading.inspect.summary import (
    Distribution,
    PlanPart,
    RowAttributes,
    first_batch,
    measure_batches,
)
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.errors import SparsortError, unknown_choice
from sparsort.extras import need
from sparsort.storage.files import write_atomically

BATCHES = 400
FORMATS = ("png", "pdf", "svg")
# The number of points over an epoch: at most and at least, and the number of examples that a point should have.
_POINTS, _LEAST_POINTS, _READABLE = 100, 10, 64
_SIZE = 8.5
_DPI = 200
# The sizes below are in inches.
_HEIGHTS = {"difficulty": 1.7, "share": 0.8, "length": 1.1, "groups": 1.2}
_LEFT, _RIGHT, _TOP, _FOOT, _GAP, _BETWEEN = 0.72, 0.18, 0.72, 0.5, 0.3, 0.24
_WIDE, _NARROW = 5.6, 3.3
# With more stages than this, lines at their edges would fill the panel.
_MOST_EDGES = 40


def draw_plans(
    plans: CurriculumPlan | Mapping[str, CurriculumPlan],
    file: str | Path | None = None,
    *,
    epoch: int = 0,
    lengths: ArrayLike | None = None,
    groups: Sequence[Any] | None = None,
) -> Any:
    """Draw a plan, or several by name side by side.

    Args:
        plans: a plan, or name → plan. The plans must have the same rows if lengths or groups are given.
        file: the file to write the figure to; its suffix must be one of `FORMATS`.
        epoch: number of the epoch, from 0.
        lengths: (N,) tokens of each row, by default those of each plan; plans without lengths have no such panel.
        groups: (N,) group of each row, by default those of each plan.

    Returns:
        The matplotlib figure.

    Raises:
        SparsortError: there is no plan, matplotlib is missing, the suffix is unknown, or lengths or groups do not fit the rows.
    """
    named = {"": plans} if isinstance(plans, CurriculumPlan) else dict(plans)
    if not named:
        raise SparsortError("there is no plan to draw. Pass a plan, or a mapping from names to plans.")
    if file is not None:
        check_figure(file)
    need("matplotlib", "plots", "the figure of a plan")
    attributes = [RowAttributes.of(plan, lengths, groups) for plan in named.values()]
    points = [_points(plan, rows, epoch) for plan, rows in zip(named.values(), attributes, strict=True)]
    # The groups of all plans, each once and in a fixed order, so that a group has the same colour in every panel.
    names = list(dict.fromkeys(name for rows in attributes for name in rows.names))
    with styled(_SIZE):
        figure = _draw(named, points, attributes, names)
        if file is not None:
            path = Path(file).expanduser()
            with write_atomically(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=_DPI)
    return figure


def check_figure(file: str | Path) -> None:
    """Check, before any work, that the figure can be drawn.

    Raises:
        SparsortError: the suffix is unknown, or matplotlib is missing.
    """
    if (suffix := Path(file).suffix.lower().removeprefix(".")) not in FORMATS:
        raise unknown_choice(f"suffix of the figure {Path(file).name}:", suffix, FORMATS)
    need("matplotlib", "plots", "the figure of a plan")


def _points(plan: CurriculumPlan, attributes: RowAttributes, epoch: int) -> list[PlanPart]:
    """The parts of the epoch, each drawn as one point. A part has enough examples to be readable and stays inside a stage."""
    first = first_batch(plan, epoch)
    count = plan.n_batches - first
    size = max(1, len(plan.batch(first, epoch)))
    points = min(count, max(_LEAST_POINTS, min(_POINTS, count * size // _READABLE)))
    edges = [first + p * count // points for p in range(points + 1)]
    stages = [edge for edge in plan.stage_edges if edge > first]
    # With few stages, each one is divided by itself, in proportion to its length.
    if 1 < len(stages) <= points:
        edges = [first]
        for edge in stages:
            pieces = max(1, min(edge - edges[-1], round(points * (edge - edges[-1]) / count)))
            begin = edges[-1]
            edges += [begin + p * (edge - begin) // pieces for p in range(1, pieces + 1)]
    return measure_batches(plan, edges, attributes, epoch=epoch, most=max(1, BATCHES // (len(edges) - 1)))


def _draw(
    named: Mapping[str, CurriculumPlan],
    points: Sequence[list[PlanPart]],
    attributes: Sequence[RowAttributes],
    names: Sequence[str],
) -> Any:
    every = [part for parts in points for part in parts]
    rows = ["difficulty"]
    rows += ["share"] if any(part.share[0] < 1 for part in every) else []
    rows += ["length"] if any(part.length for part in every) else []
    rows += ["groups"] if len(names) > 1 else []
    wide = _WIDE if len(named) == 1 else _NARROW
    foot = _FOOT + (0.2 * -(-(len(_legend(names)) + 1) // _across(len(named))) if "groups" in rows else 0)
    width = _LEFT + len(named) * wide + (len(named) - 1) * _GAP + _RIGHT
    height = _TOP + sum(_HEIGHTS[row] for row in rows) + (len(rows) - 1) * _BETWEEN + foot
    figure = blank(width, height)
    limits = {
        "difficulty": _limits(part.difficulty for part in every),
        "length": _limits(part.length for part in every),
    }
    for column, ((name, plan), parts, row_attributes) in enumerate(zip(named.items(), points, attributes, strict=True)):
        top = height - _TOP
        for row in rows:
            top -= _HEIGHTS[row]
            x = _LEFT + column * (wide + _GAP)
            axes = figure.add_axes((x / width, top / height, wide / width, _HEIGHTS[row] / height))
            top -= _BETWEEN
            if row == "groups":
                _groups(axes, parts, row_attributes, names)
            elif row == "share":
                _share(axes, parts)
            else:
                _band(axes, parts, row, limits[row])
            _frame(axes, plan, parts, last=row == rows[-1], label=row if column == 0 else None)
            if row == rows[0]:
                _title(axes, name, plan, 30 if len(named) == 1 else 22, wide)
    grey = ";  grey: share without a score" if any(part.unscored for part in every) else ""
    figure.text(
        _LEFT / width,
        1 - 0.06 / height,
        f"mean, and 10 to 90 % of a batch's examples{grey}",
        va="top",
        color=colour("muted"),
        fontsize=_SIZE - 1.5,
    )
    if "groups" in rows:
        _key(figure, names, len(named), height)
    return figure


def _title(axes: Any, name: str, plan: CurriculumPlan, limit: int, wide: float) -> None:
    curriculum = plan.settings.describe()
    # Letters that fit the panel, whose average width is half of their size; 72 points are an inch.
    letters = int(wide * 72 / (0.5 * _SIZE))
    rows = f"{plan.n_rows:,} rows in {plan.n_batches:,} batches"
    head, below = (plain(name, limit), plain(curriculum, letters)) if name else (plain(curriculum, letters - 8), rows)
    axes.set_title(head, pad=19)
    axes.annotate(
        below,
        (0, 1),
        xytext=(0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        color=colour("muted"),
        fontsize=_SIZE - 1,
    )


def _frame(axes: Any, plan: CurriculumPlan, parts: Sequence[PlanPart], *, last: bool, label: str | None) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, end = parts[0].batches[0], parts[-1].batches[1]
    axes.set_xlim(first - 0.5, end + 0.5)
    edges = [edge for edge in plan.stage_edges[1:-1] if first < edge <= end]
    if len(edges) <= _MOST_EDGES:
        axes.vlines(
            [edge - 0.5 for edge in edges],
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color=colour("random"),
            linewidth=0.5,
            linestyle=(0, (2, 2)),
            zorder=1.5,
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="y", labelcolor=colour("muted"), labelleft=label is not None)
    if last:
        axes.set_xlabel("batch")
    else:
        axes.set_xticklabels([])
    if label is not None:
        axes.set_ylabel({"length": "tokens", "share": "available", "groups": "groups"}.get(label, label))
        axes.yaxis.set_label_coords(-0.54 * 72 / axes.bbox.width, 0.5)


def _band(axes: Any, parts: Sequence[PlanPart], row: str, limits: tuple[float, float]) -> None:
    """Draw the mean and the band between the 10 and 90 % quantiles; grey marks the share without a score."""
    from matplotlib.ticker import MaxNLocator

    spreads = [part.difficulty if row == "difficulty" else part.length for part in parts]
    (x, low), (_, mean), (_, high) = (
        _stepped(parts, [getattr(spread, name) if spread else np.nan for spread in spreads])
        for name in ("low", "mean", "high")
    )
    shade = colour("helps" if row == "difficulty" else "named")
    axes.grid(axis="y")
    axes.fill_between(x, low, high, color=shade, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=shade, linewidth=1.2)
    if row == "difficulty":
        _, absent = _stepped(parts, [part.unscored for part in parts])
        if np.any(absent > 0):
            axes.fill_between(
                x,
                0,
                absent,
                transform=axes.get_xaxis_transform(),
                color=colour("random"),
                alpha=0.35,
                linewidth=0,
                zorder=0,
            )
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if row == "difficulty" else 3))


def _share(axes: Any, parts: Sequence[PlanPart]) -> None:
    from matplotlib.ticker import PercentFormatter

    x, y = _stepped(parts, [part.share[0] for part in parts], [part.share[1] for part in parts])
    axes.grid(axis="y")
    axes.plot(x, y, color=colour("chosen"), linewidth=1.2)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _groups(axes: Any, parts: Sequence[PlanPart], attributes: RowAttributes, names: Sequence[str]) -> None:
    """Draw the shares of the groups, stacked; dashed lines mark their shares of the data."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if attributes.groups is None or parts[0].groups is None:
        return
    shares = np.array([part.groups for part in parts])
    in_data = np.bincount(attributes.groups, minlength=len(attributes.names)) / len(attributes.groups)
    below, level = np.zeros(2 * len(parts)), 0.0
    for names_of_band, _, shade in _legend(names):
        own = [place for place, name in enumerate(attributes.names) if name in names_of_band]
        x, share = _stepped(parts, shares[:, own].sum(axis=1))
        axes.fill_between(x, below, below + share, color=colour(shade), alpha=0.75, linewidth=0)
        below = below + share
        level += float(in_data[own].sum())
        if 0.001 < level < 0.999:
            axes.axhline(level, color=colour("ink"), linewidth=0.7, linestyle=(0, (3, 2)))


def _legend(names: Sequence[str]) -> list[tuple[list[str], str, str]]:
    """(groups, label, colour) of each band; the groups beyond the colours share one."""
    most = len(LABEL_COLOURS)
    bands = [([name], plain(name, 20), shade) for name, shade in zip(names, LABEL_COLOURS, strict=False)]
    if rest := list(names[most:]):
        bands.append((rest, f"{len(rest)} more", "rest"))
    return bands


def _key(figure: Any, names: Sequence[str], columns: int, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour(shade), alpha=0.75, label=label) for _, label, shade in _legend(names)]
    handles.append(Line2D([], [], color=colour("ink"), linewidth=0.7, linestyle=(0, (3, 2)), label="in the data"))
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.04 / height),
        ncols=_across(columns),
        frameon=False,
        fontsize=_SIZE - 1,
        handlelength=1.2,
        columnspacing=1.2,
        labelspacing=0.35,
        borderpad=0,
    )


def _across(columns: int) -> int:
    """The number of legend entries in a row."""
    return 4 if columns == 1 else 5


def _stepped(parts: Sequence[PlanPart], left: ArrayLike, right: ArrayLike | None = None) -> tuple[Any, Any]:
    """One value per part as a step line: (2P,) x and y, each part from its first to its last batch."""
    x = np.array([(part.batches[0] - 0.5, part.batches[1] + 0.5) for part in parts]).ravel()
    y = np.stack([np.asarray(left, dtype=float), np.asarray(left if right is None else right, dtype=float)], axis=1)
    return x, y.ravel()


def _limits(spreads: Iterable[Distribution | None]) -> tuple[float, float]:
    values = np.array([(one.low, one.mean, one.high) for one in spreads if one is not None])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    # A constant value has no range, so its margin follows its size, or is 0.5 around 0.
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room
