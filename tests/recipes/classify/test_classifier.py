"""FewShotClassifier: the contract of scikit-learn, the calibration, and mistakes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import polars
import pyarrow
import pytest
from estimator_checks import failed_checks
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from sparsort import FewShotClassifier, SparsortError
from sparsort.recipes.classify.inputs import ClassifierError
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec

pytestmark = pytest.mark.filterwarnings("ignore:the calibration is estimated|the predictions and the prior:UserWarning")

WORDS = ("red", "green", "blue", "warm", "cold", "soft", "hard", "light")
TEXTS = [f"{WORDS[i % 8]} {WORDS[i * 3 % 8]} {i}" for i in range(40)]
LABELS = ["colour" if i % 3 else "touch" for i in range(40)]


@pytest.fixture(scope="module")
def tiny(make_tiny_model: Callable[..., Path]) -> ModelSpec:
    # In bf16 the rounding depends on the shape of a batch.
    return ModelSpec(str(make_tiny_model()), dtype="float32")


@pytest.fixture
def fitted(tiny: ModelSpec) -> FewShotClassifier:
    return FewShotClassifier(tiny, k=4).fit(TEXTS, LABELS)


def test_predictions_do_not_depend_on_the_other_rows(fitted: FewShotClassifier) -> None:
    together = fitted.predict_proba(TEXTS[:12])
    alone = np.concatenate([fitted.predict_proba([text]) for text in TEXTS[:12]])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(axis=1), 1.0)


def test_label_scores_are_those_of_the_whole_prompt(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=4, calibration="none").fit(TEXTS, LABELS)
    demos = "\n\n".join(f"text: {row['text']}\nlabel: {row['label']}" for row in model.demonstrations_)
    reader = AnswerReader(tiny.load())
    log_p = reader.answers((), [f"{demos}\n\ntext: {TEXTS[0]}\nlabel:"], [" colour", " touch"]).log_p[0]
    expected = np.exp(log_p) / np.exp(log_p).sum()
    np.testing.assert_allclose(model.predict_proba(TEXTS[:1])[0], expected, atol=1e-5)


def test_demonstrations_are_balanced_and_outside_the_calibration_rows(fitted: FewShotClassifier) -> None:
    labels = [row["label"] for row in fitted.demonstrations_]
    assert sorted(labels) == ["colour", "colour", "touch", "touch"]
    shown = {row["text"] for row in fitted.demonstrations_}
    assert fitted._evidence.labelled.shape == (1, 40 - 4, 2)
    assert len(shown) == 4


@pytest.mark.parametrize(
    "form",
    [
        lambda texts: texts,
        lambda texts: np.array(texts),
        lambda texts: [{"text": text} for text in texts],
        lambda texts: {"text": texts},
        lambda texts: pandas.DataFrame({"text": texts}),
        lambda texts: pandas.Series(texts),
        lambda texts: polars.DataFrame({"text": texts}),
        lambda texts: pyarrow.table({"text": texts}),
        lambda texts: datasets.Dataset.from_dict({"text": texts}),
        lambda texts: (text for text in texts),
    ],
    ids=["texts", "array", "rows", "columns", "frame", "series", "polars", "arrow", "dataset", "generator"],
)
def test_every_form_of_data_gives_the_same_predictions(
    form: Callable[[list[str]], Any], tiny: ModelSpec, fitted: FewShotClassifier
) -> None:
    expected = fitted.predict_proba(TEXTS[:5])
    model = FewShotClassifier(tiny, k=4).fit(form(TEXTS), LABELS)
    np.testing.assert_array_equal(model.predict_proba(form(TEXTS[:5])), expected)


def test_classes_keep_their_type(tiny: ModelSpec) -> None:
    y = np.array([i % 3 for i in range(40)])
    model = FewShotClassifier(tiny, k=3, label_words={0: "zero", 1: "one", 2: "two"}).fit(TEXTS, y)
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.predict(TEXTS[:4]).dtype == y.dtype
    assert {row["label"] for row in model.demonstrations_} == {"0", "1", "2"}
    assert model.task_.label_texts() == [" zero", " one", " two"]


def test_it_works_in_a_pipeline_a_search_and_cross_validation(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=2, calibration_rows=8)
    pipeline = Pipeline([("upper", FunctionTransformer(lambda X: [text.upper() for text in X])), ("few", model)])
    assert len(cross_val_score(pipeline, TEXTS, LABELS, cv=2)) == 2
    search = GridSearchCV(model, {"calibration": ["none", "batch"], "k": [2, 4]}, cv=2).fit(TEXTS, LABELS)
    assert set(search.best_params_) == {"calibration", "k"}
    assert clone(model).get_params() == model.get_params()


def test_a_fitted_classifier_can_be_pickled(fitted: FewShotClassifier) -> None:
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301 - joblib does this between processes
    np.testing.assert_array_equal(again.predict_proba(TEXTS[:3]), fitted.predict_proba(TEXTS[:3]))


def test_the_seed_alone_decides(tiny: ModelSpec) -> None:
    first, second = (FewShotClassifier(tiny, k=4, random_state=3).fit(TEXTS, LABELS) for _ in range(2))
    other = FewShotClassifier(tiny, k=4, random_state=4).fit(TEXTS, LABELS)
    assert first.demonstrations_ == second.demonstrations_
    assert first.demonstrations_ != other.demonstrations_


def test_several_orders_are_averaged(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=4, n_orders=3, calibration="none").fit(TEXTS, LABELS)
    single = []
    for demos in model._orders:
        one = clone(model).set_params(n_orders=1).fit(TEXTS, LABELS)
        one._orders = [demos]
        single.append(one.predict_log_proba(TEXTS[:4]))
    mean = np.mean(single, axis=0)
    expected = mean - np.log(np.exp(mean).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(model.predict_log_proba(TEXTS[:4]), expected, atol=1e-6)
    assert [gain.ingredient for gain in model.gains_] == [
        "one order, not calibrated",
        "mean over 3 orders",
    ]


def test_an_order_by_length_counts_what_the_prompt_shows(tiny: ModelSpec) -> None:
    rows = [{"q": "x" * (i + 1), "hidden": "y" * (50 - i)} for i in range(12)]
    model = FewShotClassifier(tiny, k=4, order="length_ascending", prompt="{q}\n").fit(rows, ["a", "b"] * 6)
    lengths = [len(row["q"]) for row in model.demonstrations_]
    assert lengths == sorted(lengths)


def test_gains_name_each_ingredient_and_its_cost(tiny: ModelSpec) -> None:
    # With a loaded model each call has a reader of its own, which has read no demonstrations before.
    model = FewShotClassifier(tiny.load(), k=4, n_orders=2, prior="pool").fit(TEXTS, LABELS)
    names = [gain.ingredient for gain in model.gains_]
    assert names == ["one order, not calibrated", "batch calibration", "mean over 2 orders", "prior"]
    assert all(0.0 <= gain.balanced_accuracy <= 1.0 for gain in model.gains_)
    # The calibration rows are read once under each order.
    shown = {row["text"] for row in model.demonstrations_}
    texts = [f"text: {text}\nlabel:" for text in TEXTS if text not in shown]
    one, other = model._reader().scores(model._orders, texts, title="test")[1].tolist()
    assert [gain.tokens for gain in model.gains_] == [0, one, one + other, one + other]
    assert model.tokens_read_ == one + other
    assert "balanced accuracy" in model.gains_table()


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"calibration": "none"}, ()),
        ({"calibration": "batch"}, ("rows",)),
        ({"calibration": "contextual"}, ("content-free",)),
        ({"calibration": "batch", "transductive": True}, ()),
        ({"calibration": "batch", "prior": "estimated"}, ("rows", "unlabelled")),
        ({"calibration": "contextual", "prior": "estimated"}, ("content-free", "rows", "unlabelled")),
    ],
)
def test_only_tokens_that_an_ingredient_needs_are_its_cost(
    tiny: ModelSpec, settings: dict[str, Any], needed: tuple[str, ...]
) -> None:
    model = FewShotClassifier(tiny.load(), k=4, **settings)
    model.fit(TEXTS, LABELS, unlabelled=TEXTS[:9] if settings.get("prior") else None)
    shown = {row["text"] for row in model.demonstrations_}
    texts = {
        "content-free": ["N/A", "", "[MASK]"],
        "rows": [text for text in TEXTS if text not in shown],
        "unlabelled": TEXTS[:9],
    }

    def cost(parts: tuple[str, ...]) -> int:
        reader = model._reader()
        queries = [[f"text: {text}\nlabel:" for text in texts[part]] for part in texts if part in parts]
        return sum(int(reader.scores(model._orders, part, title="test")[1].sum()) for part in queries)

    assert model.gains_[-1].tokens == cost(needed)
    # The calibration rows are read in any case, to measure the gains.
    assert model.tokens_read_ == cost((*needed, "rows"))
    assert ("another" in model.gains_table()) == ("rows" not in needed)


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (None, [0.5, 0.5]),
        ("uniform", [0.5, 0.5]),
        ("pool", [26 / 40, 14 / 40]),
        ("mixed", [(26 / 40 + 0.5) / 2, (14 / 40 + 0.5) / 2]),
        ({"colour": 3, "touch": 1}, [0.75, 0.25]),
    ],
)
def test_priors(tiny: ModelSpec, prior: Any, expected: list[float]) -> None:
    model = FewShotClassifier(tiny, k=4, prior=prior).fit(TEXTS, LABELS)
    np.testing.assert_allclose(model.prior_, expected)
    uniform = FewShotClassifier(tiny, k=4).fit(TEXTS, LABELS).predict_proba(TEXTS[:3])
    weighed = uniform * model.prior_
    np.testing.assert_allclose(model.predict_proba(TEXTS[:3]), weighed / weighed.sum(axis=1, keepdims=True), atol=1e-6)


def test_the_prior_is_estimated_from_unlabelled_rows(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=4, prior="estimated").fit(TEXTS, LABELS, unlabelled=TEXTS[:10])
    assert model.prior_.sum() == pytest.approx(1.0)
    with pytest.raises(SparsortError, match="unlabelled="):
        FewShotClassifier(tiny, k=4, prior="estimated").fit(TEXTS, LABELS)


def test_transductive_calibration_reads_the_rows_to_predict(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=4, transductive=True).fit(TEXTS, LABELS)
    proba = FewShotClassifier(tiny, k=4, calibration="none").fit(TEXTS, LABELS).predict_proba(TEXTS)
    ratio = proba / proba.mean(axis=0)
    np.testing.assert_allclose(model.predict_proba(TEXTS), ratio / ratio.sum(axis=1, keepdims=True), atol=1e-6)


def test_transductive_calibration_needs_no_training_rows_outside_the_prompt(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=4, transductive=True).fit(TEXTS[:4], ["a", "b", "a", "b"])
    assert np.exp(model.predict_log_proba(TEXTS)).mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.1)


def test_a_prompt_may_be_a_function(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=4, prompt=lambda row: f"Say what it is: {row['text']}\n=>").fit(TEXTS, LABELS)
    same = FewShotClassifier(tiny, k=4, prompt="Say what it is: {text}\n=>").fit(TEXTS, LABELS)
    np.testing.assert_array_equal(model.predict_proba(TEXTS[:3]), same.predict_proba(TEXTS[:3]))


def test_without_rows_left_it_falls_back_to_contextual_calibration(tiny: ModelSpec) -> None:
    with pytest.warns(UserWarning, match="'contextual' is used"):
        model = FewShotClassifier(tiny, k=4).fit(TEXTS[:4], ["a", "b", "a", "b"])
    assert model.predict(TEXTS[:2]).shape == (2,)
    assert model.gains_ == []
    # Unlabelled rows are no help to a calibration that needs labels.
    other = FewShotClassifier(tiny, k=4, calibration="fitted")
    with pytest.warns(UserWarning, match="'contextual' is used"):
        other.fit(TEXTS[:4], ["a", "b", "a", "b"], unlabelled=TEXTS[4:])
    np.testing.assert_array_equal(other.predict(TEXTS[:9]), model.predict(TEXTS[:9]))


def test_it_warns_where_predictions_and_prior_disagree(tiny: ModelSpec) -> None:
    model = FewShotClassifier(tiny, k=4).fit(TEXTS, LABELS)
    # A bias that makes every prediction the first class, whatever the prior says.
    model._bias.bias[:] = [[-20.0, 0.0]]
    with pytest.warns(UserWarning, match="disagree: colour"):
        model.predict(TEXTS)


def test_it_warns_about_a_skewed_pool(tiny: ModelSpec) -> None:
    with pytest.warns(UserWarning, match="prior='pool'"):
        FewShotClassifier(tiny, k=4).fit(TEXTS, ["a"] * 35 + ["b"] * 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "knn"}, "needs embeddings"),
        ({"select": "balancd"}, "Did you mean 'balanced'"),
        ({"order": "sparse"}, "unknown order"),
        ({"order": "hard_to_easy"}, "which needs scores"),
        ({"calibration": "bach"}, "Did you mean 'batch'"),
        ({"prior": "unifrom"}, "expected one of uniform"),
        ({"prior": {"colour": 1.0}}, "prior is given for"),
        ({"prior": {"colour": 1.0, "touch": 0.0}}, "above 0"),
        ({"k": 0}, "k is 0"),
        ({"k": 41}, "40 samples"),
        ({"k": 2, "n_orders": 3}, "fewer orders"),
        ({"n_orders": 2, "order": "random"}, "names one order"),
        ({"calibration": "contextual", "transductive": True}, "transductive"),
        ({"label_words": {"colours": "x"}}, "not a class of y"),
        ({"prompt": "no field"}, "names no field"),
        ({"prompt": "Review: {txt}"}, "Did you mean 'text'"),
    ],
)
def test_mistakes_are_reported_before_a_model_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        FewShotClassifier("/no/such/model", **settings).fit(TEXTS, LABELS)


def test_chat(make_tiny_model: Callable[..., Path]) -> None:
    model = FewShotClassifier(
        str(make_tiny_model()), k=2, prompt=PromptSpec.of("Which? {text}", chat=True, system="Answer in one word.")
    ).fit(TEXTS[:20], LABELS[:20])
    assert model.predict(TEXTS[:2]).shape == (2,)


def test_scikit_learns_own_checks(tiny: ModelSpec) -> None:
    assert failed_checks(FewShotClassifier(tiny, k=2, calibration_rows=8)) == {}


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_class_is_refused(missing: Any) -> None:
    with pytest.raises(ClassifierError, match="row 1 of y has no class"):
        FewShotClassifier(k=1).fit(["a", "b", "c"], ["x", missing, "y"])
