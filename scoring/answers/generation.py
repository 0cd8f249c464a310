"""Generates text after prompts: many queries are continued together after one shared prefix, greedily or by sampling.

Contract: up to rounding, a greedy text equals that of transformers' `generate` for the whole prompt of the query alone in the
same dtype, token for token. Of the model's own generation config only the end tokens are used. A sampled text depends on the
seed and the number of its row, again up to rounding. The keys and values of the prefix are computed once, rows that have ended
leave the batch, and the memory of a batch is bounded. A model that cannot share prefixes (`AnswerReader.implementation`) runs in
transformers' `generate`, where the same code chooses the tokens.

Shape suffixes: B rows of a batch, V tokens of the vocabulary.
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
from sparsort.scoring.answers.prefix_attention import Keys, Prefix, Tails
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.answers.token_tree import Passage

# The most memory for the keys and values of one batch of rows, by device.
_KEPT_BYTES = {"cpu": 2**30, "cuda": 2**33}
# The logits bound this number: 128 rows × 262144 tokens × 4 bytes are 134 MB.
_ROWS_AT_ONCE = 128

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The continuations of Q queries.

    Attributes:
        texts: the continuations, cut where a stop string begins.
        ids: the tokens that were written, including those of a stop string and an end token.
        ended: whether each ended at a stop string or an end token, and not at the limit.
        tokens_read: tokens of prompts that were run.
        features: (Q, F) features of each query's last state, as `Answers.features`.
    """

    texts: list[str]
    ids: list[list[int]]
    ended: list[bool]
    tokens_read: int
    features: NDArray[np.float64]

    @property
    def tokens_written(self) -> int:
        """The number of tokens of all texts together."""
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
        chunks: the texts before every query, as in `AnswerReader.answers`; empty if each query is a whole prompt.
        queries: Q texts, each appended to the prefix unchanged.
        max_new_tokens: a text ends after this many tokens.
        stop: a text ends where one of these strings begins, even within a token; the string itself is removed.
        temperature, top_k, no_repeat_ngram, seed: see `Sampling`.
        kept_words: text whose tokens become `Sampling.kept`.
        advance: called with the number of rows that have ended, whenever some have.

    Raises:
        SparsortError: no queries, a setting out of its range, or a prompt without room for its text in the model's context.
    """
    if not queries:
        raise SparsortError("there are no queries to continue. Give at least one.")
    words = reader.loaded.tokenizer(kept_words, add_special_tokens=False)["input_ids"] if kept_words else []
    sampling = Sampling(
        temperature=temperature, top_k=top_k, no_repeat_ngram=no_repeat_ngram, kept=frozenset(words), seed=seed
    )
    tree = reader.token_tree(chunks, queries, (), room=max(max_new_tokens, 0))
    shared = [token for segment in tree.segments for token in segment]
    writer = Writer(
        reader.loaded.tokenizer,
        # A writer needs the whole prompt, for the n-grams that must not be repeated and for the context of the decoding.
        [[*([] if passage.whole else shared), *passage.stem] for passage in tree.passages],
        max_new_tokens=max_new_tokens,
        stop=stop,
        end_ids=_end_ids(reader),
        sampling=sampling,
    )
    generation = _Generation(reader, tree.passages, writer, max_new_tokens)
    before = reader.reader.n_tokens
    for segments, places in tree.groups():
        for n_ended in generation.run(segments, places):
            if advance is not None:
                advance(n_ended)
    return Generated(
        texts=writer.texts,
        ids=writer.ids,
        ended=writer.ended,
        tokens_read=reader.reader.n_tokens - before - generation.steps,
        features=reader.features({site: torch.stack(rows) for site, rows in generation.states.items()}),
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
    """Sample one text after each prefix, to be used as a probe query (arXiv 2104.08786, "probing set").

    The defaults are those of the paper's code: temperature 2 among the 20 most likely tokens, no sequence of three tokens twice,
    and words of the template or a label whenever they are the most likely. All of these are needed: of 12 samples that the 270M
    demo model wrote after 4 TREC questions, 11 read as a question; without `words` 3 do, and with the whole vocabulary none.

    Args:
        reader: the model.
        prefixes: the demonstrations of each candidate order, in chunks. A prefix that occurs twice is sampled twice.
        opening: the template's words before its first field; the texts begin with it.
        separator: the text between two demonstrations, at which a sample ends; "" to let samples continue to further queries.
        words: the template's words, the separator and the labels' words; `generate` takes them as `kept_words`.
        max_new_tokens, temperature, top_k, no_repeat_ngram, seed, advance: see `generate`.

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


class _Generation:
    """Runs the model for a `Writer`: the prompts of every row, then its new tokens one by one.

    Attributes:
        states: site → Q states (width,), each of the last token of a query.
        steps: generated tokens that were run, to generate the tokens after them.
    """

    def __init__(self, reader: AnswerReader, passages: Sequence[Passage], writer: Writer, max_new_tokens: int) -> None:
        self.reader, self.passages, self.writer, self.max_new_tokens = reader, passages, writer, max_new_tokens
        self.states: dict[str, list[Tensor]] = {}
        self.steps = 0

    def run(self, segments: Sequence[Sequence[int]], places: Sequence[int]) -> Iterator[int]:
        """Complete the rows `places` after one prefix, in batches, the longest first; yields numbers of rows that ended."""
        order = sorted(places, key=lambda place: -len(self.passages[place].stem))
        whole = self.reader.reader.why_not is not None
        prefix = None if whole else self.reader.reader.prefix(segments)
        while order:
            batch = self._fitting(order, whole=whole)
            order = order[len(batch) :]
            yield from self._run_whole(batch) if prefix is None else self._run_after(prefix, batch)

    def keep(self, row: int, states: dict[str, Tensor]) -> None:
        """Keep the states of the last token of a query."""
        for site, state in states.items():
            self.states.setdefault(site, [state] * len(self.passages))[row] = state.clone()

    def _fitting(self, order: Sequence[int], *, whole: bool) -> Sequence[int]:
        """Return the rows at the beginning of `order` that can run together."""
        backbone, longest = self.reader.backbone, len(self.passages[order[0]].stem)
        if not whole:
            memory = _KEPT_BYTES.get(backbone.device.type, _KEPT_BYTES["cpu"])
            row_bytes = (longest + self.max_new_tokens - 1) * self.reader.reader.bytes_per_token
            return order[: min(max(memory // row_bytes, 1), _ROWS_AT_ONCE)]
        batch = order[: max(backbone.token_budget // longest, 1)]
        if backbone.can_continue and backbone.chunk is not None:
            return batch
        # Padding on the left is harmless only if nothing except attention looks back and no position depends on a length.
        return [row for row in batch if len(self.passages[row].stem) == longest]

    def _run_after(self, prefix: Prefix, batch: Sequence[int]) -> Iterator[int]:
        """Complete one batch after a prefix."""
        reader, last = self.reader.reader, self.reader.reader.sites[-1]
        rows: list[int] = []
        # The last token of a row is never run, so it needs no room.
        room = len(self.passages[batch[0]].stem) + self.max_new_tokens - 1
        tails = Tails(self._first_passes(prefix, batch, rows), room, len(batch))
        # The state of the last prompt token predicts the first new token.
        state_BH = torch.stack([self.states[last.name][row] for row in rows])
        while True:
            token_B = self.writer.write(rows, self.reader.head.logits(state_BH))
            stays = [number for number, row in enumerate(rows) if not self.writer.is_done(row)]
            if len(stays) < len(rows):
                yield len(rows) - len(stays)
                if not stays:
                    return
                # Rows that stay may have changed their places.
                places = tails.keep(stays)
                rows, token_B = [rows[number] for number in places], token_B[places]
            state_BH = reader.step(prefix, tails, token_B, sites=[last])[last.name][:, 0]
            self.steps += len(rows)

    def _first_passes(
        self, prefix: Prefix, batch: Sequence[int], rows: list[int]
    ) -> Iterator[tuple[dict[int, Keys], list[int]]]:
        """Run the queries of a batch; yields the keys and values of each pass with the lengths, and appends to `rows`."""
        for part, block in self.reader.blocks(prefix, self.passages, batch):
            lengths = [len(self.passages[row].stem) for row in part]
            for number, (row, length) in enumerate(zip(part, lengths, strict=True)):
                self.keep(row, {site: states[number, length - 1] for site, states in block.states.items()})
            rows += part
            yield block.layers, lengths

    def _run_whole(self, batch: Sequence[int]) -> Iterator[int]:
        """Complete one batch with transformers' `generate`, for a model that cannot share prefixes.

        Only rows of the same length run together: some models count positions by column, and padding on the left would shift
        them.
        """
        by_length: dict[int, list[int]] = {}
        for row in batch:
            by_length.setdefault(len(self.passages[row].stem), []).append(row)
        for rows in by_length.values():
            self._transformers_generate(rows)
            yield len(rows)

    def _transformers_generate(self, rows: Sequence[int]) -> None:
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
                    # If the states with a cache differ from those of the whole text, every token reads the whole text again.
                    use_cache=self.reader.backbone.can_step,
                ),
                logits_processor=[_WriterTokens(self, rows, caught)],
                stopping_criteria=[_AllDone(self.writer, rows)],
            )


class _WriterTokens:
    """A logits processor that lets the writer choose: all logits become −∞ except that of the writer's token."""

    def __init__(self, generation: _Generation, rows: Sequence[int], caught: dict[str, Tensor]) -> None:
        self._generation, self._rows, self._caught = generation, rows, caught
        self._begun = False

    def __call__(self, _ids: Tensor, scores_BV: Tensor) -> Tensor:
        if not self._begun:
            # The first call follows the pass over the prompts, whose last states are those of the queries' ends.
            self._begun = True
            # Some modules see batch and tokens as one dimension.
            ends = {site: x.reshape(len(self._rows), -1, x.shape[-1])[:, -1] for site, x in self._caught.items()}
            for number, row in enumerate(self._rows):
                self._generation.keep(row, {site: states[number] for site, states in ends.items()})
        writer = self._generation.writer
        live = [number for number, row in enumerate(self._rows) if not writer.is_done(row)]
        # Complete rows stay in the batch and get token 0, which is not recorded.
        token_B = torch.zeros(len(self._rows), dtype=torch.long, device=scores_BV.device)
        token_B[live] = writer.write([self._rows[number] for number in live], scores_BV[live].float())
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)


class _AllDone:
    """A stopping criterion that is true for the rows that the writer has completed."""

    def __init__(self, writer: Writer, rows: Sequence[int]) -> None:
        self._writer, self._rows = writer, rows

    def __call__(self, ids: Tensor, _scores: Any, **_options: Any) -> Tensor:
        return torch.tensor([self._writer.is_done(row) for row in self._rows], device=ids.device)


@contextmanager
def _plain_generation(model: Any) -> Iterator[Any]:
    """Replace the model's generation config, whose settings `generate` would add, by an empty one; yields the config class."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig
    finally:
        model.generation_config = own


def _end_ids(reader: AnswerReader) -> list[int]:
    """Return the tokens that end a text, from the model's generation config, else its config, else its tokenizer."""
    loaded = reader.loaded
    for holder in (getattr(loaded.model, "generation_config", None), reader.backbone.config, loaded.tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return [int(token) for token in (ids if isinstance(ids, (list, tuple)) else [ids])]
    return []
