"""The checks of a loader and a trainer that plan, data and arguments fit, before the first batch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer
from sparsort.errors import SparsortError
from sparsort.scoring.scorers.baselines import LengthScorer

DIFFICULTY = np.random.default_rng(0).random(12)


def _rows(loader: CurriculumLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def test_rows_in_another_order_than_planned_are_refused() -> None:
    rows = [{"id": str(n), "text": "so it goes " * (1 + n % 9)} for n in range(30)]
    plan = plan_curriculum(LengthScorer().score(rows, prompt="{text}"), data=rows, batch_size=4)
    assert len([text for texts in CurriculumLoader(plan, rows) for text in texts["text"]]) == 30
    with pytest.raises(SparsortError, match="cannot tell whether these are the rows"):
        CurriculumLoader(plan, [{"input_ids": [1]} for _ in rows])  # tokenised, and ids and text are gone
    for other in (rows[::-1], [{"text": "other"} for _ in rows]):
        for fingerprint in (None, "a name that the plan does not have"):
            with pytest.raises(SparsortError, match=r"not the rows that the plan was made for.* row \d+ has "):
                CurriculumLoader(plan, other, fingerprint=fingerprint)
    assert len(CurriculumLoader(plan, rows[::-1], verify=False)) == 8


def test_a_plan_is_taken_from_its_folder(tmp_path: Path) -> None:
    plan = plan_curriculum(DIFFICULTY, batch_size=3, data=list(range(12)), out=tmp_path / "plan")
    assert _rows(CurriculumLoader(tmp_path / "plan", list(range(12)))) == _rows(CurriculumLoader(plan, list(range(12))))


def test_set_epoch_begins_an_epoch_that_was_consumed_again() -> None:
    loader = CurriculumLoader(plan_curriculum(DIFFICULTY, batch_size=3, stages=2), list(range(12)), verify=False)
    first = list(islice(iter(loader), 4))
    loader.set_epoch(0)
    assert _rows(loader) == [batch.tolist() for batch in first]


def test_a_trainer_says_what_it_takes() -> None:
    with pytest.raises(SparsortError, match=r"curriculum= must be a plan of plan_curriculum.*not list"):
        CurriculumTrainer(curriculum=[1, 2])  # type: ignore[arg-type]
    plan = plan_curriculum(DIFFICULTY, batch_size=4)
    with pytest.raises(SparsortError, match=r"online= must be an OnlineDifficulty.*not True"):
        CurriculumTrainer(curriculum=plan, online=True)  # type: ignore[arg-type]
