"""The shape of `report.json`: every number that the page, the Markdown and the figures show, and nothing else.

Units: accuracies and shares from 0 to 1; differences likewise (0.01 is one point); tokens as counted by the model's tokenizer;
entropies as a share of log L, so 1 is an even use of the L labels. A number that cannot be computed is None: fewer than three
sets, outcomes that do not differ, an oracle, an answer that is generated. Every object with a number that is None says why in its
`reason`: clauses, separated by semicolons, each beginning with the fields that it is about unless it is about all of them.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, final

FORMAT = "sparsort report 1"
LEVEL = 0.95
POWER = 0.8
# A model that gives one label to this share of the rows is reported before everything else.
ONE_LABEL = 0.95

Verdict = Literal["helps", "hurts", "nothing"]


class Difference(TypedDict):
    """A paired difference to the mean random order of the same sets (or, for calibration, of on to off).

    `low`, `high`: interval at LEVEL. `adjusted_low`, `adjusted_high`: at 1 − α/m, for the m comparisons of the family. `p`, and
    `p_adjusted` by Holm over the family. `smallest_visible`: the smallest true difference that a study like this one finds,
    after the correction, with POWER. `sets_needed`, `items_needed`: to find the difference seen, likewise; None where no
    number suffices. Without an interval there is no p, verdict or sample size either, and `reason` says why. An arm that
    cannot be tested still counts in m, as one that is never rejected: the claim is picked from all m.
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


class Spread(TypedDict):
    """What the random orders of one cell did; arrays are (S, R) and (S, R, L).

    `sd_orders`: over orders of one set, as seen. `sd_noise`: the part that a finite number of items gives. `sd_orders_true`:
    without it. `real_share`: its share of the variance. `sd_sets`: between sets. `reason`: why a number is None.
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
    """One arm in one cell. `percentile`: its mean place among the random orders of each set, 0 to 100. `reason`: why `low`
    and `high`, or the entropy, are None."""

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
class Cell(TypedDict):
    """One group: task × selector × k × contextual calibration."""

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
    random: Spread
    arms: list[ArmNumbers]


@final
class PooledArm(TypedDict):
    """One arm over several tasks. `cost`: tokens an answer, over those of a random order, mean over its cells."""

    name: str
    kind: str
    tasks: list[str]
    clusters: int
    difference: Difference
    cost: float


@final
class Pooled(TypedDict):
    """Tasks together, for one selector and calibration: every k apart, or all of them (`k` None)."""

    id: str
    selector: str
    k: int | None
    calibrated: bool
    tasks: list[str]
    arms: list[PooledArm]


class CalibrationArm(TypedDict):
    """What contextual calibration changes for one arm; of kind "random" is the mean random order."""

    name: str
    kind: str
    off: float
    on: float
    change: Difference


class CalibrationCell(TypedDict):
    """Contextual calibration off and on, over the sets that both cells share; `spread_off`, `spread_on`: sd over orders, or
    None, and `reason` says why."""

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
    """What the numbers say in words, for one heading; `task` None: of all tasks. `tested`: some orderer had a p-value."""

    title: str
    task: str | None
    selector: str
    calibrated: bool
    tested: bool
    helps: list[str]
    hurts: list[str]
    sentences: list[str]


class OneLabel(TypedDict):
    """A cell whose model gives one label to nearly every row, its random orders pooled, with the label's share of the gold
    labels; `text` says it to a reader."""

    cell: str
    model: str | None
    label: str
    share: float
    gold_share: float
    text: str


class PromptTexts(TypedDict):
    """What a task's prompts are made of, by id: demonstrations, question and answer, and test items."""

    demos: dict[str, str]
    items: dict[str, str]


class Report(TypedDict):
    """Everything; `warnings` come before all else.

    `demonstrations` lists, for every cell, the sets, prompts and orders to inspect (`inspection.py`); `texts` has
    their words by task."""

    format: str
    title: str
    level: float
    power: float
    provenance: dict[str, Any]
    tasks: list[str]
    warnings: list[OneLabel]
    notes: list[str]
    findings: list[Finding]
    cells: list[Cell]
    pooled: list[Pooled]
    calibration: list[CalibrationCell]
    demonstrations: list[dict[str, Any]]
    texts: dict[str, PromptTexts]
