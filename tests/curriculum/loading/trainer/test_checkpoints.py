"""Checkpoints of training: damage of any kind is found before anything of it is used, and an intact one is always left."""

from __future__ import annotations

import json
import logging
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.checkpoints import damage_of, newest_intact, seal_checkpoint
from sparsort.curriculum.loading.trainer.trainer import CurriculumMixin, CurriculumTrainer, checkpoints
from sparsort.errors import SparsortError
from sparsort.storage import manifests

Damages = Callable[[Path], Iterator[str]]
N, BATCH = 24, 4
MANIFEST = manifests.FILE


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _trainer(folder: Path, kind: type = CurriculumTrainer, *, evaluate: bool = False, **options: Any) -> Any:
    tokens = np.random.default_rng(0).integers(0, 32, (N, 5)).tolist()
    rows = datasets.Dataset.from_list([{"id": str(n), "input_ids": row, "labels": row} for n, row in enumerate(tokens)])
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    defaults: dict[str, Any] = {
        **{"per_device_train_batch_size": BATCH, "max_steps": 4, "save_steps": 1, "learning_rate": 0.01, "seed": 3},
        **{"logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True},
    }
    return kind(
        LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_dropout=0.3, **size)),
        TrainingArguments(str(folder), **{**defaults, **options}),
        curriculum=plan_curriculum(np.arange(N) * 1.0, ids=[str(n) for n in range(N)], batch_size=BATCH),
        train_dataset=rows,
        eval_dataset=rows if evaluate else None,
        data_collator=default_data_collator,
    )


def _weights(trainer: Any) -> dict[str, bytes]:
    return {name: weight.numpy().tobytes() for name, weight in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Checkpoints after 1 to 4 steps, and the weights after the last."""
    folder = tmp_path_factory.mktemp("whole")
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        trainer = _trainer(folder)
        trainer.train()
    random.setstate(python)
    np.random.set_state(numpy)
    return folder, _weights(trainer)


@pytest.fixture
def run(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    """A copy of the run's checkpoints after 2 and 3 steps."""
    for step in (2, 3):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def _as_before(checkpoint: Path) -> None:
    """Turn a checkpoint into what sparsort 0.1.0 wrote."""
    (checkpoint / MANIFEST).unlink()
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    del state["stateful_callbacks"]["CurriculumCallback"]["attributes"]["manifest"]
    path.write_text(json.dumps(state), encoding="utf-8")


def test_any_damage_to_any_file_is_found(run: Path, damages: Damages) -> None:
    checkpoint = run / "checkpoint-3"
    assert damage_of(checkpoint) is None
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST} <= {
        path.name for path in paths
    }
    for path in paths:
        before = path.read_bytes()
        for what in damages(path):
            if path.name == MANIFEST and path.exists() and path.read_bytes().split() == before.split():
                continue  # the line break at its end
            assert damage_of(checkpoint), (path.name, what)
    assert newest_intact(run) == (checkpoint, [])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_training_falls_back_to_the_newest_intact_checkpoint_and_says_so(
    name: str, whole: tuple[Path, dict[str, bytes]], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[:-40])
    trainer = _trainer(run, save_strategy="no")
    with caplog.at_level(logging.WARNING, "sparsort"):
        trainer.train(resume_from_checkpoint=True)
    (warning,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert warning.startswith(
        f"{run / 'checkpoint-3'} is damaged and is passed over: {name} is not as it was written: it has"
    )
    assert warning.endswith(f"Training resumes from {run / 'checkpoint-2'}.")
    assert _weights(trainer) == whole[1]


def test_a_damaged_checkpoint_that_is_named_is_refused(run: Path) -> None:
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(
        SparsortError, match=r"checkpoint-3 is damaged: optimizer.pt is not as it was written: it is missing"
    ):
        _trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    with pytest.raises(SparsortError, match="there is no checkpoint"):
        _trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-9"))


def test_without_an_intact_checkpoint_every_reason_is_given(run: Path) -> None:
    (run / "checkpoint-3" / MANIFEST).unlink()
    (run / "checkpoint-2" / "rng_state.pth").unlink()
    with pytest.raises(
        SparsortError,
        match=r"no intact checkpoint .* checkpoint-3 is damaged: it was not written completely, or lost its "
        r"sparsort-manifest.json. checkpoint-2 is damaged: rng_state.pth .* it is missing. Train from the start",
    ):
        _trainer(run).train(resume_from_checkpoint=True)


def test_a_file_that_was_added_is_no_damage_and_one_changed_on_purpose_is_listed_again(run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    (checkpoint / "README.md").write_text("The best one.", encoding="utf-8")
    assert damage_of(checkpoint) is None
    (checkpoint / "config.json").write_text("{}", encoding="utf-8")
    assert damage_of(checkpoint)
    seal_checkpoint(checkpoint)
    assert damage_of(checkpoint) is None


def test_a_checkpoint_without_digests_is_used_if_nothing_contradicts_it(
    whole: tuple[Path, dict[str, bytes]], run: Path
) -> None:
    _as_before(run / "checkpoint-3")
    trainer = _trainer(run, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert trainer._resumed_from is None
    assert trainer._damaged == []
    assert _weights(trainer) == whole[1]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_without_digests_must_be_consistent(name: str, run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    _as_before(checkpoint)
    path = checkpoint / name
    content = path.read_bytes()
    for end in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        assert damage_of(checkpoint), end
    path.unlink()
    assert damage_of(checkpoint)
    path.write_bytes(content)
    assert damage_of(checkpoint) is None


def test_a_bit_in_a_record_that_torch_saved_is_found_without_digests(run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    _as_before(checkpoint)
    path = checkpoint / "optimizer.pt"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
    # Beyond the record's own header, whose length differs.
    place = largest.header_offset + 30 + len(largest.filename) + 64 + largest.file_size // 2
    content[place] ^= 4
    path.write_bytes(content)
    assert "optimizer.pt cannot be read" in str(damage_of(checkpoint))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"global_step": 2}, "of step 2"),
        ({"globul_step": 3}, "is not what Trainer writes"),
        ([], "is not what Trainer writes"),
    ],
)
def test_a_state_that_trainer_did_not_write_is_found_without_digests(change: Any, problem: str, run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    _as_before(checkpoint)
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, **change} if change else change), encoding="utf-8")
    assert problem in str(damage_of(checkpoint))


def test_a_shard_that_is_missing_is_found_without_digests(run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    _as_before(checkpoint)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    (checkpoint / "model.safetensors").rename(checkpoint / shards["a"])
    assert damage_of(checkpoint) == f"{shards['b']} is missing"


def test_older_checkpoints_are_deleted_after_the_newest_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a limit of one: a kill at any time leaves an intact checkpoint."""
    deleted = []

    def delete(path: Path, **_: Any) -> None:
        newest, _ = newest_intact(tmp_path)
        assert int(newest.name[-1]) == int(path.name[-1]) + 1
        deleted.append(path.name)
        remove(path)

    remove = shutil.rmtree
    monkeypatch.setattr(checkpoints.shutil, "rmtree", delete)
    trainer = _trainer(tmp_path, save_total_limit=1)
    trainer.train()
    assert deleted == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert trainer.args.save_total_limit == 1


def test_a_kill_before_the_manifest_leaves_the_checkpoint_before(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-3":
            raise KeyboardInterrupt
        seal_checkpoint(checkpoint)

    killed = _trainer(tmp_path, save_total_limit=1)
    monkeypatch.setattr(checkpoints, "seal_checkpoint", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    monkeypatch.undo()
    assert newest_intact(tmp_path) == (tmp_path / "checkpoint-2", [tmp_path / "checkpoint-3"])
    trainer = _trainer(tmp_path, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert _weights(trainer) == whole[1]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_checkpoint_that_is_half_written_over_is_not_used(run: Path) -> None:
    checkpoints.open_for_writing(run / "checkpoint-3")
    assert newest_intact(run)[0] == run / "checkpoint-2"
    for checkpoint in run.iterdir():
        (checkpoint / MANIFEST).unlink()
    checkpoints.open_for_writing(run / "checkpoint-2")
    assert "trainer_state.json is missing" in str(damage_of(run / "checkpoint-2"))


def test_damaged_checkpoints_are_deleted_before_intact_ones(run: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    shutil.copytree(whole[0] / "checkpoint-4", run / "checkpoint-9")
    (run / "checkpoint-9" / "optimizer.pt").unlink()
    trainer = _trainer(run, save_total_limit=3)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_damaged_checkpoint_that_is_written_again_is_not_deleted_as_damaged(run: Path) -> None:
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    trainer = _trainer(run, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert [damage_of(path) for path in run.glob("checkpoint-*")] == [None, None]


def test_the_best_checkpoint_stays_and_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = _trainer(tmp_path, evaluate=True, metric_for_best_model="loss", greater_is_better=True, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert damage_of(best) is None
    weights = best / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SparsortError, match=r"is damaged: model.safetensors .* its content has changed"):
        trainer._load_best_model()


def test_weights_alone_are_a_whole_checkpoint(tmp_path: Path) -> None:
    _trainer(tmp_path, save_only_model=True, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists()
    assert damage_of(checkpoint) is None
    _as_before(checkpoint)
    assert damage_of(checkpoint) is None


def test_what_is_pushed_to_the_hub_has_its_manifest(tmp_path: Path) -> None:
    class Hub(Trainer):  # type: ignore[misc]
        pushed: list[bool]

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            self.pushed.append(damage_of(Path(checkpoint_folder)) is None)

    class Mine(CurriculumMixin, Hub):
        pass

    trainer = _trainer(tmp_path, Mine, max_steps=2)
    trainer.pushed = []
    trainer.args.push_to_hub = True
    trainer.train()
    assert trainer.pushed == [True, True]
