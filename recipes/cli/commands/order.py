"""The command `sparsort order`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsort.options import option
from sparsort.recipes.cli.options import ExportOptions, Fields, JsonOption, generated
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.score.config import SCORER_PANEL, ScorerConfig
from sparsort.scoring.model.spec import MODEL_PANEL
from sparsort.terminal.printing import MOST_OF_PROMPT, note, show, show_json
from sparsort.terminal.tables import Table, number, text

if TYPE_CHECKING:
    from sparsort.recipes.order.order import OrderResult

EXAMPLE = "Example: `sparsort order demos.jsonl --query 'What is 2 + 3?' --order sparse_to_dense`"


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """The options of `sparsort order` besides those of `OrderConfig` and the scorer."""

    query: str = option(
        dataclasses.MISSING, "The query: its text, or a JSON object with the prompt's columns.", short="-q"
    )
    scores: Path | None = option(
        None, "Scores made by 'sparsort score' [default: score the rows now].", panel=SCORER_PANEL
    )
    no_cache: bool = option(False, "Read every row, and keep nothing for the next call.", panel=MODEL_PANEL)
    out: Path | None = option(None, "Write the prompt to this file.", short="-o")


@generated
def order(
    file: Annotated[Path, typer.Argument(help="Demonstrations, or the pool to select them from.")],
    options: OrderOptions,
    export: ExportOptions,
    config: OrderConfig,
    # The seed of the scorer is that of the selection and the order.
    scorer: Annotated[ScorerConfig, Fields(of=ScorerConfig, without=("seed",))],
    as_json: JsonOption = False,
) -> None:
    """Select demonstrations for a query, order them, and print the prompt."""
    from sparsort.recipes.order.order import order_file
    from sparsort.scoring.store.row_cache import RowCache, is_enabled

    if scorer.draws:
        scorer = dataclasses.replace(scorer, seed=config.seed)
    cache = RowCache() if not options.no_cache and is_enabled() else None
    result = order_file(
        file,
        query=options.query,
        config=config,
        scorer=scorer,
        scores=options.scores,
        cache=cache,
        export=export.export,
        export_format=export.format,
    )
    if options.out is not None:
        from sparsort.storage.files import write_atomically

        with write_atomically(options.out) as temporary:
            temporary.write_text(result.prompt, encoding="utf-8")
    if as_json:
        show_json(result.summary() | {"out": str(options.out) if options.out else None} | export.to_json())
    else:
        _show(result)
        export.show()


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
