"""The cost of an ablation in tokens, estimated before any model runs.

Contract: pure. Lengths are means over rows, so a total is an estimate. Where a number depends on outcomes (how soon an answer
ends, how many orders coincide), it is the maximum. A prefix is read once and shared by all queries after it, and by every
order with the same beginning. A pair of prefix and query costs the tokens of the query and of all labels. `plain_tokens` is
the same work without
any sharing: a full prompt for every label of every pair.

Shapes: R random orders of a set, P orders, k demonstrations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import (
    Ablation,
    applies,
    by_similarity,
    depends_on_query,
    kind_of,
    probes_of,
    reads_losses,
)
from sparsort.curriculum.ablation.recipe.selectors import MODEL_SELECTORS, SELECTORS, looks_at_query
from sparsort.curriculum.ablation.recipe.splits import Splits
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.demos.criteria import criterion
from sparsort.curriculum.demos.criteria.mdl_and_cone import NEIGHBOURS, ORGANISATIONS
from sparsort.errors import SparsortError

# The number of rows of each part of the split whose tokens are counted.
_SAMPLE = 512


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of a task's texts, in tokens.

    Attributes:
        task: the task.
        n_test, n_dev, n_pool: numbers of rows.
        head: the instruction or system turn with its separator.
        demo, query, dev: mean lengths of a demonstration with its separator, a test query, and a dev query.
        longest_demo, longest_query: the maxima over the counted rows.
        labels: the length of each label.
        content_free: the length of each content-free query.
        generated: the maximum length of a generated answer; 0 if labels are scored.
    """

    task: Task
    n_test: int
    n_dev: int
    n_pool: int
    head: int
    demo: float
    query: float
    dev: float
    longest_demo: int
    longest_query: int
    labels: tuple[int, ...]
    content_free: tuple[int, ...]
    generated: int


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """The cost of one task, selector and number of shots, over all of its sets.

    Attributes:
        task, selector, k: the cells whose cost this is.
        sets: demonstration sets.
        prefixes: distinct ordered sets of demonstrations.
        pairs: (prefix, query) pairs, each of which is a row of a forward pass.
        score_tokens: tokens read to score, embed and select demonstrations.
        prefix_tokens: tokens of the prefixes; shared beginnings count once.
        query_tokens: tokens of the queries, including content-free queries and probes.
        label_tokens: tokens of all labels after all queries.
        generated_tokens: the maximum for answers and sampled probes.
        plain_tokens: all tokens if nothing were shared.
        longest_prompt: the longest possible prompt in tokens, to compare with the model's context.
    """

    task: str
    selector: str
    k: int
    sets: int
    prefixes: int
    pairs: int
    score_tokens: int
    prefix_tokens: int
    query_tokens: int
    label_tokens: int
    generated_tokens: int
    plain_tokens: int
    longest_prompt: int

    @property
    def tokens(self) -> int:
        """All tokens read or generated."""
        parts = (self.score_tokens, self.prefix_tokens, self.query_tokens, self.label_tokens, self.generated_tokens)
        return sum(parts)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of an ablation: a row for each task, selector and number of shots, and the totals over the rows."""

    rows: tuple[CostRow, ...]

    @property
    def sets(self) -> int:
        """Demonstration sets."""
        return sum(row.sets for row in self.rows)

    @property
    def pairs(self) -> int:
        """(prefix, query) pairs."""
        return sum(row.pairs for row in self.rows)

    @property
    def tokens(self) -> int:
        """All tokens read or generated."""
        return sum(row.tokens for row in self.rows)

    @property
    def plain_tokens(self) -> int:
        """All tokens if nothing were shared."""
        return sum(row.plain_tokens for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON values."""
        totals = {"sets": self.sets, "pairs": self.pairs, "tokens": self.tokens, "plain_tokens": self.plain_tokens}
        return totals | {"rows": [vars(row) | {"tokens": row.tokens} for row in self.rows]}


def measure(task: Task, splits: Splits, count: Callable[[str], int]) -> Lengths:
    """Measure the lengths of a task's texts.

    Args:
        task: the task.
        splits: its rows. The first 512 of each part are counted; they are in random order.
        count: the number of tokens of a text, without special tokens.
    """
    gap = count(task.separator)
    demos = [count(task.demo_text(row)) + gap for row in splits.pool[:_SAMPLE]]
    queries = [count(task.query_text(row)) for row in splits.test[:_SAMPLE]]
    dev = [count(task.query_text(row)) for row in splits.dev[:_SAMPLE]]
    head = task.system if task.chat else task.instruction
    return Lengths(
        task=task,
        n_test=len(splits.test),
        n_dev=len(splits.dev),
        n_pool=len(splits.pool),
        head=count(head) + gap if head else 0,
        demo=float(np.mean(demos)),
        query=float(np.mean(queries)),
        dev=float(np.mean(dev)) if dev else 0.0,
        longest_demo=max(demos),
        longest_query=max(queries),
        labels=tuple(count(text) for text in task.label_texts()),
        content_free=tuple(count(text) for text in task.content_free_texts()),
        generated=task.max_new_tokens if task.is_generation else 0,
    )


def estimate(ablation: Ablation, lengths: Sequence[Lengths]) -> Cost:
    """Estimate the cost of an ablation from the lengths of its tasks, in any order.

    Raises:
        SparsortError: the lengths of a task are missing.
    """
    by_name: Mapping[str, Lengths] = {item.task.name: item for item in lengths}
    rows = []
    for task in ablation.load_tasks():
        if task.name not in by_name:
            raise SparsortError(
                f"the task {task.name!r} has no lengths. Measure it first: measure(task, splits, count)."
            )
        for k in ablation.shots:
            rows += [_row(ablation, by_name[task.name], selector, k) for selector in ablation.selectors]
    return Cost(rows=tuple(rows))


def shared_nodes(orders_PK: NDArray[np.int64]) -> int:
    """The number of demonstrations that are read for P orders of one set: the nodes of the trie of the orders."""
    depths = range(1, orders_PK.shape[1] + 1)
    return sum(len(np.unique(orders_PK[:, :depth], axis=0)) for depth in depths) if len(orders_PK) else 0


@dataclass(kw_only=True)
class _Counts:
    """What the sets of one row read, summed over the sets.

    Attributes:
        prefixes: distinct ordered sets of demonstrations.
        nodes: demonstrations read, shared beginnings once.
        test, dev, probes: pairs with a test query, a dev query, or a probe sampled from the model.
        losses: pairs whose query's own text is scored, in a pass without labels.
        loss_passes: sets that have such a pass, which reads the instruction again.
        sampled: probes to sample.
    """

    prefixes: int = 0
    nodes: int = 0
    test: int = 0
    dev: int = 0
    probes: int = 0
    losses: int = 0
    loss_passes: int = 0
    sampled: int = 0


def _count(ablation: Ablation, lengths: Lengths, selector: str, k: int, criteria: Sequence[str]) -> _Counts:
    by_query = [name for name in ablation.orderers if depends_on_query(name, selector)]
    kinds = {probes_of(name, sampled=ablation.sampled_probes) for name in criteria}
    counts = _Counts()
    for seed in ablation.seeds:
        random_RK = ablation.orders(k, seed)
        generator = np.random.default_rng(seed)
        if looks_at_query(selector):
            # Each query has its own set. The orders of one set share beginnings, but no two sets share anything.
            every = np.concatenate([random_RK, _placeholder_orders(generator, k, len(by_query))])
            n_trees = lengths.n_test
            distinct = len(np.unique(every, axis=0))
            counts.test += distinct * n_trees
        else:
            # Orders for all queries are paired with each of them; those of one query only with that query.
            fixed = _placeholder_orders(generator, k, len(ablation.orderers) - len(by_query))
            own = _placeholder_orders(generator, k, len(by_query) * lengths.n_test)
            every, n_trees = np.concatenate([random_RK, fixed, own]), 1
            distinct = len(np.unique(every, axis=0))
            for_all = len(np.unique(np.concatenate([random_RK, fixed]), axis=0))
            # Both terms are upper bounds: orders may coincide, within a query and between queries.
            counts.test += min(for_all * lengths.n_test + len(own), distinct * lengths.n_test)
        counts.prefixes += distinct * n_trees
        counts.nodes += shared_nodes(every) * n_trees
        if "dev" in kinds:
            counts.dev += len(random_RK) * lengths.n_dev
        if "sampled" in kinds:
            # One probe is sampled after each order, and every order is scored on all probes.
            counts.sampled += len(random_RK)
            counts.probes += len(random_RK) ** 2
        if reads_losses(criteria):
            counts.losses += len(random_RK) * lengths.n_test
            counts.nodes += shared_nodes(random_RK)
            counts.loss_passes += 1
    return counts


def _row(ablation: Ablation, lengths: Lengths, selector: str, k: int) -> CostRow:
    criteria = [name for name in ablation.choosers if applies(name, lengths.task, selector)]
    needs_free = True in ablation.calibrated or any("content_free" in criterion(name).needs for name in criteria)
    content_free = lengths.content_free if needs_free and not lengths.generated else ()

    counts = _count(ablation, lengths, selector, k, criteria)
    selecting = _selecting(ablation, lengths, selector, k)
    pairs = counts.test + counts.dev + counts.probes + counts.prefixes * len(content_free)
    query_tokens = (counts.test + counts.probes) * lengths.query + counts.dev * lengths.dev
    query_tokens += counts.prefixes * sum(content_free)
    # Every pair but those of losses is read with all labels, as branches after the query.
    label_tokens = pairs * sum(lengths.labels)
    loss_tokens = counts.losses * lengths.query
    # A sampled probe is a further demonstration, and the prompt before it is read as a whole.
    generated = (counts.test + counts.dev) * lengths.generated + counts.sampled * lengths.demo
    prompt = lengths.head + k * lengths.demo
    n_trees = ablation.sets * (lengths.n_test if looks_at_query(selector) else 1)
    prefix_tokens = (
        (n_trees + counts.loss_passes) * lengths.head + counts.nodes * lengths.demo + counts.sampled * prompt
    )
    # Without sharing, every label is a prompt of its own, and so is every loss and every sampled probe.
    plain = max(len(lengths.labels), 1) * (pairs * prompt + query_tokens) + (counts.losses + counts.sampled) * prompt
    answer = lengths.generated or max(lengths.labels)
    return CostRow(
        task=lengths.task.name,
        selector=selector,
        k=k,
        sets=ablation.sets,
        prefixes=counts.prefixes,
        pairs=pairs + counts.losses + selecting.pairs,
        score_tokens=round(_score_tokens(ablation, lengths, selector, k) + selecting.tokens),
        prefix_tokens=round(prefix_tokens),
        query_tokens=round(query_tokens + loss_tokens),
        label_tokens=label_tokens,
        generated_tokens=round(generated),
        plain_tokens=round(plain + loss_tokens + label_tokens + generated + selecting.plain),
        longest_prompt=lengths.head + k * lengths.longest_demo + lengths.longest_query + answer,
    )


def _placeholder_orders(generator: np.random.Generator, k: int, count: int) -> NDArray[np.int64]:
    """Random orders in place of those of orderers, which are known only with the scores."""
    return generator.permuted(np.tile(np.arange(k, dtype=np.int64), (count, 1)), axis=1)


def _score_tokens(ablation: Ablation, lengths: Lengths, selector: str, k: int) -> float:
    """Tokens of demonstrations that are read alone, for sparsity, loss or an embedding, and of queries without demonstrations.

    Numbers of the whole pool are computed once, and counted with the first number of shots.
    """
    passes = len({kind_of(name) for name in ablation.orderers} - {None})
    has_similarity = any(map(by_similarity, ablation.orderers))
    embeds_pool = "embeddings" in SELECTORS[selector].needs
    in_sets = ablation.sets * k * (lengths.n_test if looks_at_query(selector) else 1)
    total = min(in_sets, lengths.n_pool) * lengths.demo * (passes + (has_similarity and not embeds_pool))
    if k == ablation.shots[0]:
        embeds_queries = has_similarity or embeds_pool
        total += lengths.n_pool * lengths.demo * embeds_pool + lengths.n_test * lengths.query * embeds_queries
        # The zero-shot queries of a task are read once, so they are counted in its first row.
        if selector == ablation.selectors[0]:
            total += _zero_shot_tokens(ablation, lengths)
    return total


class _Selecting(NamedTuple):
    """The cost of selecting sets with the model's help: pairs, tokens, and tokens if nothing were shared."""

    pairs: int
    tokens: float
    plain: float


def _selecting(ablation: Ablation, lengths: Lengths, selector: str, k: int) -> _Selecting:
    scores = MODEL_SELECTORS[selector].model_scores if selector in MODEL_SELECTORS else None
    if scores == "query" and k == ablation.shots[0]:
        # Queries after single neighbours from half of the pool, which are the same for every k.
        half = (lengths.n_pool + 1) // 2
        pairs = ablation.sets * lengths.n_test * min(NEIGHBOURS, half)
        alone = ablation.sets * min(lengths.n_test * NEIGHBOURS, half)
        tokens = pairs * lengths.query + alone * (lengths.head + lengths.demo)
        return _Selecting(pairs, tokens, pairs * (lengths.head + lengths.demo + lengths.query))
    if scores == "labels":
        # The candidate sets of each query, no two of which share a beginning.
        pairs = ablation.sets * lengths.n_test * ORGANISATIONS
        prompt, labels = lengths.head + k * lengths.demo + lengths.query, sum(lengths.labels)
        return _Selecting(pairs, pairs * (prompt + labels), pairs * (len(lengths.labels) * prompt + labels))
    return _Selecting(0, 0.0, 0.0)


def _zero_shot_tokens(ablation: Ablation, lengths: Lengths) -> float:
    """Tokens of a task's queries without demonstrations: all of them if it has labels, else dev rows that a criterion reads."""
    dev = lengths.n_dev * lengths.dev
    if lengths.generated:
        return dev * any("bare_features" in criterion(name).needs for name in ablation.choosers)
    pairs = lengths.n_test + lengths.n_dev + len(lengths.content_free)
    return lengths.n_test * lengths.query + dev + sum(lengths.content_free) + pairs * sum(lengths.labels)
