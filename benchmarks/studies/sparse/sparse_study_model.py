"""One run of the sparse-attention study, from the initial weights to the last held-out loss.

Contract: a run is determined by the study, its kind of attention, its order and its seed. Runs of a seed have the same initial
weights and the same held-out rows, whatever their attention. The held-out measures are always those of sparse attention, even
while the selector still warms up over every block.

Shapes: B rows per batch, T words, N held-out rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from studies.recall_task import drawn
from torch import Tensor
from torch.nn.functional import cross_entropy

import sparsort
from sparsort.attention.diagnostics import report_selection
from sparsort.attention.selectors.base import BlockChoice, LayerInputs
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.plan import CurriculumPlan

IGNORED = -100
PAD, UNKNOWN = "<pad>", "<unk>"
# Held-out rows per forward pass.
EVALUATED = 50


@dataclass(frozen=True, kw_only=True)
class Study:
    """The fields of the recipe: models, orders, seeds and lengths of training. `sparse_study` checks them."""

    attentions: tuple[str, ...]
    orders: tuple[str, ...]
    seeds: int
    rows: int
    held_out: int
    length: int
    block_size: int
    blocks: int
    index_dim: int
    full_steps: int
    steps: int
    batch_size: int
    evaluate_every: int
    learning_rate: float
    warm_up: int
    decay: float
    weight_decay: float
    answer_weight: float
    pacing: str
    stages: int
    reference_steps: int
    hidden: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    intermediate: int

    @property
    def reach(self) -> int:
        """Words at this distance or farther cannot reach a word through windows of `blocks` blocks, one per layer."""
        return (self.layers * (self.blocks - 1) + 1) * self.block_size


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows as tensors (B, T): `is_answer` marks the answers, `is_far` those that no stack of local windows can recall."""

    ids: Tensor
    labels: Tensor
    is_answer: Tensor
    is_far: Tensor


def make_tokenizer(rows: Sequence[dict[str, Any]]) -> Any:
    """A tokenizer with one token per word of these rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, UNKNOWN, *sorted({word for row in rows for word in row["text"].split(" ")})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN)


def make_model(study: Study, words: int, seed: int) -> Any:
    """A small Qwen3 with weights drawn from the seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=words,
        hidden_size=study.hidden,
        intermediate_size=study.intermediate,
        num_hidden_layers=study.layers,
        num_attention_heads=study.heads,
        num_key_value_heads=study.groups,
        head_dim=study.head_dim,
        max_position_embeddings=study.length,
        tie_word_embeddings=True,
        # The usual 0.02 suits wider models.
        initializer_range=0.64 / study.hidden**0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).train()


def collator(study: Study, tokenizer: Any) -> Any:
    """Rows → `Batch`. Every row has the same length, so nothing is padded."""

    def collate(rows: Sequence[dict[str, Any]]) -> Batch:
        ids = torch.tensor(tokenizer([row["text"] for row in rows])["input_ids"])
        labels = ids.clone()
        is_answer, is_far = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for number, row in enumerate(rows):
            # Random words have no loss, because no model could predict them.
            labels[number, torch.tensor(drawn(row["text"].split(" "), row["answers"]))] = IGNORED
            is_answer[number, row["answers"]] = True
            # The name, one word before the answer, is the query, so the distance is measured from the name.
            reached = [a - 1 - f >= study.reach for a, f in zip(row["answers"], row["facts"], strict=True)]
            is_far[number, torch.tensor(row["answers"])[torch.tensor(reached)]] = True
        return Batch(ids=ids, labels=labels, is_answer=is_answer, is_far=is_far)

    return collate


def train(
    study: Study,
    model: Any,
    attention: str,
    plan: CurriculumPlan,
    rows: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]],
    tokenizer: Any,
    seed: int,
    *,
    steps: int | None = None,
    frozen: bool = False,
) -> dict[str, Any]:
    """Train `model` in place and measure it at every `evaluate_every`-th step.

    Args:
        attention: "dense" or the name of a selector.
        steps: number of steps, by default the study's.
        frozen: whether to train only the selector.
    """
    began = time.process_time()
    steps = study.steps if steps is None else steps
    if attention != "dense":
        _attach(study, model, attention, seed)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or ".index_branch." in name)
    # A window has no warm-up: it could not use what it would learn over every block.
    full_steps = 0 if attention in ("dense", "window") else study.full_steps
    optimiser, rates = _optimiser(study, model, steps)
    collate = collator(study, tokenizer)
    loader = CurriculumLoader(plan, rows, collate_fn=collate, verify=False)
    held = [collate(held_out[begin : begin + EVALUATED]) for begin in range(0, len(held_out), EVALUATED)]
    levels = np.array([row["level"] for row in held_out])
    curve = [measure(model, held, levels)]
    for step, batch in enumerate(_endless(loader), 1):
        if attention != "dense":
            model.sparse_attention.mode = "full" if step <= full_steps else "sparse"
        outputs = model(input_ids=batch.ids, labels=batch.labels, use_cache=False)
        # Logits at position t predict the token at t + 1. The few answers have a further loss, so that recall is learned within
        # the steps of the study.
        answers = batch.is_answer[:, 1:]
        recall = cross_entropy(outputs.logits[:, :-1][answers], batch.ids[:, 1:][answers])
        optimiser.zero_grad()
        (outputs.loss + study.answer_weight * recall).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
        if step % study.evaluate_every == 0:
            curve.append(measure(model, held, levels))
        if step == steps:
            break
    return {
        "steps": list(range(0, steps + 1, study.evaluate_every)),
        "curve": {name: [point[name] for point in curve] for name in curve[0]},
        "caught": caught(model, held[0]) if attention != "dense" else {},
        "plan": plan.fingerprint,
        "seconds": time.process_time() - began,
    }


def _attach(study: Study, model: Any, selector: str, seed: int) -> None:
    """Make the attention of `model` sparse with the study's sizes."""
    indexed = selector in ("index_branch", "seer", "lm_trained")
    sparsort.attach_index_branch(
        model,
        selector=selector,
        block_size=study.block_size,
        blocks=study.blocks,
        **({"index_dim": study.index_dim} if indexed else {}),
        seed=seed,
    )


def _optimiser(study: Study, model: Any, steps: int) -> tuple[Any, Any]:
    """AdamW over the weights to be trained, and its learning-rate schedule."""
    optimiser = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=study.learning_rate,
        weight_decay=study.weight_decay,
        betas=(0.9, 0.98),
    )
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(study, step, steps))


@torch.no_grad()
def measure(model: Any, held: Sequence[Batch], levels: NDArray[np.int64]) -> dict[str, float]:
    """Loss of the text in nats per word; accuracy and loss of the answers, of the far answers, and by level."""
    model.eval()
    sparse = getattr(model, "sparse_attention", None)
    # A dense model has no such attribute.
    if sparse is not None:
        sparse.mode = "sparse"
    losses, right = [], []
    for batch in held:
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none"))
        right.append(logits.argmax(dim=-1) == batch.ids[:, 1:])
    model.train()
    loss, hit = torch.cat(losses).double(), torch.cat(right).double()
    answer, far, known = (
        torch.cat([mark[:, 1:] for mark in marks])
        for marks in (
            [batch.is_answer for batch in held],
            [batch.is_far for batch in held],
            [batch.labels != IGNORED for batch in held],
        )
    )
    found = {
        "text_loss": loss[known & ~answer].mean(),
        "loss": loss[known].mean(),
        "answer_loss": loss[answer].mean(),
        "recall": hit[answer].mean(),
        "far_recall": hit[far].mean(),
        "near_recall": hit[answer & ~far].mean(),
    }
    for level in np.unique(levels):
        chosen = torch.from_numpy(levels == level)
        found[f"recall_{level}"] = hit[chosen][answer[chosen]].mean()
    return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def caught(model: Any, batch: Batch) -> dict[str, float]:
    """Attention mass, block recall and dead blocks of the selections on held-out rows, as means over layers."""
    reports = []

    def see(layer: int, inputs: LayerInputs, choice: BlockChoice) -> None:
        reports.append(
            report_selection(
                inputs.query, inputs.key, choice.selection, inputs.layout, scale=inputs.scale, sample=batch.ids.shape[1]
            )
        )

    sparse = model.sparse_attention
    sparse.mode = "sparse"
    sparse.observers.append(see)
    model.eval()
    try:
        model(input_ids=batch.ids, use_cache=False)
    finally:
        sparse.observers.remove(see)
        model.train()
    found = {name: float(np.mean([getattr(report, name) for report in reports])) for name in ("mass", "recall", "dead")}
    return found | {"lowest_mass": min(report.mass for report in reports)}


@torch.no_grad()
def best_possible(model: Any, batch: Batch) -> dict[str, float]:
    """The attention mass that the best blocks catch in a model with the selector "oracle" whose layers all attend densely.

    No other selection of as many blocks catches more of it.
    """
    seen: list[LayerInputs] = []

    def see(layer: int, inputs: LayerInputs, choice: BlockChoice) -> None:
        seen.append(replace(inputs, full=False))

    sparse = model.sparse_attention
    sparse.mode = "full"
    sparse.observers.append(see)
    try:
        model.eval()(input_ids=batch.ids, use_cache=False)
    finally:
        sparse.observers.remove(see)
    masses = []
    for inputs in seen:
        oracle: Any = inputs.module.index_branch
        chosen = oracle.choose(inputs, oracle.index_keys(inputs.module, inputs.hidden, inputs.rotary)).selection
        found = report_selection(
            inputs.query, inputs.key, chosen, inputs.layout, scale=inputs.scale, sample=batch.ids.shape[1]
        )
        masses.append(found.mass)
    return {"mass": float(np.mean(masses)), "lowest_mass": min(masses)}


def _rate(study: Study, step: int, steps: int) -> float:
    """Factor of the learning rate: rises linearly, stays at 1, and falls to 0 over the last share of the steps."""
    return min(1.0, (step + 1) / study.warm_up, (steps - step) / (study.decay * steps))


def _endless(loader: CurriculumLoader) -> Iterator[Batch]:
    while True:
        yield from loader
