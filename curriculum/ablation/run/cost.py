"""What an ablation will cost in tokens, before any model runs: for `--dry-run`, and to choose sets and shots by.

Contract: pure. Lengths are means over the rows, so a total is an estimate; where a number hangs on the outcome (how soon
an answer stops, how many orders coincide) it is the most that it can be. A demonstration prefix is read once and shared
by every query behind it and by every order that begins with it; a pair of prefix and query costs the query's own
tokens and its labels'. `plain_tokens` is the same work without sharing: every label of every pair a full prompt.
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

# Rows of a split whose tokens are counted.
_SAMPLE = 512


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A task in tokens.

    Attributes:
        task: the task.
        n_test, n_dev, n_pool: rows.
        head: the instruction with its separator.
        demo, query, dev: means: a demonstration with its separator, a test query, a dev query.
        longest_demo, longest_query: of those counted.
        labels: each label's tokens.
        content_free: each content-free query's tokens.
        generated: the most tokens of an answer; 0 where labels are scored.
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
        task, selector, k: which.
        sets: demonstration sets.
        prefixes: different ordered sets of demonstrations.
        pairs: (prefix, query) pairs, each a row of a forward pass.
        score_tokens: read to score, embed and choose demonstrations.
        prefix_tokens: of the prefixes, shared beginnings once.
        query_tokens: of the queries, content-free ones and probes among them.
        label_tokens: of all labels behind all queries.
        generated_tokens: at most, of answers and sampled probes.
        plain_tokens: with nothing shared.
        longest_prompt: tokens of the longest prompt that can arise, for the model's context.
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
    """The cost of an ablation, a row for each task, selector and number of shots."""

    rows: tuple[CostRow, ...]

    @property
    def sets(self) -> int:
        """Demonstration sets, each a unit of the plan."""
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
        """The same without sharing."""
        return sum(row.plain_tokens for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON values."""
        totals = {"sets": self.sets, "pairs": self.pairs, "tokens": self.tokens, "plain_tokens": self.plain_tokens}
        return totals | {"rows": [vars(row) | {"tokens": row.tokens} for row in self.rows]}


def measure(task: Task, splits: Splits, count: Callable[[str], int]) -> Lengths:
    """A task's lengths in tokens.

    Args:
        task: the task.
        splits: its rows; 512 of each split, in their shuffled order, are counted.
        count: a text's number of tokens, without special tokens.
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
    """The cost of an ablation.

    Args:
        ablation: the recipe.
        lengths: a task's each, in any order.

    Raises:
        SparsortError: a task of the recipe has no lengths.
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
    """How many demonstrations are read for P orders of one set when equal beginnings are read once: the trie's nodes."""
    depths = range(1, orders_PK.shape[1] + 1)
    return sum(len(np.unique(orders_PK[:, :depth], axis=0)) for depth in depths) if len(orders_PK) else 0


def _row(ablation: Ablation, lengths: Lengths, selector: str, k: int) -> CostRow:
    task, scored = lengths.task, not lengths.generated
    by_query = [name for name in ablation.orderers if depends_on_query(name, selector)]
    choosers = [name for name in ablation.choosers if applies(name, task, selector)]
    probes = {probes_of(name, sampled=ablation.sampled_probes) for name in choosers}
    needs_free = any("content_free" in criterion(name).needs for name in choosers)
    free = lengths.content_free if scored and (needs_free or True in ablation.calibrated) else ()

    prefixes = nodes = pairs = losses = sampled = heads = 0
    query_tokens = generated = 0.0
    for seed in ablation.seeds:
        random_RK = ablation.orders(k, seed)
        generator = np.random.default_rng(seed)
        if looks_at_query(selector):
            # Another set for every query: its orders share their beginnings, queries share nothing.
            every = np.concatenate([random_RK, _stand_ins(generator, k, len(by_query))])
            distinct, n_trees = len(np.unique(every, axis=0)), lengths.n_test
            asked = distinct * n_trees
        else:
            fixed = _stand_ins(generator, k, len(ablation.orderers) - len(by_query))
            moving = _stand_ins(generator, k, len(by_query) * lengths.n_test)
            every, n_trees = np.concatenate([random_RK, fixed, moving]), 1
            distinct = len(np.unique(every, axis=0))
            whole = len(np.unique(np.concatenate([random_RK, fixed]), axis=0))
            asked = min(whole * lengths.n_test + len(moving), distinct * lengths.n_test)
        n_dev = len(random_RK) * lengths.n_dev if "dev" in probes else 0
        n_probes = len(random_RK) ** 2 if "sampled" in probes else 0
        n_free = distinct * n_trees * len(free)
        if reads_losses(choosers):
            # A pass of its own, without labels.
            losses += len(random_RK) * lengths.n_test
            nodes += shared_nodes(random_RK)
            heads += 1
        # A probe is written behind a prompt that is read whole.
        sampled += len(random_RK) if "sampled" in probes else 0
        prefixes += distinct * n_trees
        nodes += shared_nodes(every) * n_trees
        pairs += asked + n_dev + n_probes + n_free
        query_tokens += asked * lengths.query + n_dev * lengths.dev + n_probes * lengths.query
        query_tokens += distinct * n_trees * sum(free)
        generated += (asked + n_dev) * lengths.generated + (
            len(random_RK) * lengths.demo if "sampled" in probes else 0.0
        )
    prompt = lengths.head + k * lengths.demo
    labels = sum(lengths.labels)
    repeats = max(len(lengths.labels), 1)
    label_tokens = pairs * labels
    choosing = _choosing(ablation, lengths, selector, k)
    loss_tokens = losses * lengths.query
    return CostRow(
        task=task.name,
        selector=selector,
        k=k,
        sets=ablation.sets,
        prefixes=prefixes,
        pairs=pairs + losses + choosing.pairs,
        score_tokens=round(_score_tokens(ablation, lengths, selector, k) + choosing.tokens),
        prefix_tokens=round(
            lengths.head * (_heads(ablation, lengths, selector) + heads) + nodes * lengths.demo + sampled * prompt
        ),
        query_tokens=round(query_tokens + loss_tokens),
        label_tokens=label_tokens,
        generated_tokens=round(generated),
        plain_tokens=round(
            repeats * (pairs * prompt + query_tokens)
            + (losses + sampled) * prompt
            + loss_tokens
            + label_tokens
            + generated
            + choosing.plain
        ),
        longest_prompt=lengths.head
        + k * lengths.longest_demo
        + lengths.longest_query
        + (lengths.generated or max(lengths.labels)),
    )


def _stand_ins(generator: np.random.Generator, k: int, count: int) -> NDArray[np.int64]:
    """Orders in place of those that a rule will give: which ones is known only with the scores."""
    return generator.permuted(np.tile(np.arange(k, dtype=np.int64), (count, 1)), axis=1)


def _heads(ablation: Ablation, lengths: Lengths, selector: str) -> int:
    return ablation.sets * (lengths.n_test if looks_at_query(selector) else 1)


def _score_tokens(ablation: Ablation, lengths: Lengths, selector: str, k: int) -> float:
    """Demonstrations read by themselves for sparsity, loss or an embedding; whole pools once, counted with the first k."""
    passes = len({kind_of(name) for name in ablation.orderers} - {None})
    near = any(map(by_similarity, ablation.orderers))
    chooses_by_model = "embeddings" in SELECTORS[selector].needs
    shown = ablation.sets * k * (lengths.n_test if looks_at_query(selector) else 1)
    total = min(shown, lengths.n_pool) * lengths.demo * (passes + (near and not chooses_by_model))
    if k == ablation.shots[0]:
        embedded = near or chooses_by_model
        total += lengths.n_pool * lengths.demo * chooses_by_model + lengths.n_test * lengths.query * embedded
        if selector == ablation.selectors[0]:
            total += _bare_tokens(ablation, lengths)
    return total


class _Choosing(NamedTuple):
    """What choosing sets by the model reads: pairs, tokens, and tokens with nothing shared."""

    pairs: int
    tokens: float
    plain: float


def _choosing(ablation: Ablation, lengths: Lengths, selector: str, k: int) -> _Choosing:
    scores = MODEL_SELECTORS[selector].model_scores if selector in MODEL_SELECTORS else None
    if scores == "query" and k == ablation.shots[0]:
        # Single neighbours from half of the pool, each behind which some queries are read; the same for every k.
        half = (lengths.n_pool + 1) // 2
        pairs = ablation.sets * lengths.n_test * min(NEIGHBOURS, half)
        alone = ablation.sets * min(lengths.n_test * NEIGHBOURS, half)
        tokens = pairs * lengths.query + alone * (lengths.head + lengths.demo)
        return _Choosing(pairs, tokens, pairs * (lengths.head + lengths.demo + lengths.query))
    if scores == "labels":
        # Every query's sets, of which no two share anything.
        pairs = ablation.sets * lengths.n_test * ORGANISATIONS
        prompt, labels = lengths.head + k * lengths.demo + lengths.query, sum(lengths.labels)
        return _Choosing(pairs, pairs * (prompt + labels), pairs * (len(lengths.labels) * prompt + labels))
    return _Choosing(0, 0.0, 0.0)


def _bare_tokens(ablation: Ablation, lengths: Lengths) -> float:
    """Queries without demonstrations, once a task: of a task with labels all of them, else the dev rows where they are read."""
    dev = lengths.n_dev * lengths.dev
    if lengths.generated:
        return dev * any("bare_features" in criterion(name).needs for name in ablation.choosers)
    pairs = lengths.n_test + lengths.n_dev + len(lengths.content_free)
    return lengths.n_test * lengths.query + dev + sum(lengths.content_free) + pairs * sum(lengths.labels)
