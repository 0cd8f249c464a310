"""Every candidate of a set of rows from one walk: what sites, poolings, metrics and outlier rules share is computed once.

Contract: `Reading`s go in (a row's ids, with the borders of prompt and answer), pieces of one walk are added, and every
candidate comes out, equal to what `SparsityScorer` with the same options gives. The state of the last token and the sum of the
states are kept a row, and measured under every rule at the end; only the poolings that measure every token (`mean_metric`,
`answer`) cost per token. Those metrics are computed in float32 on a CPU, a third of the time of float64, which moves a mean
of them by 1e-6.

The outlier rules are fitted without a second pass: a collector made without fits keeps the states of the tokens it would
measure, and measures them once the rules are fitted on all it has seen. `candidates` runs a bounded sample that way.

Shape suffixes: B rows of a piece, T its tokens, K picked tokens, N readings, M metrics, H width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsort.kernels.backend import sparsity_implementation, sparsity_rows
from sparsort.kernels.sparsity.checks import RowMetrics
from sparsort.kernels.sparsity.metrics import METRICS, ROW_REASONS
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref
from sparsort.scoring.backbone import Piece
from sparsort.scoring.batching import Plan
from sparsort.scoring.pooling import OutlierFit, fit_outliers
from sparsort.scoring.spans import Span

# (site, pooling, outlier rule)
Way = tuple[str, str, str]

_NOT_FINITE = ROW_REASONS.index("not_finite")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One row as it is read: its prompt, its answer, or both in one text.

    Attributes:
        row: the row's number among those of the shard.
        ids: token ids.
        first: the first token of the text, behind the tokenizer's special tokens.
        prompt_end: the token behind the prompt's last; `first` where the prompt is read elsewhere.
        answer_start: the answer's first token; `len(ids)` where there is none.
    """

    row: int
    ids: list[int]
    first: int
    prompt_end: int
    answer_start: int

    @property
    def reads_prompt(self) -> bool:
        """Whether the candidates of the prompt come from this reading."""
        return self.prompt_end > self.first


class CandidateCollector:
    """Gathers the pieces of one walk.

    Args:
        readings: N readings, in the order of the plan.
        how: their plan, whose shared heads end before any prompt's last token.
        ways: what to measure.
        fits: the outlier rules' fits; None to fit them on these very readings (see `fit`).
        l0_threshold: threshold of `l0_absolute`.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        how: Plan,
        ways: Sequence[Way],
        *,
        fits: Mapping[Way, OutlierFit] | None,
        l0_threshold: float,
    ) -> None:
        self._ways, self._fits, self._threshold = list(ways), fits, l0_threshold
        borders = [(r.first, r.prompt_end, r.answer_start, len(r.ids)) for r in readings]
        first, prompt_end, answer, end = np.array(borders, dtype=np.int64).reshape(-1, 4).T
        spans = {
            "prompt": (first, prompt_end),
            "answer": (answer, end),
            "last": (np.maximum(first, prompt_end - 1), prompt_end),
        }
        self._spans = {name: Span(*ends, how) for name, ends in spans.items()}
        self._sites = list(dict.fromkeys(site for site, _, _ in ways))
        poolings = {pooling for _, pooling, _ in ways}
        # What is averaged: the metrics of every token by way, and the state itself by site.
        self._tokens = {way: Span(*spans[_SPAN_OF[way[1]]], how) for way in ways if way[1] in _PER_TOKEN}
        self._states = {s: Span(*spans["prompt"], how) for s in self._sites if "mean_state" in poolings}
        self._last: dict[str, Tensor] = {}
        self._reads_last = "last" in poolings
        self._squares: dict[tuple[str, str], Tensor] = {}
        self._seen: dict[tuple[str, str], int] = {}
        self._kept: list[tuple[Way, Piece, NDArray[np.int64], Tensor]] = []
        self._n_readings = len(readings)

    def add(self, piece: Piece) -> None:
        """Take in one piece's states."""
        picked = {name: span.pick(piece) for name, span in self._spans.items()}
        for site in self._sites:
            states_BTH = piece.states[site]
            if self._reads_last and len(picked["last"][0]):
                self._add_last(site, states_BTH, piece, *picked["last"])
            if site in self._states and len(picked["prompt"][0]):
                self._add_states(site, states_BTH, piece, *picked["prompt"])
            for part, pooling in (("prompt", "mean_metric"), ("answer", "answer")):
                ways = [way for way in self._tokens if way[:2] == (site, pooling)]
                batch, token = picked[part]
                if not ways or not len(batch):
                    continue
                index_K = torch.from_numpy(batch * states_BTH.shape[1] + token).to(states_BTH.device)
                if self._fits is None and any(way[2] != "none" for way in ways):
                    rows_KH = states_BTH.flatten(0, 1)[index_K]
                    self._add_squares((site, pooling), rows_KH, self._spans[part].shares(piece)[batch])
                    # The piece without its states, all of which it would hold in memory.
                    bare = replace(piece, states={})
                    self._kept += [(way, bare, batch, rows_KH) for way in ways if way[2] != "none"]
                for way in ways:
                    if self._fits is not None or way[2] == "none":
                        self._measure_tokens(way, piece, batch, states_BTH, index_K)

    def fit(self) -> dict[Way, OutlierFit]:
        """Fit the outlier rules on all that was added, measure what waited for them, and return the fits.

        Raises:
            SparsortError: see `pooling.fit_outliers`.
        """
        squares = dict(self._squares)
        for site, last_NH in self._last.items():
            wide = last_NH[self._spans["last"].counts > 0].double()
            kept = wide[torch.isfinite(wide).all(dim=1)]
            squares[site, "last"], self._seen[site, "last"] = kept.square().sum(dim=0), len(kept)
        fits = {}
        for way in self._ways:
            site, pooling, rule = way
            if rule == "none":
                continue
            # Both read the prompt's tokens, and squares are taken once.
            source = (
                (site, "mean_metric") if pooling == "mean_state" and (site, pooling) not in squares else (site, pooling)
            )
            count = self._seen.get(source, 0)
            total = squares[source].cpu().double().numpy() if count else np.zeros(0)
            fits[way] = fit_outliers(rule, total / max(count, 1), count)
        self._fits = fits
        for way, piece, batch, rows_KH in self._kept:
            self._measure_tokens(way, piece, batch, rows_KH, None)
        self._kept.clear()
        return fits

    def values(self) -> dict[Way, tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Way → (N, M) metrics in the order of `METRICS`, NaN where there is none, and (N,) reason codes."""
        found = {}
        means = {site: span.means() for site, span in self._states.items()}
        for way in self._ways:
            site, pooling, _ = way
            if pooling in _PER_TOKEN:
                values, reasons = self._tokens[way].means()
                values = values if values.size else np.full((self._n_readings, len(METRICS)), np.nan)
            else:
                if pooling == "last":
                    states, before = self._last.get(site), np.zeros(self._n_readings, dtype=np.int64)
                else:
                    mean_NH, before = means[site]
                    states = torch.from_numpy(mean_NH) if mean_NH.size else None
                values = np.full((self._n_readings, len(METRICS)), np.nan)
                reasons = before
                read = np.flatnonzero(self._spans["prompt"].counts > 0)
                if states is not None and len(read):
                    index = torch.from_numpy(read).to(states.device)
                    measured = self._measure(way, states[index][None], None, exact=True)
                    values[read] = measured.values_NM.double().cpu().numpy()
                    reasons = before.copy()
                    reasons[read] = np.maximum(reasons[read], measured.reason_N.long().cpu().numpy())
            values[reasons > 0] = np.nan
            found[way] = (values, reasons)
        return found

    def _add_last(
        self, site: str, states_BTH: Tensor, piece: Piece, batch: NDArray[np.int64], token: NDArray[np.int64]
    ) -> None:
        if site not in self._last:
            self._last[site] = states_BTH.new_zeros((self._n_readings, states_BTH.shape[2]))
        device = states_BTH.device
        rows = torch.from_numpy(piece.rows[batch]).to(device)
        self._last[site][rows] = states_BTH[torch.from_numpy(batch).to(device), torch.from_numpy(token).to(device)]

    def _add_states(
        self, site: str, states_BTH: Tensor, piece: Piece, batch: NDArray[np.int64], token: NDArray[np.int64]
    ) -> None:
        """Sum the states of every row: one matrix product, which a GPU and a CPU both do well."""
        device, width = states_BTH.device, states_BTH.shape[1]
        inside = np.zeros((len(piece.rows), width), dtype=bool)
        inside[batch, token] = True
        mask_BT = torch.from_numpy(inside).to(device)
        wide_BTH = states_BTH if states_BTH.dtype == torch.float64 else states_BTH.float()
        bad_BT = ~torch.isfinite(wide_BTH.abs().amax(dim=2))
        if bool(bad_BT.any()):
            # A product with zero would spread them over the row.
            wide_BTH = torch.where(bad_BT[..., None], 0.0, wide_BTH)
        sums_BH = torch.bmm(mask_BT[:, None].to(wide_BTH.dtype), wide_BTH)[:, 0]
        reasons_B = (bad_BT & mask_BT).any(dim=1).long() * _NOT_FINITE
        read = np.flatnonzero(inside.any(axis=1))
        self._states[site].add(piece, read, sums_BH[read], reasons_B[read])
        if self._fits is None and (site, "mean_metric") not in {way[:2] for way in self._tokens}:
            rows_KH = wide_BTH[mask_BT]
            self._add_squares((site, "mean_state"), rows_KH, self._spans["prompt"].shares(piece)[batch])

    def _add_squares(self, key: tuple[str, str], rows_KH: Tensor, shares_K: NDArray[np.int64]) -> None:
        wide_KH = rows_KH if rows_KH.dtype == torch.float64 else rows_KH.float()
        finite_K = torch.isfinite(wide_KH.abs().amax(dim=1))
        weights_K = finite_K * torch.from_numpy(shares_K).to(wide_KH.device)
        if not bool(finite_K.all()):
            wide_KH = torch.where(finite_K[:, None], wide_KH, 0.0)
        squares = (weights_K.to(wide_KH.dtype) @ wide_KH.square()).double()
        self._squares[key] = self._squares[key] + squares if key in self._squares else squares
        self._seen[key] = self._seen.get(key, 0) + int(weights_K.sum())

    def _measure_tokens(
        self, way: Way, piece: Piece, batch: NDArray[np.int64], states: Tensor, index_K: Tensor | None
    ) -> None:
        states_BTH = states if states.dim() == 3 else states[None]
        measured = self._measure(way, states_BTH, index_K, exact=False)
        # Rows without metrics are known by their reason; a zero keeps them from spreading within the sum of another row.
        values = measured.values_NM.double().nan_to_num(nan=0.0, posinf=torch.inf)
        self._tokens[way].add(piece, batch, values, measured.reason_N)

    def _measure(self, way: Way, states_BTH: Tensor, index_K: Tensor | None, *, exact: bool) -> RowMetrics:
        fit = (self._fits or {}).get(way)
        device = states_BTH.device
        scale = fit.scale_H.to(device) if fit is not None and fit.scale_H is not None else None
        options: dict[str, Any] = {"dim_scale": scale, "l0_threshold": self._threshold}
        run = sparsity_rows
        if not exact and states_BTH.dtype != torch.float64 and sparsity_implementation(device).value == "torch":
            run, options = sparsity_rows_ref, options | {"compute_dtype": torch.float32}
        if index_K is None:
            index_K = torch.arange(states_BTH.shape[:-1].numel(), device=device)
        parts = [run(states_BTH, part, **options) for part in torch.split(index_K, _ROWS_AT_ONCE)]
        return RowMetrics(torch.cat([p.values_NM for p in parts]), torch.cat([p.reason_N for p in parts]), None)


_PER_TOKEN = ("mean_metric", "answer")
_SPAN_OF = {"mean_metric": "prompt", "answer": "answer"}
