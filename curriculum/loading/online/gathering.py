"""Gather the observations of all ranks on every rank, over torch.distributed.

Contract: every rank of the group calls `gather` at the same point, such as the edge of a stage, and gets bitwise the same arrays,
in an order that does not depend on the number of ranks. Nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparsort.curriculum.loading.online.observations import Observations


def gather(observations: Observations, group: Any = None) -> Observations:
    """The ordered observations of all ranks of `group`, on every rank; without torch.distributed, those of this process.

    All ranks must call it. A first collective of 8 bytes exchanges the number of observations, a second one the observations.

    Args:
        observations: the observations of this rank.
        group: process group of torch.distributed; None for all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return observations.ordered()
    device = _device_of(group)
    world = dist.get_world_size(group)
    sizes = torch.cat(_all_gather(torch.tensor([len(observations)], device=device), world, group)).tolist()
    if not any(sizes):
        return observations
    # Every rank sends as many columns as the rank with the most, because a collective needs equal sizes.
    # The values are sent as the bits of int64, so that one tensor carries all three columns without rounding.
    mine = torch.zeros((3, max(sizes)), dtype=torch.int64)
    columns = (observations.rows, observations.steps, observations.values.view(np.int64))
    mine[:, : len(observations)] = torch.from_numpy(np.stack(columns))
    theirs = _all_gather(mine.to(device), world, group)
    parts = [part[:, :size].cpu().numpy() for part, size in zip(theirs, sizes, strict=True)]
    return Observations.join(
        Observations(rows=rows, steps=steps, values=np.ascontiguousarray(bits).view(np.float64))
        for rows, steps, bits in parts
    ).ordered()


def _all_gather(mine: Tensor, world: int, group: Any) -> list[Tensor]:
    theirs = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(theirs, mine, group=group)
    return theirs


def _device_of(group: Any) -> torch.device:
    """The device on which the collectives of the group need their tensors."""
    if "gloo" in str(dist.get_backend_config(group)) or "mpi" in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator() or "cpu")
