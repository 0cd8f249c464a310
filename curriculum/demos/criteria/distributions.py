"""Distributions over labels, from the scores that a model gives them: normalised, averaged, compared.

Contract: fp64 and in logarithms throughout, so that a label at −1000 does no harm. Scores need not be normalised; what
is not a score (NaN, +inf, a query under which no label is possible) is refused with its position. Natural logarithms,
so entropies are in nats.

Shapes: the last axis is L labels; the axes before it are named by the caller.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

Floats = NDArray[np.float64]


def numbers(values: Any, axes: tuple[str, ...], *, what: str) -> Floats:
    """`values` in fp64 with one axis for every name in `axes`, none of them empty.

    Args:
        values: an array, or nested sequences of numbers.
        axes: what each axis counts, in the plural: ("orders", "probes").
        what: what the caller calls `values`, for errors.

    Raises:
        SparsortError: not numbers, another number of axes, or an axis without entries.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise SparsortError(
            f"{what} cannot be read as an array of numbers ({error}). Pass one of shape ({', '.join(axes)})."
        ) from error
    if array.ndim != len(axes):
        raise SparsortError(f"{what} has shape {array.shape}; expected {len(axes)} axes: ({', '.join(axes)}).")
    for name, size in zip(axes, array.shape, strict=True):
        if size == 0:
            raise SparsortError(f"{what} has shape {array.shape}, so there are no {name}. Give at least one.")
    return array


def label_scores(log_p: Any, axes: tuple[str, ...], *, what: str = "log_p") -> Floats:
    """`log_p` in fp64, checked to be scores of two labels or more.

    Args:
        log_p: log-probabilities of labels, normalised or not; −inf is a label that is impossible.
        axes: what the axes before the labels count, in the plural.
        what: what the caller calls `log_p`, for errors.

    Raises:
        SparsortError: as `numbers`; fewer than two labels; NaN or +inf; every label at −inf.
    """
    array = numbers(log_p, (*axes, "labels"), what=what)
    if array.shape[-1] < 2:
        raise SparsortError(
            f"{what} has shape {array.shape}, which is a single label: nothing is left to choose by. "
            "Name all labels of the task, at least two."
        )
    bad = np.isnan(array) | np.isposinf(array)
    if bad.any():
        place = tuple(np.argwhere(bad)[0].tolist())
        raise SparsortError(
            f"{what} is {array[place]} at {_place(place, (*axes, 'labels'))}. "
            "A score is a finite log-probability, or -inf for an impossible label; look at that prompt."
        )
    impossible = np.isneginf(array).all(axis=-1)
    if impossible.any():
        place = tuple(np.argwhere(impossible)[0].tolist())
        raise SparsortError(f"{what} is -inf for every label at {_place(place, axes)}. At least one must be possible.")
    return array


def log_softmax(scores: Floats) -> Floats:
    """The scores normalised over the last axis, in logarithms; at least one of them must be finite."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    normalised: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def log_mean(log_p: Floats, axis: int) -> Floats:
    """log of the mean of exp(log_p) over an axis, without leaving the logarithms; −inf where all are."""
    highest = log_p.max(axis=axis, keepdims=True)
    safe = np.where(np.isneginf(highest), 0.0, highest)
    total = np.exp(log_p - safe).sum(axis=axis)
    averaged = np.full(total.shape, -np.inf)
    np.log(total / log_p.shape[axis], out=averaged, where=total > 0)
    mean: Floats = averaged + safe.squeeze(axis)
    return mean


def entropy(log_p: Floats) -> Floats:
    """−Σ p ln p over the last axis, in nats, with 0 ln 0 = 0.

    The terms are added in ascending order, so that two distributions that differ only in which label is which have the
    same entropy to the last bit, and tie.
    """
    p = np.exp(log_p)
    terms = np.sort(np.multiply(p, -log_p, where=p > 0, out=np.zeros_like(p)), axis=-1)
    total: Floats = terms.sum(axis=-1)
    return total


def divergence(log_p: Floats, log_q: Floats) -> Floats:
    """KL(p ‖ q) = Σ p (ln p − ln q) over the last axis, in nats, never below 0; q must be positive where p is."""
    p, shape = np.exp(log_p), np.broadcast_shapes(log_p.shape, log_q.shape)
    ratio = np.subtract(log_p, log_q, where=np.broadcast_to(p > 0, shape), out=np.zeros(shape))
    total: Floats = np.maximum((p * ratio).sum(axis=-1), 0.0)
    return total


def _place(place: tuple[int, ...], axes: tuple[str, ...]) -> str:
    return ", ".join(f"{name.removesuffix('s')} {at}" for name, at in zip(axes, place, strict=True)) + " (from 0)"
