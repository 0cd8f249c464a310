"""The recipe of an ablation, and its plan: the demonstration sets in the order in which they are run.

Contract: no model is loaded here, and a recipe alone determines its plan. A recipe is checked when it is created, from Python or
TOML, and is written back without loss. The plan covers every task and number of shots with the first seed, then with the second,
so a study that is stopped early is balanced. A recipe with more random orders keeps the earlier ones: the first 16 of 24 are
those of a recipe with 16.
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

# The kind of score by which orderers by difficulty rank, except those whose entry in `ORDERS` does not accept it.
SPARSITY = "sparsity"
# A null control: the order by scores drawn at random, which carry no information about the demonstrations.
RANDOM_SCORES = "random_scores"
# Seeded (random) orders are not orderers, because R random orders are part of every ablation anyway.
ORDERERS: tuple[str, ...] = (*ORDERS.names(lambda entry: not entry.is_seeded), RANDOM_SCORES)
# Up to this k, all k! permutations are enumerated and shuffled. For larger k, distinct orders are drawn one by one.
_MOST_ENUMERATED = 8
# The smallest valid value of each number in a recipe.
_MINIMA = {"sets": 1, "first_seed": 0, "random_orders": 2, "test_rows": 1, "dev_rows": 0, "split_seed": 0}
# Inputs of a criterion that exist only if the task has labels.
_LABEL_SCORES = frozenset({"log_p", "content_free"})


class AblationOptions(TypedDict, total=False):
    """The fields of `Ablation` besides the model's name, as the type of the keyword arguments of functions that accept them."""

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
    """The recipe of an ablation: what is compared, on which data, and how often.

    Attributes:
        tasks: names of built-in tasks, paths of task files, or tasks.
        data: the folder of the tasks' files; None for the current folder.
        model, dtype, device, revision, trust_remote_code, token_budget: as in `ModelSpec`; `model` is its name.
        sets: the number of demonstration sets for each task, selector and number of shots.
        first_seed: the seed of the first set; each further set has the next seed.
        shots: numbers of demonstrations k.
        selectors: selectors of `ablation.recipe.selectors.SELECTORS`.
        orderers: entries of `curriculum.demos.order.ORDERS`, "reverse:NAME", or "random_scores".
        choosers: criteria of `curriculum.demos.criteria.CRITERIA`; each chooses one of the random orders with the model's help.
        random_orders: R, the number of random orders of each set; if k! is smaller, all k! orders are used.
        test_rows, dev_rows: the number of rows that every arm answers, and of those that criteria may read.
        sampled_probes: whether GlobalE and LocalE read probes sampled from the model (arXiv 2104.08786), one for each random
            order, instead of the dev rows without their labels.
        calibrated: whether contextual calibration (arXiv 2102.09690) is off, on, or both.
        label_score: the score of a label: the sum of its tokens' log-probabilities, or their mean.
        site, pooling, metric, outliers: the sparsity by which demonstrations are ordered, as in `SparsityScorer`.
        max_demo_chars: longer demonstrations are excluded from the pool; None for no limit.
        split_seed: the seed of the split into test, dev and pool.

    Raises:
        SparsortError: a value has the wrong type or is out of range, a name is unknown, or two settings exclude each other.
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
        for name, minimum in _MINIMA.items():
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
                    f"the selector {selector!r} chooses among {NEIGHBOURS} neighbours; {max(self.shots)} shots are more. Use "
                    "fewer, or another selector."
                )
        # `base_order` refuses an unknown orderer.
        for orderer in self.orderers:
            base_order(orderer)
        needs_dev = [name for name in self.choosers if probes_of(name, sampled=self.sampled_probes) == "dev"]
        METRICS.check(self.metric)
        if needs_dev and self.dev_rows == 0:
            raise SparsortError(
                f"{', '.join(needs_dev)} choose by dev rows, but dev_rows is 0. Use dev rows, or omit these criteria."
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, where: str = "the recipe") -> Ablation:
        """Create an ablation from the plain values of a TOML or JSON file.

        Raises:
            SparsortError: a key is unknown (the message suggests the nearest one), or a value is wrong.
        """
        return tables.build(cls, table, kind="ablation", where=where)

    @classmethod
    def from_toml(cls, path: str | Path) -> Ablation:
        """Read an ablation from a TOML file. Its data folder and task files are relative to the file's own folder.

        Raises:
            SparsortError: as `from_table`, or the file cannot be read.
        """
        file = Path(path).expanduser()
        recipe = cls.from_table(tables.read(file), where=file.name)
        # A task without the suffix .toml is the name of a built-in task, not a path.
        tasks = tuple(
            str(file.parent / Path(task).expanduser()) if isinstance(task, str) and task.endswith(".toml") else task
            for task in recipe.tasks
        )
        data = None if recipe.data is None else file.parent / recipe.data.expanduser()
        return dataclasses.replace(recipe, tasks=tasks, data=data)

    def to_table(self) -> dict[str, Any]:
        """The recipe as JSON values; `from_table` reads them back."""
        table: dict[str, Any] = tables.plain(self)
        return table

    def load_tasks(self) -> list[Task]:
        """Load the tasks, in the order of the recipe.

        Raises:
            SparsortError: a task is unknown or invalid, or two tasks share a name.
        """
        loaded = [load_task(task) for task in self.tasks]
        _no_repeats("tasks", [task.name for task in loaded])
        return loaded

    def check(self) -> None:
        """Check the settings that only scoring modules can check, which import torch: site, pooling, outlier rule and dtype.

        Raises:
            SparsortError: one of them is unknown.
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
        """The random orders of the set with this seed, (min(R, k!), k)."""
        # 20! is the largest factorial in 64 bits, and far above any R.
        return _shuffled_orders(k, seed, min(self.random_orders, math.factorial(min(k, 20))))


@dataclass(frozen=True, kw_only=True)
class DemoSet:
    """The four values that determine a demonstration set. An ablation is run set by set."""

    task: str
    selector: str
    k: int
    seed: int


def demo_sets(ablation: Ablation) -> Iterator[DemoSet]:
    """The plan: the demonstration sets by seed, then by shots, task and selector."""
    names = [task.name for task in ablation.load_tasks()]
    product = itertools.product(ablation.seeds, ablation.shots, names, ablation.selectors)
    return (DemoSet(task=task, selector=selector, k=k, seed=seed) for seed, k, task, selector in product)


def base_order(orderer: str) -> str:
    """The orderer's name without "reverse:".

    Raises:
        SparsortError: there is no such orderer.
    """
    base = base_name(orderer)
    if base in ORDERS and ORDERS[base].is_seeded:
        raise SparsortError(
            f"{base!r} is no orderer here: random orders always run, random_orders of them for each set."
        )
    if base not in ORDERERS:
        raise unknown_choice("orderer", orderer, (*ORDERERS, "reverse:<any of these>"))
    return base


def order_of(orderer: str) -> OrderEntry | None:
    """The orderer's entry in `ORDERS`; None for `RANDOM_SCORES`."""
    return ORDERS.get(base_order(orderer))


def by_similarity(orderer: str) -> bool:
    """Whether an orderer ranks by similarity to the query."""
    entry = order_of(orderer)
    return entry is not None and entry.ranks_by == "similarity"


def kind_of(orderer: str) -> str | None:
    """The kind of score by which an orderer ranks: sparsity if its entry accepts that; None if it reads no score."""
    entry = order_of(orderer)
    if entry is None or entry.ranks_by != "difficulty":
        return None
    return SPARSITY if entry.accepts(SPARSITY) else entry.kinds[0]


def depends_on_query(orderer: str, selector: str = DEFAULT_SELECTOR) -> bool:
    """Whether an orderer may arrange the same set differently for each query."""
    return by_similarity(orderer) or looks_at_query(selector)


def applies(criterion_name: str, task: Task, selector: str = DEFAULT_SELECTOR) -> bool:
    """Whether a criterion can be used for a task and a selector.

    Most criteria need labels or judged answers, and one set that all queries share.
    """
    entry = criterion(criterion_name)
    if looks_at_query(selector) and entry.shared_set:
        return False
    return not task.is_generation or entry.judged or not entry.needs & _LABEL_SCORES


def reads_losses(criterion_names: Iterable[str]) -> bool:
    """Whether one of these criteria reads the loss of each test query under every random order."""
    return any("loss" in criterion(name).needs for name in criterion_names)


def skipped_criteria(ablation: Ablation) -> list[str]:
    """The criteria that are skipped in some cells, with the reason, one sentence each."""
    sentences = []
    for task in ablation.load_tasks():
        if needs_labels := [name for name in ablation.choosers if not applies(name, task)]:
            sentences.append(
                f"{task.name}: {', '.join(needs_labels)} skipped: they read label scores, but this task's answers are generated."
            )
        for selector in ablation.selectors:
            names = [name for name in ablation.choosers if applies(name, task) and not applies(name, task, selector)]
            # A criterion chooses either one order for all queries, or demonstrations for each query.
            if by_query := [name for name in names if criterion(name).chooses != "order"]:
                sentences.append(
                    f"{task.name}, {selector}: {', '.join(by_query)} skipped: they read sets that all queries share, but this "
                    "selector gives each query its own demonstrations."
                )
            if by_order := [name for name in names if name not in by_query]:
                sentences.append(
                    f"{task.name}, {selector}: {', '.join(by_order)} skipped: these criteria choose one order for all queries, "
                    "but this selector gives each query its own demonstrations."
                )
    return sentences


def probes_of(criterion_name: str, *, sampled: bool) -> Probes:
    """The queries that a criterion reads under every random order, in addition to the test queries.

    Returns:
        "sampled" if the criterion reads probes sampled from the model and `sampled` allows it; otherwise "dev" for the dev
        rows, whose labels are visible only to a criterion that needs "gold"; "none" if it reads only test queries or
        content-free inputs.

    Raises:
        SparsortError: there is no such criterion.
    """
    entry = criterion(criterion_name)
    if entry.chooses != "order":
        return "none"
    if sampled and "sampled" in entry.needs:
        return "sampled"
    return "dev" if entry.needs & {"log_p", "features"} else "none"


@functools.lru_cache(maxsize=1024)
def _shuffled_orders(k: int, seed: int, count: int) -> NDArray[np.int64]:
    # A larger `count` must keep the orders of a smaller one. For small k, all k! orders are always shuffled and the first `count`
    # are taken; for larger k, they are drawn one by one, and a larger count continues the same sequence of draws.
    orders = random_permutations(k, math.factorial(k) if k <= _MOST_ENUMERATED else count, seed)[:count].copy()
    # The cache returns the same array to every caller, so no caller may change it.
    orders.setflags(write=False)
    return orders


def _no_repeats(name: str, items: Sequence[Any]) -> None:
    repeated = next((item for item in items if items.count(item) > 1), None)
    if repeated is not None:
        raise SparsortError(f"the ablation names {repeated!r} twice among its {name}. Name it once.")
