"""Streams: loaded as they come under schedule="as_given", written to a folder for any other order, refused otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from torch.utils.data import IterableDataset

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.loader.streams import is_stream, materialize
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

N = 31


class Lines:
    """A plain iterable, that starts again each time, that knows how far it was read."""

    def __init__(self, n: int = N) -> None:
        self.n, self.furthest = n, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in range(self.n):
            self.furthest = max(self.furthest, row + 1)
            yield {"row": row, "input_ids": [row] * (row % 4 + 1)}


class Torch(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(Lines())


def as_given(n: int = N, **options: Any) -> CurriculumPlan:
    return plan_curriculum(np.zeros(n), schedule="as_given", **{"batch_size": 6, **options})


def rows(examples: list[dict[str, Any]]) -> list[int]:
    return [example["row"] for example in examples]


def load(plan: CurriculumPlan, data: Any, **options: Any) -> CurriculumLoader:
    if options.get("num_workers"):
        options["multiprocessing_context"] = "fork"
    return CurriculumLoader(plan, data, **{"verify": False, "collate_fn": rows, **options})


def two_epochs(loader: CurriculumLoader) -> list[list[int]]:
    seen = []
    while loader.epoch < 2:
        seen += list(loader)
    return seen


STREAMS: dict[str, Any] = {
    "plain": Lines,
    "torch": Torch,
    "datasets": lambda: datasets.Dataset.from_list(list(Lines())).to_iterable_dataset(num_shards=3),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(
    "split", [{}, {"rank": 1, "world_size": 2}, {"micro_batches": 3}, {"rank": 2, "world_size": 3, "micro_batches": 1}]
)
@pytest.mark.parametrize("workers", [0, 1, 3])  # above 1, the other kinds are refused, see below
def test_a_stream_gives_the_batches_of_the_same_rows_with_random_access(
    kind: str, split: dict[str, int], workers: int
) -> None:
    workers = workers if kind == "plain" else min(workers, 1)
    plan = as_given()
    stream = load(plan, STREAMS[kind](), num_workers=workers, **split)
    assert two_epochs(stream) == two_epochs(load(plan, list(Lines()), **split))


@pytest.mark.parametrize("kind", STREAMS)
def test_a_resume_after_every_step_skips_what_was_consumed(kind: str) -> None:
    plan, split = as_given(), {"rank": 1, "world_size": 2, "micro_batches": 2}
    loader = load(plan, STREAMS[kind](), **split)
    whole, states = [], [json.dumps(loader.state_dict())]
    while loader.epoch < 2:
        for batch in loader:
            whole.append(batch)
            states.append(json.dumps(loader.state_dict()))
    assert len(whole) == 2 * 2 * 6
    for step, state in enumerate(states):
        resumed = load(plan, STREAMS[kind](), num_workers=step % 5 == 1, **split)
        resumed.load_state_dict(json.loads(state))
        assert two_epochs(resumed) == whole[step - step % 2 :], f"after step {step}"


class Skips(Lines):
    def skip(self, n: int) -> Iterator[dict[str, Any]]:
        self.skipped = n
        return iter([example for example in Lines(self.n) if example["row"] >= n])


def test_the_streams_own_skip_is_used() -> None:
    plan, stream = as_given(), Skips()
    loader = load(plan, stream, fingerprint="lines")
    loader.load_state_dict({**loader.state_dict(), "batch": 4})
    assert list(loader) == [plan.batch(4).tolist(), plan.batch(5).tolist()]
    assert stream.skipped == plan.batch(4)[0] > 0
    assert stream.furthest == 0


def test_a_stream_is_read_no_further_than_asked() -> None:
    stream = Lines()
    running = iter(load(as_given(), stream))
    next(running)
    next(running)
    assert stream.furthest == len(as_given().batch(0)) + len(as_given().batch(1))


def test_a_stream_is_packed_and_cut_by_tokens_as_the_same_rows_are() -> None:
    lengths = np.arange(N) % 4 + 1
    for options in (
        {"batch_size": 3, "packing": "next_fit", "pack_length": 9},
        {"batch_size": None, "token_budget": 20},
        {"max_length": 2},
    ):
        chosen = {name: value for name, value in {"batch_size": 6, **options}.items() if value is not None}
        plan = plan_curriculum(np.zeros(N), schedule="as_given", lengths=lengths, **chosen)
        split = {"micro_batches": min(2, plan.smallest_batch), "collate_fn": list}
        assert two_epochs(load(plan, Lines(), **split)) == two_epochs(load(plan, list(Lines()), **split))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_of_another_length_than_the_plans_is_an_error(workers: int) -> None:
    with pytest.raises(SparsortError, match="ended after 29 rows, and the plan was made for 31"):
        list(load(as_given(), Lines(29), num_workers=workers))
    with pytest.raises(SparsortError, match="continues after the 31 rows"):
        list(load(as_given(), Lines(32), num_workers=workers))
    loader = load(as_given(), Lines(5), num_workers=workers)
    loader.load_state_dict({**loader.state_dict(), "batch": 4})
    with pytest.raises(SparsortError, match="ended"):
        next(iter(loader))


def test_a_stream_that_is_too_long_is_an_error_for_a_trainer_that_stops_at_the_last_batch() -> None:
    loader = load(as_given(), Lines(32))
    with pytest.raises(SparsortError, match="continues after the 31 rows"):
        list(islice(loader, len(loader)))


def test_a_stream_under_a_plan_that_puts_it_in_another_order_is_refused() -> None:
    scores = np.arange(N)
    for plan in (plan_curriculum(scores, batch_size=6), plan_curriculum(scores, batch_size=6, schedule="shuffle")):
        with pytest.raises(SparsortError, match=r"read from front to back. Write it once .* materialize\(stream"):
            load(plan, Lines())
    lengths = np.array([6, 6, 3, 3, 6, 3] * 6)[:N]
    later = plan_curriculum(
        np.zeros(N), schedule="as_given", lengths=lengths, batch_size=2, packing="best_fit", pack_length=9
    )
    assert later.batch(0).tolist() == [0, 2, 1, 3]
    with pytest.raises(SparsortError, match="changes the order"):
        list(load(later, Lines(), collate_fn=list))


def test_what_can_be_read_only_once_or_not_at_all_is_refused() -> None:
    with pytest.raises(SparsortError, match="can be read only once"):
        load(as_given(), iter(Lines()))
    with pytest.raises(SparsortError, match="a int is not a dataset"):
        load(as_given(), 7)


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_streams_that_divide_themselves_among_workers_have_one(kind: str) -> None:
    with pytest.raises(SparsortError, match=r"num_workers=2: .* Use num_workers=1"):
        load(as_given(), STREAMS[kind](), num_workers=2)


def test_an_error_of_the_stream_names_the_rows() -> None:
    class Broken(Lines):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from list(super().__iter__())[:8]
            raise ValueError("cannot parse")

    with pytest.raises(ValueError, match="cannot parse") as caught:
        list(load(as_given(), Broken()))
    assert "Requested rows, in order: 5, 6, 7, 8, 9 (epoch 0, global batch 1)." in caught.value.__notes__


def test_lists_and_datasets_are_no_streams() -> None:
    assert not is_stream([1])
    assert not is_stream(datasets.Dataset.from_dict({"a": [1]}))
    assert all(is_stream(make()) for make in STREAMS.values())


# Writing a stream to a folder


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_written_once_and_memory_mapped(kind: str, tmp_path: Path) -> None:
    made = materialize(STREAMS[kind](), tmp_path / "inner" / "rows")
    assert made.to_list() == list(Lines())
    again = datasets.load_from_disk(tmp_path / "inner" / "rows", keep_in_memory=False)
    assert again.to_list() == list(Lines())
    assert again.cache_files[0]["filename"].startswith(str(tmp_path))
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["rows"]
    plan = plan_curriculum(np.arange(N)[::-1], batch_size=6)
    assert list(chain.from_iterable(load(plan, again))) == list(range(N))[::-1]


def test_the_features_of_a_datasets_stream_are_kept(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    stream = datasets.Dataset.from_dict({"label": [0, 1, 1]}, features=features).to_iterable_dataset()
    assert materialize(stream, tmp_path / "rows").features == features


def test_what_cannot_be_written_leaves_no_files(tmp_path: Path) -> None:
    class Fails(Lines):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from super().__iter__()
            raise ValueError("the connection broke")

    with pytest.raises(ValueError, match="the connection broke"):
        materialize(Fails(), tmp_path / "rows")
    with pytest.raises(SparsortError, match="row 0 of the stream is a int"):
        materialize([1, 2], tmp_path / "rows")  # type: ignore[list-item]
    with pytest.raises(SparsortError, match="no rows"):
        materialize([], tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "rows").mkdir()
    with pytest.raises(SparsortError, match=r"already exists\. Open it with"):
        materialize(Lines(), tmp_path / "rows")
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsortError, match="cannot write"):
        materialize(Lines(), tmp_path / "file" / "rows")
