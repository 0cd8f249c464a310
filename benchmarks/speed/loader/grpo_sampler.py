"""The time that a curriculum adds to a step of GRPO: our loader, compared with TRL's RepeatSampler and its loader.

    python benchmarks/speed/loader/grpo_sampler.py [--quick] [--json] [--save]

Both load the same generation batches (4 prompts × 8 generations, for 4 micro-batches) of 100,000 prompts. "sampler" is the time
that it takes to determine the rows of a micro-batch: for TRL its sampler, as PyTorch batches it and accelerate shards it; for us
the plan. "loader" adds reading and collating the rows, as in the trainer.

A step is one of the real GRPOTrainer, with a model of 27,000 weights that completes each prompt with 8 tokens. No real model
takes a shorter step, so the shares are upper bounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import BatchSampler, DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Report, add_output_options, compare

from sparsort.curriculum.loading.loader.fetching import Part
from sparsort.curriculum.loading.loader.groups import GroupedPart, Groups
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum

GROUPS = Groups(prompts=4, num_generations=8, repeats=4)
ROWS = GROUPS.prompts * GROUPS.num_generations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args()
    n, rounds = (10_000, 5) if arguments.quick else (100_000, 15)
    plan = plan_curriculum(np.random.default_rng(0).random(n), batch_size=GROUPS.prompts, stages=4)
    data = Dataset.from_dict({"prompt": [f"prompt {row}" for row in range(n)]})
    report = Report("grpo_sampler", torch.device("cpu"))
    step = step_seconds(5 if arguments.quick else 40)
    report.add("step", step * 1e3, "ms", better="lower", note="smallest model, 4 micro-batches")
    part = GroupedPart(rank=0, world_size=1, micro_batches=GROUPS.repeats, groups=GROUPS)
    # A plan keeps rows that it has computed, so every round measures another epoch.
    epochs = count()
    pairs: dict[str, tuple[Callable[[], Iterator[Any]], Callable[[], Iterator[Any]]]] = {
        "sampler": (lambda: trl_rows(n), lambda: our_rows(plan, part, next(epochs))),
        "loader": (lambda: trl_loader(data), lambda: our_loader(plan, data)),
    }
    for name, (trl, ours) in pairs.items():
        # A whole epoch, so that permuting it is shared among all micro-batches. Reading the rows takes longer, but equally long
        # for all of them.
        taken = n // GROUPS.prompts * GROUPS.repeats if name == "sampler" else 400
        found = compare(lambda: drain(trl(), taken), lambda: drain(ours(), taken), rounds)  # noqa: B023
        theirs, mine = found.baseline_s / taken, found.ours_s / taken
        report.add(f"{name}, TRL", theirs * 1e6, "µs/micro-batch", better="lower")
        report.add(f"{name}, sparsort", mine * 1e6, "µs/micro-batch", better="lower")
        share = 100 * GROUPS.repeats * (mine - theirs) / step
        report.add(f"{name}, added", share, "% of a step", floor=1, better="lower")
    report.finish(arguments)


def drain(batches: Iterator[Any], number: int) -> None:
    for _ in islice(batches, number):
        pass


def trl_rows(n: int) -> Iterator[list[int]]:
    return iter(BatchSamplerShard(BatchSampler(trl_sampler(range(n)), ROWS, drop_last=False), 1, 0))


def our_rows(plan: CurriculumPlan, part: Part, epoch: int) -> Iterator[list[int]]:
    for number in range(plan.n_batches):
        for micro in range(GROUPS.repeats):
            yield part.rows(plan, number, epoch, micro).tolist()


def trl_loader(data: Dataset) -> Iterator[Any]:
    loader = DataLoader(data, batch_size=ROWS, sampler=trl_sampler(data), collate_fn=list)
    return iter(Accelerator(cpu=True).prepare(loader))


def our_loader(plan: CurriculumPlan, data: Dataset) -> Iterator[Any]:
    return iter(CurriculumLoader(plan, data, groups=GROUPS, collate_fn=list, verify=False))


def trl_sampler(data: Any) -> RepeatSampler:
    return RepeatSampler(
        data,
        mini_repeat_count=GROUPS.num_generations,
        batch_size=GROUPS.prompts,
        repeat_count=GROUPS.repeats,
        seed=0,
    )


class Timed(TrainerCallback):  # type: ignore[misc]
    """Measures every optimiser step, from its first micro-batch to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._clock)


def step_seconds(steps: int) -> float:
    """Median time of an optimiser step of GRPO with TRL's own loader, without the first, which warms up."""
    words = ["[UNK]", "[PAD]", "[EOS]", *map(str, range(253))]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    timed = Timed()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"per_device_train_batch_size": ROWS // GROUPS.repeats, "max_completion_length": 8}
        options |= {"num_generations": GROUPS.num_generations, "gradient_accumulation_steps": GROUPS.repeats}
        options |= {"max_steps": steps + 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        trainer = GRPOTrainer(
            LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=1, eos_token_id=2, **size)),
            reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
            args=GRPOConfig(folder, use_cpu=True, bf16=False, logging_strategy="no", **options),
            train_dataset=Dataset.from_dict({"prompt": [f"prompt {row}" for row in range(1_000)]}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", padding_side="left"
            ),
            callbacks=[timed],
        )
        trainer.train()
    return statistics.median(timed.seconds[1:])


if __name__ == "__main__":
    main()
