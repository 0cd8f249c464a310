"""A summary of a plan, stage by stage: shares, difficulty, length and groups of the examples in its batches.

Contract: NumPy only; pure functions of a plan. Every number comes from `plan.batch`, so it describes exactly what training will
see. Up to `ALL_BATCHES` batches and `ALL_EXAMPLES` examples, all batches are read and the numbers are exact. Above that, evenly
spaced batches are sampled, and the result contains their number. One pass shows each example exactly once; a pool draws with
replacement across batches, so it can miss examples, and the share that it misses is counted or estimated.

Legend: N rows, K batches of an epoch, P parts, S sampled batches, G groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.ranking import group_names
from sparsort.errors import SparsortError
from sparsort.terminal.progress import progress

ALL_BATCHES = 10_000
ALL_EXAMPLES = 5_000_000
_SAMPLE = 2000
_MOST_PARTS, _PARTS = 20, 10


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Statistics of some numbers: mean of the finite ones, minimum, maximum, and the 10, 50 and 90 % quantiles."""

    mean: float
    lowest: float
    low: float
    median: float
    high: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """Consecutive batches taken together, such as those of a stage.

    Attributes:
        stages: number of the first and of the last stage, from 0.
        batches: number of the first and of the last batch, from 0.
        looked_at: number of batches that the statistics below come from.
        examples: number of examples in all batches; an estimate if batches were sampled and the plan does not determine it.
        share: share of the examples that is available at the first and at the last batch.
        difficulty: statistics over the examples with a score; None if no example has one.
        unscored: share of the examples without a score.
        length: statistics of the tokens per example; None if lengths are unknown.
        padding: share of padding among a batch's tokens (longest × count, or the packed sequences).
        groups: share of each group, in the order of the group names; None without groups.
    """

    stages: tuple[int, int]
    batches: tuple[int, int]
    looked_at: int
    examples: int
    share: tuple[float, float]
    difficulty: Distribution | None
    unscored: float
    length: Distribution | None
    padding: float | None
    groups: list[float] | None


@dataclass(frozen=True, kw_only=True)
class PlanCoverage:
    """How often an epoch shows the examples.

    Attributes:
        never: share of the examples that the epoch does not show.
        mean: average number of times that an example is shown.
        most: number of times that the most frequent example is shown; None if it was not counted.
        exact: whether every batch was counted; if not, `never` is an expected value.
    """

    never: float
    mean: float
    most: int | None
    exact: bool


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """Statistics of an epoch of a plan; `to_json` returns them for scripts.

    Attributes:
        what: the curriculum in one line.
        scores: name → scorer, for each score that the difficulty was computed from.
        combination: how several scores were combined; None for one score.
        rows: number of rows of the data.
        batches: number of batches in an epoch.
        smallest_batch: number of items in the smallest batch.
        unscored: number of rows without a score.
        cut: number of rows longer than max_length; None if the plan has no lengths.
        unused_scores: number of scores that belong to no row of the data.
        below_batch: number of batches of a pool for which the pacing allows fewer rows than a batch needs.
        group_names: names of the groups; empty without groups.
        group_shares: share of each group in the data, in the order of the names.
        coverage: how often the epoch shows an example.
        parts: statistics stage by stage. Many stages are merged into fewer parts; an epoch of one stage is cut into ten parts.
    """

    what: str
    scores: dict[str, str]
    combination: str | None
    epoch: int
    rows: int
    batches: int
    smallest_batch: int
    settings: dict[str, Any]
    fingerprint: str
    unscored: int
    cut: int | None
    unused_scores: int
    below_batch: int
    group_names: list[str]
    group_shares: list[float]
    coverage: PlanCoverage
    parts: list[PlanPart]

    @property
    def exact(self) -> bool:
        """Whether every batch was read."""
        return all(part.looked_at == part.batches[1] - part.batches[0] + 1 for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values, with infinities and NaN as text, since JSON has no numbers for them."""
        return {**_as_json(asdict(self)), "exact": self.exact}


@dataclass(frozen=True)
class RowAttributes:
    """Lengths and groups of the rows for display: (N,) tokens, and (N,) indices into the names of the groups."""

    lengths: NDArray[Any] | None
    groups: NDArray[Any] | None
    names: list[str]

    @classmethod
    def of(
        cls, plan: CurriculumPlan, lengths: ArrayLike | None = None, groups: Sequence[Any] | None = None
    ) -> RowAttributes:
        """The lengths and groups of the plan, or others that are used for display only: (N,) tokens, (N,) group of each row.

        Raises:
            SparsortError: there is not exactly one per row.
        """
        for name, given in (("lengths", lengths), ("groups", groups)):
            if given is not None and len(np.asarray(given)) != plan.n_rows:
                raise SparsortError(
                    f"{len(np.asarray(given))} {name} to show for the {plan.n_rows} rows of the plan. Pass one per row."
                )
        tokens = plan.lengths if lengths is None else np.asarray(lengths)
        # Lengths of the plan are after the cut already.
        if lengths is not None and plan.settings.max_length is not None:
            tokens = np.minimum(np.asarray(lengths), plan.settings.max_length)
        if groups is None:
            return cls(tokens, plan.groups, list(plan.notes.get("groups", [])))
        names, codes = np.unique(np.array(group_names(groups, "groups")), return_inverse=True)
        return cls(tokens, codes.astype(np.int32), [str(name) for name in names])

    def shares(self, codes: NDArray[Any]) -> list[float]:
        """Return the share of each group among the rows with these groups."""
        shares: list[float] = (np.bincount(codes, minlength=len(self.names)) / len(codes)).tolist()
        return shares


def summarise(
    plan: CurriculumPlan,
    *,
    epoch: int = 0,
    lengths: ArrayLike | None = None,
    groups: Sequence[Any] | None = None,
    all_batches: int = ALL_BATCHES,
) -> PlanSummary:
    """Summarise an epoch of a plan.

    Args:
        plan: a plan of either mode.
        epoch: number of the epoch, from 0.
        lengths: (N,) tokens of each row, by default those of the plan.
        groups: (N,) group of each row, by default those of the plan.
        all_batches: the most batches that are all read; above, batches are sampled.

    Raises:
        SparsortError: lengths or groups do not fit the rows, or the epoch is before the first one of a revised plan.
    """
    attributes = RowAttributes.of(plan, lengths, groups)
    edges = _part_edges(plan, epoch)
    count = edges[-1] - edges[0]
    # The first batch stands for all of them; only with a token budget do batches differ by more than one example.
    size = max(1, len(plan.batch(edges[0], epoch)))
    sample = None
    if count > all_batches or count * size > ALL_EXAMPLES:
        sample = min(all_batches, max(_PARTS, min(_SAMPLE, ALL_EXAMPLES // size)))
    most = None if sample is None else max(1, sample // (len(edges) - 1))
    parts = measure_batches(plan, edges, attributes, epoch=epoch, most=most)
    return PlanSummary(
        what=plan.settings.describe(),
        scores={name: str(origin.get("scorer", "unknown")) for name, origin in plan.notes.get("scores", {}).items()},
        combination=plan.notes.get("combination"),
        epoch=epoch,
        rows=plan.n_rows,
        batches=plan.n_batches,
        smallest_batch=plan.smallest_batch,
        settings=plan.settings.to_json(),
        fingerprint=plan.fingerprint,
        unscored=int(np.count_nonzero(np.isnan(plan.difficulty))),
        cut=plan.notes.get("cut"),
        unused_scores=int(plan.notes.get("unused_scores", 0)),
        below_batch=plan.notes.get("below_batch", 0),
        group_names=attributes.names,
        group_shares=[] if attributes.groups is None else attributes.shares(attributes.groups),
        coverage=coverage_of(plan, epoch, edges[0], sample),
        parts=parts,
    )


def measure_batches(
    plan: CurriculumPlan, edges: Sequence[int], attributes: RowAttributes, *, epoch: int = 0, most: int | None = None
) -> list[PlanPart]:
    """Compute the statistics of the parts of an epoch.

    Args:
        plan: the plan.
        edges: (P + 1,) strictly increasing numbers of each part's first batch, followed by the end of the last part.
        attributes: lengths and groups of the rows.
        epoch: number of the epoch, from 0.
        most: the most batches to sample from a part, evenly spaced; None for all.
    """
    with progress("batches", sum(len(spaced(*pair, most)) for pair in itertools.pairwise(edges))) as advance:
        parts = []
        for first, last in itertools.pairwise(edges):
            numbers = spaced(first, last, most)
            parts.append(_part(plan, first, last, numbers, attributes, epoch))
            advance(len(numbers))
    return parts


def first_batch(plan: CurriculumPlan, epoch: int) -> int:
    """The first batch of an epoch that the plan contains: 0, unless the plan was revised in the middle of this epoch."""
    revised = plan.revision or {}
    return revised.get("start", 0) if revised.get("epoch") == epoch else 0


def _part_edges(plan: CurriculumPlan, epoch: int) -> list[int]:
    """The edges of the parts: stages, which are merged if there are many, or equal parts if there is only one stage."""
    stages = plan.n_stages
    if stages == 1:
        edges = [p * plan.n_batches // _PARTS for p in range(_PARTS + 1)]
    else:
        parts = min(stages, _MOST_PARTS)
        edges = [plan.stage_edges[p * stages // parts] for p in range(parts + 1)]
    # The set merges edges before the first batch of a revised plan, and parts without a batch.
    first = first_batch(plan, epoch)
    return sorted({max(first, edge) for edge in edges})


def _part(
    plan: CurriculumPlan, first: int, last: int, numbers: Sequence[int], attributes: RowAttributes, epoch: int
) -> PlanPart:
    batches = [plan.batch(number, epoch) for number in numbers]
    rows = np.concatenate(batches)
    difficulty = plan.difficulty[rows].astype(np.float64)
    scored = difficulty[~np.isnan(difficulty)]
    stages = (plan.stage(first), plan.stage(last - 1))
    examples = len(rows)
    if len(numbers) < last - first:
        examples = round(len(rows) * (last - first) / len(numbers))
        # In one pass, the number of examples in whole stages is known exactly.
        whole = [plan.stage_edges[stages[0]], plan.stage_edges[stages[1] + 1]] == [first, last]
        if plan.settings.mode == "one_pass" and whole:
            examples = plan.stage_places[stages[1] + 1] - plan.stage_places[stages[0]]
    length = padding = shares = None
    if attributes.lengths is not None:
        length = _distribution(attributes.lengths[rows].astype(np.float64))
        padding = _padding(plan, numbers, batches, attributes.lengths, epoch)
    if attributes.groups is not None:
        shares = attributes.shares(attributes.groups[rows])
    return PlanPart(
        stages=stages,
        batches=(first, last - 1),
        looked_at=len(numbers),
        examples=examples,
        share=(plan.share(first, epoch), plan.share(last - 1, epoch)),
        difficulty=_distribution(scored),
        unscored=1 - len(scored) / len(rows),
        length=length,
        padding=padding,
        groups=shares,
    )


def _distribution(values: NDArray[np.float64]) -> Distribution | None:
    if not values.size:
        return None
    ranked = np.sort(values)
    finite = ranked[np.isfinite(ranked)]
    # Quantiles are order statistics without interpolation, so infinite values cause no NaN.
    low, median, high = (float(ranked[math.ceil(q * len(ranked)) - 1]) for q in (0.1, 0.5, 0.9))
    mean = float(finite.mean()) if finite.size else median
    return Distribution(
        mean=mean, lowest=float(ranked[0]), low=low, median=median, high=high, highest=float(ranked[-1])
    )


def _padding(
    plan: CurriculumPlan,
    numbers: Sequence[int],
    batches: Sequence[NDArray[np.int64]],
    lengths: NDArray[Any],
    epoch: int,
) -> float:
    capacity = plan.settings.pack_length
    used = sum(int(lengths[rows].sum()) for rows in batches)
    if capacity is not None:
        room = sum(len(plan.bins(number, epoch)) for number in numbers) * capacity
    else:
        # Without packing, every example is padded to the longest one of its batch.
        room = sum(int(lengths[rows].max()) * len(rows) for rows in batches)
    return 1 - used / max(1, room)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def coverage_of(plan: CurriculumPlan, epoch: int, first: int = 0, sample: int | None = None) -> PlanCoverage:
    """How often an epoch shows each example, from batch `first` on.

    `sample` is the number of evenly spaced batches of a pool that are read; None reads all.
    """
    n, count = plan.n_rows, plan.n_batches - first
    if plan.settings.mode == "one_pass":
        return PlanCoverage(never=0.0, mean=1.0, most=1, exact=True)
    numbers = spaced(first, plan.n_batches, sample)
    with progress("draws", len(numbers)) as advance:
        drawn = []
        for number in numbers:
            drawn.append(plan.batch(number, epoch))
            advance(1)
    mean = sum(map(len, drawn)) / len(numbers) * count / n
    if sample is None or len(numbers) == count:
        rows, times = np.unique(np.concatenate(drawn), return_counts=True)
        return PlanCoverage(never=1 - len(rows) / n, mean=mean, most=int(times.max()), exact=True)
    return PlanCoverage(never=_expected_never(plan, numbers, drawn, count), mean=mean, most=None, exact=False)


def _expected_never(
    plan: CurriculumPlan, numbers: Sequence[int], drawn: Sequence[NDArray[np.int64]], count: int
) -> float:
    """The expected share of rows that no batch draws; each sampled batch represents count / S batches.

    A batch that draws c of the first h rows of the order misses one of them with probability 1 − c/h. Availability only grows,
    so all rows between two successive values of h are available to the same batches.
    """
    n = plan.n_rows
    available_S = np.array([round(plan.share(number) * n) for number in numbers])
    codes = plan.groups if plan.settings.quotas is not None else None
    sizes = [n] if codes is None else np.bincount(codes).tolist()
    never_shown = 0.0
    for group, size in enumerate(sizes):
        drawn_S = np.array([len(rows) if codes is None else np.count_nonzero(codes[rows] == group) for rows in drawn])
        # A batch with quotas draws its full quota even where the pacing offers less.
        own_S = np.maximum(-(-available_S * size // n), drawn_S)
        with np.errstate(divide="ignore"):
            log_missed_S = np.log1p(-drawn_S / np.maximum(own_S, 1)) * count / len(numbers)
        # The probability that no batch from here on draws a row that is newly available.
        survival_S = np.exp(np.cumsum(log_missed_S[::-1])[::-1])
        own_S = np.maximum.accumulate(own_S)
        never_shown += float(np.diff(own_S, prepend=0) @ survival_S) + size - int(own_S[-1])
    return never_shown / n


def spaced(first: int, last: int, most: int | None) -> range | list[int]:
    """At most `most` evenly spaced integers from `first` up to, but excluding, `last`; all of them if `most` is None."""
    count = last - first
    if most is None or most >= count:
        return range(first, last)
    return [first + (2 * i + 1) * count // (2 * most) for i in range(most)]
