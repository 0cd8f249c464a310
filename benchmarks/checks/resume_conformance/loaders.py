"""Adapters of data loaders: ours, accelerate, torchdata and mosaicml streaming. Each resumes as its documentation describes.

All ranks of a run are in this process: each has its own loader, and they exchange nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from conformance import ALL, EPOCHS, GLOBAL_BATCH, PLAIN, RANKS, ROWS, SEED, WORKERS, Batch, Setup
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset[dict[str, Any]]):
    """Row n is n + 1 repeated 1 to 5 times, so tokens tell the rows of a packed sequence."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        tokens = [int(row) + 1] * LENGTHS[row]
        return {"input_ids": tokens, "labels": tokens}


PER_EPOCH = -(-ROWS // GLOBAL_BATCH)
LENGTHS = [1 + row * 3 % 5 for row in range(ROWS)]


def rows_in(tokens: Sequence[int]) -> Batch:
    """The rows of a sequence of tokens in order; 0 is padding."""
    return [token - 1 for place, token in enumerate(tokens) if token and (place == 0 or tokens[place - 1] != token)]


def collate(examples: list[dict[str, Any]]) -> Batch:
    return [row for example in examples for row in rows_in(list(example["input_ids"]))]


def contiguous(parts: Sequence[Batch]) -> Batch:
    """The global batch if each rank takes a piece of it."""
    return [row for part in parts for row in part]


def interleaved(parts: Sequence[Batch]) -> Batch:
    """The global batch if rank r of R takes every R-th row from r on."""
    return [row for rows in zip_longest(*parts) for row in rows if row is not None]


def plan_for(setup: Setup) -> Any:
    """A shuffled plan of the rows."""
    from sparsort.curriculum.loading.plan.planning import plan_curriculum

    packed = {"packing": "next_fit", "pack_length": 8, "lengths": LENGTHS} if setup.packing else {}
    return plan_curriculum(np.arange(ROWS), batch_size=GLOBAL_BATCH, schedule="shuffle", seed=SEED, **packed)


class SparsortLoader:
    """CurriculumLoader on every rank."""

    name = "`CurriculumLoader`"
    packages: ClassVar[tuple[str, ...]] = ("sparsort",)
    supports = ALL

    def run(self, setup: Setup, *, stop: int | None = None, state: Any = None) -> tuple[list[Batch], Any]:
        from sparsort.curriculum.loading.loader.loader import CurriculumLoader

        options: dict[str, Any] = {"micro_batches": setup.accumulation, "num_workers": setup.workers, "verify": False}
        if not setup.packing:
            options["collate_fn"] = collate
        plan = plan_for(setup)
        loaders = [
            CurriculumLoader(plan, Rows(), rank=rank, world_size=setup.ranks, **options) for rank in range(setup.ranks)
        ]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(json.loads(state))
        done = loaders[0].epoch * plan.n_batches + loaders[0].batch
        batches: list[Batch] = []
        while done + len(batches) < (EPOCHS * plan.n_batches if stop is None else stop):
            iterators = [iter(loader) for loader in loaders]
            for parts in zip(*(self._steps(iterator, setup) for iterator in iterators), strict=True):
                batches.append(interleaved(parts))
                if done + len(batches) == stop:
                    # The state is taken while workers have batches in flight.
                    return batches, json.dumps(loaders[0].state_dict())
        return batches, json.dumps(loaders[0].state_dict())

    def _steps(self, iterator: Iterator[Any], setup: Setup) -> Iterator[Batch]:
        for first in iterator:
            micro_batches = [first, *(next(iterator) for _ in range(setup.accumulation - 1))]
            yield [row for batch in micro_batches for row in (self._rows(batch) if setup.packing else batch)]

    def _rows(self, batch: Any) -> Batch:
        return [row for tokens in batch["input_ids"].tolist() for row in rows_in(tokens)]


class Accelerate:
    """A training loop with accelerate: `save_state`, `load_state`, and `skip_first_batches` in the interrupted epoch."""

    name = "accelerate, `skip_first_batches`"
    packages: ClassVar[tuple[str, ...]] = ("accelerate",)
    supports = PLAIN | WORKERS | RANKS | {"accumulation"}
    seedable = True
    stateful = False

    def run(self, setup: Setup, *, stop: int | None = None, state: Any = None) -> tuple[list[Batch], Any]:
        from accelerate import Accelerator, skip_first_batches
        from accelerate.data_loader import prepare_data_loader
        from accelerate.utils import DataLoaderConfiguration, set_seed

        set_seed(SEED)
        size = GLOBAL_BATCH // setup.ranks // setup.accumulation
        loaders: list[Any] = [
            DataLoader(Rows(), size, shuffle=True, num_workers=setup.workers, collate_fn=collate)
            for _ in range(setup.ranks)
        ]
        config = DataLoaderConfiguration(use_seedable_sampler=self.seedable, use_stateful_dataloader=self.stateful)
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        if setup.ranks == 1:
            loaders = [accelerator.prepare(loaders[0])]
        else:
            # What `prepare` calls, with another number of processes than there are.
            loaders = [
                prepare_data_loader(
                    loader,
                    num_processes=setup.ranks,
                    process_index=rank,
                    use_seedable_sampler=self.seedable,
                    rng_types=["generator"],
                    use_stateful_dataloader=self.stateful,
                )
                for rank, loader in enumerate(loaders)
            ]
        done = 0
        if state is not None:
            done = state["done"]
            accelerator.load_state(str(setup.folder))
            for rank, loader in enumerate(loaders if state["loaders"] else []):
                loader.load_state_dict(state["loaders"][rank % len(state["loaders"])])
        batches: list[Batch] = []
        first, skipped = divmod(done, PER_EPOCH)
        for epoch in range(first, EPOCHS):
            in_epoch = loaders
            if epoch == first and skipped and not self.stateful:
                in_epoch = [skip_first_batches(loader, skipped * setup.accumulation) for loader in loaders]
            for loader in in_epoch:
                loader.set_epoch(epoch)
            for parts in zip(*(self._steps(loader, setup) for loader in in_epoch), strict=True):
                batches.append(contiguous(parts))
                if done + len(batches) == stop:
                    accelerator.save_state(str(setup.folder))
                    # `save_state` saves prepared loaders, so those of simulated ranks are saved here.
                    own = self.stateful and setup.ranks > 1
                    states = [copy.deepcopy(loader.state_dict()) for loader in loaders] if own else []
                    return batches, {"done": stop, "loaders": states}
        return batches, None

    def _steps(self, loader: Any, setup: Setup) -> Iterator[Batch]:
        micro_batches: list[Batch] = []
        for batch in loader:
            micro_batches.append(batch)
            if len(micro_batches) == setup.accumulation:
                yield contiguous(micro_batches)
                micro_batches = []
        if micro_batches:
            yield contiguous(micro_batches)


class AcceleratePlainSampler(Accelerate):
    """The same with accelerate's default, torch's own RandomSampler."""

    name = "accelerate, `skip_first_batches`, default sampler"
    seedable = False


class AccelerateStateful(Accelerate):
    """The same with `use_stateful_dataloader=True`, which needs no skipping."""

    name = "accelerate, `use_stateful_dataloader`"
    packages: ClassVar[tuple[str, ...]] = ("accelerate", "torchdata")
    stateful = True


class AccelerateStatefulPlainSampler(AccelerateStateful):
    """The same with accelerate's default, torch's own RandomSampler."""

    name = "accelerate, `use_stateful_dataloader`, default sampler"
    seedable = False


class TorchdataLoader:
    """StatefulDataLoader: `shuffle=True` on one rank, and StatefulDistributedSampler on several."""

    name = "torchdata `StatefulDataLoader`"
    packages: ClassVar[tuple[str, ...]] = ("torchdata",)
    supports = PLAIN | WORKERS | RANKS

    def run(self, setup: Setup, *, stop: int | None = None, state: Any = None) -> tuple[list[Batch], Any]:
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        data = Rows()
        is_distributed = setup.ranks > 1 or (state is not None and state["ranks"] > 1)
        options = {"num_workers": setup.workers, "collate_fn": collate}
        samplers: list[Any] = []
        if is_distributed:
            samplers = [
                StatefulDistributedSampler(data, num_replicas=setup.ranks, rank=rank, shuffle=True, seed=SEED)
                for rank in range(setup.ranks)
            ]
            size = GLOBAL_BATCH // setup.ranks
            loaders = [StatefulDataLoader(data, size, sampler=sampler, **options) for sampler in samplers]
        else:
            torch.manual_seed(SEED)
            loaders = [StatefulDataLoader(data, GLOBAL_BATCH, shuffle=True, **options)]
        done = 0 if state is None else state["done"]
        if state is not None:
            for rank, loader in enumerate(loaders):
                loader.load_state_dict(state["loaders"][rank % state["ranks"]])
        batches: list[Batch] = []
        # A state that was saved after the last batch may give an empty pass first, which is not counted as an epoch.
        for _ in range(EPOCHS + 1):
            epoch = (done + len(batches)) // PER_EPOCH
            if epoch == EPOCHS:
                break
            for sampler in samplers:
                sampler.set_epoch(epoch)
            for parts in zip(*loaders, strict=True):
                batches.append(interleaved(parts))
                if done + len(batches) == stop:
                    states = [copy.deepcopy(loader.state_dict()) for loader in loaders]
                    return batches, {"loaders": states, "ranks": setup.ranks, "done": stop}
        return batches, None


class Streaming:
    """mosaicml's StreamingDataset and StreamingDataLoader, in one process."""

    name = "mosaicml streaming"
    packages: ClassVar[tuple[str, ...]] = ("mosaicml-streaming",)
    supports = PLAIN | WORKERS

    def run(self, setup: Setup, *, stop: int | None = None, state: Any = None) -> tuple[list[Batch], Any]:
        from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        folder = Path(setup.folder) / "mds"
        if not folder.exists():
            with MDSWriter(out=str(folder), columns={"row": "int"}, size_limit=256) as writer:
                for row in range(ROWS):
                    writer.write({"row": row})
        data = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=GLOBAL_BATCH)
        loader = StreamingDataLoader(data, batch_size=GLOBAL_BATCH, num_workers=setup.workers)
        done = 0
        if state is not None:
            done = state["done"]
            loader.load_state_dict(state["loader"])
        batches: list[Batch] = []
        for _ in range(EPOCHS + 1):
            if done + len(batches) == EPOCHS * PER_EPOCH:
                break
            for batch in loader:
                batches.append(batch["row"].tolist())
                if done + len(batches) == stop:
                    return batches, {"loader": copy.deepcopy(loader.state_dict()), "done": stop}
        return batches, None
