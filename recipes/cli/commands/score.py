"""The command `sparsort score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsort.recipes.cli.options import JsonOption, generated
from sparsort.recipes.score.config import ScorerConfig
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.terminal.printing import note, show_json

EXAMPLE = r"Example: `sparsort score questions.jsonl --prompt 'Question: {question}\nAnswer:' --out scores/`"


@generated
def score(
    file: Annotated[
        Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv, .parquet, or a saved datasets folder.")
    ],
    prompt: PromptSpec,
    data: DataSpec,
    scorer: ScorerConfig,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the scores; run again to go on after a stop.")
    ] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows of one shard, the unit that is kept or redone.")] = 2048,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when a row has no score.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score every row of FILE: how hard it is for the model, by the sparsity of its last hidden state."""
    from sparsort.recipes.cli.score_table import show_scores
    from sparsort.recipes.score.score import score_file

    report = score_file(file, scorer=scorer, prompt=prompt, data=data, out=out, shard_rows=shard_rows)
    summary = report.summary()
    unscored = summary["rows"] - summary["status"].get("ok", 0)
    if as_json:
        show_json(summary)
    else:
        show_scores(report)
    if unscored:
        reasons = ", ".join(f"{count} {status}" for status, count in summary["status"].items() if status != "ok")
        note(
            f"{unscored} of {summary['rows']} rows have no score: {reasons}. Their reasons stand in the column 'reason'."
        )
        if strict:
            raise typer.Exit(3)
