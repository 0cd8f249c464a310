"""All of sparsort in one offline run: score, order, assemble, and check whether the score carries difficulty here.

    python examples/demo.py

It scores the graded questions in this folder with the embedded model, orders eight of them as demonstrations for a query,
prints the table and the prompt, and draws the scores against the known number of reasoning steps. The scores are stored in
`out/demo/scores`, so a second run only reads them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import sparsort
from sparsort.scoring.calibration.correlation import Correlation, spearman

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "demo"
PROMPT = "Question: {question}\nAnswer:"
ANSWER = " {answer}"
QUERY = {"question": "A baker has 14 rolls, sells 6 of them and then bakes 9 more. How many rolls are there now?"}


def main() -> None:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    file = HERE / "graded.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    scorer = sparsort.SparsityScorer("demo", site="pre_norm", pooling="last", metric="gini")
    scores = scorer.score(file, PROMPT, out=OUT / "scores")

    demos = sparsort.select_demos(rows, QUERY, 8, method="random", seed=0, prompt=PROMPT).demos
    ordered = sparsort.order_demos(demos, scores, order="sparse_to_dense")
    text = sparsort.build_prompt(
        ordered, QUERY, prompt=PROMPT, answer=ANSWER, max_tokens=1024, tokenizer=scorer.loaded.tokenizer
    )

    console.print(_table(ordered, scores.difficulty_of(ordered)))
    console.print(text)
    console.print()

    steps = np.array([row["steps"] for row in rows])
    plain = spearman(scores.difficulty, steps)
    length_fixed = spearman(scores.difficulty, steps, fixed=scores.column("n_tokens"))
    picture = _draw(scores.difficulty, steps, plain, OUT / "difficulty.png")
    console.print(f"Picture: {picture}")
    console.print(_verdict(plain, length_fixed))
    console.print(_reviews(scorer))


def _reviews(scorer: sparsort.SparsityScorer) -> str:
    """Report whether sparsity differs between the labels of the reviews, which it should not."""
    file = HERE / "reviews.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scores = scorer.score(file, "Review: {text}\nLabel:", out=OUT / "review-scores")
    positive = [row["label"] == "positive" for row in rows]
    correlation = spearman(scores.difficulty, positive, fixed=scores.column("n_tokens"))
    verdict = "differs between" if correlation.excludes_zero else "does not distinguish"
    return f"On {len(rows)} labelled reviews, sparsity {verdict} the two labels ({correlation} with length held fixed)."


def _table(ordered: list[dict[str, Any]], difficulty: np.ndarray) -> Table:
    table = Table(title="Eight demonstrations, sparse to dense", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("place", "id", "steps", "sparsity (Gini)", "question"):
        table.add_column(name, justify="left" if name in ("id", "question") else "right", no_wrap=True)
    for place, (row, value) in enumerate(zip(ordered, difficulty, strict=True), 1):
        table.add_row(str(place), row["id"], str(row["steps"]), f"{value:.4f}", row["question"][:38] + "…")
    return table


def _verdict(plain: Correlation, length_fixed: Correlation) -> str:
    numbers = f"Spearman {plain}, {length_fixed} with length held fixed, 95 % intervals, n = {plain.n}"
    if plain.low > 0 and length_fixed.low > 0:
        verdict = "the score carried difficulty: questions with more steps have sparser states"
    elif plain.high < 0 and length_fixed.high < 0:
        verdict = "the score carried difficulty in the opposite direction: questions with more steps have denser states"
    elif length_fixed.excludes_zero:
        verdict = "the score carried difficulty only with length held fixed"
    elif plain.excludes_zero:
        verdict = "the score carried length only: with length held fixed, the correlation with steps disappears"
    else:
        verdict = "the score did not carry difficulty"
    return f"Here {verdict} ({numbers})."


def _draw(difficulty: np.ndarray, steps: np.ndarray, correlation: Correlation, path: Path) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from sparsort.storage.files import write_atomically

    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.scatter(
        steps + rng.uniform(-0.16, 0.16, len(steps)),
        difficulty,
        s=14,
        alpha=0.45,
        color="#4477aa",
        linewidths=0,
        label="one question",
    )
    levels = np.unique(steps)
    axes.plot(
        levels, [np.median(difficulty[steps == level]) for level in levels], "o-", color="#aa3377", label="median"
    )
    axes.set_xlabel("reasoning steps (known)")
    axes.set_ylabel("sparsity of the last state (Gini)")
    axes.set_title(f"Sparsity against known difficulty: {correlation}", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    try:
        main()
    except sparsort.SparsortError as error:
        sys.exit(f"demo: {error}")
