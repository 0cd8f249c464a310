"""Criteria that choose demonstrations for each query among candidates, by the predictions of the model: MDL and ConE.

Contract: pure functions of the model's predictions under each candidate. The candidate with the lowest cost wins. Ties, also
those up to rounding, go to the earliest candidate, so list the plain nearest neighbours first.

Shapes: Q queries, W candidate sets of a query, N neighbours of a query, L labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, entropy, label_scores, log_softmax, numbers
from sparsort.errors import SparsortError

# The number of nearest neighbours of a query, as in both papers, and the number of candidate sets that are made of them.
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
    """MDL (arXiv 2212.10375): for each query, the set of demonstrations under which the prediction is most certain, (Q,).

    The paper takes the organisation c that minimises the expected code length of the label, −Σ_y q(y) log₂ p(y | c, x). With
    the model's own p in place of the unknown q, this is the entropy of the prediction. The candidates of the paper are W sets
    of k in random order, drawn from the 30 nearest neighbours; in the authors' code, the first set is the k nearest.

    Args:
        log_p_QWL: scores of the labels under each candidate. Those of the authors are means over a label's tokens.

    Cost: Q·W pairs whose prefixes are not shared between queries, which makes this the most expensive criterion.
    Traps: this is the opposite of `label_criteria.locale`, where a high entropy is better. `locale` looks for an order without
    bias, and MDL for neighbours that decide the query. A set that biases the model decides every query, and wins here.
    """
    return first_of_best(mdl_scores(log_p_QWL))


def organisations(near_QN: Any, k: int, seed: int, *, count: int = ORGANISATIONS) -> NDArray[np.int64]:
    """The candidate sets of MDL, (Q, W, k): first the k nearest, then W − 1 drawn in random order from all neighbours.

    Args:
        near_QN: each query's neighbours, the nearest first.
        k: number of demonstrations in a set, 1 to N.
        seed: seed of the draws.
        count: W.

    Raises:
        SparsortError: k is outside 1 to N.
    """
    near = np.asarray(near_QN, dtype=np.int64)
    _check_k(k, near.shape[1])
    # Independent draws for each k: sets of two sizes would otherwise begin with the same neighbours.
    generator = np.random.default_rng([seed, k])
    drawn = generator.permuted(np.tile(near[:, None], (1, count - 1, 1)), axis=2)[:, :, :k]
    return np.concatenate([near[:, None, :k], drawn], axis=1)


def cone_scores(nll_QW: Any) -> Floats:
    """ConE (arXiv 2401.12087) over whole sets: minus the loss on the query's own tokens under each candidate, (Q, W).

    c* = argmin_c H(x | c) with H(x | c) = H(x, c) − H(c): the negative log-likelihood of the query's tokens after the
    demonstrations, including the words of the template up to the answer. Labels are not read.

    Args:
        nll_QW: the loss under each candidate, as the sum over the tokens (the authors' code) or as their mean. Both give the
        same
            ranking, because the query's tokens are the same after every candidate.

    Cost: Q·W passes over query tokens. Trap: a demonstration that repeats the query's words has the lowest loss, so exclude
    near-duplicates first.

    Raises:
        SparsortError: not (Q, W) finite numbers.
    """
    losses = numbers(nll_QW, ("queries", "candidates"), argument="loss")
    if not np.isfinite(losses).all():
        query, at = np.argwhere(~np.isfinite(losses))[0].tolist()
        raise SparsortError(
            f"loss is {losses[query, at]} for query {query}, candidate {at} (from 0). "
            "The loss on a query's tokens must be finite; check that prompt."
        )
    return -losses


def cone_neighbours(nll_QN: Any, k: int) -> NDArray[np.int64]:
    """TopK + ConE as its authors run it: the k of a query's N neighbours with the lowest loss, (Q, k).

    Each of the N = 30 nearest neighbours is the only demonstration before the query. The k neighbours after which the query's
    tokens have the lowest loss become the demonstrations; the one with the lowest loss is first, so farthest from the query.

    Args:
        nll_QN: the loss on the query's tokens after each single neighbour, as in `cone_scores`.
        k: number of demonstrations, 1 to N.

    Cost: Q·N passes over query tokens; queries that share a neighbour share its prefix.
    """
    scores = cone_scores(nll_QN)
    _check_k(k, scores.shape[1])
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)


def _check_k(k: int, neighbours: int) -> None:
    if not 1 <= k <= neighbours:
        raise SparsortError(f"k is {k}, but there are {neighbours} neighbours. Choose 1 to {neighbours}.")


def first_of_best(scores_QW: Floats) -> NDArray[np.int64]:
    """For each query, the first candidate whose score is the best up to rounding, (Q,)."""
    near_best = scores_QW >= scores_QW.max(axis=1, keepdims=True) - _ROUNDING
    first: NDArray[np.int64] = near_best.argmax(axis=1)
    return first
