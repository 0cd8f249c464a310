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
from sparsort.kernels.backend import sparsity_rows
from sparsort.kernels.sparsity.metrics import ROW_REASONS
from sparsort.scoring.backbone import Piece
from sparsort.scoring.batching import Plan
from sparsort.scoring.prompts import Encoded
from sparsort.scoring.sources import SAMPLING
from sparsort.scoring.spans import Span

Pooling = Literal["last", "mean_metric", "mean_state", "answer"]

# Most token rows that one call of the metrics takes: bounds the fp64 copies of the CPU path.
_ROWS_AT_ONCE = 4096
_OUTLIER_RULE = re.compile(r"none|rms|drop:[1-9]\d*")


def check_pooling(pooling: str) -> Pooling:
    """`pooling`, if there is one of that name."""
    if pooling not in get_args(Pooling):
        raise unknown_choice("pooling", pooling, get_args(Pooling))
    return pooling  # type: ignore[return-value]


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


class Collector:
    """Gathers the pieces of one shard into one row of numbers an example.

    Args:
        pooling: which tokens, and in which order mean and metric come.
        encoded: the shard's rows as ids, in the order of the plan; with pooling `answer` each has an answer, and the plan's
            shared head ends before it.
        how: the plan.
        site: the site to read from the pieces.
        scale_H: the outlier rule's factors, or None.
        l0_threshold: threshold of `l0_absolute`.
    """

    def __init__(
        self,
        pooling: Pooling,
        encoded: Sequence[Encoded],
        how: Plan,
        *,
        site: str,
        scale_H: Tensor | None = None,
        l0_threshold: float = 1.0,
    ) -> None:
        self.pooling, self._site = pooling, site
        self._scale_H, self._threshold = scale_H, l0_threshold
        lengths = np.array([len(row.ids) for row in encoded], dtype=np.int64)
        first = np.array([row.answer_start if pooling == "answer" else row.n_lead for row in encoded], dtype=np.int64)
        self.span = Span(lengths - 1 if pooling == "last" else first, lengths, how)

    def add(self, piece: Piece) -> None:
        """Take in one piece's states."""
        states_BTH = piece.states[self._site]
        batch, token = self.span.pick(piece)
        if not len(batch):
            return
        if self.pooling == "mean_state":
            values, reasons = finite_states(states_BTH, batch, token)
        else:
            values, reasons = self._metrics(states_BTH, batch, token)
        self.span.add(piece, batch, values, reasons)

    def means(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(n, metrics or width) mean over each row's tokens, and each row's reason code."""
        return self.span.means()

    def finish(self) -> tuple[NDArray[np.float64], list[str]]:
        """(n, M) metrics in the order of `METRICS`, NaN where there is none, and each row's reason ("" for ok)."""
        values, reasons = self.means()
        if self.pooling == "mean_state":
            pooled = sparsity_rows(torch.from_numpy(values), dim_scale=self._scale_H, l0_threshold=self._threshold)
            values, reasons = pooled.values_NM.double().numpy(), np.maximum(reasons, pooled.reason_N.long().numpy())
        values[reasons > 0] = np.nan
        return values, [ROW_REASONS[code] for code in reasons]

    def _metrics(self, states_BTH: Tensor, batch: NDArray[np.int64], token: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        index_N = torch.from_numpy(batch * states_BTH.shape[1] + token).to(states_BTH.device)
        scale = self._scale_H.to(states_BTH.device) if self._scale_H is not None else None
        parts = [
            sparsity_rows(states_BTH, part, dim_scale=scale, l0_threshold=self._threshold)
            for part in torch.split(index_N, _ROWS_AT_ONCE)
        ]
        # NaN rows are known by their reason; a zero keeps them from spreading within the sum of another row.
        return torch.cat([part.values_NM for part in parts]).double().nan_to_num(nan=0.0, posinf=torch.inf), torch.cat(
            [part.reason_N for part in parts]
        )


def finite_states(states_BTH: Tensor, batch: NDArray[np.int64], token: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """(N, width) fp64 states at the given places, zeros where one is not finite, and their reason codes."""
    picked = states_BTH[
        torch.from_numpy(batch).to(states_BTH.device), torch.from_numpy(token).to(states_BTH.device)
    ].double()
    finite = torch.isfinite(picked).all(dim=1)
    return torch.where(finite[:, None], picked, 0.0), (~finite).long() * ROW_REASONS.index("not_finite")


class MeanSquare:
    """Mean square of every dimension over the states that a pooling reads: what the outlier rules are fitted on."""

    def __init__(self, collector: Collector, site: str) -> None:
        self._span, self._site = collector.span, site
        self._sum_H: Tensor | None = None
        self.count = 0

    def add(self, piece: Piece) -> None:
        """Take in one piece's states; those of a shared head count for every row that has it."""
        batch, token = self._span.pick(piece)
        if not len(batch):
            return
        states, reasons = finite_states(piece.states[self._site], batch, token)
        weights = (reasons == 0) * torch.from_numpy(self._span.shares(piece)[batch]).to(states.device)
        squares = (states.square() * weights[:, None]).sum(dim=0).cpu()
        self._sum_H = squares if self._sum_H is None else self._sum_H + squares
        self.count += int(weights.sum())

    def value_H(self) -> NDArray[np.float64]:
        """(width,) mean square; empty when no state was seen."""
        return (self._sum_H / max(self.count, 1)).numpy() if self._sum_H is not None else np.zeros(0)
