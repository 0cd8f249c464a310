"""Scorers that read the language-model head: the model's own loss, and the entropy of its prediction.

They measure difficulty directly from the model's predictions, and a sparsity score is compared with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.data.rows import Row, RowSource
from sparsort.scoring.model.backbone import StateChunk
from sparsort.scoring.model.batching import Plan
from sparsort.scoring.model.head import Head
from sparsort.scoring.model.spec import ModelOptions
from sparsort.scoring.prompts.prompt import Encoded, Encoder
from sparsort.scoring.scorers.base import Advance, Request
from sparsort.scoring.scorers.collect import finished_rows
from sparsort.scoring.scorers.spans import RowSpans, states_at
from sparsort.scoring.scorers.sparsity import ModelJob, ModelScorer


class _HeadScorer(ModelScorer):
    """A scorer with one number per row, which is computed from the model's predictions at the positions `reads`."""

    reads: Literal["answer", "prompt", "next_token"]

    def __init__(self, model: Any = "demo", **options: Unpack[ModelOptions]) -> None:
        super().__init__(model, **options)
        self.head = Head(self.loaded.model, self.backbone.config, self.loaded.name)

    def _job(self, source: RowSource, request: Request, encoder: Encoder, previous: dict[str, Any] | None) -> ModelJob:
        if self.reads == "answer" and request.prompt.answer is None:
            raise SparsortError(
                "the loss on the answer needs an answer. Pass answer='…' (--answer), for example ' {answer}'."
            )
        provenance = self._provenance(request, encoder, {self.kind: 1}, previous) | {"metric": self.kind}
        return _HeadJob(self, request, encoder, provenance)


class LossScorer(_HeadScorer):
    """Ranks examples by the model's own loss: mean negative log-likelihood in nats per token.

    Args:
        model: see `ModelScorer`, with its other arguments.
        on: "answer" (the answer's tokens given the prompt; needs `answer=`) or "prompt" (all tokens of the prompt except the
            first; an answer is ignored).
    """

    def __init__(
        self, model: Any = "demo", *, on: Literal["answer", "prompt"] = "answer", **options: Unpack[ModelOptions]
    ) -> None:
        if on not in ("answer", "prompt"):
            raise unknown_choice("part of the text", on, ("answer", "prompt"))
        self.on = self.reads = on
        super().__init__(model, **options)

    def shown(self) -> dict[str, Any]:
        return super().shown() | {"on": self.on}

    @property
    def kind(self) -> str:  # type: ignore[override]
        """`answer_loss` or `prompt_loss`."""
        return f"{self.on}_loss"


class EntropyScorer(_HeadScorer):
    """Ranks examples by the entropy in nats of the model's next-token distribution after the text.

    Args:
        model: see `ModelScorer`, with its other arguments.
    """

    kind: ClassVar[str] = "entropy"
    reads = "next_token"


class _HeadJob(ModelJob):
    """Reads the head at the positions that a loss or an entropy needs."""

    def __init__(self, scorer: _HeadScorer, request: Request, encoder: Encoder, provenance: dict[str, Any]) -> None:
        super().__init__(scorer, request, encoder, provenance, [scorer.kind])
        self.kind, self.head, self.reads = scorer.kind, scorer.head, scorer.reads
        self.wants_answer = self.reads == "answer"
        self.site = scorer.backbone.head_site

    def measured(self) -> dict[str, Any]:
        return {"kind": self.kind, "site": self.site.name}

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        too_short = ("empty", "a single token has nothing to be predicted from")
        return [
            Encoded(ids=e.ids, n_lead=e.n_lead, answer_start=e.answer_start, problem=too_short)
            if e.problem is None and self._span(e)[0] >= self._span(e)[1]
            else e
            for e in super().encode(rows)
        ]

    def plan(self, encoded: Sequence[Encoded]) -> Plan:
        # The state that predicts the first scored token must be computed in the row: the head sees the next token of one row
        # only, and rows that share their beginning may continue differently.
        first = min((self._span(item)[0] for item in encoded), default=0)
        return self.backbone.plan([item.ids for item in encoded], max_depth=first)

    def _span(self, item: Encoded) -> tuple[int, int]:
        """Return the first position whose state is read, and the exclusive end; each state predicts the token after it."""
        if self.reads == "next_token":
            return len(item.ids) - 1, len(item.ids)
        if self.reads == "answer":
            return max(item.answer_start - 1, 0), len(item.ids) - 1
        return max(item.n_lead - 1, 0), item.answer_start - 1

    def read(self, encoded: Sequence[Encoded], plan: Plan, advance: Advance) -> tuple[NDArray[np.float64], list[str]]:
        ids = [item.ids for item in encoded]
        first_N, end_N = np.array([self._span(item) for item in encoded], dtype=np.int64).T
        spans = RowSpans(first_N, end_N, plan)
        total = np.zeros(len(ids))
        for piece in self.backbone.walk(ids, plan, [self.site]):
            advance(finished_rows(piece, ids))
            batch, token = spans.pick(piece)
            # No state of a shared head is in a span: see `plan`.
            if len(batch):
                picked = states_at(piece.states[self.site.name], batch, token)
                # With `+=`, a row that occurs several times in `batch` would be increased only once.
                np.add.at(total, piece.rows[batch], self._values(picked, ids, piece, batch, token))
        means = total / np.maximum(spans.counts, 1)
        reasons = ["" if math.isfinite(value) else "not_finite" for value in means]
        means[~np.isfinite(means)] = np.nan
        return means[:, None], reasons

    def _values(
        self,
        picked_NH: torch.Tensor,
        ids: Sequence[Sequence[int]],
        piece: StateChunk,
        batch: NDArray[np.int64],
        token: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        if self.reads == "next_token":
            return self.head.entropies(picked_NH).cpu().numpy()
        targets = [ids[row][position + 1] for row, position in zip(piece.rows[batch], piece.start + token, strict=True)]
        return self.head.losses(picked_NH, torch.tensor(targets, device=picked_NH.device)).cpu().numpy()
