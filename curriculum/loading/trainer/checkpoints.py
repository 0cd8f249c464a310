"""Checkpoints that transformers' Trainer writes: which one is intact, which one to resume from, which ones to delete.

Contract: a checkpoint of ours is finished by a manifest of all its files (`storage.manifests`), written when every process
has written its part and before older checkpoints are deleted. So at any time, whatever is killed, the newest checkpoint that
was finished is still there. A checkpoint is checked before anything of it is used, and one that is damaged or was not finished
is passed over for the newest one that is intact. Files that are added to a checkpoint later are no damage.

Checkpoints of sparsort 0.1.0, and of trainers without a curriculum, have no manifest. They are checked as far as their content
allows: the files that belong together, JSON that parses, the headers of safetensors, and the CRC of every record that
torch.save writes. Other damage (a bit in a weight) is not found there. `trainer_state.json` of a newer checkpoint says that it
has a manifest, so losing the manifest does not turn it into a checkpoint of 0.1.0.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.storage import manifests
from sparsort.storage.integrity import parse_json

_LOG = logging.getLogger("sparsort")
_STATE = "trainer_state.json"
# Trainer's JIT checkpoints have it while they are written.
_PASSING = ("checkpoint-is-incomplete.txt",)
_WEIGHTS = ("model", "pytorch_model", "adapter_model")

# Codes that the first process broadcasts instead of a step.
_DAMAGED, _NONE = -1, -2


class NoCheckpointError(SparsortError):
    """A folder has no checkpoint that training could resume from."""


def seal_checkpoint(checkpoint: Path | str) -> None:
    """Write the manifest of a checkpoint: when every process has written its part, or when you changed a file on purpose.

    Raises:
        SparsortError: a file cannot be read, or the disk refuses.
    """
    manifests.write_manifest(Path(checkpoint), skip=_PASSING)


def open_for_writing(checkpoint: Path) -> None:
    """Mark a checkpoint that is about to be written over as unfinished: Trainer writes `trainer_state.json` after the rest."""
    (checkpoint / _STATE).unlink(missing_ok=True)


def choose(
    asked: str | Path | bool | None, args: Any, *, may_be_missing: bool = False
) -> tuple[Path | None, list[Path]]:
    """The checkpoint that all processes resume from; the first one checks it for all.

    Args:
        asked: True for the newest intact one in `args.output_dir`, or a checkpoint.
        args: transformers' TrainingArguments.
        may_be_missing: whether the caller goes without a checkpoint that is not there.

    Returns:
        The checkpoint, None where nothing was asked for; and, in the first process, newer ones that are damaged.

    Raises:
        SparsortError: it is damaged, or there is none; every process raises it.
    """
    if not asked:
        return None, []
    folder = Path(args.output_dir)
    passed_over: list[Path] = []
    problem: SparsortError | None = None
    found = folder if asked is True else Path(asked)
    code = 0
    if args.process_index == 0:
        try:
            if asked is True:
                found, passed_over = newest_intact(folder)
                code = _step(found)
            elif found.is_dir() or not may_be_missing:
                check_checkpoint(found)
        except SparsortError as error:
            problem, code = error, _NONE if isinstance(error, NoCheckpointError) else _DAMAGED
    code = _from_the_first(code, args.device)
    if problem is not None:
        raise problem
    if code < 0:
        kind = NoCheckpointError if code == _NONE else SparsortError
        raise kind(f"the first process found no intact checkpoint in {found}; its message says why.")
    if asked is True:
        found = folder / f"checkpoint-{code}"
    if args.save_on_each_node and args.local_process_index == 0 != args.process_index:
        check_checkpoint(found)  # this node's own copy
    return found, passed_over


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not intact.

    Raises:
        SparsortError: with what is wrong.
    """
    if not checkpoint.is_dir():
        raise SparsortError(
            f"there is no checkpoint {checkpoint}. Give a folder that training wrote, or resume_from_checkpoint=True for the "
            "newest intact one in output_dir."
        )
    if problem := damage_of(checkpoint):
        raise SparsortError(
            f"{checkpoint} is damaged: {problem}. Use another checkpoint; resume_from_checkpoint=True takes the newest intact "
            "one. If you changed one of its files on purpose, call seal_checkpoint on it (in "
            "sparsort.curriculum.loading.trainer.checkpoints)."
        )


def newest_intact(folder: Path) -> tuple[Path, list[Path]]:
    """The newest intact checkpoint of a folder, and the newer ones that are not, which are reported as warnings.

    Raises:
        NoCheckpointError: there is none.
    """
    problems: dict[Path, str] = {}
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        problem = damage_of(checkpoint)
        if problem is None:
            for damaged, why in problems.items():
                _LOG.warning(
                    "%s is damaged and is passed over: %s. Training resumes from %s.", damaged, why, checkpoint
                )
            return checkpoint, list(problems)
        problems[checkpoint] = problem
    reasons = "".join(f" {damaged.name} is damaged: {why}." for damaged, why in problems.items())
    raise NoCheckpointError(
        f"there is no intact checkpoint to resume from in {folder}.{reasons} Train from the start, without "
        "resume_from_checkpoint."
    )


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is intact as far as can be known."""
    if (checkpoint / manifests.FILE).exists():
        return manifests.damage_in(checkpoint)
    try:
        state = parse_json((checkpoint / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it was not written completely, as {_STATE} is missing"
    except (OSError, ValueError) as error:
        return f"{_STATE} cannot be read ({error})"
    own = _own_state(state)
    if own.get("manifest"):
        return f"it was not written completely, or lost its {manifests.FILE}"
    try:
        return next(_contradictions(checkpoint, state, own), None)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror or error})"


def rotate(folder: Path, limit: int | None, *, keep: Collection[Path], first: Collection[Path]) -> None:
    """Delete the oldest checkpoints of a folder that are beyond a limit, as Trainer does, but after the newest was finished.

    Args:
        folder: of the checkpoints.
        limit: how many may stay; None or 0: all.
        keep: those that stay in any case: the newest, which is intact, and the best.
        first: those that are known to be damaged and go before any other.
    """
    found = _checkpoints(folder)
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in keep}
    damaged = {path.resolve() for path in first}
    going = [path for path in found if path.resolve() not in kept]
    # By time, as Trainer: a run that resumed from an earlier step comes after what it found.
    going.sort(key=lambda path: (path.resolve() not in damaged, path.stat().st_mtime_ns, _step(path)))
    for path in going[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def _from_the_first(number: int, device: Any) -> int:
    """The number that the first process has, in every process."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    shared = torch.tensor([number], device=device)
    distributed.broadcast(shared, 0)
    return int(shared[0])


def _checkpoints(folder: Path) -> list[Path]:
    found = folder.glob("checkpoint-*")
    return [path for path in found if path.name.removeprefix("checkpoint-").isdecimal() and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _own_state(state: Any) -> dict[str, Any]:
    """What the callback of the curriculum wrote; empty in a checkpoint of another trainer, or of several curricula."""
    try:
        return dict(state["stateful_callbacks"]["CurriculumCallback"]["attributes"])
    except (KeyError, TypeError, ValueError):
        return {}


def _contradictions(checkpoint: Path, state: Any, own: dict[str, Any]) -> Iterator[str]:
    """What cannot be in a whole checkpoint without a manifest."""
    from transformers import TrainerState

    try:
        step = TrainerState(**state).global_step
    except (TypeError, ValueError) as error:
        yield f"{_STATE} holds other things than Trainer writes ({error})"
        return
    if checkpoint in _checkpoints(checkpoint.parent) and step != _step(checkpoint):
        yield f"{_STATE} is of step {step!r}"
    yield from _missing(checkpoint, own)
    if problem := manifests.unreadable_in(checkpoint):
        yield problem


def _missing(checkpoint: Path, own: dict[str, Any]) -> Iterator[str]:
    names = [path.name for path in checkpoint.iterdir()]

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in names)

    deepspeed = has("global_step")
    if not has(*_WEIGHTS) and not deepspeed and not any(checkpoint.glob("*/adapter_model.*")):
        yield "its weights are missing"
    for index in checkpoint.glob("*.index.json"):
        try:
            shards = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (KeyError, TypeError, AttributeError, ValueError):
            yield f"{index.name} is no index of weights"
            continue
        for shard in sorted(shards - set(names)):
            yield f"{shard} is missing"
    has_optimizer = has("optimizer") or any(name.endswith("-optimizer.pt") for name in names) or deepspeed
    if not (has_optimizer or has("scheduler", "rng_state")):
        return  # save_only_model
    if not has_optimizer:
        yield "optimizer.pt is missing"
    if not has("scheduler.pt") and not deepspeed:
        yield "scheduler.pt is missing"
    processes = own.get("processes")
    ranks = range(processes) if isinstance(processes, int) else range(0)
    wanted = [f"rng_state_{rank}.pth" for rank in ranks] if len(ranks) > 1 else ["rng_state.pth"] * len(ranks)
    for name in wanted:
        if name not in names:
            yield f"{name} is missing"
    if not has("rng_state"):
        yield "the random state is missing"
