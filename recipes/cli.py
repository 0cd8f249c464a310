"""The command line: `sparsort score`, `order`, `choose`, `calibrate`, `ablate`, `report`, `plan`, `train`, `env` and
`cache`.

Contract: results on stdout, progress and warnings on stderr, all printable (see `sparsort.terminal`); `--json` prints one object
and nothing else. Exit codes: 0 done;
1 stdout cannot be written;
2 a mistake in the call or the input, or a full disk, in one message; 3 done, but rows have no score and `--strict` was given;
130, 143 and 129: stopped by SIGINT, SIGTERM or SIGHUP, with finished work kept where there is a folder for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sparsort.errors import SparsortError
from sparsort.interrupts import exit_code
from sparsort.recipes.cli_ablate import ablate
from sparsort.recipes.cli_cache import cache, cache_lines
from sparsort.recipes.cli_calibrate import calibrate
from sparsort.recipes.cli_choose import EXAMPLE as CHOOSE_EXAMPLE
from sparsort.recipes.cli_choose import choose
from sparsort.recipes.cli_plan import EXAMPLE as PLAN_EXAMPLE
from sparsort.recipes.cli_plan import plan
from sparsort.recipes.cli_report import report
from sparsort.recipes.cli_train import EXAMPLE as TRAIN_EXAMPLE
from sparsort.recipes.cli_train import train
from sparsort.recipes.options import (
    MODEL_PANEL,
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
    PrintableUsage,
    PromptOption,
    RevisionOption,
    ScorerOption,
    SiteOption,
    SystemOption,
    TrustOption,
    names_in,
    unescape,
)
from sparsort.scoring.scorers import SCORERS
from sparsort.terminal import MOST_OF_PROMPT, discard, note, printable_messages, show, show_json
from sparsort.terminal_tables import Table, number, prose, text


class _Commands(PrintableUsage, TyperGroup):
    """Turns the errors that a user can mend, and an interrupt, into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with printable_messages():
                return super().invoke(ctx)
        except SparsortError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as stop:
            _fail("interrupted. Run the same command again.", exit_code(stop))
        except BrokenPipeError:
            # The reader of our output went away (`| head`); nothing is left to say to it.
            discard(sys.stdout)
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

        show(f"sparsort {sparsort.__version__}")
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
    from sparsort.recipes.score_table import show_scores

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
    allow_zero_shot: Annotated[
        bool, typer.Option("--allow-zero-shot", help="Allow a budget to drop every demonstration.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random selection and order.")] = 0,
    model: ModelOption = "demo",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
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
        allow_zero_shot=allow_zero_shot,
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
        seed=seed if scorer in SCORERS.reading("seed") else 0,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    from sparsort.scoring.row_cache import RowCache, is_kept

    rows = RowCache() if not no_cache and is_kept() else None
    result = order_file(file, query=query, config=config, scorer=scoring, scores=scores, cache=rows)
    if out is not None:
        from sparsort.files import write_atomically

        with write_atomically(out) as temporary:
            temporary.write_text(result.prompt, encoding="utf-8")
    if as_json:
        show_json(result.summary() | {"out": str(out) if out else None})
    else:
        _show_order(result)


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
        show_json(found)
        return
    table = Table(text(""), prose("value"), prose("why"))
    table.add_row("sparsort", found["version"], "")
    for name, choice in found["choices"].items():
        table.add_row(name, choice["value"], choice["reason"])
    for name, version in found["versions"].items():
        if name != "sparsort":
            table.add_row(name, version, "")
    table.add_row("threads", str(found["threads"]), "")
    table.show()
    # Not in the table, which would break a path over several lines.
    show(f"cache       {found['cache']}\n            set SPARSORT_CACHE to move it")
    for line in cache_lines(found["cache_holds"]):
        show(f"            {line}")
    show(f"demo_model  {found['demo_model'] or 'none'}\n            {found['demo_model_note']}")


app.command(cls=CheckedCommand, epilog="Example: `sparsort cache --clear`")(cache)


def _show_order(result: Any) -> None:
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


def _fail(message: str, code: int) -> NoReturn:
    note(f"sparsort: {message}")
    sys.exit(code)
