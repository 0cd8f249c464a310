"""CurriculumLoader: yields the collated batches of one rank, exactly as a plan orders them.

Contract: the order is that of the plan, whatever the number of ranks, workers and micro-batches, and however often training
was interrupted. The position counts the global batches that were yielded completely, not those that were prefetched. Resuming
from any position costs the same as starting from the first. The loader uses no generator of the main process, calls no
collective, and ranks share nothing but the plan.

It contains a torch DataLoader but is not a subclass of it, so accelerate and Trainer use it unchanged instead of sharding it
again.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray

from sparsort.conditions import Table, needs, refuse_unread_arguments
from sparsort.curriculum.loading.loader.fetching import Fetcher, Key, Part
from sparsort.curriculum.loading.loader.groups import GroupedPart, Groups
from sparsort.curriculum.loading.loader.packing import PackedCollator
from sparsort.curriculum.loading.loader.resuming import (
    Fingerprint,
    fingerprint_of,
    fingerprint_of_stream,
    make_state,
    position_of,
)
from sparsort.curriculum.loading.loader.streams import StreamFetcher, check_stream, is_stream
from sparsort.curriculum.loading.loader.verification import another_size, check_name, verify_rows
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.shuffling import key_of
from sparsort.errors import SparsortError
from sparsort.scoring.data.inputs import is_table
from sparsort.scoring.data.rows import indexed

_WORKERS = (needs("num_workers", "batches are loaded without workers", num_workers=2),)
# The conditions under which an argument is read; see `sparsort.conditions`.
READ_BY: Table = dict.fromkeys(
    ("prefetch_factor", "persistent_workers", "worker_init_fn", "multiprocessing_context", "timeout"), _WORKERS
)

Hook = Callable[["CurriculumLoader", int], CurriculumPlan | None]


class CurriculumLoader:
    """Loads the batches of a plan, from the current position on.

    `for batch in loader` yields the rest of the current epoch; the next `for` yields the next epoch. `len(loader)` is the number
    of micro-batches of a whole epoch on this rank.

    Args:
        plan: a plan from `plan_curriculum`, or the folder that it was saved in.
        dataset: the rows that the plan was made for: any object with `len` and `[row]` (`__getitems__` is used if it exists,
            as in `datasets.Dataset`); a stream in the order of the plan (see `streams`); or a path, a frame, a dictionary of
            columns or a table, which is read into memory.
        collate_fn: list of examples → batch; by default that of torch, or `PackedCollator` if the plan packs.
        rank, world_size: this process and the number of processes that share a global batch. None takes them from
            torch.distributed, or assumes a single process. Rank r of R takes places r, r + R, … of each global batch.
        micro_batches: number of micro-batches that this rank's part of a global batch is divided into (gradient
            accumulation).
        groups: load generation batches for reinforcement learning instead, in which every prompt is repeated (`groups`). A
            global batch is then a generation batch, and it is yielded `groups.repeats` times, each time as a whole.
        num_workers, prefetch_factor, pin_memory, persistent_workers, worker_init_fn, multiprocessing_context, timeout: as in
            torch's DataLoader. Persistent workers live through all epochs, unless `on_stage` is set.
        fingerprint: your own name for the data. If the plan has a name too, the names are compared instead of the rows, and
            no row is read in the main process. States then contain the name instead of a digest of some rows.
        verify: compare the dataset with the ids or contents that the plan noted of its rows (`verification`). False accepts
            any dataset with the same number of rows.

    Attributes:
        epoch: the epoch of the current position.
        batch: number of global batches of this epoch that were yielded completely. After the last one, the next `for` begins
            the next epoch.
        turn: how often the current generation batch was yielded; 0 without `groups`.
        on_stage: a function that is called with the loader and the number of the stage before the first batch of every stage
            is loaded, except for the very first stage of training (the number is 0 at the beginning of a later epoch). If it
            returns a plan, that plan applies from this batch on. While it is set, nothing is prefetched beyond the edge of a
            stage. After a resume at an edge it is called for that edge again.

    Raises:
        SparsortError: the dataset does not have the plan's rows in their order, or has nothing that could be compared with
            them; or the smallest batch is too small to give every rank and micro-batch an example.
    """

    # Trainer reads these attributes of every data loader.
    batch_sampler = None
    sampler = None

    def __init__(
        self,
        plan: CurriculumPlan | str | Path,
        dataset: Any,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        rank: int | None = 0,
        world_size: int | None = 1,
        micro_batches: int = 1,
        groups: Groups | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        timeout: float = 0,
        fingerprint: str | None = None,
        verify: bool = True,
    ) -> None:
        if isinstance(plan, (str, Path)):
            plan = CurriculumPlan.open(plan)
        if not isinstance(plan, CurriculumPlan):
            raise SparsortError(
                f"a loader follows a plan, not {type(plan).__name__}: pass the plan that plan_curriculum returned, or the folder "
                "that it was saved in."
            )
        if not isinstance(num_workers, int) or num_workers < 0:
            raise SparsortError(f"num_workers must be a whole number of at least 0, not {num_workers!r}.")
        options: dict[str, Any] = {"num_workers": num_workers, "prefetch_factor": prefetch_factor, "timeout": timeout}
        options |= {"persistent_workers": persistent_workers, "worker_init_fn": worker_init_fn}
        options |= {"multiprocessing_context": multiprocessing_context}
        refuse_unread_arguments(CurriculumLoader, READ_BY, options)
        if is_table(dataset) or isinstance(dataset, Path) or not is_stream(dataset):
            dataset = indexed(dataset)
        self.dataset = dataset
        self.num_workers = num_workers
        self.on_stage: Hook | None = None
        self._part = _part(rank, world_size, micro_batches, groups)
        self._groups = groups
        self._is_stream = is_stream(dataset)
        check_name(fingerprint)
        self._fingerprint: Fingerprint | None = fingerprint
        self._name, self._verify = fingerprint, verify
        # The fingerprint of the plan whose rows the dataset was compared with.
        self._verified: str | None = None
        self._plan = self._checked(plan)
        if collate_fn is None:
            packs = plan.settings.packing != "none"
            collate_fn = PackedCollator() if packs else torch.utils.data.default_collate
        self.collate_fn = collate_fn
        self._persistent = persistent_workers
        # The arguments of the DataLoaders, apart from those that `_load` sets for each of them.
        self._options = {**options, "collate_fn": collate_fn, "pin_memory": pin_memory}
        self._epoch = self._batch = self._turn = 0
        # The number of the iterator that may move the position: the latest, until the position is set.
        self._run = 0
        self._latest: tuple[CurriculumPlan, Key] | None = None
        self._keys = _Keys(self._part.micro_batches)
        self._persistent_loader: torch.utils.data.DataLoader[Any] | None = None

    def __repr__(self) -> str:
        rank = f", rank {self._part.rank} of {self._part.world_size}" if self._part.world_size > 1 else ""
        return (
            f"CurriculumLoader({self._plan!r}, epoch {self.epoch}, batch {self.batch} of {self._plan.n_batches}{rank})"
        )

    @property
    def plan(self) -> CurriculumPlan:
        """The plan that the next batch follows."""
        return self._plan

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def turn(self) -> int:
        return self._turn

    @property
    def yielded(self) -> int:
        """Number of micro-batches of this epoch before the position that `state_dict` describes."""
        return self._batch * self._part.micro_batches + self._turn

    @property
    def total_batch_size(self) -> int | None:
        """Number of examples in a micro-batch over all ranks, as in accelerate's data loaders; None if the plan counts tokens.

        Batches of a plan can have fewer examples, but never more.
        """
        if self._groups is not None:
            return self._groups.prompts * self._groups.num_generations
        size = self._plan.settings.batch_size
        return None if size is None else -(-size // self._part.micro_batches)

    @property
    def latest(self) -> tuple[int, int] | None:
        """Epoch and number of the latest global batch, yielded completely or in part; None before the first."""
        return None if self._latest is None else self._latest[1][:2]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows of the latest micro-batch on this rank, in order; empty before the first.

        If the plan packs, these are the rows of all its packed sequences, one after the other.
        """
        if self._latest is None:
            return np.empty(0, dtype=np.int64)
        plan, (epoch, number, micro) = self._latest
        return self._part.rows(plan, number, epoch, micro)

    @property
    def stage(self) -> int:
        """The stage of the latest global batch; before the first batch, the stage of the next one."""
        plan, (_epoch, number, _micro) = self._latest or self._coming()
        return plan.stage(number)

    @property
    def share(self) -> float:
        """The share of the data that was available to that batch; see `CurriculumPlan.share`."""
        plan, (epoch, number, _micro) = self._latest or self._coming()
        return plan.share(number, epoch)

    def __len__(self) -> int:
        return self._plan.n_batches * self._part.micro_batches

    def __iter__(self) -> Iterator[Any]:
        if self._batch >= self._plan.n_batches:
            self._epoch, self._batch = self._epoch + 1, 0
        self._run += 1
        return self._walk(self._run)

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch. For the current epoch the position stays, since it may just have been loaded.

        Raises:
            SparsortError: the epoch is not a whole number of at least 0.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise SparsortError(f"epochs are whole numbers from 0, not {epoch!r}.")
        if epoch != self._epoch or self._batch >= self._plan.n_batches:
            self._move(epoch, 0)

    def replace_plan(self, plan: CurriculumPlan) -> None:
        """Follow another plan over the same rows, such as the revised plan of a checkpoint.

        Raises:
            SparsortError: as on construction.
        """
        self._plan = self._checked(plan)
        self._persistent_loader = None
        self._move(self._epoch, self._batch, self._turn)

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values of less than 1 KiB, whatever the size of the data.

        It refers to the first global batch that was not yielded completely; between micro-batches, that is the current one.
        With `groups` it also says how often the current generation batch was yielded.
        """
        state = make_state(self._plan, self._data(), epoch=self._epoch, batch=self._batch)
        return state if self._groups is None else {**state, "turn": self._turn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state. Earlier iterators raise an error when they are used again.

        Raises:
            SparsortError: the state belongs to another version, plan or data, or to a batch that the plan does not have.
        """
        repeats = None if self._groups is None else self._groups.repeats
        self._move(*position_of(state_dict, self._plan, self._data(), repeats=repeats))

    def _walk(self, run: int) -> Iterator[Any]:
        """The rest of the epoch, from one DataLoader, or from one DataLoader per stage if a hook is set."""
        self._check_current(run)
        epoch = self._epoch
        while (start := self._batch) < self._plan.n_batches:
            turn = self._turn
            stop = self._plan.n_batches
            if self.on_stage is not None:
                self._call_hook(start)
                self._check_current(run)
                # The hook may have replaced the plan, so its edges are read only now.
                stop = next(edge for edge in (*self._plan.stage_edges, stop) if edge > start)
            plan = self._plan
            batches = self._load(epoch, start, stop, turn)
            for key in self._keys.all(epoch, start, stop, turn):
                # No local variable refers to the batch here, so its memory is freed as soon as the caller drops it.
                yield self._next_batch(plan, key, batches)
                self._check_current(run)
            # Exhaust the iterator, so that workers stop.
            next(batches, None)
        self._epoch, self._batch = epoch + 1, 0

    def _next_batch(self, plan: CurriculumPlan, key: Key, batches: Iterator[Any]) -> Any:
        batch = next(batches)
        self._latest = (plan, key)
        # A global batch counts as yielded only after its last micro-batch.
        is_whole = key[2] == self._part.micro_batches - 1
        self._batch = key[1] + is_whole
        self._turn = 0 if is_whole or self._groups is None else key[2] + 1
        return batch

    def _load(self, epoch: int, start: int, stop: int, turn: int) -> Iterator[Any]:
        # A persistent DataLoader reads this span again for every epoch, so it must be set before iterating.
        self._keys.span = (epoch, start, stop, turn)
        keep = self._persistent and self.on_stage is None and not self._is_stream
        if keep and self._persistent_loader is not None:
            return iter(self._persistent_loader)
        options = {**self._options, "persistent_workers": keep, "generator": torch.Generator()}
        # Without a generator of its own, a DataLoader draws the seed of its workers from the global one.
        options["generator"].manual_seed(key_of("loader", self._plan.settings.seed, epoch, start))
        loader: torch.utils.data.DataLoader[Any]
        if self._is_stream:
            stream = StreamFetcher(self._plan, self.dataset, self._part, epoch=epoch, start=start, stop=stop)
            loader = torch.utils.data.DataLoader(stream, batch_size=None, **options)
        else:
            fetcher = Fetcher(self._plan, self.dataset, self._part)
            loader = torch.utils.data.DataLoader(fetcher, batch_sampler=self._keys, **options)
        self._persistent_loader = loader if keep else None
        return iter(loader)

    def _call_hook(self, number: int) -> None:
        is_first_batch = number in self._plan.stage_edges and (self._epoch, number) != (0, 0)
        if self.on_stage is None or not is_first_batch:
            return
        revised = self.on_stage(self, self._plan.stage(number))
        if revised is not None:
            self._plan = self._checked(revised)

    def _coming(self) -> tuple[CurriculumPlan, Key]:
        # At the end of an epoch, the next batch is the first one of the following epoch.
        at_end = self._batch >= self._plan.n_batches
        return self._plan, (self._epoch + at_end, 0 if at_end else self._batch, 0)

    def _move(self, epoch: int, batch: int, turn: int = 0) -> None:
        self._epoch, self._batch, self._turn, self._latest = epoch, batch, turn, None
        self._run += 1

    def _check_current(self, run: int) -> None:
        if run != self._run:
            raise SparsortError(
                "this iterator is out of date: the loader was moved (load_state_dict, set_epoch, replace_plan) or "
                "iterated over again since. Take a new one with iter(loader)."
            )

    def _data(self) -> Fingerprint:
        if self._fingerprint is None:
            self._fingerprint = (
                fingerprint_of_stream(self.dataset, self._plan.n_rows)
                if self._is_stream
                else fingerprint_of(self.dataset)
            )
        return self._fingerprint

    def _checked(self, plan: CurriculumPlan) -> CurriculumPlan:
        if self._is_stream:
            if self._groups is not None:
                raise SparsortError(
                    "a stream is read in its own order, and groups= repeats its prompts. Write it once with streams.materialize, "
                    "or pass a dataset with [row]."
                )
            check_stream(plan, self.dataset, self.num_workers)
        elif len(self.dataset) != plan.n_rows:
            raise another_size(plan, len(self.dataset))
        if self._groups is not None:
            self._groups.check(plan, self._part.world_size)
        needed = self._part.world_size * self._part.micro_batches
        if self._groups is None and plan.smallest_batch < needed:
            raise _too_small(plan, self._part)
        # A revised plan has the same rows as the plan that it revises, so they need no second comparison.
        base = str(plan.notes.get("revises", plan.fingerprint))
        if self._verify and base != self._verified:
            verify_rows(plan, self.dataset, fingerprint=self._name)
            self._verified = base
        return plan


class _Keys:
    """The batch sampler: the keys of the micro-batches of a span of global batches, in order."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.span = (0, 0, 0, 0)

    def all(self, epoch: int, start: int, stop: int, turn: int) -> Iterator[Key]:
        """The keys of the batches from `start` to `stop`; the first batch begins with micro-batch `turn`."""
        return (
            (epoch, number, micro)
            for number in range(start, stop)
            for micro in range(turn if number == start else 0, self.micro_batches)
        )

    def __iter__(self) -> Iterator[list[Key]]:
        return ([key] for key in self.all(*self.span))

    def __len__(self) -> int:
        _epoch, start, stop, turn = self.span
        return (stop - start) * self.micro_batches - turn


def _too_small(plan: CurriculumPlan, part: Part) -> SparsortError:
    smallest, size = plan.smallest_batch, plan.settings.batch_size
    message = (
        f"the smallest global batch of the plan has {smallest} examples or packed sequences, and {part.world_size} ranks × "
        f"{part.micro_batches} micro-batches need at least {part.world_size * part.micro_batches}, or some would be empty. "
    )
    if size is None or size <= smallest:
        return SparsortError(f"{message}Plan with larger batches, or use at most {max(1, smallest)} in all.")
    # A batch_size that does not divide the rows makes smaller batches. In Trainer, batch_size must divide equally all the same.
    fits = [count for count in range(part.world_size, smallest + 1, part.world_size) if size % count == 0]
    in_trainer = (
        f" (in Trainer, per_device_train_batch_size={size // fits[-1]} and "
        f"gradient_accumulation_steps={fits[-1] // part.world_size})"
        if fits
        else ""
    )
    return SparsortError(
        f"{message}Use at most {smallest} in all{in_trainer}, or a number of rows that batch_size={size} divides."
    )


def _part(rank: int | None, world_size: int | None, micro_batches: int, groups: Groups | None) -> Part:
    if rank is None or world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        own_rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        rank, world_size = own_rank if rank is None else rank, ranks if world_size is None else world_size
    if groups is not None and not isinstance(groups, Groups):
        raise SparsortError(f"groups={groups!r}: expected Groups(prompts=…, num_generations=…).")
    whole: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro_batches": micro_batches}
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise SparsortError(f"{name}={value!r}: expected a whole number.")
    if world_size < 1 or not 0 <= rank < world_size:
        raise SparsortError(
            f"rank={rank} of world_size={world_size}: ranks are counted from 0 to world_size − 1. Omit both for one "
            "process, or pass None to take them from torch.distributed."
        )
    if micro_batches < 1:
        raise SparsortError(f"micro_batches={micro_batches}: a global batch has at least 1. Omit it for 1.")
    if groups is None:
        return Part(rank=rank, world_size=world_size, micro_batches=micro_batches)
    if micro_batches != 1:
        raise SparsortError(
            f"micro_batches={micro_batches} would divide a generation batch, and groups= yields it whole. Omit micro_batches."
        )
    return GroupedPart(rank=rank, world_size=world_size, micro_batches=groups.repeats, groups=groups)
