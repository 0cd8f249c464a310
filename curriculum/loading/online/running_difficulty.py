"""A running difficulty for each example, from measurements at different times of training (NumPy only).

Contract: folding observations in one call, or in several calls split between steps, and in any order of delivery from the ranks,
gives bitwise the same state. Every operation involved (+ − × ÷ √, powers of two) is exactly rounded by IEEE 754, and sums
have a fixed order, so the state is also the same on every rank and machine. It takes 16 bytes per row.

The model changes during training, and the curriculum decides which examples are measured at which time. A value is therefore
made comparable in two steps:

1. Standardise it within its time: z = (v − m) / s, clipped to ±4, where m and s are mean and deviation of recent values. The
   weight of a step's observations halves for every `window` later observations. The step itself counts, later ones do not. The
   window is counted in observations, because their number determines the precision of m: one step of 8 observations alone
   would give m a standard error of 0.35 s.
2. Equate it to the whole data set: z alone would make the easiest examples of a hard stage easy. Let the priors of the examples
   that were seen together have mean m_p and deviation s_p (0 and 1 over all rows). If prior and observation have the
   correlation ρ (`prior_trust`), the difficulties of these examples have mean ρ·m_p and variance ρ²·s_p² + 1 − ρ² (selection on
   a variable, Lawley 1943; with ρ = 1 it is mean-sigma equating, Kolen and Brennan 2014, section 6.3.2), so z is scaled to that
   mean and deviation. The anchor is the prior and not the running estimate: the estimate is shrunk towards the prior, and using
   it as the anchor would shrink it further each time.

In simulated training of three epochs, with known drift and true difficulty, in sorted order (from a growing pool), the result
ranks rows with a Spearman correlation of 0.94 (0.91) if prior and truth correlate by 0.9, 0.89 (0.84) for 0.6, and 0.82 (0.77)
for 0.3. Values that are only standardised within their step reach 0.29 (0.76), 0.67 (0.85) and 0.84 (0.88): better if the prior
is poor, and worthless if the order is good. A mean of raw values reaches 0.95 (0.64), 0.87 (0.58) and 0.80 (0.52).

A row's observations are averaged with weights that decrease by the factor `decay` with each newer observation and by half every
`half_life_steps`. The prior takes part with `prior_weight`, so a row that is not measured again returns to its prior.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from sparsort.curriculum.loading.online.observations import Observations as Observations
from sparsort.errors import SparsortError
from sparsort.storage import integrity
from sparsort.storage.files import write_atomically

_KIND, _VERSION = "sparsort running difficulty", 2
# The first version, whose arrays have no digests, and which is still read.
_WITHOUT_DIGESTS = 1
# A value more than four deviations from its contemporaries only means "very hard" (or easy); it must not dominate the average.
_CLIP = 4.0
# The largest magnitude of a value, whose square is still finite in float64.
_LARGEST = 1e100
_LAST_STEP = np.iinfo(np.int32).max

_NEXT_STEP = "Resume from another checkpoint, or start without it."

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class RunningDifficulty:
    """Folds observations into one difficulty per row.

    Args:
        n_rows: N, number of rows of the data.
        prior: (N,) difficulty before training, on any scale, since only its ranks count; NaN gets the middle rank. None if there
            is no prior: every row then starts in the middle.
        decay: factor on the weight of a row's earlier observations when a newer one is folded, in [0, 1).
        half_life_steps: number of steps after which the weight of an observation has halved; None for no effect of age.
        window: number of later observations after which an observation counts half in mean and deviation.
        prior_weight: weight of the prior, relative to 1 for a new observation.
        prior_trust: assumed correlation of prior and observation, in [0, 1]; it is taken as 0 if the prior is constant.
        fingerprint: fingerprint of the plan that the rows belong to; a state of another plan is refused.

    Raises:
        SparsortError: a number is out of range, or the prior has another length.
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
            raise SparsortError(f"prior has shape {given.shape}; expected one difficulty per row, ({n_rows},).")
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
        """The first step that can still be folded, which is the one after the last folded step."""
        return self._next_step

    def fold(self, observations: Observations) -> None:
        """Fold complete steps: all observations of a step, from all ranks, must come in one call.

        Raises:
            SparsortError: a row or a step is out of range, or a step was already folded.
        """
        if not len(observations):
            return
        ordered = observations.ordered()
        first, last = int(ordered.steps[0]), int(ordered.steps[-1])
        if not self._next_step <= first <= last < _LAST_STEP:
            raise SparsortError(
                f"observations of steps {first} to {last}, but steps before {self._next_step} are already folded (and "
                f"{_LAST_STEP} is out of range). Gather those of every rank first, then fold each step once, in order."
            )
        if not 0 <= ordered.rows.min() <= ordered.rows.max() < len(self):
            raise SparsortError(
                f"observations of rows {ordered.rows.min()} to {ordered.rows.max()}, but the data has rows 0 to {len(self) - 1}."
            )
        self._next_step = last + 1
        standard, usable = self._standardise(ordered)
        rows, steps, standard = ordered.rows[usable], ordered.steps[usable], standard[usable]
        # The observations of one row must be folded in order, while rows are independent of each other. So each pass folds one
        # observation per row: first all first observations, then all second ones, and so on.
        for positions in _by_occurrence(rows):
            self._update(rows[positions], steps[positions], standard[positions])

    def difficulty(self, step: int) -> Floats:
        """(N,) difficulty at `step`, without NaN, in units of the deviation of the prior's ranks; higher is harder.

        Raises:
            SparsortError: `step` is before the last folded step.
        """
        if step < self._next_step:
            raise SparsortError(
                f"steps before {self._next_step} are already folded; pass that step or a later one, not {step}."
            )
        weight = self._weight * self._faded(step - self._seen.astype(np.int64))
        prior_weight = self._settings["prior_weight"]
        result: Floats = (prior_weight * self._prior.astype(np.float64) + weight * self._value) / (
            prior_weight + weight
        )
        return result

    def save(self, path: Path | str) -> None:
        """Write the whole state to one safetensors file, atomically, with digests of its content."""
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
            # The metadata is a single entry, because safetensors writes several entries in no fixed order, and equal states
            # should give equal files.
            save_file(self._arrays(), str(temporary), metadata={"sparsort": json.dumps(integrity.seal(about))})

    @classmethod
    def load(cls, path: Path | str, *, fingerprint: str | None = None) -> RunningDifficulty:
        """Read a state, bitwise as it was saved.

        Args:
            path: the file that `save` wrote.
            fingerprint: fingerprint of the plan that training continues; None accepts any plan.

        Raises:
            SparsortError: the file does not exist, has another kind or version, belongs to another plan, or has changed since
                it was written.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                about = integrity.parse_own_json((file.metadata() or {}).get("sparsort", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise SparsortError(f"cannot read the running difficulty {path}: {error}. {_NEXT_STEP}") from error
        if not isinstance(about, dict):
            raise SparsortError(f"{path} is not what sparsort writes. {_NEXT_STEP}")
        if about.get("kind") != _KIND:
            raise SparsortError(f"{path} is {about.get('kind', 'another file')!r}; expected {_KIND!r}. {_NEXT_STEP}")
        other = "Use the sparsort that wrote it, or start again."
        integrity.check_version(
            about.get("version"), (_WITHOUT_DIGESTS, _VERSION), Path(path), damaged=_NEXT_STEP, other=other
        )
        with integrity.as_written(path, next_step=_NEXT_STEP):
            if about["version"] == _VERSION:
                integrity.check_seal(about, Path(path), next_step=_NEXT_STEP)
                intact = about["arrays"] == _digests(arrays)
            else:
                intact = _is_possible(about, arrays)
            if not intact:
                raise SparsortError(f"{path} is damaged: its content has changed since it was written. {_NEXT_STEP}")
            if fingerprint is not None and about["fingerprint"] != fingerprint:
                raise SparsortError(
                    f"{path} belongs to the plan {about['fingerprint']!r}, not to {fingerprint!r}, so its rows differ. "
                    "Resume with the plan that it was made for, or start without it."
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

    def _standardise(self, observations: Observations) -> tuple[Floats, NDArray[np.bool_]]:
        """Convert values to the common scale and update the recent moments.

        Args:
            observations: ordered observations.

        Returns:
            The converted values, (n,), and whether each is usable: the values of its time were not all equal, (n,).
        """
        prior = self._prior[observations.rows].astype(np.float64)
        values = np.clip(observations.values, -_LARGEST, _LARGEST)
        # Observations are sorted by step: `starts` has the first observation of each step, `group` numbers the steps.
        starts = np.flatnonzero(np.diff(observations.steps, prepend=-1))
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(observations)))
        count = np.bincount(group).astype(np.float64)
        moments = [count, *_mean_and_square(group, count, values), *_mean_and_square(group, count, prior)]
        after = np.empty((len(starts), 5))
        window, recent = self._settings["window"], tuple(self._recent.tolist())
        # A loop over steps in order, since each step decays the moments of the past.
        for number, step in enumerate(zip(*(moment.tolist() for moment in moments), strict=True)):
            recent = after[number] = _move_on(recent, step, halvings(step[0] / window))
        self._recent[:] = recent

        weight, mean, square, prior_mean, prior_square = after.T
        deviation = np.sqrt(square / weight)
        # Equal values can have a small deviation from rounding alone, of some ulp of their mean.
        is_usable = deviation > 1e-12 * np.abs(mean)
        # A prior that is 0 everywhere carries no information.
        trust = self._settings["prior_trust"] if self._prior.any() else 0.0
        centre = trust * prior_mean
        spread = np.sqrt(trust * trust * (prior_square / weight) + (1.0 - trust * trust))
        z = (values - mean[group]) / np.where(is_usable, deviation, 1.0)[group]
        return centre[group] + spread[group] * np.clip(z, -_CLIP, _CLIP), is_usable[group]

    def _update(self, rows: Integers, steps: Integers, standard: Floats) -> None:
        """Fold one observation per row into the averages; the rows are distinct."""
        old_weight = self._weight[rows] * self._faded(steps - self._seen[rows]) * self._settings["decay"]
        weight = old_weight + 1.0
        old = self._value[rows].astype(np.float64)
        self._value[rows] = old + (standard - old) / weight
        self._weight[rows] = weight
        self._seen[rows] = steps

    def _faded(self, age: Integers) -> Floats:
        """The factor on a weight after `age` steps."""
        half_life = self._settings["half_life_steps"]
        return np.ones(len(age)) if half_life is None else halvings(age / half_life)


def _digests(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Type, shape and digest of each array, as JSON values."""
    return {
        name: [str(array.dtype), list(array.shape), integrity.digest_of_bytes(array.tobytes())]
        for name, array in arrays.items()
    }


def _is_possible(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether `save` could have written this state; the check for states without digests."""
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
        # Standard ranks have absolute values of at most √3, which bounds both their mean and their deviation.
        and bool((np.abs(arrays["value"]) <= (_CLIP + 1) * math.sqrt(3)).all())
    )


def standard_ranks(difficulty: ArrayLike) -> NDArray[np.float32]:
    """(N,) ranks, standardised to mean 0 and deviation 1; ties share their mean rank, and NaN becomes 0."""
    given = np.asarray(difficulty)
    result = np.zeros(len(given), np.float32)
    scored = np.flatnonzero(~np.isnan(given))
    n = len(scored)
    if n > 1:
        # Mean and deviation are those of 1 … n without ties, which depend on n alone.
        result[scored] = (rankdata(given[scored]) - (n + 1) / 2) / math.sqrt((n * n - 1) / 12)
    return result


def halvings(x: Any) -> Any:
    """2^−x for x ≥ 0, interpolated linearly between integers: powers of two are exact, while `exp` differs between machines."""
    if isinstance(x, float):
        # Beyond 1100 halvings a float64 is 0 anyway; the limit keeps the exponent in range.
        whole = min(math.floor(x), 1100)
        return math.ldexp(1.0 - min(x - whole, 1.0) / 2, -whole)
    floor = np.minimum(np.floor(x), 1100)
    return np.ldexp(1.0 - np.minimum(x - floor, 1.0) / 2, -floor.astype(np.int32))


def _mean_and_square(group: Integers, count: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Mean of each group, and the sum of squared deviations from it. `bincount` adds one by one, so the order is fixed."""
    mean = np.bincount(group, values) / count
    return mean, np.asarray(np.bincount(group, np.square(values - mean[group])), dtype=np.float64)


def _move_on(recent: tuple[float, ...], step: tuple[float, ...], keep: float) -> tuple[float, ...]:
    """Merge the decayed moments of the past with those of a new step (Chan, Golub and LeVeque 1983).

    Args:
        recent: the weight, then mean and sum of squared deviations of the values, then the same two of the priors.
        step: the same five numbers of the new step.
        keep: the factor on the weight of the past.
    """
    past, new = recent[0] * keep, step[0]
    weight = past + new
    joined = [weight]
    # Entries 1 and 2 belong to the values, entries 3 and 4 to the priors.
    for i in (1, 3):
        apart = step[i] - recent[i]
        joined.append(recent[i] + apart * new / weight)
        joined.append(recent[i + 1] * keep + step[i + 1] + apart * apart * past * new / weight)
    return tuple(joined)


def _by_occurrence(rows: Integers) -> list[Integers]:
    """Split the positions of `rows`: entry k has the position of every row's k-th occurrence."""
    if not len(rows):
        return []
    by_row = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[by_row], prepend=-1))
    # The number of an occurrence is its distance from the first one, since a stable sort keeps their order.
    occurrence = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    ordered = by_row[np.argsort(occurrence, kind="stable")]
    return np.split(ordered, np.cumsum(np.bincount(occurrence))[:-1])


def _check(name: str, given: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise SparsortError(f"{name} is {given}; expected {expected}.")
