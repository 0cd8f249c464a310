"""DifficultySampler inside TRL's GRPOTrainer: draws the prompts, observes the rewards, and is saved in checkpoints.

Contract: each generation batch has the prompts of one block, every one of them `num_generations` times, in the layout of TRL's
RepeatSampler, on any number of processes. Training that is resumed after a generation batch was used up continues with the same
prompts and, if training itself repeats bitwise, the same completions. Inside a generation batch TRL does not save the
completions, so the rest of that batch is generated again, for the same prompts, and its rewards are not observed a second time.
A checkpoint contains the sampler before Trainer deletes older checkpoints, so a kill at any moment leaves one to resume from.

TRL gathers rewards over all processes in the order of the sampler, so no column of ids is needed. While `train` runs,
`ignore_data_skip` is on, because the sampler positions itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from sparsort.curriculum.loading.loader.resuming import as_saved, difference, fingerprint_of, random_state_restored
from sparsort.curriculum.loading.loader.verification import id_text, unformatted
from sparsort.curriculum.loading.online.difficulty_sampler import DifficultySampler
from sparsort.curriculum.loading.trainer import checkpoints
from sparsort.curriculum.loading.trainer.classes import refuse_mixin_after_trainer
from sparsort.errors import SparsortError
from sparsort.storage.files import write_atomically

_FILE = "difficulty_sampler.safetensors"
# The sum of rewards in float32 may miss 0 or 1 by its rounding error, and pass rates are in [0, 1].
_ROUNDING = 1e-5


class DifficultyMixin(Trainer):  # type: ignore[misc]
    """Draws the prompts of GRPO by difficulty: `class Mine(DifficultyMixin, GRPOTrainer)`, then `Mine(…, difficulty=sampler)`.

    Args:
        difficulty: the sampler, over the rows of `train_dataset`. Its block is set to the prompts of a generation batch.
        pass_reward: the position of the reward function whose rewards are observed. None observes the sum that GRPO uses, which
            must be in [0, 1].
        verify: compare the ids of the scores that the sampler was made from with those of `train_dataset`, if it has their
            column, and at a resume `train_dataset` with a sample of the rows that the checkpoint was written for. False accepts
            any dataset with the same number of rows.
        args, kwargs: arguments of GRPOTrainer.

    Raises:
        SparsortError: the trainer has no generation groups, or the sampler does not fit the dataset or the batches.
    """

    # TRL's buffer of completions.
    _buffered_inputs: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_mixin_after_trainer(cls, DifficultyMixin)

    def __init__(
        self,
        *args: Any,
        difficulty: DifficultySampler,
        pass_reward: int | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        if not hasattr(super(), "_calculate_rewards"):
            raise SparsortError(
                f"{type(self).__name__} generates no groups of completions: mix DifficultyMixin into TRL's GRPOTrainer, and put "
                "it first (class Mine(DifficultyMixin, GRPOTrainer))."
            )
        if not isinstance(difficulty, DifficultySampler):
            raise SparsortError(
                f"difficulty= must be a sampler, such as DifficultySampler(scores), not {type(difficulty).__name__}."
            )
        super().__init__(*args, **kwargs)
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        if rows != difficulty.n_rows:
            raise SparsortError(
                f"train_dataset has {'an unknown number of' if rows is None else rows} rows and the sampler {difficulty.n_rows} "
                "prompts. Score the rows of train_dataset, in their order; a stream cannot be drawn from."
            )
        if verify:
            _check_ids(difficulty, self.train_dataset)
        if pass_reward is not None and pass_reward not in range(len(self.reward_funcs)):
            raise SparsortError(
                f"pass_reward={pass_reward!r} is not the position of a reward function, and there are {len(self.reward_funcs)}: "
                "count from 0, or omit it to observe the sum that GRPO uses."
            )
        config = self.args
        self.difficulty, self._pass_reward, self._verify = difficulty, pass_reward, verify
        # TRL reads each generation batch from the data loader this many times, and uses a part of it each time.
        self._repeats = self.num_iterations * config.steps_per_generation
        accumulation = config.gradient_accumulation_steps
        # Trainer reads all micro-batches of a step at once, accelerate one more, and workers theirs.
        ahead = accumulation + config.dataloader_num_workers * (config.dataloader_prefetch_factor or 2)
        difficulty.configure(
            block=config.generation_batch_size // self.num_generations,
            lag=ahead // self._repeats,
            multiple=accumulation // math.gcd(accumulation, self._repeats),
        )
        # The rows of the generation batch in use, and how often it is still to be read after a resume.
        self._current = np.zeros(0, np.int64)
        self._unfinished = 0
        self._resumed_from: Path | None = None
        self.add_callback(_SamplerCallback(self))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as GRPOTrainer does.

        With `resume_from_checkpoint=True`, damaged checkpoints and those without the sampler are skipped with a warning.

        Raises:
            SparsortError: the checkpoint is damaged, was written without the sampler, or with other settings of it.
        """
        self._resumed_from, _ = checkpoints.choose(resume_from_checkpoint, self.args, needed=(_FILE,))
        if self._resumed_from is not None:
            resume_from_checkpoint = str(self._resumed_from)
        skip, self.args.ignore_data_skip = self.args.ignore_data_skip, True
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = skip

    def get_train_dataloader(self) -> Any:
        """TRL's loader, with a generator of its own. Otherwise it would draw from the global one, also where a resume begins."""
        loader = super().get_train_dataloader()
        # accelerate iterates over a loader that its own contains.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return _RepeatedBlocks(self)

    def _calculate_rewards(self, inputs: Any, prompts: Any, *args: Any) -> Any:
        rewards_BF = super()._calculate_rewards(inputs, prompts, *args)
        if self.model.training:
            self._observe(rewards_BF, inputs)
        return rewards_BF

    def _observe(self, rewards_BF: torch.Tensor, inputs: Any) -> None:
        if self._unfinished:
            # These completions replace those of a batch whose rewards the sampler has already.
            self._unfinished = 0
            return
        block = self.difficulty.awaited
        if block is None or len(rewards_BF) != len(block) * self.num_generations:
            raise SparsortError(
                f"TRL gathered {len(rewards_BF)} rewards for {0 if block is None else len(block)} prompts × "
                f"{self.num_generations} generations: the data loader was replaced. Leave get_train_dataloader and "
                "_get_train_sampler to DifficultyMixin."
            )
        rows = np.repeat(block, self.num_generations)
        first = self.train_dataset[int(rows[self.args.process_index * len(inputs)])]["prompt"]
        if isinstance(first, str) and isinstance(inputs[0]["prompt"], str) and first != inputs[0]["prompt"]:
            raise SparsortError(
                "the prompts that were generated for are not those that were drawn: train_dataset was replaced."
            )
        if self._pass_reward is not None:
            rewards = rewards_BF[:, self._pass_reward]
        else:
            rewards = (rewards_BF * self.reward_weights.to(rewards_BF.device)).nansum(dim=1)
            rewards[torch.isnan(rewards_BF).all(dim=1)] = torch.nan
        self._current = block
        values = rewards.double().cpu().numpy()
        nearest = np.clip(values, 0, 1)
        self.difficulty.observe(rows, np.where(np.abs(values - nearest) < _ROUNDING, nearest, values))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Trainer deletes older checkpoints at the end of this, so the sampler is written before.
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.open_for_writing(folder)
            self._save_sampler(folder)
        super()._save_checkpoint(model, trial)

    def _save_sampler(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        state = {**self.difficulty.state_dict(), "current": self._current}
        arrays = {name: np.ascontiguousarray(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        about = {name: value for name, value in state.items() if name not in arrays}
        about |= {"micro_steps": self._step, "repeats": self._repeats, "data": self._data()}
        with write_atomically(folder / _FILE) as temporary:
            save_file(arrays, str(temporary), metadata={"sparsort": json.dumps(about)})

    def _load_sampler(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(folder / _FILE), framework="numpy") as file:
                about = json.loads((file.metadata() or {})["sparsort"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise SparsortError(
                f"cannot read {folder / _FILE}: {error}. The checkpoint was written without a DifficultySampler, or is "
                "incomplete. Resume from another one, or start from its weights."
            ) from error
        # Checkpoints of sparsort 0.1.0 have neither `repeats` nor `data`.
        if (repeats := about.get("repeats", self._repeats)) != self._repeats:
            raise SparsortError(
                f"{folder} was written when each generation batch was read {repeats} times, and now it is read {self._repeats} "
                "times, so the batches would be cut at other places. Resume with the same num_iterations × "
                "steps_per_generation (which is gradient_accumulation_steps by default), or start from its weights."
            )
        if self._verify and "data" in about and (differs := difference(about["data"], self._data())):
            raise SparsortError(
                f"train_dataset is not the data that {folder} was written for: {differs}. Resume with that data, or pass "
                "verify=False if only its columns or its form changed."
            )
        self.difficulty.load_state_dict({**about, **arrays})
        # TRL counts from 0 after a resume, so that its batches and those of the sampler would be cut at different steps. If this
        # trainer has trained before, its completions belong to another generation batch.
        self._step, self._current, self._buffered_inputs = about["micro_steps"], arrays["current"], None
        self._unfinished = -self._step % self._repeats

    def _data(self) -> Any:
        with random_state_restored():
            return as_saved(fingerprint_of(unformatted(self.train_dataset)))


def _check_ids(sampler: DifficultySampler, dataset: Any) -> None:
    """Refuse a dataset whose ids are not those of the sampler's scores; a dataset without their column is accepted."""
    column = sampler.id_column
    if sampler.ids is None or column not in (getattr(dataset, "column_names", None) or ()):
        return
    for row, (scored, value) in enumerate(zip(sampler.ids, unformatted(dataset)[column], strict=True)):
        if id_text(value) != scored:
            raise SparsortError(
                f"row {row} of train_dataset has the {column} {id_text(value)!r}, and the scores of the sampler have {scored!r} "
                "there. Score the rows of train_dataset, in their order, or pass verify=False."
            )


class _RepeatedBlocks:
    """The rows of the blocks in TRL's layout: each row `num_generations` times, and the block once for each of its reads."""

    def __init__(self, trainer: DifficultyMixin) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        trainer = self._trainer
        return len(trainer.difficulty) * int(trainer.num_generations * trainer._repeats)

    def __iter__(self) -> Iterator[int]:
        trainer = self._trainer
        for _ in range(trainer._unfinished):
            yield from np.repeat(trainer._current, trainer.num_generations).tolist()
        for rows in trainer.difficulty.blocks():
            for _ in range(trainer._repeats):
                yield from np.repeat(rows, trainer.num_generations).tolist()


class _SamplerCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: DifficultyMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self._trainer._resumed_from:
            self._trainer._load_sampler(self._trainer._resumed_from)
