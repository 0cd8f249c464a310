"""Every public function that takes rows accepts every form of data, and refuses anything else with the same error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from data_forms import FORMS, ONCE, columns

import sparsort
from sparsort import CurriculumLoader, FewShotClassifier, LengthScorer, Scores, SparsityFeatures, SparsortError
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.loading.export import export_plan
from sparsort.recipes.adapters.demonstrations import DemoChooser, DemoOptions
from sparsort.recipes.adapters.langchain import SparsortExampleSelector
from sparsort.recipes.classify.classify import classify
from sparsort.recipes.classify.spec import ClassifySpec
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.order.order import order_file
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.score import score_file
from sparsort.scoring.loading.load import LoadedModel
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec

TEXTS = ("a fine film", "a dull and slow film", "great acting", "a bad plot, and sad", "funny all along", "no idea why")
ROWS = [{"id": f"r{n}", "text": text, "label": "no" if n % 2 else "yes"} for n, text in enumerate(TEXTS)]
QUERY = {"text": "an evening to remember"}
PROMPT = "Review: {text}\nKind:"
BY_LENGTH = DemoOptions(order="length_ascending", select="bm25")
PLAN: dict[str, Any] = {"batch_size": 2, "stages": 2}


@pytest.fixture(scope="module")
def scores() -> Scores:
    return LengthScorer(unit="characters").score(ROWS, PROMPT)


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    loaded: LoadedModel = ModelSpec(str(make_tiny_model("llama"))).load()
    return loaded


def _export(data: Any, scores: Scores, folder: Path) -> list[Any]:
    plan = sparsort.plan_curriculum(scores, **PLAN)
    export_plan(plan, data, folder / "ordered.parquet")
    return datasets.Dataset.from_parquet(str(folder / "ordered.parquet"), cache_dir=str(folder))["id"]  # type: ignore[index,return-value]


def _order(data: Any) -> str:
    config = OrderConfig(prompt=PromptSpec(PROMPT, answer=" {label}"), k=3, select="bm25")
    return order_file(data, query=QUERY, config=config, scorer=ScorerConfig(scorer="length", unit="characters")).prompt


def _calibrate(data: Any) -> str:
    # The rows are read and compared with the prompt before the references are missed, which needs no model.
    with pytest.raises(SparsortError) as raised:
        sparsort.calibrate(data, PROMPT)
    if "nothing to calibrate against" in str(raised.value):
        return "read"
    raise raised.value


def _load(data: Any, scores: Scores) -> list[Any]:
    # The order of a stream cannot change, so the plan keeps the order of the rows.
    plan = sparsort.plan_curriculum(scores, batch_size=2, schedule="as_given")
    return [name for batch in CurriculumLoader(plan, data) for name in batch["id"]]


def _fit(data: Any, model: LoadedModel) -> list[Any]:
    labels = [row["label"] for row in ROWS]
    classifier = FewShotClassifier(model, k=2, calibration="none", prompt=PROMPT).fit(data, labels)
    return [row["text"] for row in classifier.demonstrations_]


# Name → a call with data in some form, the scores of the rows, a model and an empty folder.
FUNCTIONS: dict[str, Callable[[Any, Scores, Any, Path], Any]] = {
    "Scorer.score": lambda data, *_: LengthScorer(unit="characters").score(data, PROMPT).difficulty.tolist(),
    "score_file": lambda data, *_: score_file(
        data, scorer=ScorerConfig(scorer="length", unit="characters"), prompt=PromptSpec(PROMPT)
    ).scores.ranked(),
    "calibrate": lambda data, *_: _calibrate(data),
    "Scores.join": lambda data, scores, *_: [str(label) for label in scores.join(data)["label"]],
    "Scores.difficulty_of": lambda data, scores, *_: scores.difficulty_of(data).tolist(),
    "DemoPool": lambda data, *_: DemoPool(data).rows,
    "select_demos": lambda data, *_: sparsort.select_demos(data, QUERY, 3, method="bm25", prompt=PROMPT).demos,
    "order_demos": lambda data, *_: sparsort.order_demos(data, order="length_ascending"),
    "build_prompt": lambda data, *_: sparsort.build_prompt(data, QUERY, prompt=PROMPT, answer=" {label}"),
    "DemoChooser": lambda data, *_: DemoChooser(data, BY_LENGTH).choose(QUERY, 3),
    "SparsortExampleSelector": lambda data, *_: SparsortExampleSelector(data, 3, BY_LENGTH).select_examples(QUERY),
    "order_file": lambda data, *_: _order(data),
    "choose_order": lambda data, _, model, __: sparsort.choose_order(
        data, [QUERY], prompt=PROMPT, orders=2, by="pdo", model=model
    ).order,
    "plan_curriculum": lambda data, scores, *_: sparsort.plan_curriculum(scores, data=data, **PLAN).batch(0).tolist(),
    "CurriculumLoader": lambda data, scores, *_: _load(data, scores),
    "export_plan": lambda data, scores, _, folder: _export(data, scores, folder),
    "FewShotClassifier": lambda data, _, model, __: _fit(data, model),
    "SparsityFeatures": lambda data, _, model, __: SparsityFeatures(model, prompt=PROMPT, metrics=["gini"])
    .fit_transform(data).round(6).tolist(),
    "classify": lambda data, _, model, __: classify(
        data, [QUERY], model=model, prompt=PROMPT, settings=ClassifySpec(k=2, calibration="none")
    ).texts,
}  # fmt: skip
# Their errors for a list of numbers and for an unknown object are those of scikit-learn.
ESTIMATORS = ("FewShotClassifier", "SparsityFeatures")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {}


@pytest.mark.filterwarnings("ignore:no training rows are left", "ignore:the calibration is estimated")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_reads_every_form(
    function: str, form: str, scores: Scores, model: LoadedModel, expected: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(columns(ROWS)))
    if (function, form) == ("CurriculumLoader", "generator"):
        pytest.skip("a stream that is read in every epoch cannot be a generator; the loader says so")
    if function not in expected:
        (tmp_path / "first").mkdir()
        expected[function] = FUNCTIONS[function](ROWS, scores, model, tmp_path / "first")
    result = FUNCTIONS[function](FORMS[form](ROWS, tmp_path), scores, model, tmp_path)
    np.testing.assert_equal(result, expected[function])


@pytest.mark.parametrize("form", ONCE)
@pytest.mark.parametrize("function", ["Scorer.score", "select_demos", "plan_curriculum"])
def test_rows_that_are_read_into_memory_are_noted_once(
    function: str, form: str, scores: Scores, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sparsort"):
        FUNCTIONS[function](FORMS[form](ROWS, tmp_path), scores, None, tmp_path)
    notes = [record.message for record in caplog.records if "into memory" in record.message]
    assert notes == [f"read {len(ROWS)} rows into memory, because they can be read only once"]


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name not in (*ESTIMATORS, "CurriculumLoader")])
def test_every_function_refuses_the_same_data(function: str, scores: Scores, tmp_path: Path) -> None:
    for data, message in (
        (object(), "cannot read rows from a object"),
        ([1, 2], "list of 2 rows: item 0 is .*, not a dict with text keys"),
        (tmp_path / "none.jsonl", "there is no file"),
    ):
        with pytest.raises(SparsortError, match=message):
            FUNCTIONS[function](data, scores, None, tmp_path)
