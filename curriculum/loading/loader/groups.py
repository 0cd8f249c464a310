"""Generation batches for reinforcement learning: every prompt is repeated for a group of completions, on the ranks TRL expects.

Contract: a generation batch contains `prompts` distinct prompts of the plan, each `num_generations` times, with its copies next
to each other. Rank r of R takes the r-th of R equal slices of it. The loader yields it `repeats` times in succession. If the plan
shows the same prompts, this is the layout of TRL's `RepeatSampler` after accelerate has sharded it (tested with both).

Batches of a plan differ in size by at most one, and a generation batch has a fixed size. It begins where the plan's batch begins,
and is filled with the prompts that come next in the plan; in the last batch of an epoch, with those that came before. Every
prompt of the plan is therefore seen in every epoch, and fewer than `prompts` of them are seen twice. (TRL drops the prompts of
the last incomplete generation batch, which are the hardest ones in a sorted order.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.loader.fetching import Part
from sparsort.errors import SparsortError

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The layout of the generation batches; `prompts` is the plan's `batch_size`.

    Attributes:
        prompts: number of distinct prompts in a generation batch, over all ranks.
        num_generations: number of completions of each prompt, which is the size of a group.
        repeats: how often the loader yields each generation batch; in TRL, num_iterations × steps_per_generation.

    Raises:
        SparsortError: a number is not a whole number of at least 1.
    """

    prompts: int
    num_generations: int
    repeats: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SparsortError(f"{name}={value!r}: groups need a whole number of at least 1.")

    def check(self, plan: CurriculumPlan, world_size: int) -> None:
        """Refuse a plan whose batches cannot be generation batches of this layout.

        Raises:
            SparsortError: the plan's batches have another size, are cut by tokens or packed; or the ranks cannot share a
                generation batch equally.
        """
        settings, rows = plan.settings, self.prompts * self.num_generations
        if settings.batch_size is None or settings.packing != "none":
            raise SparsortError(
                "the plan cuts its batches by tokens or packs them, and a generation batch has a fixed number of prompts. Plan "
                f"with batch_size={self.prompts}, and without token_budget and packing."
            )
        if settings.batch_size != self.prompts:
            raise SparsortError(
                f"a generation batch has {rows} rows, which are {self.prompts} prompts × {self.num_generations} generations, and "
                f"the plan has batch_size={settings.batch_size}. Plan with batch_size={self.prompts}, or change the generation "
                f"batch to {settings.batch_size * self.num_generations} rows (generation_batch_size in TRL)."
            )
        if rows % world_size:
            raise SparsortError(
                f"{self.prompts} prompts × {self.num_generations} generations are {rows} rows, which {world_size} ranks cannot "
                "share equally. Use a number of ranks that divides it."
            )


@dataclass(frozen=True, kw_only=True)
class GroupedPart(Part):
    """The part of every generation batch that this rank loads; it is the same in each of the `micro_batches` repeats."""

    groups: Groups

    def rows(self, plan: CurriculumPlan, number: int, epoch: int, micro: int) -> NDArray[np.int64]:
        copies = np.repeat(prompts_of(plan, number, epoch, self.groups.prompts), self.groups.num_generations)
        size = len(copies) // self.world_size
        return copies[self.rank * size : (self.rank + 1) * size]


def prompts_of(plan: CurriculumPlan, number: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The `size` prompts of a generation batch in the plan's order, filled as described above."""
    rows = plan.batch(number, epoch)
    if not (missing := size - len(rows)):
        return rows
    # Batches have more than half of `size` rows if there are at least two, so a single neighbour is enough.
    if number + 1 < plan.n_batches:
        return np.concatenate([rows, plan.batch(number + 1, epoch)[:missing]])
    return np.concatenate([plan.batch(number - 1, epoch)[-missing:], rows])
