"""Sparse attention under Trainer: the mode and budget of every step, the logs, and that measuring changes nothing.

The oracle reads `model.sparse_attention` in front of every forward pass, and measures the logged batches by itself; with a
learning rate of 0 the model stays what it was, so that every log can be computed again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparsort.attention.diagnostics import report_selection
from sparsort.attention.flops import AttentionShape, SparseShape, dense_flops, sparse_flops
from sparsort.attention.state import SparseAttention
from sparsort.attention.training.callback import SparseAttentionCallback, sparse_attention_of
from sparsort.attention.training.schedule import SparseSchedule
from sparsort.errors import SparsortError

LENGTH, BLOCK, BLOCKS = 24, 4, 2
ROWS = 16


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class InOrder(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Seen:
    """Mode, budget and observers of every forward pass, by whether it trains."""

    def __init__(self, model: nn.Module) -> None:
        self.training: list[tuple[str, int]] = []
        self.evaluation: list[tuple[str, int]] = []
        model.register_forward_pre_hook(self._note)

    def _note(self, model: Any, args: Any) -> None:
        state: SparseAttention = model.sparse_attention
        (self.training if model.training else self.evaluation).append((state.mode, state.budget.slots))


@pytest.fixture
def rows(tokens: Callable[..., Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(ROWS, LENGTH)]


@pytest.fixture
def trainer(rows: list[dict[str, Tensor]], tmp_path: Path) -> Callable[..., InOrder]:
    def make(model: Any, callback: SparseAttentionCallback | None, **options: Any) -> InOrder:
        defaults: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "seed": 3}
        defaults |= {
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "log_level": "error",
        }
        defaults |= {"learning_rate": 1e-3, "output_dir": str(tmp_path), "per_device_eval_batch_size": 8}
        made = InOrder(
            model=model,
            args=TrainingArguments(**{**defaults, **options}),
            train_dataset=rows,
            eval_dataset=rows[:8],
        )
        if callback is not None:
            callback.join(made)
        return made

    return make


def _logs(trainer: Trainer) -> list[dict[str, Any]]:
    """Those of steps, without what time decides."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_has_its_mode_and_budget_and_evaluation_the_configured_ones(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder], accumulation: int
) -> None:
    model = sparse()
    seen = Seen(model)
    schedule = SparseSchedule(warmup_steps=2, start=5, anneal_steps=3)
    options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1}
    made = trainer(model, SparseAttentionCallback(schedule), gradient_accumulation_steps=accumulation, **options)
    made.train()
    each = [("full", 5), ("full", 5), ("sparse", 5), ("sparse", 4), ("sparse", 3), ("sparse", 2)]
    assert seen.training == [step for step in each for _ in range(accumulation)]
    assert seen.evaluation == [("sparse", BLOCKS)] * 6
    assert (model.sparse_attention.mode, model.sparse_attention.budget.slots) == ("sparse", BLOCKS)
    assert model.sparse_attention.observers == []


def test_a_resumed_run_does_what_an_uninterrupted_one_does(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder], tmp_path: Path
) -> None:
    schedule = SparseSchedule(warmup_steps=2, start=4, anneal_steps=4)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = trainer(sparse(), SparseAttentionCallback(schedule), **options)
    straight.train()
    model = sparse(seed=1)
    seen = Seen(model)
    resumed = trainer(model, SparseAttentionCallback(schedule), **options)
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert seen.training == [("sparse", 4), ("sparse", 3), ("sparse", 2)]
    assert _logs(resumed) == _logs(straight)
    assert _same(_weights(model), _weights(straight.model))


def test_measuring_changes_no_bit(sparse: Callable[..., Any], trainer: Callable[..., InOrder]) -> None:
    runs = []
    for callback, options in (
        (None, {}),
        (SparseAttentionCallback(), {}),
        (SparseAttentionCallback(sample=1), {"logging_steps": 4}),
    ):
        made = trainer(sparse(), callback, **options)
        made.train()
        runs.append((_weights(made.model), [entry["loss"] for entry in _logs(made)]))
    assert _same(runs[0][0], runs[1][0])
    assert _same(runs[0][0], runs[2][0])
    assert runs[0][1] == runs[1][1]


def test_the_logs_are_what_the_layers_did_in_the_first_micro_batch(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder], rows: list[dict[str, Tensor]]
) -> None:
    model = sparse()
    made = trainer(
        model, SparseAttentionCallback(SparseSchedule(warmup_steps=1), sample=LENGTH), learning_rate=0.0, max_steps=2
    )
    made.train()
    warm, later = _logs(made)
    batches = [torch.stack([row["input_ids"] for row in rows[start : start + 2]]) for start in (0, 2)]
    model.train()
    for entry, batch, mode in ((warm, batches[0], "full"), (later, batches[1], "sparse")):
        state, measured = model.sparse_attention, {}

        def measure(layer: int, inputs: Any, choice: Any, into: dict[int, Any] = measured) -> None:
            given = (inputs.query, inputs.key, choice.selection, inputs.layout)
            into[layer] = report_selection(*given, scale=inputs.scale, sample=LENGTH)

        state.mode, state.observers = mode, [measure]
        loss = model(input_ids=batch, labels=batch).loss.item()
        assert entry["loss"] == pytest.approx(loss, rel=1e-4)
        assert entry["sparse/lm_loss"] == pytest.approx(state.lm_loss.item(), rel=1e-5)
        kl = {layer: value.item() for layer, value in state.alignment.items()}
        assert [entry[f"sparse/kl/{layer}"] for layer in kl] == pytest.approx(list(kl.values()), rel=1e-5)
        assert entry["sparse/kl"] == pytest.approx(sum(kl.values()) / 3, rel=1e-5)
        assert loss == pytest.approx(entry["sparse/lm_loss"] + sum(kl.values()), rel=1e-5)
        if mode == "full":
            assert not {"sparse/mass", "sparse/recall", "sparse/gflops"} & entry.keys()
            continue
        for name, field in {"mass": "mass", "recall": "recall", "blocks": "mean_blocks", "dead": "dead"}.items():
            expected = sum(getattr(report, field) for report in measured.values()) / 3
            assert entry[f"sparse/{name}"] == pytest.approx(expected, rel=1e-5)
        assert entry["sparse/most_blocks"] == BLOCKS
        assert 0 < entry["sparse/mass"] < 1
        shape = AttentionShape(heads=4, groups=2, head_dim=16, index_dim=8)
        done = SparseShape(block_size=BLOCK, blocks=entry["sparse/blocks"])
        assert entry["sparse/gflops"] == pytest.approx(6 * sparse_flops(shape, LENGTH, done) / 1e9)
        assert entry["sparse/gflops_dense"] == pytest.approx(6 * dense_flops(shape, LENGTH) / 1e9)


def test_of_several_micro_batches_the_first_is_measured(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder]
) -> None:
    options = {"learning_rate": 0.0, "max_steps": 2}
    whole = trainer(sparse(), SparseAttentionCallback(), **options)
    parts = trainer(sparse(), SparseAttentionCallback(), gradient_accumulation_steps=2, **options)
    whole.train()
    parts.train()
    # Steps of two micro-batches: the first of the second step is the third batch of two rows.
    names = [name for name in _logs(whole)[0] if name.startswith("sparse/")]
    assert {"sparse/mass", "sparse/lm_loss"} <= set(names)
    first, second = ([_logs(made)[step][name] for name in names] for made, step in ((whole, 0), (whole, 1)))
    assert [_logs(parts)[0][name] for name in names] == pytest.approx(first, rel=1e-6)
    assert first != pytest.approx(second, rel=1e-6)


def test_layers_that_checkpointing_runs_again_are_measured_once(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return report_selection(*args, **kwargs)

    monkeypatch.setattr("sparsort.attention.training.callback.report_selection", counted)
    logs = []
    for checkpointing in (False, True):
        model = sparse()
        if checkpointing:
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{name}_checkpointing_enable")()
        made = trainer(model, SparseAttentionCallback(), max_steps=2)
        made.train()
        logs.append(_logs(made))
    assert len(calls) == 2 * 2 * 3
    assert [entry["sparse/mass"] for entry in logs[0]] == [entry["sparse/mass"] for entry in logs[1]]


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}, [8]),
    ],
)
def test_every_log_of_a_loss_has_the_measures(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder], options: dict[str, Any], measured: list[int]
) -> None:
    made = trainer(sparse(), SparseAttentionCallback(), **options)
    made.train()
    assert [entry["step"] for entry in _logs(made) if "sparse/mass" in entry] == measured
    assert [entry["step"] for entry in _logs(made)] == measured


def test_trackers_get_the_measures(sparse: Callable[..., Any], trainer: Callable[..., InOrder]) -> None:
    class Tracker(TrainerCallback):  # type: ignore[misc]
        logs: list[dict[str, Any]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    made = trainer(sparse(), None, max_steps=1)
    made.add_callback(Tracker)
    SparseAttentionCallback().join(made)
    made.train()
    assert {"sparse/kl", "sparse/mass", "sparse/gflops"} <= Tracker.logs[0].keys()
    assert Tracker.logs[0].items() <= made.state.log_history[0].items()


@pytest.mark.parametrize("selector", ["moba", "nsa", "window"])
def test_a_selector_without_a_loss_has_no_kl(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder], selector: str
) -> None:
    made = trainer(sparse(selector=selector), SparseAttentionCallback(), max_steps=1)
    made.train()
    (entry,) = _logs(made)
    assert not [name for name in entry if name.startswith("sparse/kl")]
    assert entry["sparse/lm_loss"] == pytest.approx(entry["loss"], rel=1e-4)
    sizes = {"window": 1} if selector == "nsa" else {}
    done = SparseShape(selector=selector, block_size=BLOCK, blocks=entry["sparse/blocks"], **sizes)  # type: ignore[arg-type]
    expected = sparse_flops(AttentionShape(heads=4, groups=2, head_dim=16), LENGTH, done)
    assert entry["sparse/gflops"] == pytest.approx(6 * expected / 1e9)


def test_a_step_that_fails_leaves_no_state_for_the_next_training(
    sparse: Callable[..., Any], trainer: Callable[..., InOrder]
) -> None:
    model, callback = sparse(), SparseAttentionCallback()
    made = trainer(model, callback, max_steps=1)

    class TornError(Exception):
        pass

    def torn(*_args: Any) -> None:
        raise TornError

    hook = model.lm_head.register_forward_pre_hook(torn)
    with pytest.raises(TornError):
        made.train()
    hook.remove()
    made.train()
    assert model.sparse_attention.observers == []
    assert "sparse/mass" in _logs(made)[0]


def test_a_schedule_or_a_model_that_does_not_fit_is_refused_before_the_first_step(
    sparse: Callable[..., Any], dense: Callable[..., Any], trainer: Callable[..., InOrder]
) -> None:
    schedule = SparseSchedule(start=0.5, anneal_steps=2)
    with pytest.raises(SparsortError, match="not a number of blocks"):
        trainer(sparse(), SparseAttentionCallback(schedule)).train()
    with pytest.raises(SparsortError, match=r"LlamaForCausalLM has no sparse attention.*attach_index_branch"):
        trainer(dense(), SparseAttentionCallback()).train()


def test_an_invalid_schedule_or_sample_is_refused() -> None:
    with pytest.raises(SparsortError, match="schedule is 3; expected a SparseSchedule"):
        SparseAttentionCallback(3)  # type: ignore[arg-type]
    for sample in (0, -1):
        with pytest.raises(SparsortError, match=f"sample is {sample}"):
            SparseAttentionCallback(sample=sample)


def test_a_wrapped_model_is_unwrapped(sparse: Callable[..., Any], dense: Callable[..., Any]) -> None:
    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    class Tuner(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    class Peft(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = Tuner(model)

    model = sparse()
    for wrapped in (
        model,
        Parallel(model),
        torch.compile(model, backend="eager"),
        Peft(model),
        Parallel(torch.compile(Peft(model), backend="eager")),
    ):
        assert sparse_attention_of(wrapped) is model.sparse_attention
    with pytest.raises(SparsortError, match="Parallel has no sparse attention"):
        sparse_attention_of(Parallel(dense()))
