"""The cost of calibration: every site, pooling, metric and outlier rule in one pass, against one plain scoring pass.

    python benchmarks/speed/calibration.py [--quick] [--json] [--save] [--data FOLDER] [--model demo]

The plain pass is `SparsityScorer.score` with its defaults (one site, the last token, no outlier rule) over the same texts; both
include tokenising, planning and the table. `candidates_over_plain` reads only the prompts, and `…_with_answer` prompt and answer
on both sides. `own_loss_over_plain` also computes the model's own loss: it adds the head at every token of the answer, which no
plain scoring pass needs, and grows with the length of the answer and the size of the vocabulary. `statistics_seconds` is the
time after the pass, independent of the model: the comparison with two references, 1000 bootstrap draws and 999 permutations.

`--data` points to a folder with `math_300.jsonl` and `icl/trec.train.jsonl`; without it the examples of this repository are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options, compare, wall_seconds

import sparsort
from sparsort.kernels.backend import default_device
from sparsort.scoring.calibration.compare import compare as compare_candidates
from sparsort.scoring.loading.load import LoadedModel, load_model
from sparsort.scoring.scorers.candidates import CandidateScorer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """Rows with their templates; the runs that also read the answers use only `few` of them."""

    name: str
    rows: list[dict[str, Any]]
    prompt: str
    answer: str
    few: int


def tasks(data: Path | None, quick: bool) -> list[Task]:
    """The data sets that are calibrated."""
    if data is None:
        graded = _read(ROOT / "examples" / "graded.jsonl")
        found = [Task("graded", graded, "Question: {question}\nAnswer:", " {answer}", 120)]
    else:
        math, trec = _read(data / "math_300.jsonl"), _read(data / "icl" / "trec.train.jsonl")[:1000]
        found = [
            Task("math", math, "Problem: {problem}\nSolution:", " {solution}", 60),
            Task("trec", trec, "Question: {sentence}\nType:", " {label}", 500),
        ]
    return [Task(t.name, t.rows[:40], t.prompt, t.answer, 20) for t in found] if quick else found


def measure(report: Report, loaded: LoadedModel, task: Task, quick: bool) -> None:
    """Measure the ratios of one task."""
    rounds = 1 if quick else 3
    plain, every = sparsort.SparsityScorer(loaded), CandidateScorer(loaded)
    without_loss = CandidateScorer(loaded, own_loss=False)
    # An even sample of the rows, because reading the answers takes long.
    few = task.rows[:: max(1, len(task.rows) // task.few)][: task.few]
    answer = {"answer": task.answer}
    for name, scorer, rows, options, floor in (
        ("candidates_over_plain", every, task.rows, {}, 1.5),
        ("candidates_with_answer_over_plain", without_loss, few, answer, 1.5),
        ("own_loss_over_plain", every, few, answer, None),
    ):
        found = compare(
            lambda s=scorer, r=rows, o=options: s.score(r, task.prompt, **o),
            lambda r=rows, o=options: plain.score(r, task.prompt, **o),
            rounds,
        )
        scores = scorer.score(rows, task.prompt, **options)
        note = f"{found}, {len(rows)} rows, {len(scores.metrics)} columns, {found.baseline_s:.1f} against {found.ours_s:.1f} s"
        report.add(f"{task.name}_{name}", found.ratio, "x", floor=floor, better="lower", note=note)
    measure_statistics(report, every, task)


def measure_statistics(report: Report, scorer: CandidateScorer, task: Task) -> None:
    """Time the comparison after the pass, on random numbers in a table of the same shape: values do not change the time."""
    # 300 rows, whatever the size of the data, with new ids because ids must be unique.
    rows = [task.rows[number % len(task.rows)] for number in range(300)]
    table = scorer.score([{**row, "id": str(n)} for n, row in enumerate(rows)], task.prompt)
    rng = np.random.default_rng(0)
    references = {"level": rng.integers(1, 6, len(table)).astype(float), "other": rng.normal(size=len(table))}
    seconds = wall_seconds(lambda: compare_candidates(table, references))
    note = f"{len(table)} rows, {len(table.metrics)} candidates, 2 references and length"
    report.add(f"{task.name}_statistics_seconds", seconds, "s", better="lower", note=note)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with math_300.jsonl and icl/trec.train.jsonl")
    parser.add_argument("--model", default="demo")
    add_output_options(parser)
    arguments = parser.parse_args()
    report = Report("calibration" if arguments.data else "calibration-examples", default_device().value)
    loaded = load_model(arguments.model)
    for task in tasks(arguments.data, arguments.quick):
        measure(report, loaded, task, arguments.quick)
    report.finish(arguments)


if __name__ == "__main__":
    main()
