"""Sentence vectors from the model at hand: the mean of a text's final states, for nearest-neighbour selection.

Contract: one forward pass a text, no second model. The states are those after the final norm (before it for a model without
one), averaged over the text's tokens without the tokenizer's special tokens in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError
from sparsort.scoring.backbone import Backbone
from sparsort.scoring.pooling import Collector
from sparsort.scoring.prompts import Encoder, Prompt, Truncation


def embed_rows(backbone: Backbone, rows: Sequence[Mapping[str, Any]], prompt: Prompt) -> NDArray[np.float32]:
    """(n, H) mean-pooled states of every row's prompt.

    Args:
        backbone: the model.
        rows: fields of each row.
        prompt: what is read of a row; a text over the model's context is cut on the left, but not in chat.

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
    ids = [item.ids for item in encoded]
    how = backbone.plan(ids)
    collector = Collector("mean_state", encoded, how, site=site.name)
    for piece in backbone.walk(ids, how, [site]):
        collector.add(piece)
    means, reasons = collector.means()
    if reasons.any():
        number = int(reasons.argmax())
        raise SparsortError(f"{_name(number, rows[number])} has states that are not finite. Try dtype='float32'.")
    return means.astype(np.float32)


def _name(number: int, row: Mapping[str, Any]) -> str:
    return f"row {number}" + (f" (id {row['id']!r})" if "id" in row else "")
