"""The durable store of an ablation: the outcome of each (prefix, query) pair, in groups.

Contract: once `write` returns, the outcomes are on the disk, and neither a kill nor a power cut loses them. Each write adds one
Parquet block with a unique name, which is either complete or absent. Any number of processes may therefore write to one store,
and to one group, at the same time. If an outcome is written twice, the first counts. A damaged block is set aside and logged,
and its pairs are missing again. `store.json` has what outcomes depend on besides the pair, and a store of another model is
refused. The name of a block contains a hash of its content; `store.json` and the notes contain digests of themselves.

    store.json                                       format, version, identity, feature names
    groups/trec-3f2a+random+k8+seed3/                the group "trec-3f2a/random/k8/seed3"
        block-000000-000050-9f86d081-884c7d659a2feaa0.parquet
                                                     sequence number, rows, a random part, hash of the content
        note-demonstrations.json · .lock

`claim` distributes groups over processes. It is an advisory `flock`, which the kernel releases when its process ends. On NFS,
Linux passes it on to the server, so it also works between machines, unless the mount has the option `nolock` or `local_lock`.
On a file system without locks, every claim succeeds with a warning. Two processes that both claim a group do its work twice,
but lose nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsort.curriculum.ablation.store.folder import (
    LOCK,
    as_json,
    cannot_read,
    clear_stale,
    file_name,
    listed,
    make_folder,
    name_of_file,
    open_manifest,
    open_note,
    read_manifest,
    sealed_note,
    set_aside,
)
from sparsort.curriculum.ablation.store.outcomes import Outcomes, Pair, Shape, from_tables, pairs_of, shape_of, to_table
from sparsort.errors import SparsortError
from sparsort.storage.files import disk_error, write_atomically, write_json
from sparsort.storage.integrity import parse_own_json
from sparsort.storage.locks import locked

__all__ = ["OutcomeStore", "Outcomes", "Pair", "Summary"]

_BLOCK = re.compile(r"block-(\d{6,})-(\d{6,})-[0-9a-f]{8}-[0-9a-f]{16}\.parquet")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The size of a store. `rows` counts repeated outcomes too; `broken` is the number of files set aside."""

    groups: int
    blocks: int
    rows: int
    broken: int
    bytes: int


class OutcomeStore:
    """A folder of outcomes. Opening an existing store writes nothing, so a read-only folder can be opened too.

    Args:
        folder: a new or empty folder, or a store with the same identity.
        identity: what outcomes depend on besides the pair, as JSON values: hashes of the weights and the tokenizer, dtype,
            engine.
        feature_names: names of the F columns of `Outcomes.features`.

    Raises:
        SparsortError: the folder contains a store with another identity or other features, or something else, or it cannot be
            written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, feature_names: Sequence[str]) -> None:
        self._adopt(folder, open_manifest(folder, identity, feature_names))

    @classmethod
    def existing(cls, folder: Path) -> OutcomeStore:
        """Open the store in `folder` for reading, whatever its identity.

        Raises:
            SparsortError: there is no store.
        """
        # `__init__` would compare the identity, and create a store if there is none.
        store = cls.__new__(cls)
        store._adopt(folder, read_manifest(folder))
        return store

    def _adopt(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        self.feature_names: tuple[str, ...] = tuple(manifest["feature_names"])
        self._has_seals: bool = "digest" in manifest
        # Each block contains this digest, so that a block moved here from another store is refused.
        text = json.dumps([self.identity, self.feature_names], sort_keys=True)
        self._digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._claimed: set[str] = set()
        self._shapes: dict[str, Shape] = {}
        # The latest group given to `missing`, with the names of the blocks that have been read and their pairs.
        self._index: tuple[str, set[str], set[Pair]] = ("", set(), set())

    def read(self, group: str) -> Outcomes:
        """Every outcome of a group, in the order of writing, each pair once. An absent group has no outcomes.

        Raises:
            SparsortError: the disk cannot be read, or a block belongs to another store or differs in shape.
        """
        return from_tables(self._tables(group), len(self.feature_names))

    def missing(self, group: str, pairs: Iterable[Pair]) -> list[Pair]:
        """The pairs that the group lacks, each once, in the given order.

        The pairs of the latest group are remembered, so a second call reads only the blocks that were added since.
        """
        latest, seen, stored = self._index
        # A block that has disappeared was set aside or merged, so the remembered pairs may be gone.
        if latest != group or not seen <= {path.name for path in self._blocks(group)}:
            seen, stored = set(), set()
        for name, table in self._tables(group, skip=seen).items():
            seen.add(name)
            stored.update(pairs_of(table))
        self._index = (group, seen, stored)
        return [pair for pair in dict.fromkeys(pairs) if pair not in stored]

    def write(self, group: str, outcomes: Outcomes) -> None:
        """Add outcomes to a group, durably, as one block. Without outcomes, nothing is written.

        Raises:
            SparsortError: the features are not the store's, the shape is not the group's, or the disk cannot be written.
                Outcomes that were stored before are not affected.
        """
        if outcomes.features.shape[1] != len(self.feature_names):
            raise SparsortError(
                f"the outcomes have {outcomes.features.shape[1]} features; {self.folder} has "
                f"{len(self.feature_names)}: {', '.join(self.feature_names)}."
            )
        if len(outcomes) == 0:
            return
        expected = self._shape(group)
        if expected is not None and expected != outcomes.shape:
            raise SparsortError(
                f"the outcomes have {outcomes.shape}; those of group {group!r} have {expected}. Name a new group."
            )
        blocks = self._blocks(group)
        # Two processes may take the same number. The random part of the name keeps their blocks apart.
        sequence = _sequence(blocks[-1].name) + 1 if blocks else 0
        self._add(group, sequence, outcomes)
        self._shapes[group] = outcomes.shape

    @contextlib.contextmanager
    def claim(self, group: str) -> Iterator[bool]:
        """Claim a group during a `with` block. Yields False if another process, or another claim of this one, has it.

        Raises:
            SparsortError: the store cannot be written.
        """
        folder = self._folder(group)
        make_folder(folder)
        with locked(folder / LOCK, wait=False) as ours:
            if ours:
                clear_stale(folder)
                self._claimed.add(group)
            try:
                yield ours
            finally:
                if ours:
                    self._claimed.discard(group)

    def compact(self, group: str) -> bool:
        """Merge the group's blocks into one. Returns False if another process has claimed the group.

        Readers and writers may continue meanwhile: the merged block exists before the others are deleted, and takes their place
        in the order.
        """
        if group not in self._claimed:
            with self.claim(group) as ours:
                return ours and self.compact(group)
        tables = self._tables(group)
        if len(tables) > 1:
            self._add(group, _sequence(next(iter(tables))), from_tables(tables, len(self.feature_names)))
            try:
                # Delete the latest block first. If a kill interrupts this, the first outcome of each pair is still the same.
                for name in reversed(tables):
                    (self._folder(group) / name).unlink(missing_ok=True)
            except OSError as error:
                raise disk_error(self._folder(group), error) from error
        return True

    def groups(self) -> list[str]:
        """The groups that have outcomes, sorted."""
        return sorted(group for group in self._every_group() if self._blocks(group))

    def summary(self) -> Summary:
        """Count files, outcomes and bytes by the names and sizes of the files, without reading them."""
        groups = blocks = rows = broken = size = 0
        for group in self._every_group():
            files = listed(self._folder(group))
            matches = [match for match in map(_BLOCK.fullmatch, files) if match]
            groups += bool(matches)
            blocks += len(matches)
            rows += sum(int(match[2]) for match in matches)
            broken += sum(name.endswith(".broken") for name in files)
            for name in files:
                # Another process may delete or rename a file meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    size += (self._folder(group) / name).stat().st_size
        return Summary(groups=groups, blocks=blocks, rows=rows, broken=broken, bytes=size)

    def put_note(self, group: str, name: str, value: Any) -> None:
        """Store a small JSON value in a group, durably. A note of the same name is replaced.

        Raises:
            SparsortError: JSON cannot represent the value, or the disk cannot be written.
        """
        value = as_json(value, f"note {name!r}")
        make_folder(self._folder(group))
        with locked(self.folder / LOCK, wait=True):
            write_json(self._note(group, name), sealed_note(group, name, value))

    def get_note(self, group: str, name: str, default: Any = None) -> Any:
        """The value of a note, or `default` if there is none. A damaged note is set aside and logged."""
        path = self._note(group, name)
        try:
            content = parse_own_json(path.read_bytes())
            return open_note(content, group, name, must_be_sealed=self._has_seals)
        except (FileNotFoundError, NotADirectoryError):
            return default
        except ValueError as error:
            set_aside(path, f"note {name!r} of group {group!r}", str(error))
            return default
        except OSError as error:
            raise cannot_read(path, error) from error

    def _folder(self, group: str) -> Path:
        return self.folder / "groups" / file_name(group, "group")

    def _note(self, group: str, name: str) -> Path:
        return self._folder(group) / f"note-{file_name(name, 'note')}.json"

    def _every_group(self) -> list[str]:
        # Folders whose name `file_name` cannot have given are not groups of this store.
        names = ((name, name_of_file(name)) for name in listed(self.folder / "groups"))
        return [group for name, group in names if group and file_name(group, "group") == name]

    def _blocks(self, group: str) -> list[Path]:
        folder = self._folder(group)
        return [folder / name for name in sorted(filter(_BLOCK.fullmatch, listed(folder)), key=_order)]

    def _tables(self, group: str, skip: Iterable[str] = ()) -> dict[str, pa.Table]:
        """The blocks by name, in order."""
        tables: dict[str, pa.Table] = {}
        seen = set(skip)
        # Another process may merge blocks between the listing and the reading. The folder is listed until nothing is new, so
        # the merged block is read as well.
        while new := [path for path in self._blocks(group) if path.name not in seen]:
            for path in new:
                seen.add(path.name)
                if (table := self._load(group, path)) is not None:
                    tables[path.name] = table
        return {name: tables[name] for name in sorted(tables, key=_order)}

    def _load(self, group: str, path: Path) -> pa.Table | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            # It was merged into another block, or set aside.
            return None
        except OSError as error:
            raise cannot_read(path, error) from error
        if _hash(content) != path.stem.rpartition("-")[2]:
            set_aside(path, f"a block of group {group!r}", "its content does not have the hash in its name")
            return None
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        except (pa.ArrowException, OSError) as error:
            # The hash is right, so the file is not damaged and must not be set aside.
            raise SparsortError(f"{path} is intact, but pyarrow {pa.__version__} cannot read it: {error}.") from error
        store, owner = (table.schema.metadata[key].decode() for key in (b"sparsort.store", b"sparsort.group"))
        if (store, owner) != (self._digest, group):
            raise SparsortError(f"{path} was written for another store or group (for {owner!r}). Move it back there.")
        return table

    def _shape(self, group: str) -> Shape | None:
        """The shape of the group's outcomes, from its first undamaged block."""
        if group not in self._shapes:
            for path in self._blocks(group):
                if (table := self._load(group, path)) is not None:
                    self._shapes[group] = shape_of(table)
                    break
        return self._shapes.get(group)

    def _add(self, group: str, sequence: int, outcomes: Outcomes) -> None:
        table = to_table(outcomes, {"sparsort.store": self._digest, "sparsort.group": group})
        make_folder(self._folder(group))
        # Write to memory first, because the file name contains a hash of the content.
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=["prefix", "query"])
        content = sink.getvalue().to_pybytes()
        name = f"block-{sequence:06d}-{table.num_rows:06d}-{uuid.uuid4().hex[:8]}-{_hash(content)}.parquet"
        with write_atomically(self._folder(group) / name) as temporary:
            temporary.write_bytes(content)


def _hash(content: bytes) -> str:
    """The 16 hexadecimal digits at the end of a block's name."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _order(name: str) -> tuple[int, str]:
    return _sequence(name), name


def _sequence(block: str) -> int:
    return int(block.split("-")[1])
