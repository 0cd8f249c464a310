"""Trainer's side of sparse attention: the schedule of warm-up and budget, and what the layers do, in the logs.

Contract: optimiser step s runs with the mode and the budget of `SparseSchedule` at s, also in a run that resumes; between
steps, where Trainer evaluates and saves, the model is as it was configured: sparse, with its own budget. Measuring changes
no loss. Logs that carry a loss gain, of the first micro-batch of the last step in this process:

- `sparse/lm_loss`: the language-model loss alone (the logged loss has λ·Σ KL in it);
- `sparse/kl`, and of each layer `sparse/kl/<layer>`: the selector's loss, where it has one;
- `sparse/mass`, `sparse/recall`, `sparse/blocks`, `sparse/most_blocks`, `sparse/dead`: of `SelectionReport`, means over the
  sparse layers, and of most_blocks the most;
- `sparse/gflops`, `sparse/gflops_dense`: of the sparse layers' attention, with choosing and as it would be if they were dense,
  forward, by the formulas of `flops.py`.

The last two groups are not there in the warm-up, where nothing is chosen. Callbacks are called in turn, so trackers
(`report_to`) see these values only if this one comes before them: `callback.join(trainer)` instead of `callbacks=[callback]`.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from sparsort.attention.config import whole
from sparsort.attention.diagnostics import SelectionReport, report_selection
from sparsort.attention.flops import AttentionShape, SparseShape, dense_flops, sparse_flops
from sparsort.attention.selectors.base import Choice, LayerInputs
from sparsort.attention.state import SparseAttention
from sparsort.attention.training.schedule import SparseSchedule
from sparsort.errors import SparsortError

_MEANS = {"mass": "mass", "recall": "recall", "blocks": "mean_blocks", "dead": "dead"}


class SparseAttentionCallback(TrainerCallback):  # type: ignore[misc]
    """Drives `model.sparse_attention` by a schedule, and logs what it does.

    Args:
        schedule: warm-up and budget by optimiser step.
        sample: queries of each sequence that are compared with dense attention, in steps that are logged.

    Raises:
        SparsortError: something else than a schedule, or fewer queries than 1.
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
        """Become the first callback of a Trainer, so that its trackers get what is logged here."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse a model without sparse attention, and a schedule that its budget cannot follow.

        Raises:
            SparsortError: nothing is attached, or `start` is nothing that the budget can be.
        """
        # A step that was interrupted did not come to its end.
        if self._observer is not None:
            self._observer.close()
        self._observer, self._measured = None, {}
        self.schedule.budget(0, sparse_attention_of(model).config.budget())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set mode and budget, and watch the layers where this step is logged."""
        sparse = sparse_attention_of(model)
        sparse.mode = "full" if self.schedule.full(state.global_step) else "sparse"
        sparse.budget = self.schedule.budget(state.global_step, sparse.config.budget())
        if _is_logged(args, state):
            self._observer = Observer(sparse, sample=self.sample)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the measures of the first micro-batch."""
        if self._observer is not None:
            self._measured = self._observer.close()
            self._observer = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Leave the model as it is configured."""
        self.on_substep_end(args, state, control)
        sparse = sparse_attention_of(model)
        sparse.mode, sparse.budget = "sparse", sparse.config.budget()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the measures to a log with a training loss, and to the history."""
        if logs and "loss" in logs:
            logs.update(self._measured)
            state.log_history[-1].update(self._measured)
            self._measured = {}


class Observer:
    """Watches the sparse layers of one forward pass, the first one after it was made.

    Args:
        sparse: the model's.
        sample: queries of each sequence to compare with dense attention.
    """

    def __init__(self, sparse: SparseAttention, *, sample: int) -> None:
        self._sparse, self._sample = sparse, sample
        self._reports: dict[int, SelectionReport] = {}
        self._flops: dict[int, tuple[float, float]] = {}
        if sparse.mode == "sparse":
            sparse.observers.append(self._see)

    def close(self) -> dict[str, float]:
        """Watch no longer, and say what was seen; figures that are not there (NaN) are left out."""
        sparse = self._sparse
        if self._see in sparse.observers:
            sparse.observers.remove(self._see)
        found = {}
        if sparse.lm_loss is not None:
            # Trainer has the model divide by the labels of the whole step.
            found["sparse/lm_loss"] = float(sparse.lm_loss)
        if values := {layer: float(value) for layer, value in sorted(sparse.alignment.items())}:
            found["sparse/kl"] = sum(values.values()) / len(values)
            found |= {f"sparse/kl/{layer}": value for layer, value in values.items()}
        if self._reports:
            for name, field in _MEANS.items():
                all_layers = [getattr(report, field) for report in self._reports.values()]
                if known := [value for value in all_layers if not math.isnan(value)]:
                    found[f"sparse/{name}"] = sum(known) / len(known)
            found["sparse/most_blocks"] = max(report.most_blocks for report in self._reports.values())
            spent, dense = (sum(each) / 1e9 for each in zip(*self._flops.values(), strict=True))
            found |= {"sparse/gflops": spent, "sparse/gflops_dense": dense}
        return found

    def _see(self, layer: int, inputs: LayerInputs, choice: Choice) -> None:
        # Checkpointing runs a layer again.
        if layer not in self._reports:
            self._reports[layer] = report_selection(
                inputs.query, inputs.key, choice.selection, inputs.layout, scale=inputs.scale, sample=self._sample
            )
            self._flops[layer] = _flops(self._sparse, inputs, choice)


def sparse_attention_of(model: Any) -> SparseAttention:
    """The state that `attach_index_branch` left on a model, also inside wrappers (DDP, PEFT, torch.compile).

    Raises:
        SparsortError: nothing is attached.
    """
    found = model
    while found is not None:
        state = getattr(found, "sparse_attention", None)
        if isinstance(state, SparseAttention):
            return state
        inner = (getattr(found, name, None) for name in ("module", "base_model", "model", "_orig_mod"))
        found = next((candidate for candidate in inner if candidate is not None and candidate is not found), None)
    raise SparsortError(
        f"{type(model).__name__} has no sparse attention. Attach one first: sparsort.attach_index_branch(model)."
    )


def _is_logged(args: Any, state: Any) -> bool:
    """Whether the loss of the step that begins may be logged: with logging by epochs, that of any step."""
    step, every = state.global_step + 1, max(1, int(state.logging_steps or 1))
    by_steps = args.logging_strategy == IntervalStrategy.STEPS
    return not by_steps or step % every == 0 or (step == 1 and bool(args.logging_first_step))


def _flops(sparse: SparseAttention, inputs: LayerInputs, choice: Choice) -> tuple[float, float]:
    """Of one layer, sparse and dense."""
    selector: Any = inputs.module.index_branch
    shape = AttentionShape(
        heads=inputs.query.shape[1],
        groups=inputs.groups,
        head_dim=inputs.query.shape[3],
        index_dim=getattr(selector, "width", 0),
    )
    counts = choice.selection.counts.double().mean(dim=1).cpu()  # (B, T)
    spent = dense = 0.0
    for span in inputs.layout.spans:
        blocks = float(counts[span.row, span.query_start : span.query_start + span.queries].mean())
        done = SparseShape(
            selector=sparse.config.selector,
            block_size=choice.selection.block_size,
            blocks=blocks,
            window=getattr(selector, "window", 0),
        )
        spent += sparse_flops(shape, span.keys, done)
        dense += dense_flops(shape, span.keys)
    return spent, dense
