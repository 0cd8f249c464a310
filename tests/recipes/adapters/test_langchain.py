"""The example selector in the real LangChain: inside a FewShotPromptTemplate, sync and async."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sparsort import LengthScorer
from sparsort.errors import SparsortError

pytest.importorskip("langchain_core")

from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.example_selectors import BaseExampleSelector
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    FewShotPromptTemplate,
    PromptTemplate,
)

from sparsort.recipes.adapters.langchain import DemoOptions, SparsortExampleSelector

EXAMPLES = [
    {"question": "Who painted the ceiling of the chapel?", "answer": "Michelangelo"},
    {"question": "How far is it to the moon?", "answer": "far"},
    {"question": "What is the name of the longest river in Rome?", "answer": "Tiber"},
    {"question": "Which metal melts in the hand?", "answer": "gallium"},
]
HARD = [3.0, 4.0, 1.0, 2.0]
QUERY = "Where do the swallows go in winter?"


def _template(selector: BaseExampleSelector) -> FewShotPromptTemplate:
    return FewShotPromptTemplate(
        example_selector=selector,
        example_prompt=PromptTemplate.from_template("Q: {question}\nA: {answer}"),
        prefix="{instruction}",
        suffix="Q: {question}\nA:",
        input_variables=["instruction", "question"],
    )


def _prompt(rows: list[dict[str, str]], query: str) -> str:
    return "\n\n".join(["Answer.", *(f"Q: {row['question']}\nA: {row['answer']}" for row in rows), f"Q: {query}\nA:"])


def test_a_few_shot_prompt_has_our_examples_in_our_order() -> None:
    options = DemoOptions(order="hard_to_easy", select="first", scores=HARD)
    template = _template(SparsortExampleSelector(EXAMPLES, 3, options))
    expected = _prompt([EXAMPLES[1], EXAMPLES[0], EXAMPLES[2]], QUERY)
    assert template.format(instruction="Answer.", question=QUERY) == expected
    assert template.invoke({"instruction": "Answer.", "question": QUERY}).to_string() == expected
    assert asyncio.run(template.aformat(instruction="Answer.", question=QUERY)) == expected


def test_the_query_is_never_its_own_example() -> None:
    options = DemoOptions(order="hard_to_easy", select="first", scores=HARD)
    template = _template(SparsortExampleSelector(EXAMPLES, 3, options))
    query = "who painted the ceiling of the chapel"
    expected = _prompt([EXAMPLES[1], EXAMPLES[3], EXAMPLES[2]], query)
    assert template.format(instruction="Answer.", question=query) == expected
    with pytest.raises(SparsortError, match="4 demonstrations were asked for, but only 3"):
        SparsortExampleSelector(EXAMPLES, 4, options).select_examples({"question": query})


def test_chat_prompts_take_it_as_well() -> None:
    turns = ChatPromptTemplate.from_messages([("human", "{question}"), ("ai", "{answer}")])
    selector = SparsortExampleSelector(EXAMPLES, 2, DemoOptions(order="easy_to_hard", select="first", scores=HARD))
    few_shot = FewShotChatMessagePromptTemplate(
        example_selector=selector, example_prompt=turns, input_variables=["question"]
    )
    messages = few_shot.invoke({"question": QUERY}).to_messages()
    assert [message.content for message in messages[::2]] == [EXAMPLES[0]["question"], EXAMPLES[1]["question"]]


def test_examples_can_be_added() -> None:
    table = LengthScorer("characters").score(EXAMPLES, prompt="{question}")
    selector = SparsortExampleSelector(EXAMPLES[:3], 3, DemoOptions(order="easy_to_hard", scores=table))
    before = selector.select_examples({"question": QUERY})
    assert before == [EXAMPLES[1], EXAMPLES[0], EXAMPLES[2]]
    selector.add_example(EXAMPLES[3])
    selector.k = 4
    after = asyncio.run(selector.aselect_examples({"question": QUERY}))
    assert after == [EXAMPLES[1], EXAMPLES[3], EXAMPLES[0], EXAMPLES[2]]
    selector.add_example({"question": "Never scored, never seen?", "answer": "no"})
    with pytest.raises(SparsortError, match="1 of 5 rows have no score"):
        selector.select_examples({"question": QUERY})


def test_the_callers_examples_are_not_changed() -> None:
    examples = [dict(example) for example in EXAMPLES]
    selector = SparsortExampleSelector(examples, 2, DemoOptions(order="given", select="first"))
    selector.add_example({"question": "One more?", "answer": "yes"})
    selector.select_examples({"question": QUERY})[0]["answer"] = "changed"
    assert examples == EXAMPLES
    assert selector.select_examples({"question": QUERY})[0] == EXAMPLES[0]


def test_langchains_embeddings_choose_the_nearest() -> None:
    embeddings = DeterministicFakeEmbedding(size=8)
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> Any:
        asked.append(texts)
        return embeddings.embed_documents(texts)

    options = DemoOptions(order="similarity_ascending", select="knn", embed=embed, prompt="{question}")
    selector = SparsortExampleSelector(EXAMPLES, 2, options)
    near = {
        example["question"]: sum(
            a * b
            for a, b in zip(embeddings.embed_query(example["question"]), embeddings.embed_query(QUERY), strict=True)
        )
        / sum(a * a for a in embeddings.embed_query(example["question"])) ** 0.5
        for example in EXAMPLES
    }
    for _ in range(2):
        chosen = [example["question"] for example in selector.select_examples({"question": QUERY})]
        assert chosen == sorted(near, key=lambda question: near[question])[-2:]
    assert asked == [[example["question"] for example in EXAMPLES], [QUERY], [QUERY]]


def test_an_input_that_shares_no_field_is_refused() -> None:
    selector = SparsortExampleSelector(EXAMPLES, 2, DemoOptions(order="given"))
    with pytest.raises(SparsortError, match="share no text field"):
        selector.select_examples({"topic": "birds"})


def test_examples_without_the_templates_fields_do_not_vanish() -> None:
    """LangChain looks up every variable of the example's template, so an example without it is an error, not an empty line."""
    others = [{"question": example["question"], "reply": example["answer"]} for example in EXAMPLES]
    for examples in (others, [EXAMPLES[0], *others[1:]]):
        template = _template(SparsortExampleSelector(examples, 2, DemoOptions(order="given", select="first")))
        with pytest.raises(KeyError, match="answer"):
            template.format(instruction="Answer.", question=QUERY)
