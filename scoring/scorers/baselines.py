"""Scorers without a forward pass: length, compression, an existing column, and random numbers.

They are the confounds and controls that a sparsity score is compared with, under the same interface. A new one subclasses
`RowScorer`.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from sparsort.conditions import Table, When, among, refuse_unread_arguments
from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.data.rows import Row, RowSource
from sparsort.scoring.loading.demo_model import load_tokenizer
from sparsort.scoring.prompts.prompt import Encoder, Prompt, identify_tokenizer
from sparsort.scoring.scorers import SCORERS
from sparsort.scoring.scorers.base import Advance, Request, Scorer, versions
from sparsort.scoring.scorers.run_shards import Job
from sparsort.scoring.store.score_tables import score_table
from sparsort.values import has_text, is_missing

_NO_MODEL = (When(holds=lambda values: False, why="this scorer runs no model, and cuts no text"),)
_NOTHING_TO_KEEP = (When(holds=lambda values: False, why="this scorer runs no model, and has nothing to keep"),)
# The settings of a request that have no effect without a model; see `sparsort.conditions`.
_REQUEST_READ_BY: Table = {"truncation": _NO_MODEL, "max_length": _NO_MODEL, "cache": _NOTHING_TO_KEEP}
_TOKENS = (among("unit", ("tokens",), of=("tokens", "characters")),)
_LENGTH_READ_BY: Table = {"model": _TOKENS, "revision": _TOKENS, "trust_remote_code": _TOKENS}


class _RowJob(Job):
    """Scores each row by itself with `scorer.value`."""

    def __init__(self, scorer: RowScorer, request: Request) -> None:
        self._scorer, self._request = scorer, request
        self.metrics = (scorer.kind,)
        self.provenance = request.provenance(scorer.kind, {scorer.kind: 1}) | {
            "metric": scorer.kind,
            "options": scorer.options(),
            "environment": versions(),
        }

    def score_rows(self, rows: Sequence[Row], advance: Advance) -> pa.Table:
        results = [self._value(row) for row in rows]
        advance(len(rows))
        values = np.array([value for _, _, value in results])
        return score_table(
            rows,
            difficulty=values,
            status=[status for status, _, _ in results],
            reason=[reason for _, reason, _ in results],
            n_tokens=np.nan_to_num(values).astype(int) if self._scorer.counts_tokens else [0] * len(rows),
            n_truncated=[0] * len(rows),
            metrics={self._scorer.kind: values},
        )

    def _value(self, row: Row) -> tuple[str, str, float]:
        """Return (status, reason, difficulty) of one row."""
        text = None
        if self._scorer.reads_text:
            rendered = self._request.prompt.render(row.fields, where=row.name, tokenizer=self._scorer.tokenizer)
            if rendered.problem is not None:
                return *rendered.problem, math.nan
            text = rendered.text
        status, value = self._scorer.value(row, text)
        return status, _REASONS[status], value


_REASONS = {"ok": "", "missing": "the column holds no finite number"}


class RowScorer(Scorer):
    """A scorer whose entry in `SCORERS` runs no model: `value` computes the difficulty of one row from its text or fields.

    Attributes:
        counts_tokens: whether the difficulty is the number of tokens, which the table then has as `n_tokens` too.
        tokenizer: renders chat templates; None for a scorer that reads plain text only.
    """

    counts_tokens = False
    tokenizer: Any = None

    @property
    def reads_text(self) -> bool:
        """Whether `value` takes the rendered text."""
        return "text" in SCORERS.check(self.kind).needs

    def prepare(self, source: RowSource, request: Request, previous: dict[str, Any] | None) -> Job:
        read = {"truncation": request.truncation, "max_length": request.max_length, "cache": request.cache}
        refuse_unread_arguments(self.score, _REQUEST_READ_BY, read)
        if self.reads_text and request.need_prompt(source).is_chat and self.tokenizer is None:
            raise SparsortError(
                f"the scorer {self.kind!r} reads plain text. Omit the chat template (--chat); instead of a conversation "
                "(--messages), name a part of it, such as prompt='{messages[0].content}' (--prompt)."
            )
        return _RowJob(self, request)

    def options(self) -> dict[str, Any]:
        """Return the scorer's own settings, which the provenance records."""
        return {}

    def shown(self) -> dict[str, Any]:
        return self.options()

    @abstractmethod
    def value(self, row: Row, text: str | None) -> tuple[str, float]:
        """Return (status, difficulty) of one row; `text` is the rendered prompt and answer, None if `reads_text` is false."""


class LengthScorer(RowScorer):
    """Ranks examples by length: the confound of every difficulty score.

    Args:
        unit: "tokens" (of `model`'s tokenizer) or "characters".
        model: the model whose tokenizer counts; refused with `unit="characters"`.
    """

    kind: ClassVar[str] = "length"

    def __init__(
        self,
        unit: Literal["tokens", "characters"] = "tokens",
        *,
        model: str = "demo",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if unit not in ("tokens", "characters"):
            raise unknown_choice("unit", unit, ("tokens", "characters"))
        read = {"unit": unit, "model": model, "revision": revision, "trust_remote_code": trust_remote_code}
        refuse_unread_arguments(LengthScorer, _LENGTH_READ_BY, read)
        self.unit, self.model = unit, model
        self.counts_tokens = unit == "tokens"
        if self.counts_tokens:
            self.tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        self._hash: str | None = None

    def options(self) -> dict[str, Any]:
        return {"unit": self.unit, "tokenizer": self._hash}

    def shown(self) -> dict[str, Any]:
        return {"unit": self.unit} | ({"model": self.model} if self.counts_tokens else {})

    def prepare(self, source: RowSource, request: Request, previous: dict[str, Any] | None) -> Job:
        if self.counts_tokens:
            # An earlier version hashed tokenizers differently, and its folders can still be continued.
            recorded = (previous or {}).get("options", {}).get("tokenizer")
            chat = request.need_prompt(source).is_chat
            self._hash = identify_tokenizer(self.tokenizer, chat=chat, recorded=recorded)
        job = super().prepare(source, request, previous)
        self._encoder = (
            Encoder(self.tokenizer, max_length=None, chat=request.prompt.is_chat) if self.counts_tokens else None
        )
        return job

    def value(self, row: Row, text: str | None) -> tuple[str, float]:
        if self._encoder is None:
            return "ok", float(len(text or ""))
        return "ok", float(self._encoder.count(text or ""))


class CompressionScorer(RowScorer):
    """Ranks examples by how little they compress: compressed bytes per byte (zlib, level 9), higher for denser text.

    Short texts do not compress (a ratio above 1 is the overhead of the format), so this score depends on length too.
    """

    kind: ClassVar[str] = "compression"

    def value(self, row: Row, text: str | None) -> tuple[str, float]:
        raw = (text or "").encode()
        return "ok", len(zlib.compress(raw, 9)) / len(raw)


class RandomScorer(RowScorer):
    """Ranks examples at random: a number uniform in [0, 1) from (seed, id), independent of the order of the data.

    Args:
        seed: any integer.
    """

    kind: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def options(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def value(self, row: Row, text: str | None) -> tuple[str, float]:
        draw = hashlib.blake2b(f"{self.seed}\0{row.id}".encode(), digest_size=8).digest()
        # The high 53 bits fill the mantissa of a double exactly, so every value is equally likely and below 1.
        return "ok", (int.from_bytes(draw, "big") >> 11) / 2**53


class ColumnScorer(RowScorer):
    """Ranks examples by a number in the data, such as a level assigned by humans or the score of another tool.

    Args:
        column: name of the column.
        descending: whether the column falls with difficulty.
    """

    kind: ClassVar[str] = "column"

    def __init__(self, column: str, *, descending: bool = False) -> None:
        self.column, self.descending = column, descending

    def content(self, prompt: Prompt | None) -> list[str]:
        return [self.column]

    def options(self) -> dict[str, Any]:
        return {"column": self.column, "descending": self.descending}

    def value(self, row: Row, text: str | None) -> tuple[str, float]:
        if self.column not in row.fields:
            raise unknown_choice(f"column (row {row.position}, id {row.id!r})", self.column, map(str, row.fields))
        field = row.fields[self.column]
        if is_missing(field):
            return "missing", math.nan
        try:
            # `float` accepts an array of one element, which is not a number in the data.
            if not has_text(field):
                raise TypeError
            number = float(field)
        except (OverflowError, TypeError, ValueError):
            raise SparsortError(
                f"column {self.column!r} of {row.name} holds {field!r}; expected a number. "
                "Name a numeric column, or convert it first."
            ) from None
        return ("ok", -number if self.descending else number) if math.isfinite(number) else ("missing", math.nan)
