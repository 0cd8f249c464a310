"""A curriculum in a plain PyTorch loop, stopped and resumed: both runs train on the same batches.

    python examples/curriculum_pytorch.py

Questions with few reasoning steps come first. The model is a tiny Llama with random weights, so this takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.planning import plan_curriculum

LENGTH = 64
ROWS = [json.loads(line) for line in (Path(__file__).parent / "graded.jsonl").read_text(encoding="utf-8").splitlines()]
PLAN = plan_curriculum([row["steps"] for row in ROWS], data=ROWS, batch_size=16, stages=6)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Use bytes as tokens and pad with 0, which the loss ignores."""
    texts = [f"{row['question']} {row['answer']}".encode()[:LENGTH].ljust(LENGTH, b"\0") for row in rows]
    tokens = torch.tensor([list(text) for text in texts])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": tokens.where(tokens > 0, -100)}


def main() -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = CurriculumLoader(PLAN, ROWS, collate_fn=collate)
    seen, saved = [], {}

    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loader.rows.tolist())
        print(f"batch {loader.batch:2d}  stage {loader.stage}  share {loader.share:.2f}  loss {loss.item():.3f}")
        if loader.batch == 6:  # save this with the weights; it is JSON of a few hundred bytes
            saved = json.dumps(loader.state_dict())

    again = CurriculumLoader(PLAN, ROWS, collate_fn=collate, num_workers=2)
    again.load_state_dict(json.loads(saved))
    rest = [again.rows.tolist() for _ in again]
    print(f"resumed after 6 of {len(seen)}: {'the same batches' if rest == seen[6:] else 'NOT THE SAME'}")


if __name__ == "__main__":
    main()
