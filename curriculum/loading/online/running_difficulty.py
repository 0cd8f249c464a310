"""A running difficulty per example, from what a model showed of it at different times of its training (NumPy only).

Contract: folding observations at once, or in several calls cut between steps, in whatever order the ranks delivered them,
gives bitwise the same state. Every operation that decides it (+ − × ÷ √, powers of two) is exactly rounded by IEEE 754 and
sums run in a fixed order, so it is the same on every rank and machine too. 16 bytes a row.

The model drifts while it trains, and a curriculum chooses which examples meet which model. So a value is first made
comparable, in two moves:

1. Standardised within its time: z = (v − m) / s, clipped to ±4, where m and s are mean and deviation of the values seen of
   late, each step's observations fading by half for every `window` that came after. The step itself counts; later ones do
   not. The window is counted in observations, since that is what m is precise in: a step of 8 alone would know m to 0.35 s.
2. Equated to the whole: z alone would call the easiest of a hard stage easy. Those who were seen together have priors
   of mean m_p and deviation s_p (1 and 0 over all rows), and if prior and observation correlate by ρ (`prior_trust`), their
   difficulties have mean ρ·m_p and variance ρ²·s_p² + 1 − ρ² (selection on a variable, Lawley 1943; with ρ = 1 it is
   mean-sigma equating, Kolen and Brennan 2014, section 6.3.2). So z is brought to that mean and deviation. The anchor is the
   prior, not the running estimate: that one is shrunk, and an anchor that shrinks would shrink it further each time.

In simulated training of three epochs, where drift and true difficulty are known, in sorted order (from a growing pool), the
result ranks rows with a Spearman's ρ of 0.94 (0.91) if prior and truth correlate 0.9, of 0.89 (0.84) for 0.6 and of 0.82
(0.77) for 0.3. Values only standardised within their step have 0.29 (0.76), 0.67 (0.85) and 0.84 (0.88): better where the
prior is poor, and worthless where the order is good. A mean of raw values has 0.95 (0.64), 0.87 (0.58) and 0.80 (0.52).

A row's observations are averaged with weights that fall by `decay` with each newer one and by half every
`half_life_steps`; the prior stands beside them with `prior_weight`, so what is not measured again returns to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.curriculum.loading.online.observations import Observations as Observations
from sparsort.errors import SparsortError
from sparsort.storage import integrity
from sparsort.storage.files import write_atomically

_KIND, _VERSION = "sparsort running difficulty", 2
_WITHOUT_DIGESTS = 1  # still read
# Beyond four deviations of its contemporaries a value says no more than "very hard", and must not own the average.
_CLIP = 4.0
_LARGEST = 1e100  # whose square a float64 still holds
_LAST_STEP = np.iinfo(np.int32).max

_OTHERWISE = "Resume from another checkpoint, or start without it."

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class RunningDifficulty:
    """Observations folded into one difficulty a row.

    Args:
        n_rows: N, rows of the data.
        prior: (N,) difficulty before training, any scale: only its ranks count. A NaN stands in the middle. None: no prior,
            every row starts in the middle.
        decay: what an observation weighs once a newer one has come, in [0, 1).
        half_life_steps: after as many steps an observation weighs half; None: age does not matter.
        window: observations after which what was seen before counts half in mean and deviation.
        prior_weight: weight of the prior beside a fresh observation's 1.
        prior_trust: assumed correlation of prior and observation, in [0, 1]; with a prior that is constant it is 0.
        fingerprint: of the plan that the rows belong to; a state of another one is refused.

    Raises:
        SparsortError: a number out of its range, or a prior of another length.
    """

    def __init__(
        self,
        n_rows: int,
        *,
        prior: ArrayLike | None = None,
        decay: float = 0.7,
        half_life_steps: float | None = None,
        window: float = 512,
        prior_weight: float = 1.0,
        prior_trust: float = 0.5,
        fingerprint: str = "",
    ) -> None:
        _check("n_rows", n_rows, n_rows >= 1, "at least 1")
        _check("decay", decay, 0 <= decay < 1, "a number from 0 to below 1")
        if half_life_steps is not None:
            _check("half_life_steps", half_life_steps, 0 < half_life_steps < math.inf, "above 0, or None")
        _check("window", window, 0 < window < math.inf, "above 0")
        _check("prior_weight", prior_weight, 0 < prior_weight < math.inf, "above 0")
        _check("prior_trust", prior_trust, 0 <= prior_trust <= 1, "from 0 to 1")
        given = np.zeros(n_rows) if prior is None else np.asarray(prior)
        if given.shape != (n_rows,):
            raise SparsortError(f"prior has shape {given.shape}; expected one difficulty a row, ({n_rows},).")
        self.fingerprint = fingerprint
        self._settings: dict[str, Any] = {
            "decay": float(decay),
            "half_life_steps": None if half_life_steps is None else float(half_life_steps),
            "window": float(window),
            "prior_weight": float(prior_weight),
            "prior_trust": float(prior_trust),
        }
        self._prior = standard_ranks(given)
        self._value = np.zeros(n_rows, np.float32)
        self._weight = np.zeros(n_rows, np.float32)
        self._seen = np.zeros(n_rows, np.int32)
        self._recent = np.zeros(5)
        self._next_step = 0

    def __len__(self) -> int:
        return len(self._prior)

    @property
    def next_step(self) -> int:
        """The first step that may still be folded: one past the last that was."""
        return self._next_step

    def fold(self, observations: Observations) -> None:
        """Take in whole steps: a step's observations, of all ranks, come in one call.

        Raises:
            SparsortError: a row or a step out of range, or a step before the last that was folded.
        """
        if not len(observations):
            return
        found = observations.ordered()
        first, last = int(found.steps[0]), int(found.steps[-1])
        if not self._next_step <= first <= last < _LAST_STEP:
            raise SparsortError(
                f"observations of steps {first} to {last}, but steps before {self._next_step} are folded already (and "
                f"{_LAST_STEP} is too far). Gather those of every rank first, then fold each step once, in order."
            )
        if not 0 <= found.rows.min() <= found.rows.max() < len(self):
            raise SparsortError(
                f"observations of rows {found.rows.min()} to {found.rows.max()}, but the data has rows 0 to {len(self) - 1}."
            )
        self._next_step = last + 1
        standard, usable = self._standardise(found)
        rows, steps, standard = found.rows[usable], found.steps[usable], standard[usable]
        # A row's observations act one after another, but rows do not know of each other: first all firsts, then all seconds.
        for turn in _turns(rows):
            self._update(rows[turn], steps[turn], standard[turn])

    def difficulty(self, step: int) -> Floats:
        """(N,) difficulty as of `step`, without NaN, in deviations of the prior's ranks; higher is harder.

        Raises:
            SparsortError: `step` lies before what was folded.
        """
        if step < self._next_step:
            raise SparsortError(
                f"steps before {self._next_step} are folded; ask for that step or a later one, not {step}."
            )
        weight = self._weight * self._faded(step - self._seen.astype(np.int64))
        prior_weight = self._settings["prior_weight"]
        result: Floats = (prior_weight * self._prior.astype(np.float64) + weight * self._value) / (
            prior_weight + weight
        )
        return result

    def save(self, path: Path | str) -> None:
        """Write the whole state to one safetensors file, atomically, with digests of all that it holds."""
        from safetensors.numpy import save_file

        about = {
            "kind": _KIND,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "settings": self._settings,
            "next_step": self._next_step,
            "arrays": _digests(self._arrays()),
        }
        with write_atomically(Path(path)) as temporary:
            # One entry: safetensors writes several in no fixed order, and equal states should be equal files.
            save_file(self._arrays(), str(temporary), metadata={"sparsort": json.dumps(integrity.seal(about))})

    @classmethod
    def load(cls, path: Path | str, *, fingerprint: str | None = None) -> RunningDifficulty:
        """The state as it was saved, bit by bit.

        Args:
            path: what `save` wrote.
            fingerprint: of the plan that is being continued; None takes any.

        Raises:
            SparsortError: no such file, another kind or version, another plan's, or one that has changed since it was written.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                about = integrity.parse_own_json((file.metadata() or {}).get("sparsort", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise SparsortError(f"cannot read the running difficulty {path}: {error}. {_OTHERWISE}") from error
        if not isinstance(about, dict):
            raise SparsortError(f"{path} is not what sparsort writes. {_OTHERWISE}")
        if about.get("kind") != _KIND or about.get("version") not in (_VERSION, _WITHOUT_DIGESTS):
            raise SparsortError(
                f"{path} is {about.get('kind', 'another file')!r}, version {about.get('version')}; "
                f"expected {_KIND!r}, version {_VERSION}. Use the sparsort that wrote it, or start again."
            )
        with integrity.as_written(path, next_step=_OTHERWISE):
            if about["version"] == _VERSION:
                integrity.check_seal(about, Path(path), next_step=_OTHERWISE)
                intact = about["arrays"] == _digests(arrays)
            else:
                intact = _is_possible(about, arrays)
            if not intact:
                raise SparsortError(f"{path} is damaged: its content has changed since it was written. {_OTHERWISE}")
            if fingerprint is not None and about["fingerprint"] != fingerprint:
                raise SparsortError(
                    f"{path} belongs to the plan {about['fingerprint']!r}, not to {fingerprint!r}: its rows are other rows. "
                    "Resume with the plan it was made with, or start without it."
                )
            state = cls(len(arrays["prior"]), fingerprint=about["fingerprint"], **about["settings"])
            state._next_step = about["next_step"]
            for name, array in state._arrays().items():
                array[:] = arrays[name]
        return state

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "prior": self._prior,
            "value": self._value,
            "weight": self._weight,
            "seen": self._seen,
            "recent": self._recent,
        }

    def _standardise(self, found: Observations) -> tuple[Floats, NDArray[np.bool_]]:
        """Values on the common scale, and which of them say anything; moves the window on. `found` is ordered."""
        prior = self._prior[found.rows].astype(np.float64)
        values = np.clip(found.values, -_LARGEST, _LARGEST)
        starts = np.flatnonzero(np.diff(found.steps, prepend=-1))
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(found)))
        count = np.bincount(group).astype(np.float64)
        moments = [count, *_mean_and_square(group, count, values), *_mean_and_square(group, count, prior)]
        after = np.empty((len(starts), 5))
        window, recent = self._settings["window"], tuple(self._recent.tolist())
        for number, step in enumerate(zip(*(moment.tolist() for moment in moments), strict=True)):
            recent = after[number] = _move_on(recent, step, _halvings(step[0] / window))
        self._recent[:] = recent

        weight, mean, square, prior_mean, prior_square = after.T
        deviation = np.sqrt(square / weight)
        # Rounding alone makes equal values differ by some ulp of their mean.
        says = deviation > 1e-12 * np.abs(mean)
        trust = self._settings["prior_trust"] if self._prior.any() else 0.0
        centre = trust * prior_mean
        spread = np.sqrt(trust * trust * (prior_square / weight) + (1.0 - trust * trust))
        z = (values - mean[group]) / np.where(says, deviation, 1.0)[group]
        return centre[group] + spread[group] * np.clip(z, -_CLIP, _CLIP), says[group]

    def _update(self, rows: Integers, steps: Integers, standard: Floats) -> None:
        """Average one observation each into rows that are all different."""
        old_weight = self._weight[rows] * self._faded(steps - self._seen[rows]) * self._settings["decay"]
        weight = old_weight + 1.0
        old = self._value[rows].astype(np.float64)
        self._value[rows] = old + (standard - old) / weight
        self._weight[rows] = weight
        self._seen[rows] = steps

    def _faded(self, age: Integers) -> Floats:
        """What is left after `age` steps."""
        half_life = self._settings["half_life_steps"]
        return np.ones(len(age)) if half_life is None else _halvings(age / half_life)


def _digests(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Type, shape and digest of each array, as JSON values."""
    return {
        name: [str(array.dtype), list(array.shape), integrity.digest_of_bytes(array.tobytes())]
        for name, array in arrays.items()
    }


def _is_possible(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a state without digests is one that `save` can have written."""
    step, settings = about.get("next_step"), about.get("settings")
    n = len(arrays.get("prior", ()))
    if not (n and isinstance(step, int) and isinstance(settings, dict) and isinstance(about.get("fingerprint"), str)):
        return False
    try:
        fresh = RunningDifficulty(n, **settings)
    except (SparsortError, TypeError):
        return False
    of_its_kind = {name: (array.dtype, array.shape) for name, array in fresh._arrays().items()}
    if settings != fresh._settings or of_its_kind != {name: (a.dtype, a.shape) for name, a in arrays.items()}:
        return False
    seen, weight = arrays["seen"], arrays["weight"]
    return (
        all(bool(np.isfinite(array).all()) for array in arrays.values())
        and bool((weight >= 0).all())
        and bool(((seen >= 0) & (seen < max(1, step)) & ((weight > 0) | (seen == 0))).all())
        # Standard ranks are at most √3, in mean and in deviation.
        and bool((np.abs(arrays["value"]) <= (_CLIP + 1) * math.sqrt(3)).all())
    )


def standard_ranks(difficulty: ArrayLike) -> NDArray[np.float32]:
    """(N,) ranks brought to mean 0 and deviation 1; ties share their mean rank, a NaN has 0."""
    given = np.asarray(difficulty)
    result = np.zeros(len(given), np.float32)
    scored = np.flatnonzero(~np.isnan(given))
    n = len(scored)
    if n > 1:
        order = scored[np.argsort(given[scored], kind="stable")]
        ascending = given[order]
        starts = np.flatnonzero(np.concatenate(([True], ascending[1:] != ascending[:-1])))
        sizes = np.diff(starts, append=n)
        ranks = np.repeat(starts + (sizes - 1) / 2, sizes)
        result[order] = (ranks - (n - 1) / 2) / math.sqrt((n * n - 1) / 12)
    return result


def _halvings(x: Any) -> Any:
    """2^−x for x ≥ 0, straight between whole x: powers of two are exact everywhere, `exp` differs between machines."""
    if isinstance(x, float):
        whole = min(math.floor(x), 1100)
        return math.ldexp(1.0 - min(x - whole, 1.0) / 2, -whole)
    floor = np.minimum(np.floor(x), 1100)
    return np.ldexp(1.0 - np.minimum(x - floor, 1.0) / 2, -floor.astype(np.int32))


def _mean_and_square(group: Integers, count: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Mean of each group, and sum of squared distances from it. bincount adds one by one, in order."""
    mean = np.bincount(group, values) / count
    return mean, np.asarray(np.bincount(group, np.square(values - mean[group])), dtype=np.float64)


def _move_on(recent: tuple[float, ...], step: tuple[float, ...], keep: float) -> tuple[float, ...]:
    """Weight, and mean and sum of squares twice, of a fading past with a new step (Chan, Golub and LeVeque 1983)."""
    past, new = recent[0] * keep, step[0]
    weight = past + new
    joined = [weight]
    for i in (1, 3):
        apart = step[i] - recent[i]
        joined.append(recent[i] + apart * new / weight)
        joined.append(recent[i + 1] * keep + step[i + 1] + apart * apart * past * new / weight)
    return tuple(joined)


def _turns(rows: Integers) -> list[Integers]:
    """Places of `rows` such that turn k holds every row's k-th occurrence."""
    by_row = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[by_row], prepend=-1))
    turn = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    by_turn = by_row[np.argsort(turn, kind="stable")]
    return np.split(by_turn, np.cumsum(np.bincount(turn))[:-1]) if len(rows) else []


def _check(name: str, given: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise SparsortError(f"{name} is {given}; expected {expected}.")
