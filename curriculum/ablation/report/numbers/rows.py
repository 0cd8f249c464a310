"""The order of the arms in all figures and tables, and the formats of numbers.

Contract: arms are in blocks by kind, first the orderers that are rules, and within a block from the largest gain to the smallest.
If there are several tasks, the gain is the one over all tasks; if a cell was run both with and without contextual calibration,
it is the gain without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsort.curriculum.ablation.report.numbers.shape import CellNumbers, Difference, Pooled, Report

# (kind, names of the arms) for each block.
Blocks = list[tuple[str, list[str]]]


def blocks(report: Report, *, kinds: Sequence[str] = ("named", "chosen")) -> Blocks:
    """The blocks of these kinds that have arms, sorted by the gain in the first panel that has the arm."""
    kind_of = {arm["name"]: arm["kind"] for cell in report["cells"] for arm in cell["arms"]}
    panels: list[CellNumbers | Pooled] = [*report["pooled"], *report["cells"]]
    gains: dict[str, float] = {}
    # The sort is stable, so panels over all tasks stay before single cells.
    for panel in sorted(panels, key=lambda panel: panel["calibrated"]):
        for arm in panel["arms"]:
            gains.setdefault(arm["name"], arm["difference"]["value"])
    by_kind = [(kind, sorted((n for n in gains if kind_of[n] == kind), key=lambda n: -gains[n])) for kind in kinds]
    return [(kind, names) for kind, names in by_kind if names]


def only(rows: Blocks, names: Iterable[str]) -> Blocks:
    """The blocks with only these arms."""
    wanted = set(names)
    reduced = [(kind, [name for name in listed if name in wanted]) for kind, listed in rows]
    return [(kind, listed) for kind, listed in reduced if listed]


def y_positions(rows: Blocks, gap: float = 1.2) -> tuple[dict[str, float], float]:
    """The y of every arm, one unit apart and downwards from 0 with a gap between blocks, and the y after the last arm."""
    y_of, y = {}, -gap
    for _, listed in rows:
        y += gap
        for name in listed:
            y_of[name] = y
            y += 1.0
    return y_of, y


def tested_arms(panel: CellNumbers | Pooled) -> dict[str, Difference]:
    """The differences of a panel's arms without the oracles, which are chosen by the test labels."""
    return {arm["name"]: arm["difference"] for arm in panel["arms"] if arm["kind"] != "oracle"}


def is_significant(difference: Difference) -> bool:
    """Whether a difference is significant after Holm's correction."""
    return difference["verdict"] in ("helps", "hurts")


def points(value: float | None, digits: int = 1) -> str:
    """A difference of accuracies in points with its sign: +5.5, −0.3."""
    if value is None:
        return "–"
    text = f"{100 * value:+.{digits}f}"
    # Zero has no sign, and neither has a small number that is rounded to zero.
    return (text if float(text) else f"{0:.{digits}f}").replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """An accuracy or a share in per cent, without the percent sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def probability(value: float | None) -> str:
    """A p-value with three decimals, or "< .001"."""
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def count(value: float | None) -> str:
    """A count with narrow spaces as thousands separators; it has one decimal only if it is below 100 and not whole."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if round(value, 1) >= 100 or value == int(value) else f"{value:.1f}"
    return text.replace(",", "\u202f")


def join_names(items: Iterable[object], most: int = 6) -> str:
    """Items as one phrase, "a, b and c" ("" for no items); a long list is cut to `most` items and the number of the others."""
    names = [str(item) for item in items]
    # "and 2 others" would be no shorter than the two names.
    if len(names) > most + 2:
        names = [*names[:most], f"{len(names) - most} others"]
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"
