"""DifficultyMixin in TRL's real GRPOTrainer with a tiny model: layout, observed rewards, and resumes."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from sparsort import LengthScorer
from sparsort.curriculum.loading.online.difficulty_sampler import DifficultySampler
from sparsort.curriculum.loading.trainer.grpo_difficulty import DifficultyMixin
from sparsort.errors import SparsortError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOConfig, GRPOTrainer

N = 12
WORDS = ["[UNK]", "[PAD]", "[EOS]", *(f"n{place}" for place in range(N))]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class DifficultyGRPO(DifficultyMixin, GRPOTrainer):
    """GRPO that records what it generated for, and the loss of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generated: list[tuple[int, list[str]]] = []

    def _calculate_rewards(self, inputs: Any, prompts: Any, *args: Any) -> Any:
        self.generated.append((self._step, list(prompts)))
        return super()._calculate_rewards(inputs, prompts, *args)


def _reward(completions: list[str], **_: Any) -> list[float]:
    # Random completions of a tiny model pass about half of the time.
    return [float(int(text.split()[0].lstrip("n")) % 2 == 0) if text.split() else 0.0 for text in completions]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=1, eos_token_id=2, **size))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")


def _trainer(
    folder: Path, sampler: Any = None, rows: list[dict[str, Any]] | None = None, reward: Any = _reward, **options: Any
) -> DifficultyGRPO:
    own = {name: options.pop(name) for name in ("pass_reward", "verify") if name in options}
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 3,
        "max_steps": 8,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **options,
    }
    return DifficultyGRPO(
        _model(),
        reward_funcs=reward,
        args=GRPOConfig(**given),
        train_dataset=datasets.Dataset.from_list(rows or [{"prompt": f"n{place}"} for place in range(N)]),
        processing_class=_tokenizer(),
        difficulty=DifficultySampler(np.arange(N), seed=1) if sampler is None else sampler,
        **own,
    )


def _losses(trainer: DifficultyGRPO) -> list[tuple[float, float | None]]:
    return [(entry["loss"], entry.get("reward")) for entry in trainer.state.log_history if "loss" in entry]


def test_groups_are_whole_and_their_rewards_are_observed(tmp_path: Path) -> None:
    sampler = DifficultySampler(np.arange(N), seed=1, half_life=None)
    observed: list[tuple[list[int], list[float]]] = []
    plain_observe = sampler.observe

    def observe(rows: Any, rewards: Any) -> None:
        observed.append((rows.tolist(), rewards.tolist()))
        plain_observe(rows, rewards)

    sampler.observe = observe  # type: ignore[method-assign]
    trainer = _trainer(tmp_path, sampler, save_strategy="no")
    trainer.train()
    assert sampler.block == 2
    assert len(observed) == 8
    for (rows, rewards), (_, prompts) in zip(observed, trainer.generated, strict=True):
        assert prompts == [f"n{row}" for row in rows]
        # Each prompt has its two generations next to each other, and the two prompts differ.
        assert rows[0] == rows[1] != rows[2] == rows[3]
        assert set(rewards) <= {0.0, 1.0}
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert [float(np.mean(rewards)) for _, rewards in observed] == pytest.approx(logged)
    assert (sampler.posterior()[0] + sampler.posterior()[1]).sum() > 2 * N


LAYOUTS = [
    {},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    {"num_iterations": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: ",".join(map(str, layout.values())) or "plain")
def test_a_resume_after_any_generation_batch_is_exact(layout: dict[str, Any], tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", **layout)
    whole.train()
    expected = _losses(whole)
    accumulation = layout.get("gradient_accumulation_steps", 1)
    for stop in (2, 6) if layout else (1, 3, 5, 6):
        resumed = _trainer(tmp_path / f"resumed-{stop}", **layout)
        resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{stop}")
        assert stop * accumulation % whole._repeats == 0
        assert resumed.generated == [each for each in whole.generated if each[0] >= stop * accumulation]
        assert _losses(resumed) == expected


def test_a_resume_inside_a_generation_batch_keeps_its_prompts(tmp_path: Path) -> None:
    layout = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    whole = _trainer(tmp_path, **layout)
    whole.train()
    # A generation batch lasts two steps, and step 3 is the first of the second batch.
    resumed = _trainer(tmp_path, **layout)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    steps = [step for step, _ in resumed.generated]
    assert steps == [6, 8]
    assert resumed.generated[0][1] == whole.generated[1][1]
    # The regenerated completions are not observed again, so the next block is the one that was drawn from the same rewards.
    assert resumed.generated[1][1] == whole.generated[2][1]


_RANK = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_grpo_difficulty as tests
trainer = tests._trainer(Path(sys.argv[2]), per_device_train_batch_size=2, max_steps=5, ddp_backend="gloo", save_strategy="no")
trainer.train()
a, b = trainer.difficulty.posterior()
result = {"prompts": [prompts for _, prompts in trainer.generated], "posterior": [a.tolist(), b.tolist()]}
Path(sys.argv[3]).write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_draw_the_same_groups_and_learn_the_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"}
        command = [
            sys.executable,
            "-c",
            _RANK,
            str(Path(__file__).parent),
            str(tmp_path / "out"),
            str(tmp_path / f"{rank}.json"),
        ]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait() for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["posterior"] == second["posterior"]
    assert sum(map(sum, first["posterior"])) > 2 * N
    for own, other in zip(first["prompts"], second["prompts"], strict=True):
        # Each process has one whole group of the generation batch.
        assert own[0] == own[1] != other[0] == other[1]


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match="12 rows and the sampler 5 prompts"):
        _trainer(tmp_path, DifficultySampler(5))
    with pytest.raises(SparsortError, match="draws 2 prompts together, but block=3"):
        _trainer(tmp_path, DifficultySampler(N, block=3))
    with pytest.raises(SparsortError, match="draws 2 blocks ahead, but lag=0"):
        _trainer(tmp_path, DifficultySampler(N, lag=0), gradient_accumulation_steps=2, steps_per_generation=1)

    class Plain(DifficultyMixin, Trainer):
        pass

    with pytest.raises(SparsortError, match="Plain generates no groups"):
        Plain(_model(), difficulty=DifficultySampler(N))

    with pytest.raises(SparsortError, match="Put the mixin first"):

        class Reversed(GRPOTrainer, DifficultyMixin):
            pass

    with pytest.raises(SparsortError, match=r"difficulty= must be a sampler, .* not ndarray"):
        _trainer(tmp_path, np.arange(N))
    for wrong in ("rew", 1, -1):
        with pytest.raises(SparsortError, match=f"pass_reward={wrong!r} is not the position"):
            _trainer(tmp_path, pass_reward=wrong)
    with pytest.raises(SparsortError, match="generation batch has 16 distinct prompts, and there are only 12"):
        _trainer(tmp_path, per_device_train_batch_size=32)


def test_scores_of_other_rows_are_refused(tmp_path: Path) -> None:
    rows = [{"id": f"row {place}", "prompt": f"n{place}"} for place in range(N)]
    sampler = DifficultySampler(LengthScorer().score(rows, prompt="{prompt}"))
    _trainer(tmp_path, sampler, rows)
    swapped = [*rows[:4], rows[5], rows[4], *rows[6:]]
    with pytest.raises(SparsortError, match=r"row 4 of train_dataset has the id 'row 5', and .* have 'row 4' there"):
        _trainer(tmp_path, sampler, swapped)
    _trainer(tmp_path, sampler, swapped, verify=False)


def test_a_resume_with_other_data_or_another_cut_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    others = [{"prompt": f"n{N - 1 - place}"} for place in range(N)]
    with pytest.raises(SparsortError, match=r"not the data that .*checkpoint-1 was written for: .* values in prompt"):
        _trainer(tmp_path, rows=others).train(resume_from_checkpoint=checkpoint)
    _trainer(tmp_path, rows=others, verify=False, save_strategy="no").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(SparsortError, match="each generation batch was read 1 times, and now it is read 2 times"):
        _trainer(tmp_path, num_iterations=2).train(resume_from_checkpoint=checkpoint)


def test_a_sum_of_rewards_with_a_rounding_error_is_a_pass(tmp_path: Path) -> None:
    sampler = DifficultySampler(N, half_life=None)
    _trainer(
        tmp_path,
        sampler,
        reward=lambda completions, **_: [1.0000001] * len(completions),
        max_steps=2,
        save_strategy="no",
    ).train()
    next(sampler.blocks())
    assert sampler.posterior()[0].sum() > N
    too_large = _trainer(tmp_path, reward=lambda completions, **_: [1.001] * len(completions), save_strategy="no")
    with pytest.raises(SparsortError, match=r"a reward is 1\.001"):
        too_large.train()


def test_the_same_trainer_resumes_without_the_completions_of_another_generation_batch(tmp_path: Path) -> None:
    layout = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    trainer = _trainer(tmp_path, **layout)
    trainer.train()
    expected = trainer.generated[1:]
    trainer.generated = []
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # Without new completions, step 4 would train on those of the batch of steps 5 and 6.
    assert [step for step, _ in trainer.generated] == [6, 8]
    assert [prompts for _, prompts in trainer.generated] == [prompts for _, prompts in expected]


def test_a_checkpoint_has_the_sampler_before_older_ones_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    _trainer(tmp_path, max_steps=1).train()
    # The moment at which Trainer would delete the older checkpoint.
    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", kill)
    with pytest.raises(Killed):
        _trainer(tmp_path, max_steps=2, save_total_limit=1).train(resume_from_checkpoint=True)
    monkeypatch.undo()
    resumed = _trainer(tmp_path, max_steps=3, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in resumed.generated] == [2]


def test_a_checkpoint_without_the_sampler_is_refused_or_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _trainer(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "difficulty_sampler.safetensors").unlink()
    with pytest.raises(SparsortError, match="written without a DifficultySampler"):
        _trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # A kill while the weights are written leaves the sampler alone.
    (tmp_path / "checkpoint-3").mkdir()
    shutil.copy(tmp_path / "checkpoint-1" / "difficulty_sampler.safetensors", tmp_path / "checkpoint-3")
    resumed = _trainer(tmp_path, max_steps=2, save_strategy="no")
    with caplog.at_level(logging.WARNING, "sparsort"):
        resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in resumed.generated] == [1]
    warnings_given = " ".join(record.getMessage() for record in caplog.records)
    assert "trainer_state.json is missing" in warnings_given
    assert "difficulty_sampler.safetensors is missing" in warnings_given
