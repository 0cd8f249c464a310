"""The recipe of an ablation: what is compared, on what, how often; and the plan, unit by unit.

Contract: pure; no model. A recipe is checked when it is made, from Python or TOML, and written back without loss. The
plan is breadth-first: every task and shot count under the first seed, then the second, so that a study that is stopped
early is balanced. Random orders grow from the same beginning: the first 16 of 24 are the 16.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe import tables
from sparsort.curriculum.ablation.recipe.options import DesignOptions
from sparsort.curriculum.ablation.recipe.selectors import MODEL_SELECTORS, check_selector, looks_at_query
from sparsort.curriculum.ablation.recipe.tasks import Task, load_task
from sparsort.curriculum.demos.criteria import criterion
from sparsort.curriculum.demos.criteria.mdl_and_cone import NEIGHBOURS
from sparsort.curriculum.demos.order import ORDERS, OrderEntry, base_name
from sparsort.curriculum.demos.permutations import random_permutations
from sparsort.curriculum.demos.select import DEFAULT_SELECTOR
from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.metrics import METRICS
from sparsort.scoring.loading.dtypes import Dtype
from sparsort.scoring.model.spec import ModelSpec

Probes = Literal["sampled", "dev", "none"]

# The kind of the scores by which an ablation orders wherever an order accepts it.
SPARSITY = "sparsity"
# One more random order, drawn as if by scores that mean nothing: what an orderer that knows nothing looks like.
RANDOM_SCORES = "random_scores"
# Random orders always run, so that no orderer draws another.
ORDERERS: tuple[str, ...] = (*ORDERS.names(lambda entry: not entry.is_seeded), RANDOM_SCORES)
# Up to here all permutations are listed and shuffled; above, orders are drawn until they differ.
_LISTED = 8


class AblationOptions(TypedDict, total=False):
    """The fields of `Ablation` besides the model's name, where a function takes them as keywords."""

    tasks: Sequence[str | Task]
    data: str | Path | None
    dtype: Dtype
    device: str
    revision: str | None
    trust_remote_code: bool
    token_budget: int | None
    sets: int
    first_seed: int
    shots: Sequence[int]
    selectors: Sequence[str]
    orderers: Sequence[str]
    choosers: Sequence[str]
    random_orders: int
    test_rows: int
    dev_rows: int
    sampled_probes: bool
    calibrated: Sequence[bool]
    label_score: Literal["sum", "mean"]
    site: str
    pooling: str
    metric: str
    outliers: str
    max_demo_chars: int | None
    split_seed: int


@dataclass(frozen=True, kw_only=True)
class Ablation(DesignOptions):
    """The recipe.

    Attributes:
        tasks: names of ready tasks, task files, or tasks.
        data: the folder that the tasks' files lie in; None: this folder.
        model, dtype, device, revision, trust_remote_code, token_budget: as `ModelSpec`, of which `model` is the name.
        sets: how many demonstration sets for each task, selector and number of shots.
        first_seed: the first set's seed; the others follow.
        shots: numbers of demonstrations, k.
        selectors: how a set is drawn, see `ablation.recipe.selectors.SELECTORS`.
        orderers: rules of `curriculum.demos.order`, "reverse:X", or "random_scores".
        choosers: criteria of `curriculum.demos.criteria`, which choose among the random orders with the model in the loop.
        random_orders: R, how many random orders a set; all k! where there are no more.
        test_rows, dev_rows: how many rows are asked, and how many choose an order.
        sampled_probes: whether GlobalE and LocalE read probes sampled from the model (arXiv 2104.08786), one a random
            order, rather than the dev rows without their labels.
        calibrated: scoring rules: without contextual calibration (arXiv 2102.09690), with it, or both.
        label_score: a label's score: the sum of its tokens' log-probabilities, or their mean.
        site, pooling, metric, outliers: the sparsity that orders demonstrations, as `SparsityScorer`.
        max_demo_chars: longer demonstrations are not shown; None for no limit.
        split_seed: of the split into test, dev and pool.
    """

    tasks: tuple[str | Task, ...]
    data: Path | None = None
    model: str = "demo"
    dtype: Dtype = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    token_budget: int | None = None
    sampled_probes: bool = True
    site: str = "pre_norm"
    pooling: str = "last"
    metric: str = "gini"
    outliers: str = "none"
    split_seed: int = 0

    def __post_init__(self) -> None:
        tables.coerce(self, "the ablation")
        for name in ("tasks", "shots", "selectors", "calibrated"):
            if not getattr(self, name):
                raise SparsortError(f"the ablation has no {name}. Name at least one.")
        for name in ("tasks", "shots", "selectors", "orderers", "choosers", "calibrated"):
            _no_repeats(name, [item.name if isinstance(item, Task) else item for item in getattr(self, name)])
        least = {"sets": 1, "first_seed": 0, "random_orders": 2, "test_rows": 1, "dev_rows": 0, "split_seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise SparsortError(f"the ablation has {name} = {getattr(self, name)}; at least {minimum} is needed.")
        for k in self.shots:
            if k < 2:
                raise SparsortError(f"the ablation has {k} among its shots; an order needs at least 2 demonstrations.")
        if self.max_demo_chars is not None and self.max_demo_chars < 1:
            raise SparsortError(f"the ablation has max_demo_chars = {self.max_demo_chars}; at least 1 is needed.")
        for selector in self.selectors:
            check_selector(selector)
            if selector in MODEL_SELECTORS and max(self.shots) > NEIGHBOURS:
                raise SparsortError(
                    f"the selector {selector!r} chooses among {NEIGHBOURS} neighbours; {max(self.shots)} shots are more. Ask for "
                    "fewer, or take another selector."
                )
        for orderer in self.orderers:
            base_order(orderer)
        needs_dev = [name for name in self.choosers if probes_of(name, sampled=self.sampled_probes) == "dev"]
        METRICS.check(self.metric)
        if needs_dev and self.dev_rows == 0:
            raise SparsortError(
                f"{', '.join(needs_dev)} choose by dev rows, but dev_rows is 0. Give some, or leave them out."
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, where: str = "the recipe") -> Ablation:
        """An ablation from plain values, as TOML or JSON give them.

        Raises:
            SparsortError: an unknown key (with the nearest one), a wrong type or value.
        """
        return tables.build(cls, table, kind="ablation", where=where)

    @classmethod
    def from_toml(cls, path: str | Path) -> Ablation:
        """An ablation from a TOML file; its data folder and task files are relative to the file's folder.

        Raises:
            SparsortError: as `from_table`; or the file cannot be read.
        """
        file = Path(path).expanduser()
        made = cls.from_table(tables.read(file), where=file.name)
        tasks = tuple(
            str(file.parent / Path(task).expanduser()) if isinstance(task, str) and task.endswith(".toml") else task
            for task in made.tasks
        )
        data = None if made.data is None else file.parent / made.data.expanduser()
        return dataclasses.replace(made, tasks=tasks, data=data)

    def to_table(self) -> dict[str, Any]:
        """The recipe as JSON values; `from_table` reads them back."""
        table: dict[str, Any] = tables.plain(self)
        return table

    def load_tasks(self) -> list[Task]:
        """The tasks themselves, in their order.

        Raises:
            SparsortError: a task is unknown or broken, or two have one name.
        """
        found = [load_task(task) for task in self.tasks]
        _no_repeats("tasks", [task.name for task in found])
        return found

    def check(self) -> None:
        """Check what only the scoring modules know (they import torch): the site, pooling, outlier rule and dtype.

        Raises:
            SparsortError: an unknown one.
        """
        from sparsort.scoring.model.sites import check_site
        from sparsort.scoring.scorers.pooling import check_outlier_rule, check_pooling

        check_site(self.site)
        check_pooling(self.pooling)
        check_outlier_rule(self.outliers)
        self.spec.check()

    @property
    def spec(self) -> ModelSpec:
        """The model, and how it is loaded and run."""
        return ModelSpec(
            self.model,
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            token_budget=self.token_budget,
        )

    @property
    def seeds(self) -> range:
        """The seeds of the sets."""
        return range(self.first_seed, self.first_seed + self.sets)

    def orders(self, k: int, seed: int) -> NDArray[np.int64]:
        """The random orders of a set, (min(R, k!), k); all of them, shuffled, where k! is at most R."""
        return _shuffled_orders(k, seed, min(self.random_orders, math.factorial(min(k, 20))))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is run at a time: one demonstration set."""

    task: str
    selector: str
    k: int
    seed: int


def units(ablation: Ablation) -> Iterator[Unit]:
    """The plan, seed by seed, then shots, tasks and selectors."""
    names = [task.name for task in ablation.load_tasks()]
    every = itertools.product(ablation.seeds, ablation.shots, names, ablation.selectors)
    return (Unit(task=task, selector=selector, k=k, seed=seed) for seed, k, task, selector in every)


def base_order(orderer: str) -> str:
    """An orderer without its "reverse:".

    Raises:
        SparsortError: there is none of that name.
    """
    base = base_name(orderer)
    if base in ORDERS and ORDERS[base].is_seeded:
        raise SparsortError(f"{base!r} is no orderer here: random orders always run, random_orders of them a set.")
    if base not in ORDERERS:
        raise unknown_choice("orderer", orderer, (*ORDERERS, "reverse:<any of these>"))
    return base


def order_of(orderer: str) -> OrderEntry | None:
    """The entry of the order by which an orderer goes; None for drawn scores."""
    return ORDERS.get(base_order(orderer))


def by_similarity(orderer: str) -> bool:
    """Whether an orderer ranks by similarity to the query."""
    entry = order_of(orderer)
    return entry is not None and entry.ranks_by == "similarity"


def kind_of(orderer: str) -> str | None:
    """The kind of score by which an orderer ranks, sparsity where the order accepts it; None for one that reads no score."""
    entry = order_of(orderer)
    if entry is None or entry.ranks_by != "difficulty":
        return None
    return SPARSITY if entry.accepts(SPARSITY) else entry.kinds[0]


def depends_on_query(orderer: str, selector: str = DEFAULT_SELECTOR) -> bool:
    """Whether an orderer's order of one set differs from query to query."""
    return by_similarity(orderer) or looks_at_query(selector)


def applies(chooser: str, task: Task, selector: str = DEFAULT_SELECTOR) -> bool:
    """Whether a chooser can be used: most need labels, or judged answers, and one set that all queries share."""
    entry = criterion(chooser)
    if looks_at_query(selector) and entry.shared_set:
        return False
    return not task.is_generation or entry.judged or not entry.needs & {"log_p", "content_free"}


def reads_losses(choosers: Iterable[str]) -> bool:
    """Whether one of these choosers reads the loss of each test query under every random order."""
    return any("loss" in criterion(chooser).needs for chooser in choosers)


def left_out(ablation: Ablation) -> list[str]:
    """Which choosers are left out of which cells, and why, one sentence each."""
    said = []
    for task in ablation.load_tasks():
        if lacking := [name for name in ablation.choosers if not applies(name, task)]:
            said.append(f"{task.name}: {', '.join(lacking)} left out: labels are read, and answers here are written.")
        for selector in ablation.selectors:
            names = [c for c in ablation.choosers if applies(c, task) and not applies(c, task, selector)]
            by_query = [name for name in names if criterion(name).chooses != "order"]
            if by_query:
                listed = ", ".join(by_query)
                said.append(f"{task.name}, {selector}: {listed} left out: sets that all queries share are read.")
            if by_order := [name for name in names if name not in by_query]:
                said.append(
                    f"{task.name}, {selector}: {', '.join(by_order)} left out: one order for all queries is chosen, and here "
                    "every query has demonstrations of its own."
                )
    return said


def probes_of(chooser: str, *, sampled: bool) -> Probes:
    """The queries that a chooser reads under every random order, beside those that are asked anyway.

    "sampled" from the model where the criterion wants such and `sampled` allows it; else the "dev" rows, whose labels
    only a criterion that needs "gold" sees; "none" where it reads the test queries alone or content-free inputs.

    Raises:
        SparsortError: there is no such criterion.
    """
    chosen_by = criterion(chooser)
    if chosen_by.chooses != "order":
        return "none"
    if sampled and "sampled" in chosen_by.needs:
        return "sampled"
    return "dev" if chosen_by.needs & {"log_p", "features"} else "none"


@functools.lru_cache(maxsize=1024)
def _shuffled_orders(k: int, seed: int, count: int) -> NDArray[np.int64]:
    # Asking for all of them makes the first `count` the same for every count; beyond the listed, drawing does so itself.
    every = random_permutations(k, math.factorial(k) if k <= _LISTED else count, seed)
    orders = every[:count].copy()
    orders.setflags(write=False)
    return orders


def _no_repeats(name: str, items: Sequence[Any]) -> None:
    twice = next((item for item in items if items.count(item) > 1), None)
    if twice is not None:
        raise SparsortError(f"the ablation names {twice!r} twice among its {name}. Name it once.")
