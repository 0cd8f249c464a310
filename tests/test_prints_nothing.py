"""A call of the library prints nothing: what it has to say goes to the logger "sparsort", at a level that fits."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run

_CALLS = """
import json, sys
from pathlib import Path
import sparsort

folder, model = Path(sys.argv[1]), sys.argv[2]
rows = [{"id": f"r{n}", "text": f"film {n} " * (1 + n % 3), "label": ("good", "bad")[n % 2]} for n in range(24)]
broken = [*rows[:-1], {"id": "none", "text": None, "label": "bad"}]
doubled = [*rows, {"id": "again", "text": rows[0]["text"], "label": "good"}]

scores = sparsort.SparsityScorer(model).score(broken, "Film: {text}", out=folder / "scores")
sparsort.SparsityScorer(model).score(broken, "Film: {text}", out=folder / "scores")
sparsort.LossScorer(model).score(rows, "Film: {text}", answer=" {label}")
lengths = sparsort.LengthScorer("characters").score(rows, "{text}")
demos = sparsort.select_demos(doubled, None, 4, method="random").demos
ordered = sparsort.order_demos(demos, order="length_ascending")
sparsort.build_prompt(ordered, "film 9", prompt="Film: {text}\\nMark:", answer=" {label}")
plan = sparsort.plan_curriculum(lengths, data=rows, batch_size=4, stages=2, out=folder / "plan")
list(sparsort.CurriculumLoader(plan, rows))
classifier = sparsort.FewShotClassifier(model, k=2, prompt="Film: {text}\\nMark:").fit(rows, [row["label"] for row in rows])
classifier.predict(rows[:4])
sparsort.SparsityFeatures(model, prompt="Film: {text}").fit_transform(rows)
(folder / "films.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
task = {"name": "films", "prompt": "Film: {text}\\nMark:", "answer": " {label}", "train": str(folder / "films.jsonl")}
recipe = {"tasks": [{**task, "labels": {"good": "good", "bad": "bad"}}], "model": model, "shots": (2,), "sets": 2}
sparsort.ablate(recipe, out=folder / "ablation", orderers=("random_scores",), choosers=(), dev_rows=2)
from sparsort.recipes.train.train import train
train(rows, "{text}", out=folder / "run", curriculum={"schedule": "shuffle"}, max_steps=2)
"""


@pytest.mark.filterwarnings("error")
def test_the_main_functions_print_nothing(tmp_path: Path, make_tiny_model: Callable[..., Path]) -> None:
    # In a process of its own, in which no handler of pytest takes the log records, and with the output of every library.
    command = [sys.executable, "-P", "-W", "ignore", "-c", _CALLS, tmp_path, make_tiny_model("llama")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "a"}\n', encoding="utf-8")
    return path


def _stderr(*options: str, file: Path) -> str:
    result = run(*options, "score", file, "--prompt", "{text}", "--scorer", "compression", "--json")
    return str(result.stderr)


def test_the_command_line_shows_as_much_as_was_requested(rows: Path) -> None:
    assert _stderr(file=rows) == _stderr("--quiet", file=rows) == ""
    assert _stderr("--verbose", file=rows) == f"scoring 2 rows of {rows}\n"
    assert _stderr("-vv", file=rows).splitlines()[1:] == ["scored a shard of 2 rows: {'ok': 2}"]
    assert "exclude each other" in run("-q", "-v", "env", code=2).stderr


def test_the_command_line_leaves_the_logger_as_it_was(rows: Path) -> None:
    logger = logging.getLogger("sparsort")
    before: Any = (logger.level, list(logger.handlers))
    _stderr("--verbose", file=rows)
    assert (logger.level, logger.handlers) == before
