"""The shape of `report.json`: every number that the page, the Markdown and the figures show, and nothing else.

Units: accuracies and shares are from 0 to 1, and differences from −1 to 1 (0.01 is one point); tokens are those of the model's
tokenizer; entropies are divided by log L, so 1 means that the L labels are equally frequent. A number is None if it cannot be
computed, which is the case with fewer than three sets, outcomes that do not differ, oracles, and generated answers. Every object
that has such a number explains it in `reason`: clauses separated by semicolons, each of which begins with the fields that it
applies to, unless it applies to all of them.

Shapes: S demonstration sets, R random orders of each set, L labels.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, final

FORMAT = "sparsort report 1"
LEVEL = 0.95
POWER = 0.8
# The report begins with a warning if the model predicts one label for at least this share of the rows.
ONE_LABEL = 0.95

Verdict = Literal["helps", "hurts", "nothing"]


class Difference(TypedDict):
    """A paired difference: an arm minus the mean random order of the same sets, or calibration on minus calibration off.

    Attributes:
        low, high: the interval at LEVEL.
        adjusted_low, adjusted_high: the interval at 1 − α/m for a family of m comparisons. An arm that cannot be tested counts
            in m too, because the best arm is picked from all of them.
        p: the p-value of the adjusted test.
        p_adjusted: the p-value after Holm's correction over the family.
        smallest_visible: the smallest true difference that a study like this one detects with POWER after the correction.
        sets_needed, items_needed: the sample size that would detect the observed difference with POWER after the correction;
            None if no number suffices.
        reason: why numbers are None. Without an interval there is no p, verdict or sample size either.
    """

    value: float
    low: float | None
    high: float | None
    adjusted_low: float | None
    adjusted_high: float | None
    p: float | None
    p_adjusted: float | None
    verdict: Verdict | None
    smallest_visible: float | None
    sets_needed: int | None
    items_needed: int | None
    reason: str | None


class RandomOrders(TypedDict):
    """The results of the random orders of one cell.

    Attributes:
        accuracy_by_set, entropy_by_set: (S, R).
        sd_orders: the observed standard deviation over the orders of a set.
        sd_noise: the part of it that is due to the finite number of items.
        sd_orders_true: the standard deviation without that part.
        real_share: the share of the observed variance that is not noise.
        sd_sets: the standard deviation between sets.
        label_share_by_set: (S, R, L).
    """

    accuracy: float
    low: float | None
    high: float | None
    accuracy_by_set: list[list[float]]
    sd_orders: float | None
    sd_noise: float | None
    sd_orders_true: float | None
    real_share: float | None
    sd_sets: float | None
    reason: str | None
    tokens: float
    label_share: list[float]
    label_entropy: float | None
    entropy_by_set: list[list[float]]
    label_share_by_set: list[list[list[float]]]


@final
class ArmNumbers(TypedDict):
    """One arm in one cell.

    Attributes:
        accuracy_by_set, label_entropy_by_set: (S,).
        percentile: the mean rank among the random orders of the same set, 0 to 100.
        choosing_tokens: tokens read to choose the order of one set.
        tokens_per_answer: `tokens`, and the choosing tokens divided by the number of items.
        by_query: whether the order depends on the query.
    """

    name: str
    kind: str
    accuracy: float
    low: float | None
    high: float | None
    accuracy_by_set: list[float]
    difference: Difference
    percentile: float
    tokens: float
    choosing_tokens: float
    tokens_per_answer: float
    label_share: list[float]
    label_entropy: float | None
    label_entropy_by_set: list[float]
    reason: str | None
    by_query: bool


@final
class CellNumbers(TypedDict):
    """The results of one cell: a task, a selector, a number of shots k, with or without contextual calibration."""

    id: str
    task: str
    selector: str
    k: int
    calibrated: bool
    labels: list[str]
    gold_share: list[float]
    items: int
    sets: int
    orders: int
    random: RandomOrders
    arms: list[ArmNumbers]


@final
class PooledArm(TypedDict):
    """One arm over several tasks.

    Attributes:
        clusters: number of demonstration sets over all tasks.
        cost: tokens per answer as a multiple of those of a random order, averaged over the arm's cells.
    """

    name: str
    kind: str
    tasks: list[str]
    clusters: int
    difference: Difference
    cost: float


@final
class Pooled(TypedDict):
    """All tasks together for one selector, with or without contextual calibration, and for one k or all of them (`k` is None)."""

    id: str
    selector: str
    k: int | None
    calibrated: bool
    tasks: list[str]
    arms: list[PooledArm]


class CalibrationArm(TypedDict):
    """The accuracy of one arm without and with contextual calibration; the mean random order has the kind "random"."""

    name: str
    kind: str
    off: float
    on: float
    change: Difference


@final
class CalibrationCell(TypedDict):
    """A cell without and with contextual calibration, over the sets that both share; `spread_off` and `spread_on` are the
    standard deviations over random orders."""

    id: str
    task: str
    selector: str
    k: int
    sets: int
    spread_off: float | None
    spread_on: float | None
    reason: str | None
    arms: list[CalibrationArm]


class Finding(TypedDict):
    """The text under one heading of the findings; `task` is None for all tasks, and `tested` is whether any arm has a p-value."""

    title: str
    task: str | None
    selector: str
    calibrated: bool
    tested: bool
    helps: list[str]
    hurts: list[str]
    sentences: list[str]


class OneLabel(TypedDict):
    """A warning that the model predicts one label for nearly every row of a cell, pooled over its random orders."""

    cell: str
    model: str | None
    label: str
    share: float
    gold_share: float
    text: str


class PromptTexts(TypedDict):
    """The texts of a task's prompts by id: demonstrations (question and answer) and test items."""

    demos: dict[str, str]
    items: dict[str, str]


class Report(TypedDict):
    """The whole report.

    Attributes:
        level: the level of the intervals.
        power: the power for which sample sizes and the smallest visible difference are computed.
        demonstrations: the sets, prompts and orders of every cell (`summary.inspect`).
        texts: the texts of demonstrations and items, by task.
    """

    format: str
    title: str
    level: float
    power: float
    provenance: dict[str, Any]
    tasks: list[str]
    warnings: list[OneLabel]
    notes: list[str]
    findings: list[Finding]
    cells: list[CellNumbers]
    pooled: list[Pooled]
    calibration: list[CalibrationCell]
    demonstrations: list[dict[str, Any]]
    texts: dict[str, PromptTexts]
