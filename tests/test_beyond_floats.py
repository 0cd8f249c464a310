"""Whole numbers beyond the range of floats are refused with their place wherever a number is expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsort.curriculum.demos.criteria.distributions import numbers
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.errors import SparsortError
from sparsort.recipes.choose.prior import _file_shares
from sparsort.recipes.plan import PlanOptions, make_plan
from sparsort.scoring.scorers.baselines import ColumnScorer
from sparsort.templates import render

BIG = 10**400


def _plan_lengths(folder: Path) -> Any:
    rows = [{"id": str(n), "n": n, "tokens": BIG} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ColumnScorer("n").score(folder / "rows.jsonl", out=folder / "scores")
    return make_plan(
        folder / "scores",
        settings=CurriculumSettings(batch_size=2),
        options=PlanOptions(data=folder / "rows.jsonl", lengths="tokens"),
    )


def _prior(folder: Path) -> Any:
    (folder / "prior.json").write_text(json.dumps({"a": BIG, "b": 1}))
    return _file_shares(folder / "prior.json", "label", ("a", "b"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: ColumnScorer("x").score([{"x": 1}, {"x": BIG}]), "column 'x' of row 1 .* expected a number"),
        (
            lambda _: render("{x:.2f}", {"x": BIG}, where="row 0"),
            r"row 0: the value .* does not accept the format '\.2f'",
        ),
        (lambda _: plan_curriculum([1, BIG, 3], batch_size=1), "cannot be read as numbers"),
        (lambda _: numbers([[BIG]], ("orders", "labels"), argument="shares"), "cannot be read as an array of numbers"),
        (_plan_lengths, "the field 'tokens' holds a number of tokens beyond 64 bits"),
        (_prior, "prior.json has 1000.* for the label .* must be a number above 0"),
    ],
)
def test_a_number_beyond_floats_is_refused(call: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=message):
        call(tmp_path)
