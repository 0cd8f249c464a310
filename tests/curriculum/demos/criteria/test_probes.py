"""Parsing sampled text into queries: rendered text is parsed exactly, and ambiguous text is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.ablation.run.probing import opening_of, parse_probe, probing_set
from sparsort.errors import SparsortError
from sparsort.templates import fields_of, render

PAIR = "premise: {premise}\nhypothesis: {hypothesis}\nprediction:"
TREC = "Question: {sentence}\nType:"
TEMPLATES = [
    (PAIR, "\n\n"),
    (TREC, "\n\n"),
    ("Review: {text} Sentiment:", "\n"),
    ("{a}\n{b}\nAnswer:", "\n\n"),
    ("{a} ->", "\n"),
    ("{a}::{b}::{c}:", "\n"),
    ("{a}::{b} ->", "\n"),
    ("Text: {text}", "\n\n"),
    ("P: {p}\n\nH: {h}\n\nA:", "\n\n\n"),
    ("{{{x}}} = {y} |", "\n"),
    ("Say {x} and {x} again.", "##"),
]

# Text made of the very pieces that could be taken for the template's words.
PIECES = [
    "a",
    "b c",
    " ",
    "\n",
    ":",
    "::",
    " -> ",
    "premise: ",
    "\nhypothesis: ",
    "\nprediction:",
    "\nType:",
    "}",
    " |",
    "=",
]
VALUES = (
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map(lambda parts: "".join(parts).strip()).filter(bool)
)
LABELS = st.sampled_from([" number", " yes", "", " not true"])


@settings(max_examples=300)
@given(st.sampled_from(TEMPLATES), st.data())
def test_what_was_rendered_reads_back_or_not_at_all(pair: tuple[str, str], data: st.DataObject) -> None:
    template, separator = pair
    values = VALUES.filter(lambda value: separator not in value)
    fields = {name: data.draw(values, label=name) for name in fields_of(template)}
    text = render(template, fields, where="a row")
    if template.endswith("}") and separator != "\n":
        text += separator
    else:
        text += data.draw(LABELS) + separator
    following = data.draw(st.sampled_from(["", text, "garbage"]))
    assert parse_probe(text + following, template, separator) in (None, fields)


WORDS = st.lists(
    st.sampled_from(["who", "wrote", "x²", "3.5", "(no)", "é", "don't", "a{b}", "\\d+"]), min_size=1, max_size=6
)


@settings(max_examples=200)
@given(st.sampled_from([entry for entry in TEMPLATES if not entry[0].startswith("{{")]), st.data())
def test_plain_words_read_back(pair: tuple[str, str], data: st.DataObject) -> None:
    template, separator = pair
    fields = {name: " ".join(data.draw(WORDS, label=name)) for name in fields_of(template)}
    text = render(template, fields, where="a row") + ("" if template.endswith("}") else " label") + separator
    assert parse_probe(text, template, separator) == fields
    assert parse_probe("\n " + text + text, template, separator) == fields


@given(st.sampled_from(TEMPLATES), st.text())
def test_any_text_is_read_or_refused(pair: tuple[str, str], text: str) -> None:
    template, separator = pair
    found = parse_probe(text, template, separator)
    if found is not None:
        assert list(found) == fields_of(template)
        assert all(value and value == value.strip() and separator not in value for value in found.values())


@pytest.mark.parametrize("cut", range(len("Question: Who wrote Emma ?\nType:")))
def test_a_text_cut_off_anywhere_in_the_query_is_refused(cut: int) -> None:
    text = "Question: Who wrote Emma ?\nType:"
    assert parse_probe(text[:cut], TREC, "\n\n") is None
    assert parse_probe(text[:cut], TREC, "\n\n", ended=True) is None
    assert parse_probe(text, TREC, "\n\n") == {"sentence": "Who wrote Emma ?"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("premise: it rains\nhypothesis: it is wet\nprediction: true\n\npremise: x", ("it rains", "it is wet")),
        ("premise: it rains\nhypothesis: it is wet\nprediction:", ("it rains", "it is wet")),
        (" \npremise:  it rains \nhypothesis: it is wet\nprediction: tr", ("it rains", "it is wet")),
        ("premise: two\nlines\nhypothesis: one\nprediction:", ("two\nlines", "one")),
        ("premise: \nhypothesis: it is wet\nprediction: true", None),
        ("premise: it rains\nhypothesis:\nprediction: true", None),
        ("premise: it rains\nprediction: true", None),
        ("hypothesis: it is wet\npremise: it rains\nprediction: true", None),
        ("premise: it\n\nrains\nhypothesis: it is wet\nprediction: true", None),
        ("premise: a\nhypothesis: b\nhypothesis: c\nprediction: true", None),
        ("premise: a\nhypothesis: b\nprediction: x\nhypothesis: c\nprediction: y\n\n", None),
        ("premise: a premise: b\nhypothesis: c\nprediction: true", None),
        ("Premise: a\nhypothesis: c\nprediction: true", None),
        ("I would say: premise: a\nhypothesis: c\nprediction: true", None),
        ("", None),
    ],
)
def test_pairs(text: str, found: tuple[str, str] | None) -> None:
    expected = None if found is None else {"premise": found[0], "hypothesis": found[1]}
    assert parse_probe(text, PAIR, "\n\n") == expected


def test_a_template_that_ends_in_a_field_needs_an_end() -> None:
    assert parse_probe("Text: half a sen", "Text: {text}", "\n\n") is None
    assert parse_probe("Text: whole.", "Text: {text}", "\n\n", ended=True) == {"text": "whole."}
    assert parse_probe("Text: whole.\n\nText:", "Text: {text}", "\n\n") == {"text": "whole."}


def test_spaces_between_fields_are_ambiguous() -> None:
    assert parse_probe("one two end", "{a} {b} end", "\n") == {"a": "one", "b": "two"}
    assert parse_probe("one two three end", "{a} {b} end", "\n") is None
    # "a:" and "a" would both do before "::".
    assert parse_probe("a:::b ->", "{a}::{b} ->", "\n") is None
    assert parse_probe("a::b ->", "{a}::{b} ->", "\n") == {"a": "a", "b": "b"}
    assert parse_probe("Say this and that again.", "Say {x} and {x} again.", "##") is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "no field"),
        ("{a}{b}", "nothing between 'a' and 'b'"),
        ("{a:.2f} x", "formats the field 'a'"),
        ("{a!r} x", "formats the field 'a'"),
        ("{a.}", "cannot be read"),
        ("{a", "cannot be read"),
    ],
)
def test_templates_that_do_not_read_back(template: str, message: str) -> None:
    for call in (lambda: parse_probe("x", template, "\n"), lambda: opening_of(template)):
        with pytest.raises(SparsortError, match=message):
            call()


def test_an_empty_separator() -> None:
    with pytest.raises(SparsortError, match="separator is empty"):
        parse_probe("x", TREC, "")


def test_openings() -> None:
    assert opening_of(PAIR) == "premise:"
    assert opening_of("{{{x}}} =") == "{"
    assert opening_of("{x} ->") == ""
    assert opening_of("Q:\n{x}\nA:") == "Q:\n"
    assert parse_probe(opening_of(TREC) + " Why ?\nType: reason", TREC, "\n\n") == {"sentence": "Why ?"}


def test_a_probing_set_holds_each_query_once_and_no_demonstration() -> None:
    samples = [
        "Question: Why ?\nType: reason\n\nQuestion: When ?\nType:",
        "Question: Who ?\nType: person",
        "Question: Why ?\nType: other",
        "Question: Where",
        "Question: How many ?\nType: number",
        "Question: How many ?\nType: number",
    ]
    found = probing_set(samples, TREC, "\n\n", demos=[{"sentence": " How many ? ", "label": 5}])
    assert found.rows == [{"sentence": "Why ?"}, {"sentence": "Who ?"}]
    assert (found.sampled, found.unparsed, found.repeated, found.copied) == (6, 1, 1, 2)
    assert len(found.rows) + found.unparsed + found.repeated + found.copied == found.sampled
    assert probing_set([], TREC, "\n\n").rows == []
    with pytest.raises(SparsortError, match="no field"):
        probing_set([], "x", "\n\n")
