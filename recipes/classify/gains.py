"""What each ingredient of a few-shot classifier gains on rows outside the prompt, and its cost in tokens.

Contract: every number is cross-fitted: a row is predicted with a bias that was estimated without it. Rows of each class count
equally, so the accuracy is balanced accuracy, whatever the label shares.

Shapes: O orders, N labelled rows, L classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, log_softmax
from sparsort.curriculum.demos.criteria.label_calibration import BiasEvidence, LabelCalibrationEntry, combine_orders
from sparsort.terminal.tables import Table, number, prose

_FOLDS = 4
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One ingredient, with those before it.

    Attributes:
        ingredient: what is added to the row before.
        balanced_accuracy: the mean over classes of the share of right predictions, in [0, 1].
        log_loss: the mean over classes of the negative log-probability of the right class, in nats.
        standard_error: of the balanced accuracy, over rows.
        tokens: tokens that the model has to read in `fit` for it; 0 if nothing is estimated.
    """

    ingredient: str
    balanced_accuracy: float
    log_loss: float
    standard_error: float
    tokens: int


def measure_gains(
    calibration: LabelCalibrationEntry, evidence: BiasEvidence, shares_L: Floats, tokens: int
) -> list[Gain]:
    """The gains on the labelled rows; empty if there are none, or fewer than two of some class.

    Args:
        calibration: the calibration that the classifier uses.
        evidence: the scores that `fit` read.
        shares_L: the prior.
        tokens: tokens that `fit` read, for all orders.
    """
    labelled, gold = evidence.labelled, evidence.gold
    if labelled is None or np.bincount(gold, minlength=evidence.labels).min() < 2:
        return []
    plain = log_softmax(labelled)
    calibrated = _cross_fitted(calibration, evidence)
    estimates = bool(calibration.needs)
    gains = [_gain("one order, not calibrated", plain, gold, 0)]
    if estimates:
        gains.append(_gain(f"{calibration.name} calibration", calibrated, gold, tokens // evidence.orders))
    if evidence.orders > 1:
        together = combine_orders(calibrated)[None]
        gains.append(_gain(f"mean over {evidence.orders} orders", together, gold, tokens * estimates))
    if np.ptp(shares_L) > 0:
        gains.append(_gain("prior", combine_orders(calibrated, np.log(shares_L))[None], gold, tokens * estimates))
    return gains


def gains_table(gains: list[Gain]) -> str:
    """The gains as a table of text."""
    if not gains:
        return "Nothing was measured: too few labelled rows are left outside the prompt."
    table = Table(prose("ingredient"), number("balanced accuracy"), number("log loss"), number("tokens in fit"))
    for gain in gains:
        accuracy = f"{100 * gain.balanced_accuracy:.1f} ± {196 * gain.standard_error:.1f} %"
        table.add_row(gain.ingredient, accuracy, f"{gain.log_loss:.3f}", f"{gain.tokens:,}")
    return "\n".join(table.lines(_WIDTH))


def _cross_fitted(calibration: LabelCalibrationEntry, evidence: BiasEvidence) -> Floats:
    """(O, N, L) log-probabilities of the labelled rows, each without the bias that the other folds show."""
    assert evidence.labelled is not None
    fold = np.arange(len(evidence.gold)) % _FOLDS
    log_p = np.empty_like(evidence.labelled)
    for number_of in range(_FOLDS):
        mine = fold == number_of
        if mine.any():
            rest = replace(evidence, labelled=evidence.labelled[:, ~mine], gold=evidence.gold[~mine])
            log_p[:, mine] = calibration.estimate(rest).remove(evidence.labelled[:, mine])
    return log_p


def _gain(ingredient: str, log_p_ONL: Floats, gold: NDArray[np.int64], tokens: int) -> Gain:
    """The mean over orders of what each alone reaches."""
    weight = 1.0 / np.bincount(gold)[gold]
    weight /= weight.sum()
    right = (log_p_ONL.argmax(axis=2) == gold).mean(axis=0)
    loss = -log_p_ONL[:, np.arange(len(gold)), gold].mean(axis=0)
    accuracy = float(right @ weight)
    return Gain(
        ingredient=ingredient,
        balanced_accuracy=accuracy,
        log_loss=float(loss @ weight),
        standard_error=float(np.sqrt((weight**2 * (right - accuracy) ** 2).sum())),
        tokens=tokens,
    )
