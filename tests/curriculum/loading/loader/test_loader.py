"""CurriculumLoader: the order over ranks, workers and micro-batches, what it reports, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset, get_worker_info

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

Batches = list[list[int]]


def difficulties(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """With ties and rows without a score."""
    values = np.random.default_rng(seed).integers(0, max(2, n // 2), n).astype(np.float32)
    values[3:4] = np.nan
    return values


def rows_of(n: int) -> list[dict[str, int]]:
    return [{"row": row} for row in range(n)]


def plain(batch: Any) -> list[int]:
    return batch["row"].tolist() if isinstance(batch, dict) else list(batch)


def read(loader: Iterable[Any]) -> Batches:
    return [plain(batch) for batch in loader]


def flat(batches: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(batches))


def together(ranks: list[Batches], micro_batches: int) -> Batches:
    """The global batches that ranks saw: micro-batches end to end, then one item of each rank in turn."""
    whole = []
    for begin in range(0, len(ranks[0]), micro_batches):
        mine = [flat(batches[begin : begin + micro_batches]) for batches in ranks]
        longest = max(map(len, mine))
        whole.append([part[place] for place in range(longest) for part in mine if place < len(part)])
    return whole


def planned(plan: Any, epoch: int = 0) -> Batches:
    return [plan.batch(number, epoch).tolist() for number in range(plan.n_batches)]


# The order


@pytest.mark.parametrize("workers", range(5))
def test_every_number_of_ranks_and_workers_sees_the_same_ordered_global_batches(workers: int) -> None:
    n = 45
    plan = plan_curriculum(difficulties(n), batch_size=12, stages=2)
    for world_size in range(1, 9):
        options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        ranks = [
            read(CurriculumLoader(plan, rows_of(n), rank=rank, world_size=world_size, verify=False, **options))
            for rank in range(world_size)
        ]
        found = together(ranks, 1)
        assert found == planned(plan), (world_size, workers)
        assert sorted(flat(found)) == list(range(n)), "each row exactly once, none wrapped around"


def _read_rank(folder: str, n: int, rank: int, world_size: int, answers: Any) -> None:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

    plan = CurriculumPlan.open(folder)
    loader = CurriculumLoader(
        plan, rows_of(n), rank=rank, world_size=world_size, num_workers=1, micro_batches=2, verify=False
    )
    answers.put((rank, [read(loader), read(loader)]))


def test_ranks_in_processes_of_their_own_see_the_planned_batches(tmp_path: Any) -> None:
    n, world_size = 61, 4
    plan = plan_curriculum(difficulties(n), batch_size=16, stages=3, out=tmp_path / "plan")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    started = [
        context.Process(target=_read_rank, args=(str(tmp_path / "plan"), n, rank, world_size, answers))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    found = dict(answers.get() for _ in started)
    for process in started:
        process.join()
    for epoch in (0, 1):
        assert together([found[rank][epoch] for rank in range(world_size)], 2) == planned(plan, epoch)


_SCHEDULES: list[dict[str, Any]] = [
    {},
    {"stages": 3},
    {"stages": 4, "pacing": Pacing(kind="linear", start=0.2)},
    {"schedule": "folded", "folds": 3},
    {"schedule": "interleaved"},
    {"schedule": "shuffle"},
    {"schedule": "as_given"},
    {"warm_up": 0.3},
    {"later_epochs": "shuffle"},
    {"mode": "pool", "pacing": Pacing(kind="root", start=0.3), "steps": 7},
]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 50),
    batch_size=st.integers(1, 50),
    schedule=st.sampled_from(_SCHEDULES),
    direction=st.sampled_from(["easy_to_hard", "hard_to_easy", "random"]),
    split=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    seed=st.integers(0, 3),
)
def test_two_epochs_are_what_the_plan_says(
    n: int, batch_size: int, schedule: dict[str, Any], direction: str, split: tuple[int, int], seed: int
) -> None:
    world_size, micro_batches = split
    if schedule.get("schedule") in ("shuffle", "as_given"):
        direction = "easy_to_hard"
    chosen = {**schedule, "direction": direction, "seed": seed}
    try:
        plan = plan_curriculum(np.arange(n, dtype=np.float32) % 7, batch_size=min(batch_size, n), **chosen)
    except SparsortError:
        reject()

    def load(rank: int) -> CurriculumLoader:
        return CurriculumLoader(
            plan, rows_of(n), rank=rank, world_size=world_size, micro_batches=micro_batches, verify=False
        )

    if plan.smallest_batch < world_size * micro_batches:
        with pytest.raises(SparsortError, match="would be empty"):
            load(0)
        return
    loaders = [load(rank) for rank in range(world_size)]
    for epoch in range(2):
        assert [loader.epoch for loader in loaders] == [epoch] * world_size
        ranks = [read(loader) for loader in loaders]
        assert together(ranks, micro_batches) == planned(plan, epoch)
        assert all(len(batches) == len(loaders[0]) for batches in ranks)
        sizes = {len(batch) for batches in ranks for batch in batches}
        assert min(sizes) >= 1
        if schedule.get("mode") != "pool":
            assert sorted(row for batches in ranks for batch in batches for row in batch) == list(range(n))


def test_the_controls_have_the_batch_sizes_of_the_curriculum() -> None:
    n, sizes = 101, []
    for direction in ("easy_to_hard", "hard_to_easy", "random"):
        plan = plan_curriculum(difficulties(n), batch_size=8, direction=direction, stages=4)
        sizes.append(
            [len(batch) for batch in read(CurriculumLoader(plan, rows_of(n), rank=1, world_size=3, verify=False))]
        )
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(set(sizes[0])) == 2, "batches that do not divide evenly, or nothing is compared"


class Counted:
    """A dataset that counts how it is asked."""

    def __init__(self, n: int) -> None:
        self.n, self.asked = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> int:
        raise AssertionError(f"row {row} was asked for by itself")

    def __getitems__(self, rows: list[int]) -> list[int]:
        assert all(type(row) is int for row in rows)
        self.asked.append(rows)
        return rows


def test_rows_are_asked_for_by_the_batch_where_the_dataset_can() -> None:
    plan, data = plan_curriculum(difficulties(20), batch_size=6), Counted(20)
    loader = CurriculumLoader(plan, data, collate_fn=list, verify=False)
    assert read(loader) == planned(plan) == data.asked


def test_a_datasets_dataset_is_loaded_from_its_memory_map(tmp_path: Any) -> None:
    import datasets

    datasets.Dataset.from_dict({"row": list(range(30))}).save_to_disk(tmp_path / "data")
    data = datasets.load_from_disk(tmp_path / "data").with_format("torch")
    plan = plan_curriculum(difficulties(30), batch_size=7)
    options = {"num_workers": 2, "multiprocessing_context": "fork"}
    assert read(CurriculumLoader(plan, data, verify=False, **options)) == planned(plan)


@pytest.mark.parametrize("saved", [True, False])
def test_workers_may_be_spawned(saved: bool, tmp_path: Any) -> None:
    plan = plan_curriculum(difficulties(12), batch_size=6, stages=2, out=tmp_path / "plan" if saved else None)
    loader = CurriculumLoader(plan, rows_of(12), num_workers=1, multiprocessing_context="spawn", verify=False)
    assert read(loader) == planned(plan)


class WorkerIds:
    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> int:
        return os.getpid()


def test_persistent_workers_live_through_epochs_and_a_break() -> None:
    plan = plan_curriculum(difficulties(24), batch_size=6)
    options: dict[str, Any] = {"num_workers": 2, "collate_fn": set, "multiprocessing_context": "fork"}
    loader = CurriculumLoader(plan, WorkerIds(), persistent_workers=True, verify=False, **options)
    first = set().union(*loader)
    next(iter(loader))
    assert set().union(*loader) == first
    assert os.getpid() not in first
    assert len(first) == 2
    order = CurriculumLoader(
        plan, rows_of(24), persistent_workers=True, num_workers=2, multiprocessing_context="fork", verify=False
    )
    assert [read(order), read(order)] == [planned(plan), planned(plan, 1)]


# What it says of itself


def test_the_position_counts_what_was_handed_out_whole_and_not_what_was_prefetched() -> None:
    plan = plan_curriculum(difficulties(24), batch_size=8, stages=3)
    options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 4, "multiprocessing_context": "fork"}
    loader = CurriculumLoader(plan, rows_of(24), rank=1, world_size=2, micro_batches=2, verify=False, **options)
    assert (loader.latest, loader.rows.tolist(), loader.stage) == (None, [], 0)
    seen = []
    for batch in loader:
        assert loader.rows.tolist() == plain(batch)
        assert loader.share == plan.share(loader.latest[1])
        seen.append((loader.epoch, loader.batch, loader.latest, loader.stage))
    assert seen == [
        (0, 0, (0, 0), 0),
        (0, 1, (0, 0), 0),
        (0, 1, (0, 1), 1),
        (0, 2, (0, 1), 1),
        (0, 2, (0, 2), 2),
        (0, 3, (0, 2), 2),
    ]
    assert (loader.epoch, loader.batch, len(loader)) == (1, 0, 6)


def test_set_epoch_keeps_the_position_within_the_epoch_and_moves_to_the_beginning_of_another() -> None:
    plan = plan_curriculum(difficulties(20), batch_size=5, stages=2)
    loader = CurriculumLoader(plan, rows_of(20), verify=False)
    running = iter(loader)
    next(running)
    loader.set_epoch(0)
    assert plain(next(running)) == planned(plan)[1]
    loader.set_epoch(3)
    assert read(loader) == planned(plan, 3)
    loader.set_epoch(3)
    assert read(loader) == planned(plan, 3)


def test_an_epoch_that_is_counted_to_its_end_instead_of_run_out_is_followed_by_the_next() -> None:
    plan = plan_curriculum(difficulties(20), batch_size=5, stages=2)
    loader = CurriculumLoader(plan, rows_of(20), verify=False)
    for epoch in range(3):
        running = iter(loader)
        assert [plain(next(running)) for _ in range(len(loader))] == planned(plan, epoch)


def test_it_is_stateful_and_no_data_loader_that_accelerate_would_divide() -> None:
    loader = CurriculumLoader(plan_curriculum(difficulties(8), batch_size=4), rows_of(8), verify=False)
    assert isinstance(loader, Stateful)
    assert not isinstance(loader, torch.utils.data.DataLoader)
    assert loader.batch_sampler is None
    assert loader.sampler is None


# Randomness


def _global_states() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_generator_is_touched(workers: int) -> None:
    before = _global_states()
    plan = plan_curriculum(difficulties(30), batch_size=6, stages=3, seed=5)
    options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    loader = CurriculumLoader(plan, rows_of(30), verify=False, **options)
    read(loader)
    loader.load_state_dict(loader.state_dict())
    read(loader)
    assert _global_states() == before


class Augmented:
    """Rows with noise of all three generators, drawn in whatever worker."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> list[float]:
        assert get_worker_info() is not None, "read in the main process"
        return [row, random.random(), float(np.random.random()), float(torch.rand(()))]


def test_what_workers_draw_does_not_depend_on_their_number_nor_on_a_resume() -> None:
    plan = plan_curriculum(difficulties(24), batch_size=6, stages=2, fingerprint="noisy")

    def load(workers: int) -> CurriculumLoader:
        options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork", "fingerprint": "noisy"}
        return CurriculumLoader(plan, Augmented(), collate_fn=list, **options)

    whole = list(load(1))
    assert len({noise for batch in whole for row in batch for noise in row[1:]}) == 3 * 24
    assert list(load(3)) == whole
    loader, stopped = load(2), load(2)
    running = iter(stopped)
    next(running)
    loader.load_state_dict(stopped.state_dict())
    assert list(loader) == whole[1:]


# The hook between stages


def test_the_hook_is_called_at_every_stage_but_the_first_and_its_plan_takes_over() -> None:
    n = 40
    pool = {"mode": "pool", "pacing": Pacing(kind="linear", start=0.5), "steps": 9, "stages": 3}
    plan = plan_curriculum(np.arange(n, dtype=np.float32), batch_size=4, **pool)
    options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 8, "multiprocessing_context": "fork"}
    loader = CurriculumLoader(plan, rows_of(n), verify=False, **options)
    called: list[tuple[int, int, int]] = []
    plans = [plan]

    def hook(given: CurriculumLoader, stage: int) -> Any:
        assert given is loader
        called.append((loader.epoch, loader.batch, stage))
        if (loader.epoch, stage) == (0, 2):
            return None
        order = np.random.default_rng(len(plans)).permutation(n)
        plans.append(plans[-1].revised(order, epoch=loader.epoch, start=loader.batch))
        return plans[-1]

    loader.on_stage = hook
    found = [read(loader), read(loader)]
    assert called == [(0, 3, 1), (0, 6, 2), (1, 0, 0), (1, 3, 1), (1, 6, 2)]
    follows = [[plans[0]] * 3 + [plans[1]] * 6, [plans[2]] * 3 + [plans[3]] * 3 + [plans[4]] * 3]
    for epoch in (0, 1):
        assert found[epoch] == [followed.batch(k, epoch).tolist() for k, followed in enumerate(follows[epoch])]
    assert planned(plan)[3:] != found[0][3:]


def test_a_plan_that_was_revised_is_replaced_before_its_state_is_loaded() -> None:
    pool = {"mode": "pool", "pacing": Pacing(kind="linear", start=0.5), "steps": 6, "stages": 2}
    plan = plan_curriculum(difficulties(40), batch_size=4, **pool)
    revised = plan.revised(np.arange(40)[::-1], start=3)
    loader = CurriculumLoader(plan, rows_of(40), verify=False)
    loader.on_stage = lambda _loader, stage: revised if stage else None
    running = iter(loader)
    for _ in range(4):
        next(running)
    state, rest = json.loads(json.dumps(loader.state_dict())), read(running)
    other = CurriculumLoader(plan, rows_of(40), verify=False)
    with pytest.raises(SparsortError, match=r"plan was revised \(revision 1 → none\)"):
        other.load_state_dict(state)
    other.replace_plan(revised)
    other.load_state_dict(state)
    assert read(other) == rest == [revised.batch(k).tolist() for k in (4, 5)]


def test_a_hook_set_later_is_not_bypassed_by_workers_that_were_kept() -> None:
    pool = {"mode": "pool", "pacing": Pacing(kind="linear", start=0.5), "steps": 4, "stages": 2}
    plan = plan_curriculum(np.arange(40, dtype=np.float32), batch_size=4, **pool)
    options: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = CurriculumLoader(plan, rows_of(40), verify=False, **options)
    assert read(loader) == planned(plan)
    revised = plan.revised(np.arange(40)[::-1], epoch=1, start=2)
    loader.on_stage = lambda _loader, stage: revised if stage else None
    assert read(loader) == [*planned(plan, 1)[:2], revised.batch(2, 1).tolist(), revised.batch(3, 1).tolist()]


def test_workers_that_were_kept_follow_a_plan_that_replaces_theirs() -> None:
    plan, other = (plan_curriculum(difficulties(24), batch_size=6, stages=2, seed=seed) for seed in (0, 1))
    options: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = CurriculumLoader(plan, rows_of(24), verify=False, **options)
    assert read(loader) == planned(plan)
    loader.replace_plan(other)
    assert read(loader) == planned(other, 1) != planned(plan, 1)


# What it refuses


def _loader(n: int = 12, **options: Any) -> CurriculumLoader:
    return CurriculumLoader(plan_curriculum(difficulties(12), batch_size=5), rows_of(n), verify=False, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _loader(11), "has 11 rows and the plan was made for 12"),
        (lambda: _loader(0), "has 0 rows"),
        (lambda: _loader(rank=2, world_size=2), "rank=2 of world_size=2"),
        (lambda: _loader(rank=-1), "rank=-1"),
        (lambda: _loader(world_size=0), "world_size=0"),
        (lambda: _loader(micro_batches=0), "micro_batches=0"),
        (lambda: _loader(num_workers=-1), "num_workers must be a whole number"),
        (lambda: CurriculumLoader([1, 2], rows_of(2)), "a loader follows a plan, not list"),
        (lambda: _loader().set_epoch(-1), "whole numbers from 0, not -1"),
        (lambda: _loader().set_epoch(1.5), "whole numbers from 0, not 1.5"),
        (lambda: _loader(world_size=5), "smallest global batch of the plan has 4 .* 5 ranks × 1 .* at most 4 in all"),
        (lambda: _loader(world_size=2, micro_batches=3), "2 ranks × 3 micro-batches need at least 6"),
    ],
)
def test_what_cannot_be_loaded_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        make()


def test_without_torch_distributed_ranks_of_none_are_one_process() -> None:
    loader = _loader(rank=None, world_size=None)
    assert sum(map(len, read(loader))) == 12


class Broken:
    def __init__(self, batched: bool) -> None:
        if batched:
            self.__getitems__ = lambda rows: [self[row] for row in rows]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> int:
        if row == 7:
            raise ValueError("cannot decode the image")
        return row


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_dataset_comes_through_with_its_rows_named(batched: bool, workers: int) -> None:
    plan = plan_curriculum(difficulties(12), batch_size=5)
    options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    with pytest.raises(ValueError, match="cannot decode the image") as caught:
        read(CurriculumLoader(plan, Broken(batched), verify=False, **options))
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    number = next(k for k, batch in enumerate(planned(plan)) if 7 in batch)
    named = ", ".join(map(str, planned(plan)[number]))
    assert f"Requested rows, in order: {named} (epoch 0, global batch {number})" in message
    assert ("The dataset raised this for row 7." in message) == (not batched)


def test_an_iterator_from_before_a_move_is_out_of_date() -> None:
    loader = _loader()
    state = loader.state_dict()
    for move in (
        lambda: loader.load_state_dict(state),
        lambda: loader.set_epoch(loader.epoch + 1),
        lambda: iter(loader),
    ):
        running = iter(loader)
        next(running)
        move()
        with pytest.raises(SparsortError, match="out of date"):
            next(running)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield from range(12)


def test_a_stream_under_a_plan_that_orders_is_sent_to_materialize() -> None:
    with pytest.raises(SparsortError, match=r"Write it once to a folder, .*materialize"):
        CurriculumLoader(plan_curriculum(difficulties(12), batch_size=4), Endless(), verify=False)
