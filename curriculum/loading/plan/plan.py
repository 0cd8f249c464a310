"""CurriculumPlan: every batch of a training run, by its number.

Contract: `plan.batch(number, epoch)` is a pure function of the plan: it returns the ordered rows of one global batch, in every
process and for any order of calls. A saved plan is a folder of `plan.json` and `.npy` arrays, which every process maps and no
process writes to.

Trade-off: the sequence of an epoch is never computed as a whole. Blocks of 32768 places are computed when a batch needs them (one
millisecond each), so an epoch starts or resumes anywhere without delay, whatever the size of the data. Grouping by length
needs a whole stage, once per epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.curriculum.loading.plan.arrays import Spans, base_order, rows_at, warm_place
from sparsort.curriculum.loading.plan.batches import WINDOW, draw, draw_quotas, draw_tokens
from sparsort.curriculum.loading.plan.files import AGAIN, fingerprint_of, read_plan, write_plan
from sparsort.curriculum.loading.plan.ranking import Rows, row_type
from sparsort.curriculum.loading.plan.sequences import like_lengths
from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.curriculum.loading.plan.shuffling import key_of, permute
from sparsort.errors import SparsortError
from sparsort.registry import load
from sparsort.storage.integrity import as_written

_FACTS = ("stage_edges", "stage_places", "turn_spans", "smallest_batch", "revision", "notes")
# The number of places whose rows are computed together.
_BLOCK = 1 << 15
# The number of blocks or stages in the cache.
_CACHED = 4


class CurriculumPlan:
    """Every batch of a training run. `plan_curriculum` creates a plan, and `open` reads a saved one.

    Attributes:
        settings: the settings of the curriculum.
        n_rows: number of rows of the data.
        stage_edges: number of each stage's first batch, from 0, followed by the number of batches.
        stage_places: in one pass, the place of each stage's first row in the sequence, followed by the number of rows.
        turn_spans: for batches that were cut by length, the spans (first, last) in which batches change places from epoch to
            epoch.
        smallest_batch: number of items in the smallest global batch.
        notes: JSON values about the origin of the plan: counts of rows without a score and of cut rows, groups, provenance.
        revision: for a plan from `revised`, {"number", "epoch", "start"}; else None.
        fingerprint: digest of everything that determines a batch.
        folder: the folder that the plan is saved in, or None.
    """

    def __init__(
        self,
        settings: CurriculumSettings,
        arrays: Mapping[str, NDArray[Any]],
        *,
        n_rows: int,
        stage_edges: list[int],
        stage_places: list[int],
        smallest_batch: int,
        turn_spans: Spans | None = None,
        notes: Mapping[str, Any],
        revision: Mapping[str, int] | None = None,
        fingerprint: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.settings = settings
        self.n_rows = n_rows
        self.stage_edges = stage_edges
        self.stage_places = stage_places
        self.smallest_batch = smallest_batch
        self.notes = dict(notes)
        self.revision = dict(revision) if revision else None
        self.folder = folder
        self._arrays = dict(arrays)
        self.turn_spans = [(int(first), int(last)) for first, last in turn_spans or ()]
        self._cache: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._n_batches = stage_edges[-1]
        # The common case: one pass with batches by count, whose rows are looked up in blocks.
        self._is_flat = settings.mode == "one_pass" and "sequence" not in arrays and not settings.group_by_length
        self.fingerprint = fingerprint or fingerprint_of(self._described(), self._arrays)

    def __repr__(self) -> str:
        unscored = int(np.count_nonzero(np.isnan(self.difficulty)))
        parts = [
            f"{self.n_rows:,} rows in {self.n_batches:,} batches an epoch",
            self.settings.describe(),
            *([f"{unscored:,} rows without a score"] if unscored else []),
            *([f"revision {self.revision['number']}"] if self.revision else []),
            *([str(self.folder)] if self.folder else []),
        ]
        return f"CurriculumPlan({'; '.join(parts)})"

    def describe(self, *, epoch: int = 0, lengths: ArrayLike | None = None, groups: Sequence[Any] | None = None) -> str:
        """What the batches of an epoch contain, stage by stage: the text that `sparsort plan` prints.

        Args:
            epoch: number of the epoch, from 0.
            lengths: (N,) tokens of each row, by default those of the plan.
            groups: (N,) group of each row, by default those of the plan.

        Raises:
            SparsortError: as `summarise`.

        Example:
            >>> print(CurriculumPlan.open("plan").describe())
        """
        # Loaded by its name, because the module of the description imports this one.
        describe_plan = load("description:describe_plan", "sparsort.curriculum.loading.inspect")
        return str(describe_plan(self, epoch=epoch, lengths=lengths, groups=groups))

    @property
    def n_batches(self) -> int:
        """The number of global batches in an epoch, which is the same in every epoch."""
        return self._n_batches

    @property
    def n_stages(self) -> int:
        return len(self.stage_edges) - 1

    @property
    def difficulty(self) -> NDArray[np.float32]:
        """(N,) difficulty of each row; NaN for a row without a score."""
        return self._arrays["difficulty"]

    @property
    def lengths(self) -> NDArray[np.int32] | None:
        """(N,) tokens of each row after the cut at max_length; None if the plan was made without lengths."""
        return self._arrays.get("lengths")

    @property
    def groups(self) -> NDArray[np.int32] | None:
        """(N,) group of each row, as an index into notes["groups"]; None without groups."""
        return self._arrays.get("groups")

    @property
    def order(self) -> Rows:
        """(N,) rows from the beginning of the curriculum to its end, before stages and pacing; sorted by group with quotas."""
        return self._arrays["order"] if "order" in self._arrays else np.arange(self.n_rows, dtype=row_type(self.n_rows))

    def batch(self, number: int, epoch: int = 0) -> NDArray[np.int64]:
        """The ordered rows of a global batch.

        Raises:
            SparsortError: the batch does not exist, or is before the first batch of a revised plan.
        """
        # The common case first, because a loader calls this for every batch: a single test, and no other call.
        if not self._is_flat or not 0 <= number < self._n_batches or epoch < 0 or self.revision:
            self._check(number, epoch)
            if not self._is_flat:
                return self._other_batch(number, epoch)
        first, last = number * self.n_rows // self._n_batches, (number + 1) * self.n_rows // self._n_batches
        block = first // _BLOCK
        rows = self._cache.get((epoch, block))
        # A batch that crosses the end of its block needs the next ones too.
        if rows is None or last > (block + 1) * _BLOCK:
            blocks = [self._block(number, epoch) for number in range(block, (last - 1) // _BLOCK + 1)]
            rows = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return rows[first - block * _BLOCK : last - block * _BLOCK]

    def bins(self, number: int, epoch: int = 0) -> list[NDArray[np.int64]]:
        """The items of a global batch: the rows of each packed sequence, or one row each without packing."""
        rows = self.batch(number, epoch)
        if "item_edges" not in self._arrays:
            return [rows[i : i + 1] for i in range(len(rows))]
        number = self._turned(number, epoch)
        # Edges are places in the whole sequence; subtracting the first one makes them positions in this batch.
        edges = self._arrays["item_edges"][self._edge(number) : self._edge(number + 1) + 1]
        return np.split(rows, edges[1:-1] - edges[0])

    def stage(self, number: int) -> int:
        """The stage of a batch, from 0."""
        return int(np.searchsorted(self.stage_edges, number, side="right")) - 1

    def share(self, number: int, epoch: int = 0) -> float:
        """The share of the examples that a batch can be drawn from; 1 if the schedule sets no such limit.

        With quotas it is the share of each group; a batch gets its full quota of a group even if that needs a larger share.
        """
        settings = self.settings
        if settings.mode == "pool":
            return float(self._arrays["available"][number]) / self.n_rows
        if settings.schedule != "sorted" or (epoch > 0 and settings.later_epochs == "shuffle"):
            return 1.0
        first, last = self._places(number, epoch)
        # After the warm-up all unseen rows are shuffled, so the batch can contain any of them.
        if last > warm_place(settings, self.n_rows):
            return 1.0
        if settings.stages is None:
            # Best fit takes rows from anywhere in its window, so the limit is the end of the window.
            reach = -(-last // WINDOW) * WINDOW if settings.packing == "best_fit" else last
            return min(reach, self.n_rows) / self.n_rows
        stage = int(np.searchsorted(self.stage_places, first, side="right")) - 1
        limits = self._arrays.get("available", self.stage_places[1:])
        return float(limits[stage]) / self.n_rows

    def revised(self, difficulty: ArrayLike, *, epoch: int = 0, start: int = 0) -> CurriculumPlan:
        """The same curriculum with other difficulties, from batch `start` of `epoch` on.

        Args:
            difficulty: (N,) new difficulty of each row.
            epoch: the epoch in which the revised plan begins.
            start: the first batch of the revised plan in that epoch.

        Raises:
            SparsortError: the difficulties do not fit the rows; the plan makes one pass and `start` is inside an epoch, or its
                schedule does not use the difficulty; or its batches were cut by length, which would change their number.
        """
        values = np.asarray(difficulty)
        settings = self.settings
        if values.shape != (self.n_rows,):
            raise SparsortError(f"a revision needs one difficulty per row, ({self.n_rows},), not {values.shape}.")
        if settings.mode == "one_pass" and (start or settings.schedule in ("shuffle", "as_given")):
            raise SparsortError(
                f"a one-pass curriculum can only be revised between epochs, not at batch {start} of the schedule "
                f"{settings.schedule!r}. Use mode='pool' to revise between stages."
            )
        if "batch_edges" in self._arrays:
            raise SparsortError(
                "batches by tokens and packed sequences are cut for the order that the plan was made with, so the plan "
                "cannot be revised. Plan with batch_size and without packing."
            )
        # These arrays do not depend on the difficulty, so the revised plan reuses them.
        unchanged = ("ids", "lengths", "groups", "available")
        arrays: dict[str, NDArray[Any]] = {name: array for name, array in self._arrays.items() if name in unchanged}
        if settings.unscored == "error" and np.isnan(values).any():
            raise SparsortError(f"{np.count_nonzero(np.isnan(values))} rows have no difficulty, and unscored='error'.")
        arrays.update(base_order(values, settings, arrays.get("ids"), arrays.get("groups")))
        return CurriculumPlan(
            settings,
            {**arrays, "difficulty": values.astype(np.float32)},
            n_rows=self.n_rows,
            stage_edges=self.stage_edges,
            stage_places=self.stage_places,
            smallest_batch=self.smallest_batch,
            notes={**self.notes, "revises": self.notes.get("revises", self.fingerprint)},
            revision={"number": (self.revision or {}).get("number", 0) + 1, "epoch": epoch, "start": start},
        )

    def save(self, folder: str | Path) -> CurriculumPlan:
        """Write the plan to a folder and return the plan that is mapped from there.

        Saving the same plan again only replaces damaged files.

        Raises:
            SparsortError: the folder contains another plan, or the disk cannot be written.
        """
        folder = Path(folder)
        write_plan(folder, {"fingerprint": self.fingerprint, **self._described()}, self._arrays)
        return CurriculumPlan._mapped(folder, check=False)

    @classmethod
    def open(cls, folder: str | Path) -> CurriculumPlan:
        """Map a plan that `save` wrote, after checking every file against its digest (about one second per gigabyte).

        Raises:
            SparsortError: the folder contains no plan, another version wrote it, or a file is missing or has changed.
        """
        path = Path(folder).expanduser()
        with as_written(path, next_step=AGAIN.format(path)):
            plan = cls._mapped(path, check=True)
            # Digests do not show who wrote the values: three batches show whether they make up a plan.
            for number in {0, plan.n_batches // 2, plan.n_batches - 1}:
                plan.batch(number, plan.revision["epoch"] + 1 if plan.revision else 0)
        return plan

    @classmethod
    def _mapped(cls, folder: Path, *, check: bool) -> CurriculumPlan:
        facts, arrays = read_plan(folder, check=check)
        settings = CurriculumSettings.from_json(facts.pop("settings"), stored=True)
        return cls(settings, arrays, folder=folder.resolve(), **facts)

    def in_memory(self) -> CurriculumPlan:
        """A copy of the plan that does not depend on the folder that it was read from."""
        plan = copy.copy(self)
        plan.folder, plan._cache = None, {}
        plan._arrays = {name: np.array(array) for name, array in self._arrays.items()}
        return plan

    # A worker process maps the files again instead of receiving the arrays. The files were checked when the plan was opened.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, **({"_arrays": {}} if self.folder else {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.folder is not None:
            stored, self._arrays = read_plan(self.folder, check=False)
            if stored["fingerprint"] != self.fingerprint:
                raise SparsortError(
                    f"{self.folder} contains another plan than when it was opened. Open the plan again."
                )

    def _described(self) -> dict[str, Any]:
        """The contents of `plan.json`, without the fingerprint."""
        facts = {name: getattr(self, name) for name in _FACTS}
        return {"settings": self.settings.to_json(), "n_rows": self.n_rows, **facts}

    def _other_batch(self, number: int, epoch: int) -> NDArray[np.int64]:
        """A batch of a pool, a batch that was cut by length, or a batch of rows of similar length."""
        if self.settings.mode == "pool":
            return self._draw(number, epoch)
        first, last = self._places(number, epoch)
        if "sequence" in self._arrays:
            return self._arrays["sequence"][first:last].astype(np.int64)
        if epoch > 0 and self.settings.later_epochs == "shuffle":
            return self._at(np.arange(first, last, dtype=np.int64), epoch)
        return self._like_lengths(first, last, epoch)

    def _check(self, number: int, epoch: int) -> None:
        if not 0 <= number < self.n_batches or epoch < 0:
            raise SparsortError(
                f"there is no batch {number} of epoch {epoch}: an epoch has batches 0 to {self.n_batches - 1}."
            )
        if self.revision and (epoch, number) < (self.revision["epoch"], self.revision["start"]):
            raise SparsortError(
                f"this plan was revised at batch {self.revision['start']} of epoch {self.revision['epoch']} and does not "
                f"include batch {number} of epoch {epoch}. Use the plan that it revises."
            )

    def _draw(self, number: int, epoch: int) -> NDArray[np.int64]:
        settings, n_available = self.settings, int(self._arrays["available"][number])
        key = key_of(settings.seed, epoch, "pool", number)
        order = self._arrays["order"]
        if settings.token_budget is not None:
            return draw_tokens(order, n_available, settings.token_budget, self._arrays["lengths"], key)
        size = settings.batch_size or 0
        if settings.quotas is None:
            return draw(order, n_available, size, key)
        # Quotas are given by name; notes["groups"] has the names in the order of the group numbers.
        shares = np.array([settings.quotas[name] for name in self.notes["groups"]])
        shares /= shares.sum()
        return draw_quotas(order, self._arrays["group_edges"], shares, n_available, size, key)

    def _edge(self, number: int) -> int:
        """The number of the first item of batch `number`."""
        if "batch_edges" in self._arrays:
            return int(self._arrays["batch_edges"][number])
        # The same formula as `batches.by_count`, without an array.
        return number * self.n_rows // self.n_batches

    def _places(self, number: int, epoch: int) -> tuple[int, int]:
        """The first place of a batch in the sequence, and the place after its last one."""
        number = self._turned(number, epoch)
        first, last = self._edge(number), self._edge(number + 1)
        if "item_edges" in self._arrays:
            # With packing, the edges of batches count packed sequences; convert them to places.
            first, last = (int(edge) for edge in self._arrays["item_edges"][[first, last]])
        return first, last

    def _turned(self, number: int, epoch: int) -> int:
        """The batch of epoch 0 that is shown as batch `number` of `epoch`.

        Batches that were cut once, by tokens or bins, change places within their span from epoch to epoch.
        """
        if epoch > 0:
            for first, last in self.turn_spans:
                if first <= number < last:
                    key = key_of(self.settings.seed, epoch, "turn", first)
                    return first + int(permute(number - first, last - first, key))
        return number

    def _block(self, block: int, epoch: int) -> NDArray[np.int64]:
        """The rows at the places of one block, from the cache where possible."""
        rows = self._cache.get((epoch, block))
        if rows is None:
            places = np.arange(block * _BLOCK, min(self.n_rows, (block + 1) * _BLOCK), dtype=np.int64)
            rows = self._cache_rows((epoch, block), self._at(places, epoch))
        return rows

    def _like_lengths(self, first: int, last: int, epoch: int) -> NDArray[np.int64]:
        """The rows at places of one stage, after rows of similar length were grouped."""
        stage = int(np.searchsorted(self.stage_places, first, side="right")) - 1
        begin, end = self.stage_places[stage], self.stage_places[stage + 1]
        grouped = self._cache.get((epoch, stage))
        if grouped is None:
            rows = self._at(np.arange(begin, end, dtype=np.int64), epoch)
            # Edges of the stage's batches, as places within the stage.
            numbers = np.arange(self.stage_edges[stage], self.stage_edges[stage + 1] + 1)
            edges = numbers * self.n_rows // self.n_batches - begin
            key = key_of(self.settings.seed, epoch, "lengths", stage)
            grouped = self._cache_rows((epoch, stage), like_lengths(rows, self._arrays["lengths"], edges, key))
        return grouped[first - begin : last - begin]

    def _at(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        rows = rows_at(
            self.settings,
            places,
            order=self._arrays.get("order"),
            ids=self._arrays.get("ids"),
            stage_places=np.array(self.stage_places, dtype=np.int64),
            limits=self._arrays.get("available"),
            epoch=epoch,
        )
        return rows.astype(np.int64)

    def _cache_rows(self, name: tuple[int, int], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # `batch` returns views of cached rows, so a caller that wrote into one would change later batches.
        rows.flags.writeable = False
        # The dictionary is replaced in one assignment, so that other threads never see it half changed.
        self._cache = {**dict(list(self._cache.items())[1 - _CACHED :]), name: rows}
        return rows
