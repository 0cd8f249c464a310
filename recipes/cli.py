"""The command line: `sparsort score`, `order`, `choose`, `calibrate`, `ablate`, `report`, `plan`, `train` and `env`.

Contract: results on stdout, progress and warnings on stderr; `--json` prints one object and nothing else. Exit codes: 0 done;
2 a mistake in the call or the input, told in one message; 3 done, but rows have no score and `--strict` was given;
130 interrupted, with the shards that are finished kept where there is a folder for them.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sparsort.errors import SparsortError
from sparsort.recipes.cli_ablate import ablate
from sparsort.recipes.cli_calibrate import calibrate
from sparsort.recipes.cli_choose import EXAMPLE as CHOOSE_EXAMPLE
from sparsort.recipes.cli_choose import choose
from sparsort.recipes.cli_plan import EXAMPLE as PLAN_EXAMPLE
from sparsort.recipes.cli_plan import plan
from sparsort.recipes.cli_report import report
from sparsort.recipes.cli_train import EXAMPLE as TRAIN_EXAMPLE
from sparsort.recipes.cli_train import train
from sparsort.recipes.options import (
    SCORER_PANEL,
    TEXT_PANEL,
    AnswerOption,
    BudgetOption,
    CalibrationOption,
    ChatOption,
    CheckedCommand,
    ColumnsOption,
    DeviceOption,
    DtypeOption,
    IdOption,
    JsonOption,
    MessagesOption,
    MetricOption,
    ModelOption,
    OutliersOption,
    PoolingOption,
    PromptOption,
    RevisionOption,
    ScorerOption,
    SiteOption,
    SystemOption,
    TrustOption,
    console,
    names_in,
    print_json,
    table,
    unescape,
)


class _Commands(TyperGroup):
    """Turns the errors that a user can mend, and an interrupt, into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SparsortError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted. Run the same command again; with --out it goes on behind what was finished.", 130)
        except BrokenPipeError:
            # The reader of our output went away (`| head`); nothing is left to say to it.
            sys.stderr.close()
            sys.exit(0)


app = typer.Typer(
    name="sparsort",
    cls=_Commands,
    help="Rank examples by how sparsely a language model represents them, and order prompts and data by that rank.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import sparsort

        typer.echo(f"sparsort {sparsort.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rank examples by how sparsely a language model represents them, and order prompts and data by that rank."""


@app.command(
    cls=CheckedCommand,
    epilog=r"Example: `sparsort score questions.jsonl --prompt 'Question: {question}\nAnswer:' --out scores/`",
)
def score(
    file: Annotated[
        Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv, .parquet, or a saved datasets folder.")
    ],
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    messages: MessagesOption = None,
    system: SystemOption = None,
    chat: ChatOption = False,
    truncation: Annotated[
        str,
        typer.Option(help="error, left or right: what happens to a text over the limit.", rich_help_panel=TEXT_PANEL),
    ] = "error",
    max_length: Annotated[
        int | None, typer.Option(help="Limit in tokens [default: the model's context].", rich_help_panel=TEXT_PANEL)
    ] = None,
    id_column: IdOption = None,
    columns: ColumnsOption = None,
    scorer: ScorerOption = "sparsity",
    site: SiteOption = "pre_norm",
    pooling: PoolingOption = "last",
    metric: MetricOption = "gini",
    outliers: OutliersOption = "none",
    calibration: CalibrationOption = None,
    l0_threshold: Annotated[float, typer.Option(help="Threshold of l0_absolute.", rich_help_panel=SCORER_PANEL)] = 1.0,
    column: Annotated[
        str | None, typer.Option(help="Numeric column, for the scorer 'column'.", rich_help_panel=SCORER_PANEL)
    ] = None,
    descending: Annotated[
        bool, typer.Option("--descending", help="The column falls with difficulty.", rich_help_panel=SCORER_PANEL)
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the scorer 'random'.", rich_help_panel=SCORER_PANEL)] = 0,
    model: ModelOption = "demo",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    token_budget: BudgetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the scores; run again to go on after a stop.")
    ] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows of one shard, the unit that is kept or redone.")] = 2048,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when a row has no score.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score every row of FILE: how hard it is for the model, by the sparsity of its last hidden state."""
    from sparsort.recipes.score import ScorerConfig, TextConfig, score_file

    config = ScorerConfig(
        scorer=scorer,
        model=model,
        site=site,
        pooling=pooling,
        metric=metric,
        outliers=outliers,
        calibration=calibration,
        l0_threshold=l0_threshold,
        column=column,
        descending=descending,
        seed=seed,
        dtype=dtype,
        device=device,
        token_budget=token_budget,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    text = TextConfig(
        prompt=unescape(prompt),
        answer=unescape(answer),
        messages=messages,
        system=unescape(system),
        chat=chat,
        truncation=truncation,
        max_length=max_length,
        id_column=id_column,
        columns=names_in(columns),
    )
    report = score_file(file, scorer=config, text=text, out=out, shard_rows=shard_rows)
    summary = report.summary()
    unscored = summary["rows"] - summary["status"].get("ok", 0)
    if as_json:
        print_json(summary)
    else:
        _print_scores(report.scores, summary)
    if unscored:
        reasons = ", ".join(f"{count} {status}" for status, count in summary["status"].items() if status != "ok")
        typer.echo(
            f"{unscored} of {summary['rows']} rows have no score: {reasons}. Their reasons stand in the column 'reason'.",
            err=True,
        )
        if strict:
            raise typer.Exit(3)


@app.command(
    cls=CheckedCommand, epilog="Example: `sparsort order demos.jsonl --query 'What is 2 + 3?' --order sparse_to_dense`"
)
def order(
    file: Annotated[Path, typer.Argument(help="Demonstrations, or the pool to select them from.")],
    query: Annotated[
        str, typer.Option("--query", "-q", help="The query: its text, or a JSON object with the prompt's columns.")
    ],
    prompt: PromptOption = None,
    answer: AnswerOption = None,
    messages: MessagesOption = None,
    system: SystemOption = None,
    chat: ChatOption = False,
    id_column: IdOption = None,
    columns: ColumnsOption = None,
    k: Annotated[
        int | None, typer.Option("-k", "--shots", help="Demonstrations to select [default: all of FILE, up to 64].")
    ] = None,
    select: Annotated[
        str,
        typer.Option(help="random, first, ids, balanced, bm25, knn, mmr, kdpp, vote_k, spread or difficulty_matched."),
    ] = "random",
    ids: Annotated[str | None, typer.Option(help="Comma-separated ids, for --select ids.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column, for --select balanced.")] = None,
    order: Annotated[
        str | None,
        typer.Option(
            "--order",
            help="sparse_to_dense, dense_to_sparse, easy_to_hard, …, or reverse:<order> "
            "[default: the hardest first: sparse_to_dense by sparsity, hard_to_easy by any other score].",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Scores made by 'sparsort score' [default: score now].", rich_help_panel=SCORER_PANEL),
    ] = None,
    scorer: ScorerOption = "sparsity",
    site: SiteOption = "pre_norm",
    pooling: PoolingOption = "last",
    metric: MetricOption = "gini",
    outliers: OutliersOption = "none",
    calibration: CalibrationOption = None,
    column: Annotated[
        str | None, typer.Option(help="Numeric column, for the scorer 'column'.", rich_help_panel=SCORER_PANEL)
    ] = None,
    l0_threshold: Annotated[float, typer.Option(help="Threshold of l0_absolute.", rich_help_panel=SCORER_PANEL)] = 1.0,
    descending: Annotated[
        bool, typer.Option("--descending", help="The column falls with difficulty.", rich_help_panel=SCORER_PANEL)
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget of the whole prompt.")] = None,
    drop: Annotated[str, typer.Option(help="What a budget drops: farthest, nearest, longest or error.")] = "farthest",
    separator: Annotated[str, typer.Option(help=r"Between demonstrations.")] = r"\n\n",
    missing: Annotated[
        str, typer.Option(help="What happens to a demonstration without a score: error, first, last or drop.")
    ] = "error",
    embedder: Annotated[
        str | None, typer.Option(help="Sentence embedder for knn and the like [default: the model's own states].")
    ] = None,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Allow the query among its own demonstrations.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random selection and order.")] = 0,
    model: ModelOption = "demo",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the prompt to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Select demonstrations for a query, order them, and print the prompt."""
    from sparsort.recipes.order_demos import OrderConfig, order_file
    from sparsort.recipes.score import ScorerConfig

    config = OrderConfig(
        select=select,
        k=k,
        ids=tuple(part.strip() for part in ids.split(",")) if ids else None,
        label=label,
        order=order,
        max_tokens=max_tokens,
        drop=drop,
        missing=missing,
        embedder=embedder,
        separator=unescape(separator) or "",
        allow_leaks=allow_leaks,
        seed=seed,
        prompt=unescape(prompt),
        answer=unescape(answer),
        messages=messages,
        system=unescape(system),
        chat=chat,
        id_column=id_column,
        columns=names_in(columns),
    )
    scoring = ScorerConfig(
        scorer=scorer,
        model=model,
        site=site,
        pooling=pooling,
        metric=metric,
        outliers=outliers,
        calibration=calibration,
        l0_threshold=l0_threshold,
        column=column,
        descending=descending,
        # The seed is of the selection and the order too.
        seed=seed if scorer == "random" else 0,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    result = order_file(file, query=query, config=config, scorer=scoring, scores=scores)
    if out is not None:
        from sparsort.files import write_atomically

        with write_atomically(out) as temporary:
            temporary.write_text(result.prompt, encoding="utf-8")
    if as_json:
        print_json(result.summary() | {"out": str(out) if out else None})
    else:
        _print_order(result)


app.command(cls=CheckedCommand, epilog=CHOOSE_EXAMPLE)(choose)
app.command(
    cls=CheckedCommand,
    epilog=r"Example: `sparsort ablate reviews.jsonl -p 'Review: {text}\nSentiment:' --label label -k 4 --out my-ablation`",
)(ablate)
app.command(cls=CheckedCommand, epilog="Example: `sparsort report my-ablation --figures figures`")(report)
app.command(cls=CheckedCommand, epilog=PLAN_EXAMPLE)(plan)
app.command(cls=CheckedCommand, epilog=TRAIN_EXAMPLE)(train)
app.command(
    cls=CheckedCommand,
    epilog=r"Example: `sparsort calibrate data.jsonl -p 'Question: {question}\nAnswer:' -a ' {answer}' --out calibration.json`",
)(calibrate)


@app.command(cls=CheckedCommand, epilog="Example: `sparsort env --json`")
def env(as_json: JsonOption = False) -> None:
    """Show versions, the chosen implementations with their reasons, and the embedded model's folder."""
    from sparsort.recipes.environment import describe_environment

    found = describe_environment()
    if as_json:
        print_json(found)
        return
    rows = table("", "value", "why")
    rows.add_row("sparsort", found["version"], "")
    for name, choice in found["choices"].items():
        rows.add_row(name, choice["value"], choice["reason"])
    for name, version in found["versions"].items():
        if name != "sparsort":
            rows.add_row(name, version, "")
    rows.add_row("threads", str(found["threads"]), "")
    rows.add_row("cache", found["cache"], "set SPARSORT_CACHE to move it")
    console().print(rows)
    # Not in the table, which would break a path over several lines.
    typer.echo(f"demo_model  {found['demo_model'] or 'none'}\n            {found['demo_model_note']}")


def _print_scores(scores: Any, summary: dict[str, Any]) -> None:
    rows = table("rank", "id", "difficulty", "tokens", title="easiest and hardest by this score")
    # Columns of a run on disk are read when they are asked for: once each.
    difficulty, ids, tokens = scores.difficulty, scores.column("id"), scores.column("n_tokens")
    known = [place for place in scores.order() if math.isfinite(difficulty[place])]
    shown = [*enumerate(known)] if len(known) <= 10 else [*enumerate(known[:5]), *enumerate(known[-5:], len(known) - 5)]
    for rank, place in shown:
        rows.add_row(str(rank + 1), str(ids[place]), f"{difficulty[place]:.4f}", str(tokens[place]))
    console().print(rows)
    rate = f" ({summary['tokens'] / summary['seconds']:.0f} tokens/s, loading included)" if summary["tokens"] else ""
    scored = f"{summary['status'].get('ok', 0)} of {summary['rows']} rows scored"
    typer.echo(f"{scored} in {summary['seconds']:.1f} s{rate}.")
    if summary["out"]:
        typer.echo(f"Scores: {summary['out']}")


def _print_order(result: Any) -> None:
    rows = table("place", "id", "difficulty", "demonstration", title=f"{result.order}, first to last")
    for place, demo in enumerate(result.demonstrations, 1):
        difficulty = demo["difficulty"]
        shown = "" if difficulty is None else f"{difficulty:.4f}"
        rows.add_row(str(place), demo["id"], shown if demo["kept"] else f"{shown} (dropped)", demo["excerpt"])
    console().print(rows)
    for note in result.notes:
        typer.echo(note, err=True)
    typer.echo("")
    typer.echo(result.prompt)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"sparsort: {message}", err=True)
    sys.exit(code)
