"""A curriculum in transformers' Trainer, stopped and resumed: both runs have the same losses.

    python examples/curriculum_trainer.py

Questions with few reasoning steps come first. The model is a tiny Llama with random weights, so this takes seconds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer

LENGTH = 64
ROWS = [json.loads(line) for line in (Path(__file__).parent / "graded.jsonl").read_text(encoding="utf-8").splitlines()]
PLAN = plan_curriculum([row["steps"] for row in ROWS], data=ROWS, batch_size=16, stages=6)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Use bytes as tokens and pad with 0, which the loss ignores."""
    texts = [f"{row['question']} {row['answer']}".encode()[:LENGTH].ljust(LENGTH, b"\0") for row in rows]
    tokens = torch.tensor([list(text) for text in texts])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": tokens.where(tokens > 0, -100)}


class Watched(CurriculumTrainer):
    losses: tuple[float, ...] = ()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.losses += (float(loss := super().training_step(*args, **kwargs)),)
        return loss


def trainer(folder: str) -> Watched:
    set_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=1e-2,
        save_steps=6, logging_steps=6, report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
    return Watched(model, arguments, curriculum=PLAN, train_dataset=ROWS, data_collator=collate)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = trainer(folder), trainer(folder)
        whole.train()
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-6")
    same = whole.losses[12:] == resumed.losses
    print(
        f"resumed after 6 of {whole.state.max_steps} steps: {'the same batches and losses' if same else 'NOT THE SAME'}"
    )
