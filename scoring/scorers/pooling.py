"""From the states of every token to one number a metric and row: the poolings, and the outlier rules fitted on a sample.

| pooling | value |
| --- | --- |
| `last` | metrics of the last token's state |
| `mean_metric` | mean over the text's tokens of each token's metrics |
| `mean_state` | metrics of the mean of the text's states |
| `answer` | `mean_metric` over the answer's tokens |

The tokenizer's own special tokens in front are left out of every mean: their state is the same for every row and carries
the model's massive activations.

| outlier rule | what is done to a state before its metrics |
| --- | --- |
| `none` | nothing |
| `drop:n` | the n dimensions of largest RMS over a sample are left out; the width counts without them |
| `rms` | every dimension is divided by its RMS over a sample |

The sample is `RowSource.sample`: rows chosen by their digests, so that a score is a function of the set of rows.
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
from sparsort.scoring.data.rows import SAMPLING

Pooling = Literal["last", "mean_metric", "mean_state", "answer"]

_OUTLIER_RULE = re.compile(r"none|rms|drop:[1-9]\d*")


def check_pooling(pooling: str) -> Pooling:
    """`pooling`, if there is one of that name."""
    if pooling not in get_args(Pooling):
        raise unknown_choice("pooling", pooling, get_args(Pooling))
    return pooling  # type: ignore[return-value]


def check_answer(poolings: Sequence[str], answer: str | None) -> None:
    """Refuse pooling `answer` under a prompt that has no answer."""
    if "answer" in poolings and answer is None:
        raise SparsortError(
            "pooling 'answer' reads the answer's tokens. Pass answer='…' (--answer), for example ' {answer}'."
        )


def check_outlier_rule(rule: str) -> str:
    """`rule`, if it reads as one."""
    if not _OUTLIER_RULE.fullmatch(rule):
        raise SparsortError(
            f"unknown outlier rule {rule!r}. Choose 'none', 'rms' or 'drop:n' with n the number of dimensions."
        )
    return rule


@dataclass(frozen=True, kw_only=True)
class OutlierFit:
    """A fitted outlier rule: a factor for every dimension (0 leaves it out), and what to record of it."""

    scale_H: Tensor | None
    record: dict[str, object]


def fit_outliers(rule: str, mean_square_H: NDArray[np.float64], n_states: int) -> OutlierFit:
    """Fit `drop:n` or `rms` on the mean square of every dimension over a sample of states.

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
        # A dimension that is zero all over the sample says nothing of spread: it is left out.
        scale = np.divide(1.0, rms, out=np.zeros(width), where=rms > 0).astype(np.float32)
        record = {"rule": rule, "sampling": SAMPLING, "n_states": n_states, "scale": [float(value) for value in scale]}
        return OutlierFit(scale_H=torch.from_numpy(scale), record=record)
    check_dropped(rule, width)
    count = int(rule.partition(":")[2])
    widest = [int(d) for d in np.argsort(-mean_square_H, kind="stable")[:count]]
    record = {"rule": rule, "sampling": SAMPLING, "n_states": n_states, "dims": widest}
    return OutlierFit(scale_H=_without(widest, width), record=record)


def check_dropped(rule: str, width: int) -> None:
    """Refuse a rule `drop:n` that leaves nothing of a state of `width` dimensions.

    Raises:
        SparsortError: n is the width or more.
    """
    if int(rule.partition(":")[2]) >= width:
        raise SparsortError(f"the outlier rule {rule!r} drops every one of the {width} dimensions. Drop fewer.")


def restore_outliers(record: dict[str, object], width: int) -> OutlierFit:
    """A fit as it was recorded, so that a resumed run uses the very same."""
    if record["rule"] == "rms":
        scale = torch.tensor(record["scale"], dtype=torch.float32)
        return OutlierFit(scale_H=scale, record=record)
    return OutlierFit(scale_H=_without(list(record["dims"]), width), record=record)  # type: ignore[call-overload]


def _without(dims: list[int], width: int) -> Tensor:
    scale = torch.ones(width)
    scale[dims] = 0.0
    return scale
