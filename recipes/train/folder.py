"""The folder of a training run: the record of its settings, which only the same run may resume, and its result.

Contract: `run.json` is written before training and records everything that determines a loss. It does not record how the work is
divided (the batch of a device, accumulation, processes, the interval between checkpoints). `result.json` is written last, so a
folder that has it is finished. Both files are whole or absent, and include a digest of themselves. `result.json` also records the
history and the manifest of the model, so that a later call on the finished run notices if one of these has changed.

Folders of version 1 have no digests: their files are checked as far as their content allows.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.storage import integrity, manifests
from sparsort.storage.files import disk_error, disk_errors
from sparsort.storage.locks import locked
from sparsort.terminal import interrupts

FORMAT, VERSION = "sparsort-train", 2
# A version without digests, which is still read.
_WITHOUT_DIGESTS = 1
_RUN, _RESULT = "run.json", "result.json"
_MODEL = "model"
# The fields of a result of version 1. They are the only thing to check it by.
_FIELDS = {"loss", "eval_loss", "steps", "rows", "eval_rows", "tokens", "parameters", "plan", "sparse", "notes"}
_RECORDED = ("history.jsonl", f"{_MODEL}/{manifests.FILE}")
_OTHER = "Choose another folder with out (--out)."
_AGAIN = "Delete {} and run the same command again: model and result are written again from the last checkpoint."
# The digests in the record, with the words for what they are digests of.
_DIGESTS = {
    "rows": "the training texts (rows, template, tokenizer or max_length)",
    "eval_rows": "the held-out texts",
    "plan": "the plan, because its scores, groups or lengths differ",
}


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder while the block runs.

    Raises:
        SparsortError: another process is training in the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    with locked(folder / ".lock", wait=False) as ours:
        if not ours:
            raise SparsortError(
                f"another process is training in {folder}. Wait for it, or choose another folder with out (--out)."
            )
        yield


def claim(folder: Path, settings: Mapping[str, Any], *, write: bool) -> None:
    """Record the settings of a run in its folder, or check that the folder has the same run.

    Args:
        folder: the folder of the run.
        settings: JSON values that determine the losses of the run.
        write: whether this process may write; other processes only compare.

    Raises:
        SparsortError: the folder has another run or something else, or the disk cannot be written.
    """
    if not compare(folder, settings) and write:
        integrity.write_sealed(folder / _RUN, {"format": FORMAT, "version": VERSION, **settings})


def recorded(folder: Path) -> dict[str, Any]:
    """The recorded settings of the run in the folder; empty if there is none.

    Raises:
        SparsortError: the record cannot be read, or has changed since it was written.
    """
    return _read(folder / _RUN, next_step=_OTHER) or {}


def compare(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder has a run with these settings, which may be only those that are known so far.

    Raises:
        SparsortError: the folder has another run.
    """
    record = recorded(folder)
    if not record:
        return False
    if absent := [name for name in ("format", "version") if record.get(name) is None]:
        raise SparsortError(
            f"{folder / _RUN} has no {' and no '.join(absent)}, so it is not the record of a training run. {_OTHER}"
        )
    if record["format"] != FORMAT or record["version"] not in (VERSION, _WITHOUT_DIGESTS):
        raise SparsortError(
            f"{folder / _RUN} is version {record['version']!r} of {record['format']!r}, and this sparsort writes "
            f"version {VERSION} of {FORMAT!r}. {_OTHER}"
        )
    # The record went through JSON, which has no tuples, for example.
    now = json.loads(json.dumps(settings))
    before = {name: record.get(name) for name in now}
    if before != now:
        raise SparsortError(
            f"{folder} has another run; it differs in {_differences(before, now)}. "
            "Choose another folder with out (--out), or run with the settings that it began with."
        )
    return True


def result_of(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run; None if the run is not finished.

    Raises:
        SparsortError: the result, the history or the model has changed since it was written.
    """
    path = folder / _RESULT
    next_step = _AGAIN.format(path)
    result = _read(path, next_step=next_step)
    if result is None:
        return None
    records = result.pop("files", None)
    if records is None and set(result) != _FIELDS:
        raise SparsortError(f"{path} is damaged: it does not have the fields that were written. {next_step}")
    for name, record in (records or {}).items():
        integrity.check_file(folder / name, record, next_step=next_step)
    model = folder / _MODEL
    if problem := manifests.unreadable_in(model) if records is None else manifests.damage_in(model):
        raise SparsortError(f"{model} is damaged: {problem}. {next_step}")
    return {name: value for name, value in result.items() if name not in ("format", "version", integrity.SEAL)}


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Mark the run as finished; call this after the model and the history are written."""
    files = {name: integrity.record_of(folder / name) for name in _RECORDED}
    integrity.write_sealed(folder / _RESULT, {"format": FORMAT, "version": VERSION, **result, "files": files})


@interrupts.held()
def save_model(folder: Path, model: Any, tokenizer: Any, weights: Mapping[str, Any]) -> None:
    """Write a model with its tokenizer for `from_pretrained`, whole or not at all.

    Args:
        folder: the folder of the model; a model that a stopped run left there is replaced.
        model: the model.
        tokenizer: its tokenizer.
        weights: the model's state, gathered from all processes.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with disk_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            manifests.write_manifest(temporary)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, now = _flat(before), _flat(now)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    settings = [f"{name} ({before.get(name)!r} there, {now.get(name)!r} now)" for name in names if name not in _DIGESTS]
    # A digest follows from the settings. If only digests differ, the data has changed.
    return ", ".join(settings or [_DIGESTS[name] for name in names])


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of the curriculum one by one."""
    curriculum = {f"curriculum {name}": value for name, value in settings.get("curriculum", {}).items()}
    return {**{name: value for name, value in settings.items() if name != "curriculum"}, **curriculum}


def _read(path: Path, *, next_step: str) -> dict[str, Any] | None:
    """The JSON object of a file, whose seal is checked if there must be one; None if there is no file."""
    try:
        record = integrity.parse_own_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). {next_step}") from error
    if not isinstance(record, dict):
        raise SparsortError(f"{path} is not a JSON object, which sparsort writes. {next_step}")
    # The version and the seal both mark a sealed file, so no single change removes both marks.
    if record.get("version") == VERSION or integrity.SEAL in record:
        integrity.check_seal(record, path, next_step=next_step)
    return record
