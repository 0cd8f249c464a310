"""The poolings, which reduce the states of a row's tokens to one number per metric, and the outlier rules, which correct states.

| pooling | value |
| --- | --- |
| `last` | metrics of the last token's state |
| `mean_metric` | mean over the text's tokens of each token's metrics |
| `mean_state` | metrics of the mean of the text's states |
| `answer` | `mean_metric` over the answer's tokens |

Every mean skips the special tokens that the tokenizer puts first: their states are the same for every row and contain the
model's massive activations.

| outlier rule | correction of a state before its metrics are computed |
| --- | --- |
| `none` | none |
| `drop:n` | the n dimensions with the largest RMS over a sample are removed, and the width counts without them |
| `rms` | every dimension is divided by its RMS over a sample |

The sample is `RowSource.sample`: rows are chosen by their digests, so a score does not depend on the order of the rows.

Shape suffix: H width of the state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.data.digests import SAMPLING

Pooling = Literal["last", "mean_metric", "mean_state", "answer"]

_OUTLIER_RULE = re.compile(r"none|rms|drop:[1-9]\d*")


def check_pooling(pooling: str) -> Pooling:
    """Return `pooling`, or raise `SparsortError` if it is not the name of a pooling."""
    if pooling not in get_args(Pooling):
        raise unknown_choice("pooling", pooling, get_args(Pooling))
    return pooling  # type: ignore[return-value]


def check_answer(poolings: Sequence[str], answer: str | None) -> None:
    """Raise `SparsortError` if the pooling `answer` is among `poolings`, but the prompt has no answer."""
    if "answer" in poolings and answer is None:
        raise SparsortError(
            "pooling 'answer' reads the answer's tokens. Pass answer='…' (--answer), for example ' {answer}'."
        )


def check_outlier_rule(rule: str) -> str:
    """Return `rule`, or raise `SparsortError` if it is not the name of an outlier rule."""
    if not _OUTLIER_RULE.fullmatch(rule):
        raise SparsortError(
            f"unknown outlier rule {rule!r}. Choose 'none', 'rms' or 'drop:n' with n the number of dimensions."
        )
    return rule


@dataclass(frozen=True, kw_only=True)
class OutlierFit:
    """A fitted outlier rule.

    Attributes:
        scale_H: a factor for every dimension, where 0 removes the dimension; None for the rule "none".
        record: the rule and its fit as JSON values, for the provenance.
    """

    scale_H: Tensor | None
    record: dict[str, object]


def fit_outliers(rule: str, mean_square_H: NDArray[np.float64], n_states: int) -> OutlierFit:
    """Fit `drop:n` or `rms` on a sample of states.

    Args:
        rule: the rule.
        mean_square_H: mean square of every dimension over the sample.
        n_states: number of states in the sample.

    Raises:
        SparsortError: more dimensions to drop than there are, or a sample without a state.
    """
    if n_states == 0:
        raise SparsortError(
            f"the outlier rule {rule!r} needs states to be fitted on, and no row of the sample could be scored."
        )
    width = len(mean_square_H)
    if rule == "rms":
        rms = np.sqrt(mean_square_H)
        # A dimension that is zero in the whole sample has no scale, so it is removed instead of divided by zero.
        scale = np.divide(1.0, rms, out=np.zeros(width), where=rms > 0).astype(np.float32)
        record = {"rule": rule, "sampling": SAMPLING, "n_states": n_states, "scale": [float(value) for value in scale]}
        return OutlierFit(scale_H=torch.from_numpy(scale), record=record)
    check_dropped(rule, width)
    count = int(rule.partition(":")[2])
    # A stable sort breaks ties by the lower dimension, on every machine.
    widest = [int(d) for d in np.argsort(-mean_square_H, kind="stable")[:count]]
    record = {"rule": rule, "sampling": SAMPLING, "n_states": n_states, "dims": widest}
    return OutlierFit(scale_H=_without(widest, width), record=record)


def check_dropped(rule: str, width: int) -> None:
    """Raise `SparsortError` if a rule `drop:n` would remove all of the `width` dimensions of a state."""
    if int(rule.partition(":")[2]) >= width:
        raise SparsortError(f"the outlier rule {rule!r} drops every one of the {width} dimensions. Drop fewer.")


def restore_outliers(record: dict[str, object], width: int) -> OutlierFit:
    """Restore a fit from its record, so that a resumed run uses exactly the same rule."""
    if record["rule"] == "rms":
        scale = torch.tensor(record["scale"], dtype=torch.float32)
        return OutlierFit(scale_H=scale, record=record)
    return OutlierFit(scale_H=_without(list(record["dims"]), width), record=record)  # type: ignore[call-overload]


def _without(dims: list[int], width: int) -> Tensor:
    scale = torch.ones(width)
    scale[dims] = 0.0
    return scale
