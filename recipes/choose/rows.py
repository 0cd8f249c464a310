"""Reads the demonstrations and queries of `sparsort choose` from files.

Contract: all rows are checked against the prompt here, so that a mistake in a file is reported before a model is loaded. The same
seed draws the same rows.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsort.curriculum.ablation.recipe.splits import alike_rows
from sparsort.curriculum.ablation.recipe.tasks import MOST_LABELS, check_row, parse_labels
from sparsort.curriculum.demos.pool.pool import input_fields
from sparsort.errors import SparsortError
from sparsort.recipes.choose.choose import without_labels
from sparsort.scoring.prompts.spec import DataSpec
from sparsort.templates import render
from sparsort.values import text_if_any

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource


@dataclass(frozen=True, kw_only=True)
class RowsFromFiles:
    """The rows for `choose_order` that files contain.

    Attributes:
        demos, queries: rows, each with its id.
        pool: every row of the file of demonstrations.
        counts: the number of rows of that file with each label value.
    """

    demos: list[dict[str, Any]]
    queries: list[dict[str, Any]]
    pool: list[dict[str, Any]]
    counts: dict[str, int]

    def label_set(self, label: str, labels: str | None) -> dict[str, str]:
        """The words of each label value: as given ("0=negative,1=positive"), or the values of the file themselves.

        Raises:
            SparsortError: the file has too many different values for a label.
        """
        if labels:
            return parse_labels(labels)
        if len(self.counts) > MOST_LABELS:
            raise SparsortError(
                f"the column {label!r} has {len(self.counts)} different values, so it does not look like a label. Name the "
                f"labels (--labels), or take a criterion that reads none: {without_labels()}."
            )
        return {value: value for value in self.counts}


def read_rows(
    file: str | Path,
    queries: str | Path | None = None,
    *,
    prompt: str | None,
    label: str = "label",
    k: int | None = None,
    max_queries: int = 32,
    seed: int = 0,
    data: DataSpec = DataSpec(),
) -> RowsFromFiles:
    """Read demonstrations and queries from files.

    Args:
        file: the demonstrations, or with `k` the rows that they are drawn from.
        queries: the queries. None, or `file` itself: with `k`, the rows of `file` that were not drawn and are not like those
            that were.
        prompt: format string that names the required columns.
        label: the column of the label.
        k: the number of demonstrations to draw; None for all rows of `file`.
        max_queries: the most queries; of more rows, a random sample is taken.
        seed: seed for the draws.
        data: how both files are read; its column of ids is that of `file`.

    Raises:
        SparsortError: a file cannot be read, or has too few rows.
    """
    if max_queries < 1:
        raise SparsortError(f"max_queries (--max-queries) is {max_queries}; at least 1 is needed.")
    if seed < 0:
        raise SparsortError(f"the seed is {seed}; it may not be negative.")
    source = _open(file, prompt, data)
    rows = _fields(source)
    if k is not None and not 2 <= k <= len(rows):
        raise SparsortError(
            f"k (-k) is {k}, the number of demonstrations, and {file} has {len(rows)} rows. Ask for 2 or more of them."
        )
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(rows)).tolist()
    places = range(len(rows)) if k is None else drawn[:k]
    source.check(functools.partial(check_row, prompt=prompt or "", label=label), places)
    source.check(lambda fields, where: text_if_any(fields, label, where=where))
    demos = [rows[place] for place in places]
    if queries is None or Path(queries).resolve() == Path(file).resolve():
        others = [] if k is None else drawn[k:]
        source.check(lambda fields, where: render(prompt or "", fields, where=where), others)
        rest = [rows[place] for place in others]
        alike = alike_rows(input_fields(prompt or ""), rest, demos)
        sample = [row for place, row in enumerate(rest) if place not in alike][:max_queries]
    else:
        of_queries = _open(queries, prompt, replace(data, id_column=None))
        rest = _fields(of_queries)
        others = sorted(generator.permutation(len(rest))[:max_queries].tolist())
        of_queries.check(lambda fields, where: render(prompt or "", fields, where=where), others)
        sample = [rest[place] for place in others]
    values = [text_if_any(row, label, where=f"row {row['id']!r}") for row in rows]
    counts = Counter(value for value in values if value is not None)
    return RowsFromFiles(demos=demos, queries=sample, pool=rows, counts=dict(sorted(counts.items())))


def _open(file: str | Path, prompt: str | None, data: DataSpec) -> RowSource:
    source = data.open(file)
    if prompt is None:
        raise SparsortError(
            "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces; "
            f"{Path(file).name} has: {', '.join(source.columns())}."
        )
    return source


def _fields(source: RowSource) -> list[dict[str, Any]]:
    return [dict(row.fields) | {"id": row.id} for row in source.rows()]
