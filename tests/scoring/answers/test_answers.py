"""Answers after shared prefixes, compared with a plain forward pass: one query, one answer, the whole text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.kernels.backend import sparsity_metrics
from sparsort.scoring.answers import prefix as prefixes
from sparsort.scoring.answers import prefix_attention
from sparsort.scoring.answers import token_tree as branches
from sparsort.scoring.answers.reader import FEATURES, AnswerReader
from sparsort.scoring.loading.load import load_model

DEMOS = [
    "Question: Where is Rome ?\nType: location\n\n",
    "Question: Who wrote it ?\nType: human\n\n",
    "Question: é ?\nType: x\n\n",
]
QUERIES = [
    "Question: How far is the moon ?\nType:",
    "Question: Why ?\nType:",
    "Question: What does this long question with many words want to know from us ?\nType:",
]
LABELS = [" number", " a reason", " num", " \u00e9t\u00e9"]


def plain(reader: AnswerReader, prompt: str, answer: str) -> tuple[float, int]:
    """Summed log-probability of the answer's tokens by one plain pass over the whole text, in the model's own dtype."""
    tokenizer, model = reader.loaded.tokenizer, reader.loaded.model
    encoded = tokenizer(prompt + answer, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    answered = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt) and end > begin]
    with torch.inference_mode():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[0, i]]) for i in answered), len(answered)


@pytest.fixture(scope="module")
def reader_of(make_tiny_model: Callable[..., Path]) -> Callable[..., AnswerReader]:
    made: dict[str, AnswerReader] = {}

    def of(family: str, **options: Any) -> AnswerReader:
        if family not in made:
            made[family] = AnswerReader(load_model(str(make_tiny_model(family)), dtype="float32"), token_budget=200)
        return made[family]

    return of


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "no_norm"])
@pytest.mark.parametrize("n_demos", [0, 1, 3])
def test_answers_equal_the_plain_pass(reader_of: Callable[..., AnswerReader], family: str, n_demos: int) -> None:
    reader = reader_of(family)
    found = reader.answers(DEMOS[:n_demos], QUERIES, LABELS)
    for q, query in enumerate(QUERIES):
        for a, answer in enumerate(LABELS):
            log_p, count = plain(reader, "".join(DEMOS[:n_demos]) + query, answer)
            assert found.log_p[q, a] == pytest.approx(log_p, abs=1e-3), (query, answer)
            assert found.n_tokens[q, a] == count


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_these_families_share_prefixes(reader_of: Callable[..., AnswerReader], family: str) -> None:
    reader = reader_of(family)
    assert reader.reader.why_not is None
    reader.reader._kept.clear()
    first = reader.answers(DEMOS, QUERIES, LABELS[:1]).tokens_read
    again = reader.answers(DEMOS, QUERIES, LABELS[:1]).tokens_read
    assert again < first
    assert again >= sum(len(reader.loaded.tokenizer(query, add_special_tokens=False)["input_ids"]) for query in QUERIES)


def test_orders_share_what_they_begin_with(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    reader.reader._kept.clear()
    a, b, c = DEMOS
    one = reader.answers([a, b, c], QUERIES[:1], LABELS).tokens_read
    other = reader.answers([a, c, b], QUERIES[:1], LABELS).tokens_read
    length = len(reader.loaded.tokenizer(a, add_special_tokens=False)["input_ids"])
    assert one - other >= length
    found = reader.answers([a, c, b], QUERIES[:1], LABELS).log_p[0]
    expected = [plain(reader, a + c + b + QUERIES[0], label)[0] for label in LABELS]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_query_far_longer_than_the_window(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("gemma3")
    query = "Question: " + "word " * 40 + "?\nType:"
    found = reader.answers(DEMOS, [query, QUERIES[1]], LABELS).log_p
    expected = [[plain(reader, "".join(DEMOS) + q, label)[0] for label in LABELS] for q in (query, QUERIES[1])]
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prefix_longer_than_one_pass(
    reader_of: Callable[..., AnswerReader], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(family)
    reader.reader._kept.clear()
    monkeypatch.setattr(prefixes, "_EXTENDED_AT_ONCE", 7)
    monkeypatch.setattr(prefix_attention, "_SCORES_AT_ONCE", 100)
    before = reader.reader.n_tokens
    found = reader.answers(DEMOS, QUERIES[:1], LABELS)
    reader.reader._kept.clear()
    expected = [plain(reader, "".join(DEMOS) + QUERIES[0], label)[0] for label in LABELS]
    np.testing.assert_allclose(found.log_p[0], expected, atol=1e-3)
    whole = len(reader.loaded.tokenizer("".join(DEMOS) + QUERIES[0])["input_ids"])
    assert reader.reader.n_tokens - before == whole + (found.n_tokens - 1).sum()


def test_a_window_that_only_the_mask_knows(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    # Qwen2-MoE does not tell its attention of its window, which here is longer than the reader's probe.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model("llama"))
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader = AnswerReader(load_model(str(tmp_path), dtype="float32"))
    assert "window of 32" in (reader.reader.why_not or "")
    found = reader.answers(DEMOS, QUERIES[:1], LABELS).log_p[0]
    expected = [plain(reader, "".join(DEMOS) + QUERIES[0], label)[0] for label in LABELS]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    # After a shared prefix it would be another model.
    reader.reader.why_not = None
    wrong = reader.answers(DEMOS, QUERIES[:1], LABELS).log_p[0]
    assert np.abs(wrong - expected).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_attention_is_noticed_in_every_dtype(
    make_tiny_model: Callable[..., Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(make_tiny_model("llama")), dtype=dtype)
    assert AnswerReader(loaded).reader.why_not is None
    part = prefix_attention._part
    monkeypatch.setattr(prefix_attention, "_part", lambda q, k, v, scale, *rest: part(q, k, v, 0.2 * scale, *rest))
    assert "differ" in (AnswerReader(loaded).reader.why_not or "")


def test_padding_is_not_counted_and_states_keep_no_batch_alive(
    reader_of: Callable[..., AnswerReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of("llama")
    held: list[Any] = []
    finish = AnswerReader._finish
    monkeypatch.setattr(AnswerReader, "_finish", lambda self, got, n: held.append(got) or finish(self, got, n))
    found = reader.answers([], QUERIES, LABELS)
    stems = sum(len(reader.loaded.tokenizer(query)["input_ids"]) for query in QUERIES)
    assert found.tokens_read == stems + (found.n_tokens - 1).sum()
    states = [*(state for rows in held[0].sites.values() for state in rows), *held[0].last.values()]
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in states)


def test_the_cache_of_the_encoder_is_bounded(
    reader_of: Callable[..., AnswerReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of("llama")
    reader.trees.forget()
    expected = [reader.answers(DEMOS[:n], QUERIES, LABELS).log_p for n in (1, 2, 3)]
    monkeypatch.setattr(branches, "_KEPT", 2)
    for n, log_p in zip((1, 2, 3, 1), [*expected, expected[0]], strict=True):
        np.testing.assert_allclose(reader.answers(DEMOS[:n], QUERIES, LABELS).log_p, log_p, atol=1e-4)
        assert len(reader.trees._trees) <= 2 + len(QUERIES)
    monkeypatch.undo()
    reader.answers([], QUERIES, LABELS)
    assert all(left for left, *_ in reader.trees._trees)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_features_are_of_the_querys_last_state(reader_of: Callable[..., AnswerReader], family: str) -> None:
    reader = reader_of(family)
    found = reader.answers(DEMOS[:2], QUERIES, LABELS)
    for q, query in enumerate(QUERIES):
        ids = torch.tensor([reader.loaded.tokenizer("".join(DEMOS[:2]) + query)["input_ids"]])
        with torch.inference_mode():
            out = reader.loaded.model(input_ids=ids, output_hidden_states=True)
        probabilities = out.logits[0, -1].double().softmax(-1)
        entropy = -float((probabilities * probabilities.log()).sum())
        assert found.features[q, FEATURES.index("entropy")] == pytest.approx(entropy, abs=1e-3)
        gini = float(sparsity_metrics(out.hidden_states[-1][0, -1])["gini"])
        assert found.features[q, FEATURES.index("post_norm/gini")] == pytest.approx(gini, abs=1e-4)


def test_labels_that_merge_with_the_template(demo_model: Path) -> None:
    reader = AnswerReader(load_model(str(demo_model), dtype="float32"))
    # The space at the end of the prompt is one token with the label that follows.
    queries = ["Review: a fine film\nSentiment: ", "Review: dull\nSentiment: "]
    demos = ["Review: good\nSentiment: positive\n\n"]
    found = reader.answers(demos, queries, ["positive", "negative"])
    for q, query in enumerate(queries):
        for a, answer in enumerate(["positive", "negative"]):
            log_p, count = plain(reader, demos[0] + query, answer)
            assert found.log_p[q, a] == pytest.approx(log_p, abs=1e-3)
            assert found.n_tokens[q, a] == count


def test_bad_input_is_refused(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    with pytest.raises(SparsortError, match="adds no token"):
        reader.answers(DEMOS, QUERIES, [""])
    with pytest.raises(SparsortError, match="no queries"):
        reader.answers(DEMOS, [], LABELS)
    with pytest.raises(SparsortError, match="Use fewer shots"):
        reader.answers(DEMOS * 400, QUERIES, LABELS)
    with pytest.raises(SparsortError, match="surrogate"):
        reader.answers(DEMOS, ["Question: \ud83d ?\nType:"], LABELS)


TEXTS = [" How far is the moon ?\nType:", " é ?", "s", " " + "word " * 30 + "?\nType:"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt", "no_norm"])
@pytest.mark.parametrize("n_demos", [0, 1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_the_loss_on_a_querys_own_text_is_that_of_the_plain_pass(
    reader_of: Callable[..., AnswerReader], family: str, n_demos: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(family)
    if whole:
        monkeypatch.setattr(reader.reader, "why_not", "the test says so")
    for openings in (["Question:"] * 4, [""] * 4, ["Question:", "", "Question", ""]):
        loss, counts = reader.continuations(DEMOS[:n_demos], openings, TEXTS)
        expected = [
            plain(reader, "".join(DEMOS[:n_demos]) + opening, text)
            for opening, text in zip(openings, TEXTS, strict=True)
        ]
        np.testing.assert_allclose(loss, [-log_p for log_p, _ in expected], atol=1e-3)
        assert counts.tolist() == [count for _, count in expected]


@pytest.mark.parametrize("opening", ["Question:", ""])
def test_the_loss_shares_its_prefix(reader_of: Callable[..., AnswerReader], opening: str) -> None:
    reader = reader_of("llama")
    reader.continuations(DEMOS, [opening], TEXTS[:1])
    before = reader.reader.n_tokens
    reader.continuations(DEMOS, [opening], TEXTS[:1])
    own = len(reader.loaded.tokenizer(opening + TEXTS[0], add_special_tokens=False)["input_ids"])
    # The last token predicts nothing; without an opening the prefix's last one is run with the text.
    assert reader.reader.n_tokens - before == own - bool(opening)


def test_the_loss_on_a_text_that_merges_with_the_prefix(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    # " answer" is one token, and the text's from where it straddles the border.
    chunks, texts = [*DEMOS, " an"], ["swer ?", " apple"]
    loss, counts = reader.continuations(chunks, ["", ""], texts)
    expected = [plain(reader, "".join(chunks), text) for text in texts]
    np.testing.assert_allclose(loss, [-log_p for log_p, _ in expected], atol=1e-3)
    assert counts.tolist() == [count for _, count in expected]


def test_texts_without_a_loss_are_refused(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    with pytest.raises(SparsortError, match="give one for each"):
        reader.continuations(DEMOS, ["Question:"], TEXTS)
    with pytest.raises(SparsortError, match="no texts"):
        reader.continuations(DEMOS, [], [])
    for opening in ("Question:", ""):
        with pytest.raises(SparsortError, match="adds no token"):
            reader.continuations(DEMOS, [opening], [""])
    # Without the token that the tokenizer puts in front, nothing predicts the first.
    bare = AnswerReader(reader.loaded, chat=True)
    with pytest.raises(SparsortError, match="Put some text before"):
        bare.continuations([], [""], ["What ?"])
