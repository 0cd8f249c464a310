"""FewShotClassifier against full prompts with random demonstrations, and against TF-IDF with logistic regression.

    python benchmarks/studies/classify/compare_classifiers.py --data FOLDER --out runs/classifiers --save

FOLDER holds icl/{trec,mr,sst5,rte,cb}.{train,dev_subsample}.jsonl. Every (task, seed) is kept in --out when it is done, so that
the same command resumes. With --save the numbers are written to benchmarks/results/classifier-comparison.json.

Planned before the first run (docs/design/data-and-classifier.md): the methods below with k = 8, `TEST_ROWS` rows of each
task's test file, drawn at random, seeds 0 and 1. Primary comparison: the default classifier minus full prompts, balanced
accuracy (the accuracy for queries with even label shares), mean over tasks, with an interval over (task, seed). A shifted task
has 80 % of one label. Its accuracy is the recall of the labels weighted by those shares, for the label whose excess hurts a
method most (its mean over the labels is balanced accuracy). All methods predict the same rows, each
row by itself, so the shares can be weighted afterwards.

Seconds are of fit and predict over the same rows in one process with one thread, the model loaded before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import machine
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sparsort.curriculum.ablation.recipe.tasks import Task, load_task
from sparsort.curriculum.ablation.statistics.estimates import estimate_sets
from sparsort.recipes.classify.classifier import FewShotClassifier
from sparsort.recipes.classify.labels import answer_reader
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.storage.files import write_json

TASKS = ("trec", "mr", "sst5", "rte", "cb")
SEEDS, K, TEST_ROWS, POOL_ROWS, MAJORITY = (0, 1), 8, 128, 2000, 0.8
SAVED = Path(__file__).parents[2] / "results" / "classifier-comparison.json"
FULL, DEFAULT = "full prompts, random demonstrations", "FewShotClassifier"

Row = dict[str, Any]
Ints = NDArray[np.int64]


class Data:
    """One task: training rows, test rows, and their labels."""

    def __init__(self, folder: Path, name: str, test_rows: int) -> None:
        self.task: Task = load_task(name)
        self.train, self.y = self._read(folder / str(self.task.train), POOL_ROWS)
        self.test, self.gold = self._read(folder / str(self.task.test), test_rows)
        assert self.task.labels is not None
        self.labels = list(self.task.labels)

    def _read(self, path: Path, most: int) -> tuple[list[Row], list[str]]:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # Some files are sorted by label.
        rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))[:most]]
        return [{key: row[key] for key in self.task.fields} for row in rows], [str(row["label"]) for row in rows]

    def text(self, row: Row) -> str:
        return " ".join(str(row[key]) for key in self.task.fields)


def few_shot(data: Data, seed: int, **settings: Any) -> tuple[list[str], int]:
    """Predictions of the classifier, and the tokens that it read."""
    classifier = FewShotClassifier(
        MODEL,
        k=K,
        prompt=PromptSpec.of(data.task.prompt, answer=data.task.answer),
        label_words=dict(data.task.labels or {}),
        random_state=seed,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        log_proba, tokens = classifier.fit(data.train, data.y).predict_with_cost(data.test)
    return classifier.classes_[log_proba.argmax(axis=1)].tolist(), classifier.tokens_read_ + tokens


def full_prompts(data: Data, seed: int) -> tuple[list[str], int]:
    """Every row has a prompt of its own with k random demonstrations, which is read whole."""
    generator, reader = np.random.default_rng(seed), READERS[0]
    answers, predicted, tokens = data.task.label_texts(), [], 0
    for row in data.test:
        shown = generator.choice(len(data.train), K, replace=False)
        demos = [data.task.demo_text({**data.train[at], "label": data.y[at]}) for at in shown]
        whole = data.task.separator.join([*demos, data.task.query_text(row)])
        read = reader.answers((), [whole], answers)
        predicted.append(data.labels[int(read.log_p[0].argmax())])
        tokens += read.tokens_read
    return predicted, tokens


def regression(data: Data, seed: int, rows: int | None) -> tuple[list[str], int]:
    """TF-IDF with logistic regression, on as many training rows, balanced by label, or on all."""
    places = np.arange(len(data.train))
    if rows is not None:
        generator, y = np.random.default_rng(seed), np.array(data.y)
        by_label = [generator.permutation(np.flatnonzero(y == label)) for label in data.labels]
        longest = max(map(len, by_label))
        turns = [own[turn] for turn in range(longest) for own in by_label if turn < len(own)]
        places = np.array(turns[:rows])
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000, C=10.0)
    )
    model.fit([data.text(data.train[at]) for at in places], [data.y[at] for at in places])
    return model.predict([data.text(row) for row in data.test]).tolist(), 0


METHODS: dict[str, Callable[[Data, int], tuple[list[str], int]]] = {
    FULL: full_prompts,
    DEFAULT: few_shot,
    "FewShotClassifier, calibration none": lambda data, seed: few_shot(data, seed, calibration="none"),
    "FewShotClassifier, calibration contextual": lambda data, seed: few_shot(data, seed, calibration="contextual"),
    "FewShotClassifier, prior pool": lambda data, seed: few_shot(data, seed, prior="pool"),
    "FewShotClassifier, 4 orders": lambda data, seed: few_shot(data, seed, n_orders=4),
    "TF-IDF + logistic regression, the same k": lambda data, seed: regression(data, seed, K),
    "TF-IDF + logistic regression, 72 rows": lambda data, seed: regression(data, seed, K + 64),
    "TF-IDF + logistic regression, whole pool": lambda data, seed: regression(data, seed, None),
}
MODEL = ModelSpec("demo")
READERS: list[AnswerReader] = []


def measure(data: Data, predicted: list[str]) -> dict[str, float]:
    """Accuracy, balanced accuracy, and the lowest accuracy with 80 % of one label, in percent."""
    right = np.array([a == b for a, b in zip(predicted, data.gold, strict=True)])
    gold = np.array(data.gold)
    present = [label for label in data.labels if (gold == label).any()]
    recall = np.array([right[gold == label].mean() for label in present])
    rest = (1 - MAJORITY) / (len(present) - 1)
    shifted = [MAJORITY * recall[at] + rest * (recall.sum() - recall[at]) for at in range(len(present))]
    return {
        "accuracy": 100 * float(right.mean()),
        "balanced_accuracy": 100 * float(recall.mean()),
        "worst_shifted_accuracy": 100 * float(min(shifted)),
    }


def run(data: Data, seed: int) -> dict[str, Any]:
    """All methods on one task with one seed."""
    results = {}
    for name, method in METHODS.items():
        started = time.perf_counter()
        predicted, tokens = method(data, seed)
        results[name] = {**measure(data, predicted), "seconds": time.perf_counter() - started, "tokens": tokens}
        print(f"{data.task.name} {seed} {name}: {results[name]}", file=sys.stderr, flush=True)
    return results


def interval(values: list[float]) -> list[float | None]:
    """Mean and 95 % interval over (task, seed)."""
    one = estimate_sets(np.array(values))
    return [round(value, 2) if np.isfinite(value) else None for value in (one.value, one.low, one.high)]


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By method: each measure, its difference to full prompts, seconds as a multiple of full prompts', tokens."""
    table: dict[str, Any] = {}
    for name in METHODS:
        own, full = [one[name] for one in runs.values()], [one[FULL] for one in runs.values()]
        table[name] = {
            measured: {
                "mean": interval([one[measured] for one in own]),
                "minus_full_prompts": interval([a[measured] - b[measured] for a, b in zip(own, full, strict=True)]),
                "by_task": {
                    task: round(
                        float(
                            np.mean(
                                [
                                    one[name][measured] - one[FULL][measured]
                                    for key, one in runs.items()
                                    if key.startswith(task)
                                ]
                            )
                        ),
                        2,
                    )
                    for task in TASKS
                },
            }
            for measured in ("accuracy", "balanced_accuracy", "worst_shifted_accuracy")
        }
        table[name]["times_as_fast"] = interval([b["seconds"] / a["seconds"] for a, b in zip(own, full, strict=True)])
        table[name]["tokens"] = int(np.mean([one["tokens"] for one in own]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with icl/*.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is done")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name} in benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # The classifier keeps the last model that it used, so that it is loaded once, before anything is timed.
    READERS.append(answer_reader(MODEL, chat=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, Any]] = {}
    for seed in SEEDS:
        for task in TASKS:
            done = arguments.out / f"{task}-{seed}.json"
            if not done.exists():
                write_json(done, run(Data(arguments.data, task, TEST_ROWS), seed))
            runs[f"{task}-{seed}"] = json.loads(done.read_text(encoding="utf-8"))
    whole = {
        "benchmark": "classifier_comparison",
        "protocol": {
            "tasks": TASKS,
            "seeds": SEEDS,
            "k": K,
            "test_rows": TEST_ROWS,
            "pool_rows": POOL_ROWS,
            "majority": MAJORITY,
        },
        "methods": summary(runs),
        "runs": runs,
        "machine": machine(torch.device("cpu")),
        "command": "python benchmarks/studies/classify/compare_classifiers.py --data FOLDER --out runs/classifiers --save",
    }
    print(json.dumps(whole["methods"], indent=1))
    if arguments.save:
        write_json(SAVED, whole)


if __name__ == "__main__":
    main()
