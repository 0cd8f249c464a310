"""The examples of docs/adapters.md run unchanged, and print what the page shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"
_BLOCK = re.compile(r"(?:`(?P<name>[\w./]+)`\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


def _blocks(section: str) -> list[re.Match[str]]:
    """The fenced blocks of a section, each with the file name above it."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return list(_BLOCK.finditer(text))


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", *command],
        cwd=folder,
        env={
            **os.environ,
            "DSPY_CACHEDIR": str(folder / "cache"),
            "HF_DATASETS_CACHE": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("section", "package"), [("LangChain", "langchain_core"), ("DSPy", "dspy")])
def test_a_program_prints_what_the_page_says(section: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    program, printed = _blocks(section)
    (tmp_path / program["name"]).write_text(program["text"], encoding="utf-8")
    assert _run(tmp_path, program["name"]) == printed["text"]


def test_the_harnesss_command_sends_the_prompt_that_the_page_describes(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    *files, command = _blocks("lm-evaluation-harness")
    for block in files:
        (tmp_path / block["name"]).parent.mkdir(exist_ok=True)
        (tmp_path / block["name"]).write_text(block["text"], encoding="utf-8")
    program, *arguments = command["text"].split()
    assert program == "lm_eval"
    _run(tmp_path, "-m", "lm_eval", *arguments)
    [samples] = (tmp_path / "results").glob("*/samples_capitals_*.jsonl")
    [line] = samples.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["arguments"]["gen_args_0"]["arg_0"] == (
        "Question: Which town does Bhutan have its government in?\nAnswer: Thimphu\n\n"
        "Question: What is the capital of France?\nAnswer: Paris\n\n"
        "Question: Which city rules Peru?\nAnswer:"
    )
