"""Text behind prompts: many queries continued at once behind one shared prefix, greedily or sampled.

Contract: a greedy text is that of transformers' `generate` for the query alone, its whole prompt and the same dtype, token
for token to rounding, with nothing of the model's own generation config but the tokens that end a text. A sampled one
depends on the seed and the row's number alone, to rounding too. The prefix's keys and values are computed once, rows that
have ended leave the batch, and what rows keep in memory is bounded. A model that cannot share prefixes
(`AnswerReader.implementation`) is left to transformers' `generate`, with the same choices made by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.scoring.answers.decoding import Sampling, Writer
from sparsort.scoring.answers.growing_kv import Keys, Tails
from sparsort.scoring.answers.prefix import Prefix
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.answers.token_tree import Passage

# Keys and values of the rows that are written at once.
_KEPT_BYTES = {"cpu": 2**30, "cuda": 2**33}
# 128 rows × 262144 logits × 4 bytes are 134 MB.
_ROWS_AT_ONCE = 128

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was written behind Q queries.

    Attributes:
        texts: the continuations, cut where a stop string begins.
        ids: the tokens written, those of a stop string or an end included.
        ended: whether each came to an end by a stop string or an end token, and not at the limit.
        tokens_read: tokens of prompts that were run.
        features: (Q, F) of each query's last state, as `Answers.features`.
    """

    texts: list[str]
    ids: list[list[int]]
    ended: list[bool]
    tokens_read: int
    features: NDArray[np.float64]

    @property
    def tokens_written(self) -> int:
        """Tokens of all texts together."""
        return sum(map(len, self.ids))


@torch.inference_mode()
def generate(
    reader: AnswerReader,
    chunks: Sequence[str],
    queries: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    no_repeat_ngram: int = 0,
    kept_words: str = "",
    seed: int = 0,
    advance: Advance | None = None,
) -> Generated:
    """Continue every query after a prefix.

    Args:
        reader: the model.
        chunks: what stands in front of every query, as in `AnswerReader.answers`; none where each is its own whole prompt.
        queries: Q texts, each joined to the prefix as it stands.
        max_new_tokens: a text ends after as many tokens.
        stop: a text ends where one of these begins, and it is cut off, also where it straddles tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_k: draw among as many of the likeliest; 0 for all.
        no_repeat_ngram: no run of as many tokens occurs twice, prompt included; 0 for no such rule.
        kept_words: text whose tokens are spared by that rule, and taken where one is the likeliest.
        seed: of the draws; row q draws by (seed, q).
        advance: told how many rows have been finished, whenever some have.

    Raises:
        SparsortError: no queries, a setting out of its range, or a prompt without room for its text in the model's context.
    """
    if not queries:
        raise SparsortError("there are no queries to continue. Give at least one.")
    words = reader.loaded.tokenizer(kept_words, add_special_tokens=False)["input_ids"] if kept_words else []
    sampling = Sampling(
        temperature=temperature, top_k=top_k, no_repeat_ngram=no_repeat_ngram, kept=frozenset(words), seed=seed
    )
    layout = reader.lay_out(chunks, queries, (), room=max(max_new_tokens, 0))
    shared = [token for segment in layout.segments for token in segment]
    writer = Writer(
        reader.loaded.tokenizer,
        [[*([] if passage.whole else shared), *passage.stem] for passage in layout.passages],
        max_new_tokens=max_new_tokens,
        stop=stop,
        end_ids=_end_ids(reader),
        sampling=sampling,
    )
    job = _Job(reader, layout.passages, writer, max_new_tokens)
    before = reader.reader.n_tokens
    for segments, places in layout.groups():
        for finished in job.write(segments, places):
            if advance is not None:
                advance(finished)
    return Generated(
        texts=writer.texts,
        ids=writer.ids,
        ended=writer.ended,
        tokens_read=reader.reader.n_tokens - before - job.steps,
        features=reader.features({site: torch.stack(rows) for site, rows in job.states.items()}),
    )


def sample_probes(
    reader: AnswerReader,
    prefixes: Sequence[Sequence[str]],
    *,
    opening: str,
    separator: str,
    words: str,
    max_new_tokens: int = 128,
    temperature: float = 2.0,
    top_k: int = 20,
    no_repeat_ngram: int = 3,
    seed: int = 0,
    advance: Advance | None = None,
) -> list[str]:
    """One sampled text behind each prefix, to be read as a probe query (arXiv 2104.08786, "probing set").

    The defaults are those of the paper's code: temperature 2, but among the 20 likeliest tokens, no run of three tokens
    twice, and words of the template or a label taken wherever they are the likeliest. Each part is needed: of 12 samples behind
    4 TREC questions the 270M demo model writes 11 that read as one; without `words` 3, and over the whole vocabulary none.

    Args:
        reader: the model.
        prefixes: the demonstrations of each candidate order, in chunks. One that stands here twice is sampled twice.
        opening: the template's words before its first field; the texts begin with it.
        separator: what stands between two demonstrations: a text ends there. "" to let it go on to further queries.
        words: the template's words, the separator and the labels' words, as `generate`'s `kept_words`.
        max_new_tokens, temperature, top_k, no_repeat_ngram, seed, advance: as in `generate`.

    Raises:
        SparsortError: as `generate`.
    """
    written = generate(
        reader,
        (),
        ["".join(chunks) + opening for chunks in prefixes],
        max_new_tokens=max_new_tokens,
        stop=[separator] if separator else [],
        temperature=temperature,
        top_k=top_k,
        no_repeat_ngram=no_repeat_ngram,
        kept_words=words,
        seed=seed,
        advance=advance,
    )
    return [opening + text for text in written.texts]


class _Job:
    """Runs what a writer writes.

    Attributes:
        states: site → Q states (width,), of the queries' ends.
        steps: tokens that were run to write others.
    """

    def __init__(self, reader: AnswerReader, passages: Sequence[Passage], writer: Writer, max_new_tokens: int) -> None:
        self.reader, self.passages, self.writer, self.max_new_tokens = reader, passages, writer, max_new_tokens
        self.states: dict[str, list[Tensor]] = {}
        self.steps = 0

    def write(self, segments: Sequence[Sequence[int]], places: Sequence[int]) -> Iterator[int]:
        """Write the rows `places` behind one prefix, batch by batch, the longest first; yields how many more are done."""
        order = sorted(places, key=lambda place: -len(self.passages[place].stem))
        whole = self.reader.reader.why_not is not None
        prefix = None if whole else self.reader.reader.prefix(segments)
        while order:
            batch = self._fitting(order, whole=whole)
            order = order[len(batch) :]
            yield from self._whole(batch) if prefix is None else self._behind(prefix, batch)

    def keep(self, row: int, states: dict[str, Tensor]) -> None:
        """Note the states of a query's end."""
        for site, state in states.items():
            self.states.setdefault(site, [state] * len(self.passages))[row] = state.clone()

    def _fitting(self, order: Sequence[int], *, whole: bool) -> Sequence[int]:
        """The first rows of `order` that can be written together."""
        backbone, longest = self.reader.backbone, len(self.passages[order[0]].stem)
        if not whole:
            kept = _KEPT_BYTES.get(backbone.device.type, _KEPT_BYTES["cpu"])
            row_bytes = (longest + self.max_new_tokens - 1) * self.reader.reader.bytes_per_token
            return order[: min(max(kept // row_bytes, 1), _ROWS_AT_ONCE)]
        batch = order[: max(backbone.token_budget // longest, 1)]
        if backbone.can_continue and backbone.chunk is not None:
            return batch
        # Padding in front is harmless only where attention alone looks back, and no position depends on a length.
        return [row for row in batch if len(self.passages[row].stem) == longest]

    def _behind(self, prefix: Prefix, batch: Sequence[int]) -> Iterator[int]:
        """One batch after a prefix."""
        reader, last = self.reader.reader, self.reader.reader.sites[-1]
        rows: list[int] = []
        room = len(self.passages[batch[0]].stem) + self.max_new_tokens - 1
        tails = Tails(self._first_passes(prefix, batch, rows), room, len(batch))
        state_BH = torch.stack([self.states[last.name][row] for row in rows])
        while True:
            token_B = self.writer.write(rows, self.reader.head.logits(state_BH))
            stays = [number for number, row in enumerate(rows) if not self.writer.is_done(row)]
            if len(stays) < len(rows):
                yield len(rows) - len(stays)
                if not stays:
                    return
                left = tails.keep(stays)
                rows, token_B = [rows[number] for number in left], token_B[left]
            state_BH = reader.step(prefix, tails, token_B, sites=[last])[last.name][:, 0]
            self.steps += len(rows)

    def _first_passes(
        self, prefix: Prefix, batch: Sequence[int], rows: list[int]
    ) -> Iterator[tuple[dict[int, Keys], list[int]]]:
        """Run the queries of a batch: their keys and values with their lengths; and in `rows`, which they are."""
        for part, block in self.reader.blocks(prefix, self.passages, batch):
            lengths = [len(self.passages[row].stem) for row in part]
            for number, (row, length) in enumerate(zip(part, lengths, strict=True)):
                self.keep(row, {site: states[number, length - 1] for site, states in block.states.items()})
            rows += part
            yield block.layers, lengths

    def _whole(self, batch: Sequence[int]) -> Iterator[int]:
        """One batch by transformers' `generate`, for a model that cannot share prefixes.

        Rows of one length run together: padding on the left would move the positions of models that count them by column.
        """
        by_length: dict[int, list[int]] = {}
        for row in batch:
            by_length.setdefault(len(self.passages[row].stem), []).append(row)
        for rows in by_length.values():
            self._whole_of_one_length(rows)
            yield len(rows)

    def _whole_of_one_length(self, rows: Sequence[int]) -> None:
        model = self.reader.loaded.model
        ids = torch.tensor([self.passages[row].stem for row in rows], device=self.reader.backbone.device)
        self.reader.reader.n_tokens += ids.numel()
        with self.reader.backbone.catch(self.reader.reader.sites) as caught, _plain_generation(model) as config:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config(
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    # A model whose cache gives other states than the whole text reads the text again for every token.
                    use_cache=self.reader.backbone.can_step,
                ),
                logits_processor=[_Choice(self, rows, caught)],
                stopping_criteria=[_AllDone(self.writer, rows)],
            )


class _Choice:
    """A logits processor that leaves one token to choose: the writer's."""

    def __init__(self, job: _Job, rows: Sequence[int], caught: dict[str, Tensor]) -> None:
        self._job, self._rows, self._caught = job, rows, caught
        self._begun = False

    def __call__(self, _ids: Tensor, scores_BV: Tensor) -> Tensor:
        if not self._begun:
            self._begun = True
            # Some modules see batch and tokens as one dimension.
            ends = {site: x.reshape(len(self._rows), -1, x.shape[-1])[:, -1] for site, x in self._caught.items()}
            for number, row in enumerate(self._rows):
                self._job.keep(row, {site: states[number] for site, states in ends.items()})
        live = [number for number, row in enumerate(self._rows) if not self._job.writer.is_done(row)]
        token_B = torch.zeros(len(self._rows), dtype=torch.long, device=scores_BV.device)
        token_B[live] = self._job.writer.write([self._rows[number] for number in live], scores_BV[live].float())
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)


class _AllDone:
    """A stopping criterion: which rows the writer has done."""

    def __init__(self, writer: Writer, rows: Sequence[int]) -> None:
        self._writer, self._rows = writer, rows

    def __call__(self, ids: Tensor, _scores: Any, **_options: Any) -> Tensor:
        return torch.tensor([self._writer.is_done(row) for row in self._rows], device=ids.device)


@contextmanager
def _plain_generation(model: Any) -> Iterator[Any]:
    """Lay aside the model's own generation config, from which `generate` fills what is not asked for; yields its class."""
    from transformers import GenerationConfig

    usual = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig
    finally:
        model.generation_config = usual


def _end_ids(reader: AnswerReader) -> list[int]:
    """Tokens that end a text: those of the model's generation config, else of its config, else of its tokenizer."""
    loaded = reader.loaded
    for holder in (getattr(loaded.model, "generation_config", None), reader.backbone.config, loaded.tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return [int(token) for token in (ids if isinstance(ids, (list, tuple)) else [ids])]
    return []
