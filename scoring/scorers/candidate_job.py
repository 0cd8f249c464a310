"""The job of `CandidateScorer`: each row is read once, prompt and answer as one text, and every candidate is collected.

Contract: the outlier rules are fitted when the job is created, on a sample of the source (`RowSource.sample`). The sample has 256
rows, or fewer if the states that wait for the fit would take more than `_KEPT_BYTES`. The rows of the sample are scored in the
same pass, and their shards use these values. A job that continues a run uses the recorded fits and reads no sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsort.kernels.sparsity.metrics import METRICS, ROW_REASONS
from sparsort.scoring.data.digests import SAMPLE_ROWS
from sparsort.scoring.data.rows import Row, RowSource
from sparsort.scoring.model.batching import Plan
from sparsort.scoring.model.head import Head
from sparsort.scoring.model.sites import Site
from sparsort.scoring.prompts.prompt import Encoded, Encoder
from sparsort.scoring.scorers.base import Advance, Request
from sparsort.scoring.scorers.collect import Measurement, Reading, StateCollector, finished_rows
from sparsort.scoring.scorers.pooling import OutlierFit, restore_outliers
from sparsort.scoring.scorers.spans import RowSpans, states_at
from sparsort.scoring.scorers.sparsity import ModelJob, ModelScorer
from sparsort.terminal.progress import progress

# The columns that are not candidates.
LOSS, ANSWER_TOKENS = "answer_loss", "answer_tokens"

# The most memory for states that wait for the outlier rules to be fitted.
_KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair(Encoded):
    """The ids of a row's prompt alone, as in `Encoded`, and those of prompt and answer in one text.

    Attributes:
        position: position of the row in the source.
        text: ids of prompt and answer.
        answer_at: index in `text` of the answer's first token.
    """

    position: int
    text: list[int]
    answer_at: int


class CandidateJob(ModelJob):
    """Scores shards by every candidate.

    Args:
        scorer, request, encoder, provenance: see `ModelJob`; the fits are added to the provenance.
        source: the rows, of which a sample is read immediately if outlier rules must be fitted.
        measurements: the measurements to make.
        sites: the sites of the measurements.
        head: computes the loss on the answer; None for no loss.
        l0_threshold: threshold of `l0_absolute`.
        recorded: measurement, joined with "/" → its recorded fit, for a run that is resumed; else None.
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
        # The loss needs the states that the head reads, which may be at a site that is not measured.
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
        """Render the rows, and encode each prompt alone and together with its answer."""
        tokenizer = self.encoder.tokenizer
        rendered = [self.request.prompt.render(row.fields, where=row.name, tokenizer=tokenizer) for row in rows]
        together = self.encoder.encode(rendered)
        alone = together
        if self.request.prompt.answer is not None:
            alone = self.encoder.encode([replace(item, text=item.text[: item.answer_start]) for item in rendered])
        pairs: list[Encoded] = []
        for row, both, prompt in zip(rows, together, alone, strict=True):
            # If the prompt was cut to make room for its answer, the cut prompt is measured.
            ids = both.ids[: both.answer_start] if both.n_dropped else prompt.ids
            # If no candidate and no loss reads the answer, it is not run at all.
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
        """Plan the batches of the readings of these rows."""
        readings = self._readings(encoded)
        # The last token of a prompt and everything after it is measured row by row, so shared heads end before it.
        ends = [min(r.prompt_end if r.reads_prompt else r.answer_start, r.answer_start) - 1 for r in readings]
        return self.backbone.plan([reading.ids for reading in readings], max_depth=min(ends, default=0))

    def read(self, encoded: Sequence[Encoded], plan: Plan, advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        """Run the model; returns values, (n, columns), and each row's reason."""
        readings = self._readings(encoded)
        values, reasons = self._table(encoded, readings, *self._walk(readings, plan, advance, self._fits))
        for number, pair in enumerate(_pairs(encoded)):
            if pair.position in self._done:
                # A row of the sample is in one shard only, so its values are not needed again.
                values[number], reasons[number] = self._done.pop(pair.position)
                advance(1)
        return values, reasons

    def _fit(self, source: RowSource) -> None:
        """Fit the outlier rules on a sample, and keep the values of its rows for their shards."""
        sample = [item for item in self.encode(source.sample(SAMPLE_ROWS)) if item.problem is None]
        element = next(self.backbone.decoder.parameters()).element_size()
        waiting = sum(len(pair.text) for pair in _pairs(sample)) * element * sum(self._measured.values())
        # Every n-th row, for the smallest n whose states fit.
        sample = sample[:: max(1, -(-waiting // _KEPT_BYTES))]
        readings = self._readings(sample)
        with progress("fitting the outlier rules", len(sample)) as advance:
            collector, losses = self._walk(readings, self.plan(sample), advance, None)
        self._fits = collector.fit()
        values, reasons = self._table(sample, readings, collector, losses)
        for pair, row_values, reason in zip(_pairs(sample), values, reasons, strict=True):
            self._done[pair.position] = (row_values, reason)

    def _readings(self, encoded: Sequence[Encoded]) -> list[Reading]:
        """Return the readings of the rows without values: one, or two if the answer changes the prompt's own tokens."""
        readings = []
        for number, pair in enumerate(_pairs(encoded)):
            if pair.position in self._done:
                continue
            end = len(pair.ids)
            # True unless a token straddles the border of prompt and answer.
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
        self, readings: Sequence[Reading], plan: Plan, advance: Advance, fits: Mapping[Measurement, OutlierFit] | None
    ) -> tuple[StateCollector, NDArray[np.float64]]:
        """Run the readings; returns the collected states, and the summed losses of each reading's answer, (N,)."""
        collector = StateCollector(
            readings, plan, self._measurements, fits=fits, l0_threshold=self._threshold, exact=False
        )
        # A row that is read twice counts as finished when its prompt is.
        prompts = [reading.ids if reading.reads_prompt else [] for reading in readings]
        losses = np.zeros(len(readings))
        # Each token is predicted by the state of the token before it; without an answer the span is empty.
        borders = [(reading.answer_start - 1, len(reading.ids) - 1) for reading in readings]
        first_N, end_N = np.array(borders, dtype=np.int64).reshape(-1, 2).T
        predicting = RowSpans(first_N, end_N, plan)
        for piece in self.backbone.walk([reading.ids for reading in readings], plan, self._sites):
            collector.add(piece)
            batch, token = predicting.pick(piece)
            if self._head is not None and len(batch):
                picked = states_at(piece.states[self._head_site], batch, token)
                rows = piece.rows[batch]
                targets = [readings[row].ids[place + 1] for row, place in zip(rows, piece.start + token, strict=True)]
                # With `+=`, a row that occurs several times in `rows` would be increased only once.
                token_losses = self._head.losses(picked, torch.tensor(targets, device=picked.device))
                np.add.at(losses, rows, token_losses.cpu().numpy())
            advance(finished_rows(piece, prompts))
        return collector, losses

    def _table(
        self,
        encoded: Sequence[Encoded],
        readings: Sequence[Reading],
        collector: StateCollector,
        losses: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], list[str]]:
        """Return all columns, (n, columns), and each row's reason under the measurement of `provenance["metric"]`."""
        values = np.full((len(encoded), len(self.metrics)), np.nan)
        reasons = [""] * len(encoded)
        prompts = np.array([n for n, r in enumerate(readings) if r.reads_prompt], dtype=np.int64)
        answers = np.array([n for n, r in enumerate(readings) if len(r.ids) > r.answer_start], dtype=np.int64)
        row_of = np.array([reading.row for reading in readings], dtype=np.int64)
        for place, (m, (metrics_NM, codes)) in enumerate(collector.values().items()):
            used = answers if m.pooling == "answer" else prompts
            # `values` iterates in the order of the measurements, which is the order of the columns.
            columns = slice(place * len(METRICS), (place + 1) * len(METRICS))
            values[row_of[used], columns] = metrics_NM[used]
            # The metric of the provenance is one of these columns. The slash keeps drop:1 apart from drop:10.
            if self.provenance["metric"].startswith("/".join((*m, ""))):
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
