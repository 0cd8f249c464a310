"""Tiny GRPO and RLOO trainers with a curriculum, for tests; as a program, a rank of a run that is resumed from every checkpoint.

`accelerate launch grpo_runs.py FOLDER` trains, resumes from each checkpoint, and writes what every run did to
FOLDER/rank-<rank>.json: the run that was never stopped under "0", the others under the step of their checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.trainer import CurriculumMixin

N = 10
WORDS = ["[UNK]", "[PAD]", "[EOS]", *(f"n{place}" for place in range(N))]


class Recorded:
    """Writes down the rows that are generated for, and what every micro-batch trains on."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        rows = [int(row["prompt"][1:]) for row in inputs]
        self.__dict__.setdefault("generated", []).append((self._step, rows))  # type: ignore[attr-defined]
        return super()._generate_and_score_completions(inputs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.__dict__.setdefault("losses", []).append(float(loss).hex())
        return loss


class Grpo(Recorded, CurriculumMixin, GRPOTrainer):  # type: ignore[misc]
    pass


class PlainGrpo(Recorded, GRPOTrainer):  # type: ignore[misc]
    """TRL's own trainer, without a curriculum."""


class Rloo(Recorded, CurriculumMixin, RLOOTrainer):  # type: ignore[misc]
    pass


def _rows(n: int = N) -> list[dict[str, str]]:
    return [{"prompt": f"n{place}"} for place in range(n)]


def make_plan(n: int = N, **options: Any) -> CurriculumPlan:
    difficulty = np.random.default_rng(0).permutation(n)
    return plan_curriculum(difficulty, data=_rows(n), **{"batch_size": 4, "seed": 1, **options})


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def make_trainer(
    folder: Path, plan: CurriculumPlan | None, cls: Any = Grpo, *, n: int = N, lora: Any = None, **options: Any
) -> Any:
    """A trainer over the first n prompts; `options` are those of its configuration, and `lora` is one of PEFT."""
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", padding_side="left"
    )
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=1, eos_token_id=2, **size))
    defaults = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 3, "save_steps": 1}
    defaults |= {"num_train_epochs": 2, "learning_rate": 0.01, "steps_per_generation": 4}
    quiet = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    config = RLOOConfig if cls is Rloo else GRPOConfig
    if cls is Rloo:
        # RLOO loads its reference model by name.
        model.save_pretrained(folder / "model")
        model = str(folder / "model")
    return cls(
        model,
        reward_funcs=_reward,
        args=config(str(folder), **{**defaults, **quiet, **options}),
        train_dataset=datasets.Dataset.from_list(_rows(n)),
        processing_class=tokenizer,
        peft_config=lora,
        **({} if plan is None else {"curriculum": plan}),
    )


def _run_every_checkpoint(folder: Path) -> None:
    plan, runs = make_plan(), {}
    # Two ranks, each with two rows of two slices: two optimiser steps for each generation batch.
    options = {"steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 2}
    for step in range(12):
        checkpoint = str(folder / "whole" / f"checkpoint-{step}") if step else None
        name, strategy = ("again", "no") if step else ("whole", "steps")
        trainer = make_trainer(folder / name, plan, save_strategy=strategy, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs[step] = {"generated": trainer.__dict__.get("generated", []), "losses": trainer.losses}
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    _run_every_checkpoint(Path(sys.argv[1]))
