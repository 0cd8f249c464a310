"""Join the rows of a bin into one packed sequence, collate packed sequences into a padded batch, and cut long examples.

Contract: a packed sequence is the concatenation of its documents. `position_ids` start at 0 in each document, and the label of
each document's first token is -100, since that token would be predicted from another document. There is no `attention_mask`:
transformers infers the document boundaries from `position_ids` only if the mask is absent and there is no cache (so the batch
has `use_cache=False`). Attention then stays inside each document under eager, sdpa and flash attention alike. Every padding token
has position 0, which makes it a document of its own, and label -100.

Only token fields can be concatenated: a packed sequence has `input_ids`, `labels` and `position_ids`, but no other columns of
the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsort.errors import SparsortError

SEQUENCE_FIELDS = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids")
IGNORED = -100  # the label that the losses of torch and transformers ignore


def cut(example: Any, max_length: int) -> Any:
    """Cut the token fields of an example to the first `max_length` tokens.

    Token fields are `SEQUENCE_FIELDS`, and other lists and arrays that are as long as `input_ids`. An example that is not a
    mapping is returned unchanged, because only its collator knows what its tokens are.
    """
    if not isinstance(example, Mapping):
        return example
    ids: Any = example.get("input_ids")
    tokens = len(ids) if hasattr(ids, "__len__") else -1
    long = {
        name: value[:max_length]
        for name, value in example.items()
        if hasattr(value, "__len__")
        and not isinstance(value, str | bytes)
        and len(value) > max_length
        and (name in SEQUENCE_FIELDS or len(value) == tokens)
    }
    return {**example, **long} if long else example


def pack(examples: Sequence[Any]) -> dict[str, list[int]]:
    """Concatenate documents into one packed sequence.

    Args:
        examples: mappings with `input_ids` (n,), and `labels` (n,) if they differ from `input_ids`.

    Returns:
        `input_ids`, `labels` and `position_ids`, each as long as all documents together.

    Raises:
        SparsortError: an example has no input_ids, is padded, or has labels of another length.
    """
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        ids, labels = _tokens(example)
        packed["input_ids"] += ids
        packed["labels"] += [IGNORED, *labels[1:]]
        packed["position_ids"] += range(len(ids))
    return packed


@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """Collates packed sequences into int64 tensors (B, L), padded on the right to the longest sequence of the batch.

    Attributes:
        pad_token_id: token id of the padding. No token attends to it, and it has no label.
    """

    pad_token_id: int = 0

    def __call__(self, sequences: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        import torch

        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        longest = max(len(sequence["input_ids"]) for sequence in sequences)
        batch: dict[str, Any] = {
            name: torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in sequences])
            for name, fill in padding.items()
        }
        return {**batch, "use_cache": False}


def _tokens(example: Any) -> tuple[list[int], list[int]]:
    if not isinstance(example, Mapping) or "input_ids" not in example:
        has = f"columns {', '.join(map(str, example))}" if isinstance(example, Mapping) else type(example).__name__
        raise SparsortError(
            f"packing concatenates token ids, and an example has no input_ids (it has {has}). Tokenise the data "
            "first, or plan without packing."
        )
    ids = _plain(example["input_ids"])
    mask = example.get("attention_mask")
    if mask is not None and not all(_plain(mask)):
        raise SparsortError(
            "packing needs examples without padding, and one has zeros in its attention_mask. Tokenise with padding=False."
        )
    labels = ids if example.get("labels") is None else _plain(example["labels"])
    if len(labels) != len(ids):
        raise SparsortError(
            f"packing needs a label for every token; an example has {len(ids)} input_ids and {len(labels)} labels."
        )
    return ids, labels


def _plain(values: Any) -> list[int]:
    return list(values.tolist() if hasattr(values, "tolist") else values)
