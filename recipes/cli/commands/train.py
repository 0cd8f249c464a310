"""The command `sparsort train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsort.options import unescape
from sparsort.recipes.cli.options import Fields, JsonOption, generated
from sparsort.recipes.cli.options_curriculum import GroupsOption, TrainedCurriculum
from sparsort.recipes.train.config import CURRICULUM_PANEL, TRAINING_PANEL, TrainConfig
from sparsort.scoring.prompts.spec import TEXT_PANEL, DataSpec
from sparsort.terminal.printing import note, show, show_json
from sparsort.terminal.tables import Table, prose

if TYPE_CHECKING:
    from sparsort.recipes.train.train import TrainResult

_SPARSE = "Sparse attention"
EXAMPLE = (
    r"Example: `sparsort train data.jsonl --text '{question}\n{answer}' --scores scores/ --stages 10 --out run/`"
    "\n\n"
    r"Sparse: `sparsort train examples/graded.jsonl --text '{question}\n{answer}' --recipe sparse --schedule shuffle --out run/`"
)


@generated
def train(
    file: Annotated[
        Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv, .parquet, or a saved datasets folder.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; run again to resume after a stop.")],
    *,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            "-t",
            help=r"Format string over the columns, such as '{question}\n{answer}'. An empty text is an error.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            help="Column of whole conversations (ShareGPT, OpenAI, TRL), instead of --text; every token is learnt.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan made by 'sparsort plan' of these rows.", rich_help_panel=CURRICULUM_PANEL)
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="Your name for the data, as given to 'sparsort plan', instead of comparing rows.",
            rich_help_panel=CURRICULUM_PANEL,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the rows with those of --plan.", rich_help_panel=CURRICULUM_PANEL)
    ] = True,
    scores: Annotated[
        Path | None,
        typer.Option(help="Scores made by 'sparsort score', to plan here.", rich_help_panel=CURRICULUM_PANEL),
    ] = None,
    curriculum: TrainedCurriculum,
    groups: GroupsOption = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="sparse, sparse_retrofit, sparse_moba, sparse_nsa, sparse_window, or a .toml file; options given win.",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    settings: Annotated[dict[str, Any], Fields(of=TrainConfig, given=True)],
    data: DataSpec,
    eval_data: Annotated[
        Path | None,
        typer.Option(help="File of held-out rows, instead of --eval-share.", rich_help_panel=TRAINING_PANEL),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a causal language model on FILE under a curriculum.

    Also in several processes: `torchrun --nproc-per-node 2 -m sparsort train …`, or `accelerate launch -m sparsort train …`.
    """
    from sparsort.recipes.train.train import train as run

    result = run(
        file,
        unescape(text),
        messages=messages,
        out=out,
        plan=plan,
        scores=scores,
        curriculum=curriculum,
        groups=groups,
        eval_data=eval_data,
        id_column=data.id_column,
        columns=data.columns,
        fingerprint=fingerprint,
        verify=verify,
        recipe=recipe,
        **settings,
    )
    _leave()
    # The other processes of a distributed run have the same result.
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        show_json(result.summary())
    else:
        _show(result)


def _leave() -> None:
    """Part from the other processes, which NCCL otherwise complains about."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _show(result: TrainResult) -> None:
    rows = Table(prose(""), prose("value"))
    for name in ("loss", "eval_loss"):
        value = getattr(result, name)
        rows.add_row(name.replace("eval_", "held-out "), "not there" if value is None else f"{value:.4f}")
    if result.sparse is not None:
        _add_sparse(rows, result.sparse)
    rows.add_row("steps", str(result.steps))
    rows.add_row("rows", f"{result.rows} trained on, {result.eval_rows} held out")
    rows.add_row("tokens", str(result.tokens))
    rows.add_row("parameters", str(result.parameters))
    rows.show()
    for sentence in result.notes:
        note(f"note: {sentence}")
    if result.resumed == result.steps:
        show("The run was finished before; this is its result.")
    elif result.resumed:
        show(f"Went on from step {result.resumed}.")
    show(f"Model: {result.model}\nLosses: {result.history}")


def _add_sparse(rows: Table, sparse: dict[str, float | None]) -> None:
    """What sparse attention came to, over the last tenth of the run."""
    if (kl := sparse["kl"]) is not None:
        rows.add_row("selector's loss (KL)", f"{kl:.4f}")
    chosen = {"attention mass caught": sparse["mass"], "block recall": sparse["recall"]}
    for name, value in chosen.items():
        rows.add_row(name, "no query had to choose" if value is None else f"{value:.3f}")
    if (saving := sparse["saving"]) is not None:
        told = f"{saving:.2f} times fewer than" if saving >= 1 else f"{1 / saving:.2f} times as many as"
        rows.add_row("attention FLOPs", f"{told} dense attention takes, by formula, with choosing")
