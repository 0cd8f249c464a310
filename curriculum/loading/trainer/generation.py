"""Trainers that generate completions for several steps at once (TRL's GRPO and RLOO): their layout, and what resuming needs.

Contract: the layout of the generation batches is read from the trainer's own `RepeatSampler`, so it is the one that this version
of TRL expects. A resumed run trains on the same completions as a run that was never stopped. For that, a checkpoint that was
written inside a generation batch also contains the completions of each process, in `completions-<rank>.safetensors`. At the
edge of a generation batch nothing has to be stored, because the next step generates.

TRL counts micro-batches in `_step`, generates if that is a multiple of steps_per_generation × num_iterations, and keeps the
completions in `_buffered_inputs`. It saves neither of them. If TRL resumes by itself, the count starts at 0, so completions are
generated in the middle of a generation batch, and the sampler starts with the order of epoch 0 in whatever epoch that is.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsort.curriculum.loading.loader.groups import Groups
from sparsort.errors import SparsortError
from sparsort.storage.files import write_atomically

_LOG = logging.getLogger("sparsort")
# Trainers with TRL's sampler, counter and buffer, each tested against the real class.
GROUPED = frozenset({"trl.trainer.grpo_trainer.GRPOTrainer", "trl.trainer.rloo_trainer.RLOOTrainer"})


def generates_in_groups(trainer: type) -> bool:
    """Whether a class of trainer is one of `GROUPED`, or is derived from one."""
    return any(f"{cls.__module__}.{cls.__qualname__}" in GROUPED for cls in trainer.__mro__)


def groups_of(sampler: Any) -> Groups:
    """The layout that a trainer's own `RepeatSampler` has.

    Raises:
        SparsortError: the trainer has another sampler.
    """
    try:
        return Groups(
            prompts=sampler.batch_size, num_generations=sampler.mini_repeat_count, repeats=sampler.repeat_count
        )
    except AttributeError:
        raise SparsortError(
            f"the trainer's sampler is a {type(sampler).__name__}, and a curriculum takes the layout of the generation batches "
            "from TRL's RepeatSampler. Use the GRPOTrainer or RLOOTrainer of TRL 1.16, with a map-style dataset."
        ) from None


def save_completions(folder: Path, slices: list[dict[str, Any]], *, rank: int, world_size: int) -> None:
    """Write the slices of completions that a process trains on in the rest of its generation batch.

    Args:
        folder: the checkpoint.
        slices: `_buffered_inputs` of the trainer: for each slice, tensors, lists of JSON values and None by name.
        rank, world_size: this process, and the number of processes.
    """
    tensors: dict[str, torch.Tensor] = {}
    others: list[dict[str, Any]] = []
    for number, each in enumerate(slices):
        others.append({name: value for name, value in each.items() if not isinstance(value, torch.Tensor)})
        # Cloned, because the slices are views of the same memory, which safetensors refuses.
        tensors |= {
            f"{number}.{name}": value.detach().cpu().contiguous().clone()
            for name, value in each.items()
            if isinstance(value, torch.Tensor)
        }
    metadata = {"world_size": str(world_size), "others": json.dumps(others)}
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(_file(folder, rank)) as path:
        save_file(tensors, path, metadata=metadata)


def load_completions(folder: Path, *, rank: int, world_size: int, device: torch.device) -> list[dict[str, Any]] | None:
    """Read what `save_completions` wrote; None, with a warning, if it was written by another number of processes.

    Raises:
        SparsortError: the file is missing or cannot be read.
    """
    file = _file(folder, rank)
    # With more processes than before, the file of this rank does not exist, but that of the first one tells their number.
    first = _file(folder, 0)
    try:
        with safe_open(file if file.exists() else first, framework="pt") as stored:
            metadata = stored.metadata()
            if metadata["world_size"] == str(world_size):
                slices: list[dict[str, Any]] = json.loads(metadata["others"])
                for name in stored.keys():  # noqa: SIM118 (a file of safetensors is not a mapping)
                    number, _, field = name.partition(".")
                    slices[int(number)][field] = stored.get_tensor(name).to(device)
                return slices
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SparsortError(
            f"the completions in {file} cannot be read ({error}), and the checkpoint was written inside a generation batch. "
            "Resume from another checkpoint."
        ) from error
    if rank == 0:
        _LOG.warning(
            "%s was written inside a generation batch by %s processes, and training resumes with %d. The prompts of this "
            "generation batch are completed again; all prompts keep their order.",
            folder,
            metadata["world_size"],
            world_size,
        )
    return None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"completions-{rank}.safetensors"
