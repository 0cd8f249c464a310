"""Sentence vectors from the model at hand: the mean of a text's final states, for nearest-neighbour selection.

Contract: one forward pass a text, no second model, and no pass for a text whose vector a cache holds. The states
are those after the final norm (before it for a model without one), averaged over the text's tokens without the tokenizer's
special tokens in front.
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
    """(n, H) mean-pooled states of every row's prompt.

    Args:
        backbone: the model.
        rows: fields of each row.
        prompt: what is read of a row; a text over the model's context is cut on the left, but not in chat.
        cache: where to look for the vectors first, and to keep new ones; None to run the model on every row.

    Raises:
        SparsortError: a row has no text, or in chat too much of it; or its states are not finite.
    """
    tokenizer = backbone.loaded.tokenizer
    # Markers of a chat template are not cut.
    cut: Truncation = "error" if prompt.is_chat else "left"
    encoder = Encoder(tokenizer, max_length=backbone.max_length, truncation=cut, chat=prompt.is_chat)
    rendered = [prompt.render(row, where=_name(number, row), tokenizer=tokenizer) for number, row in enumerate(rows)]
    encoded = encoder.encode(rendered)
    for number, item in enumerate(encoded):
        if item.problem is not None:
            raise SparsortError(
                f"{_name(number, rows[number])} cannot be embedded: {item.problem[1]}. Leave it out of the pool."
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
    """(n, H) mean states, and the reason codes of rows without one."""
    ids = [item.ids for item in encoded]
    how = backbone.plan(ids)
    collector = StateCollector(
        whole_texts(encoded), how, [Measurement(site.name, "mean_state", "none")], fits={}, exact=True
    )
    for piece in backbone.walk(ids, how, [site]):
        collector.add(piece)
    means, codes = collector.mean_states(site.name)
    return means.astype(np.float32), codes


def _name(number: int, row: Mapping[str, Any]) -> str:
    return f"row {number}" + (f" (id {row['id']!r})" if "id" in row else "")
