"""The command `sparsort choose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsort.curriculum.demos.criteria import CRITERIA
from sparsort.options import unescape
from sparsort.recipes.cli.options import FewShotPrompt, JsonOption, generated
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import TEXT_PANEL, DataSpec
from sparsort.terminal.printing import note, one_line, show, show_json
from sparsort.terminal.tables import Table, number, prose

if TYPE_CHECKING:
    from sparsort.recipes.choose.choose import ChosenOrder

EXAMPLE = r"Example: `sparsort choose reviews.jsonl -p 'Review: {text}\nSentiment:' --label label -k 4`"
_SHOWN = 8
_MOST_OF_ID = 40


@generated
def choose(
    file: Annotated[
        Path, typer.Argument(help="Demonstrations, each with its label; or, with -k, the rows to draw them from.")
    ],
    on: Annotated[
        Path | None,
        typer.Option("--on", help="Queries that the criterion reads [default, with -k: other rows of FILE]."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help=f"{CRITERIA.listed(lambda entry: entry.chooses == 'order')}; or several, joined by +: their mean rank. "
            "pdo_prior is pdo with --prior pool."
        ),
    ] = "pdo",
    prior: Annotated[
        str | None,
        typer.Option(
            help="Label shares that pdo expects of the predictions: uniform; pool, those of FILE, right only if your queries "
            "have the same; mixed, the mean of both; estimated, those of the queries, for which up to 64 labelled rows of FILE "
            "are read under one order; or a file of shares or labelled rows [default: with -k and --on estimated, if 16 "
            "labelled rows are left; with -k alone mixed; else uniform]."
        ),
    ] = None,
    *,
    prompt: FewShotPrompt,
    label: Annotated[str, typer.Option(help="Column of the label.", rich_help_panel=TEXT_PANEL)] = "label",
    labels: Annotated[
        str | None,
        typer.Option(help="0=negative,1=positive [default: as they stand in the data].", rich_help_panel=TEXT_PANEL),
    ] = None,
    separator: Annotated[str, typer.Option(help="Between demonstrations.", rich_help_panel=TEXT_PANEL)] = r"\n\n",
    data: DataSpec,
    k: Annotated[int | None, typer.Option("-k", "--shots", help="Draw this many demonstrations from FILE.")] = None,
    queries: Annotated[int, typer.Option(help="Most queries to ask about.")] = 32,
    orders: Annotated[int, typer.Option(help="Orders to try: all, or random ones where there are more.")] = 24,
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="Allow queries among the demonstrations.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    model: ModelSpec,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write the demonstrations in their order as JSONL, for 'sparsort order --order given'."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose the order of demonstrations by a criterion that asks the model: GlobalE, LocalE, PDO, best on dev, …."""
    from sparsort.recipes.choose.choose import choose_order, needs_labels, read_rows
    from sparsort.recipes.choose.prior import reads_prior

    # A misspelt criterion should not cost the reading of files.
    scored = needs_labels(by)
    given = read_rows(
        file,
        on,
        prompt=prompt.template,  # type: ignore[arg-type]
        label=label,
        k=k,
        queries=queries,
        seed=seed,
        data=data,
    )
    named = given.label_set(label, labels) if scored or labels else {}
    chosen = choose_order(
        given.demos,
        given.queries,
        by=by,
        prompt=prompt,
        label=label,
        labels=named or None,
        prior=prior,
        pool=given.pool if reads_prior(by) else (),
        separator=unescape(separator) or "",
        orders=orders,
        allow_leaks=allow_leaks,
        model=model,
        seed=seed,
    )
    if out is not None:
        from sparsort.storage.files import write_atomically

        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in chosen.demos]
        with write_atomically(out) as temporary:
            # Half of a surrogate pair is written as JSON escapes it.
            temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    if as_json:
        show_json(chosen.summary() | {"out": str(out) if out else None})
        return
    _show(chosen, given.demos)
    if out is not None:
        show(f"Demonstrations: {out}")


def _show(chosen: ChosenOrder, demos: list[dict[str, Any]]) -> None:
    from sparsort.curriculum.demos.pool.rows import id_of

    names = [one_line(str(id_of(row, place)), _MOST_OF_ID) for place, row in enumerate(demos)]
    table = Table(number("rank"), number("score"), prose("order, first to last"))
    for rank, (order, score) in enumerate(zip(chosen.candidates[:_SHOWN], chosen.scores, strict=False), 1):
        table.add_row(str(rank), f"{score:.4g}", " ".join(names[place] for place in order))
    table.show()
    show(
        f"{chosen.by}: best of {len(chosen.candidates)} orders over {chosen.queries} queries, {chosen.tokens_read:,} tokens read."
    )
    for sentence in chosen.notes:
        note(sentence)
