"""Scores of candidate orders from the density of the query's last state under each. They need no labels.

Contract: pure functions of one metric of one state. They return one score for each order, and higher is better. The caller
decides where the states come from (site, read-out rows, outlier rule).

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
    """The mean density of the query's last state over the probes, (O,), in the metric's unit; denser is higher.

    This criterion was invented for this library. It needs no labels, so it applies to generation too. Whether a state carries a
    signal, and in which direction, must be measured: before the final norm, the sign differs from task to task.

    Args:
        features_OP: one sparsity metric of the state from which the answer is predicted. A probe that has no value under one
            order (NaN: its state is zero or not finite) is ignored for all, so that orders are compared on the same probes.
        denser_is_higher: the metric's direction.

    Cost: O·P pairs without labels. Trap: queries differ more than orders do. This shifts all orders equally, but a probe on
    which the orders differ much has a large weight (`density_rank` gives equal weights).

    Raises:
        SparsortError: not (O, P) numbers, or no probe with a value under every order.
    """
    mean: Floats = _complete(features_OP).mean(axis=1)
    return mean if denser_is_higher else -mean


def density_gain(features_OP: Any, bare_P: Any, *, denser_is_higher: bool) -> Floats:
    """The mean relative increase in density over the state without demonstrations, (O,).

    score = (1/P) Σ_p (f_po − f_p) / |f_p|, or its negative if a higher f is sparser. A plain difference would subtract the same
    number from all orders and rank them as `density` does. Dividing by f_p gives more weight to probes with a small value.

    Args:
        features_OP: as in `density`.
        bare_P: the same metric of the same queries without demonstrations; not 0.
        denser_is_higher: the metric's direction.

    Cost: as `density`, and P passes, once for all orders and sets.

    Raises:
        SparsortError: as `density`; `bare_P` of another length, or with a 0.
    """
    raw = numbers(features_OP, _AXES, argument="features")
    bare = numbers(bare_P, ("probes",), argument="bare_features")
    if len(bare) != raw.shape[1]:
        raise SparsortError(f"bare_features has {len(bare)} numbers for {raw.shape[1]} probes. Give one each.")
    if (bare == 0).any():
        at = int(np.argmax(bare == 0))
        raise SparsortError(f"bare_features is 0 for probe {at} (from 0), by which it would be divided. Use 'density'.")
    # A probe without a value of its own, before or after, becomes NaN here and is ignored.
    mean: Floats = _complete((raw - bare) / np.abs(bare)).mean(axis=1)
    return mean if denser_is_higher else -mean


def density_rank(features_OP: Any, *, denser_is_higher: bool) -> Floats:
    """The mean over the probes of an order's rank by density, (O,), from 0 (always the sparsest) to 1.

    As `density`, but every probe has the same weight, whatever its scale.
    """
    complete = _complete(features_OP)
    # The ranks are taken among the orders, separately for each probe.
    mean: Floats = mean_ranks(complete if denser_is_higher else -complete).mean(axis=1)
    return mean


def _complete(features_OP: Any) -> Floats:
    """The columns of the probes that have a value under every order."""
    features = numbers(features_OP, _AXES, argument="features")
    is_complete_P = np.isfinite(features).all(axis=0)
    if not is_complete_P.any():
        raise SparsortError(
            f"features has no probe with a value under each of the {len(features)} orders, so they cannot be compared. "
            "Check the prompts: a state is zero or not finite."
        )
    return features[:, is_complete_P]
