"""Choose the order of a prompt's demonstrations with the model in the loop: the recipe behind `sparsort choose`.

Contract: the criteria are those that an ablation compares (`curriculum.demos.criteria`), read from the same outcomes: what the
model says to some queries under each candidate order. Whether a criterion helps on a model and task is for an ablation to find
out; this applies it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, When, refuse_unread_arguments
from sparsort.curriculum.ablation.recipe.ablation import probes_of
from sparsort.curriculum.ablation.recipe.splits import alike_rows
from sparsort.curriculum.ablation.recipe.task_data import SetDemos
from sparsort.curriculum.ablation.recipe.tasks import MOST_LABELS, Task, check_row, parse_labels, task_from_flags
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.demos.criteria import CRITERIA, Criterion, Evidence, criterion
from sparsort.curriculum.demos.permutations import random_permutations
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.rows import id_of
from sparsort.curriculum.demos.prompt import NOT_IN_CHAT
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRIC_NAMES
from sparsort.recipes.choose.prior import Prior, PriorPlan, plan_prior, reads_prior, with_prior
from sparsort.recipes.order.order import MOST_DEMOS
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.templates import fields_of, render
from sparsort.terminal.progress import progress
from sparsort.values import text_if_any

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.loading.load import LoadedModel

Rows = Sequence[Mapping[str, Any]]

# What an argument needs to be read; see `sparsort.conditions`.
READS_QUERIES = When(
    holds=lambda values: _asks(values["by"]),
    why="the criterion reads no queries, and this is {by}",
)
READS_PRIOR = When(
    holds=lambda values: values["by"] is None or not _is_criterion(values["by"]) or reads_prior(values["by"]),
    why="the criterion compares the predictions with no prior, and this is {by}",
    instead={"by": "pdo"},
)
READ_BY: Table = {"allow_leaks": (READS_QUERIES,), "prior": (READS_PRIOR,), "separator": (NOT_IN_CHAT,)}

_LABELS = frozenset({"log_p", "gold", "prior", "content_free"})


def _criteria_where(where: Callable[[Criterion], bool]) -> str:
    """The criteria that choose an order and for which `where` holds, as a message lists them."""
    return ", ".join(map(repr, CRITERIA.names(lambda entry: entry.chooses == "order" and where(entry))))


_ON_QUERIES = _criteria_where(lambda entry: entry.needs == {"log_p"})


@dataclass(frozen=True, kw_only=True)
class ChosenOrder:
    """An order of demonstrations, and how it came about.

    Attributes:
        demos: the demonstrations in the chosen order.
        order: their positions in what was given.
        by: the criterion.
        candidates: every order that was tried, best first.
        scores: the criterion's score of each, higher is better.
        tied: how many candidates share the best score, the chosen one included.
        prior: for PDO the label shares that it compared predictions with: their "source", the "shares" by label value, and
            how many "labelled_rows" were read to estimate them; None for criteria that read no prior.
        queries: how many queries the criterion read under each order.
        tokens_read: tokens that the model read and wrote.
        notes: what a reader should know, one sentence each.
        provenance: model, criterion and source, task, seed.
    """

    demos: list[dict[str, Any]]
    order: list[int]
    by: str
    candidates: list[list[int]]
    scores: list[float]
    tied: int
    prior: dict[str, Any] | None
    queries: int
    tokens_read: int
    notes: list[str]
    provenance: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """The choice as JSON values."""
        return dict(vars(self))


def choose_order(
    demos: Rows,
    queries: Rows = (),
    *,
    prompt: str | PromptSpec,
    answer: str | None = None,
    label: str = "label",
    labels: str | Mapping[str, str] | None = None,
    by: str = "pdo",
    orders: int = 24,
    prior: Prior | None = None,
    pool: Rows = (),
    separator: str = "\n\n",
    instruction: str = "",
    chat: bool = False,
    system: str | None = None,
    allow_leaks: bool = False,
    model: Any = "demo",
    seed: int = 0,
    **options: Unpack[ModelOptions],
) -> ChosenOrder:
    """Choose the best of some orders of the same demonstrations by a criterion that asks the model.

    Args:
        demos: k rows, each with the prompt's fields and its label.
        queries: rows that the criterion asks about under every order, without their labels but for "best_on_dev". Criteria
            that read probes sampled from the model ("globale", "locale") or content-free inputs take none.
        prompt: format string of a row's question; or a `PromptSpec`, which holds `answer`, `chat` and `system` too.
        answer: format string of what follows it; by default a space and the label.
        label: the field of the label.
        labels: "0=negative,1=positive", or a mapping from value to words; None: the values that the demonstrations and the
            pool hold, and for "best_on_dev" the queries. Criteria without labels ("density", …) need none.
        by: a criterion's name, or several joined by "+": the mean of their ranks. "pdo_prior" is "pdo" with the prior "pool".
        orders: how many orders are tried: all k! where there are no more, else distinct random ones.
        prior: the label shares that "pdo" expects the model to predict. "uniform". "pool": the shares of `pool`, right only
            if the queries have the same. "mixed": the mean of these two. "estimated": those of the queries, estimated from
            the predictions for them once the model's bias is fitted on up to 64 labelled rows of `pool`, which are read under
            one order. A mapping from label value to share or count, or a file that holds one, or a file of labelled rows. By
            default "estimated" if `pool` has at least 16 labelled rows besides demonstrations and queries; "mixed" if the
            queries are rows of it; otherwise "uniform". Why: docs/results/ordering-study.md, "Which prior".
        pool: labelled rows from which the demonstrations were drawn, for the prior alone.
        separator, instruction, chat, system: as `Task`.
        allow_leaks: let queries stand among the demonstrations.
        model: a `ModelSpec`, or what its `name` takes.
        seed: of the orders, of sampled probes, and between equals.
        options: fields of `ModelSpec`: `dtype`, `device`, `token_budget`, `revision`, `trust_remote_code`, `tokenizer`.

    Raises:
        SparsortError: bad input; the message says what to do.
    """
    spec, text = ModelSpec.of(model, **options), PromptSpec.of(prompt, answer=answer, system=system, chat=chat)
    read = {"by": by, "allow_leaks": allow_leaks, "prior": prior, "separator": separator, "chat": text.chat}
    refuse_unread_arguments(choose_order, READ_BY, read)
    chosen_by = _criterion(by)
    probes = probes_of(by, sampled=True)
    asks = probes == "dev"
    _check_call(demos, queries, chosen_by, asks=asks, orders=orders, seed=seed)
    if pool and not reads_prior(by):
        raise SparsortError(f"pool= has no effect: it is read for a prior, and by={by!r} reads none. Leave it out.")
    shown = [*demos, *(row for row in pool if text_if_any(row, label, where="a row of the pool") is not None)]
    task = _task(shown, queries, chosen_by, text, label, labels, separator, instruction)
    _check_rows(task, demos, queries, chosen_by, asks=asks, allow_leaks=allow_leaks)
    plan = None
    if reads_prior(by):
        plan = plan_prior(task, by, prior, demos, queries, pool, asks=asks, seed=seed)
        chosen_by = criterion(with_prior(by))
    count = min(orders, math.factorial(min(len(demos), 20)))
    orders_RK = random_permutations(len(demos), count, seed)
    loaded = spec.load()
    asking = _Asking(task, [dict(row) for row in demos], orders_RK, loaded, spec.token_budget)
    notes = duplicates(demos, [task.demo_text(row) for row in demos])
    if probes == "sampled":
        texts = asking.sampled(seed)
        if not texts:
            raise SparsortError(
                f"of {count} probes sampled from the model none reads as a query of this prompt, so {by!r} has nothing to "
                "choose by. Give queries of your own, and take a criterion that reads them: "
                f"{_ON_QUERIES}."
            )
        if queries:
            notes.append(f"{by} reads probes sampled from the model: the {len(queries)} queries given were not read.")
    else:
        texts = [task.query_text(row) for row in queries] if asks else []
    gold = np.array([task.gold_index(row) for row in queries]) if "gold" in chosen_by.needs else None
    evidence = asking.evidence(texts, chosen_by, gold)
    if plan is not None:
        plan = asking.with_shares(plan, evidence)
        evidence = replace(evidence, prior=plan.shares)
        notes += [plan.sentence(), *plan.notes]
    choice = chosen_by.choose(evidence, seed=seed)
    scores = chosen_by.scores(evidence)
    ranked = choice.ranking.tolist()
    if choice.tied > 1:
        how = (
            f"among {choice.drawn} of them the seed drew"
            if choice.drawn > 1
            else "the right labels' likelihood decided"
        )
        notes.append(f"{choice.tied} of {count} orders share the best score; {how}.")
    order = orders_RK[choice.index].tolist()
    return ChosenOrder(
        demos=[dict(demos[place]) for place in order],
        order=order,
        by=by,
        candidates=orders_RK[ranked].tolist(),
        scores=[float(scores[place]) for place in ranked],
        tied=choice.tied,
        prior=None if plan is None else plan.summary(),
        queries=len(texts),
        tokens_read=asking.tokens_read,
        notes=notes,
        provenance={
            "model": loaded.name,
            "weights": loaded.weights,
            "dtype": str(loaded.dtype.value).removeprefix("torch."),
            "criterion": by,
            "source": chosen_by.source,
            "labels": None if task.labels is None else dict(task.labels),
            "task": task.digest,
            "seed": seed,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Given:
    """What files hold for `choose_order`.

    Attributes:
        demos, queries: rows, each with its id.
        pool: every row of `file`.
        counts: how often each value of the label column stands in `file`.
    """

    demos: list[dict[str, Any]]
    queries: list[dict[str, Any]]
    pool: list[dict[str, Any]]
    counts: dict[str, int]

    def label_set(self, label: str, labels: str | None) -> dict[str, str]:
        """Value to words: what was given ("0=negative,1=positive"), else every value of the file, or none where it has none.

        Raises:
            SparsortError: so many that they are no labels.
        """
        if labels:
            return parse_labels(labels)
        if len(self.counts) > MOST_LABELS:
            raise SparsortError(
                f"the column {label!r} has {len(self.counts)} different values, so it does not look like a label. Name the "
                f"labels (--labels), or take a criterion that reads none: {_criteria_where(lambda one: not one.needs & _LABELS)}."
            )
        return {value: value for value in self.counts}


def read_rows(
    file: str | Path,
    on: str | Path | None = None,
    *,
    prompt: str | None,
    label: str = "label",
    k: int | None = None,
    queries: int = 32,
    seed: int = 0,
    data: DataSpec = DataSpec(),
) -> Given:
    """Demonstrations and queries of files.

    Args:
        file: the demonstrations; with `k` the rows that they are drawn from.
        on: the queries; None, or `file` itself: with `k`, rows of `file` that were not drawn and are not like those that were.
        prompt: names the columns that are needed.
        label: the column of the label.
        k: how many demonstrations to draw; None for all of `file`.
        queries: most queries; of more rows, as many are drawn.
        seed: of the drawing.
        data: how `file` and `on` are read; the column of ids is that of `file`.

    Raises:
        SparsortError: files that cannot be read, or too few rows.
    """
    if queries < 1:
        raise SparsortError(f"queries is {queries}; at least 1 is needed.")
    if seed < 0:
        raise SparsortError(f"the seed is {seed}; it may not be negative.")
    source = _source(file, prompt, data)
    rows = _fields(source)
    if k is not None and not 2 <= k <= len(rows):
        raise SparsortError(
            f"{k} demonstrations were asked for (-k), and {file} holds {len(rows)} rows. Ask for 2 or more of them."
        )
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(rows)).tolist()
    shown = range(len(rows)) if k is None else drawn[:k]
    source.check(functools.partial(check_row, prompt=prompt or "", label=label), shown)
    source.check(lambda fields, where: text_if_any(fields, label, where=where))
    demos = [rows[place] for place in shown]
    if on is None or Path(on).resolve() == Path(file).resolve():
        left = [] if k is None else drawn[k:]
        source.check(lambda fields, where: render(prompt or "", fields, where=where), left)
        rest = [rows[place] for place in left]
        alike = alike_rows(fields_of(prompt or ""), rest, demos)
        asked = [row for place, row in enumerate(rest) if place not in alike][:queries]
    else:
        other = _source(on, prompt, replace(data, id_column=None))
        others = _fields(other)
        places = sorted(generator.permutation(len(others))[:queries].tolist())
        other.check(lambda fields, where: render(prompt or "", fields, where=where), places)
        asked = [others[place] for place in places]
    values = [text_if_any(row, label, where=f"row {row['id']!r}") for row in rows]
    counts = Counter(value for value in values if value is not None)
    return Given(demos=demos, queries=asked, pool=rows, counts=dict(sorted(counts.items())))


def _source(file: str | Path, prompt: str | None, data: DataSpec) -> RowSource:
    source = data.open(file)
    if prompt is None:
        raise SparsortError(
            "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces; "
            f"{Path(file).name} has: {', '.join(source.columns())}."
        )
    return source


def _fields(source: RowSource) -> list[dict[str, Any]]:
    return [dict(row.fields) | {"id": row.id} for row in source.rows()]


class _Asking:
    """A model that is asked under every order of one set of demonstrations."""

    def __init__(
        self,
        task: Task,
        demos: list[dict[str, Any]],
        orders_RK: NDArray[np.int64],
        loaded: LoadedModel,
        token_budget: int | None,
    ) -> None:
        from sparsort.scoring.answers.reader import POST_NORM, AnswerReader

        self._post_norm = POST_NORM
        self._task, self._orders = task, orders_RK
        self._reader = AnswerReader(loaded, chat=task.chat, token_budget=token_budget)
        self._texts = Texts(task, loaded.tokenizer)
        self._showing = SetDemos(rows=demos, of_query=np.arange(len(demos))[None])
        self.tokens_read = 0

    def sampled(self, seed: int) -> list[str]:
        """Queries that the model writes, one behind each order (arXiv 2104.08786)."""
        from sparsort.curriculum.ablation.run.probing import probes

        found = probes(self._reader, self._texts, self._showing, self._orders, seed)
        self.tokens_read += found["sampling_tokens"]
        return list(found["texts"])

    def with_shares(self, plan: PriorPlan, evidence: Evidence) -> PriorPlan:
        """The plan with its shares; to estimate them the labelled rows are read under the first of the orders."""
        if plan.shares is not None:
            return plan
        texts = [self._task.query_text(row) for row in plan.labelled]
        log_p, _ = self._ask(self._showing.demos(0, self._orders[0]), texts)
        return plan.estimate(evidence.log_p[0], log_p, [self._task.gold_index(row) for row in plan.labelled])

    def evidence(self, queries: Sequence[str], by: Criterion, gold: NDArray[np.int64] | None) -> Evidence:
        """What the criterion reads, except a prior, under every order; orders that begin alike follow one another."""
        free = self._task.content_free_texts() if "content_free" in by.needs else []
        log_p: list[Any] = [None] * len(self._orders)
        features: list[Any] = [None] * len(self._orders)
        with progress("orders", len(self._orders)) as advance:
            for place in np.lexsort(self._orders.T[::-1]).tolist():
                demos = self._showing.demos(0, self._orders[place])
                log_p[place], features[place] = self._ask(demos, [*queries, *free])
                advance(1)
        bare = self._ask([], queries)[1] if "bare_features" in by.needs else None
        asked, labels = len(queries), bool(self._task.labels)
        return Evidence(
            log_p=np.stack(log_p)[:, :asked] if labels and asked else None,
            content_free=np.stack(log_p)[:, asked:] if free else None,
            features=np.stack(features)[:, :asked] if asked else None,
            bare_features=bare,
            gold=gold,
            metrics=METRIC_NAMES,
        )

    def _ask(self, demos: Rows, queries: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(N, L) log-probabilities, and (N, F) metrics of the state after the final norm."""
        chunks = self._texts.prefix(demos)
        found = self._reader.answers(chunks, [self._texts.query(demos, text) for text in queries], self._texts.answers)
        self.tokens_read += found.tokens_read
        return found.log_p, found.features[:, self._post_norm]


def needs_labels(by: str) -> bool:
    """Whether a criterion scores labels, so that it must know them all."""
    return bool(criterion(by).needs & _LABELS)


def _asks(by: str) -> bool:
    """Whether a criterion reads queries that are given; true for anything that is not a criterion."""
    return not _is_criterion(by) or probes_of(by, sampled=True) == "dev"


def _is_criterion(by: str) -> bool:
    try:
        criterion(by)
    except SparsortError:
        return False
    return True


def _criterion(by: str) -> Criterion:
    found = criterion(by)
    if {"gold", "sampled"} <= found.needs:
        raise SparsortError(
            f"{by!r} joins right labels with probes sampled from the model, which have none. Join a criterion that reads your "
            f"queries: {_ON_QUERIES}."
        )
    if found.chooses != "order":
        raise SparsortError(
            f"{by!r} chooses demonstrations for every query, not one order for all. Take one of {_ON_QUERIES}, or see what it "
            "is worth in an ablation (sparsort ablate)."
        )
    return found


def _task(
    shown: Rows,
    queries: Rows,
    by: Criterion,
    prompt: PromptSpec,
    label: str,
    labels: str | Mapping[str, str] | None,
    separator: str,
    instruction: str,
) -> Task:
    scored = needs_labels(by.name) or labels is not None
    return task_from_flags(
        [*shown, *(queries if "gold" in by.needs else ())],
        prompt=prompt.for_demonstrations,
        answer=prompt.answer,
        label=label,
        labels=labels if scored else None,
        judge="labels" if scored else "exact",
        name="demonstrations",
        separator=separator,
        instruction=instruction,
        chat=prompt.chat,
        system=prompt.system,
    )


def _check_call(demos: Rows, queries: Rows, by: Criterion, *, asks: bool, orders: int, seed: int) -> None:
    if orders < 1:
        raise SparsortError(f"orders is {orders}; at least 1 is needed.")
    if seed < 0:
        raise SparsortError(f"the seed is {seed}; it may not be negative.")
    if len(demos) < 2:
        raise SparsortError(f"there are {len(demos)} demonstrations; an order needs at least 2.")
    if len(demos) > MOST_DEMOS:
        raise SparsortError(
            f"there are {len(demos)} demonstrations; at most {MOST_DEMOS} make a prompt here. Select some first (-k)."
        )
    if asks and not queries:
        raise SparsortError(
            f"{by.name!r} asks the model about queries under every order, and none were given (--on). Give some, 16 or more: "
            "rows with the prompt's fields" + (" and their labels." if "gold" in by.needs else "; no labels are read.")
        )


def _check_rows(task: Task, demos: Rows, queries: Rows, by: Criterion, *, asks: bool, allow_leaks: bool) -> None:
    """Refuse rows that do not fit, before any model is loaded."""
    for row in demos:
        task.demo_text(row)
    if not asks:
        return
    for row in queries:
        task.query_text(row)
        if "gold" in by.needs:
            task.gold_index(row)
    leaks = {} if allow_leaks else alike_rows(task.fields, list(map(dict, demos)), list(map(dict, queries)))
    if leaks:
        demo, (query, similarity) = min(leaks.items())
        raise SparsortError(
            f"query {id_of(queries[query], query)!r} is, or nearly is, demonstration {id_of(demos[demo], demo)!r} (similarity "
            f"{similarity:.2f}); the model would only have to copy its answer. Leave it out, or pass allow_leaks=True "
            "(--allow-leaks)."
        )
