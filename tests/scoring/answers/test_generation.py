"""Generation after shared prefixes, compared with transformers' plain `generate`: one query, the whole prompt, fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.scoring.answers import generation
from sparsort.scoring.answers.generation import Generated, generate, sample_probes
from sparsort.scoring.answers.reader import AnswerReader
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
PROMPTS = ["".join(DEMOS) + query for query in QUERIES]
# Well past gemma3's window of 8.
LONG = 32
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "no_norm")


@pytest.fixture(scope="module")
def reader_of(make_tiny_model: Callable[..., Path]) -> Callable[..., AnswerReader]:
    made: dict[str, AnswerReader] = {}

    def of(family: str) -> AnswerReader:
        if family not in made:
            # A budget that cuts the queries into several passes.
            made[family] = AnswerReader(load_model(str(make_tiny_model(family)), dtype="float32"), token_budget=60)
        return made[family]

    return of


def plain(reader: AnswerReader, prompt: str, **options: Any) -> list[int]:
    """New tokens of transformers' own greedy generation."""
    ids = torch.tensor([reader.loaded.tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        written = reader.loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **{"max_new_tokens": LONG, **options}
        )
    new: list[int] = written[0, ids.shape[1] :].tolist()
    return new


def _first(ids: list[int], token: int) -> int:
    return ids.index(token) if token in ids else len(ids)


def read_whole(reader: AnswerReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.reader, "why_not", "the test says so")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_token_for_token(reader_of: Callable[..., AnswerReader], family: str) -> None:
    reader = reader_of(family)
    assert reader.reader.why_not is None
    found = generate(reader, DEMOS, QUERIES, max_new_tokens=LONG)
    assert found.ids == [plain(reader, prompt) for prompt in PROMPTS]
    # Random weights soon say one thing for ever; a text without pairs that come twice tells more.
    found = generate(reader, DEMOS, QUERIES, max_new_tokens=LONG, no_repeat_ngram=2)
    assert found.ids == [plain(reader, prompt, no_repeat_ngram_size=2) for prompt in PROMPTS]
    assert generate(reader, (), PROMPTS, max_new_tokens=LONG, no_repeat_ngram=2).ids == found.ids


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_rows_leave_at_their_ends(
    reader_of: Callable[..., AnswerReader], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(family)
    queries = [f"Question: {word} ?\nType:" for word in ("A", "How many", "é", "Rome and France", "2 + 3", "x " * 20)]
    free = generate(reader, DEMOS, queries, max_new_tokens=LONG, no_repeat_ngram=2).ids
    # The tokens by which most rows end, each at a time of its own.
    ends = sorted(
        {token for ids in free for token in ids}, key=lambda token: -len({_first(ids, token) for ids in free})
    )[:2]
    monkeypatch.setattr(reader.loaded.model.generation_config, "eos_token_id", ends)
    finished: list[int] = []
    found = generate(reader, DEMOS, queries, max_new_tokens=LONG, no_repeat_ngram=2, advance=finished.append)
    assert found.ids == [plain(reader, "".join(DEMOS) + query, no_repeat_ngram_size=2) for query in queries]
    assert found.ended == [ids[-1] in ends for ids in found.ids]
    assert len({len(ids) for ids in found.ids}) > 2
    assert sum(finished) == len(queries)
    assert found.tokens_written == sum(map(len, found.ids))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "no_norm"])
@pytest.mark.parametrize("alike", [False, True])
def test_a_model_that_reads_whole_texts_writes_the_same(
    reader_of: Callable[..., AnswerReader], family: str, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(family)
    sampled = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3, "no_repeat_ngram": 3}
    shared = [generate(reader, DEMOS, QUERIES, max_new_tokens=12), generate(reader, DEMOS, QUERIES, **sampled)]
    stop = [shared[0].texts[0][2:4], shared[0].texts[2][5:7]]
    shared.append(generate(reader, DEMOS, QUERIES, max_new_tokens=12, stop=stop))
    read_whole(reader, monkeypatch)
    # Texts of one length in a batch, as for a model whose positions or states follow its padding.
    monkeypatch.setattr(reader.backbone, "can_continue", not alike)
    # A batch of several, of which the shorter are padded.
    monkeypatch.setattr(reader.backbone, "token_budget", 1000)
    own = reader.loaded.model.generation_config
    monkeypatch.setattr(own, "repetition_penalty", 9.0)
    monkeypatch.setattr(own, "temperature", 9.0)
    monkeypatch.setattr(own, "do_sample", True)
    whole = [
        generate(reader, DEMOS, QUERIES, max_new_tokens=12),
        generate(reader, DEMOS, QUERIES, **sampled),
        generate(reader, DEMOS, QUERIES, max_new_tokens=12, stop=stop),
    ]
    for ours, theirs in zip(shared, whole, strict=True):
        assert ours.ids == theirs.ids
        assert (ours.texts, ours.ended) == (theirs.texts, theirs.ended)
        np.testing.assert_allclose(theirs.features, ours.features, rtol=1e-3, atol=1e-4)
    assert reader.loaded.model.generation_config is own


def test_no_ngram_comes_twice_as_in_transformers(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("qwen3")
    for n in (1, 3):
        found = generate(reader, DEMOS, QUERIES, max_new_tokens=LONG, no_repeat_ngram=n)
        assert found.ids == [plain(reader, prompt, no_repeat_ngram_size=n) for prompt in PROMPTS]


def test_a_text_does_not_depend_on_its_batch(
    reader_of: Callable[..., AnswerReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of("gemma3")
    options: dict[str, Any] = {"max_new_tokens": LONG, "temperature": 1.0, "top_k": 50, "seed": 5}
    together = generate(reader, DEMOS, QUERIES, **options)
    other = generate(reader, DEMOS, ["Question: x ?\nType:", "Question:", QUERIES[2]], **options)
    assert other.ids[2] == together.ids[2]
    assert generate(reader, DEMOS, QUERIES[:1], **options).ids == together.ids[:1]
    assert generate(reader, (), PROMPTS, **options).ids == together.ids
    # One row at a time, because no more would fit.
    monkeypatch.setattr(generation, "_KEPT_BYTES", {"cpu": 1})
    assert generate(reader, DEMOS, QUERIES, **options).ids == together.ids
    assert generate(reader, DEMOS, QUERIES, **options | {"seed": 6}).ids != together.ids


def test_stop_strings_cut_the_free_text(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    free = generate(reader, DEMOS, QUERIES, max_new_tokens=LONG)
    straddling = 0
    for row, text in enumerate(free.texts):
        for begin in range(0, len(text) - 3, 3):
            stop = text[begin : begin + 3]
            if "\ufffd" in stop:
                continue
            found = generate(reader, DEMOS, QUERIES[: row + 1], max_new_tokens=LONG, stop=[stop])
            assert found.texts[row] == text[: text.find(stop)]
            assert found.ended[row]
            assert found.ids[row] == free.ids[row][: len(found.ids[row])]
            straddling += all(stop not in reader.loaded.tokenizer.decode([token]) for token in found.ids[row])
            break
    assert straddling > 0


@pytest.mark.parametrize("family", ["llama", "no_norm"])
def test_features_are_those_of_answers(reader_of: Callable[..., AnswerReader], family: str) -> None:
    reader = reader_of(family)
    found = generate(reader, DEMOS, QUERIES, max_new_tokens=3)
    np.testing.assert_allclose(
        found.features, reader.answers(DEMOS, QUERIES, [" x"]).features, rtol=1e-4, atol=1e-5, equal_nan=True
    )


def test_a_prefix_is_read_once(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    generate(reader, DEMOS, QUERIES[:1], max_new_tokens=2)

    def read(queries: list[str]) -> Generated:
        return generate(reader, DEMOS, queries, max_new_tokens=LONG)

    own = [len(reader.loaded.tokenizer(query, add_special_tokens=False)["input_ids"]) for query in QUERIES]
    assert [read([query]).tokens_read for query in QUERIES] == own


def test_a_query_that_merges_with_the_prefix_is_read_whole(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    # " answer" is one token.
    chunks, queries = [*DEMOS, " an"], [" apple ?", "swer ?", " x"]
    assert [passage.whole for passage in reader.token_tree(chunks, queries, ()).passages] == [False, True, False]
    found = generate(reader, chunks, queries, max_new_tokens=LONG, no_repeat_ngram=2)
    assert found.ids == [plain(reader, "".join(chunks) + query, no_repeat_ngram_size=2) for query in queries]


def test_probes_are_sampled_after_every_order(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    a, b, c = DEMOS
    orders = [[a, b, c], [c, b, a], [a, b, c]]
    options: dict[str, Any] = {
        "opening": "Question:",
        "separator": "\n\n",
        "words": "Question: \nType: location human\n\n",
        "max_new_tokens": 16,
    }
    texts = sample_probes(reader, orders, seed=1, **options)
    assert len(texts) == 3
    assert all(text.startswith("Question:") and "\n\n" not in text for text in texts)
    assert texts[0] != texts[2]
    expected = generate(
        reader,
        (),
        ["".join(orders[0]) + "Question:"],
        max_new_tokens=16,
        stop=["\n\n"],
        temperature=2.0,
        top_k=20,
        no_repeat_ngram=3,
        kept_words=options["words"],
        seed=1,
    )
    assert texts[:1] == ["Question:" + expected.texts[0]]
    assert sample_probes(reader, orders[:2], seed=1, **options) == texts[:2]


def test_bad_input_is_refused(reader_of: Callable[..., AnswerReader]) -> None:
    reader = reader_of("llama")
    with pytest.raises(SparsortError, match="no queries to continue"):
        generate(reader, DEMOS, [], max_new_tokens=3)
    with pytest.raises(SparsortError, match=r"1000 more may be written; .* made for 1024\. .*a smaller max_new_tokens"):
        generate(reader, DEMOS, QUERIES, max_new_tokens=1000)
    with pytest.raises(SparsortError, match="at least 1"):
        generate(reader, DEMOS, QUERIES, max_new_tokens=0)
