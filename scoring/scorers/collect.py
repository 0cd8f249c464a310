"""Computes the metrics of every row from the states of its tokens: one collector, for one measurement or for hundreds.

Contract: a collector is created for `Reading`s (a row's ids, with the borders of prompt and answer). The pieces of one walk are
added to it, and it returns the metrics of every reading for each measurement, a (site, pooling, outlier rule). Measurements do
not affect each other. Values that several of them need are computed once: the state of the last token and the sum of the states
are kept per row and measured under every rule at the end, and only `mean_metric` and `answer` measure every token.

The scorer of one measurement uses `exact` arithmetic, float64 throughout. The scorer of all candidates does not: states are
summed in float32 within a piece, and on a CPU the metrics of `mean_metric` and `answer` are computed in float32, in a third of
the time. This changes a mean of them by 1e-6.

The outlier rules can be fitted without a second pass. A collector without fits keeps the states of the tokens that it must
measure under a rule, and measures them after `fit` has fitted the rules on everything that was added.

Shape suffixes: B rows of a piece, T its tokens, K selected tokens, N readings, M metrics, H width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsort.kernels.backend import sparsity_implementation, sparsity_rows
from sparsort.kernels.sparsity.checks import RowMetrics
from sparsort.kernels.sparsity.metrics import METRICS, ROW_REASONS
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref
from sparsort.scoring.model.backbone import StateChunk
from sparsort.scoring.model.batching import Plan
from sparsort.scoring.prompts.prompt import Encoded
from sparsort.scoring.scorers.pooling import OutlierFit, Pooling, fit_outliers
from sparsort.scoring.scorers.spans import RowSpans, states_at

_NOT_FINITE = ROW_REASONS.index("not_finite")
# The most states that one call of the metrics takes, which bounds the float64 copies of the CPU path.
_ROWS_AT_ONCE = 4096
# Pooling → the part of a row whose states it reads. Poolings of one part share the selection of its tokens.
_PART = {"last": "last", "mean_metric": "prompt", "mean_state": "prompt", "answer": "answer"}
_PER_TOKEN = ("mean_metric", "answer")


class Measurement(NamedTuple):
    """A measurement of a row, apart from the metric."""

    site: str
    pooling: Pooling
    outliers: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One text that the model reads for a row: its prompt, its answer, or both.

    Attributes:
        row: the row's number within the shard.
        ids: token ids.
        first: the first token of the text, after the tokenizer's special tokens.
        prompt_end: the token after the last one of the prompt; `first` if the prompt is measured in another reading.
        answer_start: the first token of the answer; `len(ids)` if there is none.
    """

    row: int
    ids: Sequence[int]
    first: int
    prompt_end: int
    answer_start: int

    @property
    def reads_prompt(self) -> bool:
        """Whether the prompt is measured in this reading."""
        return self.prompt_end > self.first


def whole_texts(encoded: Sequence[Encoded]) -> list[Reading]:
    """Return one reading per row, which measures the whole text as the prompt, an answer included."""
    return [
        Reading(row=number, ids=row.ids, first=row.n_lead, prompt_end=len(row.ids), answer_start=row.answer_start)
        for number, row in enumerate(encoded)
    ]


def spans_of(pooling: Pooling, readings: Sequence[Reading], plan: Plan) -> RowSpans:
    """Return the tokens that a pooling reads, in every reading.

    Args:
        pooling: the pooling.
        readings: readings in the order of the plan.
        plan: the plan. Its shared heads must end before the answer for the pooling `answer`, and before the last token for
            `last`.
    """
    borders = [(r.first, r.prompt_end, r.answer_start, len(r.ids)) for r in readings]
    first, prompt_end, answer, end = np.array(borders, dtype=np.int64).reshape(-1, 4).T
    if _PART[pooling] == "answer":
        return RowSpans(answer, end, plan)
    return RowSpans(np.maximum(first, prompt_end - 1) if pooling == "last" else first, prompt_end, plan)


class SquareSum:
    """Sums the squares of every dimension over the finite states, for fitting an outlier rule.

    Attributes:
        count: states that were added.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._sum_H: Tensor | None = None
        self.count = 0

    def add(self, states_KH: Tensor, shares_K: NDArray[np.int64]) -> None:
        """Add K states, the k-th of which counts `shares_K[k]` times: a state of a shared head counts once per row."""
        wide_KH, finite_K = _finite(states_KH, exact=self._exact)
        # States that are not finite have weight 0 and were replaced by 0, so they do not count.
        weights_K = finite_K * torch.from_numpy(shares_K).to(wide_KH.device)
        squares_KH = wide_KH.square()
        if self._exact:
            squares_H = (squares_KH * weights_K[:, None]).sum(dim=0)
        else:
            squares_H = (weights_K.to(squares_KH.dtype) @ squares_KH).double()
        self._sum_H = squares_H if self._sum_H is None else self._sum_H + squares_H
        self.count += int(weights_K.sum())

    def mean_H(self) -> NDArray[np.float64]:
        """Return the mean square of every dimension, (H,); empty if no state was added."""
        return self._sum_H.cpu().numpy() / max(self.count, 1) if self._sum_H is not None else np.zeros(0)


class StateCollector:
    """Collects the states of one walk and measures them.

    Args:
        readings: N readings, in the order of the plan.
        plan: the plan (see `spans_of`).
        measurements: the measurements to make.
        fits: the fits of the outlier rules; None to fit them on these readings (see `fit`).
        l0_threshold: threshold of `l0_absolute`.
        exact: compute in float64 (see the contract).
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        plan: Plan,
        measurements: Sequence[Measurement],
        *,
        fits: Mapping[Measurement, OutlierFit] | None,
        l0_threshold: float = 1.0,
        exact: bool,
    ) -> None:
        self._measurements, self._fits = list(measurements), fits
        self._threshold, self._exact = l0_threshold, exact
        self._n_readings = len(readings)
        self._spans = {_PART[m.pooling]: spans_of(m.pooling, readings, plan) for m in measurements}
        # (site, part) → its measurements, which share the states that are selected from a piece.
        self._groups: dict[tuple[str, str], list[Measurement]] = {}
        for m in measurements:
            self._groups.setdefault((m.site, _PART[m.pooling]), []).append(m)
        self._token_means = {m: spans_of(m.pooling, readings, plan) for m in measurements if m.pooling in _PER_TOKEN}
        self._state_means = {
            m.site: spans_of("mean_state", readings, plan) for m in measurements if m.pooling == "mean_state"
        }
        self._last: dict[str, Tensor] = {}
        self._squares: dict[tuple[str, str], SquareSum] = {}
        self._waiting: list[tuple[Measurement, StateChunk, NDArray[np.int64], Tensor]] = []

    def add(self, piece: StateChunk) -> None:
        """Add the states of one piece."""
        picked = {part: span.pick(piece) for part, span in self._spans.items()}
        for (site, part), group in self._groups.items():
            batch, token = picked[part]
            if not len(batch):
                continue
            states_BTH = piece.states[site]
            if part == "last":
                self._add_last(site, piece, batch, token)
                continue
            if any(m.pooling == "mean_state" for m in group):
                self._add_states(site, piece, batch, token)
            per_token, ruled = [m for m in group if m.pooling in _PER_TOKEN], []
            if self._fits is None and any(m.outliers != "none" for m in group):
                states_KH = states_at(states_BTH, batch, token)
                squares = self._squares.setdefault((site, part), SquareSum(exact=self._exact))
                squares.add(states_KH, self._spans[part].shares(piece)[batch])
                ruled = [m for m in per_token if m.outliers != "none"]
                # A piece with its states would keep all tokens of all sites in memory, not only the selected ones.
                without_states = replace(piece, states={})
                self._waiting += [(m, without_states, batch, states_KH) for m in ruled]
            index_K = torch.from_numpy(batch * states_BTH.shape[1] + token).to(states_BTH.device)
            for m in per_token:
                if m not in ruled:
                    self._measure_tokens(m, piece, batch, states_BTH, index_K)

    def fit(self) -> dict[Measurement, OutlierFit]:
        """Fit the outlier rules on all pieces that were added, measure the states that waited for them, and return the fits.

        Raises:
            SparsortError: see `pooling.fit_outliers`.
        """
        for site, last_NH in self._last.items():
            # A reading whose prompt is measured elsewhere has a row of zeros here, which is no state.
            read = np.flatnonzero(self._spans["last"].counts > 0)
            squares = self._squares[site, "last"] = SquareSum(exact=True)
            squares.add(last_NH[torch.from_numpy(read).to(last_NH.device)], np.ones(len(read), dtype=np.int64))
        fits = {}
        for m in self._measurements:
            if m.outliers != "none":
                squares = self._squares.get((m.site, _PART[m.pooling]), SquareSum(exact=self._exact))
                fits[m] = fit_outliers(m.outliers, squares.mean_H(), squares.count)
        self._fits = fits
        for m, piece, batch, states_KH in self._waiting:
            self._measure_tokens(m, piece, batch, states_KH, None)
        self._waiting.clear()
        return fits

    def mean_states(self, site: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the states that the pooling `mean_state` measures, (N, H), NaN for an empty text, and (N,) reason codes."""
        return self._state_means[site].means()

    def values(self) -> dict[Measurement, tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Return measurement → (N, M) metrics in the order of `METRICS`, NaN where there is none, and (N,) reason codes."""
        results = {}
        means = {site: self.mean_states(site) for site in self._state_means}
        for m in self._measurements:
            if m.pooling in _PER_TOKEN:
                values, reasons = self._token_means[m].means()
                # Without any token the number of metrics is unknown to the means.
                values = values if values.size else self._no_values()
            elif m.pooling == "last":
                values, reasons = self._measure_rows(m, self._last.get(m.site), np.zeros(self._n_readings, np.int64))
            else:
                mean_NH, reasons = means[m.site]
                values, reasons = self._measure_rows(m, torch.from_numpy(mean_NH) if mean_NH.size else None, reasons)
            values[reasons > 0] = np.nan
            results[m] = (values, reasons)
        return results

    def _add_last(self, site: str, piece: StateChunk, batch: NDArray[np.int64], token: NDArray[np.int64]) -> None:
        states_BTH = piece.states[site]
        if site not in self._last:
            self._last[site] = states_BTH.new_zeros((self._n_readings, states_BTH.shape[2]))
        rows = torch.from_numpy(piece.rows[batch]).to(states_BTH.device)
        self._last[site][rows] = states_at(states_BTH, batch, token)

    def _add_states(self, site: str, piece: StateChunk, batch: NDArray[np.int64], token: NDArray[np.int64]) -> None:
        states_BTH, span = piece.states[site], self._state_means[site]
        if self._exact:
            wide_KH, finite_K = _finite(states_at(states_BTH, batch, token), exact=True)
            span.add(piece, batch, wide_KH, (~finite_K).long() * _NOT_FINITE)
            return
        # One batched matrix product with a mask of zeros and ones sums the states of every row, fast on both CPU and GPU.
        inside = np.zeros(states_BTH.shape[:2], dtype=bool)
        inside[batch, token] = True
        mask_BT = torch.from_numpy(inside).to(states_BTH.device)
        wide_BTH, finite_BT = _finite(states_BTH, exact=False)
        sums_BH = torch.bmm(mask_BT[:, None].to(wide_BTH.dtype), wide_BTH)[:, 0]
        reasons_B = (~finite_BT & mask_BT).any(dim=1).long() * _NOT_FINITE
        read = np.flatnonzero(inside.any(axis=1))
        span.add(piece, read, sums_BH[read], reasons_B[read])

    def _measure_tokens(
        self, m: Measurement, piece: StateChunk, batch: NDArray[np.int64], states: Tensor, index_K: Tensor | None
    ) -> None:
        measured = self._measure(m, states, index_K, exact=self._exact)
        # A state without metrics is known by its reason, and its NaN becomes 0, which does not spread in a sum. Infinity
        # stays: it is a metric that overflowed.
        values = measured.values_NM.double().nan_to_num(nan=0.0, posinf=torch.inf)
        self._token_means[m].add(piece, batch, values, measured.reason_N)

    def _measure_rows(
        self, m: Measurement, states_NH: Tensor | None, reasons: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Measure one state per reading; a reading without the part that the pooling reads has no metrics."""
        values, reasons = self._no_values(), reasons.copy()
        read = np.flatnonzero(self._spans[_PART[m.pooling]].counts > 0)
        if states_NH is not None and len(read):
            index = torch.from_numpy(read).to(states_NH.device)
            # Always in float64: there is only one state per row.
            measured = self._measure(m, states_NH, index, exact=True)
            values[read] = measured.values_NM.double().cpu().numpy()
            reasons[read] = np.maximum(reasons[read], measured.reason_N.long().cpu().numpy())
        return values, reasons

    def _measure(self, m: Measurement, states: Tensor, index_K: Tensor | None, *, exact: bool) -> RowMetrics:
        fit, device = (self._fits or {}).get(m), states.device
        scale = fit.scale_H.to(device) if fit is not None and fit.scale_H is not None else None
        options: dict[str, Any] = {"dim_scale": scale, "l0_threshold": self._threshold}
        run = sparsity_rows
        # Only the CPU implementation computes in float64 unless another dtype is requested.
        if not exact and states.dtype != torch.float64 and sparsity_implementation(device).value == "torch":
            run, options = sparsity_rows_ref, options | {"compute_dtype": torch.float32}
        if index_K is None:
            index_K = torch.arange(states.shape[:-1].numel(), device=device)
        parts = [run(states, part, **options) for part in torch.split(index_K, _ROWS_AT_ONCE)]
        return RowMetrics(torch.cat([p.values_NM for p in parts]), torch.cat([p.reason_N for p in parts]), None)

    def _no_values(self) -> NDArray[np.float64]:
        return np.full((self._n_readings, len(METRICS)), np.nan)


def finished_rows(piece: StateChunk, ids: Sequence[Sequence[int]]) -> int:
    """Return the number of rows that end in this piece; a row without ids ends in no piece."""
    if piece.is_head:
        return 0
    ends = piece.start + piece.lengths
    return int(sum(piece.start < len(ids[row]) <= end for row, end in zip(piece.rows, ends, strict=True)))


def _finite(states: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Return (..., H) states in float64, or at least float32 if not `exact`, and (...) whether each of them is finite.

    States that are not finite become zero. A weight of zero cannot exclude them from a product: 0 · NaN and 0 · ∞ are NaN.
    """
    wide = states.double() if exact or states.dtype == torch.float64 else states.float()
    finite = torch.isfinite(wide.abs().amax(dim=-1))
    return wide if bool(finite.all()) else torch.where(finite[..., None], wide, 0.0), finite
