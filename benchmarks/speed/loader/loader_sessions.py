"""The loaders that `loader_peers.py` compares, each set up, saved and rebuilt as its users would do it.

A session is one training run's data: `steps()` yields `(epoch, global batch)` over two epochs, where a global batch is the
ordered list of ids that all ranks together see at one step. `states()` is what each rank would now write into a checkpoint, and a
session that is created with states continues from them. All ranks of a session are in one process: each builds its loader with
its own rank, and they exchange nothing but the order of ids.
"""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

EPOCHS = 2
SEED = 1234
# All loaders with a pacing have the same one: linear, from this share of the examples to all of them at half of the first epoch.
FIRST_SHARE = 0.1
PACED_SHARE_OF_EPOCH = 0.5

Batch = list[int]
Order = Literal["sorted", "paced", "pool", "random"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One run: `batch` examples on each of `ranks` ranks, `workers` processes per rank, and `folder` for its files."""

    difficulty: NDArray[np.float64]
    order: Order
    ranks: int
    batch: int
    workers: int
    folder: Path

    @property
    def n(self) -> int:
        return len(self.difficulty)

    @property
    def global_batch(self) -> int:
        return self.ranks * self.batch

    @property
    def steps_of_epoch(self) -> int:
        return ceil(self.n / self.global_batch)

    @property
    def first_share(self) -> float:
        """The share at which linear pacing starts: a tenth, or as many tenths as one global batch needs."""
        return ceil(10 * max(FIRST_SHARE, self.global_batch / self.n)) / 10

    def examples(self) -> Examples:
        """The data for a loader that does not know difficulties: sorted on disk if the order is "sorted"."""
        ids = np.argsort(self.difficulty, kind="stable") if self.order == "sorted" else np.arange(self.n)
        return Examples(ids)


class Examples(Dataset[int]):
    """A dataset whose examples are their own ids."""

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> int:
        return int(self.ids[place])


@dataclass(frozen=True)
class State:
    """The checkpoint of one rank: a copy of its content, and its size on disk."""

    content: Any
    n_bytes: int

    @staticmethod
    def by_torch(content: Any) -> State:
        """The state as `torch.save` writes it."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        # A copy, because a loader may later change the object that it returned as its state.
        return State(copy.deepcopy(content), buffer.tell())


class Session(Protocol):
    """See the module's docstring."""

    def __init__(self, setup: Setup, states: Sequence[State] | None = None) -> None: ...

    def steps(self) -> Iterator[tuple[int, Batch]]: ...

    def states(self) -> list[State]: ...


def as_list(batch: list[int]) -> Batch:
    """The collate function of every session: a batch is its ids."""
    return [int(item) for item in batch]


def contiguous(parts: Sequence[Batch]) -> Batch:
    """The global batch if each rank takes a contiguous piece of it."""
    return [item for part in parts for item in part]


def interleaved(parts: Sequence[Batch]) -> Batch:
    """The global batch if each rank takes every R-th example of it."""
    return [item for row in zip_longest(*parts) for item in row if item is not None]


def together(loaders: Sequence[Any]) -> Iterator[tuple[Batch, ...]]:
    """The batches of all ranks at each step; a rank that has ended has none."""
    return zip_longest(*loaders, fillvalue=[])


class PyTorchSession:
    """A DataLoader with RandomSampler, or DistributedSampler on several ranks. It has no state to resume."""

    def __init__(self, setup: Setup, states: Sequence[State] | None = None) -> None:
        self.ranks = setup.ranks
        self.samplers: list[Any] = []
        self.loaders: list[DataLoader[int]] = []
        data = setup.examples()
        for rank in range(setup.ranks):
            # DistributedSampler pads the last batch to a multiple of the ranks, which a single rank does
            # not need.
            if setup.ranks == 1:
                sampler: Any = RandomSampler(data, generator=torch.Generator().manual_seed(SEED))
            else:
                sampler = DistributedSampler(data, setup.ranks, rank, shuffle=True, seed=SEED)
            self.samplers.append(sampler)
            self.loaders.append(
                DataLoader(data, setup.batch, sampler=sampler, num_workers=setup.workers, collate_fn=as_list)
            )

    def steps(self) -> Iterator[tuple[int, Batch]]:
        for epoch in range(EPOCHS):
            for sampler in self.samplers:
                # RandomSampler draws a new permutation by itself in each epoch.
                if self.ranks > 1:
                    sampler.set_epoch(epoch)
            for parts in together(self.loaders):
                yield epoch, interleaved(parts)

    def states(self) -> list[State]:
        return [State(None, 0)] * self.ranks


class TrainerSession:
    """transformers' Trainer: its sampler in a DataLoader that accelerate prepares, and its way of resuming from a checkpoint.

    `prepare_data_loader` is called with what Trainer's Accelerator passes by default (`even_batches`, a seedable sampler);
    the loop repeats `Trainer._run_epoch`: `skip_first_batches` in the epoch that was interrupted, `set_epoch` in all.
    """

    def __init__(self, setup: Setup, states: Sequence[State] | None = None) -> None:
        from accelerate.data_loader import prepare_data_loader

        # Trainer's set_seed does the same, and the seedable sampler takes its seed from here.
        torch.manual_seed(SEED)
        data = setup.examples()
        self.per_epoch = setup.steps_of_epoch
        self.loaders = []
        for rank in range(setup.ranks):
            sampler = RandomSampler(data) if setup.order == "random" else SequentialSampler(data)
            loader = DataLoader(data, setup.batch, sampler=sampler, num_workers=setup.workers, collate_fn=as_list)
            self.loaders.append(
                prepare_data_loader(
                    loader,
                    num_processes=setup.ranks,
                    process_index=rank,
                    even_batches=True,
                    use_seedable_sampler=True,
                    rng_types=["generator"],
                )
            )
        self.done = 0 if states is None else states[0].content["global_step"]

    def steps(self) -> Iterator[tuple[int, Batch]]:
        from accelerate import skip_first_batches

        # Trainer stores the number of steps only, and finds the epoch and the batches to skip from it.
        first, skipped = divmod(self.done, self.per_epoch)
        for epoch in range(first, EPOCHS):
            loaders = self.loaders
            if epoch == first and skipped:
                loaders = [skip_first_batches(loader, skipped) for loader in loaders]
            for loader in loaders:
                loader.set_epoch(epoch)
            for parts in together(loaders):
                self.done += 1
                yield epoch, contiguous(parts)

    def states(self) -> list[State]:
        """The contents of trainer_state.json and of this rank's rng_state.pth."""
        from transformers import TrainerState

        state = asdict(TrainerState(global_step=self.done, epoch=self.done / self.per_epoch))
        generators = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        n_bytes = len(json.dumps(state, indent=2, sort_keys=True)) + State.by_torch(generators).n_bytes
        return [State(state, n_bytes)] * len(self.loaders)


class StatefulSession:
    """torchdata's StatefulDataLoader with its own distributed sampler, also on a single rank, so that ranks can change."""

    def __init__(self, setup: Setup, states: Sequence[State] | None = None) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        data = setup.examples()
        shuffle = setup.order == "random"
        self.samplers: list[Any] = [
            StatefulDistributedSampler(data, num_replicas=setup.ranks, rank=rank, shuffle=shuffle, seed=SEED)
            for rank in range(setup.ranks)
        ]
        self.loaders: list[Any] = [
            StatefulDataLoader(data, setup.batch, sampler=sampler, num_workers=setup.workers, collate_fn=as_list)
            for sampler in self.samplers
        ]
        self.epoch = 0
        if states is not None:
            for rank, loader in enumerate(self.loaders):
                # With more ranks than before, a new rank takes over the state of an old one.
                kept = states[rank % len(states)].content
                self.epoch = kept["epoch"]
                loader.load_state_dict(kept["loader"])

    def steps(self) -> Iterator[tuple[int, Batch]]:
        for epoch in range(self.epoch, EPOCHS):
            self.epoch = epoch
            for sampler in self.samplers:
                sampler.set_epoch(epoch)
            for parts in together(self.loaders):
                yield epoch, interleaved(parts)

    def states(self) -> list[State]:
        return [State.by_torch({"epoch": self.epoch, "loader": loader.state_dict()}) for loader in self.loaders]


class SparsortSession:
    """Our `CurriculumLoader`."""

    def __init__(self, setup: Setup, states: Sequence[State] | None = None) -> None:
        from sparsort.curriculum.loading.loader.loader import CurriculumLoader
        from sparsort.curriculum.loading.plan.pacing import Pacing
        from sparsort.curriculum.loading.plan.planning import plan_curriculum

        pacing = Pacing(kind="linear", start=setup.first_share, until=PACED_SHARE_OF_EPOCH)
        chosen: dict[Order, dict[str, Any]] = {
            "sorted": {},
            "random": {"schedule": "shuffle"},
            "paced": {"pacing": pacing, "stages": min(10, setup.steps_of_epoch)},
            "pool": {"mode": "pool", "pacing": pacing, "steps": setup.steps_of_epoch},
        }
        plan = plan_curriculum(setup.difficulty, batch_size=setup.global_batch, seed=SEED, **chosen[setup.order])
        self.loaders = [
            CurriculumLoader(
                plan,
                Examples(np.arange(setup.n)),
                collate_fn=as_list,
                rank=rank,
                world_size=setup.ranks,
                num_workers=setup.workers,
                verify=False,
            )
            for rank in range(setup.ranks)
        ]
        if states is not None:
            for loader in self.loaders:
                # The state of a CurriculumLoader is the same on all ranks.
                loader.load_state_dict(states[0].content)

    def steps(self) -> Iterator[tuple[int, Batch]]:
        for epoch in range(self.loaders[0].epoch, EPOCHS):
            for parts in together(self.loaders):
                yield epoch, interleaved(parts)

    def states(self) -> list[State]:
        """The state as JSON."""
        texts = [json.dumps(loader.state_dict()) for loader in self.loaders]
        return [State(json.loads(text), len(text)) for text in texts]
