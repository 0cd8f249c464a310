"""The Trainer of `sparsort train`, with the held-out loss, the history, the progress bar and the response to interrupts.

Contract: the held-out loss is the mean over the tokens of the held-out rows, each counted once, however they are batched and
divided among processes; it draws no random numbers. The history always matches the checkpoint next to it, so a run that is killed
and resumed writes the same history as an uninterrupted one. An interrupt ends training after the current step, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, SchedulerType, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_torch_bf16_gpu_available

from sparsort.curriculum.loading.loader.packing import IGNORED
from sparsort.curriculum.loading.online.measure import OnlineDifficulty
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.trainer.checkpoints import NoCheckpointError
from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer
from sparsort.errors import SparsortError, unknown_choice
from sparsort.recipes.train.config import TrainConfig
from sparsort.recipes.train.text import TextCollator
from sparsort.storage.files import write_atomically
from sparsort.terminal.interrupts import asking, received
from sparsort.terminal.printing import note
from sparsort.terminal.progress import progress
from sparsort.trackers import NO_TRACKER, TRACKERS, check_trackers, in_trainer, tracker_names

if TYPE_CHECKING:
    from sparsort.attention.training.callback import SparseAttentionCallback

# Number of checkpoints that are kept. A kill may leave the last one incomplete, so one is not enough.
_KEPT = 2
# The share of a run over which the schedule "wsd" lowers the learning rate.
_DECAY = 0.2
# The first keys of an entry of the history. Entries from a checkpoint have their keys in another order.
_FIRST = {"step": 0, "loss": 1, "eval_loss": 2}
_TIMINGS = ("_runtime", "_per_second")
_LOG = logging.getLogger("sparsort")


class TextTrainer(CurriculumTrainer):
    """A CurriculumTrainer whose held-out loss does not depend on how the rows are batched."""

    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        """The mean loss of the held-out tokens, as `eval_loss`."""
        metrics = {f"{metric_key_prefix}_loss": self._held_out_loss()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_loss(self) -> float:
        args, data, model = self.args, self.eval_dataset, self.model_wrapped
        size, ranks = args.per_device_eval_batch_size, args.world_size
        # The sum of the losses and the number of tokens. float64 keeps the sum exact enough for many tokens; MPS has no float64.
        total = torch.zeros(2, dtype=torch.float64, device=args.device if args.device.type != "mps" else "cpu")
        was_training = model.training
        model.eval()
        try:
            for begin in range(args.process_index * size, -(-len(data) // (size * ranks)) * size * ranks, size * ranks):
                rows = list(range(begin, min(begin + size, len(data))))
                # A process that has no rows left runs a row that does not count, because a sharded model needs all processes in
                # every pass.
                batch = self.data_collator(data.__getitems__(rows or [0]))
                batch = {name: value.to(args.device) for name, value in batch.items()}
                with torch.no_grad(), self.autocast_smart_context_manager():
                    loss = model(**batch, use_cache=False).loss
                if rows:
                    count = int((batch["labels"][:, 1:] != IGNORED).sum())
                    total += torch.tensor([float(loss) * count, count], dtype=torch.float64).to(total)
        finally:
            model.train(was_training)
        if ranks > 1:
            torch.distributed.all_reduce(total)
        return float(total[0] / total[1])


def arguments(folder: Path, config: TrainConfig) -> TrainingArguments:
    """Trainer's arguments that do not depend on the data. Creating them also joins the processes of a distributed run.

    Raises:
        SparsortError: a tracker is unknown or not installed.
    """
    trackers = tracker_names(config.report_to)
    for name in trackers:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_choice(TRACKERS.kind, name, (NO_TRACKER, *sorted(INTEGRATION_TO_CALLBACK)))
    check_trackers([name for name in trackers if name in TRACKERS])
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and is_torch_bf16_gpu_available())
    return TrainingArguments(
        str(folder),
        # `run_trainer` sets the number of steps, which depends on the data.
        max_steps=1,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        seed=config.seed,
        bf16=bfloat16,
        use_cpu=not torch.accelerator.is_available(),
        save_steps=config.save_steps,
        save_total_limit=_KEPT,
        # One loss per step: a mean over several steps would depend on where the run was stopped.
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(trackers),
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )


def run_trainer(
    model: Any,
    args: TrainingArguments,
    config: TrainConfig,
    *,
    plan: CurriculumPlan,
    steps: int,
    per_device: int,
    tokenizer: Any,
    rows: Any,
    held_out: Any | None,
    history: Path,
    sparse: SparseAttentionCallback | None = None,
) -> tuple[TextTrainer, int]:
    """Train to the last step, from the newest intact checkpoint if there is one.

    Args:
        model: the model, which is trained in place.
        args: from `arguments`.
        config: how to train.
        plan: the plan of `rows`.
        steps: steps of the whole run.
        per_device: examples of a micro-batch.
        tokenizer: the model's tokenizer.
        rows, held_out: tokenised datasets.
        history: the file of the losses.
        sparse: the callback of a model with sparse attention.

    Returns:
        The trainer after the last step, and the step from which it resumed.

    Raises:
        SparsortError: settings that do not fit the plan, or a checkpoint of another run.
        KeyboardInterrupt: the run was interrupted.
    """
    args.max_steps = steps
    args.per_device_train_batch_size = args.per_device_eval_batch_size = per_device
    args.lr_scheduler_type, args.lr_scheduler_kwargs = _schedule(config, steps)
    if held_out is not None and config.eval_steps is not None:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, config.eval_steps
    stop, log = Stop(), History(history)
    with in_trainer(args.report_to), contextlib.ExitStack() as stack:
        trainer = _make_trainer(model, args, config, plan, tokenizer, rows, held_out, stop)
        if sparse is not None:
            sparse.join(trainer)
        trainer.add_callback(log)
        if args.should_log:
            trainer.add_callback(Bar(stack.enter_context(progress("training", steps))))
        # Several processes would have to agree on a step, so they stop at once, and resume from the last checkpoint.
        if args.world_size == 1:
            stack.enter_context(asking(stop.ask))
        _train(trainer)
    if trainer.state.global_step < steps:
        raise received() or KeyboardInterrupt
    entries = losses(trainer.state.log_history)
    if held_out is not None and not any("eval_loss" in entry and entry["step"] == steps for entry in entries):
        trainer.evaluate()
    if args.should_save:
        write_history(history, trainer.state.log_history)
    return trainer, log.begin


def _make_trainer(
    model: Any,
    args: TrainingArguments,
    config: TrainConfig,
    plan: CurriculumPlan,
    tokenizer: Any,
    rows: Any,
    held_out: Any | None,
    stop: Stop,
) -> TextTrainer:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    try:
        trainer = TextTrainer(
            model,
            args,
            curriculum=plan,
            # The rows were verified before tokenisation; here they have no columns but the tokens.
            verify=False,
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=TextCollator(pad_token_id=pad),
            processing_class=tokenizer,
            callbacks=[stop] if held_out is None else [stop, LastEvaluation()],
            online=OnlineDifficulty(metric=config.online_metric) if config.online else None,
        )
    except (ImportError, RuntimeError) as error:
        if not args.report_to:
            raise
        raise SparsortError(
            f"report_to={config.report_to!r} cannot be used: {error} Install it, or omit report_to."
        ) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _schedule(config: TrainConfig, steps: int) -> tuple[SchedulerType, dict[str, Any]]:
    if config.lr_schedule == "wsd":
        decay = min(max(1, round(_DECAY * steps)), steps - config.warmup_steps)
        return SchedulerType.WARMUP_STABLE_DECAY, {"num_decay_steps": decay}
    if config.lr_schedule == "constant":
        return SchedulerType.CONSTANT_WITH_WARMUP, {}
    return SchedulerType(config.lr_schedule), {}


def _train(trainer: TextTrainer) -> None:
    """Train from the newest intact checkpoint, or from the beginning if there is no intact one."""
    if any(Path(trainer.args.output_dir).glob("checkpoint-*")):
        try:
            trainer.train(resume_from_checkpoint=True)
        except NoCheckpointError as error:
            _LOG.warning("%s", str(error).partition(" Train from ")[0] + " Training begins at the first step.")
        else:
            return
    trainer.train()


class History(TrainerCallback):  # type: ignore[misc]
    """Writes the losses up to a checkpoint as JSON lines, whenever a checkpoint is written; the file is replaced as a whole.

    Attributes:
        begin: the step from which training resumed; 0 for a run from the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.begin = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the history in the first process."""
        if state.is_world_process_zero:
            write_history(self._path, state.log_history)


class Bar(TrainerCallback):  # type: ignore[misc]
    """Advances a progress bar, which begins at the step from which the run resumed."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)


class LastEvaluation(TrainerCallback):  # type: ignore[misc]
    """Measures the held-out loss at the last step, while the runs of the trackers are still open."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = True


class Stop(TrainerCallback):  # type: ignore[misc]
    """Ends training after the current step, with a checkpoint, once `requested` is set."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def ask(self, name: str) -> None:
        """Request the stop, because of the signal of this name."""
        self.requested = True
        note(
            f"sparsort: {name}: stopping after this step, with a checkpoint; send it again to stop at once, without one."
        )


def write_history(path: Path, log: list[dict[str, Any]]) -> None:
    """Write the entries that have a loss, one JSON object per line; a number that is not finite becomes null."""
    with write_atomically(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in losses(log)), encoding="utf-8")


def losses(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of Trainer's log that have a training or held-out loss, as JSON values, without timings.

    Timings differ between two runs with the same losses, whose histories are compared.
    """
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in sorted(entry.items(), key=lambda item: (_FIRST.get(item[0], len(_FIRST)), item[0]))
            if not name.endswith(_TIMINGS)
        }
        for entry in log
        if "loss" in entry or "eval_loss" in entry
    ]
