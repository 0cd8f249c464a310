"""The report as one HTML file: no network, light and dark, readable on paper and on a telephone.

Contract: made from `report.json` alone, and the figures drawn from it. Text from data is escaped by the template engine, put into
the page as text by its script, or written by an XML writer (figures); the page's own policy forbids every outside resource.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from sparsort.curriculum.ablation.report.figures.panels import Panel, Section
from sparsort.curriculum.ablation.report.figures.style import PALETTE
from sparsort.curriculum.ablation.report.numbers.shape import Report
from sparsort.curriculum.ablation.report.page.head import facts, rest_of
from sparsort.curriculum.ablation.report.page.tables import arm_rows, columns
from sparsort.curriculum.ablation.report.page.words import KEYS, LEADS, METHOD, SHORT, TABLE_LEAD, TITLES

_SECTIONS: tuple[Section, ...] = ("forest", "spread", "cost", "calibration", "labels")


def render(report: Report, drawn: Iterable[tuple[Panel, str]]) -> str:
    """The page.

    Args:
        report: the numbers.
        drawn: every panel with its markup, from `svg.themed`.
    """
    by_section: dict[str, list[tuple[Panel, str]]] = {name: [] for name in _SECTIONS}
    for panel, markup in drawn:
        by_section[panel.section].append((panel, markup))
    sections: list[dict[str, Any]] = [_plain("found", "Findings")]
    for name in _SECTIONS:
        if by_section[name]:
            sections.append(
                {
                    "id": name,
                    "short": SHORT[name],
                    "title": TITLES[name],
                    "lead": LEADS[name],
                    "key": KEYS[name],
                    "panels": by_section[name],
                    "parts": [part for part in _parts(by_section[name]) if part],
                }
            )
    named = (("numbers", "Numbers"), ("prompts", "Prompts"), ("method", "Method"), ("data", "Data"))
    sections += [_plain(name, short) for name, short in named]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters["nobreak"] = lambda text: text.replace(" %", "\u00a0%")
    css = environment.from_string(_text("page.css")).render(palette=PALETTE)
    selectors = list(dict.fromkeys(cell["selector"] for cell in report["cells"]))
    return environment.from_string(_text("page.html")).render(
        report=report,
        css=Markup(css),
        js=Markup(_text("page.js")),
        facts=facts(report),
        rest=rest_of(report["provenance"]),
        findings=report["findings"],
        sections=sections,
        filters=_filters(report, selectors),
        several_selectors=len(selectors) > 1,
        columns=columns(report),
        rows=arm_rows(report),
        table_lead=TABLE_LEAD,
        method=METHOD,
        version=report["provenance"].get("sparsort"),
    )


def _parts(listed: list[tuple[Panel, str]]) -> list[list[tuple[Panel, str]]]:
    """Panels of all tasks, and panels of one."""
    return [[pair for pair in listed if pair[0].task is None], [pair for pair in listed if pair[0].task is not None]]


def _plain(name: str, short: str) -> dict[str, Any]:
    """A section that the template writes itself."""
    return {"id": name, "short": short, "panels": []}


def _text(name: str) -> str:
    return files("sparsort.curriculum.ablation.report").joinpath("page", name).read_text(encoding="utf-8")


def _filters(report: Report, selectors: list[str]) -> list[dict[str, Any]]:
    """The choices above the page; a filter with nothing to choose from is left out."""
    shots = list(dict.fromkeys(cell["k"] for cell in report["cells"]))
    calibrated = {cell["calibrated"] for cell in report["cells"]}
    arms = list(
        dict.fromkeys(arm["name"] for cell in report["cells"] for arm in cell["arms"] if arm["kind"] != "oracle")
    )
    every = ("", "all")
    found: list[dict[str, Any]] = [
        {"name": "Task", "key": "task", "chosen": "", "choices": [every, *((name, name) for name in report["tasks"])]},
        {"name": "k", "key": "k", "chosen": "", "choices": [every, *((str(k), str(k)) for k in shots)]},
        {
            "name": "Selector",
            "key": "selector",
            "chosen": "",
            "choices": [every, *((name, name) for name in selectors)],
        },
    ]
    if len(calibrated) > 1:
        choices = [("", "off and on"), ("0", "off"), ("1", "on")]
        found.append({"name": "Calibration", "key": "calibrated", "chosen": "0", "choices": choices})
    found = [one for one in found if len(one["choices"]) > 2]
    if arms:
        choices = [("", "none"), *((name, name) for name in sorted(arms))]
        found.append({"name": "Emphasise", "key": "arm", "chosen": "", "choices": choices})
    return found
