"""The gradient of LM + λ·Σ KL, however the backward pass is run.

The oracle is plain autograd on that sum: the model in evaluation mode, where nothing is attached, gives the LM loss; an
observer computes every layer's KL by the reference of `kernels/blocksparse`, with its graph; and `torch.autograd.grad` of the
sum is what every way of training must arrive at. This file is also the program that two processes run for DDP.
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsort.attention.training.alignment_loss import AlignmentLoss
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.reference import align_ref

Make = Callable[..., Any]
Gradients = dict[str, Tensor]
WEIGHT = 0.7


@pytest.fixture
def model(sparse: Make) -> Any:
    return sparse("qwen3", alignment_weight=WEIGHT).train()


def _kl(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """LM loss and Σ KL of a forward pass, with their graphs."""
    found: list[Tensor] = []

    def observe(layer: int, inputs: Any, choice: Any) -> None:
        with torch.enable_grad():
            branch = inputs.module.index_branch
            queries = branch.index_queries(inputs)
            keys = branch.index_keys(inputs.module, inputs.hidden, inputs.rotary)
            scales = {"scale": inputs.scale, "index_scale": queries.shape[-1] ** -0.5}
            rows = align_ref(inputs.query, inputs.key, queries, keys, choice.selection, inputs.layout, **scales)
            found.append(rows.sum() / (inputs.layout.tokens * inputs.groups))

    was = model.training
    model.eval()
    model.sparse_attention.observers.append(observe)
    lm = model(**inputs).loss
    model.sparse_attention.observers.remove(observe)
    model.train(was)
    assert len(found) == 3
    return lm, torch.stack(found).sum()


def _gradients(model: Any, total: Tensor) -> Gradients:
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    found = torch.autograd.grad(total, [model.get_parameter(name) for name in names])
    return dict(zip(names, found, strict=True))


def _taken(model: Any) -> Gradients:
    """The gradients on the model, which are then cleared."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _checkpoint(model: Any, reentrant: bool) -> None:
    # Renamed in transformers 5.23.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})


def _same(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    index = [name for name in expected if "index_branch" in name]
    assert index
    assert all(expected[name].abs().max() > 1e-6 for name in index)
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], atol=2e-6, rtol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def _batch(tokens: Make, rows: int = 2, length: int = 19, seed: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right, so that micro-batches have unlike numbers of labels."""
    ids = tokens(rows, length, seed=seed)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - 3 * row - 1 - seed :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_value_and_gradient_without_checkpointing(model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    lm, kl = _kl(model, **batch)
    expected = _gradients(model, lm + WEIGHT * kl)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, lm + WEIGHT * kl)
    torch.testing.assert_close(model.sparse_attention.lm_loss, lm.detach())
    torch.testing.assert_close(sum(model.sparse_attention.alignment.values()), kl.detach())
    loss.backward()
    _same(_taken(model), expected)


def test_the_lm_loss_reaches_no_index_weight_and_the_kl_nothing_else(model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    _, kl = _kl(model, **batch)
    weights = dict(model.named_parameters())
    found = torch.autograd.grad(kl, list(weights.values()), allow_unused=True)
    assert all((grad is not None) == ("index_branch" in name) for name, grad in zip(weights, found, strict=True))
    model.sparse_attention.alignment_weight = 0.0
    model(**batch).loss.backward()
    taken = _taken(model)
    assert all(not grad.any() for name, grad in taken.items() if "index_branch" in name)


def test_evaluation_has_the_lm_loss_only(model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    lm, _ = _kl(model, **batch)
    loss = model.eval()(**batch).loss
    assert torch.equal(loss, lm)
    assert model.sparse_attention.alignment == {}


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, mode: str, model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    model.sparse_attention.mode = mode
    lm, kl = _kl(model, **batch)
    expected = _gradients(model, lm + WEIGHT * kl)
    _checkpoint(model, reentrant)
    loss = model(**batch, use_cache=False).loss
    torch.testing.assert_close(loss, lm + WEIGHT * kl)
    loss.backward()
    _same(_taken(model), expected)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_two_forward_passes_before_one_backward_and_loss_scaling(reentrant: Any, model: Any, tokens: Make) -> None:
    """Each pass has its own factor, and the budget of its own time."""
    first, second = _batch(tokens), _batch(tokens, seed=1)
    (lm_1, kl_1), (lm_2, kl_2) = _kl(model, **first), _kl(model, **second)
    expected = _gradients(model, 1024 * (0.3 * (lm_1 + WEIGHT * kl_1) + 2.0 * (lm_2 + WEIGHT * kl_2)))
    if reentrant is not None:
        _checkpoint(model, reentrant)
    one = model(**first, use_cache=False).loss
    two = model(**second, use_cache=False).loss
    (1024 * (0.3 * one + 2.0 * two)).backward()
    _same({name: grad / 1024 for name, grad in _taken(model).items()}, {n: grad / 1024 for n, grad in expected.items()})


def test_settings_changed_between_forward_and_backward_change_nothing(model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    lm, kl = _kl(model, **batch)
    expected = _gradients(model, lm + WEIGHT * kl)
    _checkpoint(model, True)
    loss = model(**batch, use_cache=False).loss
    state = model.sparse_attention
    state.mode, state.alignment_weight = "full", 100.0
    loss.backward()
    _same(_taken(model), expected)


def test_num_items_in_batch_weights_each_micro_batch_by_its_labels(model: Any, tokens: Make) -> None:
    """Σ over micro-batches of (sum of LM) / N + λ · mean KL · labels / N."""
    batches = [_batch(tokens), _batch(tokens, rows=1, length=9, seed=1)]
    own = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = torch.zeros(())
    for batch, labels in zip(batches, own, strict=True):
        lm, kl = _kl(model, **batch)
        total = total + (lm + WEIGHT * kl) * labels / sum(own)
    expected = _gradients(model, total)
    losses = []
    for batch, count in zip(batches, [sum(own), torch.tensor(sum(own))], strict=True):
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(sum(losses), total.detach())
    _same(_taken(model), expected)


def test_shifted_labels(model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    plain = model(**batch, num_items_in_batch=100).loss
    torch.testing.assert_close(model(**batch, shift_labels=shifted, num_items_in_batch=100).loss, plain)


def test_a_frozen_model_teaches_its_selectors(model: Any, tokens: Make) -> None:
    """The retrofit: only the index branch learns."""
    batch = _batch(tokens)
    for name, weight in model.named_parameters():
        weight.requires_grad_("index_branch" in name)
    _lm, kl = _kl(model, **batch)
    expected = _gradients(model, WEIGHT * kl)
    model(**batch).loss.backward()
    _same(_taken(model), expected)


def test_a_loss_computed_outside(model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    labels = batch.pop("labels")
    lm, kl = _kl(model, **batch, labels=labels)
    state = model.sparse_attention

    def outside(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    expected = _gradients(model, (lm + WEIGHT * kl) / 8)
    total = state.add_alignment(outside(model(**batch).logits))
    torch.testing.assert_close(total, lm + WEIGHT * kl)
    (total / 8).backward()
    _same(_taken(model), expected)

    # Without it: the LM loss as it is scaled, the KL as if it were not.
    lm, kl = _kl(model, **batch, labels=labels)
    expected = _gradients(model, lm / 8 + WEIGHT * kl)
    loss = outside(model(**batch).logits) / 8
    with pytest.warns(UserWarning, match="did not go through the model's own loss.*add_alignment") as caught:
        loss.backward()
    assert len(caught) == 1
    _same(_taken(model), expected)


def test_alignment_is_added_once(model: Any, tokens: Make) -> None:
    batch = _batch(tokens)
    state = model.sparse_attention
    loss = model(**batch).loss
    lm = state.lm_loss
    for again in (loss, loss + 1):
        with pytest.raises(SparsortError, match="added to its loss already"):
            state.add_alignment(again)
    assert state.lm_loss is lm
    model.eval()(**batch)
    with pytest.warns(UserWarning, match="no alignment losses to add"):
        state.add_alignment(loss)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_backward_pass_of_something_else(reentrant: Any, model: Any, tokens: Make) -> None:
    """After that of the total it adds nothing, and the total may go again."""
    batch = _batch(tokens)
    lm, kl = _kl(model, **batch)
    expected = _gradients(model, lm + WEIGHT * kl)
    if reentrant is not None:
        _checkpoint(model, reentrant)
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward(retain_graph=True)
    _same(_taken(model), expected)
    (outputs.logits.sum() * 0).backward(retain_graph=True)
    assert not any(grad.any() for grad in _taken(model).values())
    outputs.loss.backward()
    _same(_taken(model), expected)


def test_no_reference_keeps_the_graph_alive(model: Any, tokens: Make) -> None:
    def nodes() -> int:
        """Autograd nodes of ours that are alive; those of functions in Python are objects that Python knows of."""
        gc.collect()
        return sum(type(found).__name__ == "_AttachLossBackward" for found in gc.get_objects())

    before = nodes()
    outputs = model(**_batch(tokens))
    outputs.loss.backward()
    assert nodes() == before + 3
    del outputs
    assert nodes() == before
    state = model.sparse_attention
    kept = [state.lm_loss, *state.alignment.values()]
    assert all(not value.requires_grad for value in kept)


def test_an_alignment_loss_by_itself() -> None:
    """y = w·x, loss (w − 1)², total (Σ y + λ·loss)·5: ∂/∂w by hand."""
    w = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([1.0, 2.0])
    losses = AlignmentLoss(0.5)
    y = losses.attach_to(w.detach() * x, (w - 1) ** 2, 0)
    total = losses.add_to(y.sum(), share=torch.tensor(0.25))
    assert float(total.detach()) == 9 + 0.5 * 0.25 * 4
    (total * 5).backward()
    assert float(w.grad) == 5 * 0.5 * 0.25 * 4
    with torch.no_grad():
        assert float(AlignmentLoss(1.0).add_to(torch.tensor(2.0))) == 2.0


# In Trainer


@pytest.fixture
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@pytest.mark.usefixtures("_random_state_put_back")
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_one_step_of_trainer_with_accumulation(checkpointing: Any, model: Any, tokens: Make, tmp_path: Path) -> None:
    """Two micro-batches with unlike numbers of labels, SGD: the step is the oracle's gradient of the whole."""
    from transformers import Trainer, TrainingArguments

    lengths = [19, 7, 12, 5]
    rows = [{"input_ids": tokens(n, seed=n)} for n in lengths]

    def collate(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in chosen)
        ids = torch.stack(
            [torch.nn.functional.pad(row["input_ids"], (0, width - len(row["input_ids"]))) for row in chosen]
        )
        mask = (ids > 0).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

    batches = [collate(rows[:2]), collate(rows[2:])]
    labels = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = torch.zeros(())
    for batch, own in zip(batches, labels, strict=True):
        lm, kl = _kl(model, **batch)
        total = total + (lm + WEIGHT * kl) * own / sum(labels)
    expected = _gradients(model, total)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    if checkpointing is not None:
        _checkpoint(model, checkpointing)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        weight_decay=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trained = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    assert trained.training_loss == pytest.approx(float(total.detach()), rel=1e-4)
    _same({name: before[name] - weight.detach() for name, weight in model.named_parameters()}, expected)


# Over two processes


KINDS = ("plain", "reentrant", "not-reentrant", "sharded")


def test_ddp_and_fsdp(sparse: Make, tokens: Make, tmp_path: Path) -> None:
    """Each rank has its own batch; the mean of their gradients is the gradient of the mean of their totals."""
    from safetensors.torch import load_file

    model = sparse("llama", alignment_weight=WEIGHT)
    model.save_pretrained(tmp_path / "model")
    totals = []
    for rank in range(2):
        lm, kl = _kl(model, **_batch(tokens, seed=rank))
        totals.append(lm + WEIGHT * kl)
    expected = _gradients(model, sum(totals) / 2)
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, __file__, str(tmp_path)], stderr=log, stdout=log, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    for kind in KINDS:
        for rank in range(2):
            _same(load_file(tmp_path / f"{kind}-{rank}.safetensors"), expected)


def _run_rank(folder: Path, rank: int) -> None:
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from sparsort.attention.attach import load_sparse

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def tokens(*size: int, seed: int = 0) -> Tensor:
        return torch.randint(3, 384, size, generator=torch.Generator().manual_seed(seed))

    batch = _batch(tokens, seed=rank)
    for kind in KINDS:
        model = load_sparse(folder / "model").train()
        if kind in ("reentrant", "not-reentrant"):
            _checkpoint(model, kind == "reentrant")
        if kind == "sharded":
            for layer in model.model.layers:
                fully_shard(layer)
            wrapped: Any = fully_shard(model)
        else:
            wrapped = DistributedDataParallel(model)
        wrapped(**batch, use_cache=False).loss.backward()
        found = {name: getattr(grad, "full_tensor", grad.clone)() for name, grad in _taken(model).items()}
        save_file(found, folder / f"{kind}-{rank}.safetensors")
    # First, because its destructor would end the process group with the interpreter's lock held, and can hang (torch 2.13).
    del wrapped
    dist.destroy_process_group()


def _main(folder: Path) -> None:
    """One import of torch and transformers, then a process for each rank."""
    import multiprocessing

    import transformers.models.llama.modeling_llama  # noqa: F401

    import sparsort.attention.attach  # noqa: F401

    torch.set_num_threads(1)
    ranks = [multiprocessing.get_context("fork").Process(target=_run_rank, args=(folder, rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(max(abs(rank.exitcode or 0) for rank in ranks))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
