"""Generation batches: the layout of TRL's RepeatSampler as accelerate shards it, every prompt seen, and exact positions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from trl.trainer.utils import RepeatSampler

from sparsort.curriculum.loading.loader.groups import Groups, prompts_of
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError

Batches = list[list[int]]


def _plan(n: int, prompts: int, **options: Any) -> CurriculumPlan:
    return plan_curriculum(np.random.default_rng(0).permutation(n), batch_size=prompts, seed=3, **options)


def _loader(plan: CurriculumPlan, groups: Groups, **options: Any) -> CurriculumLoader:
    rows = list(range(plan.n_rows))
    return CurriculumLoader(plan, rows, groups=groups, collate_fn=list, verify=False, **options)


def _trl(order: list[int], groups: Groups, rank: int, ranks: int) -> Batches:
    """What rank `rank` gets from TRL's sampler over rows that are already in order, sharded as accelerate does it."""
    sampler = RepeatSampler(
        order,
        mini_repeat_count=groups.num_generations,
        batch_size=groups.prompts,
        repeat_count=groups.repeats,
        shuffle=False,
    )
    size = groups.prompts * groups.num_generations // ranks
    shard = BatchSamplerShard(BatchSampler(sampler, size, drop_last=False), num_processes=ranks, process_index=rank)
    return [[order[place] for place in batch] for batch in shard]


@pytest.mark.parametrize("schedule", ["shuffle", "sorted"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("prompts", "num_generations", "repeats"), [(4, 2, 1), (2, 4, 6), (3, 4, 2), (1, 4, 3)])
def test_the_layout_is_trls(schedule: Any, ranks: int, prompts: int, num_generations: int, repeats: int) -> None:
    groups = Groups(prompts=prompts, num_generations=num_generations, repeats=repeats)
    plan = _plan(6 * prompts, prompts, schedule=schedule)
    for rank in range(ranks):
        loader = _loader(plan, groups, rank=rank, world_size=ranks)
        for epoch in range(2):
            order = [row for number in range(plan.n_batches) for row in plan.batch(number, epoch).tolist()]
            assert list(loader) == _trl(order, groups, rank, ranks)
            assert len(loader) == 6 * repeats


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(9, 60),
    prompts=st.integers(1, 9),
    epoch=st.integers(0, 2),
    mode=st.sampled_from(["sorted", "shuffle"]),
)
def test_generation_batches_are_full_and_show_every_prompt(n: int, prompts: int, epoch: int, mode: Any) -> None:
    plan = _plan(n, prompts, schedule=mode)
    batches = [prompts_of(plan, number, epoch, prompts).tolist() for number in range(plan.n_batches)]
    assert all(len(set(batch)) == prompts for batch in batches)
    counts = np.bincount(np.concatenate(batches), minlength=n)
    assert counts.min() == 1
    assert counts.max() <= 2
    assert (counts == 2).sum() == prompts * plan.n_batches - n < prompts
    # Filling keeps the order of the plan.
    places = {
        row: place for place, row in enumerate(np.concatenate([plan.batch(k, epoch) for k in range(plan.n_batches)]))
    }
    for batch in batches:
        assert [places[row] for row in batch] == list(range(places[batch[0]], places[batch[0]] + prompts))


def test_a_pool_draws_whole_generation_batches() -> None:
    plan = _plan(20, 4, mode="pool", steps=5, pacing="linear:start=0.2")
    loader = _loader(plan, Groups(prompts=4, num_generations=2))
    assert list(loader) == [np.repeat(plan.batch(number), 2).tolist() for number in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_from_every_position(workers: int) -> None:
    groups = Groups(prompts=4, num_generations=2, repeats=3)
    plan = _plan(14, 4)
    options: dict[str, Any] = {"num_workers": workers, "rank": 1, "world_size": 2}
    whole = _loader(plan, groups, **options)
    yielded, states = [], [json.dumps(whole.state_dict())]
    for _ in range(2):
        for batch in whole:
            yielded.append(batch)
            states.append(json.dumps(whole.state_dict()))
    assert len(yielded) == 24
    assert max(len(state) for state in states) < 1024
    # Starting workers is slow, so with workers only a few positions are tried.
    for place in range(0, 25, 1 if workers == 0 else 7):
        again = _loader(plan, groups, **options)
        again.load_state_dict(json.loads(states[place]))
        rest = [batch for _ in range(2) for batch in again][: 24 - place]
        assert rest == yielded[place:]


def test_the_position_counts_turns() -> None:
    loader = _loader(_plan(8, 4), Groups(prompts=4, num_generations=2, repeats=3))
    assert loader.total_batch_size == 8
    batches = iter(loader)
    seen = []
    for _ in range(5):
        next(batches)
        seen.append((loader.batch, loader.turn, loader.yielded))
    assert seen == [(0, 1, 1), (0, 2, 2), (1, 0, 3), (1, 1, 4), (1, 2, 5)]


def test_a_state_of_another_layout_is_refused() -> None:
    plan = _plan(8, 4)
    loader = _loader(plan, Groups(prompts=4, num_generations=2, repeats=3))
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    with pytest.raises(SparsortError, match=r"yielded 2 times, and this loader yields each of them 2 times"):
        _loader(plan, Groups(prompts=4, num_generations=2, repeats=2)).load_state_dict(state)
    with pytest.raises(SparsortError, match=r"yielded 2 times, and this loader yields no generation batches"):
        CurriculumLoader(plan, list(range(8)), verify=False).load_state_dict(state)


@pytest.mark.parametrize(
    ("plan", "groups", "options", "message"),
    [
        (_plan(8, 4), {"prompts": 2}, {}, r"Plan with batch_size=2, or change the generation batch to 8 rows"),
        (_plan(8, 4), {}, {"rank": 0, "world_size": 3}, r"8 rows, which 3 ranks cannot share equally"),
        (_plan(8, 4), {}, {"micro_batches": 2}, r"micro_batches=2 would divide a generation batch.*Omit micro_batches"),
        (
            plan_curriculum(range(8), lengths=[2] * 8, token_budget=8),
            {},
            {},
            r"Plan with batch_size=4, and without token",
        ),
    ],
)
def test_plans_and_options_that_do_not_fit_are_refused(
    plan: CurriculumPlan, groups: dict[str, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SparsortError, match=message):
        _loader(plan, Groups(**{"prompts": 4, "num_generations": 2, **groups}), **options)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None])
def test_groups_need_whole_numbers(wrong: Any) -> None:
    with pytest.raises(SparsortError, match=f"num_generations={wrong!r}: groups need a whole number of at least 1"):
        Groups(prompts=4, num_generations=wrong)
    with pytest.raises(SparsortError, match=r"groups=3: expected Groups\(prompts"):
        CurriculumLoader(_plan(8, 4), list(range(8)), groups=3, verify=False)  # type: ignore[arg-type]
    with pytest.raises(SparsortError, match=r"micro_batches=1.5: expected a whole number"):
        CurriculumLoader(_plan(8, 4), list(range(8)), micro_batches=1.5, verify=False)  # type: ignore[arg-type]
