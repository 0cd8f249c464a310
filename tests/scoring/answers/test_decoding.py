"""Generated rows from scripted logits: the text is the tokenizer's, and it ends in the right place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.scoring.answers.decoding import Sampling, Writer, draw

PROMPT = "Question: é ?\nAnswer:"
# One token a byte: the tokenizer's first ids are its special tokens, then the bytes.
MIXED = " Zoë €5 😀 naïve\n\nQuestion"


@pytest.fixture(scope="module")
def tokenizer(make_tiny_model: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_model("llama"))


def one_byte_each(tokenizer: Any, text: str) -> list[int]:
    """The text as tokens of single bytes, which the tokenizer itself would merge."""
    from tokenizers.pre_tokenizers import ByteLevel

    (piece,) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in piece[0]]
    assert None not in ids
    return ids


def scripted(tokenizer: Any, ids: Sequence[int], **options: Any) -> Writer:
    """A writer of one row to which the model dictates these tokens, until it is done."""
    options.setdefault("max_new_tokens", len(ids))
    writer = Writer(tokenizer, [tokenizer(PROMPT)["input_ids"]], **options)
    for token in ids:
        if writer.is_done(0):
            break
        logits = torch.zeros(1, len(tokenizer))
        logits[0, token] = 1.0
        assert writer.write([0], logits).tolist() == [token]
    return writer


def test_a_character_of_several_tokens_is_read_when_it_is_whole(tokenizer: Any) -> None:
    ids = one_byte_each(tokenizer, MIXED)
    assert len(ids) > len(MIXED)
    for count in range(1, len(ids) + 1):
        # One token more may come: what is read by now is never taken back.
        text = scripted(tokenizer, ids[:count], max_new_tokens=count + 1).texts[0]
        assert MIXED.startswith(text)
        whole = scripted(tokenizer, ids[:count]).texts[0]
        assert whole == text + "\ufffd" * (len(whole) - len(text))
    assert scripted(tokenizer, ids).texts == [MIXED]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_are_decoded_as_the_tokenizer_decodes_them_after_the_prompt(
    tokenizer: Any, data: st.DataObject
) -> None:
    special = set(tokenizer.all_special_ids)
    usual = [token for token in range(len(tokenizer)) if token not in special]
    ids = data.draw(st.lists(st.sampled_from(usual), min_size=1, max_size=20))
    prompt = tokenizer(PROMPT)["input_ids"]
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    expected = whole.removeprefix(tokenizer.decode(prompt, skip_special_tokens=True))
    assert scripted(tokenizer, ids).texts == [expected]


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(alphabet="ab\né€ ", min_size=1, max_size=16), stop=st.text(alphabet="ab\né€ ", min_size=1, max_size=4)
)
@pytest.mark.parametrize("bytewise", [True, False])
def test_a_stop_string_cuts_where_it_begins(tokenizer: Any, text: str, stop: str, bytewise: bool) -> None:
    ids = one_byte_each(tokenizer, text) if bytewise else tokenizer(text, add_special_tokens=False)["input_ids"]
    writer = scripted(tokenizer, ids, stop=[stop])
    assert writer.ended == [stop in text]
    assert writer.texts == [text[: text.find(stop)] if stop in text else text]
    # Nothing is written after a complete stop string.
    if stop in text and bytewise:
        assert len(writer.ids[0]) == len(text[: text.find(stop) + len(stop)].encode())


def test_the_first_of_several_stop_strings_cuts(tokenizer: Any) -> None:
    ids = one_byte_each(tokenizer, "one\nQuestion: two\n\nthree")
    assert scripted(tokenizer, ids, stop=["\n\n", "\nQuestion:", "four"]).texts == ["one"]
    # Both in one token: the one that begins first.
    (token,) = tokenizer("Question:", add_special_tokens=False)["input_ids"][:1]
    word = tokenizer.decode([token])
    assert len(word) > 2
    assert scripted(tokenizer, [token], stop=[word[2], word[1]]).texts == [word[:1]]


def test_a_stop_string_that_the_prompt_began_is_none(tokenizer: Any) -> None:
    assert scripted(tokenizer, one_byte_each(tokenizer, ":\nyes"), stop=[":\n", "::"]).texts == [""]
    assert scripted(tokenizer, one_byte_each(tokenizer, "\nyes"), stop=[":\n"]).texts == ["\nyes"]


def test_end_tokens_end_and_special_tokens_are_no_text(tokenizer: Any) -> None:
    a, b = tokenizer("ab c", add_special_tokens=False)["input_ids"][:2]
    word = tokenizer.decode([a])
    pad, bos, eos = (tokenizer.convert_tokens_to_ids(name) for name in ("<pad>", "<bos>", "<eos>"))
    writer = scripted(tokenizer, [a, pad, eos, b], end_ids=[eos])
    assert (writer.texts, writer.ended, writer.ids) == ([word], [True], [[a, pad, eos]])
    # Any token may end a text, also one that would be text.
    assert scripted(tokenizer, [a, b], end_ids=[b]).texts == [word]
    # A stop string that is a special token.
    writer = scripted(tokenizer, [a, bos, b], stop=["<bos>"])
    assert (writer.texts, writer.ended) == ([word], [True])
    assert scripted(tokenizer, [a, bos, a]).texts == [word * 2]


def test_a_text_ends_at_the_limit(tokenizer: Any) -> None:
    ids = one_byte_each(tokenizer, "abc")
    writer = scripted(tokenizer, ids, max_new_tokens=2)
    assert (writer.texts, writer.ended, writer.is_done(0)) == (["ab"], [False], True)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.5, -2.0, 0.5, -torch.inf])
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for temperature, top_k in [(1.0, 0), (0.4, 0), (2.0, 3), (1.0, 99), (1.0, 1)]:
        kept = logits.double() / temperature
        if top_k in (1, 3):
            kept[kept < kept.sort(descending=True).values[top_k - 1]] = -torch.inf
        drawn = draw(logits.expand(count, -1), uniform, temperature=temperature, top_k=top_k)
        np.testing.assert_allclose(
            np.bincount(drawn.numpy(), minlength=6) / count, kept.softmax(0).numpy(), atol=1.01 / count
        )
    edges = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    # No edge draws what has no probability.
    assert draw(torch.tensor([[-torch.inf, 0.0, 0.0]]).expand(2, -1), edges, temperature=1.0).tolist() == [1, 2]


def test_a_row_draws_by_its_seed_and_number_alone(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    script = torch.randn(3, 6, len(tokenizer), generator=generator)

    def write(rows: list[int], seed: int) -> dict[int, list[int]]:
        writer = Writer(tokenizer, [[5]] * 3, max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=seed))
        for step in range(6):
            writer.write(rows, script[rows, step])
        return {row: writer.ids[row] for row in rows}

    together = write([0, 1, 2], 7)
    assert write([2], 7) | write([1, 0], 7) == together
    assert write([0, 1, 2], 8) != together
    same = Writer(tokenizer, [[5]] * 2, max_new_tokens=6, sampling=Sampling(temperature=1.0))
    for step in range(6):
        same.write([0, 1], script[[0, 0], step])
    assert same.ids[0] != same.ids[1]


def test_no_ngram_comes_twice_but_of_kept_words() -> None:
    tokenizer = _Letters()
    prompt = tokenizer.encode("abcab")
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])  # a b c d

    def write(steps: int, **options: Any) -> str:
        writer = Writer(tokenizer, [prompt], max_new_tokens=steps, sampling=Sampling(**options))
        for _ in range(steps):
            writer.write([0], logits.clone())
        return writer.texts[0]

    assert write(4) == "cccc"
    # The pairs ab, bc and ca are used. After b comes d, after d the most likely token, and no pair occurs again.
    text = write(6, no_repeat_ngram=2)
    assert text == "dccddb"
    pairs = ["".join(pair) for pair in zip("abcab" + text, "bcab" + text, strict=False)]
    assert len(set(pairs)) == len(pairs) - 1  # "ab" was in the prompt twice
    assert write(4, no_repeat_ngram=2, kept=frozenset(tokenizer.encode("c"))) == "cccc"
    assert write(1, no_repeat_ngram=1) == "d"
    # A kept word is taken where it is the likeliest, however hot the sampling.
    assert write(12, temperature=50.0, kept=frozenset(tokenizer.encode("c"))) == "c" * 12
    assert set(write(40, temperature=50.0)) == set("abcd")


class _Letters:
    """A tokenizer of four letters."""

    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        return ["abcd".index(letter) for letter in text]

    def decode(self, ids: Sequence[int], **_options: Any) -> str:
        return "".join("abcd"[token] for token in ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1 is needed"),
        ({"stop": ["\n", ""]}, "a stop string is empty"),
        ({"stop": "\n"}, "pass a list of stop strings"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        Writer(_Letters(), [[0]], **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"seed": -3}])
def test_bad_sampling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SparsortError, match=next(iter(options))):
        Sampling(**options)


def test_logits_that_are_not_numbers_are_refused() -> None:
    writer = Writer(_Letters(), [[0]], max_new_tokens=3)
    with pytest.raises(SparsortError, match="not finite"):
        writer.write([0], torch.tensor([[0.0, float("nan"), 1.0, 0.0]]))
