"""`curriculum.ablation.store.outcomes`: columns that fit together, and nothing that is not a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsort.curriculum.ablation.store.outcomes import Outcomes, Shape, from_tables, shape_of, to_table
from sparsort.errors import SparsortError


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_log_probability_that_is_not_finite_is_refused(value: float) -> None:
    log_p = np.zeros((3, 2))
    log_p[1, 1] = value
    with pytest.raises(SparsortError, match=r"row 1, label 1 is (nan|-?inf); expected finite"):
        Outcomes(prefix=["p"] * 3, query=["q"] * 3, log_p=log_p, n_tokens=np.ones((3, 2)), features=np.ones((3, 1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": ["q"]}, r"query \(1,\)"),
        ({"log_p": np.zeros((2, 4))}, r"log_p \(2, 4\), n_tokens \(2, 3\)"),
        ({"log_p": np.zeros(2)}, r"log_p \(2,\)"),
        ({"features": np.zeros((1, 3))}, r"features \(1, 3\)"),
        ({"n_tokens": np.zeros((2, 3))}, "at least 1 token"),
        ({"prefix": ["p", ""]}, "digests that are not empty"),
        ({"prefix": [1, 2]}, "expected .* digests"),
        ({"prefix": [["p"], ["r"]]}, r"shape \(2, 1\)"),
        ({"text": ["only one"]}, "1 entries for 2 pairs"),
        ({"text": ["one", None]}, "one string for each pair"),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    fitting = {"prefix": ["p", "p"], "query": ["q", "r"], "features": np.zeros((2, 3))}
    with pytest.raises(SparsortError, match=message):
        Outcomes(**{**fitting, "log_p": np.zeros((2, 3)), "n_tokens": np.ones((2, 3)), **changes})


def test_columns_are_brought_to_their_dtypes() -> None:
    made = Outcomes(prefix=["p"], query=["q"], log_p=[[-1, -2]], n_tokens=[[1.0, 2.0]], features=[[3]], text=["t"])  # type: ignore[arg-type]
    assert (made.log_p.dtype, made.n_tokens.dtype, made.features.dtype) == (np.float32, np.int32, np.float32)
    assert made.shape == Shape(labels=2, text=True)
    assert made.pairs() == [("p", "q")]
    assert len(made) == 1


def test_tables_of_one_group_have_one_shape() -> None:
    one, two = (
        Outcomes(prefix=["p"], query=["q"], log_p=[[-1] * n], n_tokens=[[1] * n], features=[[0]])  # type: ignore[arg-type]
        for n in (1, 2)
    )
    tables = {"a": to_table(one, {}), "b": to_table(two, {})}
    assert [shape_of(table).labels for table in tables.values()] == [1, 2]
    with pytest.raises(SparsortError, match="a has 1 labels and no text; b has 2 labels and no text"):
        from_tables(tables, 1)


def test_long_tables_keep_rows_in_order_and_matrices_in_line() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 30, size=(3, 400, 2))
    parts = [
        Outcomes(
            prefix=np.array([f"p{p}" for p, _ in part]),
            query=np.array([f"q{q}" for _, q in part]),
            log_p=rng.normal(size=(400, 5)),
            n_tokens=rng.integers(1, 5, size=(400, 5)),
            features=np.where(rng.random((400, 4)) < 0.3, np.nan, rng.normal(size=(400, 4))),
            text=[f"{i}" for i in range(400)],
        )
        for part in codes
    ]
    found = from_tables({str(i): to_table(part, {}) for i, part in enumerate(parts)}, 4)
    first: dict[tuple[str, str], tuple[int, int]] = {}
    for i, part in enumerate(parts):
        for j, pair in enumerate(part.pairs()):
            first.setdefault(pair, (i, j))
    assert found.pairs() == list(first)
    for row, (i, j) in enumerate(first.values()):
        assert found.log_p[row].tobytes() == parts[i].log_p[j].tobytes()
        assert found.n_tokens[row].tobytes() == parts[i].n_tokens[j].tobytes()
        assert found.features[row].tobytes() == parts[i].features[j].tobytes()
        assert found.text is not None
        assert found.text[row] == str(j)
