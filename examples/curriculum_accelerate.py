"""A curriculum in an accelerate loop, on any number of processes, stopped and resumed with `save_state`.

    torchrun --nproc-per-node 2 examples/curriculum_accelerate.py

With GPUs, `accelerate launch` does the same. With `--cpu` and without MPI it starts one process, whatever `--num_processes` is.
The loader is not passed to `accelerator.prepare`, which would divide its batches again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.planning import plan_curriculum

FOLDER = "out/curriculum_accelerate"
LENGTH = 64
ROWS = [json.loads(line) for line in (Path(__file__).parent / "graded.jsonl").read_text(encoding="utf-8").splitlines()]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Use bytes as tokens and pad with 0, which the loss ignores."""
    texts = [f"{row['question']} {row['answer']}".encode()[:LENGTH].ljust(LENGTH, b"\0") for row in rows]
    tokens = torch.tensor([list(text) for text in texts])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": tokens.where(tokens > 0, -100)}


def train(*, resume: bool) -> list[Any]:
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    plan = plan_curriculum([row["steps"] for row in ROWS], data=ROWS, batch_size=16, stages=6)
    loader = CurriculumLoader(plan, ROWS, collate_fn=collate, rank=None, world_size=None, micro_batches=2)
    accelerator.register_for_checkpointing(loader)
    if resume:
        accelerator.load_state(FOLDER)
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**{name: value.to(accelerator.device) for name, value in batch.items()}).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        seen.append((loader.rows.tolist(), loss.item()))
        if len(seen) == 12 and not resume:  # six steps of two micro-batches
            accelerator.save_state(FOLDER)
    return seen


if __name__ == "__main__":
    whole, resumed = train(resume=False), train(resume=True)
    print("resumed after 6 steps:", "the same batches and losses" if whole[12:] == resumed else "NOT THE SAME")
