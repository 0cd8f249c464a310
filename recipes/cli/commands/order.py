"""The command `sparsort order`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsort.recipes.cli.options import Fields, JsonOption, generated
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.score.config import SCORER_PANEL, ScorerConfig
from sparsort.scoring.model.spec import MODEL_PANEL
from sparsort.terminal.printing import MOST_OF_PROMPT, note, show, show_json
from sparsort.terminal.tables import Table, number, text

if TYPE_CHECKING:
    from sparsort.recipes.order.order import OrderResult

EXAMPLE = "Example: `sparsort order demos.jsonl --query 'What is 2 + 3?' --order sparse_to_dense`"


@generated
def order(
    *,
    file: Annotated[Path, typer.Argument(help="Demonstrations, or the pool to select them from.")],
    query: Annotated[
        str, typer.Option("--query", "-q", help="The query: its text, or a JSON object with the prompt's columns.")
    ],
    config: OrderConfig,
    scores: Annotated[
        Path | None,
        typer.Option(help="Scores made by 'sparsort score' [default: score now].", rich_help_panel=SCORER_PANEL),
    ] = None,
    # The seed is that of the selection and the order.
    scorer: Annotated[ScorerConfig, Fields(of=ScorerConfig, without=("seed",))],
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache", help="Read every row, and keep nothing for the next call.", rich_help_panel=MODEL_PANEL
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the prompt to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Select demonstrations for a query, order them, and print the prompt."""
    from sparsort.recipes.order.order import order_file
    from sparsort.scoring.store.row_cache import RowCache, is_enabled

    if scorer.draws:
        scorer = dataclasses.replace(scorer, seed=config.seed)
    rows = RowCache() if not no_cache and is_enabled() else None
    result = order_file(file, query=query, config=config, scorer=scorer, scores=scores, cache=rows)
    if out is not None:
        from sparsort.storage.files import write_atomically

        with write_atomically(out) as temporary:
            temporary.write_text(result.prompt, encoding="utf-8")
    if as_json:
        show_json(result.summary() | {"out": str(out) if out else None})
    else:
        _show(result)


def _show(result: OrderResult) -> None:
    drops = not all(demo["kept"] for demo in result.demonstrations)
    ranks = any(demo["difficulty"] is not None for demo in result.demonstrations)
    columns = [
        number("place"),
        text("id"),
        *([number("difficulty")] if ranks else []),
        *([text("kept")] if drops else []),
    ]
    table = Table(*columns, text("demonstration"), title=f"{result.order}, first to last")
    for place, demo in enumerate(result.demonstrations, 1):
        difficulty = ["" if demo["difficulty"] is None else f"{demo['difficulty']:.4f}"] if ranks else []
        kept = ["yes" if demo["kept"] else "dropped"] if drops else []
        table.add_row(str(place), demo["id"], *difficulty, *kept, demo["excerpt"])
    table.show()
    for sentence in result.notes:
        note(sentence)
    if result.cache and any(result.cache.values()):
        count, total = result.cache["from_cache"], sum(result.cache.values())
        note(
            f"{count} of {total} readings of rows came from the cache." + (" --no-cache repeats them." if count else "")
        )
    show(result.prompt, most=MOST_OF_PROMPT)
