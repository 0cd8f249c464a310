"""The optimiser in the real DSPy: what a compiled program sends to DSPy's dummy model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from sparsort import LengthScorer
from sparsort.errors import SparsortError

pytest.importorskip("dspy")

import dspy
from dspy.utils.dummies import DummyLM

from sparsort.recipes.adapters.dspy import DemoOptions, SparsortFewShot, order_examples

ROWS = [
    ("Who painted the ceiling of the chapel?", "Michelangelo"),
    ("How far is it to the moon?", "far"),
    ("What is the name of the longest river in Rome?", "Tiber"),
    ("Which metal melts in the hand?", "gallium"),
]
TRAIN = [dspy.Example(question=question, answer=answer).with_inputs("question") for question, answer in ROWS]
HARD = [3.0, 4.0, 1.0, 2.0]
FALLING = DemoOptions(order="hard_to_easy", select="first", scores=HARD)


class TwoSteps(dspy.Module):
    """Rewrites, then answers: two predictors, of which the training set knows the fields in part."""

    def __init__(self) -> None:
        super().__init__()
        self.rewrite = dspy.Predict("question -> shorter")
        self.answer = dspy.ChainOfThought("question -> answer")


def _made(make: Callable[..., Any], *arguments: Any) -> Any:
    """A program. DSPy draws a name for each predictor from `random`, which is put back."""
    state = random.getstate()
    try:
        return make(*arguments)
    finally:
        random.setstate(state)


def _asked(program: Any, question: str = "Where do the swallows go in winter?") -> list[str]:
    """The user turns of the one call that the program makes."""
    model = DummyLM([{"answer": "south"}])
    with dspy.context(lm=model):
        assert program(question=question).answer == "south"
    return [message["content"] for message in model.history[-1]["messages"] if message["role"] == "user"]


def test_a_compiled_program_asks_behind_our_demonstrations_in_our_order() -> None:
    student = _made(dspy.Predict, "question -> answer")
    compiled = SparsortFewShot(3, FALLING).compile(student, trainset=TRAIN)
    turns = _asked(compiled)
    assert len(turns) == 4
    for turn, at in zip(turns, [1, 0, 2], strict=False):
        assert ROWS[at][0] in turn
    assert "swallows" in turns[3]
    assert [id(demo) for demo in compiled.demos] == [id(TRAIN[at]) for at in [1, 0, 2]]
    assert student.demos == []


def test_every_predictor_has_them() -> None:
    train = [dspy.Example(shorter=demo.question[:9], **dict(demo.items())).with_inputs("question") for demo in TRAIN]
    compiled = SparsortFewShot(2, FALLING).compile(_made(TwoSteps), trainset=train)
    named = dict(compiled.named_predictors())
    assert len(named) == 2
    assert all(predictor.demos == [train[1], train[0]] for predictor in named.values())
    named["rewrite"].demos.clear()
    assert len(named["answer.predict"].demos) == 2


def _shown(predictor: Any) -> int:
    """Demonstrations that DSPy shows of a predictor's."""
    return len(dspy.ChatAdapter().format_demos(predictor.signature, predictor.demos)) // 2


def test_a_predictor_that_could_use_none_is_named_and_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    compiled = SparsortFewShot(2, FALLING).compile(_made(TwoSteps), trainset=TRAIN)
    named = dict(compiled.named_predictors())
    assert [(name, len(one.demos), _shown(one)) for name, one in named.items()] == [
        ("rewrite", 0, 0),
        ("answer.predict", 2, 2),
    ]
    (warning,) = caplog.messages
    assert warning == (
        "The predictor 'rewrite' has the inputs question and the outputs shorter; the chosen training examples have "
        "question, answer. It gets no demonstrations."
    )
    # What would have happened: DSPy drops them.
    named["rewrite"].demos = TRAIN[:2]
    assert _shown(named["rewrite"]) == 0


@pytest.mark.parametrize(
    ("signature", "fields"),
    [
        ("question -> answer", {"numbers": "1 1", "total": "2"}),
        ("question -> answer", {"question": "1 + 1?", "total": "2"}),
        ("question -> answer", {"sum": "1 + 1?", "answer": "2"}),
        ("question, passage -> answer, source", {"question": "1 + 1?", "passage": "One."}),
        ("question -> answer", {}),
    ],
)
def test_a_program_that_could_use_no_demonstration_is_refused(signature: str, fields: dict[str, str]) -> None:
    inputs, outputs = (part.strip() for part in signature.split("->"))
    train = [dspy.Example(other=f"film {n}", **fields).with_inputs("other") for n in range(3)]
    program = _made(dspy.Predict, signature)
    program.demos = train
    assert _shown(program) == 0
    options = DemoOptions(order="random", select="random")
    with pytest.raises(SparsortError) as caught:
        SparsortFewShot(2, options).compile(program, trainset=train)
    told = str(caught.value)
    assert f"the inputs {inputs} and the outputs {outputs}; " in told
    assert f"have {', '.join(['other', *fields])}." in told
    assert "Rename the fields" in told
    both = _made(TwoSteps)
    with pytest.raises(
        SparsortError, match=r"'rewrite' has the inputs question.*'answer.predict' has the inputs question"
    ):
        SparsortFewShot(2, options).compile(both, trainset=[dspy.Example(n=str(n), m="a") for n in range(3)])


def test_inputs_that_are_partly_there_are_shown_and_told(caplog: pytest.LogCaptureFixture) -> None:
    program = _made(dspy.Predict, "passage, question -> answer")
    compiled = SparsortFewShot(3, FALLING).compile(program, trainset=TRAIN)
    assert compiled.demos == [TRAIN[1], TRAIN[0], TRAIN[2]]
    turns = [
        message["content"]
        for message in dspy.ChatAdapter().format_demos(compiled.signature, compiled.demos)
        if message["role"] == "user"
    ]
    assert all(demo.question in turn for demo, turn in zip(compiled.demos, turns, strict=True))
    assert "lack the input passage" in caplog.text


def test_demonstrations_of_which_dspy_would_drop_some_are_refused() -> None:
    program = _made(dspy.Predict, "question, passage -> answer, source")
    half = [dspy.Example(question=question, answer=answer) for question, answer in ROWS[:2]]
    bare = [dspy.Example(question=question, passage="One.") for question, _ in ROWS[2:]]
    program.demos = [*half, *bare]
    assert _shown(program) == 2
    with pytest.raises(
        SparsortError, match=r"predictor 'self', 2 lack every input \(question, passage\) or every output"
    ):
        SparsortFewShot(4, FALLING).compile(program, trainset=[*half, *bare])


def test_nothing_of_the_validation_set_becomes_a_demonstration() -> None:
    valset = [dspy.Example(question="how far is it to the moon", answer="?").with_inputs("question")]
    compiled = SparsortFewShot(3, FALLING).compile(
        _made(dspy.Predict, "question -> answer"), trainset=TRAIN, valset=valset
    )
    assert compiled.demos == [TRAIN[0], TRAIN[3], TRAIN[2]]
    with pytest.raises(SparsortError, match="1 of the pool's 4 rows are in the held-out set"):
        SparsortFewShot(4, FALLING).compile(_made(dspy.Predict, "question -> answer"), trainset=TRAIN, valset=valset)


def test_examples_are_compared_by_all_of_their_inputs() -> None:
    passage = "The swallows leave in autumn and come back in spring, as they always did."
    passages = [passage, passage, passage, "A metal that melts at thirty degrees has a place in many a classroom."]
    train = [
        dspy.Example(passage=passage, question=question, answer=answer).with_inputs("passage", "question")
        for passage, (question, answer) in zip(passages, ROWS, strict=True)
    ]
    # Two questions about one passage are two questions. Without with_inputs nothing says which field is the question.
    options = DemoOptions(order="given", select="first")
    valset = [dspy.Example(passage=passage, question="When do they leave?").with_inputs("passage", "question")]
    program = _made(dspy.Predict, "passage, question -> answer")
    assert SparsortFewShot(4, options).compile(program, trainset=train, valset=valset).demos == train
    valset = [dspy.Example(passage=passage, question=ROWS[1][0]).with_inputs("passage", "question")]
    compiled = SparsortFewShot(3, options).compile(program, trainset=train, valset=valset)
    assert compiled.demos == [train[0], train[2], train[3]]
    bare = [dspy.Example(**dict(example.items())) for example in train]
    compiled = SparsortFewShot(1, options).compile(program, trainset=bare, valset=valset)
    assert compiled.demos == [bare[3]]


def test_saved_scores_and_every_selector_without_a_query() -> None:
    table = LengthScorer("characters").score([dict(example.items()) for example in TRAIN], prompt="{question}")
    lengths = {question: len(question) for question, _ in ROWS}
    for select in ("random", "first", "spread", "balanced", "vote_k"):
        options = DemoOptions(
            order="easy_to_hard", select=select, scores=table, label="answer", embed=lambda texts: [[len(texts[0])]] * 4
        )
        compiled = SparsortFewShot(3, options).compile(_made(dspy.Predict, "question -> answer"), trainset=TRAIN)
        found = [lengths[demo.question] for demo in compiled.demos]
        assert len(found) == 3
        assert found == sorted(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "given", "select": "bm25"}, "selection method 'bm25' depends on the query"),
        ({"order": "similarity_ascending", "select": "bm25"}, "order 'similarity_ascending' depends on the query"),
    ],
)
def test_what_looks_at_the_query_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        SparsortFewShot(3, DemoOptions(**options))


def test_demonstrations_that_dspy_would_reorder_are_refused() -> None:
    mixed = [*TRAIN[:3], dspy.Example(question=ROWS[3][0], answer=None).with_inputs("question")]
    with pytest.raises(SparsortError, match="predictor 'self', 1 lack answer"):
        SparsortFewShot(4, FALLING).compile(_made(dspy.Predict, "question -> answer"), trainset=mixed)
    # All of them lack the reasoning, so none is moved.
    compiled = SparsortFewShot(3, FALLING).compile(_made(dspy.ChainOfThought, "question -> answer"), trainset=TRAIN)
    assert [turn for turn, at in zip(_reasoned(compiled), [1, 0, 2], strict=False) if ROWS[at][0] not in turn] == []


def _reasoned(program: Any) -> list[str]:
    model = DummyLM([{"reasoning": "birds", "answer": "south"}])
    with dspy.context(lm=model):
        program(question="Where do the swallows go in winter?")
    return [message["content"] for message in model.history[-1]["messages"] if message["role"] == "user"]


def test_order_examples_gives_the_same_objects() -> None:
    options = DemoOptions(order="inverted_u", select="random", scores=HARD)
    ordered = order_examples(TRAIN, options)
    assert [id(example) for example in ordered] == [id(TRAIN[at]) for at in [3, 1, 0, 2]]
    assert all(example.inputs().keys() == ["question"] for example in ordered)
    assert order_examples(TRAIN, DemoOptions(order="given", select="bm25")) == TRAIN
    with pytest.raises(SparsortError, match="depends on the query"):
        order_examples(TRAIN, DemoOptions(order="similarity_descending", embed=lambda texts: [[1.0]] * len(texts)))


def test_more_than_there_are_is_told() -> None:
    with pytest.raises(SparsortError, match="5 demonstrations were asked for"):
        SparsortFewShot(5, FALLING).compile(_made(dspy.Predict, "question -> answer"), trainset=TRAIN)
