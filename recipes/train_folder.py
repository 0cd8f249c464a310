"""The folder of a training run: what was asked for, so that only the same run goes on in it, and what came of it.

Contract: `run.json` is written before training and says everything that decides a loss; how the work is divided (batch of
a device, accumulation, processes, how often to save) is not in it. `result.json` is written last: a folder that has it is
finished. Both are whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.files import disk_error, write_json
from sparsort.locks import locked

FORMAT, VERSION = "sparsort-train", 1
_RUN, _RESULT = "run.json", "result.json"
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
        write_json(folder / _RUN, {"format": FORMAT, "version": VERSION, **asked})


def compare(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a run is there; `asked` may be what is known so far of what is asked for.

    Raises:
        SparsortError: it is another run.
    """
    found = _read(folder / _RUN)
    if found is None:
        return False
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
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
    """What a finished run came to; None where it is not finished."""
    return _read(folder / _RESULT)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Mark the run as finished."""
    write_json(folder / _RESULT, dict(result))


def save_model(folder: Path, model: Any, tokenizer: Any, weights: Mapping[str, Any]) -> None:
    """Write a model with its tokenizer as transformers reads them, whole or not at all.

    Args:
        folder: where to; a model that a stopped run left there is replaced.
        weights: the model's state, gathered from all processes.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise disk_error(folder, error) from error


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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). Choose another folder with out (--out).") from error
    if not isinstance(found, dict):
        raise SparsortError(f"{path} is not what sparsort writes. Choose another folder with out (--out).")
    return found
