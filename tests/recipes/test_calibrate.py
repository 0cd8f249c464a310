"""`calibrate`, its command, and what `score` and `order` do with its file, end to end on a tiny model with a known truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

import sparsort
from sparsort.errors import SparsortError
from sparsort.recipes import calibrate as calibrate_module
from sparsort.recipes.calibrate import calibrate
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.order.order import order_file
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.job import ScoreJob
from sparsort.recipes.score.score import score_file
from sparsort.scoring.calibration.calibration import CalibratedScorer, Calibration
from sparsort.scoring.model import backbone as backbone_module
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.store.scores import Scores

PROMPT = "Question: {question}\nAnswer:"
WORDS = [
    "apples",
    "seven",
    "train",
    "Paris",
    "five",
    "battery",
    "bright",
    "minutes",
    "left",
    "eaten",
    "review",
    "France",
]
# Small enough for a test, and all that the known truth needs.
SMALL: dict[str, Any] = {
    "poolings": ["last", "mean_metric"],
    "outliers": ["rms"],
    "sites": ["pre_norm"],
    "n_boot": 100,
    "n_perm": 39,
}
TRUTH = "pre_norm/mean_metric/rms/hoyer"


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> dict[str, Any]:
    return {"model": str(make_tiny_model("llama")), "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def rows(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows whose level falls with one score of the tiny model itself, and whose errors know nothing."""
    rng = np.random.default_rng(0)
    made: list[dict[str, Any]] = [
        {"id": f"q{n}", "question": " ".join(rng.choice(WORDS, rng.integers(2, 9))), "answer": str(rng.choice(WORDS))}
        for n in range(80)
    ]
    scorer = sparsort.SparsityScorer(**model, site="pre_norm", pooling="mean_metric", outliers="rms", metric="hoyer")
    hoyer = scorer.score(made, PROMPT).difficulty
    level = -(hoyer - hoyer.mean()) / hoyer.std() + 0.2 * rng.normal(size=80)
    return [
        row | {"level": float(value), "right": int(rng.integers(2))} for row, value in zip(made, level, strict=True)
    ]


@pytest.fixture(scope="module")
def file(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def saved(file: Path, model: dict[str, Any]) -> Path:
    out = file.with_name("known.json")
    calibrate(file, PROMPT, level="level", out=out, **SMALL, **model)
    return out


def test_a_known_truth_is_found_and_used(saved: Path, rows: list[dict[str, Any]]) -> None:
    found = Calibration.load(saved)
    assert (found.verdict, found.target) == ("carries difficulty", "level")
    assert (found.definition.candidate.name, found.definition.orientation) == (TRUTH, -1)
    scores = CalibratedScorer(saved, dtype="float32", device="cpu").score(rows)
    table = Scores.load(saved.with_suffix(".rows"))
    np.testing.assert_allclose(scores.difficulty, -table.column(TRUTH), rtol=1e-4)
    assert (scores.kind, scores.provenance["calibration"]) == ("calibrated", found.definition.digest)
    assert np.corrcoef(scores.difficulty, [row["level"] for row in rows])[0, 1] > 0.9
    # The fit travels: a row alone has the score that it has among the others.
    alone = CalibratedScorer(found, dtype="float32", device="cpu").score(rows[:1])
    assert alone.difficulty[0] == pytest.approx(scores.difficulty[0], rel=1e-4)
    with pytest.raises(SparsortError, match="unknown metric 'gini'"):
        scores.by("gini")


def test_no_labels_are_needed(rows: list[dict[str, Any]], model: dict[str, Any]) -> None:
    plain = [{name: row[name] for name in ("id", "question", "answer")} for row in rows]
    found = calibrate(plain, PROMPT, answer=" {answer}", **SMALL, **model)
    assert list(found.judgements) == ["loss", "length"]
    assert found.target == "loss"
    assert found.definition.answer is None


def test_errors_are_the_answers_that_were_not_right(rows: list[dict[str, Any]], model: dict[str, Any]) -> None:
    right = [row["level"] < 0 for row in rows]
    found = calibrate(rows, PROMPT, correct=right, references={"mine": "level"}, **SMALL, **model)
    assert list(found.judgements) == ["correct", "mine", "length"]
    assert found.target == "correct"
    rho = found.judgements["correct"].associations.rho
    assert found.verdict == "carries difficulty"
    assert rho[found.candidates.index(TRUTH)] < -0.7
    strings = [row | {"right": str(value)} for row, value in zip(rows, right, strict=True)]
    again = calibrate(strings, PROMPT, correct="right", **SMALL, **model)
    np.testing.assert_allclose(again.judgements["correct"].associations.rho, rho)


def test_a_second_call_reads_what_the_first_has_computed(
    saved: Path, file: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> None:
        raise AssertionError("a row was run again")

    monkeypatch.setattr(backbone_module.Backbone, "walk", refuse)
    other = saved.with_name("other.json")
    shutil.copytree(saved.with_suffix(".rows"), other.with_suffix(".rows"))
    again = calibrate(file, PROMPT, level="level", correct="right", out=other, **SMALL, **model)
    assert list(again.judgements) == ["correct", "level", "length"]


def test_score_and_order_take_the_file(saved: Path, file: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    config = ScorerConfig(calibration=saved, model=ModelSpec(dtype="float32", device="cpu"))
    report = score_file(file, scorer=config, out=tmp_path / "s")
    assert report.summary()["provenance"]["prompt"]["turns"] == [["text", PROMPT]]
    # A worker process gets the job after the calibration was read.
    job = ScoreJob(file=file, scorer=config).checked()
    assert ForkingPickler.loads(ForkingPickler.dumps(job)) == job
    hardest = report.scores.ranked(descending=True)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]), encoding="utf-8")
    wanted = [name for name in hardest if name in {row["id"] for row in rows[:6]}]
    asked: dict[str, Any] = {"query": "How many pears?", "config": OrderConfig(), "scorer": config}
    for given in ({}, {"scores": tmp_path / "s"}):
        result = order_file(few, **asked, **given)
        assert result.order == "hard_to_easy"
        assert [demo["id"] for demo in result.demonstrations] == wanted
    matched = order_file(
        few, query="How many pears?", config=OrderConfig(k=2, select="difficulty_matched"), scorer=config
    )
    assert len(matched.demonstrations) == 2
    with pytest.raises(SparsortError, match="hard_to_easy"):
        order_file(few, query="How many pears?", config=OrderConfig(order="sparse_to_dense"), scorer=config)
    with pytest.raises(SparsortError, match="calibration is for the prompt"):
        order_file(few, query="How many pears?", config=OrderConfig(prompt=PromptSpec("{question}")), scorer=config)


def test_another_prompt_model_or_option_is_refused(
    saved: Path, file: Path, make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    config = ScorerConfig(calibration=saved)
    with pytest.raises(SparsortError, match="calibration is for the prompt"):
        score_file(file, scorer=config, prompt=PromptSpec("{question}"))
    with pytest.raises(SparsortError, match="reads the prompt alone"):
        score_file(file, scorer=config, prompt=PromptSpec(answer=" {answer}"))
    with pytest.raises(SparsortError, match="reads the prompt alone"):
        CalibratedScorer(saved, dtype="float32").score(rows, PROMPT, answer=" {answer}")
    with pytest.raises(SparsortError, match="different weights"):
        CalibratedScorer(saved, str(make_tiny_model("llama", rms_norm_eps=1e-3)))
    with pytest.raises(SparsortError, match=r"metric is 'l1'.*chose 'hoyer'"):
        score_file(file, scorer=ScorerConfig(calibration=saved, metric="l1"))
    with pytest.raises(
        SparsortError, match=r"calibration=.* has no effect: sparsity reads it, and this is scorer='length'"
    ):
        ScorerConfig(calibration=saved, scorer="length")
    with pytest.raises(SparsortError, match="there is no calibration"):
        score_file(file, scorer=ScorerConfig(calibration=saved.with_name("absent.json")))


def test_a_calibration_without_a_finding_warns(
    rows: list[dict[str, Any]], model: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = calibrate(rows, PROMPT, correct="right", **SMALL, **model)
    assert found.verdict == "carries nothing here"
    CalibratedScorer(found, dtype="float32", device="cpu")
    assert "not known to carry difficulty" in caplog.text


def test_a_chat_prompt_is_calibrated_and_applied(rows: list[dict[str, Any]], model: dict[str, Any]) -> None:
    level = [row["level"] for row in rows]
    found = calibrate(rows, "{question}", system="Be brief.", chat=True, level=level, **SMALL, **model)
    assert found.definition.turns == (("system", "Be brief."), ("user", "{question}"))
    scorer = CalibratedScorer(found, dtype="float32", device="cpu")
    np.testing.assert_array_equal(
        scorer.score(rows[:5]).difficulty,
        scorer.score(rows[:5], "{question}", system="Be brief.", chat=True).difficulty,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to calibrate against"),
        ({"answer": " {answer}", "own_loss": False}, "nothing to calibrate against"),
        ({"level": "lvel"}, "Did you mean 'level'"),
        ({"level": "question"}, "column 'question' of row 0.*expected a number"),
        ({"level": [1.0, 2.0]}, r"level has shape \(2,\)"),
        ({"level": object()}, "one number per row"),
        ({"correct": "level"}, "correct has the value"),
        ({"references": {"loss": "level"}}, "a meaning of its own"),
        ({"level": "level", "poolings": ["answer"]}, "--answer"),
        ({"level": "level", "sites": ["prenorm"]}, "Did you mean 'pre_norm'"),
        ({"level": "level", "out": "calibration"}, "such as calibration.json"),
        ({"level": "level", "prompt": None}, "id, question, answer"),
        ({"level": "level", "prompt": "{qestion}"}, "Did you mean 'question'"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    options: dict[str, Any], message: str, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(SparsortError, match=message):
        calibrate(rows, **{"prompt": PROMPT, "model": "no such model"} | options)


def test_more_rows_than_can_be_compared(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_module, "_MOST_ROWS", 79)
    with pytest.raises(SparsortError, match="has 80 rows, and at most 79 are compared"):
        calibrate(rows, PROMPT, level="level", model="no such model")


def test_too_few_rows_and_a_level_that_is_one(rows: list[dict[str, Any]], model: dict[str, Any]) -> None:
    with pytest.raises(SparsortError, match=r"reference 'level': 20 rows can be compared; at least 40"):
        calibrate(rows[:20], PROMPT, level="level", **SMALL, **model)
    with pytest.raises(SparsortError, match=r"reference 'level': it is the same in every row"):
        calibrate(rows, PROMPT, level=np.ones(80), **SMALL, **model)


# The command


def _asked(file: Path, model: dict[str, Any]) -> list[str]:
    small = ["--sites", "pre_norm", "--poolings", "last,mean_metric", "--outliers", "rms", "--draws", "100"]
    options = [*small, "--dtype", "float32", "--device", "cpu"]
    return ["calibrate", str(file), "--model", model["model"], "--prompt", r"Question: {question}\nAnswer:", *options]


def test_the_command_prints_the_tables_and_the_verdict(file: Path, model: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    shown = run(*_asked(file, model), "--level", "level", "--answer", " {answer}", "--target", "level", "--out", out)
    assert "Carries difficulty: " + TRUTH in shown.stdout
    assert "loss (n = 80)" in shown.stdout
    assert "Traceback" not in shown.output
    found = json.loads(run(*_asked(file, model), "--level", "level", "--json").stdout)
    assert found["verdict"] == "carries difficulty"
    assert found["definition"]["orientation"] == -1
    assert Calibration.load(out).target == "level"


def test_the_commands_mistakes_are_one_message(file: Path, model: dict[str, Any]) -> None:
    for arguments, message in (
        ([], "--level COLUMN"),
        (["--level", "lvel"], "Did you mean 'level'"),
        (["--level", "level", "--draws", "10"], "at least 100 draws"),
        (["--level", "level", "--target", "loss"], "unknown target 'loss'"),
    ):
        result = run(*_asked(file, model), *arguments, code=2)
        assert message in result.stderr
        assert "Traceback" not in result.output
