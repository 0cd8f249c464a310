"""Sentence vectors from the loaded model: the mean of a text's final states, for nearest-neighbour selection.

Contract: a text takes one forward pass of the same model that scores rows, and none if a cache holds its vector. The states are
those after the final norm (before it, for a model without one), averaged over the tokens of the text, without the special
tokens that the tokenizer puts first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.sites import Site
from sparsort.scoring.prompts.prompt import Encoded, Encoder, Prompt
from sparsort.scoring.prompts.types import Truncation
from sparsort.scoring.scorers.collect import Measurement, StateCollector, whole_texts
from sparsort.scoring.store.row_cache import RowCache, context_of, key_of


def embed_rows(
    backbone: Backbone, rows: Sequence[Mapping[str, Any]], prompt: Prompt, *, cache: RowCache | None = None
) -> NDArray[np.float32]:
    """Compute the mean-pooled states of every row's prompt, (n, width).

    Args:
        backbone: the model.
        rows: fields of each row.
        prompt: the prompt that each row is rendered with. A text over the model's context is cut on the left, and refused
            in chat.
        cache: a cache of vectors, to which new ones are added; None to run the model on every row.

    Raises:
        SparsortError: a row has no text, its chat is longer than the model's context, or its states are not finite.
    """
    tokenizer = backbone.loaded.tokenizer
    # Cutting a chat would remove the markers of the template that begin a turn.
    truncation: Truncation = "error" if prompt.is_chat else "left"
    encoder = Encoder(tokenizer, max_length=backbone.max_length, truncation=truncation, chat=prompt.is_chat)
    rendered = [prompt.render(row, where=_name(number, row), tokenizer=tokenizer) for number, row in enumerate(rows)]
    encoded = encoder.encode(rendered)
    for number, item in enumerate(encoded):
        if item.problem is not None:
            raise SparsortError(
                f"{_name(number, rows[number])} cannot be embedded: {item.problem[1]}. Remove it from the pool."
            )
    if not encoded:
        return np.zeros((0, backbone.hidden_size), dtype=np.float32)
    site = backbone.site("post_norm" if backbone.final_norm is not None else "pre_norm")

    def read(numbers: list[int]) -> tuple[NDArray[np.float32], list[str]]:
        means, codes = _means(backbone, [encoded[number] for number in numbers], site)
        return means, ["not_finite" if code else "" for code in codes]

    if cache is None:
        means, reasons = read(list(range(len(encoded))))
    else:
        context = context_of(backbone, mean_state=site.name)
        means, reasons = cache.through(context, [key_of(item) for item in encoded], read)
    for number, reason in enumerate(reasons):
        if reason:
            raise SparsortError(f"{_name(number, rows[number])} has states that are not finite. Try dtype='float32'.")
    return means


def _means(backbone: Backbone, encoded: Sequence[Encoded], site: Site) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Compute the mean states, (n, width), and (n,) reason codes, which are 0 where there is a mean."""
    ids = [item.ids for item in encoded]
    plan = backbone.plan(ids)
    collector = StateCollector(
        whole_texts(encoded), plan, [Measurement(site.name, "mean_state", "none")], fits={}, exact=True
    )
    for piece in backbone.walk(ids, plan, [site]):
        collector.add(piece)
    means, codes = collector.mean_states(site.name)
    return means.astype(np.float32), codes


def _name(number: int, row: Mapping[str, Any]) -> str:
    return f"row {number}" + (f" (id {row['id']!r})" if "id" in row else "")
