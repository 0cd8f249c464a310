"""The forward pass behind `candidates`: rows are read once, prompt and answer as one text, and every candidate collected.

Contract: the outlier rules are fitted when the job is made, on a sample of the source (`RowSource.sample`): 256 rows, fewer where
the states that wait for the fit would take more than `_KEPT_BYTES`. Those rows are scored with the fit at once, so that their
shards find them done. A job that continues a run takes the recorded fits and runs no sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsort.kernels.sparsity.metrics import METRICS, ROW_REASONS
from sparsort.scoring.data.rows import SAMPLE_ROWS, Row, RowSource
from sparsort.scoring.model.backbone import StateChunk
from sparsort.scoring.model.batching import Plan
from sparsort.scoring.model.head import Head
from sparsort.scoring.model.sites import Site
from sparsort.scoring.prompts.prompt import Encoded, Encoder
from sparsort.scoring.scorers.base import Advance, Request
from sparsort.scoring.scorers.collect import Measurement, Reading, StateCollector, finished_rows
from sparsort.scoring.scorers.pooling import OutlierFit, restore_outliers
from sparsort.scoring.scorers.spans import states_at
from sparsort.scoring.scorers.sparsity import ModelJob, ModelScorer
from sparsort.terminal.progress import progress

# Columns beside the candidates.
LOSS, ANSWER_TOKENS = "answer_loss", "answer_tokens"

_KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair(Encoded):
    """A prompt's own ids, and those of prompt and answer in one text.

    Attributes:
        position: the row's place in the source.
        text: ids of prompt and answer.
        answer_at: the answer's first token in `text`.
    """

    position: int
    text: list[int]
    answer_at: int


class CandidateJob(ModelJob):
    """Scores shards by every candidate.

    Args:
        scorer, request, encoder, provenance: see `ModelJob`; the fits are added to the provenance.
        source: the rows, of which a sample is read at once to fit the outlier rules.
        measurements: what to measure.
        sites: where.
        head: reads the loss on the answer; None for no loss.
        l0_threshold: threshold of `l0_absolute`.
        recorded: the fits of a run that goes on, by way joined with "/".
    """

    def __init__(
        self,
        scorer: ModelScorer,
        request: Request,
        encoder: Encoder,
        provenance: dict[str, Any],
        source: RowSource,
        *,
        measurements: Sequence[Measurement],
        sites: Sequence[Site],
        head: Head | None,
        l0_threshold: float,
        recorded: Mapping[str, Any] | None,
    ) -> None:
        has_answer = request.prompt.answer is not None
        names = ["/".join((*m, metric)) for m in measurements for metric in METRICS]
        columns = [*names, *([LOSS] if head else []), *([ANSWER_TOKENS] if has_answer else [])]
        super().__init__(scorer, request, encoder, provenance, columns)
        self._measurements, self._head, self._threshold = measurements, head, l0_threshold
        self._reads_answer = head is not None or any(m.pooling == "answer" for m in measurements)
        last = self.backbone.head_site
        self._head_site = last.name
        self._measured = {site.name: self.backbone.width(site) for site in sites}
        self._sites = [*sites, *([last] if head and last.name not in self._measured else [])]
        self._done: dict[int, tuple[NDArray[np.float64], str]] = {}
        self._fits: dict[Measurement, OutlierFit] = {}
        if recorded is not None:
            ruled = {"/".join(m): m for m in measurements}
            for name, record in recorded.items():
                self._fits[ruled[name]] = restore_outliers(record, self._measured[ruled[name].site])
        elif any(m.outliers != "none" for m in measurements):
            self._fit(source)
        provenance["fits"] = {"/".join(m): fit.record for m, fit in self._fits.items()}

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Ids of every row: the prompt's own, and those of prompt and answer."""
        tokenizer = self.encoder.tokenizer
        rendered = [self.request.prompt.render(row.fields, where=row.name, tokenizer=tokenizer) for row in rows]
        together = self.encoder.encode(rendered)
        alone = together
        if self.request.prompt.answer is not None:
            alone = self.encoder.encode([replace(item, text=item.text[: item.answer_start]) for item in rendered])
        pairs: list[Encoded] = []
        for row, both, prompt in zip(rows, together, alone, strict=True):
            # A prompt that was cut to make room for its answer is what is read.
            ids = both.ids[: both.answer_start] if both.n_dropped else prompt.ids
            text, answer_at = (both.ids, both.answer_start) if self._reads_answer else (ids, len(ids))
            pairs.append(
                _Pair(
                    ids=ids,
                    n_lead=both.n_lead,
                    answer_start=len(ids),
                    n_dropped=both.n_dropped,
                    problem=both.problem or prompt.problem,
                    position=row.position,
                    text=text,
                    answer_at=answer_at,
                )
            )
        return pairs

    def plan(self, encoded: Sequence[Encoded]) -> Plan:
        """The plan of these rows' readings."""
        readings = self._readings(encoded)
        # What is read row by row: a prompt's last token, and from there on for the answer.
        ends = [min(r.prompt_end if r.reads_prompt else r.answer_start, r.answer_start) - 1 for r in readings]
        return self.backbone.plan([reading.ids for reading in readings], max_depth=min(ends, default=0))

    def read(self, encoded: Sequence[Encoded], how: Plan, advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        """(n, columns) values and each row's reason."""
        readings = self._readings(encoded)
        values, reasons = self._table(encoded, readings, *self._walk(readings, how, advance, self._fits))
        for number, pair in enumerate(_pairs(encoded)):
            if pair.position in self._done:
                values[number], reasons[number] = self._done.pop(pair.position)
                advance(1)
        return values, reasons

    def _fit(self, source: RowSource) -> None:
        sample = [item for item in self.encode(source.sample(SAMPLE_ROWS)) if item.problem is None]
        element = next(self.backbone.decoder.parameters()).element_size()
        waiting = sum(len(pair.text) for pair in _pairs(sample)) * element * sum(self._measured.values())
        sample = sample[:: max(1, -(-waiting // _KEPT_BYTES))]
        readings = self._readings(sample)
        with progress("fitting the outlier rules", len(sample)) as advance:
            collector, losses = self._walk(readings, self.plan(sample), advance, None)
        self._fits = collector.fit()
        values, reasons = self._table(sample, readings, collector, losses)
        for pair, row_values, reason in zip(_pairs(sample), values, reasons, strict=True):
            self._done[pair.position] = (row_values, reason)

    def _readings(self, encoded: Sequence[Encoded]) -> list[Reading]:
        """How the rows that are not done yet are run: once, twice where the answer changes the prompt's own tokens."""
        readings = []
        for number, pair in enumerate(_pairs(encoded)):
            if pair.position in self._done:
                continue
            end = len(pair.ids)
            joined = pair.text[:end] == pair.ids
            readings.append(
                Reading(
                    row=number,
                    ids=pair.text if joined else pair.ids,
                    first=pair.n_lead,
                    prompt_end=end,
                    answer_start=pair.answer_at if joined else end,
                )
            )
            if not joined:
                lead = pair.n_lead
                readings.append(
                    Reading(row=number, ids=pair.text, first=lead, prompt_end=lead, answer_start=pair.answer_at)
                )
        return readings

    def _walk(
        self, readings: Sequence[Reading], how: Plan, advance: Advance, fits: Mapping[Measurement, OutlierFit] | None
    ) -> tuple[StateCollector, NDArray[np.float64]]:
        """Run the readings; (N,) the sum of the losses of each one's answer."""
        collector = StateCollector(
            readings, how, self._measurements, fits=fits, l0_threshold=self._threshold, exact=False
        )
        # A row that is read twice ends with its prompt.
        prompts = [reading.ids if reading.reads_prompt else [] for reading in readings]
        losses = np.zeros(len(readings))
        for piece in self.backbone.walk([reading.ids for reading in readings], how, self._sites):
            collector.add(piece)
            if self._head is not None and not piece.is_head:
                self._add_losses(self._head, losses, readings, piece)
            advance(finished_rows(piece, prompts))
        return collector, losses

    def _add_losses(
        self, head: Head, losses: NDArray[np.float64], readings: Sequence[Reading], piece: StateChunk
    ) -> None:
        """Add each answer token's negative log-likelihood, read from the state before it."""
        spans = np.array([(readings[row].answer_start - 1, len(readings[row].ids) - 1) for row in piece.rows])
        positions = piece.start + np.arange(int(piece.lengths.max(initial=0)))
        end = np.minimum(spans[:, 1], piece.start + piece.lengths)
        batch, token = np.nonzero((positions >= spans[:, :1]) & (positions < end[:, None]))
        if not len(batch):
            return
        picked = states_at(piece.states[self._head_site], batch, token)
        rows = piece.rows[batch]
        targets = [readings[row].ids[place + 1] for row, place in zip(rows, piece.start + token, strict=True)]
        found = head.losses(picked, torch.tensor(targets, device=picked.device)).cpu().numpy()
        np.add.at(losses, rows, found)

    def _table(
        self,
        encoded: Sequence[Encoded],
        readings: Sequence[Reading],
        collector: StateCollector,
        losses: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], list[str]]:
        values = np.full((len(encoded), len(self.metrics)), np.nan)
        reasons = [""] * len(encoded)
        prompts = np.array([n for n, r in enumerate(readings) if r.reads_prompt], dtype=np.int64)
        answers = np.array([n for n, r in enumerate(readings) if len(r.ids) > r.answer_start], dtype=np.int64)
        row_of = np.array([reading.row for reading in readings], dtype=np.int64)
        for place, (m, (found, codes)) in enumerate(collector.values().items()):
            used = answers if m.pooling == "answer" else prompts
            columns = slice(place * len(METRICS), (place + 1) * len(METRICS))
            values[row_of[used], columns] = found[used]
            if self.provenance["metric"].startswith("/".join(m)):
                for number in used:
                    reasons[row_of[number]] = ROW_REASONS[codes[number]]
        if LOSS in self.metrics:
            lengths = np.array([len(r.ids) - r.answer_start for r in readings], dtype=np.float64)
            means = losses[answers] / lengths[answers]
            values[row_of[answers], self.metrics.index(LOSS)] = np.where(np.isfinite(means), means, np.nan)
        if ANSWER_TOKENS in self.metrics:
            counts = [len(pair.text) - pair.answer_at for pair in _pairs(encoded)]
            values[:, self.metrics.index(ANSWER_TOKENS)] = counts if self._reads_answer else np.nan
        return values, reasons


def _pairs(encoded: Sequence[Encoded]) -> list[_Pair]:
    return [item for item in encoded if isinstance(item, _Pair)]
