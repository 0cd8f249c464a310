"""The work of a data worker: from the number of a micro-batch to its examples.

Contract: the result depends only on the plan and on a key (epoch, number of the global batch, number of the micro-batch in it).
It does not matter which worker computes it, or when. In a worker process the generators of torch, NumPy and `random` are seeded
from the key before each micro-batch. Random masking and augmentation are therefore the same for any number of workers and after
any resume. In the main process these generators belong to the caller and are not touched.
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
from numpy.typing import NDArray

from sparsort.curriculum.loading.loader.packing import cut, pack
from sparsort.curriculum.loading.plan.shuffling import key_of
from sparsort.errors import SparsortError

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

Key = tuple[int, int, int]
Items = TypeVar("Items", bound=Sequence[Any] | np.ndarray[Any, Any])

# The most rows that an error lists.
_NAMED = 16


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of every global batch that this rank loads, and the number of micro-batches in it.

    Attributes:
        rank, world_size: rank r of R takes places r, r + R, r + 2R, … of a global batch, as in OLMo-core.
        micro_batches: number of micro-batches that the rank's part is divided into; their sizes differ by at most one.
    """

    rank: int
    world_size: int
    micro_batches: int

    def of(self, batch: Items, micro: int) -> Items:
        """The items of one micro-batch, in order."""
        if self.world_size == self.micro_batches == 1:
            return batch
        own = batch[self.rank :: self.world_size]
        # The first `larger` micro-batches have one item more than the others.
        size, larger = divmod(len(own), self.micro_batches)
        begin = micro * size + min(micro, larger)
        return own[begin : begin + size + (micro < larger)]  # type: ignore[return-value]

    def rows(self, plan: CurriculumPlan, number: int, epoch: int, micro: int) -> NDArray[np.int64]:
        """The rows of one micro-batch, in order; those of a packed sequence follow each other."""
        if plan.settings.packing == "none":
            return self.of(plan.batch(number, epoch), micro)
        return np.concatenate(self.of(plan.bins(number, epoch), micro))


class Fetcher(torch.utils.data.Dataset[Any]):
    """A map-style dataset of micro-batches: `__getitems__([key])` returns the examples of one micro-batch."""

    def __init__(self, plan: CurriculumPlan, dataset: Any, part: Part) -> None:
        self.plan, self.dataset, self.part = plan, dataset, part
        self.packs = plan.settings.packing != "none"
        self.is_unchanged = not self.packs and plan.settings.max_length is None and plan.settings.token_budget is None

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        ((epoch, number, micro),) = keys
        seed_worker(self.plan, self.part, (epoch, number, micro))
        bins: list[Any] | None = None
        if self.packs:
            bins = self.part.of(self.plan.bins(number, epoch), micro)
        rows = self.part.rows(self.plan, number, epoch, micro).tolist()
        try:
            examples = self._examples(rows)
        except Exception as error:
            add_row_note(error, epoch, number, rows)
            raise
        return examples if self.is_unchanged else prepare(self.plan, examples, rows, bins)

    def _examples(self, rows: list[int]) -> list[Any]:
        if getters := getattr(self.dataset, "__getitems__", None):
            return list(getters(rows))
        dataset, remaining = self.dataset, iter(rows)
        try:
            return [dataset[row] for row in remaining]
        except Exception as error:
            # The number of rows that were not read yet tells which row failed.
            error.add_note(f"The dataset raised this for row {rows[-1 - length_hint(remaining)]}.")
            raise


def prepare(plan: CurriculumPlan, examples: list[Any], rows: list[int], bins: list[Any] | None) -> list[Any]:
    """Cut examples at the plan's `max_length`, and join those that share a packed sequence.

    Args:
        plan: the plan.
        examples: the examples of a micro-batch.
        rows: the row of each example.
        bins: the rows of each packed sequence, in the order of `rows`; None without packing.

    Raises:
        SparsortError: the plan cuts batches by tokens, and a row has more tokens than the plan counted.
    """
    if plan.settings.max_length is not None:
        examples = [cut(example, plan.settings.max_length) for example in examples]
    if plan.lengths is not None and (bins is not None or plan.settings.token_budget is not None):
        _check_lengths(plan.lengths[rows].tolist(), examples, rows)
    if bins is None:
        return examples
    # `bins` and `examples` have the same order, so each bin is a slice of the examples.
    ends = np.cumsum([len(members) for members in bins]).tolist()
    return [pack(examples[end - len(members) : end]) for members, end in zip(bins, ends, strict=True)]


def _check_lengths(planned: list[int], examples: list[Any], rows: list[int]) -> None:
    for length, example, row in zip(planned, examples, rows, strict=True):
        if isinstance(example, Mapping) and len(example.get("input_ids", ())) > length:
            raise SparsortError(
                f"row {row} has {len(example['input_ids'])} tokens and the plan counted {length}, so a batch would "
                "exceed its budget. Plan with the lengths that this tokenizer gives, or cut rows with max_length (--cut-length)."
            )


def seed_worker(plan: CurriculumPlan, part: Part, key: Key) -> None:
    """Seed the global generators of a worker process for one micro-batch; do nothing in the main process."""
    if torch.utils.data.get_worker_info() is None:
        return
    seed = key_of("worker", plan.settings.seed, *key, part.rank)
    # Why not `torch.manual_seed`: it also queues a call for every device, and in a worker that queue grows without limit.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def add_row_note(error: Exception, epoch: int, number: int, rows: list[int]) -> None:
    """Add the requested rows to an error of the dataset."""
    named = ", ".join(map(str, rows[:_NAMED])) + (" …" if len(rows) > _NAMED else "")
    error.add_note(f"Requested rows, in order: {named} (epoch {epoch}, global batch {number}).")
