"""Pacing: the share of the examples, easiest first, that is available at a step of training.

Contract: NumPy only. A share is a pure function of (pacing, step, total): it lies in [b, 1], never falls, is b at step 0
and exactly 1 from step a·T on, where a is read as the decimal that was written (a = 0.1 of 30 steps is step 3, which
0.1 * 30 in binary is not). It is the same number alone and in an array, and on every processor: what IEEE arithmetic
does not round correctly (exp, ln, powers) goes through `decimal`, because NumPy's own differ between processors and
versions in the last bit, and a resume elsewhere must draw the same examples. That costs 10 to 30 µs a step for
exponential, logarithmic, geometric, and roots with p other than 1 and 2; the others take well under 1 µs.

Legend: t step, T total, a `until`, b `start`, p `power`, K `buckets`, x = t/(aT); S is the number of steps asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from decimal import Context, Decimal
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, among, refuse_unread, refuse_unread_fields
from sparsort.errors import SparsortError, unknown_choice

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
PACINGS: tuple[PacingKind, ...] = get_args(PacingKind)


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What a kind of pacing computes before the clamp, whose it is, where the clamp to [b, 1] matters, and what it reads.

    `reads` names the settings of `Pacing` that the formula has; one that it lacks is refused where it is given.
    """

    formula: str
    source: str
    clamp: str
    reads: tuple[str, ...] = ("start", "until")


_WU = "Wu, Dyer, Neyshabur 2021 (arXiv 2012.03107)"
_AFTER = "1 from aT on"
FORMULAS: dict[PacingKind, Formula] = {
    "constant": Formula(
        formula="1", source="no curriculum; Wu et al.'s standard training", clamp="none: b, a are not read", reads=()
    ),
    "linear": Formula(formula="b + (1−b)·x", source=f"{_WU}; Platanios et al. 2019 (arXiv 1903.09848)", clamp=_AFTER),
    "root": Formula(
        formula="b + (1−b)·x^(1/p)",
        source=f"{_WU}, there with p = 2",
        clamp=_AFTER,
        reads=("start", "until", "power"),
    ),
    "quadratic": Formula(formula="b + (1−b)·x²", source=_WU, clamp=_AFTER),
    "step": Formula(formula="b, then 1", source=_WU, clamp="1 from aT on; unclamped code goes on to 1+b, 2+b, …"),
    "exponential": Formula(formula="b + (1−b)·(e^(10x)−1)/(e^10−1)", source=_WU, clamp=_AFTER),
    "logarithmic": Formula(
        formula="b + (1−b)·(1 + ln(x+e^−10)/10)", source=_WU, clamp="1 shortly before aT (at x = 1−e^−10)"
    ),
    "geometric": Formula(
        formula="2^((1−x)·log2 b) = b^(1−x)", source="CurML (Zhou et al. 2022), there with a = 1", clamp=_AFTER
    ),
    "competence": Formula(
        formula="(x·(1−b^p) + b^p)^(1/p)",
        source="Platanios et al. 2019 (arXiv 1903.09848), whose c0 is b and whose T is aT",
        clamp="1 from aT on; b where b^p underflows",
        reads=("start", "until", "power"),
    ),
    "baby_steps": Formula(
        formula="b + (1−b)·⌊K·x⌋/(K−1)",
        source="Spitkovsky et al. 2010 (N10-1116); Cirik et al. 2016 (arXiv 1611.06204)",
        clamp="1 from the K-th phase on, which begins at aT·(K−1)/K; b = 1/K gives equal buckets",
        reads=("start", "until", "buckets"),
    ),
}

# The kinds that read a setting.
READ_BY: Table = {
    name: (among("kind", [kind for kind in PACINGS if name in FORMULAS[kind].reads], of=PACINGS),)
    for name in ("start", "until", "power", "buckets")
}

# Far more digits than a float64 has, so that rounding to one keeps a growing function growing.
_DIGITS = Context(prec=24)
_E10 = float(_DIGITS.exp(Decimal(10)))
_E_10 = float(_DIGITS.exp(Decimal(-10)))


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """How the share of available examples grows over training. `describe()` lists the formulas and their sources.

    Two warnings for who compares: Wu et al.'s published code does not clamp, so its shares pass 1 after a·T; CurML's
    "root-p" is `competence` with the exponent 1/2 whatever p is, right for p = 2 only.

    Attributes:
        kind: the formula.
        start: b, the share that is available at step 0, in (0, 1]. Not read by "constant".
        until: a, the share of training at which everything is available, in (0, 1]. Not read by "constant".
        power: p of "root" and "competence", above 0.
        buckets: K of "baby_steps", which has K phases of equal length: the easiest b of the examples alone, then one
            more of the K−1 equal buckets of the rest in each phase, everything in the last.
        stored: the settings come from a file that was written before, where one that is not read is kept as it is.

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
        if self.kind not in PACINGS:
            raise unknown_choice("pacing", self.kind, PACINGS)
        _set(self, "start", _share("start", self.start, "the share of the examples that is available at step 0", 0.2))
        _set(self, "until", _share("until", self.until, "the share of training after which all are available", 0.5))
        power = _number("power", self.power)
        if not 0 < power < math.inf:
            raise SparsortError(f"a pacing has power = {power!r}; p is a number above 0, such as 2.")
        _set(self, "power", power)
        if isinstance(self.buckets, bool) or not isinstance(self.buckets, int | np.integer) or self.buckets < 1:
            raise SparsortError(f"a pacing has buckets = {self.buckets!r}; a whole number of at least 1 is needed.")
        _set(self, "buckets", int(self.buckets))
        if not stored:
            refuse_unread_fields(self, READ_BY)

    def share(self, step: int | Sequence[int] | NDArray[np.integer[Any]], total: int) -> NDArray[np.float64]:
        """The share of the examples that is available at each step.

        Args:
            step: steps that were done before, 0 ≤ step < total; of any shape S, in any order.
            total: T, the steps of the whole training.

        Returns:
            S, float64 in [b, 1]; for a single step an array without dimensions.

        Raises:
            SparsortError: `total` is not a whole number above 0, or a step is none or outside of 0 … total−1.
        """
        step_S = _steps(step, total)
        if self.kind == "constant":
            return np.ones(step_S.shape)
        length = Fraction(repr(self.until)) * int(total)
        if self.kind == "step":
            share_S = np.full(step_S.shape, self.start)
        elif self.kind == "baby_steps":
            share_S = self._baby_steps(step_S, length)
        else:
            # A step past the end would overflow where aT is tiny.
            x_S = np.minimum(np.minimum(step_S, math.floor(length)) / float(length), 1.0)
            share_S = self._growing(np.atleast_1d(x_S)).reshape(step_S.shape)
        share_S = np.clip(share_S, self.start, 1.0)
        # The formulas meet both ends but for the last bit.
        share_S = np.where(step_S == 0, share_S if self.kind == "baby_steps" else self.start, share_S)
        return np.where(step_S >= math.ceil(length), 1.0, share_S)

    def _growing(self, x_S: NDArray[np.float64]) -> NDArray[np.float64]:
        b, p = self.start, self.power
        if self.kind == "linear":
            grown_S = x_S
        elif self.kind == "quadratic":
            grown_S = x_S * x_S
        elif self.kind == "root":
            grown_S = _root(x_S, p)
        elif self.kind == "exponential":
            grown_S = (_each(_DIGITS.exp, 10 * x_S) - 1) / (_E10 - 1)
        elif self.kind == "logarithmic":
            grown_S = 1 + _each(_DIGITS.ln, x_S + _E_10) / 10
        elif self.kind == "geometric":
            ln_b = _DIGITS.ln(Decimal(b))
            return _each(lambda exponent: _DIGITS.exp(_DIGITS.multiply(exponent, ln_b)), 1 - x_S)
        else:
            start_p = float(_DIGITS.exp(_DIGITS.multiply(Decimal(p), _DIGITS.ln(Decimal(b)))))
            return _root(x_S * (1 - start_p) + start_p, p)
        return b + (1 - b) * grown_S

    def _baby_steps(self, step_S: NDArray[np.int64], length: Fraction) -> NDArray[np.float64]:
        if self.buckets == 1:
            return np.ones(step_S.shape)
        # Whole numbers, so that a phase begins at its very step.
        begins = [math.ceil(length * phase / self.buckets) for phase in range(1, self.buckets)]
        phase_S = np.searchsorted(np.asarray(begins, dtype=np.int64), step_S, side="right")
        return np.asarray(self.start + (1 - self.start) * (phase_S / (self.buckets - 1)), dtype=np.float64)

    @classmethod
    def parse(cls, text: str, *, stored: bool = False) -> Pacing:
        """A pacing from a line: "linear", or "root:start=0.2,until=0.5,power=3".

        Args:
            text: the line.
            stored: see `Pacing`.

        Raises:
            SparsortError: an unknown kind or setting (with the nearest one), one that the kind does not read, or a value out of
                range.
        """
        kind, _, rest = str(text).partition(":")
        values: dict[str, Any] = {"kind": kind.strip()}
        if values["kind"] not in PACINGS:
            raise unknown_choice("pacing", values["kind"], PACINGS)
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
                what = "whole number" if name == "buckets" else "number"
                raise SparsortError(f"the pacing {text!r} has {name} = {value!r}, which is not a {what}.") from error
        made = cls(**values, stored=stored)
        if not stored:
            # One that was given with the value of its default has no effect either.
            refuse_unread(READ_BY, made.to_json(), [name for name in values if name != "kind"])
        return made

    def __str__(self) -> str:
        """What `parse` reads back: the kind, and the settings that are not the default."""
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
        """What `to_json` gave; fields that are not there have their defaults. `stored`: see `Pacing`.

        Raises:
            SparsortError: not a table of fields, an unknown field, or a value out of range.
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


def describe(kinds: Iterable[PacingKind] = PACINGS) -> str:
    """One line a kind, "name  formula  (source)", under a legend, for help texts and documents.

    Raises:
        SparsortError: an unknown kind.
    """
    lines = ["share of the examples at step t of T, b = start, a = until, p = power, K = buckets, x = t/(aT):"]
    for kind in kinds:
        if kind not in FORMULAS:
            raise unknown_choice("pacing", kind, PACINGS)
        entry = FORMULAS[kind]
        lines.append(f"  {kind:<12} {entry.formula:<32} ({entry.source})")
    return "\n".join(lines)


def _each(function: Callable[[Decimal], Decimal], values_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """A function of `decimal` at every element, rounded to float64."""
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
    # ln 0 is −∞ here and e^−∞ is 0, as it should be.
    return _each(lambda value: _DIGITS.exp(_DIGITS.divide(_DIGITS.ln(value), Decimal(p))), values_S)


def _steps(step: Any, total: Any) -> NDArray[np.int64]:
    if isinstance(total, bool) or not isinstance(total, int | np.integer) or total < 1:
        raise SparsortError(f"a pacing over total = {total!r} steps; a whole number of at least 1 is needed.")
    steps = np.asarray(step)
    if steps.size == 0:
        return steps.astype(np.int64)
    if steps.dtype.kind not in "iu":
        raise SparsortError(
            f"a pacing was asked for steps of type {steps.dtype}; steps are whole numbers from 0 to {total - 1}."
        )
    lowest, highest = int(steps.min()), int(steps.max())
    if lowest < 0 or highest >= total:
        wrong = lowest if lowest < 0 else highest
        raise SparsortError(
            f"a pacing was asked for step {wrong} of total = {total}; steps count from 0 to {total - 1}. "
            "Give the steps of the whole training as total."
        )
    return steps.astype(np.int64)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SparsortError(f"a pacing has {name} = {value!r}; a number is needed.")
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
    """Plain Python numbers, so that NumPy's do not end in the text and the JSON of a pacing."""
    object.__setattr__(pacing, name, value)
