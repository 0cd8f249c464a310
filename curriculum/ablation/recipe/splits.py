"""Which rows are asked (test), which choose an order (dev), and which may be shown (pool); and the sets that are drawn.

Contract: pure and seeded; draws go by the position of a row, so the same rows in another order are split otherwise. No row of
the pool is, or nearly is, a test or dev row (`demos.pool.leaks`), and no dev row is a test row; excluded rows are reported. The
pool and the dev rows do not change with the number of test rows, and more test rows are the fewer ones and some more behind
them, so a study can grow without asking again what it has asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.selectors import SELECTORS, check_selector
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.demos.pool.fingerprints import tokens
from sparsort.curriculum.demos.pool.leaks import find_leaks
from sparsort.curriculum.demos.pool.pool import DemoPool, field_text
from sparsort.curriculum.demos.pool.rows import ID_FIELD
from sparsort.curriculum.demos.select import select_demos
from sparsort.errors import SparsortError
from sparsort.values import has_text, is_missing, not_text

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A training row that is neither shown nor asked: its id and a sentence."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows of a task, each with its id in the field "id".

    Attributes:
        test: the rows that are asked, labels known to the judge only.
        dev: the rows that choose an order, where an orderer asks for such.
        pool: the rows that demonstrations are drawn from.
        dropped: training rows in none of these.
        notes: what a reader should know, one sentence each.
    """

    test: list[Fields]
    dev: list[Fields]
    pool: list[Fields]
    dropped: list[Dropped]
    notes: list[str]


def read_rows(task: Task, folder: Path | None, which: str) -> list[Fields] | None:
    """The rows of a task's file, with their ids; None where the task names no such file.

    A row without an id of its own gets its position's, "train:17" or "test:17".

    Args:
        task: the task.
        folder: the data folder; a file is looked for under its path, then under its bare name. None: this folder.
        which: "train" or "test".

    Raises:
        SparsortError: the file is missing or broken, or a row has no text in a field of the prompt or in its label.
    """
    from sparsort.scoring.data.rows import open_rows

    name = task.train if which == "train" else task.test
    if name is None:
        return None
    base = Path() if folder is None else folder.expanduser()
    path = base / name
    if not path.exists() and (base / path.name).exists():
        path = base / path.name
    source = open_rows(path, id_column=task.id_column, columns=task.columns)
    source.check(task.check_row)
    if source.id_column is None:
        return [_identified(row.fields, row.position, which) for row in source.rows()]
    return [dict(row.fields) | {ID_FIELD: row.id} for row in source.rows()]


def split_rows(
    task: Task,
    train: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]] | None = None,
    *,
    n_test: int = 256,
    n_dev: int = 32,
    max_demo_chars: int | None = None,
    seed: int = 0,
) -> Splits:
    """Split a task's rows into test, dev and pool.

    Args:
        task: says what a row's question is; only that is compared.
        train: the rows with known labels; one without a field "id" gets its position's, "train:17".
        test: the test rows. None: half of `train`, drawn by the seed, is set aside, and test rows come from there.
        n_test: how many test rows, drawn by the seed; all, with a note, where there are fewer.
        n_dev: how many dev rows.
        max_demo_chars: longer demonstrations, in characters, leave the pool.
        seed: of the draws.

    Raises:
        SparsortError: a row lacks a field, or nothing is left for the pool.
    """
    if n_test < 1 or n_dev < 0:
        raise SparsortError(f"n_test is {n_test} and n_dev {n_dev}; at least 1 test row and 0 dev rows are needed.")
    if max_demo_chars is not None and max_demo_chars < 1:
        raise SparsortError(f"max_demo_chars is {max_demo_chars}; at least 1 is needed, or None for no limit.")
    generator = np.random.default_rng(seed)
    shuffled = [_identified(train[place], place, "train") for place in generator.permutation(len(train)).tolist()]
    notes = []
    if test is None:
        asked, shuffled = shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]
        notes.append(f"there is no test file, so {len(asked)} of the {len(train)} training rows were set aside for it.")
    else:
        asked = [_identified(test[place], place, "test") for place in generator.permutation(len(test)).tolist()]
    if n_test > len(asked):
        notes.append(f"{n_test} test rows were asked for; there are {len(asked)}.")
    # All that could be asked, whatever n_test is: else the pool would change with it.
    free, leaked = _without_leaks(task, shuffled, asked, "a test row")
    dev, rest = free[:n_dev], free[n_dev:]
    pool, leaked_dev = _without_leaks(task, rest, dev, "a dev row")
    limit = math.inf if max_demo_chars is None else max_demo_chars
    too_long = [row for row in pool if len(task.demo_text(row)) > limit]
    pool = [row for row in pool if len(task.demo_text(row)) <= limit]
    reason = f"it is longer than {max_demo_chars} characters as a demonstration"
    dropped = [*leaked, *leaked_dev, *(Dropped(id=str(row[ID_FIELD]), reason=reason) for row in too_long)]
    reasons = Counter(item.reason.partition(" (")[0] for item in dropped)
    if len(dev) < n_dev or not pool or not asked:
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        raise SparsortError(
            f"the task {task.name!r} has {len(train)} training rows, of which {len(asked) if test is None else 0} were "
            f"set aside for the test and {len(dropped)} left out{why and f' ({why})'}; {len(dev)} of {n_dev} dev rows and "
            f"{len(pool)} rows to show are left. {_more_rows(leaked, too_long, n_free=len(free))}"
        )
    for why, count in reasons.items():
        notes.append(f"{count} training row{' was' if count == 1 else 's were'} left out: {why}.")
    return Splits(test=asked[:n_test], dev=dev, pool=pool, dropped=dropped, notes=notes)


def _more_rows(leaked: list[Dropped], too_long: list[Fields], *, n_free: int) -> str:
    """What leaves more rows to show, by what took them."""
    steps = ["give more training rows"]
    if leaked:
        steps = ["give more training rows that do not repeat each other or the test rows"]
    if too_long:
        steps.append("raise max_demo_chars (--max-demo-chars)")
    if n_free > 1:
        steps.append("ask for fewer dev rows with dev_rows (--dev-rows)")
    steps[0] = steps[0].capitalize()
    return f"{', '.join(steps[:-1])}, or {steps[-1]}." if len(steps) > 1 else f"{steps[0]}."


def draw_sets(
    task: Task,
    pool: DemoPool | Sequence[Mapping[str, Any]],
    selector: str,
    k: int,
    seeds: Sequence[int],
    *,
    embeddings: Any = None,
    scores: NDArray[Any] | None = None,
) -> list[list[int]]:
    """One set of demonstrations per seed: positions in the pool, in the selector's order.

    A selector without a seed chooses from a half of the pool that the seed draws; otherwise all sets would be the same.

    Args:
        task: the task.
        pool: the rows that may be shown, or a `DemoPool` of them.
        selector: a selector of `ablation.recipe.selectors.SELECTORS` that does not look at the query.
        k: number of demonstrations per set.
        seeds: one per set.
        embeddings: (N, D), read by a selector that needs them.
        scores: (N,) difficulty, read by a selector that needs it.

    Raises:
        SparsortError: the selector is unknown or looks at the query, lacks its input, or the pool is too small.
    """
    entry = check_selector(selector)
    if entry.looks_at_query:
        raise SparsortError(
            f"the selector {selector!r} chooses for each query; one set for all queries is drawn by "
            f"{', '.join(SELECTORS.names(lambda one: not one.looks_at_query))}."
        )
    if k < 1:
        raise SparsortError(f"k is {k}; a set needs at least 1 demonstration.")
    shop = pool if isinstance(pool, DemoPool) else DemoPool(pool, prompt=task.prompt, label=task.label)
    if "embeddings" in entry.needs and embeddings is None:
        raise SparsortError(f"the selector {selector!r} needs embeddings=, one a row of the pool.")
    if "embeddings" not in entry.needs:
        embeddings = None
    if "scores" not in entry.needs:
        scores = None
    sets = []
    for seed in seeds:
        if entry.is_seeded:
            chosen = select_demos(shop, None, k, method=selector, seed=seed, scores=scores, embeddings=embeddings)
            sets.append(chosen.indices)
            continue
        half = np.sort(np.random.default_rng(seed).permutation(len(shop))[: max(k, (len(shop) + 1) // 2)])
        chosen = select_demos(
            [shop.rows[place] for place in half.tolist()],
            None,
            k,
            method=selector,
            seed=seed,
            label=task.label if "label" in entry.needs else None,
            scores=None if scores is None else scores[half],
            embeddings=None if embeddings is None else np.asarray(embeddings)[half],
        )
        sets.append(half[chosen.indices].tolist())
    return sets


def _identified(row: Mapping[str, Any], position: int, which: str) -> Fields:
    given = row.get(ID_FIELD)
    if is_missing(given):
        return dict(row) | {ID_FIELD: f"{which}:{position}"}
    if not has_text(given):
        raise not_text(given, field=ID_FIELD, where=f"row {position} of the {which} rows")
    return dict(row)


def _without_leaks(
    task: Task, rows: Sequence[Fields], asked: Sequence[Fields], what: str
) -> tuple[list[Fields], list[Dropped]]:
    """The rows whose question is none of those asked, nor nearly one, and the others."""
    leaks = alike_rows(task.fields, rows, asked)
    kept = [row for place, row in enumerate(rows) if place not in leaks]
    dropped = [
        Dropped(
            id=str(rows[place][ID_FIELD]),
            reason=f"it is, or nearly is, {what} ({asked[query][ID_FIELD]}, similarity {similarity:.2f})",
        )
        for place, (query, similarity) in sorted(leaks.items())
    ]
    return kept, dropped


def alike_rows(fields: Sequence[str], rows: Sequence[Fields], asked: Sequence[Fields]) -> dict[int, tuple[int, float]]:
    """The rows that are nearly a query: place to (query, similarity). Of several fields every one must leak."""
    if not rows or not asked:
        return {}
    by_field = []
    for field in fields:
        shown, questions = _texts(rows, field), _texts(asked, field)
        found = {(leak.demo, leak.query): leak.similarity for leak in find_leaks(questions, shown)}
        by_field.append((found, _blank(shown), _blank(questions)))
    leaks: dict[int, tuple[int, float]] = {}
    for pair in sorted({pair for found, _, _ in by_field for pair in found}):
        row, query = pair
        if all(pair in found or (row in no_text and query in no_question) for found, no_text, no_question in by_field):
            leaks.setdefault(row, (query, min(found[pair] for found, _, _ in by_field if pair in found)))
    return leaks


def _texts(rows: Sequence[Fields], field: str) -> list[str]:
    return [field_text(row, field, f"row {row.get(ID_FIELD)!r}") for row in rows]


def _blank(texts: Sequence[str]) -> set[int]:
    return {place for place, text in enumerate(texts) if not tokens(text)}
