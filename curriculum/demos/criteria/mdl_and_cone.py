"""A query's own demonstrations, chosen among candidates with the model in the loop: MDL and ConE.

Contract: pure functions of what the model said under each candidate. What costs the model the least wins; ties, and
differences by rounding, go to the earliest candidate, so put the plain nearest neighbours first.

Shapes: Q queries, W candidate sets of a query, N neighbours of a query, L labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, entropy, label_scores, log_softmax, numbers
from sparsort.errors import SparsortError

# Nearest neighbours that are looked at, as many as in both papers, and sets that are made of them.
NEIGHBOURS = 30
ORGANISATIONS = 10

_ROUNDING = 1e-12


def mdl_scores(log_p_QWL: Any) -> Floats:
    """Minus the entropy of the predicted labels under each candidate set, (Q, W), at most 0, in nats.

    Raises:
        SparsortError: as `distributions.label_scores`.
    """
    return -entropy(log_softmax(label_scores(log_p_QWL, ("queries", "sets"))))


def mdl(log_p_QWL: Any) -> NDArray[np.int64]:
    """MDL (arXiv 2212.10375): for every query the set of demonstrations under which the prediction is surest, (Q,).

    The paper takes the organisation c that minimises the expected code length of the label, −Σ_y q(y) log₂ p(y | c, x),
    with the model's own p for the unknown q: the entropy of the prediction. Its candidates are W sets of k drawn at
    random, in random order, from the 30 nearest neighbours; the first in the authors' code is the k nearest.

    Args:
        log_p_QWL: scores of the labels under each candidate. The authors' are means over a label's tokens.

    Cost: Q·W pairs, of which no prefix is shared between queries: the dearest of all criteria.
    Traps: the opposite of `label_criteria.locale`, which wants entropy high. That one asks which order is not biased,
    this one which neighbours settle this query; a set that biases the model settles every query, and wins here.
    """
    return first_of_best(mdl_scores(log_p_QWL))


def organisations(near_QN: Any, k: int, seed: int, *, count: int = ORGANISATIONS) -> NDArray[np.int64]:
    """The sets that MDL chooses among, (Q, W, k): the k nearest first, then W − 1 drawn in random order from all neighbours.

    Args:
        near_QN: each query's neighbours, the nearest first.
        k: demonstrations in a set, 1 to N.
        seed: of the draws.
        count: W.

    Raises:
        SparsortError: k is none of 1 to N.
    """
    near = np.asarray(near_QN, dtype=np.int64)
    _check_k(k, near.shape[1])
    generator = np.random.default_rng([seed, k])
    drawn = generator.permuted(np.tile(near[:, None], (1, count - 1, 1)), axis=2)[:, :, :k]
    return np.concatenate([near[:, None, :k], drawn], axis=1)


def cone_scores(nll_QW: Any) -> Floats:
    """ConE (arXiv 2401.12087) over whole sets: minus the loss on the query's own tokens under each candidate, (Q, W).

    c* = argmin_c H(x | c), H(x | c) = H(x, c) − H(c): the negative log-likelihood of the query's tokens after the
    demonstrations, with the template's words up to where the answer begins. No label is looked at.

    Args:
        nll_QW: that loss under each candidate, as the sum over the tokens (the authors' code) or as their mean: the two
            rank alike, as a query's tokens are the same after every candidate.

    Cost: Q·W passes over query tokens. Trap: a demonstration that repeats the query's words is the least surprising;
    leave near-duplicates out before.

    Raises:
        SparsortError: not (Q, W) finite numbers.
    """
    losses = numbers(nll_QW, ("queries", "candidates"), what="loss")
    if not np.isfinite(losses).all():
        query, at = np.argwhere(~np.isfinite(losses))[0].tolist()
        raise SparsortError(
            f"loss is {losses[query, at]} for query {query}, candidate {at} (from 0). "
            "The loss on a query's tokens is finite; look at that prompt."
        )
    return -losses


def cone_neighbours(nll_QN: Any, k: int) -> NDArray[np.int64]:
    """TopK + ConE as its authors run it: the k of a query's N neighbours with the lowest loss, each alone, (Q, k).

    Each of the N = 30 nearest neighbours stands alone before the query; the k after which the query's tokens cost least
    are the demonstrations, the cheapest first, so that it stands farthest from the query.

    Args:
        nll_QN: the loss on the query's tokens after each single neighbour, as in `cone_scores`.
        k: how many, 1 to N.

    Cost: Q·N passes over query tokens; a neighbour's prefix is shared by all queries that have it.
    """
    scores = cone_scores(nll_QN)
    _check_k(k, scores.shape[1])
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)


def _check_k(k: int, neighbours: int) -> None:
    if not 1 <= k <= neighbours:
        raise SparsortError(f"k is {k}, but there are {neighbours} neighbours. Choose 1 to {neighbours}.")


def first_of_best(scores_QW: Floats) -> NDArray[np.int64]:
    """For every query the first candidate whose score is the best but for rounding, (Q,)."""
    near_best = scores_QW >= scores_QW.max(axis=1, keepdims=True) - _ROUNDING
    first: NDArray[np.int64] = near_best.argmax(axis=1)
    return first
