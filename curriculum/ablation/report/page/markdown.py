"""The report as Markdown: the same numbers as on the page, with the sheets as linked pictures.

Contract: made from `report.json` alone. Text from data is escaped, so it is displayed literally and is neither Markdown nor HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sparsort.curriculum.ablation.report.figures.panels import title_of
from sparsort.curriculum.ablation.report.figures.style import KIND_NAME, plain
from sparsort.curriculum.ablation.report.numbers.rows import count, percent, points, probability
from sparsort.curriculum.ablation.report.numbers.shape import (
    CalibrationCell,
    CellNumbers,
    Difference,
    Pooled,
    Report,
)
from sparsort.curriculum.ablation.report.page.head import facts
from sparsort.curriculum.ablation.report.page.words import METHOD, TABLE_LEAD


def markdown(report: Report, pictures: Sequence[tuple[str, str]]) -> str:
    """The report.

    Args:
        report: the numbers.
        pictures: the file name in `figures/`, without its suffix, and the caption of every sheet.
    """
    parts = [f"# {escaped(report['title'])}", *(f"> **Warning.** {escaped(w['text'])}" for w in report["warnings"])]
    parts += [_table(("", ""), facts(report), "ll"), "## Findings"]
    for finding in report["findings"]:
        parts.append(f"### {escaped(finding['title'])}")
        parts += [escaped(sentence) for sentence in finding["sentences"]]
    if report["notes"]:
        parts += ["### Caveats", "\n".join(f"- {escaped(note)}" for note in report["notes"])]
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
    parts.append("`report.json` has every set, its demonstrations, and the order that each orderer gave them.")
    parts += ["## How the numbers are made", *(f"**{name}.** {text}" for name, text in METHOD)]
    return "\n\n".join(parts) + "\n"


def escaped(text: object) -> str:
    """Text from data on one line, in a form that Markdown displays literally."""
    # "&" comes first, otherwise it would escape the entities of the other two.
    line = plain(text, 2000).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)


def fenced(text: str) -> str:
    """Text as a code block, with a fence longer than any in the text, which could otherwise end the block."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    rule = {"l": ":---", "r": "---:"}
    lines = [head, [rule[side] for side in align], *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(panel: CellNumbers | Pooled) -> str:
    return f"### {escaped(title_of(panel))}, {escaped(panel['selector'])}" + (
        ", with contextual calibration" if panel["calibrated"] else ""
    )


def _difference(difference: Difference) -> list[str]:
    low, high = difference["low"], difference["high"]
    interval = "–" if low is None else f"{points(low)} to {points(high)}"
    p_values = probability(difference["p"]), probability(difference["p_adjusted"])
    return [points(difference["value"]), interval, *p_values, difference["verdict"] or "–"]


def _pooled(panel: Pooled) -> str:
    head = ("orderer", "kind", "tasks", "difference", "95 %", "p", "p, Holm", "verdict", "cost")
    rows = [
        [
            arm["name"],
            KIND_NAME[arm["kind"]],
            str(len(arm["tasks"])),
            *_difference(arm["difference"]),
            f"{arm['cost']:.2f}×",
        ]
        for arm in panel["arms"]
    ]
    return _table(head, rows, "llrrlrrlr")


def _cell(cell: CellNumbers) -> str:
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
            *_difference(arm["difference"]),
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
            *_difference(arm["change"])[:4],
        ]
        for arm in pair["arms"]
    ]
    head = ("orderer", "off", "on", "change", "95 %", "p", "p, Holm")
    title = f"### {escaped(pair['task'])}, k = {pair['k']}, {escaped(pair['selector'])}"
    spread = (
        f"The sd over random orders is {percent(pair['spread_off'])} points without and {percent(pair['spread_on'])} with."
        if pair["spread_off"] is not None
        else f"The spread over random orders is unknown: {pair['reason']}."
    )
    return [title, spread, _table(head, rows, "lrrrlrr")]


def _prompts(report: Report) -> list[str]:
    # Cells that differ only in contextual calibration have the same prompts.
    prompts: dict[tuple[str, int], str] = {}
    for cell, view in zip(report["cells"], report["demonstrations"], strict=True):
        prompts.setdefault((cell["task"], cell["k"]), view["sets"][0]["prompt"])
    return [part for (task, k), text in prompts.items() for part in (f"### {escaped(task)}, k = {k}", fenced(text))]
