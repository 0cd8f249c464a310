"""Measure how sparsely the model represents each example during training, in the forward pass of the training step.

Contract: `OnlineDifficulty` reads the input of the output embeddings, which are the hidden states after the final norm that the
step computes anyway. It adds no forward pass, gradient, random draw or device synchronisation, and leaves model, loss and
gradients bitwise unchanged. The first pass in training mode between `begin` and `collect` counts; evaluation, generation and
recomputed activations do not. A sparser state means a harder example (arXiv 2603.03415), so the sign is flipped for metrics that
are higher for denser states.

Trade-off: for the last token the kernel reads one row per sequence; a mean over tokens is less noisy and costs up to
`per_sequence` rows. Losses that are fused with the head (Liger, cut cross-entropy) use the head's weight without calling the
head, so they cannot be measured, and an error says so.

Shapes: B sequences, T tokens, H width, N examples of a micro-batch, K tokens read of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from sparsort.conditions import Table, among, refuse_unread_arguments
from sparsort.curriculum.loading.loader.packing import IGNORED
from sparsort.curriculum.loading.online.gathering import gather as gather
from sparsort.curriculum.loading.online.observations import Observations
from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.backend import GiniMethod, sparsity_rows
from sparsort.kernels.sparsity.metrics import METRIC_NAMES, METRICS, MetricName

Tokens = Literal["last", "mean"]

_MASKS = ("attention_mask", "labels", "position_ids")
# After this many micro-batches their values are concatenated: on a GPU every separate tensor occupies at least 512 bytes.
_JOINED = 256


# The conditions under which an argument is read; see `sparsort.conditions`.
READ_BY: Table = {"per_sequence": (among("tokens", ("mean",), of=get_args(Tokens)),)}


class OnlineDifficulty:
    """Measures the difficulty of the examples in each micro-batch of a training loop.

    Args:
        metric: one of `sparsort.kernels.sparsity.metrics.METRICS`.
        tokens: "last", the metric at each example's last token; "mean", its mean over the tokens of the example.
        per_sequence: for "mean", the most tokens per example that are read, evenly spaced.

    Raises:
        SparsortError: an unknown metric or choice of tokens.

    Example:
        >>> with OnlineDifficulty().attach(model) as online:
        ...     for step, batch in enumerate(loader):
        ...         online.begin()
        ...         loss = model(**batch).loss
        ...         online.collect(loader.rows, step)
        ...         loss.backward()
        ...     observations = gather(online.drain())
    """

    def __init__(self, *, metric: MetricName = "hoyer", tokens: Tokens = "last", per_sequence: int = 16) -> None:
        METRICS.check(metric)
        if tokens not in get_args(Tokens):
            raise unknown_choice("choice of tokens", tokens, get_args(Tokens))
        if per_sequence < 1:
            raise SparsortError(f"per_sequence is {per_sequence}; expected at least 1.")
        refuse_unread_arguments(OnlineDifficulty, READ_BY, {"tokens": tokens, "per_sequence": per_sequence})
        self.metric, self.tokens, self.per_sequence = metric, tokens, per_sequence
        # The kernel computes all metrics at once, one per column.
        self._column = METRIC_NAMES.index(metric)
        self._sign = float(METRICS[metric].sign)
        self._model: Any = None
        self._handles: list[Any] = []
        self._arguments: list[str] = []
        self._open = False
        self._states: Tensor | None = None
        self._masks: dict[str, Tensor] = {}
        self._rows: list[NDArray[np.int64]] = []
        self._steps: list[NDArray[np.int64]] = []
        self._values: list[Tensor] = []
        self._paired: Tensor | None = None

    def attach(self, model: nn.Module) -> Self:
        """Attach hooks to a causal language model, which may be wrapped by DDP, FSDP or PEFT. Call this before torch.compile.

        Raises:
            SparsortError: the model has no output embeddings, or this object is already attached.
        """
        if self._handles:
            raise SparsortError("this OnlineDifficulty is already attached. Close it first, or create another one.")
        inner: Any = unwrap(model)
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if not isinstance(head, nn.Module):
            raise SparsortError(
                f"{type(inner).__name__} has no output embeddings (get_output_embeddings), whose input is measured. "
                "Pass a causal language model of transformers, or give your model that method."
            )
        self._model = inner
        self._arguments = list(inspect.signature(inner.forward).parameters)
        self._handles = [
            inner.register_forward_pre_hook(self._on_model, with_kwargs=True),
            head.register_forward_pre_hook(self._on_head),
        ]
        return self

    def close(self) -> None:
        """Remove the hooks. Values that were measured can still be drained."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Start a measurement: the next forward pass is that of a micro-batch.

        Raises:
            SparsortError: this object is not attached to a model.
        """
        if not self._handles:
            raise SparsortError("this OnlineDifficulty is not attached to a model. Call attach(model) first.")
        self._forget()
        self._open = True

    def collect(
        self,
        rows: ArrayLike,
        step: int,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Measure the forward pass since `begin`. Call this before the backward pass: until then the states need no extra memory.

        The masks default to the arguments of the model's forward pass; `example_spans` explains how they are used.

        Args:
            rows: (N,) rows of the micro-batch's examples, in the order of the sequences.
            step: number of the optimiser step, counted over all epochs.
            attention_mask, labels, position_ids: (B, T), as the model takes them.

        Raises:
            SparsortError: no pass in training mode reached the head, or the states do not fit the rows or the masks.
        """
        if self._states is None:
            raise SparsortError(self._why_nothing())
        states_BTH, masks = self._states, self._masks
        given = {"attention_mask": attention_mask, "labels": labels, "position_ids": position_ids}
        masks |= {name: mask for name, mask in given.items() if mask is not None}
        # Released now, so that the states live no longer than the loss needs them.
        self._forget()
        rows_N = np.array(rows, dtype=np.int64).reshape(-1)
        states_BTH = states_BTH[None] if states_BTH.ndim == 2 else states_BTH
        # Autocast is off because it would compute the sums of the metric in half precision.
        with torch.no_grad(), torch.autocast(states_BTH.device.type, enabled=False):
            spans = example_spans(masks, states_BTH, len(rows_N))
            self._values.append(self._measure(states_BTH, spans))
            if spans.paired is not None:
                self._paired = spans.paired if self._paired is None else self._paired | spans.paired
        self._rows.append(rows_N)
        self._steps.append(np.full(len(rows_N), step, dtype=np.int64))
        if len(self._values) > _JOINED:
            self._values = [torch.cat(self._values)]

    def drain(self) -> Observations:
        """The observations since the last call, copied to the host; examples without a finite value are skipped.

        Raises:
            SparsortError: no packed micro-batch contained as many examples as rows were given.
        """
        paired, self._paired = self._paired, None
        if paired is not None and not bool(paired):
            raise SparsortError(
                "no packed micro-batch contained as many examples as rows were given. Pass the rows of every bin, one bin "
                "after the other, and position_ids that start at 0 in each example."
            )
        values = torch.cat(self._values).cpu().double().numpy() if self._values else np.empty(0)
        finite = np.isfinite(values)
        observations = Observations(
            rows=np.concatenate([np.empty(0, np.int64), *self._rows])[finite],
            steps=np.concatenate([np.empty(0, np.int64), *self._steps])[finite],
            values=values[finite],
        )
        self._rows, self._steps, self._values = [], [], []
        return observations

    def _on_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._waits():
            given = dict(zip(self._arguments, args, strict=False)) | dict(kwargs)
            self._masks = {name: given[name] for name in _MASKS if isinstance(given.get(name), Tensor)}

    def _on_head(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and self._waits():
            # `detach` shares the memory of the states, so keeping them until `collect` costs nothing.
            self._states = args[0].detach()

    def _waits(self) -> bool:
        return self._open and self._states is None and self._model.training and torch.is_grad_enabled()

    def _forget(self) -> None:
        self._open, self._states, self._masks = False, None, {}

    def _measure(self, states_BTH: Tensor, spans: Spans) -> Tensor:
        """(N,) the metric of each example, higher is harder; NaN for an example without tokens."""
        first_N, last_N, there_N, _ = spans
        if self.tokens == "last":
            index_NK, used_NK = last_N[:, None], there_N[:, None]
        else:
            place_K = torch.arange(min(self.per_sequence, states_BTH.shape[1]), device=first_N.device)
            K = len(place_K)
            length_N1 = (last_N - first_N + 1)[:, None]
            # The midpoints of K equal pieces of the example, or all tokens of a shorter one.
            spread_NK = torch.where(length_N1 > K, (2 * place_K + 1) * length_N1 // (2 * K), place_K)
            index_NK = first_N[:, None] + torch.minimum(spread_NK, length_N1 - 1)
            used_NK = (place_K < length_N1) & there_N[:, None]
        # Gini sorts the row, which is expensive, so it is computed only if the metric needs it.
        gini: GiniMethod = "exact" if self.metric in METRICS.reading("gini") else "none"
        values = sparsity_rows(states_BTH, index_NK.flatten(), gini=gini).values_NM[:, self._column]
        value_NK = values.reshape(index_NK.shape)
        # An example without tokens gives 0 / 0 = NaN, which `drain` skips.
        total_N = torch.where(used_NK, value_NK, 0.0).sum(1)
        return self._sign * total_N / used_NK.sum(1)

    def _why_nothing(self) -> str:
        if not self._open:
            return "collect was called without begin, or twice. Call begin before each micro-batch's forward pass."
        if not self._model.training:
            return "the model is in evaluation mode, and only training is measured. Call model.train() first."
        return (
            f"the forward pass of {type(self._model).__name__} did not call its output embeddings. A loss that is fused with "
            "the head (Liger's fused_linear_cross_entropy, cut cross-entropy) uses its weight instead: switch it off, or "
            "train without the online difficulty."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The language model inside the wrappers of DDP, FSDP, torch.compile or PEFT."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module) and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module):
            return model
        model = inner


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
    """The first and last token of `count` examples, computed on the device without synchronisation.

    All sizes follow from the number of rows, which the host knows, so no tensor is copied back. With as many rows as sequences,
    an example is its sequence from the first to the last token that `attention_mask` shows; without a mask, from the first to
    the last token that `labels` do not ignore; without labels, the whole sequence. With more rows than sequences the sequences
    are packed, and an example begins wherever `position_ids` do not increase by one. The padding of a packed sequence is what
    `attention_mask` hides; without a mask, it is the positions of 0 at the end (as `PackedCollator` writes them). In that case a
    last example of a single token looks like padding. If the number of examples in a micro-batch does not match, it gives no
    spans at all, instead of wrong ones.

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
    # A token continues the example of the previous one if both are shown and its position is the next one.
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
