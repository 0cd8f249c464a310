"""Draw the README's figure of the effect of the order of demonstrations, from the saved results of the ordering study.

    python benchmarks/studies/ordering/draw_order_spread.py

For each task, it shows the accuracy of the worst, the mean and the best of 16 random orders of the same demonstrations, and of
the order that PDO with the label shares of the pool chooses. Each is averaged over the 20 demonstration sets of the task (10 of
4 demonstrations, 10 of 8). The best and the worst order are only known from the test rows, and noise in these accounts for part
of their distance; see the study's page.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.figures.style import blank, colour, styled
from sparsort.storage.files import write_atomically

ROOT = Path(__file__).parents[3]
STUDY = ROOT / "benchmarks" / "results" / "ordering-study.json"
PICTURE = ROOT / "docs" / "results" / "order-spread.png"
CHOOSER = "pdo_prior"
_TASKS = {
    "trec": "TREC, 6 question types",
    "mr": "MR, 2 sentiments",
    "sst5": "SST-5, 5 sentiments",
    "rte": "RTE, entailment",
    "cb": "CB, entailment",
}


@dataclass(frozen=True)
class Spread:
    """Accuracies of one task in per cent, as means over its demonstration sets."""

    task: str
    worst: float
    mean: float
    best: float
    chosen: float


def spreads(study: dict[str, Any]) -> list[Spread]:
    """The spread of each task without contextual calibration, from the JSON of an ordering study."""
    cells = [cell for cell in study["cells"] if not cell["calibrated"]]
    return [_spread(task, [cell for cell in cells if cell["task"] == task]) for task in _TASKS]


def _spread(task: str, cells: list[dict[str, Any]]) -> Spread:
    # Rows are demonstration sets, columns the random orders of each.
    by_set_SO = 100 * np.concatenate([np.array(cell["random"]["accuracy_by_set"]) for cell in cells])
    chosen_S = 100 * np.concatenate(
        [arm["accuracy_by_set"] for cell in cells for arm in cell["arms"] if arm["name"] == CHOOSER]
    )
    if len(chosen_S) != len(by_set_SO):
        raise ValueError(f"{task}: {len(chosen_S)} sets have an order chosen by {CHOOSER}, of {len(by_set_SO)} sets")
    worst, mean, best = (float(of(by_set_SO, axis=1).mean()) for of in (np.min, np.mean, np.max))
    return Spread(task=task, worst=worst, mean=mean, best=best, chosen=float(chosen_S.mean()))


def draw(rows: list[Spread]) -> Any:
    """A figure with a line for each task from its worst to its best order."""
    figure = blank(7.2, 2.9)
    axes = figure.add_axes((0.215, 0.235, 0.665, 0.63))
    for place, row in enumerate(reversed(rows)):
        axes.plot([row.worst, row.best], [place, place], color=colour("random"), linewidth=7, solid_capstyle="butt")
        axes.plot([row.mean], [place], marker="|", markersize=13, markeredgewidth=2, color=colour("ink"))
        axes.plot([row.chosen], [place], marker="D", markersize=7, color=colour("chosen"), markeredgecolor="white")
        # Text to the right of the axes: x is a share of their width, y a row.
        text = f"{row.best - row.worst:.1f}"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), [_TASKS[row.task] for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x")
    axes.spines[["left"]].set_visible(False)
    axes.set_xlabel("accuracy of Gemma 3 270M, %")
    axes.text(1.02, len(rows) - 0.35, "points", transform=axes.get_yaxis_transform(), color=colour("muted"))
    overall = np.mean([row.best - row.worst for row in rows])
    figure.text(
        0.012, 0.935, f"Same demonstrations, another order: {overall:.1f} points of accuracy", fontweight="bold"
    )
    _legend(axes)
    return figure


def _legend(axes: Any) -> None:
    from matplotlib.lines import Line2D

    bar = {"color": colour("random"), "linewidth": 7, "solid_capstyle": "butt"}
    tick = {"marker": "|", "color": colour("ink"), "linestyle": "none", "markersize": 11, "markeredgewidth": 2}
    diamond = {"marker": "D", "color": colour("chosen"), "linestyle": "none", "markersize": 6}
    labels = (
        "worst to best of 16 random orders",
        "their mean",
        "chosen by sparsort choose --criterion pdo --prior pool",
    )
    handles = [Line2D([], [], label=label, **look) for label, look in zip(labels, (bar, tick, diamond), strict=True)]
    axes.legend(handles=handles, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.36, -0.245), fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the PNG file to write")
    arguments = parser.parse_args()
    rows = spreads(json.loads(STUDY.read_text(encoding="utf-8")))
    for row in rows:
        numbers = f"worst {row.worst:.1f}, mean {row.mean:.1f}, best {row.best:.1f}, chosen {row.chosen:.1f}"
        print(f"{row.task}: {numbers}", file=sys.stderr)
    with styled(), write_atomically(arguments.out) as file:
        # Without the version of matplotlib in the metadata, the file is the same for the same numbers.
        draw(rows).savefig(file, format="png", dpi=180, metadata={"Software": None})
    print(arguments.out)


if __name__ == "__main__":
    main()
