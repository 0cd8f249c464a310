"""Pacing: the share of the examples, easiest first, that is available at a step of training.

Contract: NumPy only. A share is a pure function of (pacing, step, total). It is in [b, 1], never decreases, is b at step 0, and
is exactly 1 from step a·T on, where a is the decimal that was written (a = 0.1 of 30 steps is step 3, although 0.1 * 30 in
binary is not 3). It is the same number for a single step and in an array, and on every processor. Functions that IEEE
arithmetic does not round correctly (exp, ln, powers) use `decimal`, because NumPy's versions differ in the last bit between
processors and releases, and a resume on another machine must draw the same examples. That costs 10 to 30 µs per step for
exponential, logarithmic, geometric, and roots with p other than 1 and 2; the others take well under 1 µs.

Legend: t step, T total, a `until`, b `start`, p `power`, K `buckets`, x = t/(aT), S steps passed to `share` (any shape).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from decimal import Context, Decimal
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, among, refuse_unread, refuse_unread_fields
from sparsort.errors import SparsortError, unknown_choice
from sparsort.registry import Entry, Registry

PacingKind = Literal[
    "constant",
    "linear",
    "root",
    "quadratic",
    "step",
    "exponential",
    "logarithmic",
    "geometric",
    "competence",
    "baby_steps",
]
Steps = NDArray[np.int64]
Shares = NDArray[np.float64]


class ShareOf(Protocol):
    """Computes the share of a pacing before the clamp, at steps (S,) int64; `length` is a·T, the step of full availability."""

    def __call__(self, pacing: Pacing, step_S: Steps, length: Fraction, /) -> Shares: ...


@dataclass(frozen=True, kw_only=True)
class PacingEntry(Entry):
    """One kind of pacing. `reads` names the settings of `Pacing` in its formula; other settings are refused.

    Attributes:
        formula: the share before the clamp to [b, 1], as text.
        clamp: a note on where the clamp matters.
        share: the function that computes the formula.
        begins_at_start: whether the share at step 0 is set to exactly b, which the formula gives up to rounding.
    """

    formula: str
    clamp: str
    share: ShareOf
    begins_at_start: bool = True


# Far more digits than a float64 has, so that an increasing function is still increasing after rounding to float64.
_DIGITS = Context(prec=24)
_E10 = float(_DIGITS.exp(Decimal(10)))
_E_10 = float(_DIGITS.exp(Decimal(-10)))


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """How the share of available examples grows over training. `PACINGS` lists the formulas and their sources.

    Two warnings for comparisons with other implementations: the published code of Wu et al. does not clamp, so its shares exceed
    1 after a·T. The "root-p" of CurML is `competence` with the exponent 1/2 for every p, which is correct for p = 2 only.

    Attributes:
        kind: the formula.
        start: b, the share that is available at step 0, in (0, 1]. "constant" does not read it.
        until: a, the share of training after which everything is available, in (0, 1]. "constant" does not read it.
        power: p of "root" and "competence", above 0.
        buckets: K of "baby_steps", which has K phases of equal length. The first phase has the easiest share b of the
            examples, and each later phase adds one of K−1 equal buckets of the rest.
        stored: whether the settings come from a file; a setting that has no effect is then accepted.

    Raises:
        SparsortError: an unknown kind, a number outside its range, or a setting that the kind does not read.
    """

    kind: PacingKind = "linear"
    start: float = 0.1
    until: float = 1.0
    power: float = 2.0
    buckets: int = 5
    stored: InitVar[bool] = False

    def __post_init__(self, stored: bool) -> None:
        PACINGS.check(self.kind)
        _set(self, "start", _share("start", self.start, "the share of the examples that is available at step 0", 0.2))
        _set(self, "until", _share("until", self.until, "the share of training after which all are available", 0.5))
        power = _number("power", self.power)
        if not 0 < power < math.inf:
            raise SparsortError(f"a pacing has power = {power!r}; expected a number above 0, such as 2.")
        _set(self, "power", power)
        if isinstance(self.buckets, bool) or not isinstance(self.buckets, int | np.integer) or self.buckets < 1:
            raise SparsortError(f"a pacing has buckets = {self.buckets!r}; expected a whole number of at least 1.")
        _set(self, "buckets", int(self.buckets))
        if not stored:
            refuse_unread_fields(self, READ_BY)

    def share(self, step: int | Sequence[int] | NDArray[np.integer[Any]], total: int) -> NDArray[np.float64]:
        """The share of the examples that is available at each step.

        Args:
            step: (S,) number of steps that are already done, 0 ≤ step < total; of any shape, in any order.
            total: T, the number of steps of the whole training.

        Returns:
            (S,) float64 in [b, 1]; for a single step, an array without dimensions.

        Raises:
            SparsortError: `total` is not a whole number above 0, or a step is not a whole number in 0 … total−1.
        """
        step_S = _steps(step, total)
        # The text of a float is the decimal that the user wrote, and a Fraction keeps it exact.
        length = Fraction(repr(self.until)) * int(total)
        entry = PACINGS[self.kind]
        share_S = np.clip(entry.share(self, step_S, length), self.start, 1.0)
        if entry.begins_at_start:
            # The formulas give both ends up to rounding; the contract promises them exactly.
            share_S = np.where(step_S == 0, self.start, share_S)
        # From step a·T on everything is available, whatever the formula rounds to.
        return np.where(step_S >= math.ceil(length), 1.0, share_S)

    @classmethod
    def parse(cls, text: str, *, stored: bool = False) -> Pacing:
        """Parse a pacing from its text: "linear", or "root:start=0.2,until=0.5,power=3".

        Args:
            text: the text.
            stored: see `Pacing`.

        Raises:
            SparsortError: an unknown kind or setting, a setting that the kind does not read, or a value out of range.
        """
        kind, _, rest = str(text).partition(":")
        values: dict[str, Any] = {"kind": kind.strip()}
        PACINGS.check(values["kind"])
        for item in rest.split(",") if rest.strip() else []:
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                raise SparsortError(
                    f"the pacing {text!r} has {item.strip()!r} where NAME=VALUE is expected, "
                    f"as in {kind.strip()}:start=0.2,until=0.5."
                )
            if name not in _SETTINGS:
                raise unknown_choice("setting of a pacing", name, _SETTINGS)
            if name in values:
                raise SparsortError(f"the pacing {text!r} gives {name} twice. Give it once.")
            try:
                values[name] = int(value) if name == "buckets" else float(value)
            except ValueError as error:
                kind_of_number = "whole number" if name == "buckets" else "number"
                raise SparsortError(
                    f"the pacing {text!r} has {name} = {value!r}, which is not a {kind_of_number}."
                ) from error
        pacing = cls(**values, stored=stored)
        if not stored:
            # The constructor cannot see a setting that was written with its default value; the text shows it.
            refuse_unread(READ_BY, pacing.to_json(), [name for name in values if name != "kind"])
        return pacing

    def __str__(self) -> str:
        """The text that `parse` reads: the kind, and the settings that differ from their defaults."""
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name != "kind" and getattr(self, field.name) != field.default
        ]
        return f"{self.kind}:{','.join(given)}" if given else self.kind

    def to_json(self) -> dict[str, Any]:
        """Every field as a plain value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, stored: bool = False) -> Pacing:
        """Read the values that `to_json` returned; missing fields get their defaults.

        Args:
            values: field → value.
            stored: see `Pacing`.

        Raises:
            SparsortError: the values are not a mapping, or have an unknown field or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise SparsortError(
                f"a pacing is read from a table such as {Pacing().to_json()}, not from {values!r}. "
                "For a line of text use Pacing.parse."
            )
        for name in values:
            if name not in ("kind", *_SETTINGS):
                raise unknown_choice("setting of a pacing", name, ("kind", *_SETTINGS))
        return cls(**values, stored=stored)


_SETTINGS = tuple(field.name for field in dataclasses.fields(Pacing) if field.name != "kind")


def _each(function: Callable[[Decimal], Decimal], values_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply a function of `decimal` to every element and round the results to float64."""
    return np.fromiter(
        (float(function(_DIGITS.create_decimal_from_float(value))) for value in values_S.flat),
        np.float64,
        values_S.size,
    ).reshape(values_S.shape)


def _root(values_S: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    if p == 1:
        return values_S
    if p == 2:
        return np.sqrt(values_S)
    # In `decimal`, ln 0 is −∞ and e^−∞ is 0, so the root of 0 is 0.
    return _each(lambda value: _DIGITS.exp(_DIGITS.divide(_DIGITS.ln(value), Decimal(p))), values_S)


def _everything(pacing: Pacing, step_S: Steps, length: Fraction) -> Shares:
    return np.ones(step_S.shape)


def _start_only(pacing: Pacing, step_S: Steps, length: Fraction) -> Shares:
    return np.full(step_S.shape, pacing.start)


def _baby_steps(pacing: Pacing, step_S: Steps, length: Fraction) -> Shares:
    if pacing.buckets == 1:
        return np.ones(step_S.shape)
    # The comparison is between integers, so that rounding cannot move the first step of a phase.
    begins = [math.ceil(length * phase / pacing.buckets) for phase in range(1, pacing.buckets)]
    phase_S = np.searchsorted(np.asarray(begins, dtype=np.int64), step_S, side="right")
    # The first phase has the share b and the last one the share 1, with K − 1 equal increments.
    return np.asarray(pacing.start + (1 - pacing.start) * (phase_S / (pacing.buckets - 1)), dtype=np.float64)


def _over_time(share_of_x: Callable[[Pacing, Shares], Shares]) -> ShareOf:
    """A pacing whose share is a function of x = t/(aT)."""

    def share(pacing: Pacing, step_S: Steps, length: Fraction) -> Shares:
        # Without the inner minimum, the quotient could overflow for a tiny aT; x is 1 past the end anyway.
        x_S = np.minimum(np.minimum(step_S, math.floor(length)) / float(length), 1.0)
        return share_of_x(pacing, np.atleast_1d(x_S)).reshape(step_S.shape)

    return share


def _from_start(grown_of_x: Callable[[Pacing, Shares], Shares]) -> ShareOf:
    """A pacing of the form b + (1−b)·g(x), given g."""
    return _over_time(lambda pacing, x_S: pacing.start + (1 - pacing.start) * grown_of_x(pacing, x_S))


def _geometric(pacing: Pacing, x_S: Shares) -> Shares:
    ln_b = _DIGITS.ln(Decimal(pacing.start))
    return _each(lambda exponent: _DIGITS.exp(_DIGITS.multiply(exponent, ln_b)), 1 - x_S)


def _competence(pacing: Pacing, x_S: Shares) -> Shares:
    b, p = pacing.start, pacing.power
    start_p = float(_DIGITS.exp(_DIGITS.multiply(Decimal(p), _DIGITS.ln(Decimal(b)))))
    return _root(x_S * (1 - start_p) + start_p, p)


_WU = "Wu, Dyer, Neyshabur 2021 (arXiv 2012.03107)"
_AFTER = "1 from aT on"
_PLAIN = frozenset({"start", "until"})
_POWERED = _PLAIN | {"power"}

PACINGS = Registry(
    "pacing",
    (
        PacingEntry(
            name="constant",
            help="everything from the first step",
            formula="1",
            source="no curriculum; Wu et al.'s standard training",
            clamp="none: b, a are not read",
            share=_everything,
            begins_at_start=False,
        ),
        PacingEntry(
            name="linear",
            help="grows by the same amount in every step",
            formula="b + (1−b)·x",
            source=f"{_WU}; Platanios et al. 2019 (arXiv 1903.09848)",
            clamp=_AFTER,
            reads=_PLAIN,
            share=_from_start(lambda pacing, x_S: x_S),
        ),
        PacingEntry(
            name="root",
            help="grows fast, then slowly",
            formula="b + (1−b)·x^(1/p)",
            source=f"{_WU}, there with p = 2",
            clamp=_AFTER,
            reads=_POWERED,
            share=_from_start(lambda pacing, x_S: _root(x_S, pacing.power)),
        ),
        PacingEntry(
            name="quadratic",
            help="grows slowly, then fast",
            formula="b + (1−b)·x²",
            source=_WU,
            clamp=_AFTER,
            reads=_PLAIN,
            share=_from_start(lambda pacing, x_S: x_S * x_S),
        ),
        PacingEntry(
            name="step",
            help="only the first share, then everything at once",
            formula="b, then 1",
            source=_WU,
            clamp="1 from aT on; code without a clamp continues to 1+b, 2+b, …",
            reads=_PLAIN,
            share=_start_only,
        ),
        PacingEntry(
            name="exponential",
            help="hardly grows at first, then very fast",
            formula="b + (1−b)·(e^(10x)−1)/(e^10−1)",
            source=_WU,
            clamp=_AFTER,
            reads=_PLAIN,
            share=_from_start(lambda pacing, x_S: (_each(_DIGITS.exp, 10 * x_S) - 1) / (_E10 - 1)),
        ),
        PacingEntry(
            name="logarithmic",
            help="grows very fast at first, then hardly",
            formula="b + (1−b)·(1 + ln(x+e^−10)/10)",
            source=_WU,
            clamp="1 shortly before aT (at x = 1−e^−10)",
            reads=_PLAIN,
            share=_from_start(lambda pacing, x_S: 1 + _each(_DIGITS.ln, x_S + _E_10) / 10),
        ),
        PacingEntry(
            name="geometric",
            help="grows by the same factor in every step",
            formula="2^((1−x)·log2 b) = b^(1−x)",
            source="CurML (Zhou et al. 2022), there with a = 1",
            clamp=_AFTER,
            reads=_PLAIN,
            share=_over_time(_geometric),
        ),
        PacingEntry(
            name="competence",
            help="the competence of Platanios et al.; with power 2 new examples come at a constant rate per known one",
            formula="(x·(1−b^p) + b^p)^(1/p)",
            source="Platanios et al. 2019 (arXiv 1903.09848), whose c0 is b and whose T is aT",
            clamp="1 from aT on; b where b^p underflows",
            reads=_POWERED,
            share=_over_time(_competence),
        ),
        PacingEntry(
            name="baby_steps",
            help="grows by one bucket at the beginning of each phase",
            formula="b + (1−b)·⌊K·x⌋/(K−1)",
            source="Spitkovsky et al. 2010 (N10-1116); Cirik et al. 2016 (arXiv 1611.06204)",
            clamp="1 from the K-th phase on, which begins at aT·(K−1)/K; b = 1/K gives equal buckets",
            reads=_PLAIN | {"buckets"},
            share=_baby_steps,
            begins_at_start=False,
        ),
    ),
)

# Each setting with the kinds that read it.
READ_BY: Table = {
    name: (among("kind", PACINGS.reading(name), of=PACINGS),) for name in ("start", "until", "power", "buckets")
}


def _steps(step: Any, total: Any) -> NDArray[np.int64]:
    if isinstance(total, bool) or not isinstance(total, int | np.integer) or total < 1:
        raise SparsortError(f"a pacing over total = {total!r} steps; expected a whole number of at least 1.")
    steps = np.asarray(step)
    if steps.size == 0:
        return steps.astype(np.int64)
    if steps.dtype.kind not in "iu":
        raise SparsortError(f"a pacing got steps of type {steps.dtype}; steps are whole numbers from 0 to {total - 1}.")
    lowest, highest = int(steps.min()), int(steps.max())
    if lowest < 0 or highest >= total:
        wrong = lowest if lowest < 0 else highest
        raise SparsortError(
            f"a pacing got step {wrong} of total = {total}; steps count from 0 to {total - 1}. "
            "Pass the number of steps of the whole training as total."
        )
    return steps.astype(np.int64)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SparsortError(f"a pacing has {name} = {value!r}; expected a number.")
    return float(value)


def _share(name: str, value: object, meaning: str, example: float) -> float:
    number = _number(name, value)
    if not 0 < number <= 1:
        hint = f" For {number:g} percent write {number / 100:g}." if 2 <= number <= 100 else ""
        raise SparsortError(
            f"a pacing has {name} = {number!r}. It is {meaning}, above 0 and at most 1: "
            f"{name}={example} means {example:.0%}.{hint}"
        )
    return number


def _set(pacing: Pacing, name: str, value: float) -> None:
    """Set a field of the frozen dataclass to a plain Python number; a NumPy number would appear in its text and JSON."""
    object.__setattr__(pacing, name, value)
