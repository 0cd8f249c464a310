"""Prompts: their content, the demonstrations that a budget drops, and that a query never gets its own answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsort
from sparsort.curriculum.demos.prompt import Assembled, assemble
from sparsort.errors import SparsortError

PROMPT, ANSWER = "Q: {question}\nA:", " {answer}"
DEMOS = [
    {"id": "a", "question": "one two three", "answer": "x"},
    {"id": "b", "question": "four", "answer": "y"},
    {"id": "c", "question": "five six", "answer": "{z}"},
]
QUERY = {"question": "seven"}


def words(text: str) -> int:
    return len(text.split())


def build(demos: Any = DEMOS, query: Any = QUERY, **options: Any) -> Assembled:
    return assemble(demos, query, **{"prompt": PROMPT, "answer": ANSWER, **options})


def test_text_by_hand() -> None:
    expected = "Q: one two three\nA: x\n\nQ: four\nA: y\n\nQ: five six\nA: {z}\n\nQ: seven\nA:"
    built = build()
    assert built.text == expected
    assert sparsort.build_prompt(DEMOS, QUERY, prompt=PROMPT, answer=ANSWER) == expected
    assert (built.kept, built.dropped, built.n_tokens, built.messages) == ([0, 1, 2], [], None, None)
    assert build(system="Be brief.", separator="\n").text == "Be brief.\n" + expected.replace("\n\n", "\n")
    assert build([], "seven").text == "Q: seven\nA:"


@pytest.mark.parametrize(
    ("drop", "kept"),
    # Words: demonstrations of 6, 4 and 5, the query of 3, 18 in all.
    [("farthest", {18: [0, 1, 2], 17: [1, 2], 12: [1, 2], 11: [2], 8: [2], 7: [], 3: []}),
     ("nearest", {18: [0, 1, 2], 17: [0, 1], 13: [0, 1], 12: [0], 8: []}),
     ("longest", {18: [0, 1, 2], 17: [1, 2], 11: [1], 7: [1], 6: []})],
)  # fmt: skip
def test_budget(drop: str, kept: dict[int, list[int]]) -> None:
    for max_tokens, expected in kept.items():
        if not expected:
            with pytest.raises(SparsortError, match=r"holds the query \(3 tokens\) but not one of its 3 "):
                build(max_tokens=max_tokens, tokenizer=words, drop=drop)
        built = build(max_tokens=max_tokens, tokenizer=words, drop=drop, allow_zero_shot=not expected)
        assert built.kept == expected
        assert built.dropped == [at for at in range(3) if at not in expected]
        assert built.n_tokens == words(built.text) <= max_tokens
        assert built.text == build([DEMOS[at] for at in expected]).text


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 30), max_size=12), st.integers(4, 120), st.sampled_from(["farthest", "nearest", "longest"])
)
def test_a_budget_is_kept_and_one_more_would_not_fit(sizes: list[int], max_tokens: int, drop: str) -> None:
    demos = [{"question": " ".join([f"w{at:02d}"] * size), "answer": "y"} for at, size in enumerate(sizes)]
    calls = []

    def count(text: str) -> int:
        calls.append(text)
        return words(text)

    built = build(demos, max_tokens=max_tokens, tokenizer=count, drop=drop, allow_zero_shot=True)
    assert built.n_tokens == words(built.text) <= max_tokens
    assert len(calls) <= 3 + len(sizes).bit_length()
    if built.dropped:
        last = {"farthest": max, "nearest": min}.get(drop, lambda at: min(at, key=lambda i: (sizes[i], -i)))(
            built.dropped
        )
        assert words(build([demos[at] for at in sorted([*built.kept, last])]).text) > max_tokens


def test_report() -> None:
    assert build().report == "Kept all demonstrations, 3 (tokens not counted)."
    assert build(tokenizer=words).report == "Kept all demonstrations, 3 (18 tokens)."
    assert build([]).report == "No demonstrations (tokens not counted)."
    assert build(tokenizer=words, max_tokens=9).report == (
        "Kept 1 of 3 demonstrations (8 tokens of at most 9); "
        "dropped the 2 farthest from the query in the order: 'a', 'b'."
    )


def test_the_budget_that_an_error_names_is_enough() -> None:
    for drop in ("farthest", "nearest", "longest"):
        with pytest.raises(SparsortError, match="pass allow_zero_shot=True") as refusal:
            build(max_tokens=4, tokenizer=words, drop=drop)
        enough = int(str(refusal.value).split("at least ")[1].split(",")[0])
        assert len(build(max_tokens=enough, tokenizer=words, drop=drop).kept) == 1
    with pytest.raises(
        SparsortError, match="allow_zero_shot=True has no effect: nothing is dropped without max_tokens"
    ):
        build(allow_zero_shot=True)
    assert build([], max_tokens=4, tokenizer=words).kept == []


def test_budget_errors() -> None:
    with pytest.raises(SparsortError, match=r"the query alone needs 3 tokens .* max_tokens is 2"):
        build(max_tokens=2, tokenizer=words)
    with pytest.raises(SparsortError, match="has 18 tokens, but max_tokens is 17"):
        build(max_tokens=17, tokenizer=words, drop="error")
    assert build(max_tokens=18, tokenizer=words, drop="error").kept == [0, 1, 2]
    with pytest.raises(SparsortError, match="at least 1 token"):
        build(max_tokens=0, tokenizer=words)
    with pytest.raises(SparsortError, match="Did you mean 'farthest'"):
        build(drop="furthest")
    with pytest.raises(SparsortError, match="returned a list"):
        build(max_tokens=9, tokenizer=str.split)
    with pytest.raises(SparsortError, match="the tokenizer is a int"):
        build(max_tokens=9, tokenizer=3)


def test_field_errors_name_the_row() -> None:
    with pytest.raises(SparsortError, match=r"demonstration 'b' has no field 'answer'. Did you mean 'anser'"):
        build([DEMOS[0], {"id": "b", "question": "four", "anser": "y"}])
    with pytest.raises(SparsortError, match="the query has no field 'question'"):
        build(query={"text": "seven"})
    with pytest.raises(SparsortError, match="demonstration 0 has no field 'question'"):
        build([{"answer": "y"}])
    with pytest.raises(SparsortError, match="names no field"):
        build(prompt="Q:")
    with pytest.raises(SparsortError, match="bare text"):
        build([], "seven", prompt="{a} {b}")


def test_a_query_among_its_demonstrations_is_refused() -> None:
    with pytest.raises(SparsortError, match=r"demonstration 'b' \(the same text\).*allow_leaks=True"):
        build(query={"question": " FOUR!"})
    assert build(query={"question": "four"}, allow_leaks=True).text.endswith("Q: four\nA:")
    assert build(query={"question": "four", "answer": "x", "other": "one two three"}, demos=DEMOS[:1]).kept == [0]


class FakeTokenizer:
    """Counts characters, and adds one special token by default."""

    chat_template: str | None = "template"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * (len(text) + add_special_tokens)

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "^" + "".join(f"<{turn['role']}>{turn['content']}" for turn in messages) + "<assistant>"


def test_chat() -> None:
    built = build(DEMOS[:1], chat=True, system="Be brief.", tokenizer=FakeTokenizer())
    assert built.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: one two three\nA:"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "Q: seven\nA:"},
    ]
    assert built.text == "^<system>Be brief.<user>Q: one two three\nA:<assistant>x<user>Q: seven\nA:<assistant>"
    assert built.n_tokens == len(built.text)
    assert not built.add_special_tokens
    plain = build(DEMOS[:1], tokenizer=FakeTokenizer())
    assert plain.n_tokens == len(plain.text) + 1
    assert plain.add_special_tokens


def test_chat_without_a_template() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = None
    for reader, message in [(None, "no tokenizer was given"), (tokenizer, "has no chat template"), (words, "no chat")]:
        with pytest.raises(SparsortError, match=message):
            build(chat=True, tokenizer=reader)


def test_real_tokenizer_and_its_chat_template(make_tiny_model: Callable[..., Path]) -> None:
    folder = str(make_tiny_model())
    from sparsort.scoring.loading.demo_model import load_tokenizer

    tokenizer = load_tokenizer(folder)
    for chat in (False, True):
        built = build(chat=chat, tokenizer=folder, max_tokens=1000)
        ids = tokenizer(built.text, add_special_tokens=built.add_special_tokens)["input_ids"]
        assert len(ids) == built.n_tokens
        assert ids.count(tokenizer.bos_token_id) == 1
        smaller = build(chat=chat, tokenizer=tokenizer, max_tokens=len(ids) - 1)
        assert smaller.kept == [1, 2]
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(SparsortError, match=r"refuses the turns .*System role not supported"):
        build(chat=True, tokenizer=tokenizer, system="x")
