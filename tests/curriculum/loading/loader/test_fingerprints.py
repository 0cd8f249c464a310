"""Fingerprints of data: which data sets are equal, which are not, and how few rows are read."""

from __future__ import annotations

import datetime
import itertools
import json
import random
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.loading.loader.resuming import as_saved, difference, fingerprint_of, fingerprint_of_stream
from sparsort.errors import SparsortError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(width=32) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def same(first: Any, second: Any) -> bool:
    return difference(fingerprint_of([first]), fingerprint_of([second])) is None


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES)
def test_equal_values_and_only_those_have_equal_fingerprints(first: Any, second: Any) -> None:
    assert same({"x": first}, {"x": json_copy(first)})
    assert same({"x": first}, {"x": second}) == (repr(first) == repr(second) or canon(first) == canon(second))


def canon(value: Any) -> Any:
    """A second, plain way of saying which values are the same: with their type, mappings without order, NaN as None."""
    if isinstance(value, dict):
        return ("dict", sorted((key, canon(item)) for key, item in value.items())) if value else ("dict",)
    if isinstance(value, list):
        return ("list", [canon(item) for item in value])
    return canon(None) if value != value else (type(value).__name__, repr(value))


def json_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_copy(value[key]) for key in reversed(value)}
    return [json_copy(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "other",
    [
        (1, 2, 3),
        np.array([1, 2, 3], dtype=np.int16),
        torch.tensor([1, 2, 3]),
        [np.int64(1), torch.tensor(2), 3],
    ],
)
def test_a_container_of_the_same_numbers_is_the_same(other: Any) -> None:
    assert same([1, 2, 3], other)


@pytest.mark.parametrize(
    "other", [[1, 2], [1, 3, 2], [[1, 2, 3]], ["1", "2", "3"], [1.0, 2.0, 3.0], [True, 2, 3], None, "123"]
)
def test_other_values_are_another(other: Any) -> None:
    assert not same([1, 2, 3], other)


def test_floats_are_compared_as_float32_in_every_shape() -> None:
    values = [[0.1, float("nan")], [float("inf"), -2.5]]
    for other in (np.array(values), np.array(values, np.float32), torch.tensor(values)):
        assert same(values, other)
    assert same([0.5], torch.tensor([0.5], dtype=torch.bfloat16))
    assert not same([0.1], [0.1001])


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), pd.NA, pd.NaT, torch.tensor(float("nan"))])
def test_missing_values_are_alike(value: Any) -> None:
    rows = [{"x": value, "y": [1.0, value]}, {"x": 2.0, "y": []}]
    null = [{"x": None, "y": [1.0, None]}, {"x": 2.0, "y": []}]
    for saved, current in ((rows, null), (null, rows), (rows, rows)):
        assert difference(as_saved(fingerprint_of(saved)), fingerprint_of(current)) is None
    other = [null[0], {"x": value, "y": []}]
    assert difference(as_saved(fingerprint_of(rows)), fingerprint_of(other)) == "other values in x"


def test_states_of_0_1_0_which_took_nan_for_a_value_are_still_resumed() -> None:
    nan = float("nan")
    rows = [{"x": nan, "y": [1.0, nan], "z": None}, {"x": 2.0, "y": [], "z": 1}]
    saved = {"rows": 2, "columns": {"x": "1a5a54001d", "y": "0fb0b90207", "z": "2f325a900f"}}
    assert difference(saved, fingerprint_of(rows)) is None
    assert difference(saved, fingerprint_of([rows[0], {"x": nan, "y": [], "z": 1}])) == "other values in x"
    assert set(as_saved(fingerprint_of(rows))) == {"rows", "columns"}


def test_objects_of_no_known_kind_count_by_their_type() -> None:
    assert same(datetime.date(2020, 1, 1), datetime.date(2021, 1, 1))
    assert not same(datetime.date(2020, 1, 1), datetime.timedelta(1))


def test_a_dataset_may_change_its_format_and_its_columns() -> None:
    columns = {"text": ["a", "b", "c"], "ids": [[1, 2], [3], []], "score": [0.1, 0.2, None]}
    data = datasets.Dataset.from_dict(columns)
    saved = fingerprint_of(data)
    assert difference(saved, fingerprint_of(data.with_format("numpy", columns=["ids"]))) is None
    assert difference(saved, fingerprint_of(data.remove_columns(["ids", "score"]))) is None
    assert difference(saved, fingerprint_of(data.add_column("a", [1, 2, 3]))) is None
    other = fingerprint_of(data.rename_column("text", "t").remove_columns(["ids", "score"]))
    assert difference(saved, other) == "it had the columns ids, score, text and this has t"
    changed = fingerprint_of(data.map(lambda row: {"text": row["text"] + "!"}))
    assert difference(saved, changed) == "other values in text"
    assert "it had 3 rows and this has 2" in str(difference(saved, fingerprint_of(data.select([0, 1]))))
    assert set(fingerprint_of(data, ["text"])["columns"]) == {"text"}


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(SparsortError, match=r"no column 'txt' .* the data has text"):
        fingerprint_of([{"text": "a"}], ["txt"])


class Watched:
    def __init__(self, n: int) -> None:
        self.n, self.read = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> dict[str, Any]:
        assert 0 <= row < self.n
        self.read.append(row)
        return {"x": row}


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 1000, 10**9])
def test_at_most_16_rows_are_read_among_them_the_first_and_the_last(n: int) -> None:
    data = Watched(n)
    fingerprint = fingerprint_of(data)
    once = data.read[: len(data.read) // 2]
    assert data.read == once * 2
    assert once == sorted(set(once))
    assert len(once) == min(n, 16)
    assert not n or (once[0], once[-1]) == (0, n - 1)
    assert fingerprint["rows"] == n


def test_a_change_in_any_row_that_is_read_shows() -> None:
    rows = [{"x": row} for row in range(16)]
    saved = fingerprint_of(rows)
    for row in range(16):
        changed = [{"x": -1} if place == row else given for place, given in enumerate(rows)]
        assert difference(saved, fingerprint_of(changed)) == "other values in x"


class Augmented:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> dict[str, Any]:
        noise = [random.random(), np.random.random(), torch.rand(2).tolist()]
        return {"row": row, "noise": noise}


def test_columns_drawn_at_random_are_skipped_and_the_generators_restored() -> None:
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    first = fingerprint_of(Augmented())
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before
    assert set(first["columns"]) == {"row"}


def test_it_is_json_of_a_few_hundred_bytes_for_any_number_of_columns() -> None:
    wide = fingerprint_of([{f"{'a very long column name ' * 9}{i}": i for i in range(200)}])
    assert len(json.dumps(wide)) < 600
    assert difference(json.loads(json.dumps(wide)), wide) is None


def test_names_given_by_hand_are_compared_as_they_are() -> None:
    assert difference("mine", "mine") is None
    assert "saved as fingerprint='mine' and this is fingerprint='yours'" in str(difference("mine", "yours"))
    assert "without a name" in str(difference("mine", fingerprint_of([1])))
    assert "without a name" in str(difference(fingerprint_of([1]), "mine"))


def test_a_stream_is_known_by_its_first_rows() -> None:
    class Stream:
        read = 0

        def __init__(self, first: int) -> None:
            self.first = first

        def __iter__(self) -> Any:
            for row in itertools.count(self.first):
                self.read += 1
                yield {"row": row, "noise": random.random()}

    stream = Stream(0)
    saved = fingerprint_of_stream(stream, 50)
    assert (stream.read, set(saved["columns"])) == (32, {"row"})
    assert difference(saved, fingerprint_of_stream(Stream(0), 50)) is None
    assert difference(saved, fingerprint_of_stream(Stream(0), 51)) == "it had 50 rows and this has 51"
    assert difference(saved, fingerprint_of_stream(Stream(1), 50)) == "other values in row"


@pytest.mark.parametrize("damaged", [None, 7, {}, {"columns": {}}])
def test_a_damaged_fingerprint_is_another(damaged: Any) -> None:
    assert difference(damaged, fingerprint_of([1, 2]))
