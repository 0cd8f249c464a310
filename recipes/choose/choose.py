"""Choose the order of a prompt's demonstrations by querying the model. The recipe for `sparsort choose`.

Contract: the criteria are those that an ablation compares (`curriculum.demos.criteria`), and they read the same outcomes: the
model's predictions for some queries under each candidate order. This recipe applies a criterion. An ablation finds out whether
the criterion helps on a model and a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, When, refuse_unread_arguments
from sparsort.curriculum.ablation.recipe.ablation import probes_of
from sparsort.curriculum.ablation.recipe.splits import alike_rows
from sparsort.curriculum.ablation.recipe.task_data import SetDemos
from sparsort.curriculum.ablation.recipe.tasks import Task, task_from_flags
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.demos.criteria import CRITERIA, Criterion, Evidence, criterion
from sparsort.curriculum.demos.export import ExportFormat, PinnedDemos, write_pinned
from sparsort.curriculum.demos.permutations import random_permutations
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.pool import input_fields
from sparsort.curriculum.demos.pool.rows import id_of
from sparsort.curriculum.demos.prompt import NOT_IN_CHAT, PromptForm
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRIC_NAMES
from sparsort.recipes.choose.prior import Prior, PriorPlan, plan_prior, reads_prior, with_prior
from sparsort.recipes.order.order import MOST_DEMOS
from sparsort.scoring.data.rows import rows_of
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.prompts.types import PromptWriter
from sparsort.terminal.progress import progress
from sparsort.values import text_if_any

if TYPE_CHECKING:
    from sparsort.curriculum.demos.criteria.ranking import OrderRanking
    from sparsort.scoring.loading.load import LoadedModel
    from sparsort.scoring.prompts.functions import PromptFunction

Rows = Sequence[Mapping[str, Any]]

# The conditions under which each argument is read; see `sparsort.conditions`.
READS_QUERIES = When(
    holds=lambda values: _reads_queries(values["by"]),
    why="the criterion reads no queries, and this is {by}",
)
READS_PRIOR = When(
    holds=lambda values: values["by"] is None or not _is_criterion(values["by"]) or reads_prior(values["by"]),
    why="the criterion compares the predictions with no prior, and this is {by}",
    instead={"by": "pdo"},
)
READ_BY: Table = {"allow_leaks": (READS_QUERIES,), "prior": (READS_PRIOR,), "separator": (NOT_IN_CHAT,)}

# Inputs of a criterion that depend on the labels.
_LABEL_INPUTS = frozenset({"log_p", "gold", "prior", "content_free"})


def _criteria_where(where: Callable[[Criterion], bool]) -> str:
    """The criteria that choose an order and for which `where` holds, as a list for a message."""
    return ", ".join(map(repr, CRITERIA.names(lambda entry: entry.chooses == "order" and where(entry))))


def without_labels() -> str:
    """The criteria that need no labels, as a list for a message."""
    return _criteria_where(lambda entry: not entry.needs & _LABEL_INPUTS)


_ON_QUERIES = _criteria_where(lambda entry: entry.needs == {"log_p"})


@dataclass(frozen=True, kw_only=True)
class ChosenOrder:
    """The chosen order of demonstrations, and how it was chosen.

    Attributes:
        demos: the demonstrations in the chosen order.
        order: for each of them, its position in the demonstrations that were passed.
        by: the criterion.
        candidates: every order that was tried, the best one first.
        scores: the criterion's score of each candidate; higher is better.
        tied: the number of candidates with the best score, including the chosen one.
        prior: for PDO, the label shares that it compared the predictions with: their "source", the "shares" by label value, and
            the number of "labelled_rows" that were read to estimate them; None for criteria that read no prior.
        queries: the number of queries that the criterion read under each order.
        tokens_read: the number of tokens that the model read and wrote.
        notes: remarks for the user, one sentence each.
        provenance: the model, the criterion with its source, the task and the seed.
        task: the prompt and the labels.
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
    task: Task = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """The choice as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "task"}

    def export(self, path: str | Path, format: ExportFormat | None = None) -> None:
        """Write the demonstrations in the chosen order for another program; see `export_demonstrations`.

        Raises:
            SparsortError: an unknown format, or a prompt that the format cannot express.
        """
        task = self.task
        form = PromptForm(
            # The chat turns of a task have no white space around them.
            prompt=task.prompt.strip() if task.chat else task.prompt,
            answer=task.answer,
            system=task.system if task.chat else task.instruction,
            separator=task.separator,
            chat=task.chat,
        )
        how = {
            **self.provenance,
            "orders": len(self.candidates),
            "queries": self.queries,
            "prior": self.prior,
            "tokens_read": self.tokens_read,
        }
        write_pinned(
            PinnedDemos(rows=self.demos, form=form, label=task.label, labels=task.labels, provenance=how), path, format
        )


def choose_order(
    demos: Any,
    queries: Any = (),
    *,
    prompt: str | PromptWriter | PromptSpec,
    answer: str | None = None,
    label: str = "label",
    labels: str | Mapping[str, str] | None = None,
    by: str = "pdo",
    orders: int = 24,
    prior: Prior | None = None,
    pool: Any = (),
    separator: str = "\n\n",
    instruction: str = "",
    chat: bool = False,
    system: str | None = None,
    allow_leaks: bool = False,
    model: Any = "demo",
    seed: int = 0,
    **options: Unpack[ModelOptions],
) -> ChosenOrder:
    """Choose the best of some orders of the same demonstrations, by a criterion that queries the model.

    Args:
        demos: k rows, each with the prompt's fields and its label; like `queries` and `pool` in any form that `open_rows` reads.
        queries: rows that the criterion reads under every order. Their labels are not read, except by "best_on_dev". Criteria
            that read probes sampled from the model ("globale", "locale") or content-free inputs need no queries.
        prompt: format string of a row's question, or a function from a row to its question; or a `PromptSpec`, which has
            `answer`, `chat` and `system` too.
        answer: format string of the answer that follows; by default a space and the label.
        label: the field of the label.
        labels: "0=negative,1=positive", or a mapping from value to words. By default the values in the demonstrations and the
            pool, and for "best_on_dev" in the queries. Criteria without labels ("density", …) need none.
        by: the name of a criterion, or several joined by "+" for the mean of their ranks. "pdo_prior" is "pdo" with the prior
            "pool".
        orders: the number of orders to try: all k! of them if there are no more, otherwise distinct random ones.
        prior: the label shares that "pdo" expects the model to predict. "uniform". "pool": the shares of `pool`, which is right
            only if the queries have the same shares. "mixed": the mean of these two. "estimated": the shares of the queries,
            estimated from the predictions for them, after the model's bias was fitted on up to 64 labelled rows of `pool`, which
            are read under one order. A mapping from label value to share or count, a file with such a mapping, or a file of
            labelled rows. The default is "estimated" if `pool` has at least 16 labelled rows besides demonstrations and
            queries; "mixed" if the queries are rows of the pool; and otherwise "uniform". For the reasons see
            docs/results/ordering-study.md, "Which prior".
        pool: labelled rows from which the demonstrations were drawn; only a prior reads them.
        separator, instruction, chat, system: see `Task`.
        allow_leaks: whether queries may be among the demonstrations.
        model: a `ModelSpec`, or anything that its `name` takes.
        seed: seed for the orders, for sampled probes, and for the choice between equal orders.
        options: fields of `ModelSpec`: `dtype`, `device`, `token_budget`, `revision`, `trust_remote_code`, `tokenizer`.

    Raises:
        SparsortError: the input is wrong; the message says how to correct it.
    """
    demos, queries, pool = rows_of(demos), rows_of(queries), rows_of(pool)
    spec, text = ModelSpec.of(model, **options), PromptSpec.of(prompt, answer=answer, system=system, chat=chat)
    arguments = {"by": by, "allow_leaks": allow_leaks, "prior": prior, "separator": separator, "chat": text.chat}
    refuse_unread_arguments(choose_order, READ_BY, arguments)
    entry = _order_criterion(by)
    reads_queries = _reads_queries(by)
    _check_call(demos, queries, entry, reads_queries=reads_queries, orders=orders, seed=seed)
    if pool and not reads_prior(by):
        raise SparsortError(f"pool= has no effect: it is read for a prior, and by={by!r} reads none. Omit it.")
    given = demos
    text, function = text.as_column()
    # The text of a function has words that all rows share, so rows are compared by the fields that it reads.
    compared = [] if function is None else input_fields(function, [*demos, *queries, *pool], label)
    if function is not None:
        demos, queries = function.add_column(demos, "demonstration"), function.add_column(queries, "query")
        pool = function.add_column(pool, "pool row")
    labelled = [*demos, *(row for row in pool if text_if_any(row, label, where="a row of the pool") is not None)]
    task = _task(labelled, queries, entry, text, label, labels, separator, instruction)
    compared = compared or input_fields(task.prompt)
    _check_rows(task, demos, queries, entry, compared=compared, reads_queries=reads_queries, allow_leaks=allow_leaks)
    plan = None
    if reads_prior(by):
        plan = plan_prior(
            task, by, prior, demos, queries, pool, compared=compared, reads_queries=reads_queries, seed=seed
        )
        entry = criterion(with_prior(by))
    # 20! is far above any number of orders, and the factorial of a longer list would be a very long integer.
    count = min(orders, math.factorial(min(len(demos), 20)))
    orders_RK = random_permutations(len(demos), count, seed)
    loaded = spec.load()
    reader = _OrderReader(task, [dict(row) for row in demos], orders_RK, loaded, spec.token_budget)
    notes = duplicates(demos, [task.demo_text(row) for row in demos])
    texts = _query_texts(reader, task, by, queries, seed, notes)
    gold = np.array([task.gold_index(row) for row in queries]) if "gold" in entry.needs else None
    evidence = reader.evidence(texts, entry, gold)
    if plan is not None:
        plan = reader.with_shares(plan, evidence)
        evidence = replace(evidence, prior=plan.shares)
        notes += [plan.sentence(), *plan.notes]
    choice = entry.choose(evidence, seed=seed)
    scores = entry.scores(evidence)
    ranked = choice.ranking.tolist()
    if choice.tied > 1:
        notes.append(_how_ties_were_broken(choice, count))
    order = orders_RK[choice.index].tolist()
    return ChosenOrder(
        demos=[dict(given[place]) for place in order],
        order=order,
        by=by,
        candidates=orders_RK[ranked].tolist(),
        scores=[float(scores[place]) for place in ranked],
        tied=choice.tied,
        prior=None if plan is None else plan.summary(),
        queries=len(texts),
        tokens_read=reader.tokens_read,
        notes=notes,
        provenance=_provenance(loaded, task, by, entry, seed) | _function_record(function),
        task=task,
    )


def _query_texts(reader: _OrderReader, task: Task, by: str, queries: Rows, seed: int, notes: list[str]) -> list[str]:
    """The texts that the criterion reads under every order: those of the queries, sampled probes, or none.

    Raises:
        SparsortError: no sampled probe has the form of a query.
    """
    probes = probes_of(by, sampled=True)
    if probes != "sampled":
        return [task.query_text(row) for row in queries] if probes == "dev" else []
    texts = reader.sample_queries(seed)
    if not texts:
        raise SparsortError(
            f"not one of {reader.count} probes sampled from the model has the form of a query of this prompt, so {by!r} has "
            f"nothing to choose by. Pass queries of your own, and a criterion that reads them: {_ON_QUERIES}."
        )
    if queries:
        notes.append(f"{by} reads probes sampled from the model: the {len(queries)} queries given were not read.")
    return texts


def _how_ties_were_broken(ranking: OrderRanking, count: int) -> str:
    if ranking.drawn > 1:
        how = f"among {ranking.drawn} of them, one was drawn by the seed"
    else:
        how = "the likelihood of the right labels decided"
    return f"{ranking.tied} of {count} orders share the best score; {how}."


def _provenance(loaded: LoadedModel, task: Task, by: str, entry: Criterion, seed: int) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "weights": loaded.weights,
        "dtype": str(loaded.dtype.value).removeprefix("torch."),
        "criterion": by,
        "source": entry.source,
        "labels": None if task.labels is None else dict(task.labels),
        "task": task.digest,
        "seed": seed,
    }


def _function_record(function: PromptFunction | None) -> dict[str, Any]:
    # The digest of the task covers templates only.
    return {} if function is None else {"prompt": function.description}


class _OrderReader:
    """Reads the model's predictions under every order of one set of demonstrations.

    Args:
        task: the prompt and the labels.
        demos: k rows.
        orders_RK: (R, k) candidate orders.
        loaded: the model.
        token_budget: tokens of one batch; None for the device's default.
    """

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
        self._set_demos = SetDemos(rows=demos, of_query=np.arange(len(demos))[None])
        self.count = len(orders_RK)
        self.tokens_read = 0

    def sample_queries(self, seed: int) -> list[str]:
        """Queries that the model writes, one after each order (arXiv 2104.08786)."""
        from sparsort.curriculum.ablation.run.probing import probes

        sampled = probes(self._reader, self._texts, self._set_demos, self._orders, seed)
        self.tokens_read += sampled["sampling_tokens"]
        return list(sampled["texts"])

    def with_shares(self, plan: PriorPlan, evidence: Evidence) -> PriorPlan:
        """The plan with its shares. To estimate them, the labelled rows are read under the first order."""
        if plan.shares is not None:
            return plan
        texts = [self._task.query_text(row) for row in plan.labelled]
        log_p, _ = self._read(self._set_demos.demos(0, self._orders[0]), texts)
        return plan.estimate(evidence.log_p[0], log_p, [self._task.gold_index(row) for row in plan.labelled])

    def evidence(self, queries: Sequence[str], entry: Criterion, gold: NDArray[np.int64] | None) -> Evidence:
        """The inputs of the criterion under every order, except a prior."""
        free = self._task.content_free_texts() if "content_free" in entry.needs else []
        log_p: list[Any] = [None] * self.count
        features: list[Any] = [None] * self.count
        with progress("orders", self.count) as advance:
            # In lexicographic order, orders with the same first demonstrations follow each other, and the reader reuses its
            # keys and values for what two prefixes have in common.
            for place in np.lexsort(self._orders.T[::-1]).tolist():
                demos = self._set_demos.demos(0, self._orders[place])
                log_p[place], features[place] = self._read(demos, [*queries, *free])
                advance(1)
        bare = self._read([], queries)[1] if "bare_features" in entry.needs else None
        # The content-free inputs are read in the same pass, after the queries.
        count, has_labels = len(queries), bool(self._task.labels)
        return Evidence(
            log_p=np.stack(log_p)[:, :count] if has_labels and count else None,
            content_free=np.stack(log_p)[:, count:] if free else None,
            features=np.stack(features)[:, :count] if count else None,
            bare_features=bare,
            gold=gold,
            metrics=METRIC_NAMES,
        )

    def _read(self, demos: Rows, queries: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(N, L) log-probabilities of the labels, and (N, F) metrics of the state after the final norm."""
        chunks = self._texts.prefix(demos)
        answers = self._reader.answers(
            chunks, [self._texts.query(demos, text) for text in queries], self._texts.answers
        )
        self.tokens_read += answers.tokens_read
        return answers.log_p, answers.features[:, self._post_norm]


def needs_labels(by: str) -> bool:
    """Whether a criterion scores labels, so that it needs to know all of them."""
    return bool(criterion(by).needs & _LABEL_INPUTS)


def _reads_queries(by: str) -> bool:
    """Whether a criterion reads the caller's queries; true for a name that is not a criterion."""
    return not _is_criterion(by) or probes_of(by, sampled=True) == "dev"


def _is_criterion(by: str) -> bool:
    try:
        criterion(by)
    except SparsortError:
        return False
    return True


def _order_criterion(by: str) -> Criterion:
    """The criterion of this name, which must choose one order for all queries."""
    entry = criterion(by)
    if {"gold", "sampled"} <= entry.needs:
        raise SparsortError(
            f"{by!r} joins right labels with probes sampled from the model, which have none. Join a criterion that reads your "
            f"queries: {_ON_QUERIES}."
        )
    if entry.chooses != "order":
        raise SparsortError(
            f"{by!r} chooses demonstrations for every query, not one order for all. Take one of {_ON_QUERIES}, or measure its "
            "effect in an ablation (sparsort ablate)."
        )
    return entry


def _task(
    labelled: Rows,
    queries: Rows,
    entry: Criterion,
    prompt: PromptSpec,
    label: str,
    labels: str | Mapping[str, str] | None,
    separator: str,
    instruction: str,
) -> Task:
    scored = needs_labels(entry.name) or labels is not None
    return task_from_flags(
        [*labelled, *(queries if "gold" in entry.needs else ())],
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


def _check_call(demos: Rows, queries: Rows, entry: Criterion, *, reads_queries: bool, orders: int, seed: int) -> None:
    if orders < 1:
        raise SparsortError(f"orders is {orders}; at least 1 is needed.")
    if seed < 0:
        raise SparsortError(f"the seed is {seed}; it may not be negative.")
    if len(demos) < 2:
        raise SparsortError(f"there are {len(demos)} demonstrations; an order needs at least 2.")
    if len(demos) > MOST_DEMOS:
        raise SparsortError(
            f"there are {len(demos)} demonstrations; a prompt here has at most {MOST_DEMOS}. Select some first (-k)."
        )
    if reads_queries and not queries:
        raise SparsortError(
            f"{entry.name!r} reads queries under every order, and none were given (--queries FILE). Give 16 or more: rows with "
            "the prompt's fields" + (" and their labels." if "gold" in entry.needs else "; no labels are read.")
        )


def _check_rows(
    task: Task,
    demos: Rows,
    queries: Rows,
    entry: Criterion,
    *,
    compared: Sequence[str],
    reads_queries: bool,
    allow_leaks: bool,
) -> None:
    """Refuse rows that do not fit, before any model is loaded."""
    for row in demos:
        task.demo_text(row)
    if not reads_queries:
        return
    for row in queries:
        task.query_text(row)
        if "gold" in entry.needs:
            task.gold_index(row)
    leaks = {} if allow_leaks else alike_rows(compared, list(map(dict, demos)), list(map(dict, queries)))
    if leaks:
        demo, (query, similarity) = min(leaks.items())
        raise SparsortError(
            f"query {id_of(queries[query], query)!r} is, or nearly is, demonstration {id_of(demos[demo], demo)!r} (similarity "
            f"{similarity:.2f}); the model would only have to copy its answer. Remove one of them, or pass allow_leaks=True "
            "(--allow-leaks)."
        )
