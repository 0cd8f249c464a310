"""GRPO and RLOO of TRL in the order of a plan, resumed at every step, with the real classes and a tiny model.

The oracles are what TRL is given to generate for, written down as it happens, and the losses, bit by bit: those of an
interrupted run and of its continuation together must be those of a run that was never stopped.
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grpo_runs import Grpo, PlainGrpo, Rloo, make_plan, make_trainer
from handshake import search_path
from peft import LoraConfig

from sparsort.curriculum.loading.loader.groups import prompts_of
from sparsort.curriculum.loading.online.measure import OnlineDifficulty
from sparsort.curriculum.loading.trainer.generation import groups_of, load_completions, save_completions
from sparsort.errors import SparsortError

# TRL looks at an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        # Two optimiser steps for each generation batch.
        (Grpo, {"steps_per_generation": 4, "gradient_accumulation_steps": 2}),
        # The completions are used twice, in one step each.
        (Grpo, {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "num_iterations": 2}),
        # A step ends inside a generation batch, and the last step of an epoch has two micro-batches instead of five.
        (Grpo, {"steps_per_generation": 4, "gradient_accumulation_steps": 5}),
        # Several generation batches for each step.
        (Grpo, {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}),
        (Rloo, {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "num_iterations": 2}),
    ],
)
def test_a_run_resumes_exactly_from_every_checkpoint(cls: Any, options: dict[str, Any], tmp_path: Path) -> None:
    plan, accumulation = make_plan(), options["gradient_accumulation_steps"]
    whole = make_trainer(tmp_path / "whole", plan, cls, **options)
    whole.train()
    repeats = options["steps_per_generation"] * options.get("num_iterations", 1)
    assert whole.generated == [
        ((epoch * 3 + number) * repeats, np.repeat(prompts_of(plan, number, epoch, 4), 2).tolist())
        for epoch in range(2)
        for number in range(3)
    ]
    per_epoch = -(-3 * repeats // accumulation)
    assert whole.state.global_step == 2 * per_epoch
    for step in range(1, 2 * per_epoch):
        again = make_trainer(tmp_path / "again", plan, cls, **options, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        epoch, inside = divmod(step, per_epoch)
        done = epoch * 3 * repeats + inside * accumulation
        assert again.__dict__.get("generated", []) == [each for each in whole.generated if each[0] >= done]
        assert again.losses == whole.losses[done:]
        assert again.state.global_step == whole.state.global_step
        assert again.state.epoch == whole.state.epoch == 2


def test_three_lines_are_enough_and_logs_show_the_curriculum(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, plan := make_plan(8), n=8, logging_steps=1, num_train_epochs=1, save_strategy="no")
    trainer.train()
    assert [rows for _step, rows in trainer.generated] == [np.repeat(plan.batch(k), 2).tolist() for k in (0, 1)]
    logged = [each["curriculum/difficulty"] for each in trainer.state.log_history if "curriculum/difficulty" in each]
    means = [float(np.mean(plan.difficulty[plan.batch(k)])) for k in (0, 1)]
    assert logged == pytest.approx([means[0]] * 4 + [means[1]] * 4)


def test_a_run_that_stops_inside_a_generation_batch_resumes_with_its_completions(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, make_plan(), max_steps=2)
    first.train()
    assert (tmp_path / "checkpoint-2" / "completions-0.safetensors").exists()
    second = make_trainer(tmp_path, make_plan(), max_steps=4)
    second.train(resume_from_checkpoint=True)
    assert "generated" not in second.__dict__
    assert len(second.losses) == 2
    # At the edge of a generation batch there is nothing to store.
    assert not (tmp_path / "checkpoint-4" / "completions-0.safetensors").exists()


@pytest.mark.parametrize(("step", "fault"), [(1, "inside a generation batch"), (4, "a later epoch")])
def test_a_control_trls_own_resume_is_recorded_as_different(tmp_path: Path, step: int, fault: str) -> None:
    """The records above would show a fault: without a curriculum, TRL 1.16 has two of them."""
    options: dict[str, Any] = {"n": 8, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", None, PlainGrpo, **options)
    whole.train()
    again = make_trainer(tmp_path / "again", None, PlainGrpo, save_strategy="no", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    found, expected = ([rows for _step, rows in each] for each in (again.generated, whole.generated))
    if fault == "a later epoch":
        assert found[0] == expected[0] != expected[2]
    else:
        assert found[0] == expected[0], "the prompts of the first generation batch are completed twice"
        assert len(again.losses) == len(whole.losses) - 2


def test_lora_with_a_reference_policy_resumes_inside_a_generation_batch(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "beta": 0.1, "num_train_epochs": 1, "lora": lora}
    whole = make_trainer(tmp_path / "whole", make_plan(), **options)
    whole.train()
    again = make_trainer(tmp_path / "again", make_plan(), save_strategy="no", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.losses == whole.losses[6:]
    assert again.generated == whole.generated[2:]


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=r"8 rows, which are 4 prompts × 2 generations.*Plan with batch_size=4"):
        make_trainer(tmp_path, make_plan(batch_size=5)).train()
    first = make_trainer(tmp_path, make_plan(), max_steps=4)
    first.train()
    # With other iterations, step 4 is at another place of the epoch.
    with pytest.raises(SparsortError, match=r"of step 4, but .* which is step 8.*num_iterations"):
        make_trainer(tmp_path, make_plan(), num_iterations=2).train(resume_from_checkpoint=True)
    # One micro-batch is not a whole step of three.
    with pytest.raises(SparsortError, match=r"of step 1, but .* which is inside step 0\..*another accumulation"):
        make_trainer(tmp_path, make_plan(), gradient_accumulation_steps=3).train(str(tmp_path / "checkpoint-1"))
    with pytest.raises(SparsortError, match=r"enable_jit_checkpoint=True saves in the middle of a step"):
        make_trainer(tmp_path, make_plan(), enable_jit_checkpoint=True).train()
    with pytest.raises(SparsortError, match=r"this trainer runs others to generate\. Omit online="):
        Grpo("no/such-model", curriculum=make_plan(), online=OnlineDifficulty())
    with pytest.raises(SparsortError, match=r"sampler is a RandomSampler.*RepeatSampler"):
        groups_of(torch.utils.data.RandomSampler([1]))


def test_completions_are_stored_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = torch.arange(12.0).reshape(6, 2)
    slices = [
        {"ids": base[:3].long(), "advantages": base[:3], "count": torch.tensor(7), "images": [1, 2], "logps": None},
        {"ids": base[3:].long(), "advantages": base[3:], "count": torch.tensor(7), "images": [0, 1], "logps": None},
    ]
    for rank in range(2):
        save_completions(tmp_path, slices, rank=rank, world_size=2)
    cpu = torch.device("cpu")
    stored = load_completions(tmp_path, rank=1, world_size=2, device=cpu)
    assert stored is not None
    for expected, found in zip(slices, stored, strict=True):
        assert set(found) == set(expected)
        torch.testing.assert_close({**found}, {**expected}, rtol=0, atol=0)
    # Completions were divided among two processes, so with another number they are generated again.
    for world_size in (1, 4):
        assert load_completions(tmp_path, rank=world_size - 1, world_size=world_size, device=cpu) is None
    assert "training resumes with 1. The prompts of this generation batch are completed again" in caplog.text
    (tmp_path / "completions-1.safetensors").write_bytes(b"no")
    with pytest.raises(SparsortError, match=r"written inside a generation batch\. Resume from another checkpoint"):
        load_completions(tmp_path, rank=1, world_size=2, device=cpu)


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_resume_exactly_and_one_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {
        **os.environ,
        **search_path(),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "ACCELERATE_USE_CPU": "true",
    }
    program = Path(str(sys.modules["grpo_runs"].__file__))
    # `--cpu` would start a single process; `--multi_gpu` starts two, which then run on the CPU (`use_cpu`) over gloo.
    launch = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, str(program), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = make_plan()
    for rank in range(2):
        runs = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        # 4 prompts × 2 generations, of which each rank has one half.
        whole = [
            [(epoch * 3 + number) * 4, np.repeat(prompts_of(plan, number, epoch, 4), 2)[4 * rank :][:4].tolist()]
            for epoch in range(2)
            for number in range(3)
        ]
        assert runs["0"]["generated"] == whole
        for step in range(1, 12):
            assert runs[str(step)]["generated"] == [each for each in whole if each[0] >= 2 * step], step
            assert runs[str(step)]["losses"] == runs["0"]["losses"][2 * step :], step
    # One process continues with the same prompts; those of the current generation batch are completed again.
    alone = make_trainer(tmp_path / "alone", plan, steps_per_generation=4, gradient_accumulation_steps=2)
    with caplog.at_level(logging.WARNING, logger="sparsort"):
        alone.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert "written inside a generation batch by 2 processes, and training resumes with 1" in caplog.text
    assert [rows for _step, rows in alone.generated] == [
        np.repeat(prompts_of(plan, number % 3, number // 3, 4), 2).tolist() for number in range(2, 6)
    ]
