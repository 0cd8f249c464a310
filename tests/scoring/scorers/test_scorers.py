"""Scorers end to end on tiny models, against a plain computation that shares no code with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsort
from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import load_model
from sparsort.scoring.model import backbone as backbone_module

PROMPT = "Question: {question}\nAnswer:"
ANSWER = " {answer}"
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
            "answer": str(rng.integers(0, 30)),
        }
        for n in range(40)
    ]


@torch.inference_mode()
def _plain_states(
    folder: Path, rows: list[dict[str, Any]], *, answer: bool
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """(ids, states before the norm, logits, index of the answer's first token) of every row, one at a time."""
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    caught: dict[str, torch.Tensor] = {}
    blocks = loaded.model.get_decoder().layers
    blocks[-1].register_forward_hook(
        lambda _m, _a, out: caught.__setitem__("h", out[0] if isinstance(out, tuple) else out)
    )
    found = []
    for row in rows:
        head = loaded.tokenizer(PROMPT.format(**row))["input_ids"]
        ids = loaded.tokenizer(PROMPT.format(**row) + (ANSWER.format(**row) if answer else ""))["input_ids"]
        logits = loaded.model(torch.tensor([ids])).logits[0].double()
        found.append((torch.tensor(ids), caught["h"][0].double().clone(), logits, len(head)))
    return found


def _scorer(folder: Path, **options: Any) -> sparsort.SparsityScorer:
    return sparsort.SparsityScorer(str(folder), dtype="float32", device="cpu", token_budget=128, **options)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("pooling", ["last", "mean_metric", "mean_state", "answer"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_poolings_are_the_plain_ones(
    family: str,
    pooling: str,
    chunk: int | None,
    make_tiny_model: Callable[..., Path],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunk:
        monkeypatch.setattr(backbone_module, "_CHUNK", chunk)
    folder = make_tiny_model(family)
    scores = _scorer(folder, pooling=pooling).score(rows, PROMPT, answer=ANSWER if pooling == "answer" else None)
    for place, (ids, states, _, start) in enumerate(_plain_states(folder, rows, answer=pooling == "answer")):
        wanted = {"last": states[-1:], "answer": states[start:]}.get(pooling, states[1:])
        if pooling == "mean_state":
            wanted = wanted.mean(dim=0, keepdim=True)
        expected = {name: values.mean() for name, values in sparsort.sparsity_metrics(wanted).items()}
        assert scores.column("n_tokens")[place] == len(ids)
        for name in scores.metrics:
            step = 2 / states.shape[1] if name.startswith("l0") else 0
            assert scores.column(name)[place] == pytest.approx(expected[name].item(), rel=2e-4, abs=max(1e-5, step)), (
                name
            )


@pytest.mark.parametrize("rule", ["drop:3", "rms"])
def test_outlier_rules_are_the_plain_ones(
    rule: str, make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    folder = make_tiny_model("llama")
    scores = _scorer(folder, outliers=rule).score(rows, PROMPT)
    last = torch.stack([states[-1] for _, states, _, _ in _plain_states(folder, rows, answer=False)])
    rms = last.square().mean(dim=0).sqrt()
    kept = last / rms if rule == "rms" else last[:, sorted(set(range(64)) - set(rms.topk(3).indices.tolist()))]
    np.testing.assert_allclose(scores.column("gini"), sparsort.sparsity_metrics(kept)["gini"], rtol=1e-4)
    record = scores.provenance["outliers"]
    assert record["rule"] == rule
    assert record["n_states"] == 40
    assert rule == "rms" or set(record["dims"]) == set(rms.topk(3).indices.tolist())


def test_difficulty_rises_with_sparsity_for_every_metric(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    scores = _scorer(make_tiny_model("llama"), metric="effective_rank_energy").score(rows, PROMPT)
    np.testing.assert_array_equal(scores.difficulty, -scores.column("effective_rank_energy"))
    np.testing.assert_array_equal(scores.by("gini").difficulty, scores.column("gini"))
    assert scores.kind == "sparsity"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_losses_and_entropy_are_the_models_own(
    family: str, make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    options = {"final_logit_softcapping": 5.0} if family == "gemma3" else {}
    folder = make_tiny_model(family, **options)
    model = {"dtype": "float32", "device": "cpu", "token_budget": 64}
    on_answer = sparsort.LossScorer(str(folder), on="answer", **model).score(rows, PROMPT, answer=ANSWER)
    on_prompt = sparsort.LossScorer(str(folder), on="prompt", **model).score(rows, PROMPT)
    entropy = sparsort.EntropyScorer(str(folder), **model).score(rows, PROMPT)
    assert (on_answer.kind, on_prompt.kind, entropy.kind) == ("answer_loss", "prompt_loss", "entropy")
    for place, (ids, _, logits, start) in enumerate(_plain_states(folder, rows, answer=True)):
        losses = -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert on_answer.difficulty[place] == pytest.approx(losses[start - 1 :].mean().item(), rel=1e-5)
    for place, (ids, _, logits, _) in enumerate(_plain_states(folder, rows, answer=False)):
        losses = -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert on_prompt.difficulty[place] == pytest.approx(losses.mean().item(), rel=1e-5)
        log_p = logits[-1].log_softmax(-1)
        assert entropy.difficulty[place] == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=1e-5)


def test_rows_that_cannot_be_scored_are_rows_with_a_reason(make_tiny_model: Callable[..., Path]) -> None:
    data = [
        {"id": "a", "question": "Paris"},
        {"id": "b", "question": " "},
        {"id": "c", "question": "apples " * 100_000},
        {"id": "d", "question": None},
    ]
    scores = _scorer(make_tiny_model("llama")).score(data, PROMPT)
    assert scores.ids == ["a", "b", "c", "d"]
    assert list(scores.column("status")) == ["ok", "empty", "too_long", "empty"]
    assert np.isfinite(scores.difficulty).tolist() == [True, False, False, False]
    assert "the limit is 1024" in scores.column("reason")[2]
    cut = _scorer(make_tiny_model("llama")).score(data, PROMPT, truncation="left", max_length=50)
    assert list(cut.column("status")) == ["ok", "empty", "ok", "empty"]
    assert cut.column("n_tokens")[2] == 50
    assert cut.column("n_truncated")[2] > 10_000


def test_an_empty_answer_is_a_reason_where_the_answer_is_read(make_tiny_model: Callable[..., Path]) -> None:
    data = [{"question": "Paris", "answer": "5"}, {"question": "Rome", "answer": ""}]
    scorer = sparsort.LossScorer(str(make_tiny_model("llama")), dtype="float32", device="cpu")
    scores = scorer.score(data, PROMPT, answer="{answer}")
    assert list(scores.column("status")) == ["ok", "empty"]


def test_a_state_that_is_not_finite_is_a_row_with_a_reason(make_tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(make_tiny_model("llama")), dtype="float32", device="cpu")
    token = loaded.tokenizer(" Paris", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[token] = torch.nan
    scores = sparsort.SparsityScorer(loaded).score([{"q": "the capital is Paris"}, {"q": "seven apples"}], "{q}")
    assert list(scores.column("status")) == ["not_finite", "ok"]
    assert np.isnan(scores.difficulty).tolist() == [True, False]


def test_a_run_in_a_folder_is_continued_and_refuses_other_settings(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = make_tiny_model("llama")
    whole = _scorer(folder, outliers="rms").score(rows, PROMPT, shard_rows=7)
    first = _scorer(folder, outliers="rms").score(rows, PROMPT, shard_rows=7, out=tmp_path / "s")
    (tmp_path / "s" / "shard-00003.parquet").unlink()
    again = _scorer(folder, outliers="rms").score(rows, PROMPT, shard_rows=7, out=tmp_path / "s")
    for scores in (first, again):
        np.testing.assert_array_equal(scores.difficulty, whole.difficulty)
        assert scores.ids == whole.ids
    with pytest.raises(SparsortError, match="site"):
        _scorer(folder, outliers="rms", site="post_norm").score(rows, PROMPT, shard_rows=7, out=tmp_path / "s")
    with pytest.raises(SparsortError, match="weights"):
        _scorer(make_tiny_model("llama", rms_norm_eps=1e-3), outliers="rms").score(
            rows, PROMPT, shard_rows=7, out=tmp_path / "s"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "ginni"}, "Did you mean 'gini'"),
        ({"site": "postnorm"}, "Did you mean 'post_norm'"),
        ({"pooling": "mean"}, "unknown pooling"),
        ({"outliers": "drop:0"}, "outlier rule"),
        ({"outliers": "drop:64"}, "every one of the 64"),
        ({"l0_threshold": float("nan")}, "l0_threshold"),
        ({"pooling": "answer"}, "--answer"),
    ],
)
def test_bad_options(
    options: dict[str, Any], message: str, make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(SparsortError, match=message):
        _scorer(make_tiny_model("llama"), **options).score(rows, PROMPT)


def test_a_prompt_is_asked_for_with_the_columns_at_hand(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(SparsortError, match="id, question, answer"):
        _scorer(make_tiny_model("llama")).score(rows)
    with pytest.raises(SparsortError, match="has 1024 tokens"):
        _scorer(make_tiny_model("llama")).score(rows, PROMPT, max_length=2048)


@pytest.mark.demo_model
def test_scores_of_the_embedded_model_do_not_depend_on_batches(demo_model: Path, rows: list[dict[str, Any]]) -> None:
    loaded = load_model(str(demo_model), dtype="float32", device="cpu")
    together = sparsort.SparsityScorer(loaded).score(rows, PROMPT)
    alone = sparsort.SparsityScorer(loaded, token_budget=1).score(rows, PROMPT, shard_rows=1)
    # fp32: another batch shape is another order of summation, no more.
    np.testing.assert_allclose(together.difficulty, alone.difficulty, rtol=1e-5)


def test_a_demonstration_finds_its_score_by_what_the_prompt_reads(make_tiny_model: Callable[..., Path]) -> None:
    data = [{"question": "Paris", "note": "x"}, {"question": "seven apples", "note": None}]
    scores = _scorer(make_tiny_model("llama")).score(data, PROMPT)
    # Without ids the content decides, and an id that comes from elsewhere is no position.
    asked = [{"question": "seven apples", "id": "0", "label": 3}, {"question": "Paris"}]
    np.testing.assert_array_equal(scores.difficulty_of(asked), scores.difficulty[::-1])
    with pytest.raises(SparsortError, match="1 of 1 rows have no score"):
        scores.difficulty_of([{"question": "Rome"}])


def test_an_id_that_now_stands_for_another_text_is_refused(make_tiny_model: Callable[..., Path]) -> None:
    scores = _scorer(make_tiny_model("llama")).score([{"id": 7, "question": "Paris"}], PROMPT)
    assert scores.difficulty_of([{"id": 7, "question": "Paris", "label": "x"}]) == scores.difficulty
    with pytest.raises(SparsortError, match="not the row that was scored under this id"):
        scores.difficulty_of([{"id": 7, "question": "Rome"}])


@pytest.mark.parametrize("pooling", ["mean_metric", "mean_state"])
def test_a_fit_does_not_depend_on_what_is_shared(
    pooling: str, make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    head = "Question: " + "seven apples in Paris " * 8
    shared = _scorer(make_tiny_model("llama"), outliers="rms", pooling=pooling)
    whole = _scorer(make_tiny_model("llama"), outliers="rms", pooling=pooling)
    whole.backbone.can_continue = False
    one, other = (scorer.score(rows, head + "{question}") for scorer in (shared, whole))
    assert one.provenance["outliers"]["n_states"] == other.provenance["outliers"]["n_states"]
    np.testing.assert_allclose(one.difficulty, other.difficulty, rtol=1e-4)


def test_like_takes_over_the_fit_and_refuses_other_settings(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    scorer = _scorer(make_tiny_model("llama"), outliers="rms")
    pool = scorer.score(rows, PROMPT)
    alone = scorer.score(rows[:1], PROMPT, like=pool)
    assert alone.difficulty[0] == pytest.approx(pool.difficulty[0], rel=1e-4)
    with pytest.raises(SparsortError, match=r"would not compare.*prompt"):
        scorer.score(rows[:1], "{question}", like=pool)


def test_prompt_loss_does_not_read_the_answer(make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]) -> None:
    scorer = sparsort.LossScorer(str(make_tiny_model("llama")), on="prompt", dtype="float32", device="cpu")
    with_answer = scorer.score(rows, PROMPT, answer=ANSWER)
    np.testing.assert_allclose(with_answer.difficulty, scorer.score(rows, PROMPT).difficulty, rtol=1e-5)


def test_half_a_surrogate_pair_is_a_row_with_a_reason(make_tiny_model: Callable[..., Path]) -> None:
    data = [{"question": "half \ud83d"}, {"question": "Paris"}]
    for scorer in (_scorer(make_tiny_model("llama")), sparsort.CompressionScorer()):
        assert list(scorer.score(data, PROMPT).column("status")) == ["invalid", "ok"]


def test_a_missing_field_is_found_before_anything_is_scored(
    make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a"}\n{"question": "b"}\n{"questoin": "c"}\n', encoding="utf-8")
    with pytest.raises(SparsortError, match=r"line 3\) has no field 'question'. Did you mean 'questoin'"):
        _scorer(make_tiny_model("llama")).score(file, PROMPT, shard_rows=1, out=tmp_path / "s")
    assert not (tmp_path / "s").exists()
