"""Where each example of a micro-batch begins and ends, on the device and without waiting for it.

Contract: sizes follow from what the host knows (the number of rows), so nothing here reads a tensor back. With as many rows as
sequences, an example is its sequence from the first to the last token that `attention_mask` shows, else those that `labels`
do not ignore, else all of it. With more rows the sequences are packed, and an example begins wherever `position_ids` do not
go on by one. Padding of a packed sequence is what `attention_mask` hides, else the positions of 0 at its end (as
`PackedCollator` writes it): there, a last example of a single token looks like padding, and a micro-batch in which the count
does not come out right gives no spans at all rather than wrong ones.

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
    """Examples as token numbers b·T + t.

    Attributes:
        first_N, last_N: the example's first and last token, int64.
        there_N: whether it has any token; if not, its numbers say nothing.
        paired: of packed sequences: whether they hold as many examples as expected, (); else None.
    """

    first_N: Tensor
    last_N: Tensor
    there_N: Tensor
    paired: Tensor | None


def example_spans(masks: Mapping[str, Tensor], states_BTH: Tensor, count: int) -> Spans:
    """The spans of `count` examples.

    Args:
        masks: `attention_mask`, `labels`, `position_ids`, as far as there are any: (B, T), or (1, T). Those of other axes,
            which say who attends to whom, are passed over.

    Raises:
        SparsortError: masks of another size than the states, or packed sequences without position_ids.
    """
    masks = _fitting(masks, states_BTH)
    B = len(states_BTH)
    if count == B:
        return _of_sequences(masks, states_BTH)
    if "position_ids" not in masks:
        raise SparsortError(
            f"{count} rows were given for {B} sequences. Packed sequences need position_ids that begin anew with each "
            "example; otherwise pass one row a sequence."
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
    last_B = start_B + T - 1 - shown_BT.flip(1).argmax(1)
    return Spans(start_B + shown_BT.argmax(1), last_B, shown_BT.amax(1) != 0, None)


def _of_packed(mask_BT: Tensor | None, position_BT: Tensor, count: int) -> Spans:
    every_BT = torch.ones_like(position_BT, dtype=torch.bool)
    if mask_BT is not None:
        first_BT, last_BT = _edges(mask_BT != 0, position_BT)
    else:
        first_BT, last_BT = _edges(every_BT, position_BT)
        unpadded = first_BT.sum() == count
        before_padding_BT = (position_BT != 0).flip(1).cumsum(1).flip(1) > 0
        first_BT, last_BT = _edges(before_padding_BT | unpadded, position_BT)
    paired = first_BT.sum() == count
    # Of a size that is known here: nonzero alone would wait for the device.
    first_N, last_N = (
        torch.nonzero_static(edges_BT.flatten(), size=count, fill_value=0).squeeze(1)
        for edges_BT in (first_BT, last_BT)
    )
    return Spans(first_N, last_N, paired.expand(count), paired)


def _edges(shown_BT: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Which shown tokens are the first of an example, and which the last."""
    goes_on_BT = shown_BT[:, 1:] & shown_BT[:, :-1] & (position_BT[:, 1:] == position_BT[:, :-1] + 1)
    first_BT, last_BT = shown_BT.clone(), shown_BT.clone()
    first_BT[:, 1:] &= ~goes_on_BT
    last_BT[:, :-1] &= ~goes_on_BT
    return first_BT, last_BT


def _fitting(masks: Mapping[str, Tensor], states_BTH: Tensor) -> dict[str, Tensor]:
    kept = {}
    B, T, _ = states_BTH.shape
    for name, mask in masks.items():
        if mask.ndim != 2:
            continue
        if mask.shape not in ((B, T), (1, T)):
            raise SparsortError(
                f"{name} has shape {tuple(mask.shape)}, but the head was given states of {B} sequences of {T} tokens. Train on "
                "whole sequences (without logits_to_keep or a head that is called in pieces)."
            )
        kept[name] = mask.to(states_BTH.device, non_blocking=True).expand(B, T)
    return kept
