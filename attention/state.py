"""The state of a model's sparse attention, and the data that each forward pass hands to its layers.

Contract: a hook on the decoder creates a `Pass` for every forward call and sends it through the layers as the keyword argument
`sparsort_pass`, which transformers forwards to the attention function. A hook on every sparse attention module adds
`sparsort_layer`: the module's input and rotary embedding, which the attention function does not receive otherwise, and the
index keys, appended to the cache. Hooks are used instead of a subclass or a new forward method because wrappers such as PEFT
call `forward` of the causal model directly. All data of a forward pass is in its `Pass`, and a layer that checkpointing runs
again gets the same one.

Legend: B batch, T query columns, S key columns, C hidden width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from sparsort.attention.cache import keep_index_keys
from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors import SELECTORS
from sparsort.attention.selectors.base import BlockChoice, LayerInputs
from sparsort.attention.training.alignment_loss import AlignmentLoss
from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.blocksparse.budgets import Budget
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.eager import in_eager

NAME = "sparsort"  # The name of the attention implementation in transformers.
Mode = Literal["full", "sparse"]
Observer: TypeAlias = Callable[[int, LayerInputs, BlockChoice], None]


class Pass:
    """One forward call of the decoder.

    This is not a dataclass because FSDP copies dataclasses, field by field, when they are passed to a layer. The copies would
    not share their dictionaries.

    Attributes:
        full: whether every block is attended to (warm-up).
        budget: number of blocks per query token if not `full`.
        losses: the losses of the selectors in this pass.
        observers: functions called with the number, the inputs and the choice of every sparse layer, without gradients.
        layouts: layouts built so far, by (B, T, S); the sparse layers share them.
        dense_masks: masks built so far; the dense layers share them.
    """

    def __init__(
        self, *, full: bool, budget: Budget, losses: AlignmentLoss, observers: tuple[Observer, ...] = ()
    ) -> None:
        self.full = full
        self.budget = budget
        self.losses = losses
        self.observers = observers
        self.layouts: dict[tuple[int, int, int], Layout] = {}
        self.dense_masks: dict[Any, Tensor | None] = {}

    def layout(
        self, padding: Tensor | None, position_ids: Tensor | None, batch: int, queries: int, keys: int
    ) -> Layout:
        """Return the layout given by the padding (B, filled columns) or, without padding, by the positions (B or 1, T)."""
        sizes = (batch, queries, keys)
        if sizes not in self.layouts:
            if padding is not None:
                layout = Layout.from_padding(padding, queries, keys)
            elif position_ids is not None and queries == keys:
                layout = Layout.packed(position_ids.expand(batch, -1))
            else:
                layout = Layout.plain(batch, queries, keys)
            self.layouts[sizes] = layout
        return self.layouts[sizes]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleInputs:
    """The inputs of an attention module that its hook hands to the attention function, which does not receive them otherwise.

    Attributes:
        hidden: (B, T, C), the module's input.
        rotary: cosines and sines of its positions.
        index_keys: (B, S, width), or None if the selector has no index keys.
    """

    hidden: Tensor
    rotary: tuple[Tensor, Tensor] | None
    index_keys: Tensor | None


class SparseAttention:
    """The state of a model's sparse attention, at `model.sparse_attention`.

    Attributes:
        config: the configuration that was attached.
        mode: "sparse", or "full" for the warm-up; may be set between steps.
        budget: number of blocks per query token; may be set between steps.
        alignment_weight: λ in the total loss LM + λ·Σ_layers KL; may be set between steps.
        observers: functions called with (layer, inputs, choice) of every sparse layer, without gradients, for diagnostics.
        attn_implementation: the model's previous attention implementation, which `detach` restores.
        lm_loss: mean LM loss over the labels of the last forward pass with labels; None before the first one.
        alignment: layer → the selector's loss in the last forward pass; empty in evaluation.
    """

    def __init__(self, config: SparseAttentionConfig, *, attn_implementation: str) -> None:
        self.config = config
        self.attn_implementation = attn_implementation
        self._budget: Budget = config.budget()
        self._alignment_weight = config.alignment_weight
        self.observers: list[Observer] = []
        self.lm_loss: Tensor | None = None
        self._mode: Mode = "sparse"
        self._losses = AlignmentLoss(0.0)
        self._hooks: list[Any] = []
        self._model_loss: Any = None
        self._had_own_loss = False

    @property
    def mode(self) -> Mode:
        """The mode: "sparse", or "full" for the warm-up over every block. It may be set between steps."""
        return self._mode

    @mode.setter
    def mode(self, given: Mode) -> None:
        if given not in ("full", "sparse"):
            raise unknown_choice("mode of sparse attention", given, ("full", "sparse"))
        self._mode = given

    @property
    def budget(self) -> Budget:
        return self._budget

    @budget.setter
    def budget(self, given: Budget) -> None:
        if not isinstance(given, Budget):
            raise SparsortError(
                f"the budget is {given!r}; expected a FixedBudget, ThresholdBudget or TopPBudget from "
                "sparsort.kernels.blocksparse.budgets, such as FixedBudget(blocks=16)."
            )
        self._budget = given

    @property
    def alignment_weight(self) -> float:
        return self._alignment_weight

    @alignment_weight.setter
    def alignment_weight(self, given: float) -> None:
        # Building a configuration applies the same check as attaching does.
        self._alignment_weight = replace(self.config, alignment_weight=given, stored=True).alignment_weight

    @property
    def alignment(self) -> dict[int, Tensor]:
        return self._losses.values

    def add_alignment(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Add the alignment losses of the last forward pass to a loss that was computed outside the model.

        Call it right after the forward pass that `loss` was computed from.

        Args:
            loss: a scalar computed from the last forward pass.
            share: the fraction of the optimiser step's labels that are in this pass, if `loss` is a sum divided by the number of
                labels of the whole step; otherwise 1.

        Returns:
            The scalar `loss` + λ·share·Σ_layers KL.

        Raises:
            SparsortError: the alignment losses of that pass have been added already.
        """
        if (
            loss.requires_grad
            and not self._losses.values
            and SELECTORS[self.config.selector].learns_by == "alignment_loss"
        ):
            warnings.warn(
                "the last forward pass has no alignment losses to add, because it ran in evaluation mode. Call add_alignment "
                "right after the training forward pass that the loss was computed from.",
                UserWarning,
                stacklevel=2,
            )
        return self._add(loss, share)

    def _add(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        total = self._losses.add_to(loss, share)
        # Dividing by the share turns this pass's part of the step's loss into the mean over its own labels.
        self.lm_loss = loss.detach() / share
        return total

    def install(self, model: Any, decoder: nn.Module, layers: list[nn.Module]) -> None:
        """Hook the decoder and its sparse attention modules, and wrap the model's loss."""
        self._hooks = [decoder.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._hooks += [layer.register_forward_pre_hook(_add_module_inputs, with_kwargs=True) for layer in layers]
        # transformers stores a loss function that was assigned in `_loss_function`; without one, it looks up the default.
        self._model_loss, self._had_own_loss = model.loss_function, hasattr(model, "_loss_function")
        model.loss_function = self._loss

    def remove(self, model: Any) -> None:
        """Undo `install`."""
        for hook in self._hooks:
            hook.remove()
        del model._loss_function
        # Without a loss of its own, the model looks up the default of its class again.
        if self._had_own_loss:
            model.loss_function = self._model_loss

    def _begin(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        _check_implementation(decoder)
        _check_shapes(args, kwargs)
        # Each forward pass has its own object, so that several passes can come before one backward pass.
        self._losses = AlignmentLoss(self.alignment_weight)
        forward_pass = Pass(
            full=self.mode == "full", budget=self.budget, losses=self._losses, observers=tuple(self.observers)
        )
        # transformers would create a cache by default, and a cache cannot separate packed sequences.
        if _is_packed(kwargs):
            _refuse_cache(kwargs)
            kwargs = {**kwargs, "use_cache": False}
        return args, {**kwargs, "sparsort_pass": forward_pass}

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the model's own loss, plus the alignment losses in training."""
        loss: Tensor = self._model_loss(*args, **kwargs)
        labels = kwargs["labels"] if "labels" in kwargs else args[1]
        return self._add_by_labels(loss, labels, kwargs)

    @in_eager
    def _add_by_labels(self, loss: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        count = kwargs.get("num_items_in_batch")
        if count is None:
            return self._add(loss)
        # The LM loss is the sum over this pass's labels divided by the label count of the whole step. The alignment losses are
        # means over this pass, so they are scaled by the pass's share of the labels.
        shifted = kwargs.get("shift_labels")
        # The label of a row's first token is never predicted, so it does not count.
        shifted = labels[..., 1:] if shifted is None else shifted
        in_pass = (shifted != kwargs.get("ignore_index", -100)).sum().to(loss.device)
        return self._add(loss, in_pass / (count.to(loss.device) if isinstance(count, Tensor) else count))


def _add_module_inputs(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Add `sparsort_layer` to the arguments of a sparse attention module (forward pre-hook)."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rotary = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
    index_keys = module.index_branch.index_keys(module, hidden, rotary)
    cache = kwargs.get("past_key_values")
    if cache is not None and index_keys is not None:
        index_keys = keep_index_keys(cache, module.layer_idx, index_keys, selector=type(module.index_branch).__name__)
    return args, {**kwargs, "sparsort_layer": ModuleInputs(hidden=hidden, rotary=rotary, index_keys=index_keys)}


def _check_implementation(decoder: Any) -> None:
    implementation = decoder.config._attn_implementation
    if implementation != NAME:
        raise SparsortError(
            f"the attention implementation of a model with an index branch was set to {implementation!r}, which would make all "
            f"layers dense. Reset it with model.set_attn_implementation({NAME!r}), or remove the index branch with "
            "sparsort.attention.attach.detach(model)."
        )


def _check_shapes(args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse positions and padding that do not match the tokens. The attention function refuses (B, 1, T, S) masks."""
    # Token ids are (B, T) and embeddings (B, T, C), so the first two axes are the same for both.
    inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    tokens = next((tensor for tensor in inputs if tensor is not None), None)
    if tokens is None or tokens.ndim < 2:
        return
    batch, length = tokens.shape[:2]
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None and tuple(positions.shape) not in ((1, length), (batch, length)):
        raise SparsortError(
            f"position_ids have shape {tuple(positions.shape)}; expected ({batch}, {length}) or (1, {length}), like the tokens."
        )
    if isinstance(mask, Tensor) and mask.ndim != 4 and (mask.ndim != 2 or mask.shape[0] != batch):
        raise SparsortError(
            f"the attention mask has shape {tuple(mask.shape)}; expected ({batch}, tokens in the cache and new ones), with 0 "
            "at padding."
        )


def _is_packed(kwargs: dict[str, Any]) -> bool:
    """Whether position_ids pack several sequences into one row. As in transformers, a padding mask overrides them."""
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or positions.ndim != 2:
        return False
    return bool((positions[:, 1:] != positions[:, :-1] + 1).any())


def _refuse_cache(kwargs: dict[str, Any]) -> None:
    """Refuse a cache for packed sequences, which it cannot separate: later tokens would see every sequence of the row."""
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise SparsortError(
            "position_ids pack several sequences into one row, but a cache keeps a row as one sequence. Pass use_cache=False and "
            "no past_key_values, or put each sequence in its own row and pass an attention_mask."
        )
