"""The durable store of an ablation: what the model said to each (prefix, query) pair, by group.

Contract: what `write` returned from is on the disk, and no kill and no power cut loses it. Each write adds one Parquet
block of a name of its own, whole or absent, so that any number of processes may write to one store, and to one group,
at once; of outcomes that came twice the first counts. A damaged block is set aside and logged, and its pairs are
missing again. `store.json` holds what outcomes depend on besides the pair; a store of another model is refused. Blocks have a
hash of their content in their names, `store.json` and the notes a digest in themselves.

    store.json                                       format, version, identity, feature names
    groups/trec-3f2a+random+k8+seed3/                the group "trec-3f2a/random/k8/seed3"
        block-000000-000050-9f86d081-884c7d659a2feaa0.parquet
                                                     sequence number, rows, a random part, hash of the content
        note-demonstrations.json · .lock

`claim` spreads groups over processes. It is an advisory `flock`, which the kernel drops with the process that holds
it. On NFS, Linux passes it on to the server, so that it holds between machines, unless the mount says `nolock` or
`local_lock`; where the file system knows no locks at all, every claim succeeds with a warning. Two processes that
believe to own one group do its work twice, but lose nothing.
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
    """What a store holds. `rows` counts outcomes that came twice as two; `broken` counts files set aside."""

    groups: int
    blocks: int
    rows: int
    broken: int
    bytes: int


class OutcomeStore:
    """A folder of outcomes. Opening an existing one writes nothing, so that it can be read where it cannot be written.

    Args:
        folder: a folder that is new, empty, or a store of the same identity.
        identity: what outcomes depend on besides the pair, as JSON values: hash of the weights, of the tokenizer, dtype,
            engine.
        feature_names: what the F columns of `Outcomes.features` are.

    Raises:
        SparsortError: the folder holds a store of another identity or other features, or something else, or cannot be
            written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, feature_names: Sequence[str]) -> None:
        self._adopt(folder, open_manifest(folder, identity, feature_names))

    @classmethod
    def existing(cls, folder: Path) -> OutcomeStore:
        """The store in `folder`, whatever its identity, to read.

        Raises:
            SparsortError: there is none.
        """
        store = cls.__new__(cls)
        store._adopt(folder, read_manifest(folder))
        return store

    def _adopt(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        self.feature_names: tuple[str, ...] = tuple(manifest["feature_names"])
        self._has_seals: bool = "digest" in manifest
        text = json.dumps([self.identity, self.feature_names], sort_keys=True)
        self._digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._claimed: set[str] = set()
        self._shapes: dict[str, Shape] = {}
        self._index: tuple[str, set[str], set[Pair]] = ("", set(), set())

    def read(self, group: str) -> Outcomes:
        """Every outcome of a group, each pair once, in the order in which they came; of a group that is not there, none.

        Raises:
            SparsortError: the disk cannot read it, or a block is of another store or unlike the others.
        """
        return from_tables(self._tables(group), len(self.feature_names))

    def missing(self, group: str, pairs: Iterable[Pair]) -> list[Pair]:
        """Those of `pairs` that the group lacks, each once, in the order given.

        The pairs of the last group asked for are kept: a second call reads only the blocks that came since.
        """
        known, seen, held = self._index
        if known != group or not seen <= {path.name for path in self._blocks(group)}:
            seen, held = set(), set()
        for name, table in self._tables(group, skip=seen).items():
            seen.add(name)
            held.update(pairs_of(table))
        self._index = (group, seen, held)
        return [pair for pair in dict.fromkeys(pairs) if pair not in held]

    def write(self, group: str, outcomes: Outcomes) -> None:
        """Add outcomes to a group, durably, as one block; none are no block.

        Raises:
            SparsortError: they are unlike the store's features or the group's labels, or the disk does not take them.
                What was stored before stays as it is.
        """
        if outcomes.features.shape[1] != len(self.feature_names):
            raise SparsortError(
                f"the outcomes have {outcomes.features.shape[1]} features; {self.folder} holds "
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
        sequence = _sequence(blocks[-1].name) + 1 if blocks else 0
        self._add(group, sequence, outcomes)
        self._shapes[group] = outcomes.shape

    @contextlib.contextmanager
    def claim(self, group: str) -> Iterator[bool]:
        """Hold a group while the block runs: True if it is ours, False if another process (or another claim) has it.

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
        """Merge the group's blocks into one, and say whether it was done: not while another process claims the group.

        Readers and writers may go on meanwhile: the merged block is there before the others go, and takes their place
        in the order.
        """
        if group not in self._claimed:
            with self.claim(group) as ours:
                return ours and self.compact(group)
        tables = self._tables(group)
        if len(tables) > 1:
            self._add(group, _sequence(next(iter(tables))), from_tables(tables, len(self.feature_names)))
            try:
                # The last first: of what a kill leaves, the same outcomes of a pair are then still the first.
                for name in reversed(tables):
                    (self._folder(group) / name).unlink(missing_ok=True)
            except OSError as error:
                raise disk_error(self._folder(group), error) from error
        return True

    def groups(self) -> list[str]:
        """The groups that hold outcomes, sorted."""
        return sorted(group for group in self._every_group() if self._blocks(group))

    def summary(self) -> Summary:
        """Counts and bytes, from the names and sizes of the files alone."""
        groups = blocks = rows = broken = size = 0
        for group in self._every_group():
            files = listed(self._folder(group))
            matches = [match for match in map(_BLOCK.fullmatch, files) if match]
            groups += bool(matches)
            blocks += len(matches)
            rows += sum(int(match[2]) for match in matches)
            broken += sum(name.endswith(".broken") for name in files)
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    size += (self._folder(group) / name).stat().st_size
        return Summary(groups=groups, blocks=blocks, rows=rows, broken=broken, bytes=size)

    def put_note(self, group: str, name: str, value: Any) -> None:
        """Keep a small JSON value with a group, durably; one of the same name is replaced.

        Raises:
            SparsortError: the value is none of JSON's, or the disk does not take it.
        """
        value = as_json(value, f"note {name!r}")
        make_folder(self._folder(group))
        with locked(self.folder / LOCK, wait=True):
            write_json(self._note(group, name), sealed_note(group, name, value))

    def get_note(self, group: str, name: str, default: Any = None) -> Any:
        """The note as JSON gives it back, or `default` where there is none; a damaged one is set aside and logged."""
        path = self._note(group, name)
        try:
            found = parse_own_json(path.read_bytes())
            return open_note(found, group, name, must_be_sealed=self._has_seals)
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
        names = ((name, name_of_file(name)) for name in listed(self.folder / "groups"))
        return [group for name, group in names if group and file_name(group, "group") == name]

    def _blocks(self, group: str) -> list[Path]:
        folder = self._folder(group)
        return [folder / name for name in sorted(filter(_BLOCK.fullmatch, listed(folder)), key=_order)]

    def _tables(self, group: str, skip: Iterable[str] = ()) -> dict[str, pa.Table]:
        """The blocks by name, in order. Listed again until nothing is new: a listing may miss a block that is being merged in."""
        tables: dict[str, pa.Table] = {}
        seen = set(skip)
        while new := [path for path in self._blocks(group) if path.name not in seen]:
            for path in new:
                seen.add(path.name)
                if (table := self._load(group, path)) is not None:
                    tables[path.name] = table
        return {name: tables[name] for name in sorted(tables, key=_order)}

    def _load(self, group: str, path: Path) -> pa.Table | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # merged into another, or set aside
            return None
        except OSError as error:
            raise cannot_read(path, error) from error
        if _hash(content) != path.stem.rpartition("-")[2]:
            set_aside(path, f"a block of group {group!r}", "its content does not have the hash in its name")
            return None
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        except (pa.ArrowException, OSError) as error:  # whole, so the fault is not the file's
            raise SparsortError(f"{path} is whole, but pyarrow {pa.__version__} cannot read it: {error}.") from error
        store, owner = (table.schema.metadata[key].decode() for key in (b"sparsort.store", b"sparsort.group"))
        if (store, owner) != (self._digest, group):
            raise SparsortError(f"{path} was written for another store or group (for {owner!r}). Move it back there.")
        return table

    def _shape(self, group: str) -> Shape | None:
        """The shape that the group's outcomes have, from its first whole block."""
        if group not in self._shapes:
            for path in self._blocks(group):
                if (table := self._load(group, path)) is not None:
                    self._shapes[group] = shape_of(table)
                    break
        return self._shapes.get(group)

    def _add(self, group: str, sequence: int, outcomes: Outcomes) -> None:
        table = to_table(outcomes, {"sparsort.store": self._digest, "sparsort.group": group})
        make_folder(self._folder(group))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=["prefix", "query"])
        content = sink.getvalue().to_pybytes()
        name = f"block-{sequence:06d}-{table.num_rows:06d}-{uuid.uuid4().hex[:8]}-{_hash(content)}.parquet"
        with write_atomically(self._folder(group) / name) as temporary:
            temporary.write_bytes(content)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _order(name: str) -> tuple[int, str]:
    return _sequence(name), name


def _sequence(block: str) -> int:
    return int(block.split("-")[1])
