"""A curriculum inside transformers' Trainer: the plan's batches, on any number of processes, resumed exactly.

Contract: optimiser step s trains on global batch s of the plan, whatever the number of processes, data workers and accumulation
steps. In TRL's GRPO and RLOO, the plan's batches are the prompts of generation batches, which serve as many steps as the
trainer's options say (`generation`). `resume_from_checkpoint` continues with the next batch, without delay. Trainer's own
ordering options (`train_sampling_strategy`, `data_seed`, `dataloader_drop_last`, accelerate's `even_batches`) have no effect: the
loader is already sharded and does not pass through `accelerator.prepare`, whose wrap-around would show the easiest examples again
after the hardest.

Checkpoints are completed by a manifest and checked against it before they are used (`checkpoints`).

Two of the caller's arguments are changed temporarily: `ignore_data_skip` is on while `train` runs (otherwise Trainer would
iterate over the data up to the checkpoint), and `save_total_limit` is None while a checkpoint is written (otherwise Trainer
would delete older ones before every process has written its part).
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from transformers import DataCollatorWithPadding, Trainer, default_data_collator

from sparsort.curriculum.loading.loader.fetching import Part
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.loader.packing import PackedCollator
from sparsort.curriculum.loading.loader.verification import check_name, rows_agree, verify_rows
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.trainer import checkpoints
from sparsort.curriculum.loading.trainer.callback import CurriculumCallback
from sparsort.curriculum.loading.trainer.classes import refuse_mixin_after_trainer, refuse_own_batches
from sparsort.curriculum.loading.trainer.generation import (
    generates_in_groups,
    groups_of,
    load_completions,
    save_completions,
)
from sparsort.errors import SparsortError
from sparsort.storage.files import disk_errors

if TYPE_CHECKING:
    from sparsort.curriculum.loading.loader.groups import Groups
    from sparsort.curriculum.loading.online.measure import OnlineDifficulty
    from sparsort.curriculum.loading.online.online_curriculum import OnlineCurriculum

# The folder of the online difficulty in a checkpoint.
_ONLINE = "curriculum"


class CurriculumMixin(Trainer):  # type: ignore[misc]
    """Trains in the order of a plan. Put it before any subclass of Trainer: `class Mine(CurriculumMixin, SFTTrainer)`.

    Logs with a training loss also contain, for every target of `report_to`, `curriculum/stage` and `curriculum/share` (the share
    of the examples that is available) of the latest step, and `curriculum/difficulty`, the mean over all examples that all
    processes trained on since the previous such log.

    Args:
        curriculum: the plan of the training data's rows, or the folder that `plan.save` wrote.
        fingerprint: your own name for the training data, as in `CurriculumLoader`.
        verify: compare `train_dataset`, as it is passed and before any column is removed, with what the plan noted of its
            rows. False accepts any dataset with the same number of rows.
        online: measure the difficulty of the examples while training on them, and revise the plan at the edges of stages
            (`OnlineCurriculum`). Checkpoints then contain a folder `curriculum` with the state of the online difficulty.
        args, kwargs: arguments of the Trainer that it is mixed into.

    Raises:
        SparsortError: the trainer chooses its own batches (`classes`), or `train_dataset` does not have the plan's rows in
            their order, or has nothing that could be compared with them (`verification`).
    """

    # TRL's buffer of completions, a list of dictionaries once it has generated.
    _buffered_inputs: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_mixin_after_trainer(cls, CurriculumMixin)

    def __init__(
        self,
        *args: Any,
        curriculum: CurriculumPlan | str | Path,
        online: OnlineDifficulty | None = None,
        fingerprint: str | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(curriculum, (CurriculumPlan, str, Path)):
            raise SparsortError(
                f"curriculum= must be a plan of plan_curriculum, or its folder, not {type(curriculum).__name__}."
            )
        if online is not None and not hasattr(online, "attach"):
            raise SparsortError(
                f"online= must be an OnlineDifficulty, such as OnlineDifficulty(metric='hoyer'), not {online!r}."
            )
        self.online = online
        self._learning: OnlineCurriculum | None = None
        self._resumed_from: Path | None = None
        self._damaged: list[Path] = []
        # The checkpoint that has its manifest already, since an upload may need it before `_save_checkpoint` ends.
        self._sealed: Path | None = None
        self._micro_batch = 0
        self.curriculum = (
            curriculum if isinstance(curriculum, CurriculumPlan) else CurriculumPlan.open(Path(curriculum))
        )
        check_name(fingerprint)
        self._fingerprint, self._verify = fingerprint, verify
        # All checks come before the model is loaded, and before the other base class removes columns from the data.
        arguments = _arguments_by_name(super().__init__, args, kwargs)
        self._groups: Groups | None = None
        self._has_own_collator = arguments.get("data_collator") is not None
        plan_packs = self.curriculum.settings.packing != "none"
        refuse_own_batches(type(self), CurriculumMixin, arguments.get("args"), plan_packs=plan_packs)
        if online is not None and generates_in_groups(type(self)):
            raise SparsortError(
                "online= measures the forward pass of a training step, and this trainer runs others to generate. Omit online=."
            )
        given = arguments.get("train_dataset")
        if given is not None and verify:
            verify_rows(self.curriculum, given, fingerprint=fingerprint)
        super().__init__(*args, **kwargs)
        self._verified = self._verify_prepared(given)
        # This callback runs first, so that the others see the epoch that it corrects.
        self.callback_handler.callbacks.insert(0, CurriculumCallback())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer does. With `resume_from_checkpoint=True`, damaged and incomplete checkpoints are skipped with a
        warning.

        Raises:
            SparsortError: the checkpoint is damaged, belongs to another plan or other data, or was written without a curriculum.
        """
        self._resumed_from, self._damaged = checkpoints.choose(resume_from_checkpoint, self.args)
        if self._resumed_from is not None:
            resume_from_checkpoint = str(self._resumed_from)
        # The loader positions itself, so Trainer must not skip batches as well.
        skip = self.args.ignore_data_skip
        self.args.ignore_data_skip = True
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = skip
            self._resumed_from = None
            self._stop_learning()

    def get_train_dataloader(self) -> CurriculumLoader:
        """The loader of this process's part of the plan's batches, with the columns, collator and workers that Trainer would use.

        If the plan packs and no `data_collator` is given, the collator is `PackedCollator`.

        Raises:
            SparsortError: the arguments do not give the plan's global batch, or use a parallelism under which several
                processes share a batch.
        """
        args = self.args
        if self.train_dataset is None:
            raise SparsortError("training needs train_dataset=, the data that the plan was made for.")
        self._check_parallelism()
        if self._verify and self.train_dataset is not self._verified:
            # The dataset was set after construction.
            verify_rows(self.curriculum, self.train_dataset, fingerprint=self._fingerprint)
            self._verified = self.train_dataset
        if generates_in_groups(type(self)):
            # The layout does not depend on the dataset, and TRL's sampler fails on one without a length.
            self._groups = groups_of(super()._get_train_sampler([None]))
        elif self.curriculum.settings.batch_size is not None:
            check_global_batch(
                self.curriculum.settings.batch_size,
                args.per_device_train_batch_size,
                args.gradient_accumulation_steps,
                args.world_size,
            )
        dataset, collate = self._dataset_and_collator()
        loader = CurriculumLoader(
            self.curriculum,
            dataset,
            collate_fn=collate,
            rank=args.process_index,
            world_size=args.world_size,
            micro_batches=1 if self._groups else args.gradient_accumulation_steps,
            groups=self._groups,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            fingerprint=self._fingerprint,
            verify=False,  # the dataset was verified above, with the columns that are removed here
        )
        self._learn(loader)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step; none after the last step, since Trainer would otherwise take one more on a resume."""
        self._micro_batch = 0
        if self.state.global_step >= self.state.max_steps:
            return [], None
        samples: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer is to run the rest of a resumed epoch as if it were a whole one: it counts batches from 0, and takes a step
        # that has fewer batches than the others for the last one only if the numbers agree.
        loader, epoch = kwargs["train_dataloader"], kwargs["epoch"]
        done = loader.yielded if loader.epoch == epoch else 0
        kwargs["steps_in_epoch"] -= done
        kwargs["num_update_steps_per_epoch"] -= done // self.args.gradient_accumulation_steps
        if self._groups is not None:
            self._step = epoch * len(loader) + done
            if done % self._groups.repeats:
                # The resumed epoch is the only one that begins inside a generation batch.
                rank, world_size, device = self.args.process_index, self.args.world_size, self.args.device
                folder = Path(kwargs["resume_from_checkpoint"])
                self._buffered_inputs = load_completions(folder, rank=rank, world_size=world_size, device=device)
        super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of the trainer that this is mixed into; with `online`, its forward pass also measures the micro-batch."""
        learning = self._learning
        if learning is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        learning.online.begin()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        plan, (epoch, number) = learning.loader.plan, learning.loader.latest or (0, 0)
        # Trainer has already fetched all micro-batches of the step, so the loader cannot tell which one this is.
        rows = self._part().of(plan.batch(number, epoch), self._micro_batch)
        learning.online.collect(rows, epoch * plan.n_batches + number)
        self._micro_batch += 1
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Report `logs`; logs with a training loss also get the measures of the curriculum."""
        if "loss" in logs:
            callback = next(each for each in self.callback_handler.callbacks if isinstance(each, CurriculumCallback))
            logs = {**logs, **callback.measures()}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # All processes call this, but only the first one writes the state of callbacks. Trainer writes its own state last, so a
        # checkpoint that contains it is complete.
        args, runs = self.args, Path(self._get_output_dir(trial=trial))
        folder = runs / f"checkpoint-{self.state.global_step}"
        self._sealed = None
        if args.should_save:
            checkpoints.open_for_writing(folder)
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            with disk_errors(folder):
                if self._learning is not None:
                    self._learning.save(folder / _ONLINE)
                if self._groups is not None and self._step % self._groups.repeats:
                    rank, world_size = args.process_index, args.world_size
                    save_completions(folder, self._buffered_inputs, rank=rank, world_size=world_size)
                super()._save_checkpoint(model, trial)
            self._seal(folder)
        except SparsortError:
            # An incomplete checkpoint is useless and may fill the disk, so it is removed. Earlier checkpoints still exist.
            if args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            args.save_total_limit = limit
        if args.should_save:
            best = self.state.best_model_checkpoint
            keep = [folder, *([Path(best)] if best else [])]
            # A damaged checkpoint that was just written again is intact.
            self._damaged = [path for path in self._damaged if path != folder]
            checkpoints.rotate(runs, limit, keep=keep, first=self._damaged)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs in a separate thread, so the manifest must be written before it starts.
        self._seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        checkpoints.choose(self.state.best_model_checkpoint, self.args, may_be_missing=True)
        super()._load_best_model()

    def _seal(self, folder: Path) -> None:
        """Complete a checkpoint with its manifest, once, after every process has written its part."""
        if self._sealed == folder:
            return
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.seal_checkpoint(folder)
        self._sealed = folder

    def _verify_prepared(self, given: Any) -> Any:
        """The dataset that counts as verified after construction: the given one, as the other base class prepared it."""
        prepared = self.train_dataset
        if given is None:
            return None
        if prepared is not given and self._verify and self._fingerprint is None:
            # Compare ids only: templates may have changed the contents, and the other class may have dropped columns.
            rows_agree(self.curriculum, prepared, content=False)
        return prepared

    def _learn(self, loader: CurriculumLoader) -> None:
        self._stop_learning()
        saved = self._resumed_from / _ONLINE if self._resumed_from else None
        if self.online is None:
            if saved is not None and saved.exists():
                raise SparsortError(
                    f"{saved.parent} was written while the difficulty was measured online. Resume with the same online=."
                )
            return
        if self.args.enable_jit_checkpoint:
            raise SparsortError(
                "enable_jit_checkpoint=True saves in the middle of a step, when the online difficulty has seen only a part of "
                "it. Omit it, and save often (save_steps)."
            )
        from sparsort.curriculum.loading.online.online_curriculum import OnlineCurriculum

        self._learning = OnlineCurriculum(self.model, loader, online=self.online, automatic=False)
        if saved is not None:
            self._learning.load(saved)

    def _stop_learning(self) -> None:
        if self._learning is not None:
            self._learning.close()
            self._learning = None

    def _part(self) -> Part:
        args = self.args
        return Part(rank=args.process_index, world_size=args.world_size, micro_batches=args.gradient_accumulation_steps)

    def _dataset_and_collator(self) -> tuple[Any, Callable[[list[Any]], Any]]:
        collate = self.data_collator
        # Trainers of TRL construct a collator of their own if none was passed; it would drop the edges of the packed documents.
        by_default = not self._has_own_collator or collate is default_data_collator
        by_default = by_default or type(collate) is DataCollatorWithPadding
        if by_default and self.curriculum.settings.packing != "none":
            collate = PackedCollator(pad_token_id=getattr(self.processing_class, "pad_token_id", None) or 0)
        if isinstance(self.train_dataset, datasets.Dataset):
            return self._remove_unused_columns(self.train_dataset, description="training"), collate
        return self.train_dataset, self._get_collator_with_removed_columns(collate, description="training")

    def _check_parallelism(self) -> None:
        shared = {"tensor": self.get_tp_size(), "context": self.get_cp_size(), "sequence": self.get_sp_size()}
        if active := [f"{kind} parallelism over {size}" for kind, size in shared.items() if size > 1]:
            raise SparsortError(
                f"{' and '.join(active)} processes: several processes would share a batch, and the curriculum gives "
                "each process its own. Use data parallelism (DDP, FSDP or ZeRO), or your own loop with "
                "CurriculumLoader(rank=…, world_size=…) counted over the data-parallel groups."
            )
        if self.args.n_gpu > 1:
            raise SparsortError(
                f"{self.args.n_gpu} GPUs in one process would be used through DataParallel, which splits batches by itself. "
                f"Start one process for each GPU (torchrun --nproc-per-node {self.args.n_gpu} …), or make only one visible "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.args.accelerator_config, name):
                raise SparsortError(
                    f"accelerator_config's {name}=True makes accelerate divide batches among processes; here each process "
                    "loads its own part of the global batch. Omit it."
                )
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            raise SparsortError(
                f"train_sampling_strategy={self.args.train_sampling_strategy!r} would order the data, but the plan already does. "
                "Omit it; to group similar lengths, plan with group_by_length=True."
            )
        if generates_in_groups(type(self)) and self.args.enable_jit_checkpoint:
            raise SparsortError(
                "enable_jit_checkpoint=True saves in the middle of a step, when a part of its completions was already used. Omit "
                "it, and save often (save_steps)."
            )
        if self.args.dataloader_drop_last:
            raise SparsortError(
                "dataloader_drop_last=True would drop examples; the sizes of the plan's batches differ by at most one, so there "
                "is no incomplete batch to drop. Omit it."
            )
        if self.args.auto_find_batch_size:
            raise SparsortError(
                "auto_find_batch_size=True changes the batch size during training, and the plan's batches are fixed. Omit it; "
                "if memory is short, halve per_device_train_batch_size and double gradient_accumulation_steps."
            )


class CurriculumTrainer(CurriculumMixin):
    """transformers' Trainer in the order of a plan: `CurriculumTrainer(model, args, curriculum=plan, train_dataset=data)`."""


def _arguments_by_name(function: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as far as the signature names them."""
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    except TypeError:
        # The call itself will report the mistake.
        return kwargs
    return {**bound, **kwargs}


def check_global_batch(batch_size: int, per_device: int, accumulation: int, processes: int) -> None:
    """Refuse arguments that give another global batch size than the plan's; the error suggests arguments that fit.

    Args:
        batch_size: number of examples (or packed sequences) in the plan's global batch. A plan with a token budget has none:
            it alone determines the batch of a step, and `per_device_train_batch_size` is not used.
        per_device: `per_device_train_batch_size`.
        accumulation: `gradient_accumulation_steps`.
        processes: number of processes.

    Raises:
        SparsortError: per_device × accumulation × processes is not `batch_size`.
    """
    requested = per_device * accumulation * processes
    if requested == batch_size:
        return
    message = (
        f"per_device_train_batch_size={per_device} × gradient_accumulation_steps={accumulation} × {processes} "
        f"process{'es' if processes > 1 else ''} give a global batch of {requested}; the plan has {batch_size}. "
    )
    each, remainder = divmod(batch_size, processes)
    if remainder:
        raise SparsortError(
            f"{message}{batch_size} does not divide among {processes} processes: make the plan with batch_size={requested}, "
            "or use another number of processes."
        )
    # The largest per-device batch that divides the share of a process and is not above the requested one.
    fits = max(size for size in range(1, min(per_device, each) + 1) if each % size == 0)
    raise SparsortError(
        f"{message}Use per_device_train_batch_size={fits} with gradient_accumulation_steps={each // fits}, or make the "
        f"plan with batch_size={requested}."
    )
