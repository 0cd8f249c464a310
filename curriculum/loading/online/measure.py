"""How sparse the model finds each example while it trains on it: read off the training step's own forward pass.

Contract: `OnlineDifficulty` takes the input of the output embeddings, the hidden states after the final norm, which the step
computes anyway; it adds no pass, no gradient, no random draw and no waiting for the device, and leaves model, loss and
gradients bitwise as they are. Between `begin` and `collect` the first pass in training mode counts; evaluation, generation
and recomputed activations do not. A sparser state is a harder example (arXiv 2603.03415), so values are turned round for
metrics that are higher for denser states.

The trade-off: the last token of a sequence is one row a sequence for the kernel; a mean over tokens is steadier and costs
`per_sequence` rows. What is not read this way: losses that are fused with the head (Liger, cut cross-entropy) take the
head's weight and never call it, which is an error here that says so.

Shapes: B sequences, T tokens, H width, N examples of a micro-batch, K tokens read of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from sparsort.conditions import Table, among, refuse_unread_arguments
from sparsort.curriculum.loading.online.gathering import gather as gather
from sparsort.curriculum.loading.online.observations import Observations
from sparsort.curriculum.loading.online.token_spans import Spans, example_spans
from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.backend import GiniMethod, sparsity_rows
from sparsort.kernels.sparsity.metrics import METRIC_NAMES, METRICS

Tokens = Literal["last", "mean"]

_MASKS = ("attention_mask", "labels", "position_ids")
# Micro-batches whose values are joined on the device: a tensor of its own for each would hold 512 bytes on a GPU.
_JOINED = 256


# What an argument needs to be read; see `sparsort.conditions`.
READ_BY: Table = {"per_sequence": (among("tokens", ("mean",), of=get_args(Tokens)),)}


class OnlineDifficulty:
    """Measures the micro-batches of a training loop.

    Args:
        metric: one of `sparsort.kernels.sparsity.metrics.METRICS`.
        tokens: "last", the state of each example's last token; "mean", the mean of the metric over its tokens.
        per_sequence: of "mean": most tokens of an example that are read, spread evenly over it.

    Raises:
        SparsortError: an unknown metric or choice of tokens.

    Example:
        >>> with OnlineDifficulty().attach(model) as online:
        ...     for step, batch in enumerate(loader):
        ...         online.begin()
        ...         loss = model(**batch).loss
        ...         online.collect(loader.rows, step)
        ...         loss.backward()
        ...     found = gather(online.drain())
    """

    def __init__(self, *, metric: str = "hoyer", tokens: Tokens = "last", per_sequence: int = 16) -> None:
        METRICS.check(metric)
        if tokens not in get_args(Tokens):
            raise unknown_choice("choice of tokens", tokens, get_args(Tokens))
        if per_sequence < 1:
            raise SparsortError(f"per_sequence is {per_sequence}; at least one token must be read.")
        refuse_unread_arguments(OnlineDifficulty, READ_BY, {"tokens": tokens, "per_sequence": per_sequence})
        self.metric, self.tokens, self.per_sequence = metric, tokens, per_sequence
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
        """Hook onto a causal language model, also one wrapped by DDP, FSDP or PEFT; before torch.compile.

        Raises:
            SparsortError: a model without output embeddings, or attached already.
        """
        if self._handles:
            raise SparsortError("this OnlineDifficulty is attached already. Close it first, or make another one.")
        inner: Any = unwrap(model)
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if not isinstance(head, nn.Module):
            raise SparsortError(
                f"{type(inner).__name__} has no output embeddings (get_output_embeddings), whose input is what is measured. "
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
        """Take the hooks off. What was measured can still be drained."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """A micro-batch's forward pass comes next."""
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
        """Measure the pass since `begin`, best before its backward pass: until then the states cost no memory.

        Masks default to what the model was called with; `example_spans` says how they are read.

        Args:
            rows: (N,) rows of the micro-batch's examples, in the order of the sequences.
            step: number of the optimiser step, counted over all epochs.
            attention_mask, labels, position_ids: (B, T).

        Raises:
            SparsortError: no pass in training mode reached the head, or states that do not fit rows or masks.
        """
        if self._states is None:
            raise SparsortError(self._why_nothing())
        states_BTH, masks = self._states, self._masks
        given = {"attention_mask": attention_mask, "labels": labels, "position_ids": position_ids}
        masks |= {name: mask for name, mask in given.items() if mask is not None}
        self._forget()
        rows_N = np.array(rows, dtype=np.int64).reshape(-1)
        states_BTH = states_BTH[None] if states_BTH.ndim == 2 else states_BTH
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
        """What was measured since the last call, brought to the host; examples without a finite value are left out.

        Raises:
            SparsortError: not one packed micro-batch held as many examples as rows were given.
        """
        paired, self._paired = self._paired, None
        if paired is not None and not bool(paired):
            raise SparsortError(
                "no packed micro-batch held as many examples as rows were given. Pass the rows of every bin, one bin after the "
                "other, and position_ids that begin anew with each example."
            )
        values = torch.cat(self._values).cpu().double().numpy() if self._values else np.empty(0)
        finite = np.isfinite(values)
        found = Observations(
            rows=np.concatenate([np.empty(0, np.int64), *self._rows])[finite],
            steps=np.concatenate([np.empty(0, np.int64), *self._steps])[finite],
            values=values[finite],
        )
        self._rows, self._steps, self._values = [], [], []
        return found

    def _on_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._waits():
            given = dict(zip(self._arguments, args, strict=False)) | dict(kwargs)
            self._masks = {name: given[name] for name in _MASKS if isinstance(given.get(name), Tensor)}

    def _on_head(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and self._waits():
            self._states = args[0].detach()

    def _waits(self) -> bool:
        return self._open and self._states is None and self._model.training and torch.is_grad_enabled()

    def _forget(self) -> None:
        self._open, self._states, self._masks = False, None, {}

    def _measure(self, states_BTH: Tensor, spans: Spans) -> Tensor:
        """(N,) the metric of each example, higher is harder; NaN where there is none."""
        first_N, last_N, there_N, _ = spans
        if self.tokens == "last":
            index_NK, used_NK = last_N[:, None], there_N[:, None]
        else:
            place_K = torch.arange(min(self.per_sequence, states_BTH.shape[1]), device=first_N.device)
            K = len(place_K)
            length_N1 = (last_N - first_N + 1)[:, None]
            spread_NK = torch.where(length_N1 > K, (2 * place_K + 1) * length_N1 // (2 * K), place_K)
            index_NK = first_N[:, None] + torch.minimum(spread_NK, length_N1 - 1)
            used_NK = (place_K < length_N1) & there_N[:, None]
        # Gini is the costly one: it sorts the row.
        gini: GiniMethod = "exact" if self.metric in METRICS.reading("gini") else "none"
        values = sparsity_rows(states_BTH, index_NK.flatten(), gini=gini).values_NM[:, self._column]
        value_NK = values.reshape(index_NK.shape)
        total_N = torch.where(used_NK, value_NK, 0.0).sum(1)
        return self._sign * total_N / used_NK.sum(1)

    def _why_nothing(self) -> str:
        if not self._open:
            return "collect was called without begin, or twice. Call begin before each micro-batch's forward pass."
        if not self._model.training:
            return "the model is in evaluation mode, and only training is measured. Call model.train() first."
        return (
            f"the forward pass of {type(self._model).__name__} did not call its output embeddings. A loss that is fused with "
            "the head (Liger's fused_linear_cross_entropy, cut cross-entropy) reads its weight instead: switch that off, or "
            "train without the online difficulty."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The language model inside of DDP, FSDP, torch.compile or PEFT."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module) and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module):
            return model
        model = inner
