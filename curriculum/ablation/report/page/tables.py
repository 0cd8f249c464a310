"""The table of all arms in all cells: formatted cells with the number to sort by."""

from __future__ import annotations

from typing import Any, TypedDict

from sparsort.curriculum.ablation.report.figures.style import KIND_NAME
from sparsort.curriculum.ablation.report.numbers.rows import count, percent, points, probability
from sparsort.curriculum.ablation.report.numbers.shape import ArmNumbers, Cell, Report


class Column(TypedDict):
    """A column: its name, what it holds, and whether that is text."""

    name: str
    help: str
    text: bool


def _column(name: str, help_text: str, *, text: bool = False) -> Column:
    return Column(name=name, help=help_text, text=text)


_SELECTOR = _column("selector", "how demonstrations were selected", text=True)
_COLUMNS: list[Column] = [
    _column("task", "the task", text=True),
    _column("k", "demonstrations in a prompt"),
    _column("cal.", "contextual calibration", text=True),
    _column("orderer", "the orderer", text=True),
    _column("kind", "rule, chosen with the model, oracle", text=True),
    _column("accuracy", "mean accuracy with its 95 % interval over demonstration sets, per cent"),
    _column("difference", "to the mean random order of the same sets, with its 95 % interval, points"),
    _column("p", "two-sided"),
    _column("p, Holm", "corrected for the orderers of the cell"),
    _column("percentile", "mean place among the random orders of the same set"),
    _column("tokens/answer", "read for one answer, choosing included"),
    _column("choosing", "tokens read to choose the order of one set"),
    _column("sets needed", "to find this difference with 80 % power after the correction"),
    _column("items needed", "a set, with these sets, likewise"),
]


def columns(report: Report) -> list[Column]:
    """The columns of `arm_rows`; the selector has one where there are several."""
    return [_COLUMNS[0], *([_SELECTOR] if _several(report) else []), *_COLUMNS[1:]]


def _several(report: Report) -> bool:
    return len({cell["selector"] for cell in report["cells"]}) > 1


def arm_rows(report: Report) -> list[dict[str, Any]]:
    """A row for every arm of every cell, the mean random order first, with its filters and its cells."""
    several = _several(report)
    rows = []
    for cell in report["cells"]:
        rows.append(_row(cell, "mean random order", _random(cell), several))
        rows += [_row(cell, arm["name"], _arm(arm), several, oracle=arm["kind"] == "oracle") for arm in cell["arms"]]
    return rows


def _row(cell: Cell, arm: str, shown: list[dict[str, Any]], several: bool, *, oracle: bool = False) -> dict[str, Any]:
    place = [
        _text(cell["task"]),
        *([_text(cell["selector"])] if several else []),
        _number(str(cell["k"]), cell["k"]),
        _text("on" if cell["calibrated"] else "off"),
        _text(arm),
    ]
    keys = {key: cell[key] for key in ("task", "selector", "k", "calibrated")}
    return {**keys, "arm": arm, "oracle": oracle, "cells": [*place, *shown]}


def _random(cell: Cell) -> list[dict[str, Any]]:
    one = cell["random"]
    return [
        _text("random"),
        _number(percent(one["accuracy"]), one["accuracy"], interval=_interval(one["low"], one["high"])),
        *[_number("", None)] * 4,
        _number(count(one["tokens"]), one["tokens"]),
        *[_number("", None)] * 3,
    ]


def _arm(arm: ArmNumbers) -> list[dict[str, Any]]:
    one = arm["difference"]
    verdict = one["verdict"] if one["verdict"] != "nothing" else None
    interval = "" if one["low"] is None else f"{points(one['low'])} to {points(one['high'])}"
    return [
        _text(KIND_NAME[arm["kind"]].removesuffix("s") if arm["kind"] != "chosen" else "chosen"),
        _number(percent(arm["accuracy"]), arm["accuracy"], interval=_interval(arm["low"], arm["high"])),
        _number(points(one["value"]), one["value"], verdict, interval),
        _number(probability(one["p"]), one["p"]),
        _number(probability(one["p_adjusted"]), one["p_adjusted"], verdict),
        _number(f"{arm['percentile']:.0f}", arm["percentile"]),
        _number(count(arm["tokens_per_answer"]), arm["tokens_per_answer"]),
        _number(count(arm["choosing_tokens"]), arm["choosing_tokens"]),
        _number(count(one["sets_needed"]), one["sets_needed"]),
        _number(count(one["items_needed"]), one["items_needed"]),
    ]


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{percent(low)} to {percent(high)}"


def _text(shown: str) -> dict[str, Any]:
    return {"shown": shown, "text": True, "sort": None, "verdict": None, "interval": ""}


def _number(shown: str, value: float | None, verdict: str | None = None, interval: str = "") -> dict[str, Any]:
    return {"shown": shown, "text": False, "sort": value, "verdict": verdict, "interval": interval}
