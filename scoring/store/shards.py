"""The score folder: one Parquet file per shard, which is complete or absent, and a manifest of the settings.

Contract: shard k contains the rows from k * shard_rows. It is done if `shard-0000k.parquet` is unchanged since it was written,
and its seal has the current rows and settings; a damaged shard is scored again. `manifest.json` contains the settings
(`provenance`, `shard_rows`). Exactly one of the processes that start at the same time creates it, before the first shard; the
others join that run, or are refused if their settings differ. The files show which shards are done, so two processes that score
disjoint shards never write the same file. When all shards are done, `finish` adds the list of shards to the manifest; all
processes write the same list. If two processes score the same shard, the work is done twice, but the file is complete.

Digests: each shard contains its own digest (`parquet_seal`), which a resumed run checks without parsing Parquet. The manifest
contains its own digest and, once the run is finished, the size and digest of every shard, which readers check. Version 1 of the
format has no digests. Its shards are checked for consistency (`shard_files.check_unsealed_shard`) each time they are used, until
`finish` writes a manifest of version 2. Reading never writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsort.errors import SparsortError
from sparsort.scoring.store.shard_files import (
    SCORE_AGAIN,
    check_unsealed_shard,
    column_names,
    read_shard,
    write_shard,
)
from sparsort.storage.files import disk_error, write_atomically
from sparsort.storage.integrity import (
    check_file,
    check_seal,
    check_version,
    damage,
    digest_of_values,
    parse_own_json,
    record_of,
    seal,
    write_sealed,
)
from sparsort.storage.parquet_seal import DamagedError, read_seal_and_record

MANIFEST = "manifest.json"
FORMAT = "sparsort-scores"
VERSION = 2
_UNSEALED = 1
# Recorded, but not compared: the environment does not change a score, and the digests of the rows identify the source.
NOT_COMPARED = ("environment", "source")

_SHARD = re.compile(r"shard-(\d{5,})\.parquet")
# The names of the temporary files of `write_atomically` and `_create`.
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
        self._sealed: bool = manifest["version"] != _UNSEALED
        self._listed: dict[int, dict[str, Any]] = {shard["index"]: shard for shard in manifest.get("shards", [])}
        # The shards that this process has checked or written, as entries of the manifest.
        self._checked: dict[int, dict[str, Any]] = {}
        self._whole: pa.Table | None = None
        self._start_over = f"Choose another folder for the changed data, or delete {folder} to score all of it again."
        self._settings = _settings_digest(self.provenance, self.shard_rows)

    @classmethod
    def open(
        cls, folder: Path, *, provenance: Mapping[str, Any], shard_rows: int, part: tuple[int, int] = (0, 1)
    ) -> ShardStore:
        """Create the folder, or resume the run in it.

        Args:
            folder: a folder that does not exist, is empty, or contains a run with the same settings.
            provenance: JSON values. All keys except `NOT_COMPARED` must equal those of the run in the folder.
            shard_rows: number of rows per shard, at least 1.
            part: (k, n) if this process writes the shards k, k + n, …; only their leftover temporary files are removed.

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
                _refuse_foreign(folder)
            if not (folder / MANIFEST).exists():
                _create(folder / MANIFEST, manifest)
            else:
                _probe(folder)
            _clear(folder, part)
        except OSError as error:
            raise disk_error(folder, error) from error
        # The manifest is always read back, because another process may have created it at the same time.
        existing = read_manifest(folder)
        _refuse_other_settings(folder, existing, manifest)
        return cls(folder, existing)

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
        matches = (_SHARD.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def is_done(self, index: int, digest: str, note: Callable[[str], None]) -> bool:
        """Whether shard `index` exists, is undamaged, and has the rows of this `rows_digest`.

        `note` is called with a sentence about any damage.

        Raises:
            SparsortError: the shard is undamaged but has other rows or settings, or the disk cannot read it.
        """
        entry = self._entry(index, note)
        if entry is None:
            return False
        if entry["digest"] != digest:
            begin = index * self.shard_rows
            raise SparsortError(
                f"the data has changed since {self.path(index).name} was scored: rows {begin} to "
                f"{begin + entry['rows'] - 1} are not the ones in it. {self._start_over}"
            )
        return True

    def write(self, index: int, table: pa.Table, digest: str) -> None:
        """Write shard `index`. Once this returns, neither a killed process nor a power failure loses the shard."""
        facts = {"index": index, "rows": table.num_rows, "digest": digest, "settings": self._settings}
        with write_atomically(self.path(index)) as temporary:
            write_shard(temporary, table, facts)
            record = record_of(temporary)
        self._checked[index] = self._listing(facts, record)

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
        # A damaged shard counts as absent. If it belongs to another process, that process scores it again.
        entries = (self._checked.get(index) or self._entry(index, lambda _sentence: None) for index in present)
        shards = [entry for entry in entries if entry is not None]
        if len(shards) < len(present):
            return False
        if manifest.get("shards") != shards:
            write_sealed(self.folder / MANIFEST, {**manifest, "version": VERSION, "rows": total, "shards": shards})
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
        if self._whole is None and 0 < self._rows <= _MAX_WHOLE_ROWS:
            self._whole = pa.concat_tables(self.tables()).combine_chunks()
        return self._whole.select(columns) if self._whole is not None else pa.concat_tables(self.tables(columns))

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


def as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as it will be read from the manifest; a `SparsortError` if a value is not a JSON value."""
    # JSON turns a tuple into a list, so the provenance is converted before it is compared.
    try:
        return dict(json.loads(json.dumps(dict(provenance), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise SparsortError(
            f"the scorer's provenance is not made of JSON values ({error}). This is a fault of the scorer."
        ) from error


def _create(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest unless it exists. If several processes do so at the same time, exactly one of them creates it."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        _write_new(temporary, text)
        with contextlib.suppress(FileExistsError):
            try:
                # A rename would replace the manifest of another process. A link to an existing name fails. The folder is synced
                # when the first shard is written.
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:
                # The disk has no hard links. Opening the file exclusively also lets one process create it, but a process that is
                # killed here leaves an incomplete file, which `read_manifest` refuses.
                _write_new(path, text)
    finally:
        temporary.unlink(missing_ok=True)


def _write_new(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as handle:
        try:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a score folder, finished or not.

    Raises:
        SparsortError: there is none, it is damaged, it has another version, or it is not the manifest of a score folder.
    """
    path = folder / MANIFEST
    again = f"Delete {folder} to score again, or choose another folder."
    try:
        manifest = parse_own_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SparsortError(
            f"{folder} is not a score folder: it has no {MANIFEST}. Make one with 'sparsort score FILE --out {folder}'."
        ) from error
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). {again}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SparsortError(f"{path} was not written by sparsort score. Choose another folder.")
    newer = "Update sparsort, or choose another folder."
    check_version(manifest.get("version"), (_UNSEALED, VERSION), path, damaged=again, other=newer)
    if manifest["version"] == VERSION:
        check_seal(manifest, path, next_step=again)
    if not _is_whole(manifest):
        raise SparsortError(f"{path} lacks the settings of the run. {again}")
    return manifest


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has all keys, with values of the right types."""
    # The digest is not enough: version 1 has none, and any program can write one for other values.
    shards, numbers = manifest.get("shards", []), [manifest.get("shard_rows"), manifest.get("rows", 0)]
    # Version 1 need not list the rows and digests of its shards, which are checked one by one.
    kinds = {"index": int, "file": str} if manifest["version"] == _UNSEALED else _SHARD_KINDS
    return (
        isinstance(manifest.get("provenance"), dict)
        and isinstance(manifest["provenance"].get("orientation", {}), dict)
        and all(type(number) is int and 0 <= number <= sys.maxsize for number in numbers)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) for shard in shards)
        and all(type(shard.get(name)) is kind for shard in shards for name, kind in kinds.items())
        # Only version 1 listed shards without their rows.
        and (
            "rows" not in kinds
            or "shards" not in manifest
            or sum(shard["rows"] for shard in shards) == manifest.get("rows")
        )
    )


def _refuse_foreign(folder: Path) -> None:
    """Raise a `SparsortError` if the folder contains files but no manifest."""
    # This includes shard files, because nothing shows with which settings they were made.
    if folder.exists():
        names = sorted(child.name for child in folder.iterdir())
        foreign = [name for name in names if not _TEMPORARY.fullmatch(name)]
        if foreign and MANIFEST not in foreign:
            first_names = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise SparsortError(
                f"{folder} is not a score folder: it contains {first_names}, but no {MANIFEST}. Choose a new folder."
            )


def _refuse_other_settings(folder: Path, existing: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = ({"shard_rows": side["shard_rows"], **_compared(side["provenance"])} for side in (existing, new))
    keys = dict.fromkeys([*before, *after])
    changed = [
        f"{key}: {_value_text(before, key)} → {_value_text(after, key)}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    if changed:
        raise SparsortError(
            f"{folder} contains scores made with other settings:\n  " + "\n  ".join(changed) + "\n"
            "Choose another folder (--out), use the settings of the existing scores, or delete the folder to score again."
        )


def _probe(folder: Path) -> None:
    """Raise an `OSError` if the folder cannot be written, so that this does not happen after the first shard."""
    probe = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def _clear(folder: Path, part: tuple[int, int]) -> None:
    """Remove the temporary files of killed runs, but none that another process may be writing."""
    for file in folder.iterdir():
        match = _TEMPORARY.fullmatch(file.name)
        if match is None or _alive(int(match[3])):
            continue
        if part[1] == 1 or (match[2] is not None and int(match[2]) % part[1] == part[0]):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()


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


def _settings_digest(provenance: Mapping[str, Any], shard_rows: int) -> str:
    return digest_of_values({"shard_rows": shard_rows, **_compared(provenance)})


def _compared(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_flat({key: value for key, value in provenance.items() if key not in NOT_COMPARED}))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings with names such as `outliers.n`, so that an error can name the exact difference."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _value_text(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings[key], ensure_ascii=False) if key in settings else "absent"
    # A fitted outlier rule is a list of hundreds of numbers.
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 20]}… ({len(text):,} characters)"


_ABSENT = object()
_MAX_SHOWN = 160
# Runs of up to this number of rows (about 15 MB) are read as a whole. 10,000 shards of a few rows each have fewer.
_MAX_WHOLE_ROWS = 1 << 16
_SHARD_KINDS: Mapping[str, type] = {"index": int, "file": str, "rows": int, "digest": str, "record": dict}
