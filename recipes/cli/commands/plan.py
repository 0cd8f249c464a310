"""The command `sparsort plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.recipes.cli.options import Fields, JsonOption, generated
from sparsort.recipes.plan import PlanOptions, make_plan, named_paths
from sparsort.scoring.prompts.spec import DataSpec
from sparsort.terminal.printing import show, show_json
from sparsort.terminal.tables import terminal_width

EXAMPLE = (
    "Example: `sparsort score examples/graded.jsonl --scorer column --column steps --out scores`, then "
    "`sparsort plan scores --data examples/graded.jsonl --batch-size 8 --stages 4 --show-groups kind --draw plan.png`"
)


@generated
def plan(
    scores: Annotated[
        list[str], typer.Argument(help="Score folders or files, as PATH or NAME=PATH; several are combined.")
    ],
    curriculum: Annotated[dict[str, Any], Fields(of=CurriculumSettings, given=True)],
    options: PlanOptions,
    rows: DataSpec,
    as_json: JsonOption = False,
) -> None:
    """Plan the batches of a training run from SCORES, and show what the batches contain before you train on them."""
    from sparsort.curriculum.loading.inspect.description import describe

    planned = make_plan(
        named_paths(scores), settings=CurriculumSettings.from_json(curriculum), options=options, rows=rows
    )
    if as_json:
        show_json(planned.to_json())
        return
    show(describe(planned.summary, width=terminal_width()), most=None)
    if options.out is not None:
        show(f"Plan: {options.out}")
    if options.draw is not None:
        show(f"Figure: {options.draw}")
    if options.export is not None:
        show(f"Rows in training order: {options.export}")
