"""Comparison of a dataset with the rows of a plan: which differences are found, which are refused, and which are accepted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

import sparsort
from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.loader.verification import note_rows, verify_every_row, verify_rows
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError
from sparsort.scoring.data.digests import digest_of
from sparsort.scoring.store.scores import Scores
from sparsort.storage.integrity import seal

N = 300  # more than the rows of a sample
ROWS = [{"id": f"r{place}", "text": f"{place} " + "word " * (1 + place * 7 % 13)} for place in range(N)]
OTHER_ROWS = "not the rows that the plan was made for, or they are in another order"
INCOMPARABLE = "cannot tell whether these are the rows"
WAYS_OUT = ("Keep ", "fingerprint=", "to plan_curriculum, which stores it, and to this call", "verify=False")


def scored(rows: list[dict[str, Any]], **options: Any) -> Scores:
    return sparsort.CompressionScorer().score(rows, prompt="{text}", **options)


@pytest.fixture(scope="module")
def plan() -> CurriculumPlan:
    return plan_curriculum(scored(ROWS), data=ROWS, batch_size=8)


@pytest.fixture(scope="module")
def nameless() -> CurriculumPlan:
    """The plan of rows without ids, which the scorer counted instead."""
    return plan_curriculum(scored(only(ROWS, "text")), batch_size=8)


def only(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]


def tokenised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"input_ids": [len(row["text"])]} for row in rows]


def exchanged(rows: list[Any], first: int, second: int) -> list[Any]:
    rows = list(rows)
    rows[first], rows[second] = rows[second], rows[first]
    return rows


def shuffled(rows: list[Any], seed: int = 0) -> list[Any]:
    return random.Random(seed).sample(rows, len(rows))


class MapStyle(torch.utils.data.Dataset[Any]):
    """A dataset of which nothing is known but its length and its rows, and which counts how many are read."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        self.read += 1
        return self.rows[row]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "dataset": datasets.Dataset.from_list,
    "indexed": lambda rows: datasets.Dataset.from_list(rows[::-1]).select(range(len(rows) - 1, -1, -1)),
    "formatted": lambda rows: datasets.Dataset.from_list(rows).with_format("torch", columns=[]),
    "transformed": lambda rows: datasets.Dataset.from_list(rows).with_transform(lambda batch: {"x": [0] * len(batch)}),
    "map-style": MapStyle,
}


# What is compared


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [("id", "text"), ("id",), ("text",)])
def test_a_shuffle_is_found_by_whatever_was_kept(plan: CurriculumPlan, form: str, kept: tuple[str, ...]) -> None:
    rows = only(ROWS, *kept)
    verify_rows(plan, FORMS[form](rows))
    what = "the id 'r" if "id" in kept else "another text"
    for other in (rows[::-1], shuffled(rows), rows[1:] + rows[:1], exchanged(rows, 0, N - 1)):
        with pytest.raises(SparsortError, match=f"{OTHER_ROWS}: row \\d+ has {what}"):
            verify_rows(plan, FORMS[form](other))


@pytest.mark.parametrize("form", [name for name in FORMS if name != "map-style"])
def test_of_ids_two_exchanged_rows_are_found_anywhere(plan: CurriculumPlan, form: str) -> None:
    places = [place for place in range(N) if str(place) not in plan.notes["ids"]["sample"]]
    pairs = [(N - 2, N - 1), tuple(random.Random(3).sample(places, 2))]
    for pair in pairs:
        with pytest.raises(SparsortError, match=OTHER_ROWS):
            verify_rows(plan, FORMS[form](exchanged(ROWS, *pair)))


def test_the_error_names_the_row_and_both_ids(plan: CurriculumPlan) -> None:
    with pytest.raises(SparsortError, match=r"row 7 has the id 'r9' in the column 'id', and the plan's row 7 has 'r7'"):
        CurriculumLoader(plan, exchanged(ROWS, 7, 9))
    with pytest.raises(SparsortError, match=r"row 7 has no id in the column 'id'"):
        CurriculumLoader(plan, [row if place != 7 else {"text": row["text"]} for place, row in enumerate(ROWS)])


def test_ids_are_compared_as_text_whatever_holds_them() -> None:
    numbers = [{"id": 7 * place, "text": "word " * (place % 5 + 1)} for place in range(20)]
    plan = plan_curriculum(scored(numbers), batch_size=4)
    for kind in (str, np.int64, torch.tensor):
        verify_rows(plan, [{"id": kind(row["id"])} for row in numbers])
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        verify_rows(plan, [{"id": torch.tensor(row["id"])} for row in numbers[::-1]])


def test_another_id_column_is_taken_from_the_scores_or_from_the_caller() -> None:
    rows = [{"uid": row["id"], "id": "the same", "text": row["text"]} for row in ROWS]
    difficulty = np.arange(N)
    for plan in (
        plan_curriculum(scored(rows, id_column="uid"), batch_size=8),
        plan_curriculum(difficulty, data=rows, id_column="uid", batch_size=8),
        plan_curriculum(difficulty, ids=[row["uid"] for row in rows], id_column="uid", batch_size=8),
    ):
        verify_rows(plan, only(rows, "uid", "id"))
        with pytest.raises(SparsortError, match="in the column 'uid'"):
            verify_rows(plan, only(rows[::-1], "uid", "id"))
    with pytest.raises(SparsortError, match=r"row 0 of the data has no 'uuid'"):
        plan_curriculum(difficulty, data=rows, id_column="uuid", batch_size=8)


def test_ids_that_are_places_or_repeat_identify_nothing() -> None:
    rows = [{"text": row["text"]} for row in ROWS]
    counted = plan_curriculum(scored(rows), batch_size=8)
    assert "ids" not in counted.notes
    # The dataset has ids of its own, "0", "1", … among them, that the scores did not have.
    verify_rows(counted, [{"id": str(N - place), **row} for place, row in enumerate(rows)])
    with pytest.raises(SparsortError, match="another text"):
        verify_rows(counted, [{"id": str(place), **row} for place, row in enumerate(rows[::-1])])
    repeated = plan_curriculum(np.arange(N), data=[{"id": "a", **row} for row in rows], batch_size=8)
    assert "ids" not in repeated.notes


def test_a_plan_of_numbers_over_data_knows_their_contents() -> None:
    difficulty = np.arange(40.0)
    kinds: dict[str, list[Any]] = {
        "mappings": [{"x": [place, 1], "only here": place} if place % 2 else {"x": [place, 1]} for place in range(40)],
        "numbers": list(range(40)),
        "texts": [f"text {place}" for place in range(40)],
        "tensors": [torch.arange(3000) + place for place in range(40)],  # whose repr is the same in the middle
        "tuples": [(torch.tensor([place]), place) for place in range(40)],
    }
    for rows in kinds.values():
        plan = plan_curriculum(difficulty, data=rows, batch_size=8)
        verify_rows(plan, MapStyle(rows))
        with pytest.raises(SparsortError, match=f"{OTHER_ROWS}: row 0 has another (x|content)"):
            verify_rows(plan, MapStyle(exchanged(rows, 0, 20)))
    inner = [torch.arange(3000) for _ in range(40)]
    for place, tensor in enumerate(inner):
        tensor[1500] = place
    verify_rows(plan_curriculum(difficulty, data=inner, batch_size=8), inner)


class Opaque:
    """An object that says nothing of its content."""


def test_contents_that_are_all_alike_identify_nothing() -> None:
    for rows in ([Opaque() for _ in range(20)], [{"text": "the same"} for _ in range(20)]):
        plan = plan_curriculum(np.arange(20), data=rows, batch_size=4)
        with pytest.raises(SparsortError, match=INCOMPARABLE):
            verify_rows(plan, rows)


def test_rare_contents_are_in_the_sample() -> None:
    """Of 2000 rows, 10 differ from the others: they alone tell a shuffle."""
    rows = [{"level": 1 if place % 200 == 77 else 0} for place in range(2000)]
    plan = plan_curriculum(sparsort.ColumnScorer(column="level").score(rows), data=rows, batch_size=8)
    assert len(plan.notes["content"]["sample"]) <= 144
    found = 0
    for seed in range(20):
        try:
            verify_rows(plan, shuffled(rows, seed))
        except SparsortError:
            found += 1
    assert found == 20


def test_a_sample_finds_moved_rows_as_often_as_the_formula_says(nameless: CurriculumPlan) -> None:
    n = 4000
    rows = [{"text": str(place)} for place in range(n)]
    plan = plan_curriculum(np.arange(n), data=rows, batch_size=8)
    places = [int(place) for place in plan.notes["content"]["sample"]]
    assert len(places) <= 144
    assert set(range(16)) | {n - 1} <= set(places)
    generator = np.random.default_rng(0)
    share, missed, draws = 0.02, 0, 2000
    inner = [place for place in places if 16 <= place < n - 1]
    for _ in range(draws):
        moved = generator.choice(np.arange(16, n - 1), int(share * n), replace=False)
        missed += not np.isin(inner, moved).any()
    expected = (1 - share) ** 128
    assert abs(missed / draws - expected) < 4 * np.sqrt(expected / draws)


# What cannot be compared


def test_nothing_to_compare_is_refused_with_the_three_ways_out(plan: CurriculumPlan, nameless: CurriculumPlan) -> None:
    numbers = plan_curriculum(np.arange(N), batch_size=8)
    whole_rows = plan_curriculum(
        sparsort.ColumnScorer(column="n").score([{"n": place} for place in range(N)]), batch_size=8
    )
    renamed = [{"uid": row["id"], "body": row["text"]} for row in ROWS]
    for each, rows in (
        (plan, tokenised(ROWS)),
        (plan, renamed),
        (nameless, only(ROWS, "id")),
        (nameless, tokenised(ROWS)),
        (numbers, ROWS),
        (whole_rows, renamed),
        (plan, [torch.zeros(1)] * N),
    ):
        for form in ("list", "map-style"):
            with pytest.raises(SparsortError, match=INCOMPARABLE) as refused:
                CurriculumLoader(each, FORMS[form](rows))
            assert all(way in str(refused.value) for way in WAYS_OUT)
        assert len(CurriculumLoader(each, rows, verify=False)) == each.n_batches
    with pytest.raises(SparsortError, match=r"Keep the column 'id' in the dataset;"):
        CurriculumLoader(plan, renamed)
    with pytest.raises(SparsortError, match=r"made from numbers alone.*plan_curriculum\(scores, data=rows\)"):
        CurriculumLoader(numbers, ROWS)


def test_each_way_out_works(tmp_path: Path) -> None:
    scores = scored(ROWS)
    with_ids = [{**new, "id": row["id"]} for new, row in zip(tokenised(ROWS), ROWS, strict=True)]
    assert len(CurriculumLoader(plan_curriculum(scores, batch_size=50), with_ids)) == 6
    named = plan_curriculum(scores, batch_size=50, fingerprint="corpus", out=tmp_path / "plan")
    for each in (named, CurriculumPlan.open(tmp_path / "plan")):
        assert len(CurriculumLoader(each, tokenised(ROWS), fingerprint="corpus")) == 6
    with pytest.raises(SparsortError, match="made for the data fingerprint='corpus', and this is fingerprint='other'"):
        CurriculumLoader(named, with_ids, fingerprint="other")
    with pytest.raises(SparsortError, match="fingerprint='corpus' to plan_curriculum"):
        CurriculumLoader(named, tokenised(ROWS))
    with pytest.raises(SparsortError, match="The dataset is fingerprint='corpus', and the plan has no name"):
        CurriculumLoader(plan_curriculum(scores, batch_size=50), tokenised(ROWS), fingerprint="corpus")
    assert len(CurriculumLoader(named, tokenised(ROWS), verify=False)) == 6
    for wrong in ("", 7, ["corpus"]):
        for call in (
            lambda wrong=wrong: plan_curriculum(scores, batch_size=50, fingerprint=wrong),
            lambda wrong=wrong: CurriculumLoader(named, ROWS, fingerprint=wrong),
        ):
            with pytest.raises(SparsortError, match="fingerprint= is your own name for the data"):
                call()


def test_names_that_agree_read_no_row() -> None:
    data = MapStyle(ROWS)
    plan = plan_curriculum(np.arange(N), batch_size=50, fingerprint="corpus")
    loader = CurriculumLoader(plan, data, fingerprint="corpus")
    assert (data.read, loader.state_dict()["data"]) == (0, "corpus")
    other = CurriculumLoader(plan_curriculum(scored(ROWS), batch_size=50), data)
    assert data.read == len(other.plan.notes["ids"]["sample"]) + 1 <= 145  # the first tells the columns


def test_the_number_of_rows_is_compared_even_unverified(plan: CurriculumPlan) -> None:
    for options in ({}, {"verify": False}):
        with pytest.raises(SparsortError, match=f"the dataset has {N - 1} rows and the plan was made for {N}"):
            CurriculumLoader(plan, ROWS[1:], **options)


def test_a_data_frame_is_read_as_rows(plan: CurriculumPlan) -> None:
    # Its [0] is a column, or nothing.
    assert list(CurriculumLoader(plan, pd.DataFrame(ROWS)).dataset) == ROWS
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        CurriculumLoader(plan, pd.DataFrame(ROWS[::-1]))
    frame = pd.DataFrame([[n, n] for n in range(N)])
    verify_rows(plan_curriculum(np.arange(float(N)), data=frame, batch_size=8), [{"0": n, "1": n} for n in range(N)])
    with pytest.raises(SparsortError, match=r"rows of a DataFrame cannot be read by position.*from_pandas\(frame\)"):
        verify_rows(plan, frame)


def test_reading_rows_moves_no_generator(plan: CurriculumPlan) -> None:
    class Drawing(MapStyle):
        def __getitem__(self, row: int) -> Any:
            random.random(), np.random.random(), torch.rand(1)
            return super().__getitem__(row)

    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    CurriculumLoader(plan, Drawing(ROWS))
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


# Streams, revisions, folders


def test_of_a_stream_the_first_rows_are_compared() -> None:
    plan = plan_curriculum(scored(ROWS), batch_size=8, schedule="as_given")
    for kept in (("id",), ("text",)):
        rows = only(ROWS, *kept)
        for stream in (Stream, lambda given: datasets.Dataset.from_list(given).to_iterable_dataset()):
            verify_rows(plan, stream(rows))
            for other in (shuffled(rows), rows[1:]):
                with pytest.raises(SparsortError, match=OTHER_ROWS):
                    verify_rows(plan, stream(other))
    with pytest.raises(SparsortError, match=INCOMPARABLE):
        verify_rows(plan, Stream(tokenised(ROWS)))
    with pytest.raises(SparsortError, match="3 rows"):
        verify_rows(plan, Stream(ROWS[:3]))
    loader = CurriculumLoader(plan, Stream(ROWS), collate_fn=list)
    assert [row["id"] for batch in loader for row in batch] == [row["id"] for row in ROWS]


def test_a_revision_keeps_what_is_known_and_another_plan_is_compared(plan: CurriculumPlan, tmp_path: Path) -> None:
    named = plan_curriculum(np.arange(N), batch_size=8, fingerprint="corpus")
    revised = named.revised(np.arange(N)[::-1])
    assert revised.notes["fingerprint"] == "corpus"
    loader = CurriculumLoader(named, tokenised(ROWS), fingerprint="corpus")
    loader.replace_plan(revised.save(tmp_path / "revised"))
    with pytest.raises(SparsortError, match=INCOMPARABLE):
        loader.replace_plan(plan_curriculum(np.arange(N) % 7, batch_size=8))
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        CurriculumLoader(plan, ROWS).replace_plan(plan_curriculum(scored(ROWS[::-1]), batch_size=8))


def old_folder(plan: CurriculumPlan, folder: Path, *, content: bool = True) -> Path:
    """The folder as the version before wrote it: no ids, no name, and the contents of 16 rows."""
    plan.save(folder)
    described = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    notes = described["notes"]
    del notes["ids"]
    places = {str(i * (N - 1) // 15) for i in range(16)}
    if content:
        digests = note_rows(None, only(ROWS, "text"))["content"]
        every = {place: digest_of(ROWS[int(place)], ["text"]) for place in places}
        notes["content"] = {"fields": ["text"], "digest": digests["digest"], "sample": every}
    else:
        del notes["content"]
    return rewritten(folder, described)


def rewritten(folder: Path, described: dict[str, Any]) -> Path:
    (folder / "plan.json").write_text(json.dumps(seal(described)), encoding="utf-8")
    return folder


def test_old_plans_are_compared_by_content_and_gain_ids_when_saved_again(plan: CurriculumPlan, tmp_path: Path) -> None:
    old = old_folder(plan, tmp_path / "old")
    verify_rows(CurriculumPlan.open(old), ROWS)
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        verify_rows(CurriculumPlan.open(old), ROWS[::-1])
    with pytest.raises(SparsortError, match=INCOMPARABLE):
        verify_rows(CurriculumPlan.open(old), only(ROWS, "id"))
    with pytest.raises(SparsortError, match=INCOMPARABLE):
        verify_rows(CurriculumPlan.open(old_folder(plan, tmp_path / "older", content=False)), ROWS)
    assert plan.save(old).notes["ids"] == CurriculumPlan.open(old).notes["ids"] == plan.notes["ids"]


def test_a_folder_is_not_taken_over_by_the_same_batches_of_other_rows(tmp_path: Path) -> None:
    difficulty = np.arange(20)
    rows = [{"id": str(place), "text": f"row {place}"} for place in range(20)]
    plan_curriculum(difficulty, data=rows, batch_size=4, out=tmp_path / "plan")
    for other in ({"data": rows[::-1]}, {"data": only(rows[::-1], "id", "text"), "fingerprint": "new"}):
        with pytest.raises(SparsortError, match="already contains another plan"):
            plan_curriculum(difficulty, batch_size=4, out=tmp_path / "plan", **other)
    again = plan_curriculum(difficulty, batch_size=4, fingerprint="new", out=tmp_path / "plan")
    assert (again.notes["fingerprint"], again.notes["ids"]["column"]) == ("new", "id")


def test_scores_of_rows_in_another_order_are_not_combined_by_position() -> None:
    first, same, other = scored(ROWS), scored(ROWS), scored(ROWS[::-1])
    with pytest.raises(SparsortError, match=r"the scores a and b belong to different rows.* such as row 0"):
        plan_curriculum({"a": first, "b": other}, batch_size=8)
    bare = [scored(only(rows, "text")) for rows in (ROWS, ROWS[::-1])]
    with pytest.raises(SparsortError, match=r"the scores a and b belong to different rows"):
        plan_curriculum({"a": bare[0], "b": bare[1]}, batch_size=8)
    plan = plan_curriculum({"a": first, "b": same}, batch_size=8)
    with pytest.raises(SparsortError, match=OTHER_ROWS):
        verify_rows(plan, ROWS[::-1])
    both = plan_curriculum({"a": first, "b": other}, data=ROWS, batch_size=8)
    verify_rows(both, ROWS)


def test_every_row_of_a_file_is_compared(plan: CurriculumPlan, nameless: CurriculumPlan) -> None:
    for each in (plan, nameless):
        verify_every_row(each, ROWS)
        for other in (exchanged(ROWS, N - 2, N - 1), [*ROWS[:-1], {"id": ROWS[-1]["id"], "text": "edited"}]):
            with pytest.raises(SparsortError, match=OTHER_ROWS):
                verify_every_row(each, other)
    with pytest.raises(SparsortError, match=r"here \(--fingerprint\); or pass verify=False \(--no-verify\)"):
        verify_every_row(plan, tokenised(ROWS))
    with pytest.raises(SparsortError, match=INCOMPARABLE):
        verify_every_row(plan_curriculum(np.arange(N), batch_size=8), ROWS)


def test_a_loader_shows_its_plan_and_its_position(plan: CurriculumPlan) -> None:
    loader = CurriculumLoader(plan, ROWS, rank=1, world_size=2)
    assert repr(loader) == f"CurriculumLoader({plan!r}, epoch 0, batch 0 of {plan.n_batches}, rank 1 of 2)"
