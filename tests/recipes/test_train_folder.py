"""The folder of a training run: whatever changes in it is found before it is used, and training makes again what it can."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import app
from sparsort.recipes.train import folder as train_folder
from sparsort.recipes.train.train import TrainResult, train
from sparsort.scoring.loading.demo_model import load_tokenizer
from sparsort.storage import integrity, manifests

Damages = Callable[[Path], Iterator[str]]
REVERSED = Path(__file__).parents[1] / "data" / "plan_reversed"
ROWS = [{"text": f"{n} and {n} are {2 * n}", "id": f"r{n:03d}"} for n in range(12)]
OPTIONS: dict[str, Any] = {
    "curriculum": {"schedule": "shuffle", "batch_size": 4},
    **{"max_length": 16, "save_steps": 1, "eval_share": 0.0, "lr_schedule": "constant", "seed": 5},
}


def _train(out: Path, **more: Any) -> TrainResult:
    return train(ROWS, "{text}", out=out, **{**OPTIONS, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    _train(out)
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _as_before(run: Path) -> None:
    """Turn a finished run into what sparsort 0.1.0 wrote."""
    for name in ("run.json", "result.json"):
        found = json.loads((run / name).read_text(encoding="utf-8"))
        for key in ("digest", "files"):
            found.pop(key, None)
        if name == "run.json":
            found["version"] = 1
        else:
            del found["format"], found["version"]
        (run / name).write_text(json.dumps(found), encoding="utf-8")
    (run / "model" / manifests.FILE).unlink()
    for path in (run / "tokens").glob("*.json"):
        path.unlink()


def _same_json(path: Path, before: bytes) -> bool:
    """Whether a change is one of white space alone."""
    return path.exists() and path.read_bytes().split() == before.split()


def test_damage_to_a_finished_run_is_refused(run: Path, damages: Damages) -> None:
    paths = [run / "run.json", run / "result.json", run / "history.jsonl", *sorted((run / "model").iterdir())]
    tried = 0
    for path in paths:
        before = path.read_bytes()
        for what in damages(path):
            if _same_json(path, before) or not (path.exists() or path.parent.name == "model"):
                continue  # a run without run.json or result.json is one that has not begun, or not ended
            with pytest.raises(SparsortError) as error:
                _read(run, f"{path.name}: {what}")
            assert "out (--out)" in str(error.value) or "run the same command again" in str(error.value)
            tried += 1
    assert tried > 50
    _read(run, None)


def _read(run: Path, failing: str | None) -> None:
    train_folder.compare(run, {})
    assert train_folder.result_of(run) is not None
    if failing is not None:
        pytest.fail(failing)


def test_a_finished_run_whose_model_has_changed_is_refused_and_made_again_as_the_message_says(
    run: Path, whole: Path
) -> None:
    weights = run / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        SparsortError, match=r"model is damaged: model.safetensors .* Delete .*result.json and run the same"
    ):
        _train(run)
    (run / "result.json").unlink()
    result = _train(run)
    assert (result.resumed, result.steps) == (3, 3)
    for name in ("model/model.safetensors", "history.jsonl", "result.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_of_the_version_before_is_taken_up_again(run: Path, whole: Path) -> None:
    _as_before(run)
    finished = _train(run)
    assert finished.resumed == 3
    (run / "result.json").unlink()
    assert _train(run).loss == finished.loss
    assert (run / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def _digest_with_template(tokenizer: Any, texts: list[str]) -> str:
    """Of training texts, as runs recorded it while a tokenizer's hash always included the chat template."""
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    known = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template) + shown
    found = f"1 sha256:{hashlib.sha256(known.encode()).hexdigest()} {OPTIONS['max_length']}".encode()
    for text in texts:
        found += len(text.encode()).to_bytes(8, "little") + text.encode()
    return hashlib.blake2b(found, digest_size=16).hexdigest()


def test_a_run_that_recorded_the_chat_template_of_plain_texts_is_taken_up_again(
    make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out, model = tmp_path / "run", str(make_tiny_model("llama"))
    held = [{"text": f"held {n} and {n}"} for n in range(3)]
    more: dict[str, Any] = {"model": model, "eval_data": held, "max_steps": 2}
    _train(out, **more)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    run.pop("digest")
    tokenizer = load_tokenizer(model)
    for name, rows in (("rows", ROWS), ("eval_rows", held)):
        earlier = _digest_with_template(tokenizer, [row["text"] for row in rows])
        assert earlier != run[name]
        for path in (out / "tokens").glob(f"tokens-{run[name]}*"):
            path.unlink()
        run[name] = earlier
    (out / "run.json").unlink()
    integrity.write_sealed(out / "run.json", run)
    for path in (out / "result.json", out / "model" / manifests.FILE):
        path.unlink()
    assert _train(out, **more).resumed == 2
    again = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert {name: again[name] for name in run} == run
    assert sorted(path.stem for path in (out / "tokens").glob("*.arrow")) == sorted(
        f"tokens-{run[name]}" for name in ("rows", "eval_rows")
    )
    (out / "result.json").unlink()
    with pytest.raises(SparsortError, match="it differs in the training texts"):
        train([*ROWS[:-1], {"text": "other", "id": "r011"}], "{text}", out=out, **{**OPTIONS, **more})


def test_a_result_of_the_version_before_is_held_to_what_it_says(run: Path) -> None:
    _as_before(run)
    text = (run / "result.json").read_text(encoding="utf-8")
    (run / "result.json").write_text(text.replace('"steps"', '"stepz"'), encoding="utf-8")
    with pytest.raises(SparsortError, match=r"result.json is damaged: it does not have the fields"):
        _train(run)
    (run / "result.json").write_text(text, encoding="utf-8")
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SparsortError, match=r"model is damaged: model.safetensors cannot be read"):
        _train(run)


def test_damaged_tokens_are_made_again(run: Path, damages: Damages, caplog: pytest.LogCaptureFixture) -> None:
    from sparsort.recipes.train.text import is_intact

    (path,) = (run / "tokens").glob("*.arrow")
    record = path.with_suffix(".json")
    assert is_intact(path)
    for damaged in (path, record):
        before = damaged.read_bytes()
        for what in damages(damaged):
            assert _same_json(damaged, before) or not is_intact(path), what
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    (run / "result.json").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sparsort"):
        _train(run)
    assert "is damaged: its content has changed since it was written. The texts are tokenised again." in caplog.text
    assert path.read_bytes() == content
    assert is_intact(path)
    tokens_written = path.stat().st_mtime_ns
    (run / "result.json").unlink()
    _train(run)
    assert path.stat().st_mtime_ns == tokens_written


def test_training_falls_back_to_the_checkpoint_before_a_damaged_one(
    run: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoints" / "checkpoint-3" / "optimizer.pt").unlink()
    (run / "result.json").unlink()
    with caplog.at_level(logging.WARNING, "sparsort"):
        result = _train(run)
    assert result.resumed == 2
    assert (
        "checkpoint-3 is damaged and is passed over: optimizer.pt is not as it was written: it is missing."
        in caplog.text
    )
    assert f"Training resumes from {run / 'checkpoints' / 'checkpoint-2'}." in caplog.text
    for name in ("model/model.safetensors", "history.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_without_an_intact_checkpoint_training_begins_again_and_says_so(
    run: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / manifests.FILE).unlink()
    (run / "result.json").unlink()
    with caplog.at_level(logging.WARNING, "sparsort"):
        assert _train(run).resumed == 0
    assert "no intact checkpoint" in caplog.text
    assert "Training begins at the first step." in caplog.text
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()


def test_a_plan_that_was_changed_after_saving_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """`order.npy` was reversed; everything else is as `sparsort plan` wrote it."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "row {n}", "id": "{n}"}}\n' for n in range(200)), encoding="utf-8")
    asked = ["train", data, "--text", "{text}", "--plan", REVERSED, "--out", tmp_path / "run"]
    result = CliRunner().invoke(app, [str(part) for part in asked])
    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert "plan_reversed is damaged: its arrays have changed since they were written." in told
    assert not (tmp_path / "run").exists()


def test_a_record_without_a_format_or_version_says_which_is_missing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model": "tiny"}')
    with pytest.raises(SparsortError, match=r"run\.json has no format and no version"):
        train_folder.compare(tmp_path, {"model": "tiny"})
