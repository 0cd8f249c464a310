"""The curriculum in transformers' Trainer: the batches of the model step by step, and that a resume does not change them.

The oracle is what reaches the model: every row carries its number in its tokens, `training_step` writes down the numbers
and the loss, and lists of both are compared as they are. Dropout is on, so that a loss is the same only if the random
state is.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from sparsort.curriculum.loading.online.measure import OnlineDifficulty
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.checkpoints import seal_checkpoint
from sparsort.curriculum.loading.trainer.trainer import CurriculumMixin, CurriculumTrainer, check_global_batch
from sparsort.errors import SparsortError

N, BATCH, BASE = 41, 4, 8
N_BATCHES = 11  # ceil(41 / 4)
LENGTH = 6
Step = tuple[list[int], str]


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _rows(n: int = N) -> list[dict[str, Any]]:
    """Rows whose first two tokens are their number in base 8; the column "note" is of no use to the model."""
    tokens = np.random.default_rng(0).integers(0, BASE * BASE, (n, LENGTH))
    tokens[:, 0], tokens[:, 1] = np.divmod(np.arange(n), BASE)
    return [{"input_ids": row, "labels": row, "note": f"row {number}"} for number, row in enumerate(tokens.tolist())]


def _difficulty(n: int = N, seed: int = 1) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    values[5] = np.nan
    return values


def _plan(**settings: Any) -> CurriculumPlan:
    return plan_curriculum(_difficulty(), **{"batch_size": BATCH, "stages": 3, "seed": 7, **settings})


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=BASE * BASE, attention_dropout=0.3, **size))


class Recorded:
    """Writes down the rows and the loss of every micro-batch."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        assert set(inputs) == {"input_ids", "labels"}
        numbers = (inputs["input_ids"][:, 0] * BASE + inputs["input_ids"][:, 1]).tolist()
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.__dict__.setdefault("seen", []).append((numbers, float(loss).hex()))
        return loss


class Mine(Recorded, CurriculumTrainer):
    seen: list[Step]


def _arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "seed": 3,
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**defaults, **quiet, **options})


def _trainer(
    folder: Path, plan: Any = None, *, data: Any = None, evaluate: bool = False, online: Any = None, **options: Any
) -> Mine:
    data = datasets.Dataset.from_list(_rows()) if data is None else data
    return Mine(
        _model(),
        _arguments(folder, **options),
        curriculum=_plan() if plan is None else plan,
        verify=False,
        online=online,
        train_dataset=data,
        eval_dataset=data if evaluate else None,
        data_collator=default_data_collator,
    )


def _global(seen: list[Step], micro: int = 2) -> list[list[int]]:
    """The global batches of one process: its micro-batches, put together."""
    assert len(seen) % micro == 0
    return [[row for rows, _ in seen[i : i + micro] for row in rows] for i in range(0, len(seen), micro)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mine]:
    """An uninterrupted run over two epochs with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        trainer = _trainer(folder)
        trainer.train()
    random.setstate(python)
    np.random.set_state(numpy)
    return folder, trainer


def test_the_model_sees_the_plans_batches_and_each_row_once_an_epoch(whole: tuple[Path, Mine]) -> None:
    plan, trainer = _plan(), whole[1]
    expected = [plan.batch(number, epoch).tolist() for epoch in range(2) for number in range(N_BATCHES)]
    assert _global(trainer.seen) == expected
    for epoch in range(2):
        once = [row for rows in expected[epoch * N_BATCHES : (epoch + 1) * N_BATCHES] for row in rows]
        assert len(once) == N
        assert set(once) == set(range(N))
    assert len({loss for _, loss in trainer.seen}) > 30
    assert trainer.args.ignore_data_skip is False


@pytest.mark.parametrize("step", [1, 5, N_BATCHES - 1, N_BATCHES, N_BATCHES + 1, 2 * N_BATCHES - 1])
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(
    whole: tuple[Path, Mine], tmp_path: Path, step: int, restore: bool
) -> None:
    folder, straight = whole
    resumed = _trainer(tmp_path, restore_callback_states_from_checkpoint=restore, ignore_data_skip=restore)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.seen == straight.seen[2 * step :]
    assert resumed.state.global_step == 2 * N_BATCHES
    assert resumed.args.ignore_data_skip is restore
    logs, before = ([log for log in each.state.log_history if "loss" in log] for each in (resumed, straight))
    assert logs == before
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_run_is_resumed_twice_in_one_epoch(whole: tuple[Path, Mine], tmp_path: Path) -> None:
    folder, straight = whole
    first = _trainer(tmp_path / "first", max_steps=6, lr_scheduler_type="constant")
    second = _trainer(tmp_path / "second", lr_scheduler_type="constant")
    first.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-6"))
    assert [rows for rows, _ in first.seen + second.seen] == [rows for rows, _ in straight.seen[6:]]


def test_a_checkpoint_of_the_last_step_trains_nothing_more(tmp_path: Path) -> None:
    straight = _trainer(tmp_path, max_steps=5, save_steps=5)
    straight.train()
    assert _global(straight.seen) == [_plan().batch(number).tolist() for number in range(5)]
    again = _trainer(tmp_path, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert "seen" not in again.__dict__
    assert again.state.global_step == 5


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"mode": "pool", "steps": 7, "pacing": Pacing(kind="linear", start=0.2), "stages": None}, {"max_steps": 16}),
        ({"stages": None, "schedule": "folded"}, {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}),
        ({"later_epochs": "shuffle"}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
        (
            {},
            {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "save_strategy": "epoch",
                "logging_steps": 3,
            },
        ),
        (
            {"batch_size": None, "token_budget": 24, "lengths": [LENGTH] * N},
            {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 1},
        ),
    ],
    ids=["pool", "workers", "persistent", "no accumulation", "by tokens"],
)
def test_every_kind_of_plan_and_of_loading_resumes_exactly(
    tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    plan = _plan(**settings)
    steps = options.get("max_steps", 2 * plan.n_batches)
    straight = _trainer(tmp_path / "straight", plan, **{"save_steps": 9, **options})
    straight.train()
    micro = straight.args.gradient_accumulation_steps
    expected = [plan.batch(step % plan.n_batches, step // plan.n_batches).tolist() for step in range(steps)]
    assert _global(straight.seen, micro) == expected
    at = N_BATCHES if options.get("save_strategy") == "epoch" else 9
    resumed = _trainer(tmp_path / "resumed", plan, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{at}"))
    assert resumed.seen == straight.seen[at * micro :]


def test_evaluation_and_the_best_model_do_not_disturb_the_order(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "load_best_model_at_end": True,
    }
    straight, resumed = (
        _trainer(tmp_path / name, evaluate=True, **options, per_device_eval_batch_size=16) for name in ("one", "two")
    )
    straight.train()
    assert _global(straight.seen) == [
        _plan().batch(s % N_BATCHES, s // N_BATCHES).tolist() for s in range(2 * N_BATCHES)
    ]
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
    assert resumed.seen == straight.seen[12:]
    assert resumed.state.best_metric == straight.state.best_metric


def test_logs_say_stage_share_and_mean_difficulty(tmp_path: Path) -> None:
    plan = _plan(stages=4, pacing=Pacing(kind="linear", start=0.3), unscored="first")
    reported: list[dict[str, Any]] = []

    class Target(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(copy.deepcopy(logs))

    trainer = _trainer(tmp_path, plan, logging_steps=4, save_strategy="no", num_train_epochs=1)
    trainer.add_callback(Target())
    trainer.train()
    losses = [logs for logs in reported if "loss" in logs]
    assert len(losses) == 2
    for count, logs in enumerate(losses, 1):
        rows = np.concatenate([plan.batch(number) for number in range(4 * count - 4, 4 * count)])
        assert logs["curriculum/stage"] == plan.stage(4 * count - 1)
        assert logs["curriculum/share"] == plan.share(4 * count - 1)
        assert logs["curriculum/difficulty"] == pytest.approx(
            np.nanmean(_difficulty()[rows].astype(np.float64)), rel=1e-12
        )
    assert not any(name.startswith("curriculum/") for name in reported[-1])  # the summary at the end has no loss
    assert losses[0]["curriculum/difficulty"] < losses[1]["curriculum/difficulty"]


def test_a_mixin_works_on_another_trainer_and_on_a_plain_list(tmp_path: Path) -> None:
    class Other(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.losses = getattr(self, "losses", 0) + 1
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Mixed(Recorded, CurriculumMixin, Other):
        seen: list[Step]
        losses: int

    plan = _plan(data=_rows()).save(tmp_path / "plan")
    trainer = Mixed(_model(), _arguments(tmp_path, max_steps=3), curriculum=plan.folder, train_dataset=_rows())
    trainer.train()
    assert _global(trainer.seen) == [plan.batch(number).tolist() for number in range(3)]
    assert trainer.losses == 6
    trainer.train()  # a second run starts again
    assert _global(trainer.seen)[3:] == _global(trainer.seen)[:3]


def test_a_checkpoint_taken_before_the_step_is_finished_repeats_that_step(tmp_path: Path) -> None:
    """transformers' just-in-time checkpoint on SIGTERM does that, with the batch of the step already taken."""

    class JustInTime(TrainerCallback):
        trainer: Mine

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                control.should_training_stop = True
                self.trainer._save_checkpoint(self.trainer.model, trial=None)

    stopped = _trainer(tmp_path, save_strategy="no")
    callback = JustInTime()
    callback.trainer = stopped
    stopped.add_callback(callback)
    stopped.train()
    resumed = _trainer(tmp_path, max_steps=7, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert _global(resumed.seen) == [_plan().batch(number).tolist() for number in range(4, 7)]


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"max_steps": 5}, "the last 6 steps of the curriculum are not trained on"),
        (
            {},
            {"max_steps": 15},
            "the last 7 steps of the curriculum are trained on 1 times, and the beginning 2 times",
        ),
        ({}, {"num_train_epochs": 1}, None),
        ({"later_epochs": "shuffle"}, {"max_steps": 15}, None),
        (
            {"mode": "pool", "steps": 4, "pacing": Pacing(kind="linear", start=0.2), "stages": None},
            {},
            "after 4 the pacing starts again with the easiest. To go through it once, set max_steps=4, or plan with steps=8",
        ),
    ],
)
def test_a_curriculum_that_is_not_completed_is_reported(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    options: dict[str, Any],
    message: str | None,
) -> None:
    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    trainer = _trainer(tmp_path, _plan(**settings), save_strategy="no", **options)
    trainer.add_callback(Enough())
    trainer.train()
    messages = [record.getMessage() for record in caplog.records if record.name == "sparsort"]
    assert len(messages) == (message is not None)
    assert message is None or message in messages[0]


# Difficulty that is measured while training


def test_measuring_online_leaves_the_losses_as_they_are(whole: tuple[Path, Mine], tmp_path: Path) -> None:
    class FirstEpoch(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    measured = _trainer(tmp_path, online=OnlineDifficulty(), save_strategy="no", evaluate=True)
    measured.add_callback(FirstEpoch())
    measured.train()
    measured.evaluate()
    assert measured.seen == whole[1].seen[: 2 * N_BATCHES]
    again = _trainer(tmp_path, online=OnlineDifficulty())
    with pytest.raises(SparsortError, match="cannot read an online curriculum"):
        again.train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))


# What is refused


def test_a_checkpoint_without_a_curriculum_is_refused(tmp_path: Path) -> None:
    plain = Trainer(
        _model(), _arguments(tmp_path, max_steps=2), train_dataset=_rows(), data_collator=default_data_collator
    )
    plain.train()
    with pytest.raises(SparsortError, match=r"without a curriculum.*from_pretrained"):
        _trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"seed": 8}, {}, "plan"),
        ({"stages": 2}, {}, "plan"),
        ({"batch_size": 8}, {"per_device_train_batch_size": 4}, "batch"),
    ],
)
def test_another_plan_is_refused(
    whole: tuple[Path, Mine], tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    trainer = _trainer(tmp_path, _plan(**settings), **options)
    with pytest.raises(SparsortError, match=message):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert "seen" not in trainer.__dict__
    assert trainer.args.ignore_data_skip is False


def test_other_data_is_refused(whole: tuple[Path, Mine], tmp_path: Path) -> None:
    rows = _rows()
    rows[0]["input_ids"] = rows[0]["input_ids"][::-1]
    with pytest.raises(SparsortError, match="input_ids"):
        _trainer(tmp_path, data=datasets.Dataset.from_list(rows)).train(str(whole[0] / "checkpoint-4"))
    with pytest.raises(SparsortError, match="40"):
        _trainer(tmp_path, data=datasets.Dataset.from_list(_rows(40))).train()


def test_a_position_that_does_not_belong_to_the_step_is_refused(whole: tuple[Path, Mine], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4"))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["global_step"] = 5
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    seal_checkpoint(checkpoint)
    with pytest.raises(SparsortError, match=r"step 5.*step 4.*earlier checkpoint"):
        _trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_same_global_batch_in_other_pieces_continues_in_the_same_order(
    whole: tuple[Path, Mine], tmp_path: Path, accumulation: int
) -> None:
    plan, per_device = _plan(batch_size=6), 6 // accumulation
    first = _trainer(
        tmp_path / "first", plan, max_steps=3, per_device_train_batch_size=3, gradient_accumulation_steps=2
    )
    first.train()
    options = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    second = _trainer(tmp_path / "second", plan, max_steps=8, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    found = _global(first.seen) + _global(second.seen, accumulation)
    assert found == [plan.batch(number % 7, number // 7).tolist() for number in range(8)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (12, 4, 2, 2),
            "give a global batch of 16; the plan has 12. Use per_device_train_batch_size=3 with gradient_acc",
        ),
        (
            (48, 8, 2, 4),
            "per_device_train_batch_size=6 with gradient_accumulation_steps=2, or make the plan with batch_size=64",
        ),
        ((32, 8, 1, 1), "per_device_train_batch_size=8 with gradient_accumulation_steps=4"),
        ((2, 8, 1, 2), "per_device_train_batch_size=1 with gradient_accumulation_steps=1"),
        ((10, 2, 1, 4), "10 does not divide among 4 processes: make the plan with batch_size=8"),
    ],
)
def test_arguments_of_another_global_batch_are_refused_with_those_that_fit(
    given: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(SparsortError) as error:
        check_global_batch(*given)
    assert message in str(error.value)
    check_global_batch(12, 3, 2, 2)


def test_the_trainer_refuses_what_it_cannot_do_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsortError, match=r"give a global batch of 8; the plan has 4"):
        _trainer(tmp_path, per_device_train_batch_size=4).train()
    asked = {"auto_find_batch_size": True, "train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}
    for name, value in {**asked, "accelerator_config": {"dispatch_batches": True}}.items():
        with pytest.raises(SparsortError, match=name if name in asked else "dispatch_batches=True"):
            _trainer(tmp_path, **{name: value}).train()
    with pytest.raises(SparsortError, match="there is no checkpoint nowhere"):
        _trainer(tmp_path).train(resume_from_checkpoint="nowhere")
    trainer = _trainer(tmp_path)
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    with pytest.raises(SparsortError, match="tensor parallelism over 2"):
        trainer.get_train_dataloader()
    trainer = _trainer(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(SparsortError, match="DataParallel"):
        trainer.get_train_dataloader()
    with pytest.raises(SparsortError, match="train_dataset"):
        Mine(_model(), _arguments(tmp_path), curriculum=_plan()).train()
    with pytest.raises(SparsortError, match="contains no curriculum plan"):
        Mine(_model(), _arguments(tmp_path), curriculum=tmp_path / "none", train_dataset=_rows())
