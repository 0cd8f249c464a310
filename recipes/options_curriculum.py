"""The options of a curriculum, which `sparsort plan` and `sparsort train` share. None stands for the setting's own default."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ORDER_PANEL = "Order"
BATCH_PANEL = "Batches"

ModeOption = Annotated[
    str | None,
    typer.Option(
        help="one_pass: each example once an epoch; pool: drawn from the available share [default: one_pass].",
        rich_help_panel=ORDER_PANEL,
    ),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option(
        help="sorted, folded, interleaved, shuffle or as_given [default: sorted].", rich_help_panel=ORDER_PANEL
    ),
]
DirectionOption = Annotated[
    str | None,
    typer.Option(help="easy_to_hard, hard_to_easy or random [default: easy_to_hard].", rich_help_panel=ORDER_PANEL),
]
PacingOption = Annotated[
    str | None,
    typer.Option(help="Share available over training, such as root:start=0.2,until=0.5.", rich_help_panel=ORDER_PANEL),
]
StagesOption = Annotated[
    int | None, typer.Option(help="Pieces of an epoch, shuffled within.", rich_help_panel=ORDER_PANEL)
]
FoldsOption = Annotated[
    int | None, typer.Option(help="Of folded and interleaved [default: 4].", rich_help_panel=ORDER_PANEL)
]
WarmUpOption = Annotated[
    float | None,
    typer.Option(help="After this share of an epoch the rest comes shuffled.", rich_help_panel=ORDER_PANEL),
]
LaterEpochsOption = Annotated[
    str | None,
    typer.Option(help="repeat the curriculum, or shuffle [default: repeat].", rich_help_panel=ORDER_PANEL),
]
UnscoredOption = Annotated[
    str | None,
    typer.Option(help="Rows without a score: last, first or error [default: last].", rich_help_panel=ORDER_PANEL),
]
GroupsOption = Annotated[
    str | None,
    typer.Option(help="Field of the data; each group's easiest come together.", rich_help_panel=ORDER_PANEL),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(help="Examples of a global batch: per device × accumulation × devices.", rich_help_panel=BATCH_PANEL),
]
TokenBudgetOption = Annotated[
    int | None,
    typer.Option(help="Instead: tokens of a global batch, padding included.", rich_help_panel=BATCH_PANEL),
]
PackingOption = Annotated[
    str | None,
    typer.Option(help="none, next_fit (keeps the order) or best_fit [default: none].", rich_help_panel=BATCH_PANEL),
]
PackLengthOption = Annotated[int | None, typer.Option(help="Tokens of a packed sequence.", rich_help_panel=BATCH_PANEL)]
GroupByLengthOption = Annotated[
    bool,
    typer.Option("--group-by-length", help="Like lengths share a batch, within a stage.", rich_help_panel=BATCH_PANEL),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, as settings of a curriculum."""
    return {name: value for name, value in options.items() if value is not None and value is not False}
