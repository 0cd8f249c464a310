"""What the numbers say, in sentences made by rule: which orderers help, hurt or show nothing, and what could have been seen.

Contract: "helps" and "hurts" are verdicts after Holm's correction; everything else is "shows nothing", told together with the
smallest difference that this study would have found, so that a null is read as what it is. No sentence without its number. Where
there is none, the reason is reported in its place, with the next step: fewer than three sets, or outcomes that do not differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.report.numbers.rows import count, percent, points
from sparsort.curriculum.ablation.report.numbers.shape import Cell, Difference, Finding, Pooled, PooledArm, Report
from sparsort.curriculum.ablation.statistics.estimates import SET
from sparsort.curriculum.ablation.statistics.resampling import MIN_CLUSTERS, too_few

_MOST = 6
_MOST_LEFT_OUT = 12
_MORE_SETS = "run sparsort ablate with --sets 3 or more (10 are better)"
_MORE_ROWS = "more test rows, or harder ones, may tell them apart"


def findings(report: Report) -> list[Finding]:
    """The whole study first, then every task; each selector, without and with contextual calibration, apart."""
    views = list(dict.fromkeys((cell["selector"], cell["calibrated"]) for cell in report["cells"]))
    several = len({selector for selector, _ in views}) > 1
    made = []
    for selector, calibrated in views:
        cells = [cell for cell in report["cells"] if (cell["selector"], cell["calibrated"]) == (selector, calibrated)]
        where = f", {selector} demonstrations" if several else ""
        where += ", with contextual calibration" if calibrated else ""
        if overall := _widest(report, selector, calibrated):
            made.append(_overall(report, overall, cells, where))
        for task in dict.fromkeys(cell["task"] for cell in cells):
            made.append(_of_task([cell for cell in cells if cell["task"] == task], task, where))
    return made


def notes(report: Report) -> list[str]:
    """What a reader must know of this study before believing a number of it."""
    said = []
    cells = report["cells"]
    if one := [cell["id"] for cell in cells if cell["sets"] == 1]:
        said.append(
            f"One demonstration set only in {_list(one)}: nothing there speaks of other sets, and nothing is tested."
        )
    if two := [cell["id"] for cell in cells if cell["sets"] == 2]:
        said.append(
            f"Two demonstration sets only in {_list(two)}: they allow no interval, no test and no sample size; {_MORE_SETS}."
        )
    if few := [cell["id"] for cell in cells if MIN_CLUSTERS <= cell["sets"] < 7]:
        said.append(
            f"Fewer than 7 demonstration sets in {_list(few)}: intervals there take the sets' means for nearly normal."
        )
    sets = sorted({cell["sets"] for cell in cells})
    if len(sets) > 1:
        said.append(
            f"Cells have {sets[0]} to {sets[-1]} demonstration sets; in pooled figures every task counts alike."
        )
    if few := [cell["id"] for cell in cells if cell["orders"] < 10]:
        said.append(
            f"Fewer than 10 random orders in {_list(few)}: their mean, which arms are compared with, is itself uncertain."
        )
    every = {arm["name"] for cell in cells for arm in cell["arms"]}
    lacking = {cell["id"]: sorted(every - {arm["name"] for arm in cell["arms"]}) for cell in cells}
    if gaps := [f"{cell} ({_list(names)})" for cell, names in lacking.items() if names]:
        said.append(f"Not every orderer was run everywhere. Missing: {_list(gaps)}.")
    if one := [cell["id"] for cell in cells if cell["labels"] and max(cell["gold_share"], default=0) == 1]:
        said.append(f"All test items have the same label in {_list(one)}: accuracy there is the share of that label.")
    if incomplete := list(dict.fromkeys(map(str, report["provenance"].get("incomplete") or ()))):
        shown, more = incomplete[:_MOST_LEFT_OUT], len(incomplete) - _MOST_LEFT_OUT
        shown += [f"{more} more, listed with the provenance"] if more > 0 else []
        said.append(f"Unfinished and left out: {'; '.join(shown)}.")
    if any(cell["calibrated"] for cell in cells):
        said.append(
            "Cells with and without contextual calibration share sets and items: one is no replication of the other."
        )
    return said


def _widest(report: Report, selector: str, calibrated: bool) -> Pooled | None:
    """The pooled panel of every k, or of the only one."""
    own = [pool for pool in report["pooled"] if (pool["selector"], pool["calibrated"]) == (selector, calibrated)]
    return next((pool for pool in own if pool["k"] is None), own[0] if own else None)


def _overall(report: Report, pool: Pooled, cells: Sequence[Cell], where: str) -> Finding:
    arms = {arm["name"]: arm["difference"] for arm in pool["arms"]}
    tasks = len(pool["tasks"])
    told = {_where_run(arm, pool["tasks"]): arm["difference"] for arm in pool["arms"]}
    sentences = [*_verdicts(told), *_untested(told), *_null(arms)]
    if bought := [arm for arm in pool["arms"] if arm["difference"]["verdict"] == "helps"]:
        sentences.append(_cheapest(bought))
    sentences.append(_spread(cells))
    helped = [
        task
        for task in pool["tasks"]
        if any(
            arm["difference"]["verdict"] == "helps" for cell in cells if cell["task"] == task for arm in cell["arms"]
        )
    ]
    alone = "none of them" if not helped else _list(helped) + (" only" if len(helped) < tasks else "")
    if any(_is_tested(arm["difference"]) for cell in cells for arm in cell["arms"]):
        sentences.append(f"Within single tasks, which have fewer sets, an orderer helps beyond chance on {alone}.")
    else:
        sentences.append("Within single tasks nothing can be tested.")
    if pool["calibrated"]:
        sentences += _calibration(report, pool["selector"])
    return Finding(
        title=f"Over {'both' if tasks == 2 else f'all {tasks}'} tasks{where}",
        task=None,
        selector=pool["selector"],
        calibrated=pool["calibrated"],
        tested=any(map(_is_tested, arms.values())),
        helps=_named(arms, "helps"),
        hurts=_named(arms, "hurts"),
        sentences=sentences,
    )


def _where_run(arm: PooledArm, tasks: Sequence[str]) -> str:
    """The arm's name, with its tasks where those are not all of the panel's."""
    return arm["name"] if len(arm["tasks"]) == len(tasks) else f"{arm['name']} on {_list(arm['tasks'])} alone"


def _of_task(cells: Sequence[Cell], task: str, where: str) -> Finding:
    sentences, helps, hurts, tested = [], [], [], False
    for cell in cells:
        arms = {arm["name"]: arm["difference"] for arm in cell["arms"] if arm["kind"] != "oracle"}
        shots = f"k = {cell['k']}: "
        tested = tested or any(map(_is_tested, arms.values()))
        sentences.append(shots + " ".join(_of_cell(cell, arms)))
        helps += [f"{name} (k = {cell['k']})" for name in _named(arms, "helps")]
        hurts += [f"{name} (k = {cell['k']})" for name in _named(arms, "hurts")]
    sentences.append(_spread(cells))
    return Finding(
        title=f"{task}{where}",
        task=task,
        selector=cells[0]["selector"],
        calibrated=cells[0]["calibrated"],
        tested=tested,
        helps=helps,
        hurts=hurts,
        sentences=sentences,
    )


def _of_cell(cell: Cell, arms: dict[str, Difference]) -> list[str]:
    if few := too_few(cell["sets"], SET):
        rest = "so nothing can be said of other sets" if cell["sets"] == 1 else "so no orderer was tested"
        return [f"{few}, {rest}; {_MORE_SETS}."]
    return [*_verdicts(arms, short=True), *_untested(arms), *_null(arms, short=True)]


def _is_tested(one: Difference) -> bool:
    return one["verdict"] is not None


def _untested(arms: dict[str, Difference]) -> list[str]:
    """Which arms have no test, by reason, and what to do."""
    by_reason: dict[str, list[str]] = {}
    for name, one in arms.items():
        if not _is_tested(one):
            by_reason.setdefault(one["reason"] or "", []).append(name)
    made = []
    for reason, names in by_reason.items():
        advice = _MORE_ROWS if "do not differ" in reason else _MORE_SETS
        whom = "No orderer" if len(names) == len(arms) else f"Not {_list(names)}"
        made.append(f"{whom} could be tested: {reason}; {advice}.")
    return made


def _named(arms: dict[str, Difference], verdict: str) -> list[str]:
    found = [name for name, one in arms.items() if one["verdict"] == verdict]
    return sorted(found, key=lambda name: -abs(arms[name]["value"]))


def _verdicts(arms: dict[str, Difference], *, short: bool = False) -> list[str]:
    tested = {name: one for name, one in arms.items() if _is_tested(one)}
    if not tested:
        return []
    helps, hurts = _named(arms, "helps"), _named(arms, "hurts")
    if not helps and not hurts:
        best = max(tested, key=lambda name: tested[name]["value"])
        gain = _with_interval(tested[best])
        if len(tested) == 1:
            return [f"{best} cannot be told from the mean random order ({gain})."]
        if short:
            return [
                f"no orderer can be told from the mean random order. Largest gain: {best}, {gain} before Holm's correction."
            ]
        return [
            f"None of the {len(tested)} orderers can be told from the mean random order. The largest gain is that of {best}, "
            f"{gain}, not beyond what chance may give the best of {len(tested)}."
        ]
    parts = []
    for names, one, more in ((helps, "helps", "help"), (hurts, "hurts", "hurt")):
        if names:
            told = [f"{name} ({_with_interval(arms[name])})" for name in names[:_MOST]]
            told += [f"{len(names) - _MOST} more"] if len(names) > _MOST else []
            parts.append(f"{len(names)} {one if len(names) == 1 else more}: {_list(told)}")
    rest = len(tested) - len(helps) - len(hurts)
    nothing = f" The other {rest} show nothing." if rest > 1 else " The other one shows nothing." if rest else ""
    total = f"{'of' if short else 'Of'} {len(tested)} orderers, " if len(tested) > 1 else ""
    return [f"{total}{'; '.join(parts)}.{nothing}"]


def _null(arms: dict[str, Difference], *, short: bool = False) -> list[str]:
    visible = [
        math.inf if one["smallest_visible"] is None else one["smallest_visible"]
        for one in arms.values()
        if one["verdict"] == "nothing"
    ]
    if not visible:
        return []
    # The middle one or the upper of two: a mean with infinity is no size.
    middle = float(np.quantile(visible, 0.5, method="higher")) if math.inf in visible else float(np.median(visible))
    # Rounded to a tenth, a small one must not read as no difference at all.
    size = percent(max(middle, 0.001))
    if middle >= 1:
        return ["With so few sets no difference whatever would be found reliably."]
    if short:
        return [
            f"For the median orderer without a finding, this study has 80 % power for a true difference of {size} points."
        ]
    return [
        f"Nothing found is no proof of no effect: of true differences of {size} points, studies like this one find four in "
        "five, of smaller ones fewer."
    ]


def _cheapest(helping: Sequence[PooledArm]) -> str:
    ranked = sorted(helping, key=lambda arm: (round(arm["cost"], 2), -arm["difference"]["value"]))
    least = round(ranked[0]["cost"], 2)
    cheap = [arm["name"] for arm in ranked if round(arm["cost"], 2) == least]
    if least <= 1.01:
        return f"{_list(cheap)} {'helps' if len(cheap) == 1 else 'help'} at no further token read."
    named = f"{cheap[0]} is the cheapest: it reads"
    if len(cheap) > 1:
        named = f"the cheapest are {_list(cheap)}: each reads" if len(cheap) < len(ranked) else "each reads"
    return (
        f"Of those that help, {named} {least:.1f} times the tokens of a random order, choosing included. No orderer that reads "
        "no more than a random order helps."
    )


def _spread(cells: Sequence[Cell]) -> str:
    sds = [cell["random"]["sd_orders"] for cell in cells if cell["random"]["sd_orders"] is not None]
    ranges = [max(values) - min(values) for cell in cells for values in cell["random"]["accuracy_by_set"]]
    parts = [(cell["random"]["sd_orders"], cell["random"]["sd_orders_true"]) for cell in cells]
    seen = sum(sd**2 for sd, real in parts if sd is not None and real is not None)
    real = sum(real**2 for sd, real in parts if sd is not None and real is not None)
    orders = sorted({cell["orders"] for cell in cells})
    tried = count(orders[0]) if len(orders) == 1 else f"{orders[0]} to {orders[-1]}"
    if orders[-1] == 1:
        return "One random order a set says nothing of how far orders lie apart."
    mean = percent(float(np.mean(ranges)))
    said = f"Between the worst and the best of {tried} random orders of a set lie {mean} points on average"
    if sds:
        said += f" (sd {percent(float(np.sqrt(np.mean(np.square(sds)))))}"
        said += f"; {percent(min(real / seen, 1.0), 0)} % of that variance is more than item noise)" if seen else ")"
    return said + "."


def _calibration(report: Report, selector: str) -> list[str]:
    own = [pair for pair in report["calibration"] if pair["selector"] == selector]
    random = [arm for pair in own for arm in pair["arms"] if arm["kind"] == "random"]
    if not random:
        return []
    change = float(np.mean([arm["change"]["value"] for arm in random]))
    found = {verdict: sum(arm["change"]["verdict"] == verdict for arm in random) for verdict in ("helps", "hurts")}
    tested = sum(_is_tested(arm["change"]) for arm in random)
    said = f"Contextual calibration changes the mean random order by {points(change)} points on average; "
    said += (
        f"beyond chance it raises it in {found['helps']} and lowers it in {found['hurts']} of {tested} cells."
        if tested
        else "no cell allows a test of that."
    )
    if 0 < tested < len(random):
        said += f" {len(random) - tested} more could not be tested."
    spreads = [(pair["spread_off"], pair["spread_on"]) for pair in own]
    if known := [(off, on) for off, on in spreads if off is not None and on is not None]:
        off, on = (float(np.sqrt(np.mean(np.square([pair[side] for pair in known])))) for side in (0, 1))
        said += f" The spread over orders goes from an sd of {percent(off)} to one of {percent(on)} points."
    return [said]


def _with_interval(one: Difference) -> str:
    if one["low"] is None:
        return f"{points(one['value'])} points"
    return f"{points(one['value'])} points, 95 % interval {points(one['low'])} to {points(one['high'])}"


def _list(parts: Sequence[Any]) -> str:
    named = [str(part) for part in parts]
    if len(named) > _MOST + 2:
        named = [*named[:_MOST], f"{len(named) - _MOST} others"]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
