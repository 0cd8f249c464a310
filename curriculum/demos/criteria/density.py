"""Scores of candidate orders from how dense the query's last state is under each: no label set, so generation too.

Contract: pure functions of one metric of one state; one score an order, higher is better. Where the states come from
(site, read-out rows, outlier rule) is the caller's affair.

Shapes: O candidate orders, P probe queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsort.curriculum.demos.criteria.distributions import Floats, numbers
from sparsort.curriculum.demos.criteria.ranking import mean_ranks
from sparsort.errors import SparsortError

_AXES = ("orders", "probes")


def density(features_OP: Any, *, denser_is_higher: bool) -> Floats:
    """The mean over probes of how dense the query's last state is, (O,), in the metric's unit, denser higher.

    This library's own. Needs no label set, so it applies to generation too. Which states carry it, and which way, is to
    be measured: before the final norm the sign differs from task to task.

    Args:
        features_OP: one sparsity metric of the state from which the answer is predicted. A probe without a value under
            any one order (NaN: a zero or non-finite state) is left out of all, so that orders are compared on the same.
        denser_is_higher: the metric's direction.

    Cost: O·P pairs without any label. Trap: queries differ more than orders do; that shifts all orders alike, but a
    probe on which orders differ much counts for much (`density_rank` gives every probe the same say).

    Raises:
        SparsortError: not (O, P) numbers, or no probe with a value under every order.
    """
    mean: Floats = _complete(features_OP).mean(axis=1)
    return mean if denser_is_higher else -mean


def density_gain(features_OP: Any, bare_P: Any, *, denser_is_higher: bool) -> Floats:
    """The mean over probes of how much denser the state is than without demonstrations, relative to that, (O,).

    score = (1/P) Σ_p (f_po − f_p) / |f_p|, denser higher. Relative, because the plain difference takes the same number
    from all orders and so ranks them as `density` does; divided by f_p, probes with a small value count for more.

    Args:
        features_OP: as `density`.
        bare_P: the same metric of the same queries with no demonstration before them; not 0.
        denser_is_higher: the metric's direction.

    Cost: as `density`, and P passes once for all orders and sets.

    Raises:
        SparsortError: as `density`; `bare_P` of another length, or with a 0.
    """
    raw = numbers(features_OP, _AXES, what="features")
    bare = numbers(bare_P, ("probes",), what="bare_features")
    if len(bare) != raw.shape[1]:
        raise SparsortError(f"bare_features has {len(bare)} numbers for {raw.shape[1]} probes. Give one each.")
    if (bare == 0).any():
        at = int(np.argmax(bare == 0))
        raise SparsortError(f"bare_features is 0 for probe {at} (from 0), and nothing is relative to 0. Use 'density'.")
    mean: Floats = _complete((raw - bare) / np.abs(bare)).mean(axis=1)
    return mean if denser_is_higher else -mean


def density_rank(features_OP: Any, *, denser_is_higher: bool) -> Floats:
    """The mean over probes of an order's rank by density among the orders, (O,), 0 (always sparsest) to 1.

    As `density`, but every probe has the same say whatever its scale, and none can outweigh the others.
    """
    complete = _complete(features_OP)
    mean: Floats = mean_ranks(complete if denser_is_higher else -complete).mean(axis=1)
    return mean


def _complete(features_OP: Any) -> Floats:
    """The probes that have a value under every order."""
    features = numbers(features_OP, _AXES, what="features")
    kept = np.isfinite(features).all(axis=0)
    if not kept.any():
        raise SparsortError(
            f"features has no probe with a value under each of the {len(features)} orders, so they cannot be compared. "
            "Look at the prompts: a state is zero or not finite."
        )
    return features[:, kept]
