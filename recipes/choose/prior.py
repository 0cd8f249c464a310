"""The prior of PDO: the label shares that it compares the model's predictions with.

Contract: everything except the estimate is decided before a model is loaded, and every mistake in the call is reported by then.
The prior "estimated" assumes that pool and queries differ only in their label shares
(`curriculum.demos.criteria.label_bias`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.splits import alike_rows
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.demos.criteria import CRITERIA, parts_of
from sparsort.curriculum.demos.criteria.label_bias import (
    PriorName,
    evenly_by_label,
    fit_bias,
    given_shares,
    named_shares,
    shares_by_em,
)
from sparsort.errors import SparsortError, unknown_choice
from sparsort.paths import column_of
from sparsort.storage.integrity import parse_json
from sparsort.values import text_if_any

Rows = Sequence[Mapping[str, Any]]
Prior = PriorName | Mapping[str, float] | str | Path

# The most labelled rows that the model reads, under one order, and the fewest rows with which the default prior is estimated.
LABELLED_ROWS, FEWEST_ROWS = 64, 16
# Rows that are compared with demonstrations and queries at once; usually the first block has enough rows.
_BLOCK = 4 * LABELLED_ROWS
_CRITERIA_WITH_PRIOR = CRITERIA.needing("prior")


@dataclass(frozen=True, kw_only=True, eq=False)
class PriorPlan:
    """A prior, or how it will be estimated.

    Attributes:
        source: "uniform", "pool", "mixed", "estimated", "given", or a file's name.
        labels: the L label values.
        shares: (L,) shares that sum to 1; None until they are estimated.
        labelled: the rows on which the model's bias is fitted for an estimate.
        notes: remarks for the user, one sentence each.
    """

    source: str
    labels: tuple[str, ...]
    shares: NDArray[np.float64] | None
    labelled: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The prior as JSON values."""
        shares = [] if self.shares is None else [round(float(share), 4) for share in self.shares]
        return {
            "source": self.source,
            "shares": dict(zip(self.labels, shares, strict=True)),
            "labelled_rows": len(self.labelled),
        }

    def sentence(self) -> str:
        """The prior in words."""
        shares = self.summary()["shares"]
        return f"Prior of PDO: {self.source} ({', '.join(f'{value} {share:.3g}' for value, share in shares.items())})."

    def estimate(self, queries_PL: Any, labelled_NL: Any, gold_N: Sequence[int]) -> PriorPlan:
        """The plan with its shares, which EM estimates from label scores under one order.

        Args:
            queries_PL: log-probabilities of L labels for P queries.
            labelled_NL: log-probabilities of the labels for N labelled rows.
            gold_N: the right label of each labelled row.
        """
        bias = fit_bias(labelled_NL, gold_N)
        unseen = [value for value, count in zip(self.labels, bias.rows, strict=True) if not count]
        notes = list(self.notes)
        if not bias.informative:
            notes.append(
                f"The model's predictions do not tell the labels of the {len(self.labelled)} labelled rows apart, so the "
                "queries' label shares cannot be estimated: the prior is uniform."
            )
        elif unseen:
            notes.append(f"No labelled row has the label {', '.join(unseen)}; the model's bias for it was taken as 0.")
        return replace(self, shares=shares_by_em(queries_PL, bias), notes=tuple(notes))


def reads_prior(by: str) -> bool:
    """Whether a criterion, or one of those joined by "+", compares predictions with a prior."""
    return any(CRITERIA[part].with_prior or part in _CRITERIA_WITH_PRIOR for part in parts_of(by) if part in CRITERIA)


def with_prior(by: str) -> str:
    """The criterion in the variant that reads a prior: "pdo" becomes "pdo_prior", unless "pdo_prior" is joined to it already."""
    parts = parts_of(by)
    variants = [(part, CRITERIA[part].with_prior) for part in parts]
    return "+".join(part if variant is None or variant in parts else variant for part, variant in variants)


def plan_prior(
    task: Task,
    by: str,
    prior: Prior | None,
    demos: Rows,
    queries: Rows,
    pool: Rows,
    *,
    compared: Sequence[str],
    reads_queries: bool,
    seed: int,
) -> PriorPlan:
    """Decide the prior.

    By default it is "estimated" if that is possible, "mixed" if the queries are rows of the pool, and "uniform" otherwise;
    for `by="pdo_prior"` it is "pool".

    Args:
        task: the task with its labels.
        by: a criterion that reads a prior.
        prior, demos, queries: see `choose_order`.
        pool: labelled rows; rows without a label of the task do not count.
        compared: the fields by which rows are compared.
        reads_queries: whether the criterion reads `queries`, and not probes sampled from the model.
        seed: seed for the draw of labelled rows.

    Raises:
        SparsortError: an unknown prior, one that does not fit the labels, or one for which rows are missing.
    """
    labels = tuple(task.labels or ())
    prior = _default_with_pool(by, prior)
    if prior is None:
        return _default_plan(
            task, labels, demos, queries, pool, compared=compared, reads_queries=reads_queries, seed=seed
        )
    if prior == "estimated":
        labelled = _labelled_rows(task, compared, demos, queries, pool, seed) if reads_queries else []
        return _estimate_plan(labels, labelled, reads_queries=reads_queries)
    if isinstance(prior, Mapping):
        return PriorPlan(source="given", labels=labels, shares=given_shares(labels, prior, "prior"))
    if prior == "uniform":
        return _uniform(labels)
    if prior == "pool":
        return PriorPlan(source="pool", labels=labels, shares=_counted(labels, _pool_counts(task, pool), "the pool"))
    if prior == "mixed":
        return _mixed(task, labels, pool)
    return PriorPlan(source=Path(str(prior)).name, labels=labels, shares=_file_shares(prior, task.label, labels))


def _default_with_pool(by: str, prior: Prior | None) -> Prior | None:
    """The prior, which is "pool" by default for a criterion such as "pdo_prior"."""
    pooled = next((part for part in parts_of(by) if part in _CRITERIA_WITH_PRIOR), None)
    if pooled is not None and prior in ("uniform", "mixed", "estimated"):
        (plain,) = CRITERIA.names(lambda entry: entry.with_prior == pooled)
        raise SparsortError(
            f"the criterion {pooled!r} is {plain!r} with the prior 'pool', and the prior {prior!r} was given. "
            f"Take the criterion {plain!r} (--criterion {plain})."
        )
    return "pool" if prior is None and pooled is not None else prior


def _default_plan(
    task: Task,
    labels: tuple[str, ...],
    demos: Rows,
    queries: Rows,
    pool: Rows,
    *,
    compared: Sequence[str],
    reads_queries: bool,
    seed: int,
) -> PriorPlan:
    """The default prior, with a note that says why it is not "estimated" if it is not."""
    if not reads_queries:
        note = "The criterion reads probes sampled from the model, so the label shares of queries were not estimated."
        return _uniform(labels, note)
    if _are_rows_of(task, queries, pool):
        note = (
            "The queries are rows of the pool, so they do not show which label shares your own queries have. Pass those "
            "(--queries FILE) to have their shares estimated, or take the prior 'pool' (--prior pool) if they have the shares of "
            "the pool."
        )
        return _mixed(task, labels, pool, note)
    if not pool:
        note = (
            "No labelled rows of the pool were given (pool=), which are needed to estimate the queries' label shares; prior= "
            "names another prior."
        )
        return _uniform(labels, note)
    labelled = _labelled_rows(task, compared, demos, queries, pool, seed)
    if len(labelled) < FEWEST_ROWS:
        note = (
            f"{len(labelled)} labelled rows remain besides the demonstrations and the queries; by default, the queries' label "
            f"shares are estimated with {FEWEST_ROWS} or more."
        )
        return _uniform(labels, note)
    return _estimate_plan(labels, labelled, reads_queries=True)


def _uniform(labels: tuple[str, ...], *notes: str) -> PriorPlan:
    shares = named_shares("uniform", np.zeros(len(labels)))
    return PriorPlan(source="uniform", labels=labels, shares=shares, notes=notes)


def _mixed(task: Task, labels: tuple[str, ...], pool: Rows, *notes: str) -> PriorPlan:
    counts = _pool_counts(task, pool)
    shares = named_shares("mixed", [counts[value] for value in labels])
    return PriorPlan(source="mixed", labels=labels, shares=shares, notes=notes)


def _estimate_plan(labels: tuple[str, ...], labelled: list[dict[str, Any]], *, reads_queries: bool) -> PriorPlan:
    if not reads_queries:
        raise SparsortError(
            "the prior 'estimated' is that of your queries, and this criterion reads probes sampled from the model. Take "
            "the prior 'uniform', 'pool' or a file of shares."
        )
    if not labelled:
        raise SparsortError(
            "the prior 'estimated' needs labelled rows of the pool, to fit the model's bias, and no row with a label remains "
            "besides the demonstrations and the queries. Draw the demonstrations from a larger file (-k; pool= in Python), or "
            "take the prior 'uniform', 'pool' or a file of shares (--prior)."
        )
    few = f"The label shares were estimated with {len(labelled)} labelled rows; {FEWEST_ROWS} or more are advisable."
    notes = (few,) if len(labelled) < FEWEST_ROWS else ()
    return PriorPlan(source="estimated", labels=labels, shares=None, labelled=labelled, notes=notes)


def _are_rows_of(task: Task, queries: Rows, pool: Rows) -> bool:
    """Whether every query is a row of the pool, and the pool has labels."""
    known = {_question(task, row) for row in pool}
    return all(_question(task, row) in known for row in queries) and bool(_pool_counts(task, pool, required=False))


def _question(task: Task, row: Mapping[str, Any]) -> str | None:
    """The question of a row; None if it lacks a field of it."""
    try:
        return task.query_text(row)
    except SparsortError:
        return None


def _labelled_rows(
    task: Task, compared: Sequence[str], demos: Rows, queries: Rows, pool: Rows, seed: int
) -> list[dict[str, Any]]:
    """Up to 64 labelled rows with label counts as even as possible; no row is like a demonstration or a query."""
    known = [dict(row) for row in pool if _value(task, row) is not None and _question(task, row) is not None]
    order = evenly_by_label([task.gold_index(row) for row in known], seed=seed).tolist()
    others = [*map(dict, demos), *map(dict, queries)]
    chosen: list[dict[str, Any]] = []
    for start in range(0, len(order), _BLOCK):
        block = [known[place] for place in order[start : start + _BLOCK]]
        alike = alike_rows(compared, block, others)
        chosen += [row for place, row in enumerate(block) if place not in alike]
        if len(chosen) >= LABELLED_ROWS:
            break
    return chosen[:LABELLED_ROWS]


def _value(task: Task, row: Mapping[str, Any]) -> str | None:
    """The label of a row; None if it is missing or is not a label of the task."""
    value = text_if_any(row, task.label, where="a row of the pool")
    return value if value in (task.labels or {}) else None


def _pool_counts(task: Task, pool: Rows, *, required: bool = True) -> Counter[str]:
    """How often the pool has each label of the task."""
    counts = Counter(value for row in pool if (value := _value(task, row)) is not None)
    if required and not counts:
        raise SparsortError(
            "the priors 'pool' and 'mixed' count the labels of the pool, and no rows of it with a label were given. Pass them "
            "(pool=), or take the prior 'uniform' or {value: share, …}."
        )
    return counts


def _counted(labels: tuple[str, ...], counts: Mapping[Any, int], where: str) -> NDArray[np.float64]:
    absent = [value for value in labels if not counts.get(value)]
    if absent:
        raise SparsortError(
            f"the prior is to be the share of each label in {where}, which has no row with {', '.join(absent)}. Give rows of "
            "every label, or take the prior 'uniform' (--prior uniform)."
        )
    return named_shares("pool", [counts[value] for value in labels])


def _file_shares(prior: Any, label: str, labels: tuple[str, ...]) -> NDArray[np.float64]:
    """(L,) shares from a file: an object {label: share}, a table of labels with shares or counts, or labelled rows."""
    if not isinstance(prior, (str, Path)) or not str(prior):
        raise SparsortError(
            f"the prior is {prior!r}; expected one of {', '.join(get_args(PriorName))}, a mapping from label value to share, or "
            "a file."
        )
    path = Path(prior).expanduser()
    if not path.exists():
        if path.suffix or path.parent != Path():
            raise SparsortError(
                f"the prior {str(prior)!r} is not a file that exists. Give a file, or one of: {', '.join(get_args(PriorName))}."
            )
        raise unknown_choice("prior", str(prior), (*get_args(PriorName), "<a file>"))
    if path.suffix == ".json":
        content = _json(path)
        # An object of rows is read as rows below; only one of plain values can be an object of shares.
        if isinstance(content, dict) and not any(isinstance(value, (dict, list)) for value in content.values()):
            return given_shares(labels, content, path.name)
    from sparsort.scoring.data.rows import open_rows

    source = open_rows(path)
    columns = source.columns()
    column = column_of(label)
    weight = next((name for name in ("share", "count") if set(columns) == {column, name}), None)
    if column not in columns:
        raise SparsortError(
            f"the prior {path.name} has no column {column!r}; it has: {', '.join(columns)}. Give labelled rows, a table with the "
            f"columns {label!r} and 'share' or 'count', or a JSON object {{label: share}}."
        )
    rows = [row.fields for row in source.rows()]
    values = [text_if_any(row, label, where=f"row {place} of {path.name}") for place, row in enumerate(rows)]
    if weight is None:
        return _counted(labels, Counter(value for value in values if value is not None), path.name)
    table = {value: _number(row[weight], path.name) for value, row in zip(values, rows, strict=True)}
    if len(table) < len(rows):
        raise SparsortError(f"the prior {path.name} names a label twice. Give one share for each.")
    return given_shares(labels, table, path.name)


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparsortError(f"the prior {path.name} cannot be read as JSON ({error}). Repair it.") from error


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise SparsortError(f"the prior {where} has the share {value!r}, which is not a number.") from error
