"""The text of a report: findings, notes and warnings, which are sentences made from its numbers by rule.

Contract: "helps" and "hurts" are verdicts after Holm's correction. Every other result is reported together with the smallest
difference that this study would detect, so that a null result is not read as evidence of no effect. Every sentence gives its
number. If there is none (fewer than three sets, or outcomes that do not differ), the sentence gives the reason and the next step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sparsort.curriculum.ablation.report.numbers.rows import (
    count,
    is_significant,
    join_names,
    percent,
    points,
    tested_arms,
)
from sparsort.curriculum.ablation.report.numbers.shape import (
    ONE_LABEL,
    CellNumbers,
    Difference,
    Finding,
    OneLabel,
    Pooled,
    PooledArm,
    Report,
)
from sparsort.curriculum.ablation.statistics.estimates import SET
from sparsort.curriculum.ablation.statistics.resampling import MIN_CLUSTERS, too_few

_MOST_ARMS = 6
_MOST_INCOMPLETE = 12
_MORE_SETS = "run sparsort ablate with --sets 3 or more (10 are better)"
_MORE_ROWS = "use more test rows, or harder ones"
# Shares are means of means, so one that is exactly at the limit may be slightly below it.
_ROUNDING = 1e-9


# Findings


def findings(report: Report) -> list[Finding]:
    """Findings on all tasks, then on every task, for each selector without and with contextual calibration."""
    views = list(dict.fromkeys((cell["selector"], cell["calibrated"]) for cell in report["cells"]))
    several = len({selector for selector, _ in views}) > 1
    parts = []
    for selector, calibrated in views:
        cells = [cell for cell in report["cells"] if (cell["selector"], cell["calibrated"]) == (selector, calibrated)]
        suffix = f", {selector} demonstrations" if several else ""
        suffix += ", with contextual calibration" if calibrated else ""
        if overall := _widest(report, selector, calibrated):
            parts.append(_over_tasks(report, overall, cells, suffix))
        for task in dict.fromkeys(cell["task"] for cell in cells):
            parts.append(_on_task([cell for cell in cells if cell["task"] == task], task, suffix))
    return parts


def _widest(report: Report, selector: str, calibrated: bool) -> Pooled | None:
    """The pooled panel over all k, or over the only k."""
    panels = [pool for pool in report["pooled"] if (pool["selector"], pool["calibrated"]) == (selector, calibrated)]
    return next((pool for pool in panels if pool["k"] is None), panels[0] if panels else None)


def _over_tasks(report: Report, pool: Pooled, cells: Sequence[CellNumbers], suffix: str) -> Finding:
    arms = tested_arms(pool)
    tasks = len(pool["tasks"])
    # In sentences an arm has its tasks after its name; `helps` and `hurts` have the plain names.
    labelled = {_name_with_tasks(arm, pool["tasks"]): arm["difference"] for arm in pool["arms"]}
    sentences = [*_verdicts(labelled), *_untested(labelled), *_null_result(arms)]
    if helping := [arm for arm in pool["arms"] if arm["difference"]["verdict"] == "helps"]:
        sentences.append(_cheapest(helping))
    sentences += [_spread(cells), _within_tasks(pool["tasks"], cells)]
    if pool["calibrated"]:
        sentences += _calibration(report, pool["selector"])
    return Finding(
        title=f"Over {'both' if tasks == 2 else f'all {tasks}'} tasks{suffix}",
        task=None,
        selector=pool["selector"],
        calibrated=pool["calibrated"],
        tested=any(map(_is_tested, arms.values())),
        helps=_named(arms, "helps"),
        hurts=_named(arms, "hurts"),
        sentences=sentences,
    )


def _name_with_tasks(arm: PooledArm, tasks: Sequence[str]) -> str:
    """The arm's name, with its tasks if it was not run on all of the panel's."""
    return arm["name"] if len(arm["tasks"]) == len(tasks) else f"{arm['name']} on {join_names(arm['tasks'])} alone"


def _within_tasks(tasks: Sequence[str], cells: Sequence[CellNumbers]) -> str:
    if not any(_is_tested(arm["difference"]) for cell in cells for arm in cell["arms"]):
        return "Nothing can be tested within a single task."
    helped_tasks = {
        cell["task"] for cell in cells if any(arm["difference"]["verdict"] == "helps" for arm in cell["arms"])
    }
    helped = [task for task in tasks if task in helped_tasks]
    if not helped:
        return "Within single tasks, which have fewer sets, no orderer helps beyond chance."
    where = f"only on {join_names(helped)}" if len(helped) < len(tasks) else "on each of them"
    return f"Within single tasks, which have fewer sets, an orderer helps beyond chance {where}."


def _on_task(cells: Sequence[CellNumbers], task: str, suffix: str) -> Finding:
    sentences, helps, hurts, tested = [], [], [], False
    for cell in cells:
        arms = tested_arms(cell)
        tested = tested or any(map(_is_tested, arms.values()))
        sentences.append(f"k = {cell['k']}: {' '.join(_in_cell(cell, arms))}")
        helps += [f"{name} (k = {cell['k']})" for name in _named(arms, "helps")]
        hurts += [f"{name} (k = {cell['k']})" for name in _named(arms, "hurts")]
    sentences.append(_spread(cells))
    return Finding(
        title=f"{task}{suffix}",
        task=task,
        selector=cells[0]["selector"],
        calibrated=cells[0]["calibrated"],
        tested=tested,
        helps=helps,
        hurts=hurts,
        sentences=sentences,
    )


def _in_cell(cell: CellNumbers, arms: dict[str, Difference]) -> list[str]:
    if few := too_few(cell["sets"], SET):
        consequence = "results do not generalise to other sets" if cell["sets"] == 1 else "no orderer was tested"
        return [f"{few}, so {consequence}; {_MORE_SETS}."]
    return [*_verdicts(arms, short=True), *_untested(arms), *_null_result(arms, short=True)]


def _is_tested(difference: Difference) -> bool:
    return difference["verdict"] is not None


def _named(arms: dict[str, Difference], verdict: str) -> list[str]:
    """The arms with this verdict, the largest difference first."""
    names = [name for name, difference in arms.items() if difference["verdict"] == verdict]
    return sorted(names, key=lambda name: -abs(arms[name]["value"]))


def _verdicts(arms: dict[str, Difference], *, short: bool = False) -> list[str]:
    tested = {name: difference for name, difference in arms.items() if _is_tested(difference)}
    if not tested:
        return []
    if not any(map(is_significant, tested.values())):
        return [_no_verdict(tested, short)]
    parts = []
    for verdict, plural in (("helps", "help"), ("hurts", "hurt")):
        if names := _named(arms, verdict):
            examples = [f"{name} ({_with_interval(arms[name])})" for name in names[:_MOST_ARMS]]
            examples += [f"{len(names) - _MOST_ARMS} more"] if len(names) > _MOST_ARMS else []
            parts.append(f"{len(names)} {verdict if len(names) == 1 else plural}: {join_names(examples)}")
    rest = sum(not is_significant(difference) for difference in tested.values())
    others = "The other one shows" if rest == 1 else f"The other {rest} show"
    total = f"{'of' if short else 'Of'} {len(tested)} orderers, " if len(tested) > 1 else ""
    return [f"{total}{'; '.join(parts)}." + (f" {others} no significant difference." if rest else "")]


def _no_verdict(tested: dict[str, Difference], short: bool) -> str:
    best = max(tested, key=lambda name: tested[name]["value"])
    gain = _with_interval(tested[best])
    if len(tested) == 1:
        return f"{best} does not differ significantly from the mean random order ({gain})."
    if short:
        return (
            "no orderer differs significantly from the mean random order. The largest gain, before Holm's correction, is that "
            f"of {best}: {gain}."
        )
    return (
        f"No orderer of {len(tested)} differs significantly from the mean random order. The largest gain is that of {best}: "
        f"{gain}. The best of {len(tested)} orderers may gain that much by chance."
    )


def _untested(arms: dict[str, Difference]) -> list[str]:
    """A sentence for each reason why arms have no test, with the next step."""
    by_reason: dict[str, list[str]] = {}
    for name, difference in arms.items():
        if not _is_tested(difference):
            by_reason.setdefault(difference["reason"] or "", []).append(name)
    sentences = []
    for reason, names in by_reason.items():
        # More sets do not help if the outcomes of all sets are the same.
        advice = _MORE_ROWS if "do not differ" in reason else _MORE_SETS
        which = "No orderer could" if len(names) == len(arms) else f"{join_names(names)} could not"
        sentences.append(f"{which} be tested: {reason}; {advice}.")
    return sentences


def _null_result(arms: dict[str, Difference], *, short: bool = False) -> list[str]:
    """What difference the study would detect, for the median arm without a significant difference."""
    visible = [
        math.inf if difference["smallest_visible"] is None else difference["smallest_visible"]
        for difference in arms.values()
        if difference["verdict"] == "nothing"
    ]
    if not visible:
        return []
    # With an infinite value, the median of an even number would average it with a finite one, so the upper of the two is taken.
    middle = float(np.quantile(visible, 0.5, method="higher")) if math.inf in visible else float(np.median(visible))
    if middle >= 1:
        return ["With so few sets, no difference of any size would be detected reliably."]
    # A tenth of a point is the least that is printed; a smaller size would read as no difference at all.
    size = percent(max(middle, 0.001))
    if short:
        return [
            "For the median orderer without a significant difference, this study has 80 % power for a true difference of "
            f"{size} points."
        ]
    return [
        "A null result is not evidence of no effect. For the median orderer without a significant difference, this design has "
        f"80 % power for a true difference of {size} points, and less for smaller ones."
    ]


def _cheapest(helping: Sequence[PooledArm]) -> str:
    # Costs that are printed alike count as equal.
    ranked = sorted(helping, key=lambda arm: (round(arm["cost"], 2), -arm["difference"]["value"]))
    least = round(ranked[0]["cost"], 2)
    cheapest = [arm["name"] for arm in ranked if round(arm["cost"], 2) == least]
    one = len(cheapest) == 1
    if least <= 1.01:
        return f"{join_names(cheapest)} {'helps' if one else 'help'} without reading more tokens than a random order."
    if len(cheapest) < len(ranked):
        subject = f"{join_names(cheapest)} {'is' if one else 'are'} the cheapest of those that help: {'it' if one else 'each'}"
    else:
        subject = cheapest[0] if one else "Each of those that help"
    return (
        f"{subject} reads {least:.1f} times as many tokens as a random order, including those read to choose the order. "
        "No orderer helps at the token cost of a random order."
    )


def _spread(cells: Sequence[CellNumbers]) -> str:
    """How much the accuracies of random orders differ, as means over cells and sets."""
    orders = sorted({cell["orders"] for cell in cells})
    if orders[-1] == 1:
        return "With one random order per set, the spread over orders is unknown."
    number = count(orders[0]) if len(orders) == 1 else f"{orders[0]} to {orders[-1]}"
    ranges = [max(values) - min(values) for cell in cells for values in cell["random"]["accuracy_by_set"]]
    sds = [cell["random"]["sd_orders"] for cell in cells if cell["random"]["sd_orders"] is not None]
    pairs = [(cell["random"]["sd_orders"], cell["random"]["sd_orders_true"]) for cell in cells]
    # Variances are additive, standard deviations are not, so both are pooled as variances.
    observed = sum(sd**2 for sd, true_sd in pairs if sd is not None and true_sd is not None)
    true = sum(true_sd**2 for sd, true_sd in pairs if sd is not None and true_sd is not None)
    mean_range = percent(float(np.mean(ranges)))
    text = f"The best and the worst of {number} random orders of a set differ by {mean_range} points on average"
    if sds:
        text += f" (sd over orders {percent(float(np.sqrt(np.mean(np.square(sds)))))} points"
        text += f"; {percent(min(true / observed, 1.0), 0)} % of that variance is not item noise)" if observed else ")"
    return text + "."


def _calibration(report: Report, selector: str) -> list[str]:
    """How contextual calibration changes the mean random order, and the spread over orders."""
    pairs = [pair for pair in report["calibration"] if pair["selector"] == selector]
    random = [arm["change"] for pair in pairs for arm in pair["arms"] if arm["kind"] == "random"]
    if not random:
        return []
    mean = float(np.mean([change["value"] for change in random]))
    tested = sum(map(_is_tested, random))
    text = f"Contextual calibration changes the accuracy of the mean random order by {points(mean)} points on average"
    if tested:
        raised, lowered = (sum(change["verdict"] == verdict for change in random) for verdict in ("helps", "hurts"))
        text += f"; it is significantly higher in {raised} and lower in {lowered} of {tested} cells."
    else:
        text += "; no cell allows a test of this change."
    if 0 < tested < len(random):
        text += f" {len(random) - tested} more could not be tested."
    spreads = [(pair["spread_off"], pair["spread_on"]) for pair in pairs]
    if known := [(off, on) for off, on in spreads if off is not None and on is not None]:
        off, on = (float(np.sqrt(np.mean(np.square([pair[side] for pair in known])))) for side in (0, 1))
        text += f" The sd over orders changes from {percent(off)} to {percent(on)} points."
    return [text]


def _with_interval(difference: Difference) -> str:
    if difference["low"] is None:
        return f"{points(difference['value'])} points"
    return f"{points(difference['value'])} points, 95 % interval {points(difference['low'])} to {points(difference['high'])}"


# Notes


def notes(report: Report) -> list[str]:
    """The limitations of this study that a reader must know, one sentence each."""
    cells = report["cells"]
    texts = []
    if one := [cell["id"] for cell in cells if cell["sets"] == 1]:
        texts.append(
            f"Only one demonstration set in {join_names(one)}: results there do not generalise to other sets, and nothing is "
            "tested."
        )
    if two := [cell["id"] for cell in cells if cell["sets"] == 2]:
        texts.append(
            f"Only two demonstration sets in {join_names(two)}: too few for an interval, a test or a sample size; {_MORE_SETS}."
        )
    # From 7 sets on there are enough sign vectors for the bootstrap; with fewer, intervals are by t.
    if few := [cell["id"] for cell in cells if MIN_CLUSTERS <= cell["sets"] < 7]:
        texts.append(
            f"Fewer than 7 demonstration sets in {join_names(few)}: intervals there assume that the means of sets are close to "
            "normally distributed."
        )
    sets = sorted({cell["sets"] for cell in cells})
    if len(sets) > 1:
        texts.append(
            f"Cells have {sets[0]} to {sets[-1]} demonstration sets; in pooled figures every task has the same weight."
        )
    if few := [cell["id"] for cell in cells if cell["orders"] < 10]:
        texts.append(
            f"Fewer than 10 random orders in {join_names(few)}: the mean random order, which every arm is compared with, is "
            "itself uncertain."
        )
    # Only arms that some cell has can be missing from another.
    every = {arm["name"] for cell in cells for arm in cell["arms"]}
    missing = {cell["id"]: sorted(every - {arm["name"] for arm in cell["arms"]}) for cell in cells}
    if gaps := [f"{cell} ({join_names(names)})" for cell, names in missing.items() if names]:
        texts.append(f"Some orderers were not run in every cell. Missing: {join_names(gaps)}.")
    if one := [cell["id"] for cell in cells if cell["labels"] and max(cell["gold_share"], default=0) == 1]:
        texts.append(
            f"All test items have the same label in {join_names(one)}: accuracy there is the share of that label among the "
            "predictions."
        )
    if incomplete := list(dict.fromkeys(map(str, report["provenance"].get("incomplete") or ()))):
        listed, more = incomplete[:_MOST_INCOMPLETE], len(incomplete) - _MOST_INCOMPLETE
        listed += [f"{more} more, listed with the provenance"] if more > 0 else []
        texts.append(f"Unfinished, and therefore excluded: {'; '.join(listed)}.")
    if any(cell["calibrated"] for cell in cells):
        texts.append(
            "Cells with and without contextual calibration have the same sets and items, so one does not replicate the other."
        )
    return texts


# Warnings


def one_label(cells: Sequence[CellNumbers], model: object = None) -> list[OneLabel]:
    """A warning for every cell in which one label has at least the share `ONE_LABEL` of the predictions under random orders.

    If that label also has this share of the gold labels, the warning says so: then the test rows are one-sided, and the model
    may be right.

    Args:
        cells: the cells of the report.
        model: the name of the model, if it is known.
    """
    warnings = []
    for cell in cells:
        share_L = cell["random"]["label_share"]
        if len(share_L) > 1 and max(share_L) >= ONE_LABEL - _ROUNDING:
            label = share_L.index(max(share_L))
            warnings.append(
                OneLabel(
                    cell=cell["id"],
                    model=None if model is None else str(model),
                    label=cell["labels"][label],
                    share=share_L[label],
                    gold_share=cell["gold_share"][label],
                    text=_warning(cell, label, "the model" if model is None else str(model)),
                )
            )
    return warnings


def _warning(cell: CellNumbers, label: int, model: str) -> str:
    share, gold_share = cell["random"]["label_share"][label], cell["gold_share"][label]
    calibration = ", with contextual calibration" if cell["calibrated"] else ""
    text = (
        f"{cell['task']}, k = {cell['k']}, {cell['selector']} demonstrations{calibration}: {model} predicts "
        f"{cell['labels'][label]!r} for {percent(share)} % of the test rows, over all random orders. "
    )
    if gold_share >= ONE_LABEL - _ROUNDING:
        return text + (
            f"That label is also {percent(gold_share)} % of the gold labels, so these test rows can hardly distinguish a good "
            "order from a bad one. Choose test rows with more of the other labels."
        )
    consequence = (
        "differences between orders come from the few other rows" if share < 1 - _ROUNDING else "orders cannot differ"
    )
    text += (
        f"It is {percent(gold_share)} % of the gold labels, so accuracy here measures how often that label is right, not the "
        f"effect of an order: {consequence}. Try another prompt or model"
    )
    return text + ("." if cell["calibrated"] else ", or contextual calibration.")
