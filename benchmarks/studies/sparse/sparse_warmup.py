"""An index branch on a real model: attention mass and block recall before and after its warm-up.

    python benchmarks/studies/sparse/sparse_warmup.py [--quick] [--save]

The model is the embedded Gemma 3 270M, frozen. The text ships with Python: the language reference (pydoc's topics) and the
docstrings of the standard library; each document is either for training or held out. The warm-up is MSA's (arXiv 2606.13392): the
KL to the dense attention over every visible block, in the three full-attention layers. Index branches of two widths are trained,
the width of the heads, which is the default, and a quarter of it, at a learning rate that was chosen for the wider one on the
language reference. The frozen model's states are computed once and used in several epochs. Held-out sequences do not overlap and
are four times as long as those of training. Every selector chooses a quarter of the keys there, from the same dense pass, so the
oracle is the upper bound for any selection of such blocks. Only queries that had to choose count. A run takes about half an hour
on one core and 7 GiB; --quick takes a minute.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import RESULTS, Report, add_output_options, interval

import sparsort
from sparsort.attention.attach import make_selector
from sparsort.attention.diagnostics import report_selection
from sparsort.attention.selectors import SelectorKind
from sparsort.attention.selectors.base import BlockChoice, LayerInputs
from sparsort.curriculum.ablation.statistics.resampling import student_t
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.ops import attend
from sparsort.scoring.loading.load import load_model
from sparsort.storage.files import write_json
from sparsort.terminal.progress import progress

RIVALS: tuple[SelectorKind, ...] = ("oracle", "moba", "sink_window", "window", "random")
BLOCK = 16
# The width of the heads, and a quarter of it.
WIDTHS = (256, 64)
FLOOR = 0.90


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser)
    arguments = parser.parse_args(options)
    quick = arguments.quick
    tokens, sequences, epochs = (512, 6, 4) if quick else (2048, 48, 6)
    held_tokens, held = (1024, 2) if quick else (8192, 5)
    loaded = load_model("demo", dtype="float32", device="cpu")
    # Only the index branches are trained.
    model: Any = loaded.model.eval().requires_grad_(False)
    training, testing = texts(loaded.tokenizer, tokens, sequences, held_tokens, held)
    sparsort.attach_index_branch(model, block_size=BLOCK, blocks=2, index_dim=WIDTHS[0])
    model.sparse_attention.mode = "full"
    with progress("dense passes for training", sequences) as advance:
        seen = [_passed(dense_pass(model, ids), advance) for ids in training]
    with progress("held-out dense passes", held) as advance:
        unseen = [_passed(dense_pass(model, ids), advance) for ids in testing]
    # A quarter of the keys.
    budget = FixedBudget(blocks=held_tokens // 4 // BLOCK)
    found: dict[str, list[Any]] = {}
    curves = {}
    for width in WIDTHS:
        if width != WIDTHS[0]:
            model = load_model("demo", dtype="float32", device="cpu").model.eval().requires_grad_(False)
            sparsort.attach_index_branch(model, block_size=BLOCK, blocks=2, index_dim=width)
            # The states do not depend on the index branch, so the second width reuses those of the first.
            seen, unseen = ([in_model(inputs, model) for inputs in kept] for kept in (seen, unseen))
        name = f"index branch of width {width}"
        found[f"{name}, before"] = [measure(inputs, budget) for inputs in unseen]
        curves[width] = warm_up(seen, epochs)
        found[name] = [measure(inputs, budget) for inputs in unseen]
    for rival in RIVALS:
        found[rival] = [measure(inputs, budget, rival) for inputs in unseen]

    report = Report("sparse_warmup", torch.device("cpu"))
    for name, measured in found.items():
        for what in ("mass", "recall"):
            values = np.array([[float(np.mean([layer[what] for layer in sequence.values()]))] for sequence in measured])
            low, high = (float(edge[0]) for edge in student_t(values)[:2])
            judged = FLOOR if (name, what) == (f"index branch of width {WIDTHS[0]}", "mass") and not quick else None
            note = f"95 % interval over {held} held-out sequences {interval(low, high, '{:.3f}'.format)}"
            report.add(f"{what}, {name}", float(values.mean()), "share", floor=judged, note=note)
    for width, curve in curves.items():
        report.add(f"KL in the first epoch, width {width}", curve[0], "nats")
        report.add(f"KL in the last epoch, width {width}", curve[-1], "nats")
    if arguments.save and not quick:
        detail = {name: [{str(k): v for k, v in sequence.items()} for sequence in all_] for name, all_ in found.items()}
        write_json(RESULTS / "sparse-warmup-layers.json", {"kl_by_epoch": curves, "by_sequence_and_layer": detail})
    report.finish(arguments)
    return 0


def texts(tokenizer: Any, tokens: int, sequences: int, held_tokens: int, held: int) -> tuple[list[Any], list[Any]]:
    """Token ids (1, T) of training and of held-out sequences; every fifth document is held out."""
    documents = list(_documents())
    # Whole documents are held out, so that no held-out text was seen in training.
    parts = ([d for n, d in enumerate(documents) if n % 5], documents[::5])
    rows = []
    for part, length, count in zip(parts, (tokens, held_tokens), (sequences, held), strict=True):
        ids = tokenizer("\n\n".join(part), add_special_tokens=False)["input_ids"]
        if len(ids) < count * length:
            raise SystemExit(
                f"this Python ships {len(ids)} tokens of text where {count * length} are needed: use CPython 3.11."
            )
        # Sequences are spread evenly over the text.
        begins = np.linspace(0, len(ids) - length, count).astype(int)
        rows.append([torch.tensor([[tokenizer.bos_token_id, *ids[b : b + length - 1]]]) for b in begins])
    return rows[0], rows[1]


def _documents() -> Iterator[str]:
    """The topics of the language reference, and the docstrings of each module of the standard library."""
    yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        if path.parent.name not in ("test", "site-packages", "idlelib", "lib2to3", "pydoc_data"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            named = (ast.Module, ast.ClassDef, ast.FunctionDef)
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, named)]
            if text := "\n\n".join(part for part in found if part):
                yield text


def in_model(seen: dict[int, LayerInputs], model: Any) -> dict[int, LayerInputs]:
    """The same states with the attention modules of another model, which has another index branch."""
    modules = {module.layer_idx: module for module in model.modules() if hasattr(module, "index_branch")}
    return {layer: replace(inputs, module=modules[layer]) for layer, inputs in seen.items()}


@torch.no_grad()
def dense_pass(model: Any, ids: Any) -> dict[int, LayerInputs]:
    """The inputs of each sparse layer when every block is attended to."""
    seen: dict[int, LayerInputs] = {}

    def keep(layer: int, inputs: LayerInputs, choice: BlockChoice) -> None:
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
    """Train the index branches by the KL over every block, and return its mean over layers in each epoch."""
    branches: dict[int, Any] = {layer: inputs.module.index_branch for layer, inputs in seen[0].items()}
    weights = [weight.requires_grad_() for branch in branches.values() for weight in branch.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.01, betas=(0.9, 0.98))
    steps = epochs * len(seen)
    rates = torch.optim.lr_scheduler.LambdaLR(
        # 20 steps of warm-up, and a linear decay over the last 30 %.
        optimiser,
        lambda step: min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps)),
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
                        # The teacher, whose log-sum-exp normalises the dense attention. It
                        # gets no gradient.
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
    """Mass and recall of the selection of each layer's index branch, or of another selector."""
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
