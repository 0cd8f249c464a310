"""The content of an editable install. The content of a wheel is tested in `test_house`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_an_editable_install_holds_no_copy_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hatchling import build

    monkeypatch.chdir(ROOT)
    wheel = tmp_path / build.build_editable(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        installed = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in installed] == [".pth"]
        [folder] = archive.read(installed[0]).decode().split()
    assert Path(folder) == ROOT / "src"
    assert Path(folder, "sparsort", "scoring").samefile(ROOT / "scoring")
