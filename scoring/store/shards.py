"""The score folder: one Parquet file per shard, which is complete or absent, and a manifest of the settings.

Contract: shard k contains the rows from k * shard_rows. It is done if `shard-0000k.parquet` is unchanged since it was written,
and its seal has the current rows and settings; a damaged shard is scored again. `manifest.json` contains the settings
(`provenance`, `shard_rows`). Exactly one of the processes that start at the same time creates it, before the first shard; the
others join that run, or are refused if their settings differ. The files show which shards are done, so two processes that score
disjoint shards never write the same file. When all shards are done, `finish` adds the list of shards to the manifest; all
processes write the same list. A process claims a shard before it scores it (`claimed`). If two processes score the same shard
nevertheless, the work is done twice, but the file is complete.

Digests: each shard contains its own digest (`parquet_seal`), which a resumed run checks without parsing Parquet. The manifest
contains its own digest and, once the run is finished, the size and digest of every shard, which readers check. Until then the
processes of the run log these (`work_log`) in the folder `workers`, which `finish` removes. Version 1 of the
format has no digests. Its shards are checked for consistency (`shard_files.check_unsealed_shard`) each time they are used, until
`finish` writes a manifest of version 2. Reading never writes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsort.errors import SparsortError
from sparsort.scoring.store.claims import Claims, read_claims, this_process
from sparsort.scoring.store.manifest import (
    FORMAT,
    MANIFEST,
    UNSEALED,
    VERSION,
    WORKERS,
    as_json,
    create_manifest,
    read_manifest,
    refuse_other_settings,
    settings_digest,
    shard_numbers,
)
from sparsort.scoring.store.shard_files import (
    SCORE_AGAIN,
    check_unsealed_shard,
    column_names,
    read_shard,
    write_shard,
)
from sparsort.scoring.store.work_log import Done, WorkLog, read_logs
from sparsort.storage.files import disk_error, write_atomically
from sparsort.storage.integrity import check_file, damage, record_of, seal, write_sealed
from sparsort.storage.parquet_seal import DamagedError, read_seal_and_record

# The names of the temporary files of `write_atomically` and `create_manifest`.
_TEMPORARY = re.compile(r"\.(manifest\.json|shard-(\d{5,})\.parquet)\.(\d+)(?:\.[0-9a-f]{32})?\.tmp")


class ShardStore:
    """A score folder. Call `open` to score into it, or `complete` to read it.

    Attributes:
        folder: its path.
        provenance: the settings in its manifest.
        shard_rows: number of rows per shard.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.provenance: dict[str, Any] = manifest["provenance"]
        self.shard_rows: int = manifest["shard_rows"]
        self._rows = int(manifest.get("rows", 0))
        self._sealed: bool = manifest["version"] != UNSEALED
        self._listed: dict[int, dict[str, Any]] = {shard["index"]: shard for shard in manifest.get("shards", [])}
        # The shards that this process has checked or written, as entries of the manifest.
        self._checked: dict[int, dict[str, Any]] = {}
        # Columns that have been read.
        self._in_memory: pa.Table | None = None
        self._start_over = f"Choose another folder for the changed data, or delete {folder} to score all of it again."
        self._settings = settings_digest(self.provenance, self.shard_rows)
        self.claims = Claims(folder / WORKERS)
        self._log = WorkLog(folder / WORKERS)
        # The shards in the logs of all processes of the run, and the temporary files of killed ones, by shard.
        self._logged: dict[int, Done] = {}
        self._leftovers: dict[int, list[Path]] = {}

    @classmethod
    def open(cls, folder: Path, *, provenance: Mapping[str, Any], shard_rows: int) -> ShardStore:
        """Create the folder, or resume the run in it.

        Args:
            folder: a folder that does not exist, is empty, or contains a run with the same settings.
            provenance: JSON values. All keys except `NOT_COMPARED` must equal those of the run in the folder.
            shard_rows: number of rows per shard, at least 1.

        Raises:
            SparsortError: the settings differ, the folder is not a score folder, or it cannot be written.
        """
        if shard_rows < 1:
            raise SparsortError(f"shard_rows is {shard_rows}; expected at least 1.")
        manifest = seal(
            {"format": FORMAT, "version": VERSION, "shard_rows": shard_rows, "provenance": as_json(provenance)}
        )
        try:
            if not (folder / MANIFEST).exists():
                refuse_foreign(folder)
            if not (folder / MANIFEST).exists():
                create_manifest(folder / MANIFEST, manifest)
            else:
                _probe(folder)
            leftovers = _leftovers(folder)
        except OSError as error:
            raise disk_error(folder, error) from error
        # The manifest is always read back, because another process may have created it at the same time.
        existing = read_manifest(folder)
        refuse_other_settings(folder, existing, manifest)
        store = cls(folder, existing)
        store._leftovers = leftovers
        store._read_logs()
        return store

    @classmethod
    def join(cls, folder: Path) -> ShardStore:
        """Open a run that other processes have begun, in order to finish it; a `SparsortError` if there is none."""
        store = cls(folder, read_manifest(folder))
        store._read_logs()
        return store

    def logged(self) -> set[int]:
        """The shards that are in a log of the run and unchanged since."""
        present = set(self.indices()) & self._logged.keys()
        return {index for index in present if self._unchanged_since_logged(index) is not None}

    @classmethod
    def complete(cls, folder: Path) -> ShardStore:
        """Open the finished run in `folder`; a `SparsortError` if there is none, or if it is damaged or not finished."""
        manifest = read_manifest(folder)
        store = cls(folder, manifest)
        if "shards" not in manifest:
            done = len(store.indices())
            raise SparsortError(
                f"the scores in {folder} are not complete ({done} shard(s) so far). Run the same command again."
            )
        # Listing the folder once is much faster than testing each of many files.
        present = {file.name for file in os.scandir(folder)}
        if missing := [shard["file"] for shard in manifest["shards"] if shard["file"] not in present]:
            raise SparsortError(f"{folder} lacks {', '.join(missing[:5])}. Run the command that made them again.")
        if store._sealed:
            for shard in manifest["shards"]:
                check_file(folder / shard["file"], shard["record"], next_step=SCORE_AGAIN)
        else:
            store._check_unsealed()
        return store

    def _check_unsealed(self) -> None:
        """Check each shard of a finished folder of version 1, and the folder as a whole; raise a `SparsortError` if damaged."""
        rows = []
        for number, (index, shard) in enumerate(self._listed.items()):
            path = self.path(index)
            try:
                facts = check_unsealed_shard(
                    path, settings=self._settings, shard_rows=self.shard_rows, provenance=self.provenance
                )
            except DamagedError as error:
                raise SparsortError(f"{error} {SCORE_AGAIN}") from error
            except FileNotFoundError as error:
                raise SparsortError(f"{path} is damaged: it is missing. {SCORE_AGAIN}") from error
            self._refuse_settings(path, facts["settings"])
            expected = (number, path.name, shard.get("rows"), shard.get("digest"))
            if expected != (index, shard.get("file"), facts["rows"], facts["digest"]):
                raise SparsortError(f"{path} is not the shard that {MANIFEST} lists. {SCORE_AGAIN}")
            rows.append(facts["rows"])
        if sum(rows) != self._rows or any(count != self.shard_rows for count in rows[:-1]):
            raise SparsortError(
                f"{self.folder} is damaged: its shards have {sum(rows)} rows, but {MANIFEST} says {self._rows}."
            )

    def path(self, index: int) -> Path:
        """The file of shard `index`."""
        return self.folder / f"shard-{index:05d}.parquet"

    def indices(self) -> list[int]:
        """The indices of the shards that have a file, in ascending order."""
        return shard_numbers(self.folder)

    def claimed(self, index: int) -> contextlib.AbstractContextManager[bool]:
        """Claim shard `index` while the block runs; yields whether this process has it (see `Claims.claimed`)."""
        return self.claims.claimed(f"{index:05d}")

    def is_done(self, index: int, digest: str | None, note: Callable[[str], None]) -> bool:
        """Whether shard `index` exists, is undamaged, and has the rows of this `rows_digest`.

        Args:
            index: the shard.
            digest: the digest of its rows; None if the source is known to be unchanged.
            note: called with a sentence about any damage.

        Raises:
            SparsortError: the shard is undamaged but has other rows or settings, or the disk cannot read it.
        """
        entry = self._entry(index, note)
        if entry is None:
            return False
        if digest is not None and entry["digest"] != digest:
            begin = index * self.shard_rows
            raise SparsortError(
                f"the data has changed since {self.path(index).name} was scored: rows {begin} to "
                f"{begin + entry['rows'] - 1} are not the ones in it. {self._start_over}"
            )
        return True

    def write(self, index: int, table: pa.Table, digest: str) -> None:
        """Write shard `index`. Once this returns, neither a killed process nor a power failure loses the shard."""
        facts = {"index": index, "rows": table.num_rows, "digest": digest, "settings": self._settings}
        for leftover in self._leftovers.pop(index, ()):
            leftover.unlink(missing_ok=True)
        with write_atomically(self.path(index)) as temporary:
            write_shard(temporary, table, facts)
            record = record_of(temporary)
            modified = temporary.stat().st_mtime_ns
        self._checked[index] = self._listing(facts, record)
        facts["shard"] = facts.pop("index")
        file = {"n_bytes": record["bytes"], "file_digest": record["digest"], "modified": modified}
        self._log.append(**facts, **file, unscored=_unscored(table) or None)

    def close(self) -> None:
        """Close the log of this process, and stop showing the others that it runs."""
        self._log.close()
        self.claims.close()

    def refuse_beyond(self, total: int) -> None:
        """Raise a `SparsortError` if the folder has more shards than `total` rows fill."""
        expected, present = -(-total // self.shard_rows), self.indices()
        if present and present[-1] >= expected:
            raise SparsortError(
                f"the data has become shorter: {self.folder} contains scores up to {self.path(present[-1]).name}, "
                f"but {total} rows fill {expected} shard(s). {self._start_over}"
            )

    def finish(self, total: int) -> bool:
        """List the shards in the manifest, if all shards of `total` rows are done.

        Returns:
            Whether they are done.

        Raises:
            SparsortError: a shard has other settings than the manifest, or cannot be read; see also `refuse_beyond`.
        """
        self.refuse_beyond(total)
        present = self.indices()
        if len(present) < -(-total // self.shard_rows):
            return False
        # Another process may have finished the run in the meantime.
        manifest = read_manifest(self.folder)
        self._read_logs()
        # A damaged shard counts as absent. If it belongs to another process, that process scores it again.
        entries = (self._checked.get(index) or self._entry(index, lambda _sentence: None) for index in present)
        shards = [entry for entry in entries if entry is not None]
        if len(shards) < len(present):
            return False
        if manifest.get("shards") != shards:
            write_sealed(self.folder / MANIFEST, {**manifest, "version": VERSION, "rows": total, "shards": shards})
        for leftover in (path for paths in _leftovers(self.folder).values() for path in paths):
            leftover.unlink(missing_ok=True)
        # A process that still has a log open, or waits for a claim, finds every shard done.
        shutil.rmtree(self.folder / WORKERS, ignore_errors=True)
        return True

    @property
    def num_rows(self) -> int:
        """The number of rows of a finished run; 0 for an unfinished run."""
        return self._rows

    @property
    def column_names(self) -> list[str]:
        """The columns of every shard."""
        return column_names(self.path(self._to_read()[0]))

    def select(self, columns: list[str]) -> pa.Table:
        """The named columns of all shards, in the order of the rows."""
        # Opening many shards takes longer than reading them, so a small run is read once, as a whole.
        if self._in_memory is None and 0 < self._rows <= _MAX_WHOLE_ROWS:
            self._in_memory = pa.concat_tables(self.tables()).combine_chunks()
        if self._in_memory is None and self._rows <= min(_MAX_REPORT_ROWS, _SMALL_ROWS * len(self._listed)):
            names = [name for name in _REPORT_COLUMNS if name in self.column_names]
            self._in_memory = pa.concat_tables(self.tables(names))
        if self._in_memory is not None and set(columns) <= set(self._in_memory.column_names):
            return self._in_memory.select(columns)
        return pa.concat_tables(self.tables(columns))

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the table of each shard, with one in memory at a time."""
        for index in self._to_read():
            yield read_shard(self.path(index), columns)

    def _to_read(self) -> list[int]:
        """The indices of the shards in the manifest or, in an unfinished run, of those that have a file."""
        return sorted(self._listed) or self.indices()

    def _entry(self, index: int, note: Callable[[str], None]) -> dict[str, Any] | None:
        """Check shard `index`, and return its entry in the manifest; None if it is absent or damaged.

        Raises:
            SparsortError: the shard is undamaged but has other settings, or the disk cannot read it.
        """
        path, listed = self.path(index), self._listed.get(index)
        try:
            if self._sealed and listed is not None and damage(path, listed["record"]) is None:
                self._checked[index] = listed
                return listed
            if (logged := self._unchanged_since_logged(index)) is not None:
                self._checked[index] = logged
                return logged
            facts, record = read_seal_and_record(path)
            facts = facts or self._unsealed_facts(path)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            note(f"{path.name} is damaged ({error.reason}); its rows are scored again.")
            return None
        except OSError as error:
            raise SparsortError(f"cannot read {path}: {error.strerror or error}.") from error
        self._refuse_settings(path, facts["settings"])
        # Somebody may have renamed or copied a file.
        if facts.get("index", index) != index:
            note(f"{path.name} contains the rows of shard {facts['index']}; its own rows are scored again.")
            return None
        self._checked[index] = self._listing({**facts, "index": index}, record)
        return self._checked[index]

    def _unchanged_since_logged(self, index: int) -> dict[str, Any] | None:
        """The entry of a shard by its log; None if there is none, or if the file has been written since."""
        if (done := self._logged.get(index)) is None or done.settings != self._settings:
            return None
        status = self.path(index).stat()
        if (status.st_size, status.st_mtime_ns) != (done.n_bytes, done.modified):
            return None
        return self._listing({"index": index, "rows": done.rows, "digest": done.digest}, done.record)

    def _read_logs(self) -> None:
        self._logged = {done.shard: done for _, log in read_logs(self.folder / WORKERS) for done in log}

    def _unsealed_facts(self, path: Path) -> dict[str, Any]:
        if self._sealed:
            raise DamagedError(path, "it was not written by sparsort")
        return check_unsealed_shard(
            path, settings=self._settings, shard_rows=self.shard_rows, provenance=self.provenance
        )

    def _listing(self, facts: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
        index, rows, digest = facts["index"], facts["rows"], facts["digest"]
        return {"index": index, "file": self.path(index).name, "rows": rows, "digest": digest, "record": dict(record)}

    def _refuse_settings(self, path: Path, settings: str) -> None:
        if settings != self._settings:
            raise SparsortError(
                f"{path} was scored with other settings than {MANIFEST} next to it. "
                f"Delete {self.folder}, or choose another folder."
            )


@contextlib.contextmanager
def beginning(folder: Path) -> Iterator[bool]:
    """Let one process create the manifest of a new folder in the block, while others that call this wait for it.

    Yields:
        Whether this process has to create it.

    Raises:
        SparsortError: the folder is not a score folder, or it cannot be written.
    """
    is_new = not folder.exists()
    refuse_foreign(folder)
    claims = Claims(folder / WORKERS)
    try:
        with claims.first("manifest", (folder / MANIFEST).exists) as is_ours:
            yield is_ours
    finally:
        claims.close()
        # After an error, nothing is left of a folder that was made for the claim.
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def discard_unbegun(folder: Path) -> None:
    """Remove a folder in which no process has created the manifest, or is about to."""
    others = (claim for claim in read_claims(folder / WORKERS) if claim.state != "dead")
    if not (folder / MANIFEST).exists() and all(claim.owner == this_process() for claim in others):
        shutil.rmtree(folder / WORKERS, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def refuse_foreign(folder: Path) -> None:
    """Raise a `SparsortError` if the folder contains files but no manifest, or cannot be read."""
    # This includes shard files, because nothing shows with which settings they were made.
    try:
        names = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise disk_error(folder, error) from error
    foreign = [name for name in names if name != WORKERS and not _TEMPORARY.fullmatch(name)]
    if foreign and MANIFEST not in foreign:
        first_names = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise SparsortError(
            f"{folder} is not a score folder: it contains {first_names}, but no {MANIFEST}. Choose a new folder."
        )


def _probe(folder: Path) -> None:
    """Raise an `OSError` if the folder cannot be written, so that this does not happen after the first shard."""
    probe = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def _leftovers(folder: Path) -> dict[int, list[Path]]:
    """The temporary files of killed processes, by the shard that they were writing; −1 for the manifest.

    A process of another machine may have such a file open too. The file of a shard is therefore removed only by a process that
    has claimed the shard, or when all shards are done.
    """
    found = defaultdict(list)
    for file in os.scandir(folder):
        match = _TEMPORARY.fullmatch(file.name) if file.name.startswith(".") else None
        if match is not None and not _alive(int(match[3])):
            found[int(match[2] or -1)].append(Path(file.path))
    return dict(found)


def _unscored(table: pa.Table) -> dict[str, int]:
    """The number of rows with each status other than "ok"."""
    if "status" not in table.column_names:
        return {}
    counts = Counter(table["status"].to_pylist())
    return {status: count for status, count in sorted(counts.items()) if status != "ok"}


def _alive(process: int) -> bool:
    # On Windows, `os.kill` with 0 would interrupt the process. A file with the number of this process is from an earlier process.
    if process == os.getpid() or sys.platform == "win32":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Runs of up to this number of rows (about 15 MB) are read as a whole. 10,000 shards of a few rows each have fewer.
_MAX_WHOLE_ROWS = 1 << 16
# Of more rows, the columns that a report reads one after the other are read in one pass (up to 300 MB), if the shards are small.
_MAX_REPORT_ROWS, _SMALL_ROWS = 1 << 22, 512
_REPORT_COLUMNS = ("position", "id", "difficulty", "status", "n_tokens", "n_truncated")
