"""The report as Markdown: the same numbers, with the sheets as pictures beside it.

Contract: made from `report.json` alone. Text from data is escaped, so that it shows as it is and makes neither markup nor HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sparsort.curriculum.ablation.report.figures.panels import title_of
from sparsort.curriculum.ablation.report.figures.style import KIND_NAME, plain
from sparsort.curriculum.ablation.report.numbers.rows import count, percent, points, probability
from sparsort.curriculum.ablation.report.numbers.shape import CalibrationCell, Cell, Difference, Pooled, Report
from sparsort.curriculum.ablation.report.page.head import facts
from sparsort.curriculum.ablation.report.page.words import METHOD, TABLE_LEAD


def markdown(report: Report, pictures: Sequence[tuple[str, str]]) -> str:
    """The report.

    Args:
        report: the numbers.
        pictures: file name, without suffix, in `figures/`, and caption of every sheet.
    """
    parts = [f"# {escaped(report['title'])}", *(f"> **Warning.** {escaped(one['text'])}" for one in report["warnings"])]
    parts += [_table(("", ""), facts(report), "ll"), "## What was found"]
    for finding in report["findings"]:
        parts.append(f"### {escaped(finding['title'])}")
        parts += [escaped(sentence) for sentence in finding["sentences"]]
    if report["notes"]:
        parts += ["### To know before believing a number", "\n".join(f"- {escaped(note)}" for note in report["notes"])]
    parts.append("## Figures")
    parts += [f"![{escaped(caption)}](figures/{name}.png)\n\n{escaped(caption)}" for name, caption in pictures]
    if report["pooled"]:
        parts.append("## All tasks")
        parts += [part for panel in report["pooled"] for part in (_heading(panel), _pooled(panel))]
    parts += ["## Every cell", TABLE_LEAD]
    parts += [part for cell in report["cells"] for part in (_heading(cell), _cell(cell))]
    if report["calibration"]:
        parts += ["## Contextual calibration", *(part for pair in report["calibration"] for part in _calibration(pair))]
    parts += [
        "## Prompts",
        "The prompt of the first test item of each task under the first random order of the first set.",
    ]
    parts += _prompts(report)
    parts.append("Every set, its demonstrations and the order that each orderer gave them stand in `report.json`.")
    parts += ["## How the numbers are made", *(f"**{name}.** {text}" for name, text in METHOD)]
    return "\n\n".join(parts) + "\n"


def escaped(text: object) -> str:
    """Text from data, on one line, that Markdown shows as it is."""
    shown = plain(text, 2000).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", shown)


def fenced(text: str) -> str:
    """Text as a code block that it cannot leave."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    rule = {"l": ":---", "r": "---:"}
    lines = [head, [rule[side] for side in align], *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(panel: Cell | Pooled) -> str:
    return f"### {escaped(title_of(panel))}, {escaped(panel['selector'])}" + (
        ", with contextual calibration" if panel["calibrated"] else ""
    )


def _tested(one: Difference) -> list[str]:
    interval = "–" if one["low"] is None else f"{points(one['low'])} to {points(one['high'])}"
    verdict = one["verdict"] or "–"
    return [points(one["value"]), interval, probability(one["p"]), probability(one["p_adjusted"]), verdict]


def _pooled(panel: Pooled) -> str:
    head = ("orderer", "kind", "tasks", "difference", "95 %", "p", "p, Holm", "verdict", "cost")
    rows = [
        [
            arm["name"],
            KIND_NAME[arm["kind"]],
            str(len(arm["tasks"])),
            *_tested(arm["difference"]),
            f"{arm['cost']:.2f}×",
        ]
        for arm in panel["arms"]
    ]
    return _table(head, rows, "llrrlrrlr")


def _cell(cell: Cell) -> str:
    random = cell["random"]
    head = (
        "orderer",
        "accuracy",
        "difference",
        "95 %",
        "p",
        "p, Holm",
        "verdict",
        "percentile",
        "tokens/answer",
        "sets",
        "items",
    )
    first = ["mean random order", percent(random["accuracy"]), *["–"] * 6, count(random["tokens"]), "–", "–"]
    rows = [
        [
            arm["name"],
            percent(arm["accuracy"]),
            *_tested(arm["difference"]),
            f"{arm['percentile']:.0f}",
            count(arm["tokens_per_answer"]),
            count(arm["difference"]["sets_needed"]),
            count(arm["difference"]["items_needed"]),
        ]
        for arm in cell["arms"]
    ]
    return _table(head, [first, *rows], "lrrlrrlrrrr")


def _calibration(pair: CalibrationCell) -> list[str]:
    rows = [
        [
            "mean random order" if arm["kind"] == "random" else arm["name"],
            percent(arm["off"]),
            percent(arm["on"]),
            *_tested(arm["change"])[:4],
        ]
        for arm in pair["arms"]
    ]
    head = ("orderer", "off", "on", "change", "95 %", "p", "p, Holm")
    title = f"### {escaped(pair['task'])}, k = {pair['k']}, {escaped(pair['selector'])}"
    spread = (
        f"Over random orders, sd {percent(pair['spread_off'])} points without and {percent(pair['spread_on'])} with."
        if pair["spread_off"] is not None
        else f"No spread over random orders: {pair['reason']}."
    )
    return [title, spread, _table(head, rows, "lrrrlrr")]


def _prompts(report: Report) -> list[str]:
    shown: dict[tuple[str, int], str] = {}
    for cell, view in zip(report["cells"], report["demonstrations"], strict=True):
        shown.setdefault((cell["task"], cell["k"]), view["sets"][0]["prompt"])
    found = []
    for (task, k), prompt in shown.items():
        found += [f"### {escaped(task)}, k = {k}", fenced(prompt)]
    return found
