"""Resume: the rest of an interrupted run equals the uninterrupted rest, as an ordered list, from every step."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

Batches = list[list[int]]
EPOCHS = 3
PLANS: dict[str, dict[str, Any]] = {
    "sorted": {},
    "stages": {"stages": 3},
    "paced": {"stages": 3, "pacing": Pacing(kind="linear", start=0.3), "later_epochs": "shuffle"},
    "folded": {"schedule": "folded", "folds": 2},
    "warm-up": {"warm_up": 0.4},
    "pool": {"mode": "pool", "pacing": Pacing(kind="linear", start=0.2), "steps": 6, "stages": 3},
    "tokens": {"token_budget": 60, "batch_size": None, "stages": 2},
    "packed": {"packing": "next_fit", "pack_length": 12, "batch_size": 4, "stages": 2},
}


def make_plan(name: str, n: int = 47, **others: Any) -> CurriculumPlan:
    chosen = {"batch_size": 8, **PLANS[name], **others}
    lengths = np.arange(n) % 5 + 1
    difficulty = (np.arange(n, dtype=np.float32) * 7) % 11
    return plan_curriculum(difficulty, lengths=lengths, **{k: v for k, v in chosen.items() if v is not None})


def tokens(n: int = 47) -> list[dict[str, list[int]]]:
    """Rows whose tokens all tell the row."""
    return [{"input_ids": [row] * (row % 5 + 1)} for row in range(n)]


def row_numbers(examples: list[dict[str, list[int]]]) -> list[int]:
    """The collator: the row of every document."""
    found = []
    for example in examples:
        starts = example.get("position_ids", [0])
        found += [token for token, place in zip(example["input_ids"], starts, strict=False) if place == 0]
    return found


def load(plan: CurriculumPlan, **options: Any) -> CurriculumLoader:
    if options.get("num_workers"):
        options["multiprocessing_context"] = "fork"
    return CurriculumLoader(plan, tokens(plan.n_rows), collate_fn=row_numbers, verify=False, **options)


def epochs(loader: CurriculumLoader, until: int = EPOCHS) -> Batches:
    """What is left of training: the batches of this epoch and the next ones, in a row."""
    seen = []
    while loader.epoch < until:
        seen += list(loader)
    return seen


def states(loader: CurriculumLoader, until: int = EPOCHS) -> list[str]:
    """The state before the first batch and after each batch, through JSON."""
    seen = [json.dumps(loader.state_dict())]
    while loader.epoch < until:
        seen += [json.dumps(loader.state_dict()) for _ in loader]
    return seen


@pytest.mark.parametrize("name", PLANS)
def test_the_rest_after_every_step_is_the_uninterrupted_rest(name: str) -> None:
    plan = make_plan(name)
    whole = epochs(load(plan))
    assert len(whole) == EPOCHS * plan.n_batches
    assert len(whole) > 10
    for step, state in enumerate(states(load(plan))):
        resumed = load(make_plan(name))
        resumed.load_state_dict(json.loads(state))
        assert epochs(resumed) == whole[step:], f"after step {step}"


@pytest.mark.parametrize("name", ["stages", "pool", "packed"])
def test_the_rest_is_the_same_with_workers_that_had_prefetched(name: str) -> None:
    plan = make_plan(name)
    whole = epochs(load(plan), until=2)
    written = states(load(plan, num_workers=2, prefetch_factor=3), until=2)
    assert written == states(load(plan), until=2)
    splits = itertools.cycle([(1, None), (2, 1), (3, 2)])
    for step, state in enumerate(written):
        workers, prefetch = next(splits)
        resumed = load(plan, num_workers=workers, prefetch_factor=prefetch)
        resumed.load_state_dict(json.loads(state))
        assert epochs(resumed, until=2) == whole[step:], f"after step {step} with {workers} workers"


_NEW_PROCESS = """
import json, sys
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.plan import CurriculumPlan

def rest(folder, state, workers, epochs):
    loader = CurriculumLoader(CurriculumPlan.open(folder), list(range(47)), num_workers=workers, collate_fn=list, verify=False)
    loader.load_state_dict(state)
    seen = []
    while loader.epoch < epochs:
        seen += list(loader)
    return seen

jobs = json.load(sys.stdin)
json.dump([rest(*job) for job in jobs], sys.stdout)
"""


def test_the_rest_is_the_same_in_a_new_process_for_every_step(tmp_path: Path) -> None:
    jobs, expected = [], []
    for name in ("stages", "paced", "pool"):
        plan = make_plan(name).save(tmp_path / name)
        whole = epochs(CurriculumLoader(plan, list(range(47)), collate_fn=list, verify=False))
        for step, state in enumerate(states(CurriculumLoader(plan, list(range(47)), collate_fn=list, verify=False))):
            jobs.append([str(tmp_path / name), json.loads(state), int(step % 7 == 3), EPOCHS])
            expected.append(whole[step:])
    done = subprocess.run(
        [sys.executable, "-c", _NEW_PROCESS], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    assert len(expected) == 3 * (EPOCHS * 6 + 1)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(PLANS)),
    n=st.integers(24, 70),
    stops=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=4),
)
def test_stopping_again_and_again_on_other_ranks_and_micro_batches(
    name: str, n: int, stops: list[tuple[int, int, int]]
) -> None:
    plan = make_plan(name, n, batch_size=None if name == "tokens" else 8)
    whole = epochs(load(plan))
    state, seen = load(plan).state_dict(), []
    for steps, world_size, micro_batches in [*stops, (10**6, 1, 1)]:
        if plan.smallest_batch < world_size * micro_batches:
            world_size = micro_batches = 1
        loaders = [
            load(plan, rank=rank, world_size=world_size, micro_batches=micro_batches) for rank in range(world_size)
        ]
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            if loaders[0].epoch + loaders[0].batch // plan.n_batches >= EPOCHS:
                break
            epoch, number = loaders[0].epoch + loaders[0].batch // plan.n_batches, loaders[0].batch % plan.n_batches
            parts = [_one_global_batch(loader, micro_batches) for loader in loaders]
            items = plan.bins(number, epoch) if plan.settings.packing != "none" else None
            seen.append(_interleaved(parts, items))
        written = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(written) == 1, "the state is the same on every rank"
        state = json.loads(written.pop())
    assert seen == whole


def _one_global_batch(loader: CurriculumLoader, micro_batches: int) -> list[int]:
    running = iter(loader)
    return list(itertools.chain.from_iterable(next(running) for _ in range(micro_batches)))


def _interleaved(parts: list[list[int]], bins: list[Any] | None) -> list[int]:
    """One item of each rank in turn; an item is a row, or the rows of a packed sequence."""
    left = [list(part) for part in parts]
    sizes = itertools.repeat(1) if bins is None else iter([len(rows) for rows in bins])
    found: list[int] = []
    for part in itertools.cycle(left):
        if not any(left):
            return found
        if part:
            size = next(sizes)
            found += part[:size]
            del part[:size]
    return found


def test_a_state_between_micro_batches_names_the_global_batch_they_belong_to() -> None:
    plan = make_plan("stages")
    loader = load(plan, micro_batches=3)
    running = iter(loader)
    for _ in range(4):
        next(running)
    resumed = load(plan)
    resumed.load_state_dict(loader.state_dict())
    assert (resumed.epoch, resumed.batch) == (0, 1)
    assert next(iter(resumed)) == plan.batch(1).tolist()


@pytest.mark.parametrize("persistent", [False, True])
def test_a_state_is_loaded_while_iterating(persistent: bool) -> None:
    plan = make_plan("stages")
    loader = load(plan, num_workers=1, persistent_workers=persistent)
    running = iter(loader)
    first = next(running)
    state = loader.state_dict()
    second = next(running)
    loader.load_state_dict(state)
    with pytest.raises(SparsortError, match="out of date"):
        next(running)
    again = iter(loader)
    assert next(again) == second
    assert [first, second] == [plan.batch(0).tolist(), plan.batch(1).tolist()]


def test_after_the_last_batch_the_next_epoch_follows_whether_the_loop_ended_or_not() -> None:
    plan = make_plan("stages")
    loader = load(plan)
    running = iter(loader)
    for _ in range(plan.n_batches):
        next(running)
    within = loader.state_dict()
    assert (within["epoch"], within["batch"]) == (0, plan.n_batches)
    assert list(running) == []
    after = loader.state_dict()
    assert (after["epoch"], after["batch"]) == (1, 0)
    for state in (within, after):
        resumed = load(plan)
        resumed.load_state_dict(state)
        assert (resumed.epoch, resumed.batch) == (1, 0)
        assert list(resumed) == [plan.batch(k, 1).tolist() for k in range(plan.n_batches)]


class Many:
    """Any number of rows with many columns that have long names; nothing is stored."""

    def __len__(self) -> int:
        return self.n

    def __init__(self, n: int) -> None:
        self.n = n

    def __getitem__(self, row: int) -> dict[str, int]:
        return {f"{'column ' * 8}{i}": row for i in range(60)}


@pytest.mark.parametrize("n", [12, 200_000])
def test_a_state_is_json_of_less_than_a_kibibyte(n: int) -> None:
    plan = plan_curriculum(np.zeros(n), batch_size=12, schedule="as_given", seed=2**62)
    loader = CurriculumLoader(plan, Many(n), verify=False)
    loader.set_epoch(10**6)
    state = json.dumps(loader.state_dict())
    assert len(state) < 1024
    assert json.loads(state) == loader.state_dict()


# What is refused


def _state(**changed: Any) -> dict[str, Any]:
    return {**load(make_plan("stages")).state_dict(), **changed}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "not a state of a CurriculumLoader"),
        (None, "not a state of a CurriculumLoader: None"),
        ({"_iterator": 1, "samples": 7}, "keys _iterator, samples"),
        (_state(version=2), "version 2; this sparsort reads 1. Resume with the sparsort that wrote it"),
        (_state(version="1"), "damaged: its format version is .1., not a whole number"),
        (_state(data={"rows": 46, "columns": {}}), "had 46 rows and this has 47"),
        (_state(data="mine"), "saved as fingerprint='mine'"),
        (
            {"format": "sparsort-loader", "version": 1},
            "the state has no 'plan', so it is damaged. Resume from an earlier",
        ),
        (_state(batch=7), "batch 7, and the plan has 6"),
        (_state(batch=-1), "damaged"),
        (_state(batch=1.0), "damaged"),
        (_state(epoch=None), "damaged"),
        (_state(epoch=True), "damaged"),
    ],
)
def test_a_state_of_something_else_is_refused(state: Any, message: str) -> None:
    loader = load(make_plan("stages"))
    with pytest.raises(SparsortError, match=message):
        loader.load_state_dict(state)
    assert (loader.epoch, loader.batch) == (0, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_size": 9}, "global batch of 8 .* Keep per-device batch × accumulation × processes = 8"),
        ({"seed": 1}, "differ in seed 0 → 1"),
        ({"stages": 2, "direction": "random"}, "differ in direction 'easy_to_hard' → 'random', stages 3 → 2"),
        ({"later_epochs": "shuffle"}, "a setting such as pacing"),
        ({"batch_size": None, "token_budget": 40}, "plan has a token budget"),
    ],
)
def test_a_state_of_another_plan_is_refused_with_what_differs(other: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        load(make_plan("stages", **other)).load_state_dict(_state())


def test_a_state_of_other_scores_or_other_data_is_refused() -> None:
    plan = make_plan("stages")
    scores = plan_curriculum(np.arange(47), lengths=plan.lengths, batch_size=8, stages=3)
    with pytest.raises(SparsortError, match="settings are the same, so the plans were made from different scores"):
        load(scores).load_state_dict(_state())
    changed = [{"input_ids": [row["input_ids"][0] + 1]} for row in tokens()]
    with pytest.raises(SparsortError, match=r"other values in input_ids\. Resume with that data"):
        CurriculumLoader(plan, changed, verify=False).load_state_dict(_state())
