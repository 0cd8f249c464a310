"""What the commands share: the options that more than one of them has, and how they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

TEXT_PANEL = "Text"
SCORER_PANEL = "Scorer"
MODEL_PANEL = "Model"

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Hub id, folder, .gguf file, or 'demo'.", rich_help_panel=MODEL_PANEL)
]
DtypeOption = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.", rich_help_panel=MODEL_PANEL)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …", rich_help_panel=MODEL_PANEL)]
RevisionOption = Annotated[str | None, typer.Option(help="Hub revision.", rich_help_panel=MODEL_PANEL)]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that ships with the model.", rich_help_panel=MODEL_PANEL)
]
BudgetOption = Annotated[
    int | None, typer.Option(help="Tokens of one batch. Changes speed only.", rich_help_panel=MODEL_PANEL)
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help=r"Format string over the columns; \n and \t are read as newline and tab.",
        rich_help_panel=TEXT_PANEL,
    ),
]
AnswerOption = Annotated[
    str | None,
    typer.Option("--answer", "-a", help="Format string of the answer behind the prompt.", rich_help_panel=TEXT_PANEL),
]
MessagesOption = Annotated[
    str | None,
    typer.Option(
        help="Column of whole conversations (ShareGPT, OpenAI, TRL) instead of --prompt; the last assistant turn is the answer.",
        rich_help_panel=TEXT_PANEL,
    ),
]
SystemOption = Annotated[str | None, typer.Option(help="System turn; with --chat.", rich_help_panel=TEXT_PANEL)]
ChatOption = Annotated[bool, typer.Option("--chat", help="Use the model's chat template.", rich_help_panel=TEXT_PANEL)]
IdOption = Annotated[
    str | None,
    typer.Option(
        "--id-column", help="Column that identifies a row [default: id, else the position].", rich_help_panel=TEXT_PANEL
    ),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="Comma-separated names of the columns of a .csv or .tsv file without a header.",
        rich_help_panel=TEXT_PANEL,
    ),
]
ScorerOption = Annotated[
    str,
    typer.Option(
        help="sparsity, answer_loss, prompt_loss, entropy, length, compression, random or column.",
        rich_help_panel=SCORER_PANEL,
    ),
]
SiteOption = Annotated[
    str, typer.Option(help="pre_norm, post_norm, mlp, mlp:N or layer:N.", rich_help_panel=SCORER_PANEL)
]
PoolingOption = Annotated[
    str, typer.Option(help="last, mean_metric, mean_state or answer.", rich_help_panel=SCORER_PANEL)
]
MetricOption = Annotated[str, typer.Option(help="Metric behind the difficulty.", rich_help_panel=SCORER_PANEL)]
OutliersOption = Annotated[str, typer.Option(help="none, drop:n or rms.", rich_help_panel=SCORER_PANEL)]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="File of 'sparsort calibrate', which decides the score.", rich_help_panel=SCORER_PANEL),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class CheckedCommand(TyperCommand):
    """A command that refuses options without an effect before it does anything."""

    def invoke(self, ctx: Any) -> Any:
        from sparsort.recipes.option_conditions import check

        check(ctx)
        return super().invoke(ctx)


# Columns that stand to the right.
_NUMBERS = frozenset(
    (
        "rank",
        "place",
        "difficulty",
        "tokens",
        "k",
        "sets",
        "pairs",
        "longest prompt",
        "accuracy",
        "Δ random",
        "p (Holm)",
    )
)


def table(*columns: str, title: str | None = None) -> Any:
    """A plain table; columns of numbers stand to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in columns:
        made.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    return made


def console() -> Any:
    """stdout, without markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def names_in(text: str | None) -> tuple[str, ...] | None:
    """The names of a comma-separated list, without spaces around them; None for None."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def unescape(text: str | None) -> str | None:
    r"""Read \n, \t and \\ as a shell user means them."""
    if text is None:
        return None
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)
