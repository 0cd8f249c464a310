"""Adapters of trainers, with a tiny model: ours, transformers' Trainer, and TRL's SFTTrainer and GRPOTrainer.

Training stops in a callback, which also saves a checkpoint; `train(resume_from_checkpoint=…)` resumes. What a step trains on is
read from the tokens that reach the model, or, for GRPO, from the prompts that it generates completions for.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
from conformance import ALL, EPOCHS, GLOBAL_BATCH, PLAIN, RANKS, ROWS, SEED, WORKERS, Batch, Setup
from loaders import Rows, plan_for, rows_in
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

GENERATIONS = 2
# Token n + 1 is row n, and 0 is padding.
WORDS = ["[PAD]", *(f"n{row}" for row in range(ROWS)), "[EOS]", "[UNK]"]


class _Stop(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class _Recording:
    """A mixin that records the rows of every optimiser step."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "input_ids" in inputs:
            rows = [row for tokens in inputs["input_ids"].tolist() for row in rows_in(tokens)]
            self.seen.setdefault(self.state.global_step, []).extend(rows)  # type: ignore[attr-defined]
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


class _RecordingPrompts:
    """A mixin that records the prompts of every generation batch."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, *args: Any) -> Any:
        rows = [int(prompt[1:]) for prompt in prompts[::GENERATIONS]]
        self.seen.setdefault(self.state.global_step, []).extend(rows)  # type: ignore[attr-defined]
        return super()._calculate_rewards(inputs, prompts, *args)  # type: ignore[misc]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"pad_token_id": 0, "eos_token_id": ROWS + 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **ids, **size))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] + [0] * (longest - len(example["input_ids"])) for example in examples]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


class _TrainerAdapter:
    supports = PLAIN | WORKERS | {"accumulation"}

    def run(self, setup: Setup, *, stop: int | None = None, state: Any = None) -> tuple[list[Batch], Any]:
        transformers.logging.set_verbosity_error()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            trainer = self.trainer(setup)
            trainer.seen = {}
            trainer.add_callback(_Stop(stop))
            trainer.train(resume_from_checkpoint=state)
        batches = [trainer.seen[step] for step in sorted(trainer.seen)]
        return batches, str(Path(setup.folder) / f"checkpoint-{stop}")

    def trainer(self, setup: Setup) -> Any:
        raise NotImplementedError

    def options(self, setup: Setup) -> dict[str, Any]:
        return {
            "output_dir": str(setup.folder),
            "per_device_train_batch_size": GLOBAL_BATCH // setup.accumulation,
            "gradient_accumulation_steps": setup.accumulation,
            "dataloader_num_workers": setup.workers,
            "num_train_epochs": EPOCHS,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": SEED,
        }


class PlainTrainer(_TrainerAdapter):
    """transformers' Trainer with its default, a shuffle."""

    name = "transformers `Trainer`"
    packages: ClassVar[tuple[str, ...]] = ("transformers", "accelerate")

    def trainer(self, setup: Setup) -> Any:
        cls = type("Recorded", (_Recording, Trainer), {})
        args = TrainingArguments(**self.options(setup), remove_unused_columns=False)
        return cls(model(), args, train_dataset=Rows(), data_collator=pad)


class SparsortTrainer(_TrainerAdapter):
    """CurriculumTrainer with a shuffled plan."""

    name = "`CurriculumTrainer`"
    packages: ClassVar[tuple[str, ...]] = ("sparsort",)
    supports = ALL - RANKS

    def trainer(self, setup: Setup) -> Any:
        from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer

        cls = type("Recorded", (_Recording, CurriculumTrainer), {"__module__": CurriculumTrainer.__module__})
        args = TrainingArguments(**self.options(setup), remove_unused_columns=False)
        collator = None if setup.packing else pad
        return cls(
            model(), args, train_dataset=Rows(), data_collator=collator, curriculum=plan_for(setup), verify=False
        )


class TrlSft(_TrainerAdapter):
    """TRL's SFTTrainer; with packing, its default strategy."""

    name = "TRL `SFTTrainer`"
    packages: ClassVar[tuple[str, ...]] = ("trl", "transformers", "accelerate")
    supports = PLAIN | WORKERS | {"accumulation", "packing"}

    def trainer(self, setup: Setup) -> Any:
        from trl import SFTConfig, SFTTrainer

        data = datasets.Dataset.from_list([{"input_ids": Rows()[row]["input_ids"]} for row in range(ROWS)])
        packed = {"packing": True, "max_length": 8} if setup.packing else {}
        options = self.options(setup) | {"gradient_checkpointing": False}
        cls = type("Recorded", (_Recording, SFTTrainer), {})
        return cls(model(), SFTConfig(**options, **packed), train_dataset=data, processing_class=tokenizer())


class TrlGrpo(_TrainerAdapter):
    """TRL's GRPOTrainer; a batch is the prompts of a generation batch."""

    name = "TRL `GRPOTrainer`"
    packages: ClassVar[tuple[str, ...]] = ("trl", "transformers", "accelerate")
    base: ClassVar[tuple[str, ...]] = ()

    def trainer(self, setup: Setup) -> Any:
        from trl import GRPOConfig, GRPOTrainer

        args = GRPOConfig(
            **self.options(setup) | {"gradient_checkpointing": False},
            num_generations=GENERATIONS,
            max_completion_length=2,
        )
        data = datasets.Dataset.from_list([{"prompt": f"n{row}"} for row in range(ROWS)])
        cls = type("Recorded", (_RecordingPrompts, *self.mixins(), GRPOTrainer), {})
        given = {"args": args, "train_dataset": data, "processing_class": tokenizer(), **self.extra(setup)}
        return cls(model(), reward_funcs=_even, **given)

    def mixins(self) -> tuple[type, ...]:
        return ()

    def extra(self, setup: Setup) -> dict[str, Any]:
        return {}


class SparsortGrpo(TrlGrpo):
    """GRPOTrainer with DifficultySampler, whose draws depend on the rewards."""

    name = "`DifficultySampler` in TRL's GRPOTrainer"
    packages: ClassVar[tuple[str, ...]] = ("sparsort", "trl")

    def mixins(self) -> tuple[type, ...]:
        from sparsort.curriculum.loading.trainer.grpo_difficulty import DifficultyMixin

        return (DifficultyMixin,)

    def extra(self, setup: Setup) -> dict[str, Any]:
        from sparsort.curriculum.loading.online.difficulty_sampler import DifficultySampler

        # Two workers with two batches each, so that a resume with another number of workers draws the same.
        return {"difficulty": DifficultySampler(list(range(ROWS)), seed=SEED, lag=5)}


def _even(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completions]
