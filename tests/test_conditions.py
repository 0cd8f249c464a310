"""The check that an option has an effect: which mistake is reported, and what counts as given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sparsort.conditions import (
    ALWAYS,
    Table,
    When,
    among,
    changed,
    excludes,
    needs,
    refuse_unread,
    refuse_unread_arguments,
    refuse_unread_fields,
    under,
)
from sparsort.errors import SparsortError

SHAPES = ("round", "square", "long")
TABLE: Table = {
    "shape": ALWAYS,
    "radius": (among("shape", ("round",), of=SHAPES),),
    "corner": (among("shape", ("square", "long"), of=SHAPES), excludes("soft", "{soft} has no corner")),
    "soft": ALWAYS,
    "ink": (needs("draw", "nothing is drawn without {draw}", draw="FILE"),),
    "draw": ALWAYS,
}
VALUES = {"shape": "round", "radius": 1.0, "corner": 2, "soft": False, "ink": "red", "draw": None}


def test_the_message_says_what_was_given_why_it_has_no_effect_and_what_to_do() -> None:
    with pytest.raises(SparsortError) as caught:
        refuse_unread(TABLE, VALUES, ["shape", "corner"])
    assert str(caught.value) == (
        "corner=2 has no effect: square and long read it, and this is shape='round'. Omit it, or pass shape='square'."
    )
    with pytest.raises(SparsortError) as caught:
        refuse_unread(TABLE, VALUES, ["ink"], lambda name, value: f"--{name}" if value is None else f"--{name} {value}")
    assert str(caught.value) == (
        "--ink red has no effect: nothing is drawn without --draw. Omit it, or pass --draw FILE."
    )


def test_options_that_were_not_given_or_are_read_are_accepted() -> None:
    refuse_unread(TABLE, VALUES, [])
    refuse_unread(TABLE, VALUES, ["shape", "radius", "soft", "draw"])
    refuse_unread(TABLE, {**VALUES, "shape": "long"}, ["corner"])


def test_every_condition_of_an_option_has_to_hold_and_the_first_that_does_not_is_reported() -> None:
    with pytest.raises(SparsortError, match=r"^corner=2 has no effect: soft=True has no corner\. Omit it\.$"):
        refuse_unread(TABLE, {**VALUES, "shape": "long", "soft": True}, ["corner"])
    stricter = under(When(holds=lambda values: values["draw"] is not None, why="nothing is drawn"), TABLE)
    with pytest.raises(SparsortError, match="nothing is drawn"):
        refuse_unread(stricter, {**VALUES, "soft": True}, ["corner"])


def test_a_misspelt_choice_is_left_to_whoever_reads_it() -> None:
    refuse_unread(TABLE, {**VALUES, "shape": "rond"}, ["corner", "radius"])


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    shape: str = "round"
    radius: float = 1.0
    corner: int = 0
    soft: bool = False
    ink: str = "black"
    draw: str | None = None
    untold: int = 0

    def __post_init__(self) -> None:
        refuse_unread_fields(self, TABLE)


def test_in_python_an_argument_that_differs_from_its_default_counts_as_given() -> None:
    assert changed(_Drawing(shape="square", corner=1, radius=1.0, untold=5)) == ["shape", "corner", "untold"]
    with pytest.raises(SparsortError, match=r"^radius=2\.0 has no effect"):
        _Drawing(shape="long", radius=2.0)
    with pytest.raises(SparsortError, match=r"^ink='red' has no effect"):
        _Drawing(ink="red")


def test_arguments_are_compared_with_the_defaults_of_their_function() -> None:
    def draw(shape: str = "round", *, radius: float = 1.0, corner: int = 0, soft: bool = False) -> None: ...

    values = {"shape": "long", "radius": 1.0, "corner": 3, "soft": False}
    refuse_unread_arguments(draw, TABLE, values)
    with pytest.raises(SparsortError, match=r"^radius=1 has no effect"):
        # An int is no float that was left at its default.
        refuse_unread_arguments(draw, TABLE, {**values, "radius": 1})
