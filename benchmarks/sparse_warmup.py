"""What an index branch learns on a real model: attention mass and block recall before and after its warm-up.

    python benchmarks/sparse_warmup.py [--quick] [--save]

The model is the embedded Gemma 3 270M, frozen; the text is the Python language reference that ships with Python (pydoc's
topics), cut in training and held-out parts. The warm-up is MSA's (arXiv 2606.13392): the KL to the dense attention over every
visible block, of the three full-attention layers. The frozen model's states are made once and learnt from several times.
Held-out sequences are longer than those of training; every selector chooses a quarter of the keys there, from the same dense
pass, so that the oracle's line is the most that any selection of such blocks can hold. Only queries that had to choose count.
About twenty minutes on one core, and 6 GiB; --quick in half a minute.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from common import RESULTS, Report, add_output_options

import sparsort
from sparsort.attention.config import SelectorKind
from sparsort.attention.diagnostics import report_selection
from sparsort.attention.selectors.interface import Choice, LayerInputs
from sparsort.attention.selectors.making import make_selector
from sparsort.curriculum.ablation.resampling import student_t
from sparsort.files import write_json
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.ops import attend
from sparsort.progress import progress
from sparsort.scoring.loading import load_model

RIVALS: tuple[SelectorKind, ...] = ("oracle", "moba", "sink_window", "window", "random")
BLOCK, INDEX = 16, 64
FLOOR = 0.90


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args(options)
    quick = arguments.quick
    tokens, sequences, epochs = (512, 6, 4) if quick else (2048, 24, 12)
    held_tokens, held = (1024, 2) if quick else (8192, 4)
    loaded = load_model("demo", dtype="float32", device="cpu")
    model: Any = loaded.model.eval().requires_grad_(False)
    sparsort.attach_index_branch(model, block_size=BLOCK, blocks=2, index_dim=INDEX)
    model.sparse_attention.mode = "full"
    training, testing = texts(loaded.tokenizer, tokens, sequences, held_tokens, held)
    with progress("dense passes for training", sequences) as advance:
        seen = [_passed(dense_pass(model, ids), advance) for ids in training]
    with progress("held-out dense passes", held) as advance:
        unseen = [_passed(dense_pass(model, ids), advance) for ids in testing]
    budget = FixedBudget(blocks=held_tokens // 4 // BLOCK)
    before = [measure(inputs, budget) for inputs in unseen]
    curve = warm_up(seen, epochs)
    after = [measure(inputs, budget) for inputs in unseen]
    rivals: dict[str, list[Any]] = {name: [measure(inputs, budget, name) for inputs in unseen] for name in RIVALS}

    report = Report("sparse_warmup", torch.device("cpu"))
    found: dict[str, list[Any]] = {"index branch, before": before, "index branch": after, **rivals}
    for name, measured in found.items():
        for what in ("mass", "recall"):
            values = np.array([[float(np.mean([layer[what] for layer in sequence.values()]))] for sequence in measured])
            low, high = (float(edge[0]) for edge in student_t(values)[:2])
            judged = FLOOR if (name, what) == ("index branch", "mass") and not quick else None
            note = f"95 % interval over {held} held-out sequences [{low:.3f}, {high:.3f}]"
            report.add(f"{what}, {name}", float(values.mean()), "share", floor=judged, note=note)
    report.add("KL at the start", curve[0], "nats")
    report.add("KL at the end", curve[-1], "nats")
    if arguments.save and not quick:
        detail = {name: [{str(k): v for k, v in sequence.items()} for sequence in all_] for name, all_ in found.items()}
        write_json(RESULTS / "sparse-warmup-layers.json", {"kl_by_epoch": curve, "by_sequence_and_layer": detail})
    report.finish(arguments)
    return 0


def texts(tokenizer: Any, tokens: int, sequences: int, held_tokens: int, held: int) -> tuple[list[Any], list[Any]]:
    """Token ids (1, T) of training and of held-out sequences; held-out text comes from the last fifth of the topics."""
    names = sorted(topics)
    cut = len(names) * 4 // 5
    rows = []
    for part, length, count in ((names[:cut], tokens, sequences), (names[cut:], held_tokens, held)):
        ids = tokenizer("\n\n".join(topics[name] for name in part), add_special_tokens=False)["input_ids"]
        begins = np.linspace(0, len(ids) - length, count).astype(int)
        rows.append([torch.tensor([[tokenizer.bos_token_id, *ids[b : b + length - 1]]]) for b in begins])
    return rows[0], rows[1]


@torch.no_grad()
def dense_pass(model: Any, ids: Any) -> dict[int, LayerInputs]:
    """What each sparse layer sees when every block is attended to."""
    seen: dict[int, LayerInputs] = {}

    def keep(layer: int, inputs: LayerInputs, choice: Choice) -> None:
        seen[layer] = inputs

    model.sparse_attention.observers.append(keep)
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        model.sparse_attention.observers.remove(keep)
    return seen


def _passed(found: Any, advance: Any) -> Any:
    advance(1)
    return found


def warm_up(seen: list[dict[int, LayerInputs]], epochs: int) -> list[float]:
    """Teach the index branches by the KL over every block; returns its mean over layers in each epoch."""
    branches: dict[int, Any] = {layer: inputs.module.index_branch for layer, inputs in seen[0].items()}
    weights = [weight.requires_grad_() for branch in branches.values() for weight in branch.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    steps = epochs * len(seen)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 10, (steps - step) / (0.3 * steps))
    )
    generator, curve = np.random.default_rng(0), []
    with progress("warm-up", steps) as advance:
        for _ in range(epochs):
            losses = []
            for number in generator.permutation(len(seen)):
                total = torch.zeros(())
                for layer, inputs in seen[number].items():
                    branch, inputs = branches[layer], replace(inputs, full=True)
                    keys = branch.index_keys(inputs.module, inputs.hidden, inputs.rotary)
                    choice = branch.choose(inputs, keys)
                    with torch.no_grad():
                        _, lse = attend(
                            inputs.query, inputs.key, inputs.value, choice.selection, inputs.layout, scale=inputs.scale
                        )
                    total = total + branch.loss(inputs, keys, choice, lse)
                optimiser.zero_grad()
                total.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                rates.step()
                losses.append(total.item() / len(branches))
                advance(1)
            curve.append(float(np.mean(losses)))
            print(f"KL {curve[-1]:.4f}", file=sys.stderr)
    return curve


@torch.no_grad()
def measure(
    seen: dict[int, LayerInputs], budget: FixedBudget, selector: SelectorKind | None = None
) -> dict[int, dict[str, float]]:
    """Mass and recall of each layer's selection: of its index branch, or of another selector."""
    found = {}
    for layer, inputs in seen.items():
        branch: Any = inputs.module.index_branch
        if selector is not None:
            config = sparsort.SparseAttentionConfig(selector=selector, block_size=BLOCK, blocks=budget.blocks)
            branch = make_selector(module=inputs.module, config=config)
        inputs = replace(inputs, full=False, budget=budget)
        choice = branch.choose(inputs, branch.index_keys(inputs.module, inputs.hidden, inputs.rotary))
        measured = report_selection(
            inputs.query, inputs.key, choice.selection, inputs.layout, scale=inputs.scale, sample=256
        )
        found[layer] = {"mass": measured.mass, "recall": measured.recall}
    return found


if __name__ == "__main__":
    sys.exit(main())
