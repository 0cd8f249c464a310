"""The collector of states against a plain loop over rows and tokens, on made-up states of a planned walk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparsort.kernels.backend import sparsity_metrics
from sparsort.kernels.sparsity.metrics import METRICS, ROW_REASONS
from sparsort.scoring.model.backbone import StateChunk
from sparsort.scoring.model.batching import Limits, Plan, plan
from sparsort.scoring.scorers.collect import Measurement, Reading, SquareSum, StateCollector, finished_rows
from sparsort.scoring.scorers.pooling import OutlierFit

WIDTHS = {"pre_norm": 24, "mlp": 40}
GRID = [
    Measurement(site, pooling, rule)
    for site in WIDTHS
    for pooling in ("last", "mean_metric", "mean_state", "answer")
    for rule in ("none", "drop:2", "rms")
]
States = list[dict[str, torch.Tensor]]
Fits = dict[Measurement, OutlierFit]


def _readings(rng: np.random.Generator) -> list[Reading]:
    """Rows with a common start, so that the plan shares it; rows of one token, and some without an answer."""
    readings = []
    for row in range(17):
        prompt = [1, *([7, 8, 9, 7] if row % 4 else []), *rng.integers(2, 6, rng.integers(1, 12)).tolist()]
        answer = rng.integers(2, 6, rng.integers(0, 4)).tolist()
        readings.append(
            Reading(row=row, ids=prompt + answer, first=1, prompt_end=len(prompt), answer_start=len(prompt))
        )
    return readings


def _states(readings: Sequence[Reading], how: Plan, dtype: torch.dtype, bad: Sequence[int]) -> States:
    """Site → states of every reading: the same where rows share a head, and NaN at the end of the prompts of `bad` rows."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> dict[str, torch.Tensor]:
        return {s: torch.randn(count, width, generator=generator).to(dtype) for s, width in WIDTHS.items()}

    heads = [draw(how.depth) for _ in how.heads]
    rows = [draw(len(reading.ids)) for reading in readings]
    for states, head in zip(rows, how.head_of.tolist(), strict=True):
        for site in WIDTHS:
            if head >= 0:
                states[site][: how.depth] = heads[head][site]
    for row in bad:
        for site in WIDTHS:
            rows[row][site][readings[row].prompt_end - 1] = torch.nan
    return rows


def _pieces(readings: Sequence[Reading], how: Plan, states: States, chunk: int) -> list[StateChunk]:
    """The pieces of a walk, padded with what must not be read."""
    walks = [(rows, 0, np.full(len(rows), how.depth), True) for rows in how.head_batches]
    for rows in how.batches:
        begin = how.depth if how.head_of[rows[0]] >= 0 else 0
        walks.append((rows, begin, np.array([len(readings[row].ids) for row in rows]), False))
    pieces = []
    for rows, begin, ends, is_head in walks:
        sources = [int(np.flatnonzero(how.head_of == row)[0]) for row in rows] if is_head else rows.tolist()
        for start in range(begin, int(ends.max()), chunk):
            live = np.flatnonzero(ends > start)
            lengths = np.minimum(ends[live] - start, chunk)
            padded = {s: torch.full((len(live), int(lengths.max()) + 1, w), torch.inf) for s, w in WIDTHS.items()}
            for place, (number, length) in enumerate(zip(live.tolist(), lengths.tolist(), strict=True)):
                for site in WIDTHS:
                    padded[site] = padded[site].to(states[0][site].dtype)
                    padded[site][place, :length] = states[sources[number]][site][start : start + length]
            pieces.append(StateChunk(rows=rows[live], start=start, lengths=lengths, states=padded, is_head=is_head))
    return pieces


def _walk(
    dtype: torch.dtype, chunk: int, bad: Sequence[int] = ()
) -> tuple[list[Reading], Plan, States, list[StateChunk]]:
    readings = _readings(np.random.default_rng(5))
    ids = [list(reading.ids) for reading in readings]
    how = plan(ids, Limits(tokens=40, kept=400, depth=min(reading.prompt_end for reading in readings) + 2))
    states = _states(readings, how, dtype, bad)
    return readings, how, states, _pieces(readings, how, states, chunk)


def _part(reading: Reading, pooling: str) -> slice:
    if pooling == "answer":
        return slice(reading.answer_start, None)
    return slice(reading.prompt_end - 1 if pooling == "last" else reading.first, reading.prompt_end)


def _plain_fit(m: Measurement, readings: Sequence[Reading], states: States) -> NDArray[np.float64]:
    """The factor of every dimension, 0 for one that is dropped."""
    parts = [rows[m.site][_part(reading, m.pooling)] for reading, rows in zip(readings, states, strict=True)]
    seen = [state for part in parts for state in part.double() if torch.isfinite(state).all()]
    square = torch.stack(seen).square().mean(dim=0).numpy()
    if m.outliers == "rms":
        return np.asarray(1 / np.sqrt(square))
    count = int(m.outliers.removeprefix("drop:")) if m.outliers != "none" else 0
    return np.where(np.isin(np.arange(len(square)), np.argsort(-square)[:count]), 0.0, 1.0)


def _plain(m: Measurement, reading: Reading, rows: dict[str, torch.Tensor], scale: NDArray[np.float64]) -> list[float]:
    part = rows[m.site][_part(reading, m.pooling)].double()
    if m.pooling == "mean_state":
        part = part.mean(dim=0, keepdim=True)
    measured = sparsity_metrics((part * torch.from_numpy(scale))[:, scale != 0])
    return [float(measured[name].mean()) if len(part) else np.nan for name in METRICS]


def _collect(
    measurements: Sequence[Measurement], readings: list[Reading], how: Plan, pieces: list[StateChunk], **options: Any
) -> StateCollector:
    collector = StateCollector(readings, how, measurements, **options)
    for piece in pieces:
        collector.add(piece)
    return collector


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("dtype", "chunk", "bad"), [(torch.float32, 100, ()), (torch.bfloat16, 3, ()), (torch.float64, 5, (2, 9))]
)
def test_every_measurement_is_that_of_a_plain_loop(
    exact: bool, dtype: torch.dtype, chunk: int, bad: Sequence[int]
) -> None:
    readings, how, states, pieces = _walk(dtype, chunk, bad)
    assert how.depth
    assert any(piece.is_head for piece in pieces)
    collector = _collect(GRID, readings, how, pieces, fits=None, exact=exact)
    fits = collector.fit()
    assert list(fits) == [m for m in GRID if m.outliers != "none"]
    for m, (values, codes) in collector.values().items():
        scale = _plain_fit(m, readings, states)
        if m in fits:
            np.testing.assert_allclose(fits[m].scale_H, scale, rtol=1e-5)
        expected = np.array([_plain(m, r, rows, scale) for r, rows in zip(readings, states, strict=True)])
        atol = [1.01 / WIDTHS[m.site] if name.startswith("l0") else 1e-6 for name in METRICS]
        assert np.isnan(values).tolist() == np.isnan(expected).tolist(), m
        assert np.all((np.abs(values - expected) <= atol + 1e-5 * np.abs(expected)) | np.isnan(expected)), m
        hurt = [] if m.pooling == "answer" else bad
        assert [ROW_REASONS[code] for code in codes] == ["not_finite" if n in hurt else "" for n in range(len(codes))]


@pytest.mark.parametrize("exact", [True, False])
def test_a_measurement_is_the_same_bits_alone_and_among_others(exact: bool) -> None:
    readings, how, _, pieces = _walk(torch.float32, 5, (4,))
    together = _collect(GRID, readings, how, pieces, fits=None, exact=exact)
    fits, values = together.fit(), together.values()
    for m in GRID:
        alone = _collect([m], readings, how, pieces, fits=None, exact=exact)
        assert [fit.record for fit in alone.fit().values()] == [fits[m].record for m in [m] if m in fits]
        given = _collect([m], readings, how, pieces, fits={m: fits[m]} if m in fits else {}, exact=exact)
        for one in (alone.values()[m], given.values()[m]):
            for array, other in zip(one, values[m], strict=True):
                np.testing.assert_array_equal(array, other)


def test_the_mean_states_are_the_plain_means() -> None:
    readings, how, states, pieces = _walk(torch.float32, 4)
    m = Measurement("mlp", "mean_state", "none")
    means, codes = _collect([m], readings, how, pieces, fits={}, exact=True).mean_states("mlp")
    for mean, reading, rows in zip(means, readings, states, strict=True):
        np.testing.assert_allclose(mean, rows["mlp"][reading.first : reading.prompt_end].double().mean(0), rtol=1e-12)
    assert not codes.any()


def test_a_state_counts_once_for_every_row_that_shares_it() -> None:
    for exact, bad in itertools.product((True, False), (0.0, torch.inf)):
        squares = SquareSum(exact=exact)
        assert squares.mean_H().size == 0
        squares.add(torch.tensor([[1.0, 2.0], [3.0, bad]]), np.array([3, 2]))
        assert squares.count == (3 if bad else 5)
        np.testing.assert_allclose(squares.mean_H(), [1.0, 4.0] if bad else [21 / 5, 12 / 5])


def test_every_row_is_finished_once() -> None:
    readings, _, _, pieces = _walk(torch.float32, 3)
    ids = [reading.ids if reading.row != 2 else [] for reading in readings]
    assert sum(finished_rows(piece, ids) for piece in pieces) == len(readings) - 1
