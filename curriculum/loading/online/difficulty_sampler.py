"""DifficultySampler: draws prompts for RL by what is known of their pass rates (NumPy only).

Contract: the draws are a function of the prior, the settings and the observed rewards. They are the same on every rank that
observes the same rewards, in whatever order the rewards of a block arrive, and the same after a resume. No generator is used, and
nothing is communicated.

The unit is the block: distinct prompts that are drawn together, such as those of one generation batch. Block b is drawn from the
rewards of the blocks up to b − 1 − `lag`. Which rewards are known at a draw therefore does not depend on how far a data loader
draws ahead, as long as that is at most `lag` blocks. Another `lag` gives other draws.

A prompt's pass rate has a Beta distribution: the prior's pseudo-counts plus its observed rewards. The policy changes, so evidence
halves with age, and a prompt that is not seen again returns to its prior.

Shapes: N prompts, B prompts per block.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.curriculum.loading.online.pass_rates import PassRatePrior
from sparsort.curriculum.loading.online.running_difficulty import halvings
from sparsort.curriculum.loading.plan.shuffling import key_of, uniforms
from sparsort.errors import SparsortError

if TYPE_CHECKING:
    from sparsort.scoring.store.scores import Scores

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Target = Literal["variance"] | tuple[float, float]

_VERSION = 1
# The entries of a state besides its version.
_STATE = {"settings", "counters", "prior", "rows", "passes", "failures", "seen", "ahead"}
_STATE |= {"held_blocks", "held_rows", "held_rewards"}
# Without a pilot, the easiest prompt is assumed to pass 9 times in 10 and the hardest once, with the weight of two rollouts.
_HIGHEST, _LOWEST, _STRENGTH = 0.9, 0.1, 2.0


class DifficultySampler:
    """Draws row numbers; iterate over it, or pass it to a DataLoader as `sampler`.

    `for row in sampler` yields the rest of the current epoch; the next `for` yields the next epoch. An epoch has N // B blocks,
    in which a prompt can be drawn several times, or never.

    Args:
        prior: `Scores` of the N prompts, or an array of N difficulties (higher is harder, NaN is unknown). Until `fit` is
            called, pass rates are assumed to fall evenly with the rank of the difficulty. An integer N means no prior.
        block: B, number of distinct prompts that are drawn together; 1 by default, and set by `DifficultyMixin`.
        target: "variance" weighs a prompt by the expected variance of its reward, which is half the probability that two
            rollouts differ. A pair (low, high) weighs it by the probability that its pass rate is in that band.
        floor: share of the draws that is uniform over all prompts, in [0, 1].
        half_life: number of epochs after which an observed reward counts half; None for no forgetting.
        lag: number of blocks that may be drawn before the rewards of a block are observed; 1 by default, because accelerate
            draws one batch ahead. `DifficultyMixin` sets it.
        seed: seed of all draws.

    Raises:
        SparsortError: an argument is out of range.

    Attributes:
        ids, id_column: the ids of the scores in `prior`, and the column that they were read from; None without such a column.
    """

    def __init__(
        self,
        prior: Scores | ArrayLike | int,
        *,
        block: int | None = None,
        target: Target = "variance",
        floor: float = 0.1,
        half_life: float | None = 1.0,
        lag: int | None = None,
        seed: int = 0,
    ) -> None:
        self._difficulty = _difficulty_of(prior)
        n_rows = len(self._difficulty)
        # Without an id column, a scorer numbers the rows, and a number identifies no row.
        self.id_column: str | None = getattr(prior, "provenance", {}).get("id_column")
        self.ids: list[str] | None = list(prior.ids) if self.id_column is not None else None  # type: ignore[union-attr]
        _check("floor", floor, _is_number(floor) and 0 <= floor <= 1, "a share in [0, 1]")
        is_age = half_life is None or (_is_number(half_life) and 0 < half_life < math.inf)
        _check("half_life", half_life, is_age, "a number above 0, or None")
        is_band = isinstance(target, (tuple, list)) and len(target) == 2 and all(map(_is_number, target))
        is_target = target == "variance" if isinstance(target, str) else is_band and 0 <= target[0] < target[1] <= 1
        _check("target", target, is_target, '"variance", or a band (low, high) in [0, 1]')
        self._given = {"block": block, "lag": lag}
        self._settings: dict[str, Any] = {
            "target": target if isinstance(target, str) else [float(edge) for edge in target],
            "floor": float(floor),
            "half_life": None if half_life is None else float(half_life),
            "seed": seed,
        }
        self.configure()
        self._mean, self._strength = _means_by_rank(self._difficulty), _STRENGTH
        # Evidence: sums of rewards and of missing rewards, and the block of the latest observation.
        self._passes, self._failures = np.zeros(n_rows), np.zeros(n_rows)
        self._seen = np.zeros(n_rows, np.int64)
        self._epoch = self._epoch_start = 0
        # Blocks are numbered over all epochs: the next one to yield, to draw, to observe and to fold into the evidence.
        self._next = self._drawn = self._observed = self._folded = 0
        self._is_observed = False
        # Rows of drawn blocks that may still be observed or yielded again, and rewards that are not yet folded, by block.
        self._pending: dict[int, Rows] = {}
        self._held: dict[int, tuple[Rows, Floats]] = {}
        self._cumulative: Floats | None = None

    def configure(self, *, block: int | None = None, lag: int | None = None, multiple: int = 1) -> None:
        """Set what only the training loop knows; `DifficultyMixin` calls this before the first draw.

        Args:
            block, lag: what training needs, for arguments that were not given.
            multiple: the number of blocks per epoch is a multiple of this, so that an epoch ends with an optimiser step.

        Raises:
            SparsortError: the values given on construction do not fit, or there are too few prompts.
        """
        n_rows, given_block, given_lag = len(self._difficulty), self._given["block"], self._given["lag"]
        if None not in (given_block, block) and given_block != block:
            raise SparsortError(f"training draws {block} prompts together, but block={given_block}; omit block.")
        if given_lag is not None and lag is not None and given_lag < lag:
            raise SparsortError(f"training draws {lag} blocks ahead, but lag={given_lag}; omit lag, or use lag={lag}.")
        if given_block is None and block is not None and block > n_rows:
            raise SparsortError(
                f"a generation batch has {block} distinct prompts, and there are only {n_rows}. Use a smaller generation batch "
                "(in TRL, generation_batch_size, or a smaller per_device_train_batch_size), or more prompts."
            )
        block = next(value for value in (given_block, block, 1) if value is not None)
        lag = next(value for value in (given_lag, lag, 1) if value is not None)
        _check("block", block, _is_whole(block) and 1 <= block <= n_rows, f"1 to the {n_rows} prompts")
        _check("lag", lag, _is_whole(lag) and lag >= 0, "a whole number of at least 0")
        self.block, self.lag = block, lag
        # A state with a larger lag may raise `lag`, but training needs this one.
        self._least_lag = lag
        self._blocks_per_epoch = n_rows // block // multiple * multiple
        if not self._blocks_per_epoch:
            raise SparsortError(
                f"an optimiser step needs {multiple} blocks of {block} prompts, and there are {n_rows} prompts. Use a "
                "smaller batch."
            )
        self._settings |= {"block": block, "lag": lag, "blocks_per_epoch": self._blocks_per_epoch}

    def __len__(self) -> int:
        """The number of rows that an epoch draws."""
        return self._blocks_per_epoch * self.block

    @property
    def n_rows(self) -> int:
        """N, the number of prompts."""
        return len(self._difficulty)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def awaited(self) -> Rows | None:
        """The rows of the oldest block whose rewards were not observed, (B,); None if there is none."""
        return self._pending.get(self._observed)

    @property
    def strength(self) -> float:
        """The number of rollouts that the prior is worth."""
        return self._strength

    def fit(self, scores: Scores | ArrayLike, pass_rates: ArrayLike, *, rollouts: ArrayLike) -> DifficultySampler:
        """Calibrate the prior on a pilot; see `PassRatePrior.fit`.

        Args:
            scores: scores of the n pilot prompts, by the same scorer as the prior.
            pass_rates: (n,) mean reward of each, in [0, 1].
            rollouts: number of rollouts that each pass rate is the mean of, one number or (n,).

        Returns:
            This sampler.

        Raises:
            SparsortError: blocks were drawn already, or the pilot cannot be fitted.
        """
        if self._drawn:
            raise SparsortError("fit must come before the first draw; make a new sampler to calibrate it again.")
        prior = PassRatePrior.fit(_difficulty_of(scores), pass_rates, rollouts)
        self._mean, self._strength = prior.means(self._difficulty), prior.strength
        return self

    def posterior(self) -> tuple[Floats, Floats]:
        """The parameters a and b of the Beta distribution of each pass rate, (N,) each, from all rewards that are folded."""
        half_life = self._settings["half_life"]
        a, b = self._strength * self._mean, self._strength * (1 - self._mean)
        if half_life is None:
            return a + self._passes, b + self._failures
        # A reward of the latest folded block has age 0.
        age = np.maximum(self._folded - 1 - self._seen, 0)
        fresh = halvings(age / (half_life * self._blocks_per_epoch))
        return a + fresh * self._passes, b + fresh * self._failures

    def pass_rates(self) -> Floats:
        """The posterior mean of each pass rate, (N,)."""
        a, b = self.posterior()
        return a / (a + b)

    def weights(self) -> Floats:
        """The probability of each row to be drawn first in the next block, (N,)."""
        a, b = self.posterior()
        target, floor = self._settings["target"], self._settings["floor"]
        weights: Floats
        if target == "variance":
            # Only + − × ÷, which IEEE 754 rounds exactly, so ranks with other processors get the same bits.
            weights = a * b / ((a + b) * (a + b + 1))
        else:
            from scipy.special import betainc

            weights = np.maximum(betainc(a, b, target[1]) - betainc(a, b, target[0]), 0)
        total = np.cumsum(weights)[-1]
        # If no prompt can be in the band, all are equally far from it.
        shares = weights / total if total > 0 else np.full(len(a), 1 / len(a))
        mixed: Floats = floor / len(a) + (1 - floor) * shares
        return mixed

    def __iter__(self) -> Iterator[int]:
        for rows in self._walk():
            *others, last = rows.tolist()
            yield from others
            # Counted before its last row is yielded, since a state that is taken then must refer to the next block.
            self._next += 1
            yield last

    def blocks(self) -> Iterator[Rows]:
        """The same as blocks of rows, (B,) each."""
        for rows in self._walk():
            self._next += 1
            yield rows

    def observe(self, rows: ArrayLike, rewards: ArrayLike) -> None:
        """Record the rewards of one block. Call it once for each block, in the order of the draws, with the rewards of all ranks.

        Args:
            rows: (n,) row of each rollout, in any order.
            rewards: (n,) reward of each rollout in [0, 1]; NaN is skipped.

        Raises:
            SparsortError: the rows are not those of the oldest block without rewards, a reward is out of range, or the block was
                observed too late.
        """
        rows_n, rewards_n = np.asarray(rows).reshape(-1), np.asarray(rewards, dtype=np.float64).reshape(-1)
        if rows_n.shape != rewards_n.shape:
            raise SparsortError(
                f"observe got {len(rows_n)} rows and {len(rewards_n)} rewards; expected one reward per rollout."
            )
        known = ~np.isnan(rewards_n)
        rows_n, rewards_n = rows_n[known].astype(np.int64), rewards_n[known]
        if not ((rewards_n >= 0) & (rewards_n <= 1)).all():
            wrong = float(rewards_n[(rewards_n < 0) | (rewards_n > 1)][0])
            raise SparsortError(
                f"a reward is {wrong!r}; a pass rate needs rewards in [0, 1], such as 1 for a verified answer. Scale the "
                "rewards, or observe the verifiable one only."
            )
        number = self._observed
        if number >= self._drawn:
            raise SparsortError("observe was called more often than blocks were drawn; call it once for each block.")
        if self._drawn - number > self.lag + 1:
            raise SparsortError(
                f"{self._drawn - number - 1} blocks were drawn before the rewards of block {number} were observed, but "
                f"lag={self.lag}. Let the data loader draw less far ahead (fewer workers, a smaller prefetch_factor), or raise "
                "lag."
            )
        strangers = np.setdiff1d(rows_n, self._pending[number])
        if len(strangers):
            raise SparsortError(
                f"row {strangers[0]} is not one of block {number}, the oldest without rewards. Observe blocks in the order in "
                "which they were drawn, with the rewards of all ranks."
            )
        # A fixed order of the additions, whatever the order in which the ranks delivered them.
        order = np.lexsort((rewards_n, rows_n))
        self._held[number] = (rows_n[order], rewards_n[order])
        self._observed, self._is_observed = number + 1, True
        self._forget_pending()

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch. For the current epoch, and the one after a complete epoch, nothing is skipped.

        Raises:
            SparsortError: the epoch is not a whole number of at least 0.
        """
        _check("epoch", epoch, _is_whole(epoch) and epoch >= 0, "a whole number of at least 0")
        is_complete = self._next >= self._epoch_start + self._blocks_per_epoch
        if epoch == self._epoch and not is_complete:
            return
        if not is_complete or epoch != self._epoch + 1:
            # Blocks that were drawn for another epoch are dropped, and no rewards will come for them.
            self._observed = self._next = self._drawn
            self._pending.clear()
        self._epoch, self._epoch_start = epoch, self._next

    def state_dict(self) -> dict[str, Any]:
        """The state as NumPy arrays, numbers and text; 8 bytes per prompt and 32 bytes per prompt with rewards.

        It refers to the first block whose rewards were not observed, or, if no rewards are observed, to the first block that was
        not yielded completely. Blocks that were drawn ahead are a part of it and are yielded again.
        """
        seen = np.flatnonzero((self._passes > 0) | (self._failures > 0))
        is_up_to_date = self._is_observed and self._drawn - self._observed <= self.lag + 1
        position = self._observed if is_up_to_date else self._next
        ahead = range(position, self._drawn)
        held = sorted(self._held)
        return {
            "version": _VERSION,
            "settings": dict(self._settings),
            "counters": {
                "epoch": self._epoch,
                "epoch_start": self._epoch_start,
                "position": position,
                "folded": self._folded,
                "is_observed": self._is_observed,
                "strength": self._strength,
            },
            "prior": self._mean.copy(),
            "rows": seen,
            "passes": self._passes[seen],
            "failures": self._failures[seen],
            "seen": self._seen[seen],
            "ahead": np.stack([self._pending[number] for number in ahead])
            if ahead
            else np.zeros((0, self.block), np.int64),
            "held_blocks": np.repeat(np.array(held, np.int64), [len(self._held[number][0]) for number in held]),
            "held_rows": np.concatenate([np.zeros(0, np.int64), *(self._held[number][0] for number in held)]),
            "held_rewards": np.concatenate([np.zeros(0), *(self._held[number][1] for number in held)]),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state, including its prior, so `fit` need not be repeated.

        If `lag` was not given, that of the state is used, since another one gives other draws.

        Raises:
            SparsortError: the state belongs to another version, to other settings, or to another number of prompts, or training
                now draws further ahead than its `lag`.
        """
        is_known = isinstance(state_dict, Mapping) and state_dict.get("version") == _VERSION
        if not is_known or not state_dict.keys() >= _STATE:
            raise SparsortError(f"this is not a whole state of DifficultySampler version {_VERSION}; start without it.")
        saved, now = state_dict["settings"], self._settings
        if self._given["lag"] is None and _is_whole(lag := saved.get("lag")):
            if lag < self._least_lag:
                raise SparsortError(
                    f"the state was written with lag={lag}, and training now draws {self._least_lag} blocks ahead. Use no "
                    "more data loader workers and no larger prefetch factor than before, or start without it."
                )
            now = {**now, "lag": lag}
        if differing := [f"{name} {saved.get(name)!r} → {now[name]!r}" for name in now if saved.get(name) != now[name]]:
            raise SparsortError(
                f"the state was written with other settings ({', '.join(differing)}), which draw other prompts. Use those of the "
                "state, or start without it."
            )
        prior = np.asarray(state_dict["prior"], dtype=np.float64)
        if prior.shape != self._mean.shape:
            raise SparsortError(
                f"the state has {len(prior)} prompts and this sampler {len(self._mean)}. Resume with the same prompts, or start "
                "without it."
            )
        self._settings, self.lag = now, now["lag"]
        counters, rows = state_dict["counters"], np.asarray(state_dict["rows"], dtype=np.int64)
        self._mean, self._strength = prior.copy(), float(counters["strength"])
        for name in ("passes", "failures", "seen"):
            array = getattr(self, f"_{name}")
            array[:] = 0
            array[rows] = np.asarray(state_dict[name])
        position, ahead = int(counters["position"]), np.asarray(state_dict["ahead"], dtype=np.int64)
        self._epoch, self._epoch_start = int(counters["epoch"]), int(counters["epoch_start"])
        self._folded, self._is_observed = int(counters["folded"]), bool(counters["is_observed"])
        self._next = self._observed = position
        self._drawn = position + len(ahead)
        self._pending = {position + place: rows_B.copy() for place, rows_B in enumerate(ahead)}
        blocks = np.asarray(state_dict["held_blocks"], dtype=np.int64)
        held_rows, held_rewards = np.asarray(state_dict["held_rows"]), np.asarray(state_dict["held_rewards"])
        self._held = {int(b): (held_rows[blocks == b], held_rewards[blocks == b]) for b in np.unique(blocks)}
        self._cumulative = None

    def _walk(self) -> Iterator[Rows]:
        """The rest of the epoch. The consumer moves `_next` on."""
        if self._next >= self._epoch_start + self._blocks_per_epoch:
            self._epoch, self._epoch_start = self._epoch + 1, self._next
        while self._next < self._epoch_start + self._blocks_per_epoch:
            if self._next == self._drawn:
                self._draw()
            yield self._pending[self._next]

    def _draw(self) -> None:
        """Draw the next block and keep it as pending."""
        known = self._drawn - self.lag
        for number in sorted(number for number in self._held if number < known):
            self._fold(number, *self._held.pop(number))
        if self._is_observed and self._folded < known:
            # All evidence is one block older now.
            self._folded, self._cumulative = known, None
        if self._cumulative is None:
            self._cumulative = np.cumsum(self.weights())
        key = (self._settings["seed"], self._drawn)
        self._pending[self._drawn] = _draw_distinct(self._cumulative, self.block, *key)
        self._drawn += 1
        self._forget_pending()

    def _fold(self, number: int, rows: Rows, rewards: Floats) -> None:
        """Add the rewards of a block to the evidence of its rows, whose earlier evidence fades until then."""
        distinct, group = np.unique(rows, return_inverse=True)
        half_life = self._settings["half_life"]
        fresh = 1.0
        if half_life is not None:
            fresh = halvings((number - self._seen[distinct]) / (half_life * self._blocks_per_epoch))
        self._passes[distinct] = fresh * self._passes[distinct] + np.bincount(group, rewards, len(distinct))
        self._failures[distinct] = fresh * self._failures[distinct] + np.bincount(group, 1 - rewards, len(distinct))
        self._seen[distinct] = number

    def _forget_pending(self) -> None:
        # A block is needed until its rewards are observed. Without rewards, `lag` bounds how many are kept.
        kept = min(self._next, max(self._observed, self._drawn - self.lag - 1))
        for number in [number for number in self._pending if number < kept]:
            del self._pending[number]


def _difficulty_of(prior: Scores | ArrayLike | int) -> Floats:
    expected = "scores, one difficulty per prompt, or the number of prompts"
    if isinstance(prior, (int, np.integer)):
        _check("prior", prior, not isinstance(prior, bool) and int(prior) >= 1, expected)
        return np.full(int(prior), np.nan)
    try:
        # Scores are recognised by what they have, because their module imports pyarrow.
        values: Floats = np.asarray(getattr(prior, "difficulty", prior), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SparsortError(
            f"prior is a {type(prior).__name__} without numbers ({error}); expected {expected}."
        ) from error
    if values.ndim != 1 or not len(values):
        raise SparsortError(f"prior has the shape {values.shape}; expected {expected}.")
    return values


def _means_by_rank(difficulty: Floats) -> Floats:
    """Pass rates that fall evenly with the rank of the difficulty, (N,); ties share their mean, and NaN gets the middle."""
    means = np.full(len(difficulty), (_HIGHEST + _LOWEST) / 2)
    scored = np.flatnonzero(~np.isnan(difficulty))
    if len(scored) > 1:
        _, group, count = np.unique(difficulty[scored], return_inverse=True, return_counts=True)
        rank = np.cumsum(count) - (count + 1) / 2
        means[scored] = _HIGHEST - (_HIGHEST - _LOWEST) * (rank / (len(scored) - 1))[group]
    return means


def _draw_distinct(cumulative: Floats, count: int, *key: int) -> Rows:
    """Draw rows one after the other, each in proportion to its weight among those that are left.

    Drawing with replacement and dropping repeats has the same distribution. Weights of drawn rows are removed after each round,
    so a few rounds suffice.

    Args:
        cumulative: (N,) cumulative weights, at least one of them positive.
        count: number of rows to draw.
        key: identifies the draw.
    """
    chosen: list[Rows] = []
    remaining, attempt, weights = count, 0, None
    while remaining:
        if attempt:
            weights = np.diff(cumulative, prepend=0.0) if weights is None else weights
            weights[chosen[-1]] = 0.0
            cumulative = np.cumsum(weights)
        if not cumulative[-1] > 0:
            # With a floor of 0, fewer rows than a block may be in the band; the others are equally far from it.
            weights = np.ones(len(cumulative))
            weights[np.concatenate(chosen)] = 0.0
            cumulative = np.cumsum(weights)
        total = cumulative[-1]
        points = np.minimum(uniforms(remaining, key_of("difficulty", *key, attempt)) * total, np.nextafter(total, 0))
        rows = np.searchsorted(cumulative, points, side="right")
        _, first = np.unique(rows, return_index=True)
        chosen.append(rows[np.sort(first)].astype(np.int64))
        remaining -= len(first)
        attempt += 1
    return np.concatenate(chosen)


def _check(name: str, given: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise SparsortError(f"{name} is {given!r}; expected {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
