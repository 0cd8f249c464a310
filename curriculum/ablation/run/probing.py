"""Probes of a set, sampled from the model behind each of its random orders (arXiv 2104.08786), as they are noted in the store.

Contract: seeded; the probes of all orders are one set, on which the orders are compared. Texts that do not read as a query,
repeat one, or copy a demonstration are left out and counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.task_data import Showing
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.demos.criteria.probes import opening_of, probing_set
from sparsort.scoring.answers.generation import sample_probes
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.templates import pieces
from sparsort.values import row_of


def probes(
    reader: AnswerReader, texts: Texts, showing: Showing, orders_RK: NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """Sample a probe behind every random order of a fixed set.

    Returns:
        texts: the queries; tokens: their mean length; sampling_tokens: read and written for them; sampled, unparsed, repeated,
        copied: counts, as `ProbingSet`.
    """
    task = texts.task
    prefixes = [texts.prefix(showing.demos(0, order)) for order in orders_RK]
    samples = sample_probes(
        reader,
        prefixes,
        opening=opening_of(task.prompt),
        separator=task.separator,
        words=_fixed_words(task.prompt) + task.separator + " ".join(task.label_texts()),
        seed=seed,
    )
    found = probing_set(samples, task.prompt, task.separator, demos=showing.rows)
    queries = [task.query_text(row_of(row)) for row in found.rows]
    count = reader.encoder.count
    return {
        "texts": queries,
        "tokens": float(np.mean([count(text) for text in queries])) if queries else 0.0,
        "sampling_tokens": sum(count("".join(chunks)) for chunks in prefixes) + sum(count(text) for text in samples),
        "sampled": found.sampled,
        "unparsed": found.unparsed,
        "repeated": found.repeated,
        "copied": found.copied,
    }


def _fixed_words(template: str) -> str:
    """A template without its fields."""
    return "".join(piece.literal + (" " if piece.field is not None else "") for piece in pieces(template))
