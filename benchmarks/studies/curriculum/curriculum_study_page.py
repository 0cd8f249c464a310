"""The page and figures of the curriculum study, generated from its runs.

Contract: a run is compared with the run of the same seed and schedule (same initial weights), by the difference of their losses
in per cent; intervals are Student's t over seeds, and p-values are corrected by Holm's method over the orders that one baseline
is compared with. A null result is reported as one, with its interval.

Shapes: S seeds, P points of a curve.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, interval, machine
from numpy.typing import NDArray
from scipy.stats import spearmanr

from sparsort.curriculum.ablation.report.figures.style import blank, colour, styled
from sparsort.curriculum.ablation.statistics.resampling import student_t
from sparsort.scoring.calibration.correlation import holm
from sparsort.storage.files import write_atomically

PAGES = Path(__file__).parents[3] / "docs" / "results"
BASELINES = {"plain": "plain shuffle", "random": "random order with the same pacing"}
OUTCOMES = {"final": "loss at the end", "area": "mean loss over training"}
ALPHA = 0.05
Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An order against a baseline in per cent of its loss (below 0: better), with a 95 % interval; p after Holm."""

    order: str
    mean: float
    low: float
    high: float
    p_holm: float

    @property
    def found(self) -> bool:
        return self.p_holm < ALPHA

    def __str__(self) -> str:
        mark = "**" if self.found else ""
        return f"{mark}{signed(self.mean)}{mark} {interval(self.low, self.high, signed)}"


def _corrected(orders: Sequence[str], gains_SN: NDArray[np.float64]) -> list[Difference]:
    """The mean of each column with its interval; the columns are one family of Holm's correction."""
    low, high, p = student_t(gains_SN)
    columns = zip(orders, gains_SN.mean(axis=0), low, high, holm(p), strict=True)
    return [
        Difference(order=order, mean=float(mean), low=float(bottom), high=float(top), p_holm=float(adjusted))
        for order, mean, bottom, top, adjusted in columns
    ]


def signed(value: float) -> str:
    """The value with its sign, to one decimal."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


class Results:
    """Curves of every order and schedule, with the same seeds in all."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.steps = np.array(runs[0]["steps"])
        self.orders = list(dict.fromkeys(run["order"] for run in runs))
        self.schedules = list(dict.fromkeys(run["schedule"] for run in runs))
        self.levels = [level for level in runs[0]["by_level"] if level != "0"]
        self.seconds = sum(run["seconds"] for run in runs)
        self._runs: dict[Key, list[Mapping[str, Any]]] = {}
        # Sorted by seed, so that row s of two arrays has the same seed and differences are paired.
        for run in sorted(runs, key=lambda run: run["seed"]):
            self._runs.setdefault((run["order"], run["schedule"]), []).append(run)

    def curves(self, order: str, schedule: str) -> NDArray[np.float64]:
        """Held-out loss in nats per byte, (S, P)."""
        return np.array([run["loss"] for run in self._runs[order, schedule]])

    def at_level(self, order: str, schedule: str, level: str) -> float:
        """Loss on the held-out texts of a level at the end of training, mean over seeds."""
        return float(np.mean([run["by_level"][level][-1] for run in self._runs[order, schedule]]))

    def outcome(self, name: str, order: str, schedule: str) -> NDArray[np.float64]:
        """(S,) loss at the end, or its mean over the steps by the trapezoidal rule."""
        curves = self.curves(order, schedule)
        # Divided by the number of steps, so that the area is a mean loss.
        return curves[:, -1] if name == "final" else np.trapezoid(curves, self.steps, axis=1) / self.steps[-1]

    def gains(self, name: str, order: str, baseline: str, schedule: str) -> NDArray[np.float64]:
        """(S,) difference of an order's loss to its baseline's, in per cent of the latter."""
        return 100.0 * (self.outcome(name, order, schedule) / self.outcome(name, baseline, schedule) - 1.0)

    def differences(self, name: str, baseline: str, schedule: str) -> list[Difference]:
        """Every other order against a baseline; they are one family of Holm's correction."""
        # Plain shuffle is a baseline and never a candidate.
        others = [order for order in self.orders if order not in {"plain", baseline}]
        gains = np.stack([self.gains(name, order, baseline, schedule) for order in others], axis=1)
        return _corrected(others, gains)

    def steps_to_plain(self, order: str, schedule: str) -> NDArray[np.float64]:
        """(S,) steps until the final loss of plain shuffle with the same seed, interpolated linearly; NaN: never."""
        found = []
        for curve, goal in zip(
            self.curves(order, schedule), self.curves("plain", schedule)[:, -1].tolist(), strict=True
        ):
            reached = np.flatnonzero(curve <= goal)
            if not reached.size:
                found.append(np.nan)
                continue
            after = int(reached[0])
            # The place of the goal between the last point above it and the first one at or below it.
            share = (curve[after - 1] - goal) / (curve[after - 1] - curve[after])
            found.append(self.steps[after - 1] + share * (self.steps[after] - self.steps[after - 1]))
        return np.array(found)


def write_page(name: str, facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], *, save: bool) -> None:
    """Print the page; with `save`, write it to docs/results/ with its figures, and its numbers to benchmarks/results/."""
    results = Results(runs)
    figures = {"forest": "The difference of each order to the baselines", "curves": "Its course over training"}
    text = page(name, facts, results, [f"![{words}]({name}/{figure}.png)" for figure, words in figures.items()])
    if not save:
        print(text)
        return
    for figure, draw in (("forest", forest), ("curves", curves)):
        with styled(), write_atomically(PAGES / name / f"{figure}.png") as temporary:
            draw(results).savefig(temporary, format="png", dpi=150)
    with write_atomically(PAGES / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    kept = {key: facts[key] for key in ("study", "corpus", "cut", "parameters")}
    with write_atomically(RESULTS / f"{name}.json") as temporary:
        numbers = {**kept, "runs": list(runs), "machine": machine(torch.device("cpu"))}
        temporary.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    print(PAGES / f"{name}.md")


def page(name: str, facts: Mapping[str, Any], results: Results, figures: Sequence[str]) -> str:
    """The whole page as Markdown."""
    study = facts["study"]
    on = machine(torch.device("cpu"))
    command = shlex.join(["python", "benchmarks/studies/curriculum/curriculum_study.py", *_portable(sys.argv[1:])])
    parts = [
        f"# Does the order of its training texts matter to a small language model? ({facts['corpus']})",
        f"Run on {on['cores']} cores of {on['cpu']}, {results.seconds / 60:.0f} minutes of one core for "
        f"{len(results.orders) * len(results.schedules) * study['seeds']} runs. Made by `{command}`; the recipe is "
        "[benchmarks/studies/curriculum_study.toml](../../benchmarks/studies/curriculum_study.toml).",
        _what_was_done(facts),
        "## Findings",
        *(_found(results, schedule) for schedule in results.schedules),
        _interaction(results),
        *figures,
        "Filled marks differ from zero after Holm's correction; open marks do not. Bars are 95 % intervals.",
        *(_table(results, schedule) for schedule in results.schedules),
    ]
    if results.levels:
        parts.append(_by_level(results))
    parts.append(_scores(facts))
    parts.append(_limits(study))
    return "\n\n".join(parts) + "\n"


def _what_was_done(facts: Mapping[str, Any]) -> str:
    study, lengths = facts["study"], facts["lengths"]
    passes = study["steps"] * study["batch_size"] / study["texts"]
    cut = f", {facts['cut']} of them cut there" if facts["cut"] else ""
    return (
        f"A llama of {facts['parameters'] / 1e6:.2f} million parameters ({study['layers']} layers, width {study['hidden']}) is "
        f"trained on the bytes of {study['texts']} texts (mean {np.mean(lengths):.0f} bytes, at most {study['max_bytes']}{cut}) "
        f"for {study['steps']} steps of {study['batch_size']}, that is {passes:.1f} times the data, and measured on "
        f"{study['held_out']} held-out texts. Every order but plain shuffle draws from the share of the texts that the pacing "
        f"`{study['pacing']}` allows, easiest first, or hardest first for `anti_`; `random` is the control that shares the "
        "pacing and has no difficulty. `sparsity_last` and `sparsity_mean` are the Hoyer sparsity of the embedded model's last "
        "hidden state before its norm (of the last token, of the mean over tokens), `loss` is that model's loss on the text, "
        "`compression` the ratio that zlib reaches. `online` starts without scores and uses the sparsity of the trained "
        "model's own states. "
        + ("`level` is the level for which the text was generated. " if facts["levels"] else "")
        + f"{study['seeds']} seeds differ in initial weights and draws; texts and scores are the same."
    )


def _found(results: Results, schedule: str) -> str:
    lines = [f"### Learning rate: {schedule}"]
    random_gain = results.gains("final", "random", "plain", schedule)
    (low,), (high,), _ = student_t(random_gain[:, None])
    mean = signed(float(random_gain.mean()))
    lines.append(
        f"Random order with the same pacing ends {mean} % {interval(low, high, signed)} from plain shuffle. This is the "
        "effect of pacing alone, without difficulty."
    )
    for outcome, words in OUTCOMES.items():
        for baseline, other in BASELINES.items():
            found = results.differences(outcome, baseline, schedule)
            better = [f"{one.order} ({signed(one.mean)} %)" for one in found if one.found and one.mean < 0]
            worse = [f"{one.order} ({signed(one.mean)} %)" for one in found if one.found and one.mean > 0]
            parts = []
            if better:
                parts.append(f"better: {', '.join(better)}")
            if worse:
                parts.append(f"worse: {', '.join(worse)}")
            if not parts:
                parts.append("no order differs significantly from it")
            elif nothing := len(found) - len(better) - len(worse):
                parts.append(
                    f"no difference found for the other {nothing}" if nothing > 1 else "none found for the other"
                )
            lines.append(f"- {words.capitalize()}, against {other}: {'; '.join(parts)}.")
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _interaction(results: Results) -> str:
    """Whether the gain over random order depends on the schedule: the literature says that decay hides it (2511.18903)."""
    if not {"constant", "cosine"} <= set(results.schedules):
        return ""
    orders = [order for order in results.orders if order not in BASELINES]
    # Paired by seed: the gain under one schedule minus that under the other, (S, orders).
    gains = np.stack(
        [
            results.gains("final", order, "random", "constant") - results.gains("final", order, "random", "cosine")
            for order in orders
        ],
        axis=1,
    )
    corrected = _corrected(orders, gains)
    rows = [f"| {one.order} | {one} |" for one in corrected]
    count = sum(one.found for one in corrected)
    verdict = (
        f"the difference is significant for {count} of {len(orders)} orders"
        if count
        else f"the difference is not significant for any of the {len(orders)} orders"
    )
    return (
        "### Does the schedule change the gain?\n\n"
        "arXiv 2511.18903 finds that learning-rate decay hides what a curriculum gains. Here is the difference to random order "
        "under the constant rate minus that under decay, in points of per cent (below 0: the order gains more at a constant "
        f"rate); {verdict}.\n\n| order | constant − cosine |\n| :--- | ---: |\n" + "\n".join(rows)
    )


def _table(results: Results, schedule: str) -> str:
    columns = {
        (outcome, baseline): {one.order: str(one) for one in results.differences(outcome, baseline, schedule)}
        for outcome in OUTCOMES
        for baseline in BASELINES
    }
    names = [
        "order",
        "loss at the end",
        *(f"{when}, against {other}" for when in ("end", "mean") for other in BASELINES),
        "steps",
    ]
    lines = [
        f"### Numbers, learning rate: {schedule}",
        "",
        f"| {' | '.join(names)} |",
        f"| :--- |{' ---: |' * (len(names) - 1)}",
    ]
    for order in results.orders:
        needed = results.steps_to_plain(order, schedule)
        reached = np.isfinite(needed)
        steps = f"{np.median(needed[reached]):.0f} ({reached.sum()} of {len(needed)})" if reached.any() else "never"
        cells = [columns[key].get(order, "") for key in columns]
        loss = results.outcome("final", order, schedule)
        lines.append(f"| {order} | {loss.mean():.3f} ± {loss.std(ddof=1):.3f} | {' | '.join(cells)} | {steps} |")
    lines += [
        "",
        "Loss in nats per byte, mean and standard deviation over seeds. Differences in per cent with 95 % intervals, below 0: "
        "better; bold: p < 0.05 after Holm's correction over the column. Mean: the mean loss over training. Steps: median "
        "number of steps until the final loss of plain shuffle with the same seed, and the number of seeds that reach it.",
    ]
    return "\n".join(lines)


def _by_level(results: Results) -> str:
    schedule = results.schedules[-1]
    lines = [
        f"### Loss at the end by level, learning rate: {schedule}",
        "",
        f"| order | {' | '.join(results.levels)} |",
        f"| :--- |{' ---: |' * len(results.levels)}",
    ]
    for order in results.orders:
        cells = [f"{results.at_level(order, schedule, level):.3f}" for level in results.levels]
        lines.append(f"| {order} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scores(facts: Mapping[str, Any]) -> str:
    columns = {**facts["scores"], "bytes": facts["lengths"]}
    names = [name for name, values in columns.items() if len(set(values)) > 1]
    lines = [
        "### The scores",
        "",
        "Spearman's ρ between them over the training texts:",
        "",
        f"| | {' | '.join(names)} |",
        f"| :--- |{' ---: |' * len(names)}",
    ]
    for first in names:
        cells = [_rho(columns[first], columns[second]) for second in names]
        lines.append(f"| {first} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rho(first: Sequence[float], second: Sequence[float]) -> str:
    return f"{spearmanr(first, second).statistic:+.2f}".replace("-", "\N{MINUS SIGN}")


def _limits(study: Mapping[str, Any]) -> str:
    return (
        "## Limits\n\n"
        f"One corpus, one pacing, one model size and {study['seeds']} seeds: the intervals apply to other seeds, not to other "
        "data, longer training or larger models. The learning rate was not tuned for any order. A null "
        "result is not evidence of no difference; its interval shows how large the difference may be."
    )


def forest(results: Results) -> Any:
    """Difference of the final loss to both baselines: one panel per baseline, one colour per schedule."""
    orders = [order for order in results.orders if order != "plain"]
    figure = blank(9.0, 0.34 * len(orders) + 1.2)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (baseline, words) in zip(axes, BASELINES.items(), strict=True):
        panel.axvline(0, color=colour("ink"), linewidth=0.8)
        panel.grid(axis="x")
        panel.set_title(f"against {words}")
        panel.set_xlabel("loss at the end, difference in %")
        for number, schedule in enumerate(results.schedules):
            shade = colour(("helps", "hurts")[number % 2])
            for one in results.differences("final", baseline, schedule):
                y = len(orders) - orders.index(one.order) + 0.15 - 0.3 * number
                panel.plot([one.low, one.high], [y, y], color=shade, linewidth=1.6, solid_capstyle="butt")
                face = shade if one.found else colour("paper")
                panel.plot(
                    [one.mean], [y], marker="o", markersize=5, color=shade, markerfacecolor=face, linestyle="none"
                )
    axes[0].set_yticks([len(orders) - place for place in range(len(orders))], orders)
    handles = [
        axes[1].plot([], [], marker="o", color=colour(("helps", "hurts")[number % 2]), label=schedule)[0]
        for number, schedule in enumerate(results.schedules)
    ]
    axes[1].legend(handles=handles, title="learning rate", frameon=False, loc="best")
    figure.tight_layout()
    return figure


def curves(results: Results) -> Any:
    """Held-out loss of every order over training, relative to plain shuffle in per cent, mean over seeds."""
    figure = blank(9.0, 3.6)
    panels = np.atleast_1d(figure.subplots(1, len(results.schedules), sharey=True))
    shades = [
        colour(name) for name in ("helps", "hurts", "named", "chosen", *(f"label{number}" for number in range(7)))
    ]
    for panel, schedule in zip(panels, results.schedules, strict=True):
        plain = results.curves("plain", schedule)
        panel.axhline(0, color=colour("ink"), linewidth=0.8)
        panel.grid(axis="y")
        panel.set_title(f"learning rate: {schedule}")
        panel.set_xlabel("step")
        for number, order in enumerate(order for order in results.orders if order != "plain"):
            gain = (100.0 * (results.curves(order, schedule) / plain - 1.0)).mean(axis=0)
            shade = colour("random") if order == "random" else shades[number % len(shades)]
            panel.plot(results.steps, gain, color=shade, linewidth=2.2 if order == "random" else 1.2, label=order)
    panels[0].set_ylabel("held-out loss against plain shuffle, %")
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def _portable(arguments: Sequence[str]) -> list[str]:
    return [Path(part).name if Path(part).is_absolute() else part for part in arguments]
