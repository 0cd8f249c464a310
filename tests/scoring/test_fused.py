"""A compiled model, held against a plain pass over the whole text, as the reader that is not compiled is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.scoring.answers import prefix as prefixes
from sparsort.scoring.answers.generation import generate
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.model import fused
from sparsort.scoring.model.head import Head

# Inductor imports what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

DEMOS = ["Question: Where is Rome ?\nType: location\n\n", "Question: Who wrote it ?\nType: human\n\n"]
QUERIES = [
    "Question: Why ?\nType:",
    "Question: What does this long question with many words want to know from us ?\nType:",
    "Question: How far is the moon ? an",
]
# The last one makes a token of the last query's end, " answer".
LABELS = [" number", " a reason", " num", "swer"]


# It has windows, and the activation that is replaced.
@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("gemma3")), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def _small_passes_are_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_LEAST_FUSED", 8)


@pytest.fixture(scope="module")
def compiled(loaded: LoadedModel) -> AnswerReader:
    return AnswerReader(loaded, token_budget=60, compile=True)


def plain(loaded: LoadedModel, prompt: str, answer: str) -> float:
    """Summed log-probability of the answer's tokens by one pass over the whole text."""
    encoded = loaded.tokenizer(prompt + answer, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    answered = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt) and end > begin]
    with torch.inference_mode():
        log_p = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[0, i]]) for i in answered)


@pytest.mark.parametrize("n_demos", [0, 1, 2])
def test_answers_equal_the_plain_pass(compiled: AnswerReader, loaded: LoadedModel, n_demos: int) -> None:
    demos = DEMOS[:n_demos]
    found = compiled.answers(demos, QUERIES, LABELS)
    expected = [[plain(loaded, "".join(demos) + query, label) for label in LABELS] for query in QUERIES]
    np.testing.assert_allclose(found.log_p, expected, atol=1e-3)
    np.testing.assert_allclose(
        found.features, AnswerReader(loaded).answers(demos, QUERIES, LABELS).features, rtol=1e-3, atol=1e-5
    )


def test_a_model_with_biases_and_layer_norms(make_tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(make_tiny_model("gpt2")), dtype="float32", device="cpu")
    _check(loaded)


def test_a_block_that_is_read_from_itself(make_tiny_model: Callable[..., Path]) -> None:
    # Without a final norm the last block's output is read, from a program that blocks share which nobody reads.
    _check(load_model(str(make_tiny_model("no_norm", num_hidden_layers=5)), dtype="float32", device="cpu"))


def _check(loaded: LoadedModel) -> None:
    reader = AnswerReader(loaded, compile=True)
    found = reader.answers(DEMOS, QUERIES, LABELS)
    assert reader.reader.n_fused_tokens > 0
    expected = [[plain(loaded, "".join(DEMOS) + query, label) for label in LABELS] for query in QUERIES]
    np.testing.assert_allclose(found.log_p, expected, atol=1e-3)


def test_what_is_written_is_the_same(compiled: AnswerReader, loaded: LoadedModel) -> None:
    ours = generate(compiled, DEMOS, QUERIES, max_new_tokens=5)
    assert ours.texts == generate(AnswerReader(loaded), DEMOS, QUERIES, max_new_tokens=5).texts


def test_the_model_is_left_as_it_was(compiled: AnswerReader, loaded: LoadedModel) -> None:
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before = loaded.model(input_ids=ids).logits
        kinds = [type(module) for module in loaded.model.modules()]
        compiled.answers(DEMOS, QUERIES, LABELS)
        assert [type(module) for module in loaded.model.modules()] == kinds
        assert torch.equal(loaded.model(input_ids=ids).logits, before)
    assert all(module._compiled_call_impl is None for module in loaded.model.modules())


def test_a_pass_that_fails_leaves_it_so_too(compiled: AnswerReader, loaded: LoadedModel) -> None:
    blocks = compiled.reader._fused
    assert blocks is not None
    with pytest.raises(KeyError), blocks.in_place():
        raise KeyError
    assert all(module._compiled_call_impl is None for module in loaded.model.modules())


def test_the_cheap_activation_is_the_same_function() -> None:
    x = torch.linspace(-30, 30, 10001, dtype=torch.float64)
    torch.testing.assert_close(
        fused._GeluTanh()(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-14
    )


def test_a_vocabulary_taken_in_part_by_part(compiled: AnswerReader, loaded: LoadedModel) -> None:
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    head = Head(loaded.model, compiled.backbone.config, "it", compile=True)
    log_p = head.logits(states).double().log_softmax(-1)
    total, entropy = head.normalisers(states)
    torch.testing.assert_close(total.double(), head.logits(states).double().logsumexp(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-5)


def test_without_a_compiler_it_says_so(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> Any:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(SparsortError, match=r"C\+\+ compiler.*leave compile out"):
        AnswerReader(loaded, compile=True)


def test_the_cause_is_what_stands_below_the_headings() -> None:
    told = RuntimeError("\nbackend='inductor' raised:\nCppCompileError: C++ compile error.\nCommand: …")
    assert fused.cause_of(told) == "CppCompileError: C++ compile error"
    assert fused.cause_of(RuntimeError()) == "RuntimeError"


def test_a_model_that_reads_whole_prompts_is_not_compiled(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefixes.PrefixReader, "_probe", lambda _self: "the test says so")
    reader = AnswerReader(loaded, compile=True)
    assert not reader.reader.compiled
    assert "not compiled: the test says so" in caplog.text
    expected = [[plain(loaded, "".join(DEMOS) + query, label) for label in LABELS] for query in QUERIES]
    np.testing.assert_allclose(reader.answers(DEMOS, QUERIES, LABELS).log_p, expected, atol=1e-3)


def test_a_compiler_that_fails_is_no_traceback(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("the compiler broke\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: broken)
    with pytest.raises(SparsortError, match=r"cannot be compiled here: the compiler broke\. Omit"):
        AnswerReader(loaded, compile=True)
