"""The state of the curriculum in Trainer's checkpoints: save the loader's position, and restore it on resume.

Contract: a checkpoint written at global step s contains the loader's state after the s-th optimiser step, whatever was prefetched
by then. Training resumes from it only if the loader accepts that state and is at step s; the position is never guessed. Nothing
here draws a random number.

Trainer's own resume iterates over the data up to the checkpoint, which takes hours (transformers #11284, #21934). A loader whose
every batch is a function of its number does not need that, so `CurriculumMixin` turns it off.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from transformers.trainer_callback import ExportableState, TrainerCallback

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.errors import SparsortError

_LOG = logging.getLogger("sparsort")


class CurriculumCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Positions the loader when training begins, keeps its state, and collects statistics of the training batches.

    `CurriculumMixin` adds one. Its state is stored in the checkpoint's `trainer_state.json`, and is read from there even if
    `restore_callback_states_from_checkpoint` is off, which is the default.

    Attributes:
        position: the loader's state.
        processes: number of processes that train together.
        manifest: whether a checkpoint with this state is completed by a manifest (`checkpoints`).
    """

    manifest = True

    def __init__(self) -> None:
        self.position: dict[str, Any] | None = None
        self.processes = 1
        self._loader: CurriculumLoader | None = None
        self._stage, self._share = 0, math.nan
        self._sum, self._count = 0.0, 0

    def state(self) -> dict[str, Any]:
        """The state that transformers writes into a checkpoint and restores the callback from."""
        attributes = {"position": self.position, "processes": self.processes, "manifest": self.manifest}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the loader to the position of the checkpoint, and warn if training will end inside the curriculum.

        Raises:
            SparsortError: the checkpoint has no curriculum, another one, or one that is at another step.
        """
        loader: CurriculumLoader = kwargs["train_dataloader"]
        if not isinstance(loader, CurriculumLoader):
            raise SparsortError(
                f"training would follow a {type(loader).__name__} instead of the plan: get_train_dataloader was overridden. "
                "Return the loader of super().get_train_dataloader()."
            )
        if state.global_step > 0:
            _resume(loader, state, type(self).__name__, args.gradient_accumulation_steps)
        self._loader, self.processes = loader, args.world_size
        self.position = loader.state_dict()
        self._sum, self._count = 0.0, 0
        per_epoch = -(-len(loader) // args.gradient_accumulation_steps)
        if state.is_world_process_zero and (warning := _warning_if_cut_short(loader.plan, state.max_steps, per_epoch)):
            _LOG.warning("%s", warning)
        if state.is_world_process_zero and (advice := _advice_on_decay(loader.plan, args.lr_scheduler_type)):
            _LOG.info("%s", advice)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the global batch of this step; Trainer has fetched all its micro-batches by now."""
        loader = self._loader
        if loader is None or loader.latest is None:
            return
        plan, (epoch, number) = loader.plan, loader.latest
        self._stage, self._share = plan.stage(number), plan.share(number, epoch)
        # A step can take several generation batches, or a part of one.
        first = (loader.yielded - 1) // args.gradient_accumulation_steps * args.gradient_accumulation_steps
        numbers = range(first * plan.n_batches // len(loader), number + 1)
        rows = np.concatenate([plan.batch(each, epoch) for each in numbers])
        difficulty = np.asarray(plan.difficulty[rows], dtype=np.float64)
        scored = difficulty[np.isfinite(difficulty)]
        # The sums restart whenever `measures` reports them.
        self._sum += float(scored.sum())
        self._count += len(scored)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the loader's state at this step, so that a checkpoint between two steps belongs to the step that it contains."""
        if self._loader is not None:
            self.position = self._loader.state_dict()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct `state.epoch`, since Trainer counts a resumed epoch from its beginning."""
        if self._loader is not None:
            state.epoch = self._loader.epoch + self._loader.yielded / len(self._loader)

    def measures(self) -> dict[str, float]:
        """The stage and share of the latest step, and the mean difficulty since the previous call.

        Rows without a finite score do not count; if no row has one, there is no difficulty.
        """
        if math.isnan(self._share):
            return {}
        measured = {"curriculum/stage": self._stage, "curriculum/share": self._share}
        if self._count:
            measured["curriculum/difficulty"] = self._sum / self._count
        self._sum, self._count = 0.0, 0
        return measured


def _resume(loader: CurriculumLoader, state: Any, name: str, accumulation: int) -> None:
    stored = state.stateful_callbacks.get(name)
    # transformers stores a list if several callbacks share a class name.
    stored = stored[-1] if isinstance(stored, list) else stored
    position = stored.get("attributes", {}).get("position") if stored else None
    if position is None:
        raise SparsortError(
            f"the checkpoint at step {state.global_step} was written by a trainer without a curriculum, so it does not "
            "say which examples were seen. Resume it with the trainer that wrote it, or start a curriculum from its "
            "weights: load the model with from_pretrained(checkpoint) and call train() without resume_from_checkpoint."
        )
    loader.load_state_dict(position)
    per_epoch = -(-len(loader) // accumulation)
    steps, remainder = divmod(loader.yielded, accumulation)
    step = loader.epoch * per_epoch + steps
    if remainder or step != state.global_step:
        where = f"inside step {step}" if remainder else f"step {step}"
        raise SparsortError(
            f"the checkpoint is of step {state.global_step}, but its curriculum is at epoch {loader.epoch}, batch "
            f"{loader.batch} of {loader.plan.n_batches}, which is {where}. The cause may be another accumulation or "
            "num_iterations in a trainer that generates, a callback that cut an epoch short (should_epoch_stop), or other code "
            "that moved the loader. Use the options of the first run, or start from an earlier checkpoint."
        )


def _warning_if_cut_short(plan: CurriculumPlan, steps: int, per_epoch: int) -> str | None:
    """A warning if training does not end at the end of an epoch of the curriculum; None if it does."""
    settings = plan.settings
    whole, remainder = divmod(steps, per_epoch)
    if settings.mode == "pool" and steps > per_epoch:
        paced = plan.n_batches * steps // per_epoch
        return (
            f"the plan paces over {per_epoch} steps and training takes {steps}: after {per_epoch} the pacing starts again "
            f"with the easiest. To go through it once, set max_steps={per_epoch}, or plan with steps={paced}."
        )
    if not remainder or settings.schedule in ("shuffle", "as_given") or (whole and settings.later_epochs == "shuffle"):
        return None
    consequence = "are not trained on"
    if whole:
        consequence = f"are trained on {whole} times, and the beginning {whole + 1} times"
    return (
        f"training ends at step {steps}, inside an epoch of {per_epoch}: the last {per_epoch - remainder} steps of the "
        f"curriculum {consequence}. Set max_steps to a multiple of {per_epoch} to go through it whole."
    )


def _advice_on_decay(plan: CurriculumPlan, scheduler: Any) -> str | None:
    """What a learning rate that decays means for this curriculum; None if the rate or the order of the plan does not matter."""
    settings, name = plan.settings, str(getattr(scheduler, "value", scheduler))
    has_order = settings.schedule not in ("shuffle", "as_given") and settings.direction != "random"
    if not has_order or name.startswith("constant"):
        return None
    return (
        f"lr_scheduler_type={name!r} lowers the learning rate towards the end, where the curriculum shows its last examples. "
        "In published experiments a curriculum then lost most of its gain, and kept it with a constant rate or with averaged "
        "weights (arXiv 2511.18903). Consider lr_scheduler_type='constant_with_warmup'."
    )
