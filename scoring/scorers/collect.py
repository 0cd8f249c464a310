"""From the states of every token to the metrics of every row: one collector, for one measurement or for five hundred.

Contract: `Reading`s go in (a row's ids, with the borders of prompt and answer), the pieces of one walk are added, and the metrics
of every reading come out for each measurement, a (site, pooling, outlier rule). Measurements do not affect each other. What
several of them need is computed once: the state of the last token and the sum of the states are kept per row, and measured
under every rule at the end; only `mean_metric` and `answer` measure every token.

The scorer of one measurement asks for `exact` arithmetic: float64 throughout. The scorer of all candidates does without it:
states are summed in float32 within a piece, and on a CPU the metrics of `mean_metric` and `answer` are computed in float32,
in a third of the time. That moves a mean of them by 1e-6.

The outlier rules can be fitted without a second pass. A collector made without fits keeps the states of the tokens that it has
to measure under a rule, and measures them once `fit` has fitted the rules on everything that was added.

Shape suffixes: B rows of a piece, T its tokens, K picked tokens, N readings, M metrics, H width.
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
from sparsort.scoring.scorers.spans import Span, states_at

_NOT_FINITE = ROW_REASONS.index("not_finite")
# Most token rows that one call of the metrics takes, which bounds the float64 copies of the CPU path.
_ROWS_AT_ONCE = 4096
# The part of a row whose states a pooling reads.
_PART = {"last": "last", "mean_metric": "prompt", "mean_state": "prompt", "answer": "answer"}
_PER_TOKEN = ("mean_metric", "answer")


class Measurement(NamedTuple):
    """What is measured of a row, apart from the metric."""

    site: str
    pooling: Pooling
    outliers: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One row as it is read: its prompt, its answer, or both in one text.

    Attributes:
        row: the row's number among those of the shard.
        ids: token ids.
        first: the first token of the text, after the tokenizer's special tokens.
        prompt_end: the token after the prompt's last; `first` where the prompt is read elsewhere.
        answer_start: the answer's first token; `len(ids)` where there is none.
    """

    row: int
    ids: Sequence[int]
    first: int
    prompt_end: int
    answer_start: int

    @property
    def reads_prompt(self) -> bool:
        """Whether the measurements of the prompt come from this reading."""
        return self.prompt_end > self.first


def whole_texts(encoded: Sequence[Encoded]) -> list[Reading]:
    """Readings of rows whose prompt is all of the text, whatever answer is in it."""
    return [
        Reading(row=number, ids=row.ids, first=row.n_lead, prompt_end=len(row.ids), answer_start=row.answer_start)
        for number, row in enumerate(encoded)
    ]


def span_of(pooling: Pooling, readings: Sequence[Reading], how: Plan) -> Span:
    """The tokens that a pooling reads.

    Args:
        pooling: which tokens.
        readings: in the order of the plan.
        how: the plan. Its shared heads end before the answer with pooling `answer`, before the last token with `last`.
    """
    borders = [(r.first, r.prompt_end, r.answer_start, len(r.ids)) for r in readings]
    first, prompt_end, answer, end = np.array(borders, dtype=np.int64).reshape(-1, 4).T
    if _PART[pooling] == "answer":
        return Span(answer, end, how)
    return Span(np.maximum(first, prompt_end - 1) if pooling == "last" else first, prompt_end, how)


class SquareSum:
    """The sum of the squares of every dimension over finite states, which the outlier rules are fitted on."""

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._sum_H: Tensor | None = None
        self.count = 0

    def add(self, states_KH: Tensor, shares_K: NDArray[np.int64]) -> None:
        """Add K states, the k-th of which counts `shares_K[k]` times: a state of a shared head, once for each of its rows."""
        wide_KH, finite_K = _finite(states_KH, exact=self._exact)
        weights_K = finite_K * torch.from_numpy(shares_K).to(wide_KH.device)
        squares_KH = wide_KH.square()
        if self._exact:
            squares_H = (squares_KH * weights_K[:, None]).sum(dim=0)
        else:
            squares_H = (weights_K.to(squares_KH.dtype) @ squares_KH).double()
        self._sum_H = squares_H if self._sum_H is None else self._sum_H + squares_H
        self.count += int(weights_K.sum())

    def mean_H(self) -> NDArray[np.float64]:
        """(width,) the mean square; empty when no state was added."""
        return self._sum_H.cpu().numpy() / max(self.count, 1) if self._sum_H is not None else np.zeros(0)


class StateCollector:
    """Gathers the pieces of one walk.

    Args:
        readings: N readings, in the order of the plan.
        how: the plan (see `span_of`).
        measurements: what to measure.
        fits: the fits of the outlier rules; None to fit them on these readings (see `fit`).
        l0_threshold: threshold of `l0_absolute`.
        exact: compute in float64 (see the contract).
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        how: Plan,
        measurements: Sequence[Measurement],
        *,
        fits: Mapping[Measurement, OutlierFit] | None,
        l0_threshold: float = 1.0,
        exact: bool,
    ) -> None:
        self._measurements, self._fits = list(measurements), fits
        self._threshold, self._exact = l0_threshold, exact
        self._n_readings = len(readings)
        self._spans = {_PART[m.pooling]: span_of(m.pooling, readings, how) for m in measurements}
        # The measurements of each site and part, which the pieces are taken apart by.
        self._groups: dict[tuple[str, str], list[Measurement]] = {}
        for m in measurements:
            self._groups.setdefault((m.site, _PART[m.pooling]), []).append(m)
        self._token_means = {m: span_of(m.pooling, readings, how) for m in measurements if m.pooling in _PER_TOKEN}
        self._state_means = {
            m.site: span_of("mean_state", readings, how) for m in measurements if m.pooling == "mean_state"
        }
        self._last: dict[str, Tensor] = {}
        self._squares: dict[tuple[str, str], SquareSum] = {}
        self._waiting: list[tuple[Measurement, StateChunk, NDArray[np.int64], Tensor]] = []

    def add(self, piece: StateChunk) -> None:
        """Take in one piece's states."""
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
                # Without its states, all of which the piece would keep in memory.
                bare = replace(piece, states={})
                self._waiting += [(m, bare, batch, states_KH) for m in ruled]
            index_K = torch.from_numpy(batch * states_BTH.shape[1] + token).to(states_BTH.device)
            for m in per_token:
                if m not in ruled:
                    self._measure_tokens(m, piece, batch, states_BTH, index_K)

    def fit(self) -> dict[Measurement, OutlierFit]:
        """Fit the outlier rules on all that was added, measure what waited for them, and return the fits.

        Raises:
            SparsortError: see `pooling.fit_outliers`.
        """
        for site, last_NH in self._last.items():
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
        """(N, H) what pooling `mean_state` measures, NaN for an empty text, and (N,) reason codes."""
        return self._state_means[site].means()

    def values(self) -> dict[Measurement, tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Measurement → (N, M) metrics in the order of `METRICS`, NaN where there is none, and (N,) reason codes."""
        found = {}
        means = {site: self.mean_states(site) for site in self._state_means}
        for m in self._measurements:
            if m.pooling in _PER_TOKEN:
                values, reasons = self._token_means[m].means()
                values = values if values.size else self._no_values()
            elif m.pooling == "last":
                values, reasons = self._measure_rows(m, self._last.get(m.site), np.zeros(self._n_readings, np.int64))
            else:
                mean_NH, reasons = means[m.site]
                values, reasons = self._measure_rows(m, torch.from_numpy(mean_NH) if mean_NH.size else None, reasons)
            values[reasons > 0] = np.nan
            found[m] = (values, reasons)
        return found

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
        # One matrix product sums the states of every row, which a GPU and a CPU both do well.
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
        # Rows without metrics are known by their reason; a zero keeps them from spreading within the sum of another row.
        values = measured.values_NM.double().nan_to_num(nan=0.0, posinf=torch.inf)
        self._token_means[m].add(piece, batch, values, measured.reason_N)

    def _measure_rows(
        self, m: Measurement, states_NH: Tensor | None, reasons: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The metrics of one state per reading; those without the part that is read have none."""
        values, reasons = self._no_values(), reasons.copy()
        read = np.flatnonzero(self._spans[_PART[m.pooling]].counts > 0)
        if states_NH is not None and len(read):
            index = torch.from_numpy(read).to(states_NH.device)
            measured = self._measure(m, states_NH, index, exact=True)
            values[read] = measured.values_NM.double().cpu().numpy()
            reasons[read] = np.maximum(reasons[read], measured.reason_N.long().cpu().numpy())
        return values, reasons

    def _measure(self, m: Measurement, states: Tensor, index_K: Tensor | None, *, exact: bool) -> RowMetrics:
        fit, device = (self._fits or {}).get(m), states.device
        scale = fit.scale_H.to(device) if fit is not None and fit.scale_H is not None else None
        options: dict[str, Any] = {"dim_scale": scale, "l0_threshold": self._threshold}
        run = sparsity_rows
        if not exact and states.dtype != torch.float64 and sparsity_implementation(device).value == "torch":
            run, options = sparsity_rows_ref, options | {"compute_dtype": torch.float32}
        if index_K is None:
            index_K = torch.arange(states.shape[:-1].numel(), device=device)
        parts = [run(states, part, **options) for part in torch.split(index_K, _ROWS_AT_ONCE)]
        return RowMetrics(torch.cat([p.values_NM for p in parts]), torch.cat([p.reason_N for p in parts]), None)

    def _no_values(self) -> NDArray[np.float64]:
        return np.full((self._n_readings, len(METRICS)), np.nan)


def finished_rows(piece: StateChunk, ids: Sequence[Sequence[int]]) -> int:
    """How many rows end in this piece; a row without ids ends in none."""
    if piece.is_head:
        return 0
    ends = piece.start + piece.lengths
    return int(sum(piece.start < len(ids[row]) <= end for row, end in zip(piece.rows, ends, strict=True)))


def _finite(states: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """(..., H) states in float64 (else float32 or wider), zero where one is not finite, and (...) whether it is.

    A product with zero would spread NaN and infinity over the row.
    """
    wide = states.double() if exact or states.dtype == torch.float64 else states.float()
    finite = torch.isfinite(wide.abs().amax(dim=-1))
    return wide if bool(finite.all()) else torch.where(finite[..., None], wide, 0.0), finite
