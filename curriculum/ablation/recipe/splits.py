"""The split of a task's rows into test, dev and pool, and the demonstration sets drawn from the pool.

Contract: pure and seeded. Draws depend on the positions of the rows, so the same rows in another order are split differently. No
row of the pool is, or nearly is, a test or dev row (`demos.pool.leaks`), and no dev row is a test row; excluded rows are
reported. Pool and dev rows do not depend on the number of test rows. A larger number of test rows only appends further ones,
so a study can grow while its stored outcomes stay valid.
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
from sparsort.curriculum.demos.pool.pool import DemoPool, field_text, input_fields
from sparsort.curriculum.demos.pool.rows import ID_FIELD
from sparsort.curriculum.demos.select import select_demos
from sparsort.errors import SparsortError
from sparsort.values import has_text, is_missing, not_text

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A training row that is in no part of the split: its id, and the reason as a sentence."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows of a task, each with its id in the field "id".

    Attributes:
        test: the rows that every arm answers; only the judge sees their labels.
        dev: the rows that criteria may read.
        pool: the rows from which demonstrations are drawn.
        dropped: the training rows that are in no part.
        notes: facts about the split that a reader should know, one sentence each.
    """

    test: list[Fields]
    dev: list[Fields]
    pool: list[Fields]
    dropped: list[Dropped]
    notes: list[str]


def read_rows(task: Task, folder: Path | None, which: str) -> list[Fields] | None:
    """Read the rows of a task's file, with their ids; None if the task names no such file.

    A row without an id gets one from its position, such as "train:17".

    Args:
        task: the task.
        folder: the data folder, or None for the current folder. The file is looked up by its path, then by its name alone.
        which: "train" or "test".

    Raises:
        SparsortError: the file is missing or invalid, or a row has no text in its label or in a field of the prompt.
    """
    from sparsort.scoring.data.rows import open_rows

    name = task.train if which == "train" else task.test
    if name is None:
        return None
    base = Path() if folder is None else folder.expanduser()
    path = base / name
    # Built-in tasks name files in subfolders, which a user may have put directly into the data folder.
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
        task: the task; rows are compared by the fields of its prompt.
        train: the rows with known labels. One without a field "id" gets its position as the id, "train:17".
        test: the test rows, or None to take them from a half of `train` that the seed draws.
        n_test: the number of test rows, drawn by the seed. If there are fewer, all of them are used, with a note.
        n_dev: the number of dev rows.
        max_demo_chars: the maximum length of a demonstration in the pool, in characters.
        seed: the seed of every draw.

    Raises:
        SparsortError: a row lacks a field, or no row is left for the pool.
    """
    if n_test < 1 or n_dev < 0:
        raise SparsortError(f"n_test is {n_test} and n_dev {n_dev}; at least 1 test row and 0 dev rows are needed.")
    if max_demo_chars is not None and max_demo_chars < 1:
        raise SparsortError(f"max_demo_chars is {max_demo_chars}; at least 1 is needed, or None for no limit.")
    # The generator draws the training rows first, so that the test rows do not change the pool.
    generator = np.random.default_rng(seed)
    shuffled = [_identified(train[place], place, "train") for place in generator.permutation(len(train)).tolist()]
    notes = []
    if test is None:
        test_rows, shuffled = shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]
        notes.append(
            f"there is no test file, so {len(test_rows)} of the {len(train)} training rows were set aside for it."
        )
    else:
        test_rows = [_identified(test[place], place, "test") for place in generator.permutation(len(test)).tolist()]
    if n_test > len(test_rows):
        notes.append(f"{n_test} test rows were asked for; there are {len(test_rows)}.")
    # Compare with all potential test rows, not only the first n_test. Otherwise the pool would depend on n_test.
    free, leaked = _without_leaks(task, shuffled, test_rows, "a test row")
    dev, rest = free[:n_dev], free[n_dev:]
    pool, leaked_dev = _without_leaks(task, rest, dev, "a dev row")
    limit = math.inf if max_demo_chars is None else max_demo_chars
    too_long = [row for row in pool if len(task.demo_text(row)) > limit]
    pool = [row for row in pool if len(task.demo_text(row)) <= limit]
    reason = f"it is longer than {max_demo_chars} characters as a demonstration"
    dropped = [*leaked, *leaked_dev, *(Dropped(id=str(row[ID_FIELD]), reason=reason) for row in too_long)]
    # Reasons are counted without the parentheses, which name the individual row.
    reasons = Counter(item.reason.partition(" (")[0] for item in dropped)
    if len(dev) < n_dev or not pool or not test_rows:
        left = f"{len(dev)} of {n_dev} dev rows and {len(pool)} rows for the pool are left"
        set_aside = len(test_rows) if test is None else 0
        raise _too_few_rows(task, len(train), set_aside, reasons, left, _more_rows(leaked, too_long, n_free=len(free)))
    for why, count in reasons.items():
        notes.append(f"{count} training row{' was' if count == 1 else 's were'} excluded: {why}.")
    return Splits(test=test_rows[:n_test], dev=dev, pool=pool, dropped=dropped, notes=notes)


def _too_few_rows(
    task: Task, n_train: int, set_aside: int, reasons: Counter[str], left: str, next_step: str
) -> SparsortError:
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
    return SparsortError(
        f"the task {task.name!r} has {n_train} training rows, of which {set_aside} were set aside for the test and "
        f"{reasons.total()} excluded{why and f' ({why})'}; {left}. {next_step}"
    )


def _more_rows(leaked: list[Dropped], too_long: list[Fields], *, n_free: int) -> str:
    """The next steps that would leave more rows for the pool, as a sentence."""
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
    """One demonstration set per seed, as k positions in the pool, in the selector's order.

    A selector without a seed chooses from half of the pool, see `draw_half`.

    Args:
        task: the task.
        pool: the N rows of the pool, or a `DemoPool` of them.
        selector: a selector of `ablation.recipe.selectors.SELECTORS` that does not look at the query.
        k: the number of demonstrations in a set.
        seeds: the seed of each set.
        embeddings: (N, D) embeddings of the rows, for a selector that needs them.
        scores: (N,) difficulties of the rows, for a selector that needs them.

    Raises:
        SparsortError: the selector is unknown, looks at the query, or lacks its input; or the pool is too small.
    """
    entry = check_selector(selector)
    if entry.looks_at_query:
        raise SparsortError(
            f"the selector {selector!r} chooses for each query; one set for all queries is drawn by "
            f"{', '.join(SELECTORS.names(lambda other: not other.looks_at_query))}."
        )
    if k < 1:
        raise SparsortError(f"k is {k}; a set needs at least 1 demonstration.")
    pool = pool if isinstance(pool, DemoPool) else DemoPool(pool, prompt=task.prompt, label=task.label)
    if "embeddings" in entry.needs and embeddings is None:
        raise SparsortError(f"the selector {selector!r} needs embeddings=, one for each row of the pool.")
    if "embeddings" not in entry.needs:
        embeddings = None
    if "scores" not in entry.needs:
        scores = None
    sets = []
    for seed in seeds:
        if entry.is_seeded:
            chosen = select_demos(pool, None, k, method=selector, seed=seed, scores=scores, embeddings=embeddings)
            sets.append(chosen.indices)
            continue
        half = draw_half(len(pool), k, seed)
        chosen = select_demos(
            [pool.rows[place] for place in half.tolist()],
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


def draw_half(n_rows: int, k: int, seed: int) -> NDArray[np.int64]:
    """The ascending positions of the half of a pool from which a selector without a seed chooses the set of this seed.

    Such a selector would choose the same set from the whole pool every time. At least k rows are drawn.
    """
    return np.sort(np.random.default_rng(seed).permutation(n_rows)[: max(k, (n_rows + 1) // 2)])


def _identified(row: Mapping[str, Any], position: int, which: str) -> Fields:
    """The row's fields, with an id."""
    given = row.get(ID_FIELD)
    if is_missing(given):
        return dict(row) | {ID_FIELD: f"{which}:{position}"}
    if not has_text(given):
        raise not_text(given, field=ID_FIELD, where=f"row {position} of the {which} rows")
    return dict(row)


def _without_leaks(
    task: Task, rows: Sequence[Fields], queries: Sequence[Fields], kind: str
) -> tuple[list[Fields], list[Dropped]]:
    """The rows that are no query or near-duplicate of one, and the others; `kind` names the queries in the reason."""
    leaks = alike_rows(input_fields(task.prompt), rows, queries)
    distinct = [row for place, row in enumerate(rows) if place not in leaks]
    dropped = [
        Dropped(
            id=str(rows[place][ID_FIELD]),
            reason=f"it is, or nearly is, {kind} ({queries[query][ID_FIELD]}, similarity {similarity:.2f})",
        )
        for place, (query, similarity) in sorted(leaks.items())
    ]
    return distinct, dropped


def alike_rows(
    fields: Sequence[str], rows: Sequence[Fields], queries: Sequence[Fields]
) -> dict[int, tuple[int, float]]:
    """The rows that are near-duplicates of a query in every field, as position → (position of the query, similarity)."""
    if not rows or not queries:
        return {}
    by_field = []
    for field in fields:
        row_texts, query_texts = _texts(rows, field), _texts(queries, field)
        similar = {(leak.demo, leak.query): leak.similarity for leak in find_leaks(query_texts, row_texts)}
        by_field.append((similar, _blank(row_texts), _blank(query_texts)))
    leaks: dict[int, tuple[int, float]] = {}
    for pair in sorted({pair for similar, _, _ in by_field for pair in similar}):
        row, query = pair
        # `find_leaks` cannot compare texts without words. In such a field, two blank texts count as equal.
        if all(
            pair in similar or (row in blank_rows and query in blank_queries)
            for similar, blank_rows, blank_queries in by_field
        ):
            leaks.setdefault(row, (query, min(similar[pair] for similar, _, _ in by_field if pair in similar)))
    return leaks


def _texts(rows: Sequence[Fields], field: str) -> list[str]:
    return [field_text(row, field, f"row {row.get(ID_FIELD)!r}") for row in rows]


def _blank(texts: Sequence[str]) -> set[int]:
    """The positions of the texts that have no words."""
    return {place for place, text in enumerate(texts) if not tokens(text)}
