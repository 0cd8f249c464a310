"""Pacing against a second implementation of the papers' formulas, and its contract as properties."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsort.curriculum.loading.plan.pacing import PACINGS, Pacing
from sparsort.errors import SparsortError

SHARES = st.floats(0.0, 1.0, exclude_min=True) | st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0])
STEPPED = ("constant", "step", "baby_steps")


def of_what_it_reads(kind: Any, **settings: Any) -> Pacing:
    """A pacing with those of the settings that its formula reads; the others are refused."""
    return Pacing(kind=kind, **{name: value for name, value in settings.items() if name in PACINGS[kind].reads})


@st.composite
def pacings(draw: st.DrawFn) -> Pacing:
    return of_what_it_reads(
        draw(st.sampled_from(tuple(PACINGS))),
        start=draw(SHARES),
        until=draw(SHARES),
        power=draw(st.floats(0.05, 50) | st.sampled_from([1.0, 2.0, 3.0])),
        buckets=draw(st.integers(1, 12)),
    )


def unclamped(kind: str, t: int, total: int, *, a: float, b: float, p: float, buckets: int) -> float:
    """The formulas of the design note in plain Python, with no clamp."""
    x = t / (a * total)
    if kind == "step":
        return b if x < 1 else 1.0
    if kind == "baby_steps":
        return b + (1 - b) * math.floor(Fraction(t * buckets) / (Fraction(str(a)) * total)) / (buckets - 1)
    return {
        "constant": lambda: 1.0,
        "linear": lambda: b + (1 - b) * t / (a * total),
        "root": lambda: b + (1 - b) * (t / (a * total)) ** (1 / p),
        "quadratic": lambda: b + (1 - b) * (t / (a * total)) ** 2,
        "exponential": lambda: b + (1 - b) * math.expm1(10 * t / (a * total)) / math.expm1(10),
        "logarithmic": lambda: b + (1 - b) * (1 + math.log(t / (a * total) + math.exp(-10)) / 10),
        "geometric": lambda: 2 ** ((1 - x) * math.log2(b)),
        "competence": lambda: (t * (1 - b**p) / (a * total) + b**p) ** (1 / p),
    }[kind]()


@pytest.mark.parametrize("kind", PACINGS)
@pytest.mark.parametrize(
    ("a", "b", "p", "buckets"),
    [(1.0, 0.1, 2.0, 5), (0.5, 0.2, 3.0, 2), (0.8, 0.01, 0.5, 7), (0.3, 0.9, 1.0, 4), (0.7, 1.0, 2.5, 3)],
)
def test_a_share_is_the_formula_clamped(kind: Any, a: float, b: float, p: float, buckets: int) -> None:
    total = 90
    got = of_what_it_reads(kind, start=b, until=a, power=p, buckets=buckets).share(np.arange(total), total)
    expected = [
        1.0
        if t >= Fraction(str(a)) * total
        else min(1.0, max(b, unclamped(kind, t, total, a=a, b=b, p=p, buckets=buckets)))
        for t in range(total)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=0)


@given(pacings(), st.integers(1, 10**12), st.data())
def test_shares_stay_in_bounds_never_fall_and_meet_both_ends(pacing: Pacing, total: int, data: st.DataObject) -> None:
    steps = sorted({0, total - 1, *data.draw(st.lists(st.integers(0, total - 1), max_size=20))})
    shares = pacing.share(np.array(steps), total)
    assert shares.dtype == np.float64
    assert np.all((shares >= pacing.start) & (shares <= 1))
    assert np.all(np.diff(shares) >= 0)
    if pacing.kind != "constant" and not (pacing.kind == "baby_steps" and pacing.buckets == 1):
        phase = Fraction(1, pacing.buckets) if pacing.kind == "baby_steps" else 1
        if Fraction(repr(pacing.until)) * total * phase > 0:
            assert shares[0] == pacing.start
    full = [step >= Fraction(repr(pacing.until)) * total for step in steps]
    assert np.all(shares[full] == 1.0)


@given(pacings(), st.integers(2**40, 2**53), st.floats(0, 1))
def test_neighbours_that_differ_by_a_rounding_do_not_fall(pacing: Pacing, total: int, place: float) -> None:
    first = min(int(place * float(total) * pacing.until), total - 40)
    assert np.all(np.diff(pacing.share(np.arange(first, first + 40), total)) >= 0)


@given(pacings(), st.integers(1, 500), st.data())
def test_a_step_has_one_share_alone_in_an_array_and_in_any_shape(
    pacing: Pacing, total: int, data: st.DataObject
) -> None:
    steps = data.draw(st.lists(st.integers(0, total - 1), min_size=6, max_size=6))
    together = pacing.share(np.array(steps), total)
    assert together.tolist() == [float(pacing.share(step, total)) for step in steps]
    assert (
        pacing.share(np.array(steps, dtype=np.uint16).reshape(2, 3), total).tolist() == together.reshape(2, 3).tolist()
    )
    assert pacing.share(steps, total).tolist() == together.tolist()


@pytest.mark.parametrize("kind", [kind for kind in PACINGS if kind not in STEPPED])
def test_not_everything_is_in_before_its_time(kind: Any) -> None:
    shares = Pacing(kind=kind, start=0.2, until=0.5).share(np.arange(100), 100)
    assert np.all(shares[:50] < 1)
    assert np.all(np.diff(shares[:51]) > 0)
    assert np.all(shares[50:] == 1)


@pytest.mark.parametrize(
    ("until", "total", "first"), [(0.1, 30, 3), (0.7, 10, 7), (0.29, 100, 29), (0.55, 100, 55), (0.5, 3, 2)]
)
def test_the_end_is_the_decimal_that_was_written(until: float, total: int, first: int) -> None:
    # In binary 0.1 * 30 > 3, 0.29 * 100 < 29 and 0.55 * 100 > 55.
    shares = Pacing(kind="step", start=0.5, until=until).share(np.arange(total), total)
    assert shares.tolist() == [0.5] * first + [1.0] * (total - first)


def test_baby_steps_are_phases_of_equal_length() -> None:
    # Cirik et al. 2016, algorithm 2, with equal buckets: train on D1, then on D1 and D2, …
    pacing = Pacing(kind="baby_steps", start=0.25, buckets=4)
    assert pacing.share(np.arange(12), 12).tolist() == [0.25] * 3 + [0.5] * 3 + [0.75] * 3 + [1.0] * 3
    assert Pacing(kind="baby_steps", start=0.2, until=0.5, buckets=3).share(range(12), 12).tolist() == pytest.approx(
        [0.2, 0.2, 0.6, 0.6] + [1.0] * 8
    )
    assert Pacing(kind="baby_steps", buckets=1).share([0, 1], 2).tolist() == [1.0, 1.0]


@given(st.integers(1, 60), st.integers(1, 40), st.sampled_from([0.01, 0.1, 0.3]), st.sampled_from([1.0, 2.0, 3.0]))
def test_competence_allows_what_platanios_allows(count: int, total: int, c0: float, p: float) -> None:
    # Platanios et al. 2019, algorithm 1: an example is allowed when the CDF of its difficulty is at most c(t).
    for t, share in enumerate(Pacing(kind="competence", start=c0, power=p).share(np.arange(total), total)):
        competence = min(1.0, (t * (1 - c0**p) / total + c0**p) ** (1 / p))
        cdf = [Fraction(rank, count) for rank in range(1, count + 1)]
        assume(all(abs(float(value) - competence) > 1e-12 for value in cdf))
        assert sum(value <= competence for value in cdf) == math.floor(share * count)


def test_where_published_code_differs() -> None:
    total, b = 100, 0.2
    # Wu et al.'s code, in shares, continues to grow past a·T.
    wu = {
        "linear": lambda t: (1 - b) / (0.5 * total) * t + b,
        "quadratic": lambda t: (1 - b) / (0.5 * total) ** 2 * t**2 + b,
        "root": lambda t: (1 - b) / (0.5 * total) ** 0.5 * t**0.5 + b,
        "step": lambda t: t // (0.5 * total) + b,
        "logarithmic": lambda t: (1 - b) * (1 + 0.1 * math.log(t / (0.5 * total) + math.exp(-10))) + b,
    }
    for kind, theirs in wu.items():
        ours = Pacing(kind=kind, start=b, until=0.5)  # type: ignore[arg-type]
        assert float(ours.share(30, total)) == pytest.approx(theirs(30), rel=1e-12)
        assert theirs(90) > 1
        assert float(ours.share(90, total)) == 1
    # CurML's root-p has the exponent 1/2 for any p.
    for p, same in ((2, True), (3, False)):
        theirs_p = (b**p + (1 - b**p) / total * 30) ** 0.5
        ours_p = float(Pacing(kind="competence", start=b, power=p).share(30, total))
        assert math.isclose(ours_p, theirs_p, rel_tol=1e-12) == same


def test_shares_are_the_same_bits_everywhere() -> None:
    # A resume on another processor draws by these numbers: a change here breaks the plans that are under way.
    got = {
        kind: float(of_what_it_reads(kind, start=0.1, power=3).share(37, 101)).hex()
        for kind in ("root", "competence", "geometric", "exponential", "logarithmic")
    }
    assert got == BITS


BITS = {
    "root": "0x1.7cea58bb5f486p-1",
    "competence": "0x1.6e8fc30f777f8p-1",
    "geometric": "0x1.dc10bbb7bbc32p-3",
    "exponential": "0x1.9ff572b35e8c3p-4",
    "logarithmic": "0x1.d1bb67e96a311p-1",
}


# Reading and writing


@given(pacings())
def test_text_and_json_read_back_the_same(pacing: Pacing) -> None:
    assert Pacing.parse(str(pacing)) == pacing
    assert Pacing.from_json(json.loads(json.dumps(pacing.to_json()))) == pacing


def test_parsing() -> None:
    assert Pacing.parse("linear") == Pacing()
    assert str(Pacing()) == "linear"
    expected = Pacing(kind="root", start=0.2, until=0.5, power=3)
    assert Pacing.parse("root:start=0.2,until=0.5,power=3") == expected
    assert Pacing.parse(" root : start = 0.2, until=5e-1 ,power=3 ") == expected
    assert str(expected) == "root:start=0.2,until=0.5,power=3.0"
    assert Pacing.parse("baby_steps:buckets=3") == Pacing(kind="baby_steps", buckets=3)
    assert Pacing.from_json({"kind": "step", "until": 0.5}) == Pacing(kind="step", until=0.5)


def test_numbers_of_numpy_become_plain() -> None:
    pacing = Pacing(kind="root", start=np.float32(0.5), until=np.float64(1), power=np.int64(3))  # type: ignore[arg-type]
    assert str(pacing) == "root:start=0.5,power=3.0"
    stepped = Pacing(kind="baby_steps", buckets=np.int64(4))  # type: ignore[arg-type]
    assert str(stepped) == "baby_steps:buckets=4"
    for made in (pacing, stepped):
        assert [type(value) for value in made.to_json().values()] == [str, float, float, float, int]


@pytest.mark.parametrize("kind", PACINGS)
@pytest.mark.parametrize("setting", ["start=0.3", "until=0.6", "power=3", "power=2", "buckets=5", "buckets=3"])
def test_a_setting_that_the_formula_does_not_have_is_refused(kind: Any, setting: str) -> None:
    name, _, value = setting.partition("=")
    # What changes no share of any step is not read.
    shares = [
        Pacing(kind=kind, **{name: number}, stored=True).share(np.arange(50), 50).tolist()  # type: ignore[arg-type]
        for number in ((2, 3) if name == "buckets" else (0.3, 0.6))
    ]
    if shares[0] != shares[1]:
        assert str(Pacing.parse(f"{kind}:{setting}")).startswith(kind)
        return
    with pytest.raises(SparsortError, match=rf"^{name}=.* has no effect: .*kind='{kind}'\. Omit it, or pass kind="):
        Pacing.parse(f"{kind}:{setting}")
    if value not in ("2", "5"):  # the defaults, which count as not given
        with pytest.raises(SparsortError, match="has no effect"):
            Pacing(kind=kind, **{name: type(getattr(Pacing, name))(float(value))})


def test_a_stored_pacing_keeps_what_it_does_not_read() -> None:
    text = "linear:start=0.2,power=3.0"
    assert str(Pacing.parse(text, stored=True)) == text
    assert Pacing.from_json({"kind": "step", "buckets": 3}, stored=True).buckets == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lineer", "unknown pacing 'lineer'. Did you mean 'linear'"),
        ("", "unknown pacing ''"),
        ("root:strat=0.2", "'strat'. Did you mean 'start'"),
        ("root:kind=linear", "'kind'"),
        ("root:0.2", "'0.2' where NAME=VALUE is expected"),
        ("root:start=0.2,", "'' where NAME=VALUE"),
        ("root:start=a fifth", "'a fifth', which is not a number"),
        ("baby_steps:buckets=2.5", "'2.5', which is not a whole number"),
        ("root:start=0.2,start=0.3", "gives start twice"),
        ("root:start=nan", "start = nan"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(SparsortError) as caught:
        Pacing.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"start": 1.5},
            "share of the examples that is available at step 0, above 0 and at most 1: start=0.2 means 20%",
        ),
        ({"start": 20}, "For 20 percent write 0.2"),
        ({"start": 0}, "start = 0.0"),
        ({"start": -0.1}, "start = -0.1"),
        ({"start": math.nan}, "start = nan"),
        ({"start": math.inf}, "start = inf"),
        ({"start": "0.2"}, "start = '0.2'; expected a number"),
        ({"start": True}, "start = True; expected a number"),
        ({"until": 0.0}, "share of training after which all are available"),
        ({"until": 1.01}, "until = 1.01"),
        ({"until": math.nan}, "until = nan"),
        ({"power": 0}, "power = 0.0"),
        ({"power": math.inf}, "power = inf"),
        ({"power": math.nan}, "power = nan"),
        ({"buckets": 0}, "buckets = 0"),
        ({"buckets": 2.0}, "buckets = 2.0"),
        ({"buckets": True}, "buckets = True"),
        ({"kind": "log"}, "Did you mean 'logarithmic'"),
        ({"kind": None}, "unknown pacing None"),
        ({"begin": 0.2}, "unknown setting of a pacing 'begin'"),
        ("linear", "Pacing.parse"),
    ],
)
def test_bad_values_are_refused(values: Any, message: str) -> None:
    with pytest.raises(SparsortError) as caught:
        Pacing.from_json(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("step", "total", "message"),
    [
        (-1, 10, "step -1 of total = 10; steps count from 0 to 9"),
        (10, 10, "step 10 of total = 10"),
        ([3, 11], 10, "step 11"),
        (0.5, 10, "whole numbers from 0 to 9"),
        (True, 10, "whole numbers"),
        (0, 0, "total = 0"),
        (0, 10.0, "total = 10.0"),
        (0, True, "total = True"),
    ],
)
def test_steps_outside_of_training_are_refused(step: Any, total: Any, message: str) -> None:
    with pytest.raises(SparsortError) as caught:
        Pacing().share(step, total)
    assert message in str(caught.value)


def test_no_steps_have_no_shares() -> None:
    assert Pacing().share([], 10).shape == (0,)


def test_the_logarithm_passes_one_shortly_before_the_end_and_is_held_there() -> None:
    total = 10**6
    assert unclamped("logarithmic", total - 1, total, a=1, b=0.1, p=2, buckets=5) > 1
    assert Pacing(kind="logarithmic").share([total - 30, total - 1], total).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("power", [5e-324, 1e-300, 1e300, 1e308])
@pytest.mark.parametrize("kind", ["root", "competence"])
def test_powers_at_the_edge_of_a_float_keep_the_bounds(kind: Any, power: float) -> None:
    shares = Pacing(kind=kind, start=0.25, until=0.5, power=power).share(np.arange(40), 40)
    assert shares[0] == 0.25
    assert np.all((shares >= 0.25) & (shares <= 1))
    assert np.all(np.diff(shares) >= 0)
