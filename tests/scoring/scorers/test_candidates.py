"""Every candidate against the scorer of its own options, which shares neither the pass nor the spans nor the fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsort
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRICS
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.model import backbone as backbone_module
from sparsort.scoring.scorers import candidate_job
from sparsort.scoring.scorers.candidates import POOLINGS, SITES, Candidate, CandidateScorer

PROMPT = "Question: {question}\nAnswer:"
ANSWER = " {answer}"
RULES = ("none", "drop:3", "rms")
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


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"q{n}",
            "question": " ".join(rng.choice(WORDS, rng.integers(1, 14))),
            "answer": " ".join(rng.choice(WORDS, rng.integers(1, 5))),
        }
        for n in range(30)
    ]


def _loaded(make_tiny_model: Callable[..., Path], family: str) -> LoadedModel:
    return load_model(str(make_tiny_model(family)), dtype="float32", device="cpu")


def _same(
    loaded: LoadedModel, found: sparsort.Scores, way: str, rows: list[dict[str, Any]], prompt: str = PROMPT
) -> None:
    """The columns are the scorer's, but for the thresholds of the two counts and what float32 rounds."""
    site, pooling, rule = way.split("/")
    scorer = sparsort.SparsityScorer(loaded, site=site, pooling=pooling, outliers=rule, token_budget=64)
    scores = scorer.score(rows, prompt, answer=ANSWER if pooling == "answer" else None)
    for metric in METRICS:
        step = 2 / scorer.backbone.width(scorer.site) if metric.startswith("l0") else 0
        np.testing.assert_allclose(
            found.column(f"{way}/{metric}"),
            scores.column(metric),
            rtol=3e-4,
            atol=max(1e-5, step),
            err_msg=f"{way}/{metric}",
        )


_WAYS = [f"pre_norm/{pooling}/{rule}" for pooling, rule in itertools.product(POOLINGS, RULES)]


@pytest.mark.parametrize(("family", "chunk"), [("llama", None), ("gemma3", 8)])
def test_every_candidate_is_what_its_own_scorer_gives(
    family: str,
    chunk: int | None,
    make_tiny_model: Callable[..., Path],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunk:
        monkeypatch.setattr(backbone_module, "_CHUNK", chunk)
    loaded, rows = _loaded(make_tiny_model, family), rows[:16]
    found = CandidateScorer(loaded, token_budget=128).score(rows, PROMPT, answer=ANSWER, shard_rows=7)
    assert found.counts("status") == {"ok": len(rows)}
    assert len(found.metrics) == len(SITES) * len(POOLINGS) * len(RULES) * len(METRICS) + 2
    for way in [*_WAYS, "post_norm/last/rms", "mlp/mean_metric/drop:3", "mlp/answer/rms", "mlp/mean_state/rms"]:
        _same(loaded, found, way, rows)
    losses = sparsort.LossScorer(loaded, on="answer").score(rows, PROMPT, answer=ANSWER)
    np.testing.assert_allclose(found.column("answer_loss"), losses.difficulty, rtol=1e-5)
    alone = sparsort.SparsityScorer(loaded).score(rows, PROMPT)
    np.testing.assert_array_equal(found.column("n_tokens"), alone.column("n_tokens"))
    np.testing.assert_array_equal(found.column("answer_tokens"), losses.column("n_tokens") - alone.column("n_tokens"))


def test_a_prompt_whose_tokens_the_answer_would_change_is_read_alone(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    loaded = _loaded(make_tiny_model, "llama")
    glued = [{**row, "question": row["question"][:-1], "answer": row["question"][-1] + " left"} for row in rows]
    prompt, answer = "Question: {question}", "{answer}"
    ids = [
        [
            loaded.tokenizer(text)["input_ids"]
            for text in (f"Question: {r['question']}", f"Question: {r['question']}{r['answer']}")
        ]
        for r in glued
    ]
    straddling = sum(both[: len(alone)] != alone for alone, both in ids)
    assert 5 < straddling < len(rows)
    found = CandidateScorer(loaded, outliers=["none", "rms"]).score(glued, prompt, answer=answer)
    for pooling in ("last", "mean_metric", "mean_state"):
        scores = sparsort.SparsityScorer(loaded, pooling=pooling, outliers="rms").score(glued, prompt)
        np.testing.assert_allclose(found.column(f"pre_norm/{pooling}/rms/hoyer"), scores.column("hoyer"), rtol=1e-3)
    losses = sparsort.LossScorer(loaded, on="answer").score(glued, prompt, answer=answer)
    np.testing.assert_allclose(found.column("answer_loss"), losses.difficulty, rtol=1e-5)
    scores = sparsort.SparsityScorer(loaded, pooling="answer").score(glued, prompt, answer=answer)
    np.testing.assert_allclose(found.column("pre_norm/answer/none/gini"), scores.difficulty, rtol=1e-4)


def test_without_an_answer_there_is_no_loss_and_no_pooling_of_it(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    loaded = _loaded(make_tiny_model, "llama")
    found = CandidateScorer(loaded, sites=["pre_norm", "layer:1"], outliers=["none"]).score(rows, PROMPT)
    ways = {name.rpartition("/")[0] for name in found.metrics}
    assert ways == {f"{site}/{p}/none" for site in ("pre_norm", "layer:1") for p in POOLINGS if p != "answer"}
    _same(loaded, found, "layer:1/mean_metric/none", rows)
    with pytest.raises(SparsortError, match="--answer"):
        CandidateScorer(loaded, poolings=["answer"]).score(rows, PROMPT)


def test_a_value_that_a_row_lacks_is_missing_in_its_candidates_only(make_tiny_model: Callable[..., Path]) -> None:
    loaded = _loaded(make_tiny_model, "llama")
    token = loaded.tokenizer(" Paris", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[token] = torch.nan
    data = [
        {"id": "a", "question": "seven apples", "answer": "five"},
        {"id": "b", "question": "seven apples", "answer": ""},
        {"id": "c", "question": "", "answer": "five"},
        {"id": "d", "question": "in Paris", "answer": "five"},
        {"id": "f", "question": "apples " * 2000, "answer": "five"},
    ]
    found = CandidateScorer(loaded).score(data, "{question}:", answer="{answer}")
    assert list(found.column("status")) == ["ok", "ok", "empty", "not_finite", "too_long"]
    prompts, answers, loss = (
        found.column(name) for name in ("mlp/last/rms/gini", "mlp/answer/rms/gini", "answer_loss")
    )
    assert np.isfinite(prompts).tolist() == [True, True, False, False, False]
    assert np.isfinite(answers).tolist() == [True, False, False, False, False]
    assert np.isfinite(loss).tolist() == [True, False, False, False, False]


def test_a_continued_run_keeps_its_fits_and_takes_no_second_sample(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _loaded(make_tiny_model, "llama")
    scorer = CandidateScorer(loaded, sites=["pre_norm"], token_budget=64)
    whole = scorer.score(rows, PROMPT, answer=ANSWER, shard_rows=7)
    first = scorer.score(rows, PROMPT, answer=ANSWER, shard_rows=7, out=tmp_path / "c")
    (tmp_path / "c" / "shard-00002.parquet").unlink()
    walked: list[int] = []
    plain = backbone_module.Backbone.walk
    monkeypatch.setattr(
        backbone_module.Backbone, "walk", lambda self, ids, *a: walked.append(len(ids)) or plain(self, ids, *a)
    )
    again = scorer.score(rows, PROMPT, answer=ANSWER, shard_rows=7, out=tmp_path / "c")
    assert walked == [7]
    for name in whole.metrics:
        step = 2 / 64 if "/l0" in name else 0
        np.testing.assert_allclose(first.column(name), whole.column(name), rtol=1e-5, atol=step, err_msg=name)
        np.testing.assert_allclose(
            again.column(name), whole.column(name), rtol=1e-4, atol=max(1e-6, step), err_msg=name
        )
    with pytest.raises(SparsortError, match="poolings"):
        CandidateScorer(loaded, sites=["pre_norm"], poolings=["last"]).score(
            rows, PROMPT, answer=ANSWER, shard_rows=7, out=tmp_path / "c"
        )


def test_every_row_is_run_once(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[int] = []
    plain = backbone_module.Backbone.walk
    monkeypatch.setattr(
        backbone_module.Backbone, "walk", lambda self, ids, *a: walked.append(len(ids)) or plain(self, ids, *a)
    )
    monkeypatch.setattr(candidate_job, "SAMPLE_ROWS", 10)
    loaded = _loaded(make_tiny_model, "llama")
    found = CandidateScorer(loaded, sites=["post_norm"]).score(rows, PROMPT, answer=ANSWER, shard_rows=11)
    assert walked[0] == 10
    assert len(walked) == 4
    assert sum(walked) == len(rows)
    assert found.provenance["fits"]["post_norm/last/rms"]["n_states"] == 10
    monkeypatch.setattr(candidate_job, "_KEPT_BYTES", 1)
    small = CandidateScorer(loaded, sites=["post_norm"]).score(rows, PROMPT, answer=ANSWER)
    assert small.provenance["fits"]["post_norm/last/rms"]["n_states"] == 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_rule_needs_rows_to_be_fitted_on(pooling: str, make_tiny_model: Callable[..., Path]) -> None:
    scorer = CandidateScorer(_loaded(make_tiny_model, "llama"), poolings=[pooling])
    with pytest.raises(SparsortError, match="no row of the sample could be scored"):
        scorer.score([{"question": "", "answer": "five"}], "{question}", answer=" {answer}")
    alone = CandidateScorer(_loaded(make_tiny_model, "llama"), poolings=[pooling], outliers=["none"])
    found = alone.score([{"question": "", "answer": "five"}], "{question}", answer=" {answer}")
    assert found.counts("status") == {"empty": 1}


@pytest.mark.parametrize("pooling", ["mean_state", "answer"])
def test_one_pooling_alone_is_fitted_as_among_others(
    pooling: str, make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    loaded = _loaded(make_tiny_model, "llama")
    found = CandidateScorer(loaded, sites=["pre_norm"], poolings=[pooling]).score(rows, PROMPT, answer=ANSWER)
    for rule in ("drop:3", "rms"):
        _same(loaded, found, f"pre_norm/{pooling}/{rule}", rows)


def test_a_model_without_a_final_norm_lacks_that_site(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    loaded = _loaded(make_tiny_model, "no_norm")
    scorer = CandidateScorer(loaded, outliers=["none"])
    assert list(scorer.sites) == ["pre_norm", "mlp"]
    assert "no final norm" in scorer.notes[0]
    losses = sparsort.LossScorer(loaded, on="answer").score(rows, PROMPT, answer=ANSWER)
    found = scorer.score(rows, PROMPT, answer=ANSWER)
    np.testing.assert_allclose(found.column("answer_loss"), losses.difficulty, rtol=1e-5)
    with pytest.raises(SparsortError, match="no final norm"):
        CandidateScorer(loaded, sites=["post_norm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["prenorm"]}, "Did you mean 'pre_norm'"),
        ({"sites": ["layer:9"]}, "3 blocks"),
        ({"sites": "pre_norm"}, "expected a list"),
        ({"poolings": ["mean"]}, "unknown pooling"),
        ({"outliers": ["drop"]}, "outlier rule"),
        ({"outliers": []}, "at least one"),
        ({"outliers": ["drop:64"]}, "every one of the 64"),
        ({"l0_threshold": -1.0}, "l0_threshold"),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], message: str, make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(SparsortError, match=message):
        CandidateScorer(_loaded(make_tiny_model, "llama"), **options).score(rows, PROMPT)


def test_the_name_of_a_candidate_is_read_back() -> None:
    made = Candidate(site="layer:-1", pooling="last", outliers="drop:3", metric="gini")
    assert Candidate.of(made.name) == made
    for name in ("gini", "pre_norm/last/none/ginni", "a/b/c/d/e"):
        with pytest.raises(SparsortError, match="is not the name of a candidate"):
            Candidate.of(name)
