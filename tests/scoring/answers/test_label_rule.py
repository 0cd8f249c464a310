"""The rule "continuation": an answer's tokens and its number follow from the prompt and that answer alone.

Oracles: `_encode_pair` and `loglikelihood` of lm-evaluation-harness where no token merges across the boundary, and everywhere
one plain forward pass a prompt and answer. The tokenizers merge across every boundary that there is: one works on bytes, one
puts a space in front of a text as SentencePiece does, and neither splits at words.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from sparsort import LossScorer
from sparsort.errors import SparsortError
from sparsort.scoring.answers.generation import generate
from sparsort.scoring.answers.reader import FEATURES, AnswerReader
from sparsort.scoring.answers.token_tree import TreeEncoder, moves_boundary
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.prompts.prompt import Encoder

LINES = [
    "Question: What is 2 + 3?\nAnswer: 5\n\nQuestion: How many apples? Answer:\n12 apples",
    "The quick brown fox: entailment, not_entailment, neutral. Label: very positive\n\nLabel: no",
] * 3
PARTS = [
    "no",
    "ment",
    "entail",
    "An",
    "swer",
    "apple",
    "s",
    ":",
    " ",
    "  ",
    "\n",
    "\n\n",
    "12",
    "5",
    "é",
    "'",
    " very",
    " no",
]
CONFIG = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}

texts_of = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join)


def make_tokenizer(kind: str, lines: Sequence[str] = LINES, *, bos: bool = True, split: bool = False) -> Any:
    """A BPE tokenizer on "bytes", or with a "space" in front of each text; `split` keeps tokens within words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=kind == "space", unk_token="<unk>" if kind == "space" else None))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = sorted({letter for line in [*LINES, *PARTS] for letter in line} | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>" if bos else None, unk_token="<unk>")


def make_loaded(tokenizer: Any) -> LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **CONFIG)).eval()
    return load_model(model, tokenizer=tokenizer)


KINDS = ("bytes", "space")
TOKENIZERS = {kind: make_tokenizer(kind) for kind in KINDS}
# Tokens within words, cut at "'ve" and the like.
TOKENIZERS["words"] = make_tokenizer("bytes", [*LINES, "red led bed fed ted " * 5], split=True)


@pytest.fixture(scope="module")
def readers() -> dict[tuple[str, bool], AnswerReader]:
    """Readers by tokenizer, and by whether they read whole texts."""
    made = {}
    for kind in KINDS:
        loaded = make_loaded(TOKENIZERS[kind])
        for whole in (False, True):
            made[kind, whole] = AnswerReader(loaded, token_budget=60)
            assert made[kind, whole].reader.why_not is None
            if whole:
                made[kind, whole].reader.why_not = "the test says so"
    return made


def plain(loaded: LoadedModel, prompt: str, answer: str) -> tuple[float, int, float]:
    """The answer's log-probability and tokens by the rule, and the entropy after the prompt: one plain pass each."""
    context, whole, asked = (loaded.tokenizer(text)["input_ids"] for text in (prompt.rstrip(), prompt + answer, prompt))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(context, whole, strict=False))
    start = sum(1 for _ in same)
    with torch.inference_mode():
        log_p = loaded.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        after = loaded.model(input_ids=torch.tensor([asked])).logits[0, -1].double().log_softmax(-1)
    scored = sum(float(log_p[place - 1, whole[place]]) for place in range(start, len(whole)))
    return scored, len(whole) - start, -float((after.exp() * after).sum())


def check(reader: AnswerReader, chunks: list[str], queries: list[str], labels: list[str]) -> None:
    """Hold every number of a call against plain passes."""
    found = reader.answers(chunks, queries, labels)
    for (q, query), (a, label) in itertools.product(enumerate(queries), enumerate(labels)):
        log_p, count, entropy = plain(reader.loaded, "".join(chunks) + query, label)
        assert found.log_p[q, a] == pytest.approx(log_p, abs=1e-3), (chunks, query, label, labels)
        assert found.n_tokens[q, a] == count
        assert found.features[q, FEATURES.index("entropy")] == pytest.approx(entropy, abs=1e-3), (chunks, query)


def cut(text: str, places: set[int]) -> list[str]:
    """A text in chunks that end at these places, as far as it has them."""
    ends = sorted(place for place in places if 0 < place < len(text))
    return [text[begin:end] for begin, end in itertools.pairwise([0, *ends, len(text)]) if begin < end]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_number_is_that_of_its_prompt_and_answer_alone(
    readers: dict[tuple[str, bool], AnswerReader], kind: str, whole: bool, data: st.DataObject
) -> None:
    reader = readers[kind, whole]
    prefix = data.draw(st.lists(texts_of, max_size=4).map("".join), label="prefix")
    queries = data.draw(st.lists(texts_of, min_size=1, max_size=3, unique=True), label="queries")
    labels = data.draw(st.lists(texts_of, min_size=1, max_size=4, unique=True), label="labels")
    for _ in range(2):
        borders = data.draw(st.sets(st.integers(1, 30), max_size=3), label="borders")
        asked = data.draw(st.permutations(queries), label="asked")[: data.draw(st.integers(1, len(queries)))]
        given_labels = data.draw(st.permutations(labels), label="given")[: data.draw(st.integers(1, len(labels)))]
        check(reader, cut(prefix, borders), asked, given_labels)


def test_a_model_whose_states_depend_on_the_length_of_the_text(make_tiny_model: Callable[..., Path]) -> None:
    # Texts of more than 24 tokens turn all of their states by other angles: the longer answer's, not the shorter one's.
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
        "factor": 8.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    folder = make_tiny_model("llama", rope_parameters=rope, max_position_embeddings=192)
    loaded = load_model(str(folder), dtype="float32")
    reader = AnswerReader(loaded)
    assert reader.backbone.depends_on_length
    query, labels = "Question: How many apples are left ?\nAnswer:", [" five", " five of the seven apples are left"]
    short, long = (len(loaded.tokenizer(query + label)["input_ids"]) for label in labels)
    assert short < 24 < long - 1
    for given_labels in (labels, labels[::-1], labels[:1], labels[1:], []):
        found = reader.answers([], [query], given_labels)
        for place, label in enumerate(given_labels):
            # As the harness has it, the last token is not read.
            whole, start = loaded.tokenizer(query + label)["input_ids"], len(loaded.tokenizer(query)["input_ids"])
            with torch.inference_mode():
                log_p = loaded.model(input_ids=torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
            expected = sum(float(log_p[at - 1, whole[at]]) for at in range(start, len(whole)))
            assert found.log_p[0, place] == pytest.approx(expected, abs=1e-3)
        np.testing.assert_allclose(found.features, reader.answers([], [query], labels[:1]).features, rtol=1e-4)


@settings(max_examples=200)
@given(
    kind=st.sampled_from(["bytes", "space", "words"]),
    prefix=st.lists(texts_of, min_size=1, max_size=3).map("".join),
    query=texts_of,
    answer=texts_of,
    ends=st.sets(st.integers(1, 20), max_size=4),
)
@example(kind="words", prefix="x'v", query="ed", answer="l", ends={2})
def test_the_border_between_chunks_changes_no_token(
    kind: str, prefix: str, query: str, answer: str, ends: set[int]
) -> None:
    chunks = cut(prefix, ends)
    trees = TreeEncoder(Encoder(TOKENIZERS[kind], max_length=None))
    segments = trees.segments(chunks)
    # Where they cannot be cut so, the reader takes texts whole.
    assume(segments is not None)
    (passage,) = trees.passages(chunks, [query], [answer])
    before = [] if passage.whole else list(itertools.chain.from_iterable(segments or []))
    whole = TOKENIZERS[kind](prefix + query + answer)["input_ids"]
    assert [*before, *passage.stem, *passage.branches[0]] == whole
    assert [*before, *passage.stem, *passage.rest] == TOKENIZERS[kind](prefix + query)["input_ids"]


def test_the_reported_input() -> None:
    # Scored from where "ment" merges with "entail", " no" had a log-probability of -30.4 instead of -12.5.
    lines = [
        "The quick brown fox jumps over the lazy dog. Question: What is 2 + 3?\nAnswer: 5 entailment not_entailment "
        "contradiction neutral positive negative very positive"
    ]
    reader = AnswerReader(make_loaded(make_tokenizer("bytes", lines * 3, bos=False, split=True)))
    alone = reader.answers(["A: x\n\n"], ["Q: entail"], [" no"])
    joined = reader.answers(["A: x\n\n"], ["Q: entail"], ["ment", " no"])
    assert moves_boundary(reader.encoder, "Q: entail", ["ment"])
    assert joined.n_tokens[0, 1] == alone.n_tokens[0, 0] == 2
    assert joined.log_p[0, 1] == pytest.approx(alone.log_p[0, 0], abs=1e-4)
    np.testing.assert_allclose(joined.features, alone.features, rtol=1e-3)
    check(reader, ["A: x\n\n"], ["Q: entail"], ["ment", " no"])


def test_in_chat_the_whitespace_that_ends_the_turns_is_scored_too() -> None:
    reader = AnswerReader(make_loaded(TOKENIZERS["words"]), chat=True)
    tokenizer, prompt = reader.loaded.tokenizer, "<bos>Question: 5\nAnswer:\n"
    context, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt.rstrip(), prompt + "no")
    )
    assert whole[: len(context)] == context
    found = reader.answers([], [prompt], ["An", "no"])
    with torch.inference_mode():
        log_p = reader.loaded.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    expected = sum(float(log_p[place - 1, whole[place]]) for place in range(len(context), len(whole)))
    assert found.log_p[0, 1] == pytest.approx(expected, abs=1e-3)
    assert tokenizer.decode(whole[len(context) :]) == "\nno"


def test_features_are_those_of_the_text_that_generation_continues(
    readers: dict[tuple[str, bool], AnswerReader],
) -> None:
    for reader in readers.values():
        queries = ["Question: entail", "Label: ", "Answer:\n"]
        written = generate(reader, ["Label: no\n\n"], queries, max_new_tokens=1)
        for labels in (["ment"], [" no", "ment", "5"]):
            found = reader.answers(["Label: no\n\n"], queries, labels)
            np.testing.assert_allclose(found.features, written.features, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(prompt=texts_of, answer=texts_of)
def test_tokens_are_those_of_the_harness(kind: str, prompt: str, answer: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM

    assume(prompt.strip())
    tokenizer = TOKENIZERS[kind]

    class Harness:
        backend = "causal"

        def tok_encode(self, text: str) -> list[int]:
            return list(tokenizer(text)["input_ids"])

    context, continuation = TemplateLM._encode_pair(Harness(), prompt, answer)
    (passage,) = TreeEncoder(Encoder(tokenizer, max_length=None)).passages((), [prompt], [answer])
    path, start = [*passage.stem, *passage.branches[0]], passage.starts[0]
    assert path == tokenizer(prompt + answer)["input_ids"]
    if path[: len(context)] == context:
        assert (path[:start], path[start:]) == (context, continuation)
    else:
        # The harness would run prompt and answer as two texts, which is another text.
        assert start < len(context)
        assert path[:start] == context[:start]
        assert path[start : start + 1] != context[start : start + 1]


def test_numbers_are_those_of_the_harness(make_tiny_model: Callable[..., Path]) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    loaded = load_model(str(make_tiny_model("llama")), dtype="float32")
    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, add_bos_token=True, batch_size=1, device="cpu")
    demo, queries = "Review: fine\nLabel: good\n\n", ["Review: dull\nLabel: ", "Review: é\nLabel:\n", "Why ? "]
    labels = ["positive", "5", "été", "a bore"]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(demo + query, label), idx=0)
        for query, label in itertools.product(queries, labels)
    ]
    theirs = [log_p for log_p, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    ours = AnswerReader(loaded).answers([demo], queries, labels).log_p
    np.testing.assert_allclose(ours.ravel(), theirs, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(prefix=texts_of, query=texts_of, labels=st.lists(texts_of, min_size=1, max_size=3))
def test_where_the_rule_does_not_matter_an_answer_follows_the_query(
    kind: str, prefix: str, query: str, labels: list[str]
) -> None:
    encoder = Encoder(TOKENIZERS[kind], max_length=None)
    assume(not moves_boundary(encoder, query, labels))
    (passage,) = TreeEncoder(encoder).passages((), [query], labels)
    # One boundary for all answers, the query's end, whose state the features are of.
    assert set(passage.starts) == {len(passage.stem)}
    assert passage.rest == ()
    assert list(passage.stem) == TOKENIZERS[kind](query)["input_ids"]


def test_an_answers_loss_is_its_number_where_nothing_merges(make_tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(make_tiny_model("llama")), dtype="float32")
    reader = AnswerReader(loaded)
    rows = [{"text": f"Question: {word} ?\nType:", "label": label} for word in ("Why", "é") for label in ("far", "été")]
    assert not any(moves_boundary(reader.encoder, row["text"], [" far", " été"]) for row in rows)
    losses = LossScorer(loaded).score(rows, prompt="{text}", answer=" {label}").difficulty
    for row, loss in zip(rows, losses, strict=True):
        found = reader.answers([], [row["text"]], [" " + row["label"]])
        assert found.log_p[0, 0] == pytest.approx(-loss * found.n_tokens[0, 0], abs=1e-3)


def test_an_answer_that_no_token_precedes_is_refused() -> None:
    reader = AnswerReader(make_loaded(make_tokenizer("bytes", bos=False)))
    for query in (" ", "\n\n"):
        with pytest.raises(SparsortError, match="Put some text before the answer"):
            reader.answers([], [query], ["no"])
    # Its only token becomes one with the answer.
    assert len(reader.loaded.tokenizer("no")["input_ids"]) == 1
    with pytest.raises(SparsortError, match="Put some text before the answer"):
        reader.answers([], ["n"], [" no", "o"])
    with pytest.raises(SparsortError, match="adds no token"):
        reader.answers([], ["Label: "], [""])
