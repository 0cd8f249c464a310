"""The command `sparsort train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsort.recipes.options import MODEL_PANEL, TEXT_PANEL, ColumnsOption, IdOption, JsonOption, names_in, unescape
from sparsort.recipes.options_curriculum import (
    BatchSizeOption,
    DirectionOption,
    FoldsOption,
    GroupByLengthOption,
    GroupsOption,
    LaterEpochsOption,
    ModeOption,
    PacingOption,
    PackingOption,
    PackLengthOption,
    ScheduleOption,
    StagesOption,
    TokenBudgetOption,
    UnscoredOption,
    WarmUpOption,
    given,
)
from sparsort.terminal import note, show, show_json
from sparsort.terminal_tables import Table, prose

if TYPE_CHECKING:
    from sparsort.recipes.train import TrainResult

_CURRICULUM = "Curriculum"
_TRAINING = "Training"
_SPARSE = "Sparse attention"
EXAMPLE = (
    r"Example: `sparsort train data.jsonl --text '{question}\n{answer}' --scores scores/ --stages 10 --out run/`"
    "\n\n"
    r"Sparse: `sparsort train examples/graded.jsonl --text '{question}\n{answer}' --recipe sparse --schedule shuffle --out run/`"
)
_WORK = "How the work is divided"


def train(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv, .parquet, or a saved datasets folder.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; run again to resume after a stop.")],
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
        Path | None, typer.Option(help="Plan made by 'sparsort plan' of these rows.", rich_help_panel=_CURRICULUM)
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="Your name for the data, as given to 'sparsort plan', instead of comparing rows.",
            rich_help_panel=_CURRICULUM,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the rows with those of --plan.", rich_help_panel=_CURRICULUM)
    ] = True,
    scores: Annotated[
        Path | None,
        typer.Option(help="Scores made by 'sparsort score', to plan here.", rich_help_panel=_CURRICULUM),
    ] = None,
    schedule: ScheduleOption = None,
    mode: ModeOption = None,
    direction: DirectionOption = None,
    pacing: PacingOption = None,
    stages: StagesOption = None,
    folds: FoldsOption = None,
    warm_up: WarmUpOption = None,
    later_epochs: LaterEpochsOption = None,
    batch_size: BatchSizeOption = None,
    token_budget: TokenBudgetOption = None,
    packing: PackingOption = None,
    pack_length: PackLengthOption = None,
    group_by_length: GroupByLengthOption = False,
    unscored: UnscoredOption = None,
    groups: GroupsOption = None,
    online: Annotated[
        bool, typer.Option("--online", help="Learn the difficulty in training.", rich_help_panel=_CURRICULUM)
    ] = False,
    online_metric: Annotated[
        str, typer.Option(help="Sparsity metric of --online.", rich_help_panel=_CURRICULUM)
    ] = "hoyer",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="sparse, sparse_retrofit, sparse_moba, sparse_nsa, sparse_window, or a .toml file; options given win.",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="tiny or small (from scratch, over bytes), hub id, folder, .gguf file or 'demo'.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "tiny",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.", rich_help_panel=MODEL_PANEL)] = "auto",
    epochs: Annotated[int, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead.", rich_help_panel=_TRAINING)] = None,
    learning_rate: Annotated[float, typer.Option("--lr", help="Its peak.", rich_help_panel=_TRAINING)] = 5e-4,
    lr_schedule: Annotated[
        str, typer.Option(help="constant, linear, cosine or wsd.", rich_help_panel=_TRAINING)
    ] = "cosine",
    warmup_steps: Annotated[int, typer.Option(help="In which the learning rate rises.", rich_help_panel=_TRAINING)] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens at which a text is cut.", rich_help_panel=TEXT_PANEL)] = 1024,
    id_column: IdOption = None,
    columns: ColumnsOption = None,
    eval_share: Annotated[
        float | None,
        typer.Option(help="Share of the rows to hold out [default: 0.1, none with --plan].", rich_help_panel=_TRAINING),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="File of held-out rows, instead.", rich_help_panel=_TRAINING)
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between held-out losses [default: at the end].", rich_help_panel=_TRAINING)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of weights, dropout, held-out rows and plan.", rich_help_panel=_TRAINING)
    ] = 0,
    per_device_batch: Annotated[
        int | None,
        typer.Option(help="Examples a device sees at once [default: what fits, else 8].", rich_help_panel=_WORK),
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Micro-batches in a step.", rich_help_panel=_WORK)] = 1,
    workers: Annotated[int, typer.Option(help="Processes that load data.", rich_help_panel=_WORK)] = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_WORK)] = 500,
    report_to: Annotated[
        str, typer.Option(help="none, tensorboard, or another tracker of transformers.", rich_help_panel=_WORK)
    ] = "none",
    as_json: JsonOption = False,
) -> None:
    """Train a causal language model on FILE under a curriculum.

    Also in several processes: `torchrun --nproc-per-node 2 -m sparsort train …`, or `accelerate launch -m sparsort train …`.
    """
    from sparsort.recipes.train import train as run

    curriculum = given(
        schedule=schedule,
        mode=mode,
        direction=direction,
        pacing=pacing,
        stages=stages,
        folds=folds,
        warm_up=warm_up,
        later_epochs=later_epochs,
        batch_size=batch_size,
        token_budget=token_budget,
        packing=packing,
        pack_length=pack_length,
        group_by_length=group_by_length,
        unscored=unscored,
    )
    settings = _chosen(
        context,
        model=model,
        dtype=dtype,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        lr_schedule=lr_schedule,
        warmup_steps=warmup_steps,
        max_length=max_length,
        eval_share=eval_share,
        eval_steps=eval_steps,
        online=online,
        online_metric=online_metric,
        seed=seed,
        per_device_batch=per_device_batch,
        accumulate=accumulate,
        workers=workers,
        save_steps=save_steps,
        report_to=report_to,
    )
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
        id_column=id_column,
        columns=names_in(columns),
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


def _chosen(context: typer.Context, **options: Any) -> dict[str, Any]:
    """Those that were given on the command line; a recipe, or the configuration's own defaults, stand for the others."""
    return {
        name: value
        for name, value in options.items()
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    }


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
