"""What a user of transformers' Trainer expects of its data loader and of a resume, compared with Trainer itself."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.checkpoints import NoCheckpointError
from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer
from sparsort.errors import SparsortError

N = 24
ROWS = [{"input_ids": [row, 1, 2], "labels": [row, 1, 2]} for row in range(N)]


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _trainer(cls: Any, folder: Path, *, plan: dict[str, Any] | None = None, **options: Any) -> Any:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **{"per_device_train_batch_size": 4, **quiet, **options})
    given: dict[str, Any] = {"train_dataset": ROWS, "data_collator": default_data_collator}
    if cls is CurriculumTrainer:
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        given["curriculum"] = plan_curriculum(range(N), data=ROWS, **{"batch_size": batch, **(plan or {})})
    return cls(LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)), arguments, **given)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_the_loader_has_the_sizes_of_trainers_loader(tmp_path: Path, accumulation: int) -> None:
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    plain, ours = (_trainer(cls, tmp_path, **options) for cls in (Trainer, CurriculumTrainer))
    loaders = plain.get_train_dataloader(), ours.get_train_dataloader()
    assert loaders[1].total_batch_size == loaders[0].total_batch_size == 4
    assert len(loaders[1]) == len(loaders[0])
    assert ours.num_examples(loaders[1]) == plain.num_examples(loaders[0]) == N
    ours.train()
    plain.train()
    for name in ("global_step", "epoch", "max_steps", "num_train_epochs"):
        assert getattr(ours.state, name) == getattr(plain.state, name), name


def test_a_plan_that_counts_tokens_has_no_batch_size(tmp_path: Path) -> None:
    trainer = _trainer(CurriculumTrainer, tmp_path, plan={"batch_size": None, "token_budget": 12, "lengths": [3] * N})
    assert trainer.get_train_dataloader().total_batch_size is None


def test_an_empty_folder_is_the_same_error_as_in_trainer(tmp_path: Path) -> None:
    for cls in (Trainer, CurriculumTrainer):
        with pytest.raises(ValueError, match=r"checkpoint") as error:
            _trainer(cls, tmp_path).train(resume_from_checkpoint=True)
    assert isinstance(error.value, NoCheckpointError)
    assert "Train from the start, without resume_from_checkpoint" in str(error.value)


def test_another_batch_size_after_a_resume_is_refused_with_the_arguments_that_continue(tmp_path: Path) -> None:
    _trainer(CurriculumTrainer, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(SparsortError, match=r"global batch of 4 and this plan has 8.*accumulation × processes = 4"):
        _trainer(CurriculumTrainer, tmp_path, per_device_train_batch_size=8).train(resume_from_checkpoint=True)
    # The same global batch in other pieces continues.
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    assert _trainer(CurriculumTrainer, tmp_path, **smaller).train(resume_from_checkpoint=True).global_step == 4


def test_one_example_per_device_needs_a_number_of_rows_that_the_batch_divides(tmp_path: Path) -> None:
    batch = {"batch_size": 5}
    # 24 rows in batches of 5 are batches of 5, 5, 5, 5 and 4; in batches of 16, two of 12.
    with pytest.raises(
        SparsortError, match=r"at most 4 in all .*per_device_train_batch_size=5 .*rows that batch_size=5 divides"
    ):
        _trainer(
            CurriculumTrainer, tmp_path, plan=batch, per_device_train_batch_size=1, gradient_accumulation_steps=5
        ).train()
    advised = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "num_train_epochs": 1}
    with pytest.raises(SparsortError, match="per_device_train_batch_size=2 and gradient_accumulation_steps=8"):
        _trainer(CurriculumTrainer, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=16).train()
    assert _trainer(CurriculumTrainer, tmp_path, **advised).train().global_step == 2


@pytest.mark.parametrize(
    ("scheduler", "plan", "advises"),
    [
        ("linear", {}, True),
        ("cosine", {"mode": "pool", "steps": 6, "pacing": "linear:start=0.5"}, True),
        ("constant", {}, False),
        ("constant_with_warmup", {}, False),
        ("linear", {"schedule": "shuffle"}, False),
        ("linear", {"direction": "random"}, False),
    ],
)
def test_a_decaying_learning_rate_is_mentioned_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scheduler: str, plan: dict[str, Any], advises: bool
) -> None:
    with caplog.at_level(logging.INFO, logger="sparsort"):
        _trainer(CurriculumTrainer, tmp_path, plan=plan, lr_scheduler_type=scheduler, num_train_epochs=1).train()
    advice = [record for record in caplog.records if "2511.18903" in record.getMessage()]
    assert len(advice) == advises
    assert all(record.levelno == logging.INFO for record in advice)
