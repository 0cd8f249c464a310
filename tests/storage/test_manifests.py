"""The manifest of a folder: files that it lists must match it, and later files need not."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsort.errors import SparsortError
from sparsort.storage import integrity, manifests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.bin").write_bytes(bytes(range(200)))
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    (tmp_path / "inner" / "deep" / ".metadata").write_bytes(b"hidden")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "passing").write_bytes(b"soon gone")
    manifests.write_manifest(tmp_path, skip=["passing"])
    return tmp_path


def test_every_file_is_listed_also_in_inner_folders(folder: Path) -> None:
    found = json.loads((folder / manifests.FILE).read_text(encoding="utf-8"))
    assert found["files"].keys() == {"a.bin", "empty", "inner/deep/.metadata"}
    assert integrity.is_sealed(found)
    assert manifests.damage_in(folder) is None
    first = (folder / manifests.FILE).read_bytes()
    manifests.write_manifest(folder, skip=["passing"])  # it does not list itself
    assert (folder / manifests.FILE).read_bytes() == first


def test_any_damage_is_found(folder: Path, damages: Callable[[Path], Iterator[str]]) -> None:
    for name in ("a.bin", "inner/deep/.metadata", manifests.FILE):
        before = (folder / name).read_bytes()
        for what in damages(folder / name):
            white = (folder / name).exists() and (folder / name).read_bytes().split() == before.split()
            assert manifests.damage_in(folder) or (white and name == manifests.FILE), (name, what)
    (folder / "empty").write_bytes(b"x")
    assert manifests.damage_in(folder) == "empty is not as it was written: it has 1 bytes, and 0 were written"


def test_files_that_are_not_listed_may_change(folder: Path) -> None:
    (folder / "passing").unlink()
    (folder / "README.md").write_text("Mine.", encoding="utf-8")
    assert manifests.damage_in(folder) is None


def test_another_version_and_a_missing_manifest_are_reported(folder: Path) -> None:
    path = folder / manifests.FILE
    path.write_text(json.dumps(integrity.seal({"format": manifests.FORMAT, "version": 2})), encoding="utf-8")
    assert "is version 2 of 'sparsort-manifest', and this sparsort reads version 1" in str(manifests.damage_in(folder))
    path.write_text("[]", encoding="utf-8")
    assert "is version None" in str(manifests.damage_in(folder))
    path.unlink()
    assert manifests.damage_in(folder) == f"it has no {manifests.FILE}"


def test_files_are_on_the_disk_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, synced = threading.Lock(), []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        with lock:
            synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b").write_bytes(b"2")
    monkeypatch.setattr(os, "fsync", fsync)
    manifests.write_manifest(tmp_path)
    before = synced[: next(i for i, name in enumerate(synced) if name.startswith(f".{manifests.FILE}."))]
    assert {"a", "b", "inner", tmp_path.name} <= set(before)


@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_without_sync_is_put_up_with_and_a_broken_disk_is_not(
    code: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(integrity, "write_sealed", lambda *_: None)  # it calls fsync itself

    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(SparsortError, match="cannot write the manifest of"):
            manifests.write_manifest(tmp_path)
    else:
        manifests.write_manifest(tmp_path)


def test_an_error_without_a_text_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.pt").write_bytes(b"PK")

    def fail(_: Path) -> None:
        raise EOFError

    monkeypatch.setattr("zipfile.ZipFile", fail)
    assert manifests.unreadable_in(tmp_path) == "state.pt cannot be read (EOFError)"
