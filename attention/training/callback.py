"""A Trainer callback for sparse attention, which applies the schedule of warm-up and budget and logs what the layers do.

Contract: optimiser step s runs with the mode and the budget of `SparseSchedule` at s, also in a resumed run. Between steps, when
Trainer evaluates and saves, the model is as it was configured: sparse, with its own budget. Measuring does not change the loss.
Logs with a training loss get these values, measured in this process on the first micro-batch of the last step:

- `sparse/lm_loss`: the language-model loss alone (the logged loss includes λ·Σ KL);
- `sparse/kl`, and `sparse/kl/<layer>` for each layer: the selector's loss, if it has one;
- `sparse/mass`, `sparse/recall`, `sparse/blocks`, `sparse/most_blocks`, `sparse/dead`: the fields of `SelectionReport`, as means
  over the sparse layers; for most_blocks, the maximum;
- `sparse/gflops`, `sparse/gflops_dense`: the forward cost of the sparse layers' attention, including choosing, and the cost if
  these layers were dense, by the formulas in `flops.py`.

The last two groups are absent during the warm-up, when nothing is chosen. Trainer calls its callbacks in order, so trackers
(`report_to`) see these values only if this callback comes first: use `callback.join(trainer)` instead of `callbacks=[callback]`.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from sparsort.attention.config import whole
from sparsort.attention.diagnostics import SelectionReport, report_selection
from sparsort.attention.flops import AttentionShape, SparseShape, dense_flops, sparse_flops
from sparsort.attention.selectors.base import BlockChoice, LayerInputs
from sparsort.attention.state import SparseAttention
from sparsort.attention.training.schedule import SparseSchedule
from sparsort.errors import SparsortError

_LOG = logging.getLogger("sparsort")
# The part of a weight's name by which the weights of index branches are recognised.
_BRANCH = ".index_branch."
_MEANS = {"mass": "mass", "recall": "recall", "blocks": "mean_blocks", "dead": "dead"}


class SparseAttentionCallback(TrainerCallback):  # type: ignore[misc]
    """Sets the mode and budget of `model.sparse_attention` by a schedule, and logs what the sparse layers do.

    Args:
        schedule: warm-up and budget by optimiser step; None: the configured budget at every step.
        sample: number of queries per sequence that are compared with dense attention in logged steps.

    Raises:
        SparsortError: `schedule` is not a `SparseSchedule`, or `sample` is below 1.
    """

    def __init__(self, schedule: SparseSchedule | None = None, *, sample: int = 32) -> None:
        if schedule is not None and not isinstance(schedule, SparseSchedule):
            raise SparsortError(
                f"schedule is {schedule!r}; expected a SparseSchedule, such as SparseSchedule(warmup_steps=3)."
            )
        self.schedule = schedule or SparseSchedule()
        self.sample = whole("sample", sample, 1)
        self._observer: Observer | None = None
        self._measured: dict[str, float] = {}

    def join(self, trainer: Any) -> None:
        """Become the first callback of a Trainer, so that its trackers receive the values logged here."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse a model without sparse attention, or a schedule that does not fit its budget.

        Raises:
            SparsortError: the model has no sparse attention, or `start` is not a valid value for its budget.
        """
        # If an earlier run was interrupted within a step, its observer is still attached.
        if self._observer is not None:
            self._observer.close()
        self._observer, self._measured = None, {}
        # Compute the first budget once, so that a schedule that does not fit is refused before training starts.
        self.schedule.budget(0, sparse_attention_of(model).config.budget())
        if state.is_world_process_zero and _is_frozen(model):
            _LOG.warning(
                "the weights of the index branch are frozen, apart from matrices of LoRA, so it hardly learns to select. With "
                "PEFT, train the branch as a whole and save it with the adapter: modules_to_save=['index_branch']."
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set the mode and the budget, and observe the layers if this step is logged."""
        sparse = sparse_attention_of(model)
        sparse.mode = "full" if self.schedule.full(state.global_step) else "sparse"
        sparse.budget = self.schedule.budget(state.global_step, sparse.config.budget())
        if _is_logged(args, state):
            self._observer = Observer(sparse, sample=self.sample)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect the measures of the first micro-batch."""
        # Later micro-batches of the step have no observer.
        if self._observer is not None:
            self._measured = self._observer.close()
            self._observer = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Restore the configured mode and budget."""
        self.on_substep_end(args, state, control)
        sparse = sparse_attention_of(model)
        sparse.mode, sparse.budget = "sparse", sparse.config.budget()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the measures to a log that has a training loss, and to the log history."""
        if logs and "loss" in logs:
            # Trainer has already copied the logs into the history when it calls this.
            logs.update(self._measured)
            state.log_history[-1].update(self._measured)
            self._measured = {}


class Observer:
    """Observes the sparse layers during the first forward pass after its construction.

    Args:
        sparse: the state of the model's sparse attention.
        sample: number of queries per sequence to compare with dense attention.
    """

    def __init__(self, sparse: SparseAttention, *, sample: int) -> None:
        self._sparse, self._sample = sparse, sample
        self._reports: dict[int, SelectionReport] = {}
        self._flops: dict[int, tuple[float, float]] = {}
        if sparse.mode == "sparse":
            sparse.observers.append(self._observe)

    def close(self) -> dict[str, float]:
        """Stop observing and return the measures by name. Measures that are NaN are omitted."""
        sparse = self._sparse
        if self._observe in sparse.observers:
            sparse.observers.remove(self._observe)
        measures = {}
        if sparse.lm_loss is not None:
            # The state has the mean over the pass's own labels; the model's loss is divided by the labels of the whole step.
            measures["sparse/lm_loss"] = float(sparse.lm_loss)
        if values := {layer: float(value) for layer, value in sorted(sparse.alignment.items())}:
            measures["sparse/kl"] = sum(values.values()) / len(values)
            measures |= {f"sparse/kl/{layer}": value for layer, value in values.items()}
        if self._reports:
            for name, field in _MEANS.items():
                by_layer = [getattr(report, field) for report in self._reports.values()]
                # A layer whose queries had nothing to choose has NaN, which would hide the other layers.
                if known := [value for value in by_layer if not math.isnan(value)]:
                    measures[f"sparse/{name}"] = sum(known) / len(known)
            measures["sparse/most_blocks"] = max(report.most_blocks for report in self._reports.values())
            sparse_flops_sum, dense_flops_sum = (sum(each) / 1e9 for each in zip(*self._flops.values(), strict=True))
            measures |= {"sparse/gflops": sparse_flops_sum, "sparse/gflops_dense": dense_flops_sum}
        return measures

    def _observe(self, layer: int, inputs: LayerInputs, choice: BlockChoice) -> None:
        # Checkpointing runs a layer twice; the first run is enough.
        if layer not in self._reports:
            self._reports[layer] = report_selection(
                inputs.query, inputs.key, choice.selection, inputs.layout, scale=inputs.scale, sample=self._sample
            )
            self._flops[layer] = _flops(self._sparse, inputs, choice)


def sparse_attention_of(model: Any) -> SparseAttention:
    """Return the state that `attach_index_branch` stored on a model, also from inside wrappers (DDP, PEFT, torch.compile).

    Raises:
        SparsortError: the model has no sparse attention.
    """
    module = model
    while module is not None:
        state = getattr(module, "sparse_attention", None)
        if isinstance(state, SparseAttention):
            return state
        inner = (getattr(module, name, None) for name in ("module", "base_model", "model", "_orig_mod"))
        # `base_model` of an unwrapped model may be the model itself, which would loop forever.
        module = next((candidate for candidate in inner if candidate is not None and candidate is not module), None)
    raise SparsortError(
        f"{type(model).__name__} has no sparse attention. Attach one first: sparsort.attach_index_branch(model)."
    )


def _is_frozen(model: Any) -> bool:
    """Whether the selectors have weights and not one of them is trained; the low-rank matrices of LoRA do not count."""
    weights = [weight for name, weight in model.named_parameters() if _BRANCH in name and ".lora_" not in name]
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def _is_logged(args: Any, state: Any) -> bool:
    """Whether the loss of the step that begins may be logged. If logging is by epochs, it may be any step's."""
    step, every = state.global_step + 1, max(1, int(state.logging_steps or 1))
    by_steps = args.logging_strategy == IntervalStrategy.STEPS
    return not by_steps or step % every == 0 or (step == 1 and bool(args.logging_first_step))


def _flops(sparse: SparseAttention, inputs: LayerInputs, choice: BlockChoice) -> tuple[float, float]:
    """Return the forward operations of one layer: sparse, and as if it were dense."""
    selector: Any = inputs.module.index_branch
    shape = AttentionShape(
        heads=inputs.query.shape[1],
        groups=inputs.groups,
        head_dim=inputs.query.shape[3],
        index_dim=getattr(selector, "width", 0),
    )
    # (B, T). The formulas take the mean number of blocks, so groups and queries may differ in theirs.
    counts = choice.selection.counts.double().mean(dim=1).cpu()
    spent = dense = 0.0
    for span in inputs.layout.spans:
        blocks = float(counts[span.row, span.query_start : span.query_start + span.queries].mean())
        sparse_shape = SparseShape(
            selector=sparse.config.selector,
            block_size=choice.selection.block_size,
            blocks=blocks,
            window=getattr(selector, "window", 0),
        )
        spent += sparse_flops(shape, span.keys, sparse_shape)
        dense += dense_flops(shape, span.keys)
    return spent, dense
