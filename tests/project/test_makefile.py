"""The Makefile sets up .venv once, again when its requirements change, and not at all if the installation fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Replaces Python: it answers the version check, makes a .venv whose python logs what it is asked and may fail.
_PYTHON = """#!/bin/sh
case "$*" in
"-m venv .venv") mkdir -p .venv/bin && cp python .venv/bin/python ;;
*pip*) echo "$*" >> log; test ! -e broken ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "python").write_text(_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def _make(folder: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV_PYTHON"}
    }
    return subprocess.run(
        ["make", "PYTHON=./python", *targets], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def _installs(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def test_it_installs_once_and_again_when_the_constraints_change(project: Path) -> None:
    for _ in range(2):
        assert _make(project, "setup").returncode == 0
    assert len(_installs(project)) == 1
    assert "-c constraints.txt" in _installs(project)[0]
    stamp = (project / ".venv" / ".ready").stat().st_mtime
    os.utime(project / "constraints.txt", (stamp + 5, stamp + 5))
    assert _make(project, "setup").returncode == 0
    assert len(_installs(project)) == 2


def test_a_failed_installation_fails_the_target_and_is_tried_again(project: Path) -> None:
    (project / "broken").touch()
    assert _make(project, "test").returncode != 0
    assert not (project / ".venv" / ".ready").exists()
    (project / "broken").unlink()
    assert _make(project, "setup").returncode == 0
    assert len(_installs(project)) == 2


def test_a_given_python_is_used_as_it_is(project: Path) -> None:
    assert _make(project, "gpu-check", "VENV_PYTHON=./python").returncode == 0
    assert not (project / ".venv").exists()


def test_help_lists_the_targets(project: Path) -> None:
    listed = _make(project).stdout
    assert all(
        f"make {target}" in listed for target in ("demo", "test", "test-under-load", "lint", "bench", "gpu-check")
    )
