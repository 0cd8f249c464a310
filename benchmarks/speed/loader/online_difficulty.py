"""The cost of online difficulty for a training step: steps with and without it, timed alternately in one run.

    python benchmarks/speed/loader/online_difficulty.py [--quick] [--json] [--save]

A step is forward, backward and AdamW over a small Llama (4 layers, width 256, batch 16 × 128 tokens). Two equal models train in
turn, one of them with `OnlineCurriculum`; `ratio` is the median of seconds with it over seconds without it. The noise of a shared
machine exceeds the cost, so the parts are also timed alone: choosing and measuring tokens in the hooks of every pass, and, once
per stage, copying the values to the host, folding them and revising the plan. `parts_over_step` is 1 + a step's share of these
parts over the time of a step without them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Report, add_output_options, compare, wall_seconds

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.online.online_curriculum import OnlineCurriculum
from sparsort.curriculum.loading.plan.planning import plan_curriculum

FLOOR = 1.01
ROWS, BATCH, TOKENS = 4096, 16, 128
STEPS_A_STAGE = 100


class _Training:
    """A model, its optimiser, and one batch that is used for every step."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=4096
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = LlamaForCausalLM(config).train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (BATCH, TOKENS), generator=generator)
        self.batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        plan = plan_curriculum(
            np.random.default_rng(0).random(ROWS),
            mode="pool",
            pacing="linear:start=0.2",
            steps=10 * STEPS_A_STAGE,
            stages=10,
            batch_size=BATCH,
        )
        self.loader = CurriculumLoader(plan, range(ROWS), verify=False)

        self._batches = iter(self.loader)

    def step(self) -> None:
        next(self._batches)
        self.model(**self.batch).loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Time a training step with and without online difficulty.

    Returns:
        `ratio` and `note`: seconds with over seconds without, median over rounds, and its range in words;
        `parts_over_step`: 1 + the parts of a step over a step; `step_ms` without them; `observe_ms` per step (hooks, tokens,
        metric) and `stage_ms` per stage of `STEPS_A_STAGE` steps (copy to the host, fold, new plan).
    """
    plain, observed = _Training(), _Training()
    with OnlineCurriculum(observed.model, observed.loader):
        found = compare(observed.step, plain.step, 20 if quick else 150)
    observe_s, stage_s = _parts(plain, 50 if quick else 200)
    parts = 1 + (observe_s + stage_s / STEPS_A_STAGE) / found.ours_s
    return {
        "ratio": found.ratio,
        "note": f"{found.lowest_ratio:.3f} to {found.highest_ratio:.3f} a round; the parts alone: {parts:.4f}",
        "parts_over_step": parts,
        "step_ms": 1e3 * found.ours_s,
        "observe_ms": 1e3 * observe_s,
        "stage_ms": 1e3 * stage_s,
    }


def _parts(training: _Training, repeats: int) -> tuple[float, float]:
    """Median seconds of observing one pass whose states already exist, and of the end of a stage."""
    model, loader = training.model, training.loader
    head = model.get_output_embeddings()
    states_BTH = torch.randn((BATCH, TOKENS, 256), generator=torch.Generator().manual_seed(0))
    edges = []
    with OnlineCurriculum(model, loader) as online:

        def observe() -> None:
            # The arguments of the hooks in a pass, in order.
            online._before(model, ())
            online.online._on_model(model, (), training.batch)
            online.online._on_head(head, (states_BTH,))
            online._measured = None
            online._after(model, (), None)

        observe()
        observed = [wall_seconds(observe) for _ in range(repeats)]
        online.online.drain()
        for number in range(5):
            for _ in range(STEPS_A_STAGE):
                observe()

            def edge(step: int = number + 1) -> None:
                online._fold(step)
                loader.plan.revised(online.running.difficulty(step), start=step)

            # The loader does not advance here, so the observations get the step that they would have had.
            online.online._steps = [np.full_like(steps, number) for steps in online.online._steps]
            edges.append(wall_seconds(edge))
    return statistics.median(observed), statistics.median(edges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args()
    found = measure(quick=arguments.quick)
    report = Report("online-difficulty", torch.device("cpu"))
    report.add("step_ratio", found["ratio"], "x", floor=FLOOR, better="lower", note=found["note"])
    report.add("parts_over_step", found["parts_over_step"], "x", floor=FLOOR, better="lower")
    report.add("step", found["step_ms"], "ms", better="lower", note="without")
    report.add("observe", found["observe_ms"], "ms", better="lower", note="hooks, tokens, metric; each step")
    report.add(
        "stage", found["stage_ms"], "ms", better="lower", note=f"read back, fold, plan; each {STEPS_A_STAGE} steps"
    )
    report.finish(arguments)


if __name__ == "__main__":
    main()
