"""The programs of docs/clients.md run unchanged but for the model, and its table has versions and files that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
_PROGRAM = """
import contextlib, io, json, sys
printed = []
for program in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(program, {"__name__": "__main__"})
    printed.append(output.getvalue())
json.dump(printed, sys.stdout)
"""


def _section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def _program(title: str) -> str:
    [text] = re.findall(r"```python\n(.*?)```", _section(title), re.DOTALL)
    return str(text)


def test_the_programs_of_the_page_run(tmp_path: Path, make_tiny_model: Callable[..., Path]) -> None:
    pytest.importorskip("dspy")
    classify = _program("scikit-learn").replace('model = "demo"', f"model = {str(make_tiny_model('llama'))!r}")
    assert "llama" in classify
    programs = [classify, *map(_program, ("pandas", "polars", "DSPy"))]
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", _PROGRAM],
        cwd=ROOT,
        env={**os.environ, "DSPY_CACHEDIR": str(tmp_path)},
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracy, of_pandas, of_polars, labels = json.loads(done.stdout)
    assert 0 <= float(accuracy) <= 1
    ids = re.findall(r"r\d{3}", of_pandas)
    assert len(ids) == 3
    assert re.findall(r"r\d{3}", of_polars) == ids
    assert sorted(re.findall(r"\w+", labels)) == ["negative", "negative", "positive", "positive"]


def test_the_lines_for_the_harness_are_those_of_the_task_that_is_run() -> None:
    adapters = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:yaml|python)\n(.*?)```", _section("lm-evaluation-harness"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    assert len(lines) == 5
    assert all(f"{line}\n" in adapters for line in lines)


def test_the_table_names_versions_of_the_tests_and_files_that_exist() -> None:
    pinned = dict(
        re.findall(r"^([\w.-]+)==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| .* \| (.*) \|$", _section("What was tried"), re.MULTILINE)
    assert len(rows) == 12
    for client, version, files in rows:
        # The others are not in the extra "dev"; the script names the versions that it ran with.
        if client not in ("wandb", "trackio", "ipykernel"):
            assert version == pinned[client], client
        assert all((ROOT / file).is_file() for file in re.findall(r"`([^`]+)`", files)), files
