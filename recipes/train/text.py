"""Tokenises rows to disk: the training data of a language model, in the order of the rows.

Contract: row i of the result is the i-th row that was kept. A text is the template filled with the row's fields. The tokenizer
adds its own special tokens, an end-of-text token follows if the tokenizer has one, and the ids are cut at `max_length` tokens.
The number of cut texts is reported. A conversation is the text that the model's chat template makes of all its turns, and has no
other special tokens. No row is skipped: a row whose text is empty, or too short to have a token to predict, stops the run before
it begins, and is named.

The ids are in one Arrow file, which every process maps into memory. Its name includes a digest of the texts and of how they are
read, so that the same data is not tokenised twice, and other data never uses this file. A sealed record next to it has the size
and the digest of the file: ids that have changed, or that have no record, are written again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sparsort.curriculum.loading.loader.packing import IGNORED, PackedCollator
from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import Row, RowSource
from sparsort.scoring.prompts.chat_templates import RefusedTurnsError, apply_chat_template, need_chat_template
from sparsort.scoring.prompts.conversations import turns_of
from sparsort.scoring.prompts.prompt import Prompt, earlier_hash, hash_tokenizer
from sparsort.storage import integrity
from sparsort.storage.files import write_atomically
from sparsort.templates import fields_of, render
from sparsort.terminal.progress import progress

# Texts that are tokenised at once, and ids that a message lists.
_CHUNK = 512
_SHOWN = 5
# `n_tokens` is the length before the cut.
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("n_tokens", pa.int32())])
# Raise this if the same texts and the same tokenizer would give other ids.
_VERSION = 1
_LOG = logging.getLogger("sparsort")


class Kept(Sequence[Mapping[str, Any]]):
    """Some rows of a source, for `plan_curriculum`; every pass reads them from the source again.

    Args:
        source: all rows.
        keep: (N,) bool, true for the rows to keep.
    """

    def __init__(self, source: RowSource, keep: NDArray[np.bool_]) -> None:
        self.source, self.keep = source, keep

    def __len__(self) -> int:
        return int(np.count_nonzero(self.keep))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (row.fields for row in self.rows())

    @overload
    def __getitem__(self, place: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(place, slice):
            return list(itertools.islice(self, *place.indices(len(self))))
        position = int(np.flatnonzero(self.keep)[place])
        return next(self.source.rows(position)).fields

    def rows(self) -> Iterator[Row]:
        """The rows with their ids and positions."""
        return (row for row in self.source.rows() if self.keep[row.position])


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenised rows.

    Attributes:
        dataset: a memory-mapped `datasets.Dataset` with the column `input_ids`.
        lengths: (N,) int64 tokens of each row.
        cut: number of rows that were longer than `max_length`.
        digest: digest of the texts, the tokenizer and `max_length`; equal digests mean equal ids.
    """

    dataset: Any
    lengths: NDArray[np.int64]
    cut: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class TextCollator:
    """Collates rows of `input_ids` into tensors (B, L) that are padded on the right; packed sequences go to `PackedCollator`.

    Attributes:
        pad_token_id: the id of the padding, which has no label and which no token attends to. Labels depend on the length of a
            row and not on this id, so an end-of-text token with the same id is still trained on.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "position_ids" in examples[0]:
            return PackedCollator(pad_token_id=self.pad_token_id)(examples)
        import torch

        rows = [example["input_ids"] for example in examples]
        longest = max(map(len, rows))

        def padded(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

        return {
            "input_ids": padded(rows, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "labels": padded(rows, IGNORED),
        }


@dataclass(frozen=True, kw_only=True)
class TrainText:
    """The text that is read from a row.

    Attributes:
        template: a format string over the columns; None for conversations.
        messages: the column of whole conversations; None for a template.

    Raises:
        SparsortError: both or neither of them were given.
    """

    template: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        if (self.template is None) == (self.messages is None):
            given = "both were" if self.template is not None else "neither was"
            raise SparsortError(
                "training reads text (--text), a format string over the columns, or messages (--messages), a column of "
                f"conversations, and {given} given. Pass one of them."
            )

    def identity(self) -> dict[str, Any]:
        """The settings that determine the texts, as JSON values."""
        return {"text": self.template, **({} if self.messages is None else {"messages": self.messages})}

    def check(self, source: RowSource) -> None:
        """Refuse a source that has a row without a text.

        Raises:
            SparsortError: the template names no field, a row lacks a field, or a value is not text.
        """
        if self.messages is None and not fields_of(str(self.template)):
            raise SparsortError(
                f"the text {self.template!r} uses no field of the data, so every row would be the same. Name columns in braces; "
                f"{source.name} has: {', '.join(source.columns())}."
            )
        prompt = Prompt.given(self.template, messages=self.messages)
        if prompt is not None:
            source.require(prompt.fields, prompt)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse conversations for a model without a chat template."""
        if self.messages is not None:
            need_chat_template(tokenizer)

    def of(self, row: Mapping[str, Any], tokenizer: Any, *, where: str) -> str:
        """The text of a row; "" if its conversation is missing.

        Raises:
            SparsortError: the row cannot be read, or the chat template refuses its turns.
        """
        if self.messages is None:
            return render(str(self.template), row, where=where)
        turns = turns_of(row, self.messages, where=where)
        try:
            pairs = [(turn["role"], turn["content"]) for turn in turns]
            return apply_chat_template(tokenizer, pairs, ask=False) if pairs else ""
        except RefusedTurnsError as error:
            raise SparsortError(f"{where}: {error}") from error


def tokenise(
    rows: Kept, text: TrainText, tokenizer: Any, *, max_length: int, folder: Path, recorded: str | None = None
) -> Tokens:
    """Tokenise rows, or read their ids from `folder` if they were tokenised before.

    Args:
        rows: the rows.
        text: the text of a row.
        tokenizer: the model's tokenizer.
        max_length: tokens at which a text is cut.
        folder: the folder of the ids.
        recorded: the digest of the tokens with which the run began, or None. Digests of version 0.1.0 included the chat template
            even for plain texts; one of these is accepted if it is that of the same texts.

    Raises:
        SparsortError: rows whose text is empty or gives fewer than two tokens, with their names; a full disk.
    """
    import datasets

    chat = text.messages is not None

    def digest_under(tokenizer_hash: str) -> str:
        return _digest(
            rows, text, tokenizer, f"{_VERSION} {tokenizer_hash} {max_length}" + (" messages" if chat else "")
        )

    digest = digest_under(hash_tokenizer(tokenizer, chat=chat))
    if recorded not in (None, digest) and (earlier := earlier_hash(tokenizer, chat=chat)) is not None:
        digest = recorded if digest_under(earlier) == recorded else digest
    path = folder / f"tokens-{digest}.arrow"
    if not is_intact(path):
        _write(rows, text, tokenizer, max_length, path)
        integrity.write_sealed(_record(path), {path.name: integrity.record_of(path)})
    dataset = datasets.Dataset.from_file(str(path))
    lengths = pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64)
    cut = np.count_nonzero(dataset.data.column("n_tokens").to_numpy() > lengths)
    return Tokens(dataset=dataset, lengths=lengths, cut=int(cut), digest=digest)


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


def is_intact(path: Path) -> bool:
    """Whether the ids are as they were written; damage is reported as a warning."""
    if not (path.exists() and _record(path).exists()):
        return False
    try:
        record = integrity.parse_own_json(_record(path).read_text(encoding="utf-8"))
        sealed = isinstance(record, dict) and integrity.is_sealed(record)
        problem = integrity.damage(path, record[path.name]) if sealed else "its record has changed since it was written"
    except (OSError, ValueError, KeyError) as error:
        problem = f"it cannot be checked ({error})"
    if problem:
        _LOG.warning("%s is damaged: %s. The texts are tokenised again.", path, problem)
    return not problem


def _digest(rows: Kept, text: TrainText, tokenizer: Any, settings: str) -> str:
    """The digest of all texts and of the settings that they are read with; the same pass refuses empty texts."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    empty: list[str] = []
    for row in rows.rows():
        filled = _fill(rows, row, text, tokenizer)
        if not filled.strip():
            empty.append(row.id)
        part = filled.encode("utf-8", "surrogatepass")
        # The length before each text makes the digest depend on where one text ends and the next begins.
        digest.update(len(part).to_bytes(8, "little") + part)
    _refuse(rows, empty, "have an empty text")
    return digest.hexdigest()


def _write(rows: Kept, text: TrainText, tokenizer: Any, max_length: int, path: Path) -> None:
    short: list[str] = []
    # A chat template writes all special tokens itself, including the end of a turn.
    is_text = text.messages is None
    end = tokenizer.eos_token_id if is_text else None
    remaining = rows.rows()
    with write_atomically(path, hold=False) as temporary, progress("tokenising", len(rows)) as advance:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
            while chunk := list(itertools.islice(remaining, _CHUNK)):
                texts = [_fill(rows, row, text, tokenizer) for row in chunk]
                tokenised = [list(ids) for ids in tokenizer(texts, add_special_tokens=is_text)["input_ids"]]
                for row, ids in zip(chunk, tokenised, strict=True):
                    if end is not None and ids[-1:] != [end]:
                        ids.append(end)
                    if len(ids) < 2:
                        short.append(row.id)
                columns = [[ids[:max_length] for ids in tokenised], [len(ids) for ids in tokenised]]
                arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
                advance(len(chunk))
        _refuse(rows, short, "have a text of at most one token, so there is no token to predict")


def _fill(rows: Kept, row: Row, text: TrainText, tokenizer: Any) -> str:
    return text.of(row.fields, tokenizer, where=f"{rows.source.name}: row {row.position} ({row.id!r})")


def _refuse(rows: Kept, ids: list[str], problem: str) -> None:
    if ids:
        named = ", ".join(map(repr, ids[:_SHOWN])) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
        raise SparsortError(
            f"{len(ids)} of {len(rows)} rows of {rows.source.name} {problem}: {named}. "
            "Remove them from the file, or read other columns (--text, --messages)."
        )
