"""Checkpoints of transformers' Trainer: check them, choose the one to resume from, and delete old ones.

Contract: a checkpoint of sparsort is completed by a manifest of all its files (`storage.manifests`), which is written after
every process has written its part and before older checkpoints are deleted. Whatever is killed, and whenever, the newest complete
checkpoint is therefore still there. A checkpoint is checked before any part of it is used; damaged and incomplete checkpoints are
skipped in favour of the newest intact one. Files that are added to a checkpoint later are not damage.

Checkpoints of sparsort 0.1.0, and of trainers without a curriculum, have no manifest. They are checked as far as their content
allows: missing files, JSON that does not parse, headers of safetensors, and the CRC of every record of torch.save. Other damage
(a flipped bit in a weight) is not detected there. `trainer_state.json` of a newer checkpoint records that it has a manifest, so a
lost manifest does not turn it into a checkpoint of 0.1.0.
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
# A file that Trainer's JIT checkpoints contain while they are being written.
_PASSING = ("checkpoint-is-incomplete.txt",)
# The beginnings of the names of files with weights: safetensors, torch.save, and PEFT.
_WEIGHTS = ("model", "pytorch_model", "adapter_model")

# Codes that the first process broadcasts instead of a step: its checkpoint is damaged, or there is none.
_DAMAGED, _NONE = -1, -2


class NoCheckpointError(SparsortError, ValueError):
    """A folder has no checkpoint that training can resume from. It is a ValueError too, which is what Trainer raises."""


def seal_checkpoint(checkpoint: Path | str) -> None:
    """Write the manifest of a checkpoint, after every process has written its part, or after you changed a file on purpose.

    Raises:
        SparsortError: a file cannot be read, or the manifest cannot be written.
    """
    manifests.write_manifest(Path(checkpoint), skip=_PASSING)


def open_for_writing(checkpoint: Path) -> None:
    """Mark a checkpoint that will be overwritten as incomplete; Trainer writes `trainer_state.json` after all other files."""
    (checkpoint / _STATE).unlink(missing_ok=True)


def choose(
    requested: str | Path | bool | None, args: Any, *, may_be_missing: bool = False, needed: Collection[str] = ()
) -> tuple[Path | None, list[Path]]:
    """Choose the checkpoint that all processes resume from; the first process checks it for all.

    Args:
        requested: True for the newest intact checkpoint in `args.output_dir`, or a checkpoint; None or False for none.
        args: transformers' TrainingArguments.
        may_be_missing: whether the caller accepts that the checkpoint does not exist.
        needed: names of the files without which True skips a checkpoint, as if it were damaged.

    Returns:
        The checkpoint, or None if none was requested; and, in the first process, the newer checkpoints that are damaged.

    Raises:
        SparsortError: the checkpoint is damaged or does not exist; every process raises this.
    """
    if not requested:
        return None, []
    folder = Path(args.output_dir)
    skipped: list[Path] = []
    problem: SparsortError | None = None
    checkpoint = folder if requested is True else Path(requested)
    code = 0
    if args.process_index == 0:
        try:
            if requested is True:
                checkpoint, skipped = newest_intact(folder, needed)
                code = _step(checkpoint)
            elif checkpoint.is_dir() or not may_be_missing:
                check_checkpoint(checkpoint)
        except SparsortError as error:
            problem, code = error, _NONE if isinstance(error, NoCheckpointError) else _DAMAGED
    # All processes take part in the broadcast before any of them raises an error; otherwise the others would wait forever.
    code = _from_the_first(code, args.device)
    if problem is not None:
        raise problem
    if code < 0:
        kind = NoCheckpointError if code == _NONE else SparsortError
        raise kind(f"the first process found no intact checkpoint in {checkpoint}; its message says why.")
    if requested is True:
        checkpoint = folder / f"checkpoint-{code}"
    # The first process has checked the copy of its own node only.
    if args.save_on_each_node and args.local_process_index == 0 != args.process_index:
        check_checkpoint(checkpoint)
    return checkpoint, skipped


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not intact.

    Raises:
        SparsortError: the checkpoint is damaged or does not exist; the message describes the damage.
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


def newest_intact(folder: Path, needed: Collection[str] = ()) -> tuple[Path, list[Path]]:
    """The newest intact checkpoint of a folder with all the `needed` files, and the newer ones that are damaged.

    Warnings report the damaged ones.

    Raises:
        NoCheckpointError: the folder has no intact checkpoint.
    """
    problems: dict[Path, str] = {}
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        missing = (f"{name} is missing" for name in needed if not (checkpoint / name).is_file())
        problem = damage_of(checkpoint) or next(missing, None)
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
    """A description of the damage of a checkpoint; None if no damage can be detected."""
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
    """Delete the oldest checkpoints of a folder beyond a limit, as Trainer does, but only after the newest one is complete.

    Args:
        folder: the folder of the checkpoints.
        limit: the most checkpoints to keep; None or 0 for all.
        keep: checkpoints that are always kept: the newest, which is intact, and the best.
        first: checkpoints that are known to be damaged and are deleted before any other.
    """
    checkpoints = _checkpoints(folder)
    if not limit or limit < 0:
        return
    protected = {path.resolve() for path in keep}
    damaged = {path.resolve() for path in first}
    candidates = [path for path in checkpoints if path.resolve() not in protected]
    # Sort by time, as Trainer does: a run that resumed from an earlier step writes newer checkpoints with smaller steps.
    candidates.sort(key=lambda path: (path.resolve() not in damaged, path.stat().st_mtime_ns, _step(path)))
    for path in candidates[: max(0, len(checkpoints) - max(limit, len(protected)))]:
        shutil.rmtree(path, ignore_errors=True)


def _from_the_first(number: int, device: Any) -> int:
    """Broadcast the number of the first process to every process."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    shared = torch.tensor([number], device=device)
    distributed.broadcast(shared, 0)
    return int(shared[0])


def _checkpoints(folder: Path) -> list[Path]:
    paths = folder.glob("checkpoint-*")
    return [path for path in paths if path.name.removeprefix("checkpoint-").isdecimal() and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _own_state(state: Any) -> dict[str, Any]:
    """The state of the curriculum's callback; empty for a checkpoint of another trainer, or of several curricula."""
    try:
        return dict(state["stateful_callbacks"]["CurriculumCallback"]["attributes"])
    except (KeyError, TypeError, ValueError):
        return {}


def _contradictions(checkpoint: Path, state: Any, own: dict[str, Any]) -> Iterator[str]:
    """Signs of damage in a checkpoint without a manifest."""
    from transformers import TrainerState

    try:
        step = TrainerState(**state).global_step
    except (TypeError, ValueError) as error:
        yield f"{_STATE} is not what Trainer writes ({error})"
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

    # DeepSpeed writes weights and optimizer into a folder of its own.
    deepspeed = has("global_step")
    if not has(*_WEIGHTS) and not deepspeed and not any(checkpoint.glob("*/adapter_model.*")):
        yield "its weights are missing"
    for index in checkpoint.glob("*.index.json"):
        try:
            shards = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (KeyError, TypeError, AttributeError, ValueError):
            yield f"{index.name} is not an index of weights"
            continue
        for shard in sorted(shards - set(names)):
            yield f"{shard} is missing"
    has_optimizer = has("optimizer") or any(name.endswith("-optimizer.pt") for name in names) or deepspeed
    # A checkpoint with weights alone was written with save_only_model.
    if not (has_optimizer or has("scheduler", "rng_state")):
        return
    if not has_optimizer:
        yield "optimizer.pt is missing"
    if not has("scheduler.pt") and not deepspeed:
        yield "scheduler.pt is missing"
    processes = own.get("processes")
    ranks = range(processes) if isinstance(processes, int) else range(0)
    # A single process writes rng_state.pth, several ones write one file per rank.
    wanted = [f"rng_state_{rank}.pth" for rank in ranks] if len(ranks) > 1 else ["rng_state.pth"] * len(ranks)
    for name in wanted:
        if name not in names:
            yield f"{name} is missing"
    if not has("rng_state"):
        yield "the random state is missing"
