"""The table of scorers against the classes that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsort.errors import SparsortError
from sparsort.recipes.score.config import READ_BY, ScorerConfig
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.scorers import MODEL_SCORERS, SCORERS
from sparsort.scoring.scorers.sparsity import ModelScorer

ROWS = [
    {"id": name, "text": text, "answer": " yes", "level": len(text)} for name, text in (("a", "one"), ("b", "two 2"))
]
NEEDS: dict[str, dict[str, Any]] = {"text": {"prompt": "{text}"}, "answer": {"answer": "{answer}"}, "column": {}}


def _config(name: str, folder: Path) -> ScorerConfig:
    model = {"model": ModelSpec(str(folder))} if "model" in SCORERS[name].reads else {}
    return ScorerConfig(scorer=name, column="level" if name == "column" else None, **model)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCORERS)
def test_an_entry_builds_its_scorer_and_lists_its_needs(name: str, make_tiny_model: Callable[..., Path]) -> None:
    entry, config = SCORERS[name], _config(name, make_tiny_model("llama"))
    scorer = config.load()
    assert scorer.kind == name
    assert isinstance(scorer, ModelScorer) == entry.runs_model == (name in MODEL_SCORERS) == config.runs_model
    given: dict[str, Any] = {}
    for need in entry.needs:
        given |= NEEDS[need]
    assert scorer.score(ROWS, **given).counts("status") == {"ok": len(ROWS)}
    for need in entry.needs - {"column"}:
        with pytest.raises(SparsortError, match="prompt=" if need == "text" else "answer="):
            scorer.score(ROWS, **{key: value for key, value in given.items() if key not in NEEDS[need]})


def test_the_needs_of_a_scorer_are_those_of_its_configuration() -> None:
    assert [name for name in SCORERS if name != "column" and not ScorerConfig(scorer=name).reads_text] == ["random"]
    assert [name for name in SCORERS if name != "column" and ScorerConfig(scorer=name).needs_answer] == ["answer_loss"]
    assert ScorerConfig(pooling="answer").needs_answer
    with pytest.raises(SparsortError, match="the scorer 'column' needs the name of a numeric column"):
        ScorerConfig(scorer="column")


def test_every_setting_is_read_by_a_scorer() -> None:
    assert set(READ_BY) <= {"scorer"}.union(*(entry.reads for entry in SCORERS.values()))
