"""The whole of sparsort in one run, offline: score, order, assemble, and ask whether the score carried difficulty here.

    python examples/demo.py

Scores the graded questions beside this file with the embedded model, orders eight of them as demonstrations for a query,
prints the table and the prompt, and draws the scores against the known number of reasoning steps. The scores stay in
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
    found = spearman(scores.difficulty, steps)
    beside_length = spearman(scores.difficulty, steps, fixed=scores.column("n_tokens"))
    picture = _draw(scores.difficulty, steps, found, OUT / "difficulty.png")
    console.print(f"Picture: {picture}")
    console.print(_verdict(found, beside_length))
    console.print(_reviews(scorer))


def _reviews(scorer: sparsort.SparsityScorer) -> str:
    """The labelled reviews: here sparsity should not know the answer, and the sentence says whether it does."""
    file = HERE / "reviews.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scores = scorer.score(file, "Review: {text}\nLabel:", out=OUT / "review-scores")
    positive = [row["label"] == "positive" for row in rows]
    found = spearman(scores.difficulty, positive, fixed=scores.column("n_tokens"))
    verdict = "differs between" if found.excludes_zero else "does not tell apart"
    return f"On {len(rows)} labelled reviews sparsity {verdict} the two labels ({found} with length held fixed)."


def _table(ordered: list[dict[str, Any]], difficulty: np.ndarray) -> Table:
    table = Table(title="Eight demonstrations, sparse to dense", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("place", "id", "steps", "sparsity (Gini)", "question"):
        table.add_column(name, justify="left" if name in ("id", "question") else "right", no_wrap=True)
    for place, (row, value) in enumerate(zip(ordered, difficulty, strict=True), 1):
        table.add_row(str(place), row["id"], str(row["steps"]), f"{value:.4f}", row["question"][:38] + "…")
    return table


def _verdict(found: Correlation, beside_length: Correlation) -> str:
    numbers = f"Spearman {found}, {beside_length} with length held fixed, 95 % intervals, n = {found.n}"
    if found.low > 0 and beside_length.low > 0:
        said = "the score carried difficulty: sparser states belong to questions of more steps"
    elif found.high < 0 and beside_length.high < 0:
        said = "the score carried difficulty the other way round: denser states belong to questions of more steps"
    elif beside_length.excludes_zero:
        said = "the score carried difficulty only with length held fixed"
    elif found.excludes_zero:
        said = "the score carried length only: the correlation with steps goes when length is held fixed"
    else:
        said = "the score did not carry difficulty"
    return f"Here {said} ({numbers})."


def _draw(difficulty: np.ndarray, steps: np.ndarray, found: Correlation, path: Path) -> Path:
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
    axes.set_title(f"Sparsity against known difficulty: {found}", fontsize=10)
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
