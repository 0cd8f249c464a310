"""Data that can only be read from front to back.

An exact order needs random access to rows, which a stream does not have. There are two solutions, and no shuffle buffer, whose
order could not be resumed:

- `materialize` writes the stream once to a folder of memory-mapped Arrow, a `datasets.Dataset` that any plan can order;
- a stream whose rows already are in the right order is loaded as it is, with a plan that has schedule="as_given".

Contract of the second: the batches equal those of a map-style dataset with the same rows. Each worker reads the whole stream
and keeps its own micro-batches w, w + W, …. A resume skips the rows that were consumed, with the stream's own `skip` if it
has one (`datasets.IterableDataset`), otherwise by reading them. A stream whose length differs from the plan is an error.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.utils.data

from sparsort.curriculum.loading.loader.fetching import Part, add_row_note, prepare, seed_worker
from sparsort.errors import SparsortError
from sparsort.storage.files import disk_error
from sparsort.terminal.progress import progress

if TYPE_CHECKING:
    import datasets

    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

_TO_A_FOLDER = "dataset = materialize(stream, 'folder') (sparsort.curriculum.loading.loader.streams)"
_ARROW = "data.arrow"


def is_stream(dataset: Any) -> bool:
    """Whether the data has no random access: no length, no `[row]`, or a PyTorch IterableDataset."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return True
    return not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def check_stream(plan: CurriculumPlan, stream: Any, num_workers: int) -> None:
    """Refuse a stream that cannot be loaded in the plan's order.

    Raises:
        SparsortError: the plan changes the order of the rows, the stream can be read only once, or the stream shards itself
            among workers.
    """
    name = type(stream).__name__
    if not hasattr(stream, "__iter__"):
        raise SparsortError(
            f"a {name} is not a dataset: it has neither len() and [row], nor can it be iterated over. Pass a "
            "datasets.Dataset, a PyTorch Dataset or a sequence."
        )
    if plan.settings.schedule != "as_given" or plan.settings.mode != "one_pass":
        raise SparsortError(
            f"this plan puts rows in a new order, and a {name} can only be read from front to back. Write it once to a "
            f"folder, {_TO_A_FOLDER}, or plan with schedule='as_given' if its rows are already in the right order."
        )
    if hasattr(stream, "__next__"):
        raise SparsortError(
            f"a {name} can be read only once, so a second epoch or a resume cannot start it again. Pass an object "
            f"whose __iter__ starts from the first row each time, or write it once, {_TO_A_FOLDER}."
        )
    if num_workers > 1 and _divides_itself(stream):
        raise SparsortError(
            f"num_workers={num_workers}: a {name} gives each worker its own share of the rows, in an order that depends "
            f"on their number. Use num_workers=1 (or 0), or write it once, {_TO_A_FOLDER}."
        )


class StreamFetcher(torch.utils.data.IterableDataset[Any]):
    """Reads the micro-batches of global batches `start` … `stop` − 1 of an epoch from a stream, as lists of examples."""

    def __init__(self, plan: CurriculumPlan, stream: Any, part: Part, *, epoch: int, start: int, stop: int) -> None:
        self.plan, self.stream, self.part = plan, stream, part
        self.epoch, self.start, self.stop = epoch, start, stop

    def __iter__(self) -> Iterator[list[Any]]:
        worker = torch.utils.data.get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        examples, place, count = None, 0, 0
        for number in range(self.start, self.stop):
            rows = self.plan.batch(number, self.epoch).tolist()
            if examples is None:
                place = rows[0]
                examples = _from_row(self.stream, place)
            if rows != list(range(place, place + len(rows))):
                raise SparsortError(
                    f"global batch {number} of epoch {self.epoch} does not follow the previous one in the stream: this plan "
                    "changes the order. Plan with later_epochs='repeat' and without best-fit packing, or write the stream "
                    f"once, {_TO_A_FOLDER}."
                )
            batch = self._read(examples, number, rows)
            place += len(rows)
            # Checked before the last batch is yielded, because Trainer stops there. `self` serves as the default, since it cannot
            # be an example.
            if number == self.plan.n_batches - 1 and next(examples, self) is not self:
                raise SparsortError(
                    f"the stream continues after the {self.plan.n_rows} rows that the plan was made for. Plan again for all "
                    "of its rows, or cut it (stream.take)."
                )
            for micro in range(self.part.micro_batches):
                # Every worker reads all rows and yields only its own micro-batches; DataLoader collects them in turn.
                if count % workers == worker_id:
                    yield self._micro_batch(batch, number, micro, first=rows[0])
                count += 1

    def _read(self, examples: Iterator[Any], number: int, rows: list[int]) -> list[Any]:
        batch: list[Any] = []
        try:
            batch.extend(islice(examples, len(rows)))
        except Exception as error:
            add_row_note(error, self.epoch, number, rows)
            raise
        if len(batch) < len(rows):
            raise SparsortError(
                f"the stream ended after {rows[0] + len(batch)} rows, and the plan was made for {self.plan.n_rows}. Plan "
                "again for the rows that the stream has."
            )
        return batch

    def _micro_batch(self, batch: list[Any], number: int, micro: int, *, first: int) -> list[Any]:
        seed_worker(self.plan, self.part, (self.epoch, number, micro))
        if self.plan.settings.packing == "none":
            rows = self.part.of(range(first, first + len(batch)), micro)
            return prepare(self.plan, self.part.of(batch, micro), list(rows), None)
        bins = self.part.of(self.plan.bins(number, self.epoch), micro)
        rows = np.concatenate(bins).tolist()
        return prepare(self.plan, [batch[row - first] for row in rows], rows, bins)


def materialize(stream: Iterable[Mapping[str, Any]], folder: str | Path) -> datasets.Dataset:
    """Write a stream once and return it as a memory-mapped dataset; `datasets.load_from_disk(folder)` opens it again.

    Args:
        stream: rows as mappings from column to value; a `datasets.IterableDataset` keeps its features.
        folder: the new folder, which appears only after all rows are written.

    Returns:
        The dataset.

    Raises:
        SparsortError: the folder exists, the stream is empty, a row is not a mapping, or the disk cannot be written.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = Path(folder).expanduser()
    if folder.exists():
        raise SparsortError(
            f"{folder} already exists. Open it with datasets.load_from_disk({str(folder)!r}), or choose another folder."
        )
    # The rows are written to a hidden folder, and one rename makes all of them visible.
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        n_rows = 0
        with (
            ArrowWriter(path=str(temporary / _ARROW), features=getattr(stream, "features", None)) as writer,
            progress("writing the stream", None) as advance,
        ):
            for row in stream:
                if not isinstance(row, Mapping):
                    raise SparsortError(
                        f"row {n_rows} of the stream is a {type(row).__name__}; rows are mappings from column to value, "
                        'such as {"text": "…"}.'
                    )
                writer.write(dict(row))
                n_rows += 1
                advance(1)
            if n_rows == 0:
                raise SparsortError("the stream has no rows. Check its source.")
            writer.finalize()
        _describe(temporary, datasets.Dataset.from_file(str(temporary / _ARROW)))
        temporary.rename(folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return datasets.load_from_disk(str(folder), keep_in_memory=False)


def _describe(folder: Path, written: datasets.Dataset) -> None:
    """Write the two files that `datasets.load_from_disk` needs next to the rows, so that the rows are not copied."""
    state = {
        "_data_files": [{"filename": _ARROW}],
        "_fingerprint": written._fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    written.info.write_to_directory(str(folder))


def _from_row(stream: Any, row: int) -> Iterator[Any]:
    if row == 0:
        return iter(stream)
    if skip := getattr(stream, "skip", None):
        return iter(skip(row))
    rest: Iterator[Any] = iter(stream)
    # This reads and drops the first rows. A stream that is too short is detected when the batch is read.
    next(islice(rest, row - 1, row), None)
    return rest


def _divides_itself(stream: Any) -> bool:
    # datasets.IterableDataset shards itself by the current worker, and PyTorch tells authors of IterableDatasets to do so.
    return isinstance(stream, torch.utils.data.IterableDataset) or type(stream).__module__.startswith("datasets.")
