"""The page and figures of the sparse-attention study, generated from its runs.

Contract: a run is compared with the run of the same seed (same initial weights); intervals are Student's t over seeds, 95 %. A
floor is held if the whole interval is on the right side of it, missed if it is on the other side, and open otherwise. A null
result is reported as one, with its interval.

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

from sparsort.attention.flops import AttentionShape, SparseShape, dense_flops, saving, sparse_flops
from sparsort.curriculum.ablation.report.figures.style import blank, colour, styled
from sparsort.curriculum.ablation.statistics.resampling import student_t
from sparsort.storage.files import write_atomically

NAME = "sparse-attention-study"
PAGES = Path(__file__).parents[3] / "docs" / "results"
COLOURS = {"dense": "ink", "index_branch": "helps", "window": "hurts", "moba": "named", "random": "random"}
WORDS = {
    "dense": "dense attention",
    "index_branch": "MSA's index branch, trained jointly: over every block at first (both branches), then sparse",
    "retrofit": "an index branch on the frozen dense model, trained afterwards on further tokens",
    "window": "the last blocks, from the first step to the last",
    "sink_window": "the first block and the last ones, after the same warm-up",
    "random": "the own block and others at random, after the same warm-up",
    "moba": "MoBA's mean-key gate, after the same warm-up",
    "seer": "SeerAttention's pooled gate, jointly",
    "nsa": "NSA's three branches",
    "lm_trained": "an index branch taught by the LM loss",
    "oracle": "the blocks with most dense attention, after the same warm-up: no selector can do better",
}


_OF_RETROFIT = (
    "The order of a retrofit is that of its dense model. Its own steps are in plain order, so its rows add little to "
    "those of dense. "
)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds with its interval."""

    mean: float
    low: float
    high: float
    digits: int = 1

    @classmethod
    def of(cls, values_S: NDArray[np.float64], digits: int = 1) -> Mean:
        low, high, _ = student_t(values_S[:, None])
        return cls(mean=float(values_S.mean()), low=float(low[0]), high=float(high[0]), digits=digits)

    def __str__(self) -> str:
        return f"{self._shown(self.mean)} {interval(self.low, self.high, self._shown)}"

    def _shown(self, value: float) -> str:
        return f"{value:.{self.digits}f}".replace("-", "\N{MINUS SIGN}")

    def held(self, floor: float, *, below: bool) -> str:
        """Whether the interval is at or below the floor (or at or above it), in words."""
        inside, outside = (self.high <= floor, self.low > floor) if below else (self.low >= floor, self.high < floor)
        if np.isnan(self.low):
            return "open: no interval"
        return "held" if inside else "missed" if outside else "open: the interval contains it"


class Results:
    """Runs by kind of attention and order, with the same seeds in all."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.attentions = list(dict.fromkeys(run["attention"] for run in runs))
        self.orders = list(dict.fromkeys(run["order"] for run in runs))
        self.seconds = sum(run["seconds"] for run in runs)
        self._runs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        # Sorted by seed, so that row s of two arrays has the same seed and differences are paired.
        for run in sorted(runs, key=lambda run: run["seed"]):
            self._runs.setdefault((run["attention"], run["order"]), []).append(run)

    def steps(self, attention: str) -> list[int]:
        return list(self._runs[attention, self.orders[0]][0]["steps"])

    def curves(self, name: str, attention: str, order: str) -> NDArray[np.float64]:
        """A measure over training, (S, P)."""
        return np.array([run["curve"][name] for run in self._runs[attention, order]])

    def end(self, name: str, attention: str, order: str) -> NDArray[np.float64]:
        """A measure after the last step, (S,)."""
        return self.curves(name, attention, order)[:, -1]

    def caught(self, name: str, attention: str, order: str) -> NDArray[np.float64]:
        """A measure of the selections after the last step, (S,)."""
        return np.array([run["caught"][name] for run in self._runs[attention, order]])

    def loss_gap(self, attention: str, order: str) -> Mean:
        """Loss of the text minus that of dense attention in the same order, in per cent of the latter."""
        ours, dense = (self.end("text_loss", kind, order) for kind in (attention, "dense"))
        return Mean.of(100.0 * (ours / dense - 1.0), 2)

    def recall_gap(self, attention: str, order: str, name: str = "far_recall") -> Mean:
        """Accuracy of dense attention minus the accuracy, in points."""
        return Mean.of(100.0 * (self.end(name, "dense", order) - self.end(name, attention, order)), 2)

    def order_gap(self, name: str, attention: str, order: str) -> Mean:
        """Difference of an order to plain order: a loss in per cent, an accuracy in points."""
        ours, plain = (self.end(name, attention, one) for one in (order, "plain"))
        return Mean.of(100.0 * (ours / plain - 1.0) if "loss" in name else 100.0 * (ours - plain), 2)

    def steps_until(self, attention: str, order: str, share: float) -> NDArray[np.float64]:
        """The first measured step with a far recall of at least `share`, (S,); NaN: none."""
        reached = self.curves("far_recall", attention, order) >= share
        steps = np.array(self.steps(attention), dtype=np.float64)
        # `argmax` of booleans is the first True, but 0 if there is none.
        return np.where(reached.any(axis=1), steps[reached.argmax(axis=1)], np.nan)


def write_page(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], *, save: bool) -> None:
    """Print the page; with `save`, write it to docs/results/ with its figures, and its numbers to benchmarks/results/."""
    results = Results(runs)
    figures = {
        "curves": "Held-out text loss and far recall over training",
        "gaps": "The gaps to dense attention at the end",
    }
    text = page(facts, results, [f"![{words}]({NAME}/{figure}.png)" for figure, words in figures.items()])
    if not save:
        print(text)
        return
    for figure, draw in (("curves", curves), ("gaps", gaps)):
        with styled(), write_atomically(PAGES / NAME / f"{figure}.png") as temporary:
            draw(results).savefig(temporary, format="png", dpi=150)
    with write_atomically(PAGES / f"{NAME}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    kept = {key: facts[key] for key in ("study", "reach", "words", "parameters", "best_possible")}
    with write_atomically(RESULTS / f"{NAME}.json") as temporary:
        numbers = {**kept, "runs": list(runs), "machine": machine(torch.device("cpu"))}
        temporary.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    print(PAGES / f"{NAME}.md")


def page(facts: Mapping[str, Any], results: Results, figures: Sequence[str]) -> str:
    """The whole page as Markdown."""
    study, on = facts["study"], machine(torch.device("cpu"))
    command = shlex.join(
        [
            "python",
            "benchmarks/studies/sparse/sparse_study.py",
            *(Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]),
        ]
    )
    parts = [
        "# Sparse attention and its curriculum, trained together from scratch",
        f"Run on {on['cores']} cores of {on['cpu']}, {results.seconds / 60:.0f} minutes of one core for "
        f"{len(results.attentions) * len(results.orders) * study['seeds']} runs. Made by `{command}`; the recipe is "
        "[benchmarks/studies/sparse_study.toml](../../benchmarks/studies/sparse_study.toml).",
        _what_was_done(facts, results),
        "## The floors",
        _floors(facts, results),
        *figures,
        "Lines are means over seeds and bands their range; bars are 95 % intervals, dotted lines the floors.",
        "## Against dense attention",
        _table(results),
        _afterwards(results),
        "## Does the order matter?",
        _orders(results),
        "## What the selectors catch",
        _caught(facts, results),
        "## Operations, by formula",
        _flops(study, results),
        _scores(facts),
        _limits(study),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_was_done(facts: Mapping[str, Any], results: Results) -> str:
    study = facts["study"]
    tokens = study["steps"] * study["batch_size"] * study["length"]
    kept = study["blocks"] * study["block_size"]
    kinds = "\n".join(f"- `{name}`: {WORDS[name]}." for name in results.attentions)
    controls = (
        " `random` is the control that shares the pacing and has no difficulty." if "random" in results.orders else ""
    )
    retrofit = " (`retrofit`: plus the tokens of the warm-up's steps)" if "retrofit" in results.attentions else ""
    return (
        f"A Qwen3 of {facts['parameters'] / 1e6:.2f} million parameters ({study['layers']} layers, width {study['hidden']}, "
        f"{study['heads']} heads in {study['groups']} groups of width {study['head_dim']}) is trained from scratch on "
        f"{tokens / 1e6:.2f} million tokens{retrofit}, the same number for all: {study['steps']} steps of {study['batch_size']} "
        f"rows of {study['length']} words, out of {study['rows']} rows of `benchmarks/studies/recall_task.py`, and measured on "
        f"{study['held_out']} held-out rows. A row is generated text with facts among its words, which are asked for later. "
        f"Far recall is the accuracy for facts {facts['reach']} words or more before their question, which no stack of "
        f"{study['layers']} layers with windows of {kept} words can carry to it; a model that sees no fact is right in one of 8. "
        "Unpredictable words (facts when stated, names asked for) have no loss; the loss of the text is over all other "
        f"words except the answers. In training the mean loss of the answers is added with weight {study['answer_weight']:g}.\n\n"
        f"Sparse kinds attend to {study['blocks']} blocks of {study['block_size']}, {kept} of {study['length']} words "
        f"(N/{study['length'] / kept:g}) in every layer, chosen separately by every query and group; index width "
        f"{study['index_dim']}. "
        f"The warm-up over every block takes {study['full_steps']} of the steps. Measured is always the sparse model, also "
        f"during the warm-up.\n\n{kinds}\n\n"
        "`plain` order shuffles all rows, epoch after epoch. `sparsity` draws from a growing share of the rows (pacing "
        f"`{study['pacing']}`), easiest first: difficulty is the Hoyer sparsity of the mean hidden state of a dense model of the "
        f"same shape, trained in advance for {study['reference_steps']} steps in plain order with a seed of its own.{controls} "
        f"{study['seeds']} seeds differ in initial weights and draws; rows and scores are the same."
    )


def _floors(facts: Mapping[str, Any], results: Results) -> str:
    study = facts["study"]
    lines = ["| measure | order | value | floor | |", "| :--- | :--- | ---: | ---: | :--- |"]

    def add(what: str, order: str, found: Mean, floor: float, shown: str, *, below: bool) -> None:
        lines.append(f"| {what} | {order} | {found} | {shown} | {found.held(floor, below=below)} |")

    for order in results.orders:
        add(
            "dense: far recall, %",
            order,
            Mean.of(100.0 * results.end("far_recall", "dense", order)),
            95.0,
            "≥ 95",
            below=False,
        )
        if "index_branch" in results.attentions:
            add(
                "joint: loss of the text above dense, %",
                order,
                results.loss_gap("index_branch", order),
                1.0,
                "≤ 1",
                below=True,
            )
            add(
                "joint: far recall below dense, points",
                order,
                results.recall_gap("index_branch", order),
                1.0,
                "≤ 1",
                below=True,
            )
            mass = Mean.of(results.caught("mass", "index_branch", order), 3)
            add("joint: attention mass captured", order, mass, 0.9, "≥ 0.90", below=False)
        if "window" in results.attentions:
            add(
                "window: far recall below dense, points",
                order,
                results.recall_gap("window", order),
                30.0,
                "> 30",
                below=False,
            )
    lines.append("")
    lines.append(f"Means over {study['seeds']} seeds with 95 % intervals, paired by seed.")
    bounds = {order: _bound(facts, order, "mass") for order in results.orders}
    # If even the best blocks catch less than the floor, a missed floor does not show a fault of the selector.
    if any(bound.low < 0.9 for bound in bounds.values()):
        best = ", ".join(f"{bound} in {order} order" for order, bound in bounds.items())
        lines[-1] += (
            f" The best possible choice of as many blocks catches {best} of the dense models' attention mass; the bound of the "
            "jointly trained models was not measured. For a larger model see `benchmarks/studies/sparse/sparse_warmup.py`."
        )
    return "\n".join(lines)


def _bound(facts: Mapping[str, Any], order: str, name: str) -> Mean:
    """The attention mass of the dense models that the best blocks catch."""
    found = [one["caught"][name] for one in facts["best_possible"] if one["order"] == order]
    return Mean.of(np.array(found), 3)


def _afterwards(results: Results) -> str:
    """Joint training compared with attaching afterwards; "" if the study does not have both."""
    if not {"index_branch", "retrofit"} <= set(results.attentions):
        return ""
    gaps, nulls = [], 0
    for order in results.orders:
        joint, retrofit = (results.end("text_loss", kind, order) for kind in ("index_branch", "retrofit"))
        gap = Mean.of(100.0 * (joint / retrofit - 1.0), 2)
        nulls += gap.low <= 0 <= gap.high
        gaps.append(f"{gap} % higher in {order} order")
    ending = (
        " This shows neither that joint training is better than attaching afterwards, nor the contrary."
        if nulls == len(gaps)
        else ""
    )
    return (
        "The loss of the text after joint training, compared with that of an index branch taught afterwards to the frozen "
        f"dense model, which read the same rows for {results.steps('retrofit')[-1]} steps more: {', '.join(gaps)}; "
        f"{nulls} of {len(gaps)} intervals contain 0.{ending}"
    )


def _table(results: Results) -> str:
    lines = [
        "| attention | order | loss of the text | above dense, % | far recall, % | below dense, points | near recall, % |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for attention in results.attentions:
        for order in results.orders:
            loss = Mean.of(results.end("text_loss", attention, order), 4)
            far, near = (Mean.of(100.0 * results.end(name, attention, order)) for name in ("far_recall", "near_recall"))
            own = attention == "dense"
            gap, below = ("", "") if own else (results.loss_gap(attention, order), results.recall_gap(attention, order))
            lines.append(f"| {attention} | {order} | {loss} | {gap} | {far} | {below} | {near} |")
    return "\n".join([*lines, "", "Loss in nats per word."])


def _orders(results: Results) -> str:
    others = results.orders[1:]
    if not others:
        return "Only plain order was trained."
    lines = [
        "| attention | order | loss of the text, % | far recall, points | steps to a far recall of 90 % (plain) |",
        "| :--- | :--- | ---: | ---: | ---: |",
    ]
    nulls = 0
    for attention in results.attentions:
        for order in others:
            loss, far = (results.order_gap(name, attention, order) for name in ("text_loss", "far_recall"))
            # A null result is an interval that contains 0.
            nulls += (loss.low <= 0 <= loss.high) + (far.low <= 0 <= far.high)
            taken, plain = (_median(results.steps_until(attention, one, 0.9)) for one in (order, "plain"))
            # A retrofit begins where a dense model ended.
            steps = "" if attention == "retrofit" else f"{taken} ({plain})"
            lines.append(f"| {attention} | {order} | {loss} | {far} | {steps} |")
    total = 2 * len(results.attentions) * len(others)
    return "\n".join(
        [
            *lines,
            "",
            f"Differences to plain order at the end, paired by seed, with 95 % intervals not corrected for their number; "
            f"loss below 0 and recall above 0: better. {nulls} of {total} intervals contain 0, that is, no difference was found "
            "there. Steps: the median over seeds of the first measured step at which it is reached.",
        ]
    )


def _median(steps_S: NDArray[np.float64]) -> str:
    reached = steps_S[np.isfinite(steps_S)]
    return f"{np.median(reached):.0f}, {len(reached)} of {len(steps_S)} seeds" if reached.size else "never"


def _caught(facts: Mapping[str, Any], results: Results) -> str:
    lines = [
        "| attention | order | attention mass | in the lowest layer | block recall | dead blocks |",
        "| :--- | :--- | ---: | ---: | ---: | ---: |",
    ]
    for attention in results.attentions[1:]:
        for order in results.orders:
            cells = [
                Mean.of(results.caught(name, attention, order), 3) for name in ("mass", "lowest_mass", "recall", "dead")
            ]
            lines.append(f"| {attention} | {order} | {' | '.join(map(str, cells))} |")
    for order in results.orders:
        cells = [_bound(facts, order, name) for name in ("mass", "lowest_mass")]
        lines.append(f"| best blocks of the dense model | {order} | {' | '.join(map(str, cells))} | 1 | |")
    return "\n".join(
        [
            *lines,
            "",
            "Measured on held-out rows with the trained model: means over layers and all queries that had to choose. Mass: the "
            "share of its own dense attention that falls on the chosen blocks. Recall: the share of these that are among the "
            "best. Dead: blocks that no later block's query took. The last rows are the most that any choice of as many blocks "
            "can catch of the dense models' attention, if every layer attends densely.",
        ]
    )


def _flops(study: Mapping[str, Any], results: Results) -> str:
    shape = AttentionShape(
        heads=study["heads"], groups=study["groups"], head_dim=study["head_dim"], index_dim=study["index_dim"]
    )
    lines = [
        "| attention | words | dense, million | sparse, million | fewer, forward | fewer, training step |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for attention in results.attentions[1:]:
        selector: Any = "index_branch" if attention == "retrofit" else attention
        sparse = SparseShape(selector=selector, block_size=study["block_size"], blocks=study["blocks"])
        # The length of the study, and one at which the formula shows a large saving.
        for words in (study["length"], 16 * study["length"]):
            dense, ours = dense_flops(shape, words) / 1e6, sparse_flops(shape, words, sparse) / 1e6
            fewer = [saving(shape, words, sparse, training=training) for training in (False, True)]
            lines.append(f"| {attention} | {words} | {dense:.1f} | {ours:.1f} | {fewer[0]:.2f}× | {fewer[1]:.2f}× |")
    return "\n".join(
        [
            *lines,
            "",
            "Attention of one layer and one row, including the work of choosing, by `sparsort.attention.flops`: dense "
            "2·H·D·N², sparse G·I·N² + 4·H·D·N·k·W for the index branch. This is for sparse steps; the warm-up saves nothing. "
            "The second length was not run; it extrapolates the formula with the same blocks. At this size, most of a step's "
            "time is not spent in these products, so no saving of time is claimed.",
        ]
    )


def _scores(facts: Mapping[str, Any]) -> str:
    rho = spearmanr(facts["difficulty"], facts["levels"]).statistic
    shown = f"{rho:+.2f}".replace("-", "\N{MINUS SIGN}")
    return (
        f"## The scores\n\nSpearman's ρ between the difficulty by sparsity and the level for which a row was generated: "
        f"{shown} over {len(facts['levels'])} rows."
    )


def _limits(study: Mapping[str, Any]) -> str:
    return (
        "## Limits\n\n"
        f"One generated corpus, one length, one model size and {study['seeds']} seeds: the intervals apply to other seeds, not "
        "to other data, longer training or larger models. Facts are single words, so that one layer can recall them; recall "
        "that needs two layers is not tested. Block size and index width were chosen on the first seed in plain "
        "order by these held-out rows, as the recipe states; the learning rate was not tuned for any kind of attention. A "
        "null result is not evidence of no difference; its interval shows how large the difference may be."
    )


def curves(results: Results) -> Any:
    """Loss of the text and far recall over training: one colour per kind of attention, one line style per order."""
    figure = blank(9.0, 3.6)
    panels = figure.subplots(1, 2)
    styles = ("-", "--", ":", "-.")
    named = (("text_loss", "held-out loss of the text, nats a word", 1.0), ("far_recall", "far recall, %", 100.0))
    for panel, (name, words, factor) in zip(panels, named, strict=True):
        panel.grid(axis="y")
        panel.set_xlabel("step")
        panel.set_title(words)
        for attention in (kind for kind in results.attentions if kind != "retrofit"):
            for number, order in enumerate(results.orders):
                # The first point is the untrained model, whose loss would flatten the rest of the curve.
                values, steps = factor * results.curves(name, attention, order)[:, 1:], results.steps(attention)[1:]
                shade = colour(COLOURS.get(attention, "chosen"))
                style = styles[number % len(styles)]
                panel.plot(steps, values.mean(axis=0), style, color=shade, linewidth=1.4, label=f"{attention}, {order}")
                panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.12, linewidth=0)
    panels[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def gaps(results: Results) -> Any:
    """Gaps to dense attention of the same order at the end, with intervals."""
    pairs = [(attention, order) for attention in results.attentions[1:] for order in results.orders]
    figure = blank(9.0, 0.34 * len(pairs) + 1.4)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, gap, floor, words in (
        (axes[0], results.loss_gap, 1.0, "loss of the text above dense, %"),
        (axes[1], results.recall_gap, 1.0, "far recall below dense, points"),
    ):
        panel.axvline(0, color=colour("ink"), linewidth=0.8)
        panel.axvline(floor, color=colour("muted"), linewidth=0.8, linestyle=":")
        panel.grid(axis="x")
        panel.set_xlabel(words)
        for place, (attention, order) in enumerate(reversed(pairs)):
            found, shade = gap(attention, order), colour(COLOURS.get(attention, "chosen"))
            panel.plot([found.low, found.high], [place, place], color=shade, linewidth=1.6, solid_capstyle="butt")
            panel.plot([found.mean], [place], marker="o", markersize=5, color=shade, linestyle="none")
    axes[0].set_yticks(range(len(pairs)), [f"{attention}, {order}" for attention, order in reversed(pairs)])
    figure.tight_layout()
    return figure
