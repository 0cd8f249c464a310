"""The report as one HTML file, which needs no network, has a light and a dark theme, and is readable in print and on a phone.

Contract: the page is made only from `report.json` and the figures drawn from it. Text from data is escaped by the template
engine, inserted as text by the script of the page, or written by an XML writer (figures). The page's content security policy
forbids all external resources.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any, TypedDict

import jinja2
from markupsafe import Markup

from sparsort.curriculum.ablation.report.figures.panels import Panel, Section
from sparsort.curriculum.ablation.report.figures.style import KIND_NAME, PALETTE
from sparsort.curriculum.ablation.report.numbers.rows import count, is_significant, percent, points, probability
from sparsort.curriculum.ablation.report.numbers.shape import ArmNumbers, CellNumbers, Report
from sparsort.curriculum.ablation.report.page.head import facts, rest_of
from sparsort.curriculum.ablation.report.page.words import KEYS, LEADS, METHOD, SHORT, TABLE_LEAD, TITLES

_SECTIONS: tuple[Section, ...] = ("forest", "spread", "cost", "calibration", "labels")


def render(report: Report, drawn: Iterable[tuple[Panel, str]]) -> str:
    """The page.

    Args:
        report: the numbers.
        drawn: every panel with its markup (`write.themed_svg`).
    """
    by_section: dict[str, list[tuple[Panel, str]]] = {name: [] for name in _SECTIONS}
    for panel, markup in drawn:
        by_section[panel.section].append((panel, markup))
    sections: list[dict[str, Any]] = [_plain_section("found", "Findings")]
    for name in _SECTIONS:
        if by_section[name]:
            # Panels over all tasks are in a grid of their own, before those of single tasks.
            over_tasks = [pair for pair in by_section[name] if pair[0].task is None]
            on_tasks = [pair for pair in by_section[name] if pair[0].task is not None]
            sections.append(
                {
                    "id": name,
                    "short": SHORT[name],
                    "title": TITLES[name],
                    "lead": LEADS[name],
                    "key": KEYS[name],
                    "panels": by_section[name],
                    "parts": [part for part in (over_tasks, on_tasks) if part],
                }
            )
    others = (("numbers", "Numbers"), ("prompts", "Prompts"), ("method", "Method"), ("data", "Data"))
    sections += [_plain_section(name, short) for name, short in others]
    selectors = _selectors(report)
    environment = _environment()
    css = environment.from_string(_text("page.css")).render(palette=PALETTE)
    return environment.from_string(_text("page.html")).render(
        report=report,
        # CSS and JavaScript are files of this package without text from data, so they are not escaped.
        css=Markup(css),
        js=Markup(_text("page.js")),
        facts=facts(report),
        rest=rest_of(report["provenance"]),
        findings=report["findings"],
        sections=sections,
        filters=_filters(report, selectors),
        several_selectors=len(selectors) > 1,
        columns=_columns(len(selectors) > 1),
        rows=arm_rows(report),
        table_lead=TABLE_LEAD,
        method=METHOD,
        version=report["provenance"].get("sparsort"),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        # A misspelt name in the template is an error, not an empty string.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # NaN is not JSON: a browser would refuse the whole report.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    # A number and its percent sign must not be on different lines.
    environment.filters["nobreak"] = lambda text: text.replace(" %", "\u00a0%")
    return environment


def _plain_section(name: str, short: str) -> dict[str, Any]:
    """A section without panels, whose content is in the template."""
    return {"id": name, "short": short, "panels": []}


def _text(name: str) -> str:
    return files("sparsort.curriculum.ablation.report").joinpath("page", name).read_text(encoding="utf-8")


def _selectors(report: Report) -> list[str]:
    return list(dict.fromkeys(cell["selector"] for cell in report["cells"]))


def _filters(report: Report, selectors: list[str]) -> list[dict[str, Any]]:
    """The filters above the page; a filter with only one value is omitted."""
    shots = list(dict.fromkeys(str(cell["k"]) for cell in report["cells"]))
    arms = {arm["name"] for cell in report["cells"] for arm in cell["arms"] if arm["kind"] != "oracle"}
    by_value = (("Task", "task", report["tasks"]), ("k", "k", shots), ("Selector", "selector", selectors))
    filters: list[dict[str, Any]] = [
        {"name": name, "key": key, "chosen": "", "choices": [("", "all"), *((value, value) for value in values)]}
        for name, key, values in by_value
        if len(values) > 1
    ]
    if len({cell["calibrated"] for cell in report["cells"]}) > 1:
        # The page first shows only the cells without calibration, because showing both would double the panels.
        choices = [("", "off and on"), ("0", "off"), ("1", "on")]
        filters.append({"name": "Calibration", "key": "calibrated", "chosen": "0", "choices": choices})
    if arms:
        choices = [("", "none"), *((name, name) for name in sorted(arms))]
        filters.append({"name": "Emphasise", "key": "arm", "chosen": "", "choices": choices})
    return filters


# The table of all arms in all cells


class ArmColumn(TypedDict):
    """A column of the table: its heading, a tooltip, and whether it contains text."""

    name: str
    help: str
    text: bool


def _column(name: str, help_text: str, *, text: bool = False) -> ArmColumn:
    return ArmColumn(name=name, help=help_text, text=text)


def _columns(several_selectors: bool) -> list[ArmColumn]:
    """The columns of `arm_rows`."""
    selector = [_column("selector", "how demonstrations were selected", text=True)] if several_selectors else []
    return [
        _column("task", "the task", text=True),
        *selector,
        _column("k", "number of demonstrations in a prompt"),
        _column("cal.", "contextual calibration", text=True),
        _column("orderer", "the orderer", text=True),
        _column("kind", "rule, chosen with the model, or oracle", text=True),
        _column("accuracy", "mean accuracy with its 95 % interval over demonstration sets, in per cent"),
        _column(
            "difference", "difference from the mean random order of the same sets with its 95 % interval, in points"
        ),
        _column("p", "two-sided p-value"),
        _column("p, Holm", "p-value corrected for the number of orderers in the cell"),
        _column("percentile", "mean rank among the random orders of the same set"),
        _column("tokens/answer", "tokens read for one answer, including those read to choose the order"),
        _column("choosing", "tokens read to choose the order of one set"),
        _column("sets needed", "number of sets that would detect this difference with 80 % power after the correction"),
        _column("items needed", "number of items per set that would do the same with these sets"),
    ]


def arm_rows(report: Report) -> list[dict[str, Any]]:
    """A row for every arm of every cell, the mean random order first; with the values for the filters and the table cells."""
    several = len(_selectors(report)) > 1
    rows = []
    for cell in report["cells"]:
        rows.append(_row(cell, "mean random order", _random_cells(cell), several))
        rows += [
            _row(cell, arm["name"], _arm_cells(arm), several, oracle=arm["kind"] == "oracle") for arm in cell["arms"]
        ]
    return rows


def _row(
    cell: CellNumbers, arm: str, values: list[dict[str, Any]], several: bool, *, oracle: bool = False
) -> dict[str, Any]:
    labels = [
        _words(cell["task"]),
        *([_words(cell["selector"])] if several else []),
        _number(str(cell["k"]), cell["k"]),
        _words("on" if cell["calibrated"] else "off"),
        _words(arm),
    ]
    keys = {key: cell[key] for key in ("task", "selector", "k", "calibrated")}
    return {**keys, "arm": arm, "oracle": oracle, "cells": [*labels, *values]}


def _random_cells(cell: CellNumbers) -> list[dict[str, Any]]:
    random = cell["random"]
    return [
        _words("random"),
        _number(percent(random["accuracy"]), random["accuracy"], interval=_interval(random["low"], random["high"])),
        *[_number("", None)] * 4,
        _number(count(random["tokens"]), random["tokens"]),
        *[_number("", None)] * 3,
    ]


def _arm_cells(arm: ArmNumbers) -> list[dict[str, Any]]:
    difference = arm["difference"]
    verdict = difference["verdict"] if is_significant(difference) else None
    interval = "" if difference["low"] is None else f"{points(difference['low'])} to {points(difference['high'])}"
    return [
        _words(KIND_NAME[arm["kind"]].removesuffix("s") if arm["kind"] != "chosen" else "chosen"),
        _number(percent(arm["accuracy"]), arm["accuracy"], interval=_interval(arm["low"], arm["high"])),
        _number(points(difference["value"]), difference["value"], verdict, interval),
        _number(probability(difference["p"]), difference["p"]),
        _number(probability(difference["p_adjusted"]), difference["p_adjusted"], verdict),
        _number(f"{arm['percentile']:.0f}", arm["percentile"]),
        _number(count(arm["tokens_per_answer"]), arm["tokens_per_answer"]),
        _number(count(arm["choosing_tokens"]), arm["choosing_tokens"]),
        _number(count(difference["sets_needed"]), difference["sets_needed"]),
        _number(count(difference["items_needed"]), difference["items_needed"]),
    ]


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{percent(low)} to {percent(high)}"


def _words(text: str) -> dict[str, Any]:
    return {"shown": text, "text": True, "sort": None, "verdict": None, "interval": ""}


def _number(text: str, value: float | None, verdict: str | None = None, interval: str = "") -> dict[str, Any]:
    # The page's script sorts by the value: the text is rounded, and JavaScript does not parse its minus sign, U+2212.
    return {"shown": text, "text": False, "sort": value, "verdict": verdict, "interval": interval}
