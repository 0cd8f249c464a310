"""From text to ids: the model's input, a single BOS, the border of the answer, and truncation that is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsort.errors import SparsortError
from sparsort.scoring.loading.demo_model import load_tokenizer
from sparsort.scoring.prompts.prompt import Encoded, Encoder, Prompt, leading_specials

PLAIN = Prompt.of("Question: {question}\nAnswer:", answer=" {answer}")
ROW = {"question": "How many apples are left?", "answer": "5 apples"}


@pytest.fixture(scope="module")
def tokenizer(make_tiny_model: Callable[..., Path]) -> Any:
    return load_tokenizer(str(make_tiny_model("llama")))


def _encode(tokenizer: Any, prompt: Prompt, row: dict[str, Any], **options: Any) -> Encoded:
    encoder = Encoder(tokenizer, **{"max_length": None, "chat": prompt.is_chat, **options})
    return encoder.encode([prompt.render(row, where="row 0", tokenizer=tokenizer)])[0]


def test_ids_are_the_tokenizers_own_with_one_bos(tokenizer: Any) -> None:
    found = _encode(tokenizer, PLAIN, ROW)
    text = "Question: How many apples are left?\nAnswer: 5 apples"
    assert found.ids == [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert found.n_lead == 1
    assert tokenizer.decode(found.ids[found.answer_start :]) == " 5 apples"


def test_a_token_over_the_border_belongs_to_the_answer(tokenizer: Any) -> None:
    # "Answer" and "s" apart; together the tokenizer may merge over the border, and no token may be lost.
    found = _encode(tokenizer, Prompt.of("{question} appl", answer="{answer}"), {"question": "two", "answer": "es are"})
    joined = tokenizer.decode(found.ids[found.answer_start :])
    assert joined.endswith("es are")
    assert tokenizer.decode(found.ids[1:]) == "two apples are"


@pytest.mark.parametrize("text", ["<bos>Question: {question}", "Question: {question}"])
def test_a_bos_written_in_the_prompt_is_not_doubled(text: str, tokenizer: Any) -> None:
    found = _encode(tokenizer, Prompt.of(text), ROW)
    assert found.ids.count(tokenizer.bos_token_id) == 1
    assert found.n_lead == 1


def test_chat_has_roles_and_one_bos(tokenizer: Any) -> None:
    prompt = Prompt.of("{question}", system="Count the {kind}.", chat=True)
    rendered = prompt.render({**ROW, "kind": "apples"}, where="row 0", tokenizer=tokenizer)
    assert rendered.text == "<bos>[system] Count the apples.\n[user] How many apples are left?\n[assistant]"
    assert _encode(tokenizer, prompt, {**ROW, "kind": "apples"}).ids.count(tokenizer.bos_token_id) == 1
    turns = [{"role": "system", "content": "Count the {kind}."}, {"role": "user", "content": "{question}"}]
    assert Prompt.of(turns) == prompt


def test_special_tokens_are_not_added_after_the_text() -> None:
    class Closing:
        is_fast = False

        def __call__(self, text: str, add_special_tokens: bool = True, **_options: Any) -> dict[str, list[int]]:
            body = [10 + ord(letter) for letter in text]
            return {"input_ids": [1, *body, 2] if add_special_tokens else body}

    assert leading_specials(Closing()) == [1]


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_truncation_cuts_the_prompt_only_and_counts(truncation: Any, tokenizer: Any) -> None:
    whole = _encode(tokenizer, PLAIN, ROW)
    limit = len(whole.ids) - 4
    cut = _encode(tokenizer, PLAIN, ROW, max_length=limit, truncation=truncation)
    answer = whole.ids[whole.answer_start :]
    assert len(cut.ids) == limit
    assert cut.n_dropped == 4
    assert cut.ids[0] == tokenizer.bos_token_id
    assert cut.ids[cut.answer_start :] == answer
    body = whole.ids[1 : whole.answer_start]
    assert cut.ids[1 : cut.answer_start] == (body[4:] if truncation == "left" else body[:-4])


def test_a_too_long_text_is_a_problem_of_the_row(tokenizer: Any) -> None:
    found = _encode(tokenizer, PLAIN, {**ROW, "question": "word " * 100_000}, max_length=1024)
    assert found.problem is not None
    assert found.problem[0] == "too_long"
    assert "the limit is 1024" in found.problem[1]
    answer = _encode(tokenizer, PLAIN, {**ROW, "answer": "word " * 2000}, max_length=1024, truncation="left")
    assert answer.problem is not None
    assert "no room for the prompt" in answer.problem[1]


@pytest.mark.parametrize("value", ["", "  \n", None])
def test_an_empty_or_null_field_is_a_problem_of_the_row(value: Any, tokenizer: Any) -> None:
    found = _encode(tokenizer, Prompt.of("Question: {question}\nAnswer:"), {"question": value})
    assert found.problem is not None
    assert found.problem[0] == "empty"


def test_values_are_never_read_as_templates(tokenizer: Any) -> None:
    rendered = PLAIN.render({"question": "{answer} {0}", "answer": "{x"}, where="row 0")
    assert rendered.text == "Question: {answer} {0}\nAnswer: {x"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prompt.of("no field"), "uses no field"),
        (lambda: Prompt.of("{a}", system="x"), "chat=True"),
        (lambda: Prompt.of([{"role": "users", "content": "{a}"}]), "Did you mean 'user'"),
        (
            lambda: PLAIN.render({"questoin": "x", "answer": "y"}, where="row 3"),
            "row 3 has no field 'question'.*questoin",
        ),
        (lambda: Encoder(None, max_length=None, truncation="middle"), "unknown truncation"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_in_the_call(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        make()


def test_chat_without_a_template(make_tiny_model: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(make_tiny_model("llama")))
    tokenizer.chat_template = None
    with pytest.raises(SparsortError, match=r"llama.* has no chat template .*Use a plain prompt"):
        Prompt.of("{question}", chat=True).render(ROW, where="row 0", tokenizer=tokenizer)


def test_a_chat_template_that_refuses_the_turns_is_an_error_of_ours(make_tiny_model: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(make_tiny_model("llama")))
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(SparsortError, match="refuses the turns user: System role not supported"):
        Prompt.of("{question}", chat=True).render(ROW, where="row 0", tokenizer=tokenizer)
