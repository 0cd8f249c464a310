"""Distributions over labels, from the scores that a model gives them: checked, normalised, averaged and compared.

Contract: all numbers are fp64 and natural logarithms, so that a label at −1000 is no problem and entropies are in nats.
Scores need not be normalised. Invalid scores (NaN, +inf, a query for which no label is possible) are refused with their
position.

Shapes: the last axis is L labels; the caller names the axes before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

Floats = NDArray[np.float64]


def numbers(values: Any, axes: tuple[str, ...], *, argument: str) -> Floats:
    """`values` in fp64, with one axis for every name in `axes`, each of at least one entry.

    Args:
        values: an array, or nested sequences of numbers.
        axes: the plural names of the axes, such as ("orders", "probes").
        argument: the name of the caller's argument, for error messages.

    Raises:
        SparsortError: not numbers, another number of axes, or an axis without entries.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise SparsortError(
            f"{argument} cannot be read as an array of numbers ({error}). Pass one of shape ({', '.join(axes)})."
        ) from error
    if array.ndim != len(axes):
        raise SparsortError(f"{argument} has shape {array.shape}; expected {len(axes)} axes: ({', '.join(axes)}).")
    for name, size in zip(axes, array.shape, strict=True):
        if size == 0:
            raise SparsortError(f"{argument} has shape {array.shape}, so there are no {name}. Give at least one.")
    return array


def label_scores(log_p: Any, axes: tuple[str, ...], *, argument: str = "log_p") -> Floats:
    """`log_p` in fp64, checked to be scores of at least two labels.

    Args:
        log_p: log-probabilities of labels, normalised or not; −inf for an impossible label.
        axes: the plural names of the axes before the labels.
        argument: the name of the caller's argument, for error messages.

    Raises:
        SparsortError: as `numbers`, or fewer than two labels, NaN, +inf, or −inf for all labels.
    """
    array = numbers(log_p, (*axes, "labels"), argument=argument)
    if array.shape[-1] < 2:
        raise SparsortError(
            f"{argument} has shape {array.shape}, which is a single label, so all orders would tie. "
            "Name all labels of the task, at least two."
        )
    bad = np.isnan(array) | np.isposinf(array)
    if bad.any():
        index = tuple(np.argwhere(bad)[0].tolist())
        raise SparsortError(
            f"{argument} is {array[index]} at {_describe(index, (*axes, 'labels'))}. "
            "A score is a finite log-probability, or -inf for an impossible label; check that prompt."
        )
    impossible = np.isneginf(array).all(axis=-1)
    if impossible.any():
        index = tuple(np.argwhere(impossible)[0].tolist())
        raise SparsortError(
            f"{argument} is -inf for every label at {_describe(index, axes)}. At least one must be possible."
        )
    return array


def gold_labels(gold_P: Any, probes: int, labels: int) -> NDArray[np.int64]:
    """The indices of the right labels, (P,), checked to fit `probes` rows and `labels` labels.

    Raises:
        SparsortError: another number of indices, or one that belongs to no label.
    """
    array = numbers(gold_P, ("probes",), argument="gold")
    if len(array) != probes:
        raise SparsortError(f"gold has {len(array)} labels for {probes} probes. Give one each.")
    # NaN differs from its own floor, so it is bad too.
    bad = (array != np.floor(array)) | (array < 0) | (array >= labels)
    if bad.any():
        raise SparsortError(
            f"gold is {array[bad][0]:g} for probe {int(np.argmax(bad))} (from 0); "
            f"expected the position of a label, 0 to {labels - 1}."
        )
    return array.astype(np.int64)


def log_softmax(scores: Floats) -> Floats:
    """The scores normalised over the last axis, in logarithms; at least one of each row must be finite."""
    # Imported here, because the help of a command reads the table of criteria.
    from scipy import special

    normalised: Floats = special.log_softmax(scores, axis=-1)
    return normalised


def log_mean(log_p: Floats, axis: int) -> Floats:
    """ln of the mean of exp(log_p) over an axis, computed without underflow; −inf if all entries are −inf."""
    # `scipy.special.logsumexp` rounds differently, and the stored scores were computed with this sum.
    highest = log_p.max(axis=axis, keepdims=True)
    # −inf − −inf would be NaN.
    safe = np.where(np.isneginf(highest), 0.0, highest)
    total = np.exp(log_p - safe).sum(axis=axis)
    averaged = np.full(total.shape, -np.inf)
    np.log(total / log_p.shape[axis], out=averaged, where=total > 0)
    mean: Floats = averaged + safe.squeeze(axis)
    return mean


def entropy(log_p: Floats) -> Floats:
    """−Σ p ln p over the last axis, in nats, with 0 ln 0 = 0.

    The terms are added in ascending order, so that two distributions that differ only in the order of the labels have the same
    entropy to the last bit, and tie.
    """
    p = np.exp(log_p)
    terms = np.sort(np.multiply(p, -log_p, where=p > 0, out=np.zeros_like(p)), axis=-1)
    total: Floats = terms.sum(axis=-1)
    return total


def divergence(log_p: Floats, log_q: Floats) -> Floats:
    """KL(p ‖ q) = Σ p (ln p − ln q) over the last axis, in nats, at least 0; q must be positive wherever p is."""
    p, shape = np.exp(log_p), np.broadcast_shapes(log_p.shape, log_q.shape)
    ratio = np.subtract(log_p, log_q, where=np.broadcast_to(p > 0, shape), out=np.zeros(shape))
    # Rounding can make the sum of two nearly equal distributions negative.
    total: Floats = np.maximum((p * ratio).sum(axis=-1), 0.0)
    return total


def _describe(index: tuple[int, ...], axes: tuple[str, ...]) -> str:
    return ", ".join(f"{name.removesuffix('s')} {at}" for name, at in zip(axes, index, strict=True)) + " (from 0)"
