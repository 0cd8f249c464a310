"""Probes for criteria, sampled from the model after each random order of a set (arXiv 2104.08786).

Contract: seeded. The probes of all orders form one list, and the orders are compared on the whole of it. A sampled text that
is no valid query, repeats another, or copies a demonstration is excluded and counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.task_data import SetDemos
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.demos.criteria.probes import opening_of, probing_set
from sparsort.scoring.answers.generation import sample_probes
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.templates import pieces
from sparsort.values import row_of


def probes(
    reader: AnswerReader, texts: Texts, set_demos: SetDemos, orders_RK: NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """Sample one probe after each of the R random orders of a set that all queries share.

    Returns:
        A note for the store. texts: the queries; tokens: their mean length; sampling_tokens: tokens read and generated to sample
        them; sampled, unparsed, repeated, copied: counts, see `ProbingSet`.
    """
    task = texts.task
    prefixes = [texts.prefix(set_demos.demos(0, order)) for order in orders_RK]
    samples = sample_probes(
        reader,
        prefixes,
        opening=opening_of(task.prompt),
        separator=task.separator,
        # Every probe has these words, so the ban on repeated runs of tokens must not apply to them.
        words=_fixed_words(task.prompt) + task.separator + " ".join(task.label_texts()),
        seed=seed,
    )
    parsed = probing_set(samples, task.prompt, task.separator, demos=set_demos.rows)
    queries = [task.query_text(row_of(row)) for row in parsed.rows]
    count = reader.encoder.count
    counts = {name: getattr(parsed, name) for name in ("sampled", "unparsed", "repeated", "copied")}
    return {
        "texts": queries,
        "tokens": float(np.mean([count(text) for text in queries])) if queries else 0.0,
        "sampling_tokens": sum(count("".join(chunks)) for chunks in prefixes) + sum(count(text) for text in samples),
        **counts,
    }


def _fixed_words(template: str) -> str:
    """A template without its fields."""
    return "".join(piece.literal + (" " if piece.field is not None else "") for piece in pieces(template))
