"""The first and last token of each example in a micro-batch, computed on the device without synchronisation.

Contract: all sizes follow from the number of rows, which the host knows, so no tensor is copied back. With as many rows as
sequences, an example is its sequence from the first to the last token that `attention_mask` shows; without a mask, from the first
to the last token that `labels` do not ignore; without labels, the whole sequence. With more rows than sequences the sequences are
packed, and an example begins wherever `position_ids` do not increase by one. The padding of a packed sequence is what
`attention_mask` hides; without a mask, it is the positions of 0 at the end (as `PackedCollator` writes them). In that case a last
example of a single token looks like padding. If the number of examples in a micro-batch does not match, it gives no spans at all,
instead of wrong ones.

Shapes: B sequences, T tokens, H width, N examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparsort.curriculum.loading.loader.packing import IGNORED
from sparsort.errors import SparsortError


class Spans(NamedTuple):
    """Spans of examples, as token numbers b·T + t.

    Attributes:
        first_N, last_N: number of the example's first and last token, int64.
        there_N: whether the example has any token; if not, its token numbers are meaningless.
        paired: for packed sequences, whether they contain as many examples as expected, (); else None.
    """

    first_N: Tensor
    last_N: Tensor
    there_N: Tensor
    paired: Tensor | None


def example_spans(masks: Mapping[str, Tensor], states_BTH: Tensor, count: int) -> Spans:
    """The spans of `count` examples.

    Args:
        masks: `attention_mask`, `labels` and `position_ids`, each optional: (B, T), or (1, T). Masks with other axes, such as
            (B, 1, T, T), are ignored.
        states_BTH: the states, which give the sizes and the device.
        count: N, number of examples.

    Raises:
        SparsortError: a mask has another size than the states, or packed sequences have no position_ids.
    """
    masks = _fitting(masks, states_BTH)
    B = len(states_BTH)
    if count == B:
        return _of_sequences(masks, states_BTH)
    if "position_ids" not in masks:
        raise SparsortError(
            f"{count} rows were given for {B} sequences. Packed sequences need position_ids that start at 0 in each "
            "example; otherwise pass one row per sequence."
        )
    return _of_packed(masks.get("attention_mask"), masks["position_ids"], count)


def _of_sequences(masks: Mapping[str, Tensor], states_BTH: Tensor) -> Spans:
    B, T, _ = states_BTH.shape
    start_B = torch.arange(0, B * T, T, device=states_BTH.device)
    if "attention_mask" in masks:
        shown_BT = (masks["attention_mask"] != 0).to(torch.uint8)
    elif "labels" in masks:
        shown_BT = (masks["labels"] != IGNORED).to(torch.uint8)
    else:
        return Spans(start_B, start_B + T - 1, torch.ones_like(start_B, dtype=torch.bool), None)
    # `argmax` returns the first maximum, so on the flipped mask it counts the hidden tokens at the end.
    last_B = start_B + T - 1 - shown_BT.flip(1).argmax(1)
    return Spans(start_B + shown_BT.argmax(1), last_B, shown_BT.amax(1) != 0, None)


def _of_packed(mask_BT: Tensor | None, position_BT: Tensor, count: int) -> Spans:
    every_BT = torch.ones_like(position_BT, dtype=torch.bool)
    if mask_BT is not None:
        first_BT, last_BT = _edges(mask_BT != 0, position_BT)
    else:
        first_BT, last_BT = _edges(every_BT, position_BT)
        # If the examples add up without removing padding, the zeros at the end are real examples of one token.
        unpadded = first_BT.sum() == count
        before_padding_BT = (position_BT != 0).flip(1).cumsum(1).flip(1) > 0
        first_BT, last_BT = _edges(before_padding_BT | unpadded, position_BT)
    paired = first_BT.sum() == count
    # The size is known on the host; plain `nonzero` would wait for the device to find it.
    first_N, last_N = (
        torch.nonzero_static(edges_BT.flatten(), size=count, fill_value=0).squeeze(1)
        for edges_BT in (first_BT, last_BT)
    )
    return Spans(first_N, last_N, paired.expand(count), paired)


def _edges(shown_BT: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each shown token is the first, and whether it is the last, of an example."""
    continues_BT = shown_BT[:, 1:] & shown_BT[:, :-1] & (position_BT[:, 1:] == position_BT[:, :-1] + 1)
    first_BT, last_BT = shown_BT.clone(), shown_BT.clone()
    first_BT[:, 1:] &= ~continues_BT
    last_BT[:, :-1] &= ~continues_BT
    return first_BT, last_BT


def _fitting(masks: Mapping[str, Tensor], states_BTH: Tensor) -> dict[str, Tensor]:
    fitting = {}
    B, T, _ = states_BTH.shape
    for name, mask in masks.items():
        if mask.ndim != 2:
            continue
        if mask.shape not in ((B, T), (1, T)):
            raise SparsortError(
                f"{name} has shape {tuple(mask.shape)}, but the head got states of {B} sequences of {T} tokens. Train on "
                "whole sequences (without logits_to_keep or a head that is called in pieces)."
            )
        fitting[name] = mask.to(states_BTH.device, non_blocking=True).expand(B, T)
    return fitting
