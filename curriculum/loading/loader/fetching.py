"""What a worker does: from the number of a micro-batch to the examples that it holds.

Contract: everything follows from a key (epoch, number of the global batch, number of the micro-batch in it) and the
plan, so it does not matter which worker is asked, nor when. In a worker process the generators of torch, NumPy and
`random` are seeded from the key before each micro-batch, so that random masking and augmentation come out alike for any
number of workers and after any resume; in the main process they are the caller's and are left alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.utils.data

from sparsort.curriculum.loading.loader.packing import cut, pack
from sparsort.curriculum.loading.plan.shuffling import key_of
from sparsort.errors import SparsortError

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

Key = tuple[int, int, int]
Items = TypeVar("Items", bound=Sequence[Any] | np.ndarray[Any, Any])

_NAMED = 16  # rows that an error names


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of every global batch is this rank's, and in how many pieces it takes it.

    Attributes:
        rank, world_size: rank r of R takes places r, r + R, r + 2R, … of a global batch, as OLMo-core does.
        micro_batches: pieces that the rank's part is cut in, which differ by at most one.
    """

    rank: int
    world_size: int
    micro_batches: int

    def of(self, batch: Items, micro: int) -> Items:
        """The items of one micro-batch, in order."""
        if self.world_size == self.micro_batches == 1:
            return batch
        mine = batch[self.rank :: self.world_size]
        size, larger = divmod(len(mine), self.micro_batches)
        begin = micro * size + min(micro, larger)
        return mine[begin : begin + size + (micro < larger)]  # type: ignore[return-value]


class Fetcher(torch.utils.data.Dataset[Any]):
    """A map-style dataset of micro-batches: `__getitems__([key])` gives the examples of one."""

    def __init__(self, plan: CurriculumPlan, dataset: Any, part: Part) -> None:
        self.plan, self.dataset, self.part = plan, dataset, part
        self.packs = plan.settings.packing != "none"
        self.as_they_are = not self.packs and plan.settings.max_length is None and plan.settings.token_budget is None

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        ((epoch, number, micro),) = keys
        seed_worker(self.plan, self.part, (epoch, number, micro))
        bins: list[Any] | None = None
        if self.packs:
            bins = self.part.of(self.plan.bins(number, epoch), micro)
            rows = np.concatenate(bins).tolist()
        else:
            rows = self.part.of(self.plan.batch(number, epoch).tolist(), micro)
        try:
            examples = self._examples(rows)
        except Exception as error:
            note(error, epoch, number, rows)
            raise
        return examples if self.as_they_are else prepared(self.plan, examples, rows, bins)

    def _examples(self, rows: list[int]) -> list[Any]:
        if getters := getattr(self.dataset, "__getitems__", None):
            return list(getters(rows))
        dataset, left = self.dataset, iter(rows)
        try:
            return [dataset[row] for row in left]
        except Exception as error:
            error.add_note(f"The dataset raised this for row {rows[-1 - length_hint(left)]}.")
            raise


def prepared(plan: CurriculumPlan, examples: list[Any], rows: list[int], bins: list[Any] | None) -> list[Any]:
    """Examples cut at the plan's `max_length`, and put together where they share a packed sequence.

    Raises:
        SparsortError: a row has more tokens than the plan counted, where it cuts batches by tokens.
    """
    if plan.settings.max_length is not None:
        examples = [cut(example, plan.settings.max_length) for example in examples]
    if plan.lengths is not None and (bins is not None or plan.settings.token_budget is not None):
        _check_lengths(plan.lengths[rows].tolist(), examples, rows)
    if bins is None:
        return examples
    ends = np.cumsum([len(held) for held in bins]).tolist()
    return [pack(examples[end - len(held) : end]) for held, end in zip(bins, ends, strict=True)]


def _check_lengths(planned: list[int], examples: list[Any], rows: list[int]) -> None:
    for length, example, row in zip(planned, examples, rows, strict=True):
        if isinstance(example, Mapping) and len(example.get("input_ids", ())) > length:
            raise SparsortError(
                f"row {row} has {len(example['input_ids'])} tokens and the plan counted {length}, so a batch would be "
                "over its budget. Plan with the lengths that this tokenizer gives, or with max_length to cut."
            )


def seed_worker(plan: CurriculumPlan, part: Part, key: Key) -> None:
    """Seed the global generators of a worker process for one micro-batch; nothing in the main process."""
    if torch.utils.data.get_worker_info() is None:
        return
    seed = key_of("worker", plan.settings.seed, *key, part.rank)
    # Not torch.manual_seed: it also queues a call for every device, which grows without end in a worker.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def note(error: Exception, epoch: int, number: int, rows: list[int]) -> None:
    """Add to an error of the dataset which rows were asked for."""
    named = ", ".join(map(str, rows[:_NAMED])) + (" …" if len(rows) > _NAMED else "")
    error.add_note(f"Rows asked for, in order: {named} (epoch {epoch}, global batch {number}).")
