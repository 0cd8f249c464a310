"""The folder of a training run: what was asked for, so that only the same run goes on in it, and what came of it.

Contract: `run.json` is written before training and says everything that decides a loss; how the work is divided (batch of
a device, accumulation, processes, how often to save) is not in it. `result.json` is written last: a folder that has it is
finished. Both are whole or absent, and carry a digest of themselves. `result.json` also records what the run wrote, the history
and the manifest of the model, so that a finished run that is called again does not name files that have changed since.

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
_WITHOUT_DIGESTS = 1  # still read
_RUN, _RESULT = "run.json", "result.json"
_MODEL = "model"
# Of a result of version 1, which nothing else guards.
_FIELDS = {"loss", "eval_loss", "steps", "rows", "eval_rows", "tokens", "parameters", "plan", "sparse", "notes"}
_RECORDED = ("history.jsonl", f"{_MODEL}/{manifests.FILE}")
_OTHER = "Choose another folder with out (--out)."
_AGAIN = "Delete {} and run the same command again: model and result are written again from the last checkpoint."
_WHAT = {
    "rows": "the training texts (rows, template, tokenizer or max_length)",
    "eval_rows": "the held-out texts",
    "plan": "the plan, as its scores, groups or lengths are others",
}
# Follow from what else differs.
_DIGESTS = tuple(_WHAT)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder while the block runs.

    Raises:
        SparsortError: one is training there.
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


def claim(folder: Path, asked: Mapping[str, Any], *, write: bool) -> None:
    """Take a folder for a run, or take up the same run again.

    Args:
        folder: --out.
        asked: JSON values that decide the run.
        write: whether this process may write; the others only compare.

    Raises:
        SparsortError: the folder holds another run, something else, or the disk refuses.
    """
    if not compare(folder, asked) and write:
        integrity.write_sealed(folder / _RUN, {"format": FORMAT, "version": VERSION, **asked})


def recorded(folder: Path) -> dict[str, Any]:
    """What a run in the folder was asked for; empty without one.

    Raises:
        SparsortError: its record cannot be read, or has changed since it was written.
    """
    return _read(folder / _RUN, next_step=_OTHER) or {}


def compare(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a run is there; `asked` may be what is known so far of what is asked for.

    Raises:
        SparsortError: it is another run.
    """
    found = recorded(folder)
    if not found:
        return False
    if (found.get("format"), found.get("version")) not in ((FORMAT, VERSION), (FORMAT, _WITHOUT_DIGESTS)):
        raise SparsortError(
            f"{folder / _RUN} is version {found.get('version')!r} of {found.get('format')!r}, and this sparsort writes "
            f"version {VERSION} of {FORMAT!r}. Choose another folder with out (--out)."
        )
    now = json.loads(json.dumps(asked))
    before = {name: found.get(name) for name in now}
    if before != now:
        raise SparsortError(
            f"{folder} holds another run; it differs in {_differences(before, now)}. "
            "Choose another folder with out (--out), or run with the settings that it began with."
        )
    return True


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a finished run came to; None where it is not finished.

    Raises:
        SparsortError: the result, the history or the model has changed since it was written.
    """
    path = folder / _RESULT
    next_step = _AGAIN.format(path)
    found = _read(path, next_step=next_step)
    if found is None:
        return None
    records = found.pop("files", None)
    if records is None and set(found) != _FIELDS:
        raise SparsortError(f"{path} is damaged: it has other fields than were written. {next_step}")
    for name, record in (records or {}).items():
        integrity.check_file(folder / name, record, next_step=next_step)
    model = folder / _MODEL
    if problem := manifests.unreadable_in(model) if records is None else manifests.damage_in(model):
        raise SparsortError(f"{model} is damaged: {problem}. {next_step}")
    return {name: value for name, value in found.items() if name not in ("format", "version", integrity.SEAL)}


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Mark the run as finished, when model and history are written."""
    files = {name: integrity.record_of(folder / name) for name in _RECORDED}
    integrity.write_sealed(folder / _RESULT, {"format": FORMAT, "version": VERSION, **result, "files": files})


@interrupts.held()
def save_model(folder: Path, model: Any, tokenizer: Any, weights: Mapping[str, Any]) -> None:
    """Write a model with its tokenizer as transformers reads them, whole or not at all.

    Args:
        folder: where to; a model that a stopped run left there is replaced.
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


def _differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    before, now = _flat(found), _flat(asked)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    plain = [name for name in names if name not in _DIGESTS]
    told = [f"{name} ({before.get(name)!r} there, {now.get(name)!r} now)" for name in plain]
    # A digest follows from the settings: alone, it is the data that changed.
    return ", ".join(told or [_WHAT[name] for name in names])


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    curriculum = {f"curriculum {name}": held for name, held in value.get("curriculum", {}).items()}
    return {**{name: held for name, held in value.items() if name != "curriculum"}, **curriculum}


def _read(path: Path, *, next_step: str) -> dict[str, Any] | None:
    """A JSON object, with its seal where this version wrote it; None where there is no file."""
    try:
        found = integrity.parse_own_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). {next_step}") from error
    if not isinstance(found, dict):
        raise SparsortError(f"{path} is not what sparsort writes. {next_step}")
    # The version and the seal both mark a sealed file, so no single change removes both marks.
    if found.get("version") == VERSION or integrity.SEAL in found:
        integrity.check_seal(found, path, next_step=next_step)
    return found
