"""The command `sparsort choose`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsort.curriculum.demos.criteria import CRITERIA
from sparsort.options import option, unescape
from sparsort.recipes.cli.options import ExportOptions, FewShotPrompt, JsonOption, generated
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import TEXT_PANEL, DataSpec
from sparsort.terminal.printing import note, one_line, show, show_json
from sparsort.terminal.tables import Table, number, prose

if TYPE_CHECKING:
    from sparsort.recipes.choose.choose import ChosenOrder

EXAMPLE = r"Example: `sparsort choose reviews.jsonl -p 'Review: {text}\nSentiment:' --label label -k 4`"
_ORDERS_SHOWN = 8
_MOST_OF_ID = 40


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", text) is not None


@dataclass(frozen=True, kw_only=True)
class ChooseOptions:
    """The options of `sparsort choose` besides those of the prompt, the data and the model; see `choose_order`."""

    queries: Path | None = option(
        None,
        "File of the queries that the criterion reads [default, with -k: other rows of FILE].",
        retired=("--on",),
    )
    max_queries: int = option(
        32,
        "The most queries to read; of more, a random sample is read.",
        # `--queries` was this number before it was the file.
        retired=("--queries",),
        retired_for=_is_integer,
    )
    by: str = option(
        "pdo",
        f"{CRITERIA.listed(lambda entry: entry.chooses == 'order')}; or several, joined by +, for their mean rank. "
        "pdo_prior is pdo with --prior pool.",
        flag="--criterion",
        retired=("--by",),
    )
    prior: str | None = option(
        None,
        "The label shares that pdo expects of the predictions: uniform; pool: those of FILE, which is right only if your "
        "queries have the same shares; mixed: the mean of both; estimated: those of the queries, for which up to 64 labelled "
        "rows of FILE are read under one order; or a file of shares or of labelled rows [default: with -k and --queries "
        "estimated, if 16 labelled rows remain; with -k alone mixed; otherwise uniform].",
    )
    k: int | None = option(None, "Draw this many demonstrations from FILE.", flag="--shots", short="-k")
    orders: int = option(24, "Orders to try: all of them, or random ones if there are more.")
    allow_leaks: bool = option(False, "Allow queries among the demonstrations.")
    seed: int = option(0, "Seed of every random draw.")
    label: str = option("label", "Column of the label.", panel=TEXT_PANEL)
    labels: str | None = option(
        None, "Values and words of the labels, as in 0=negative,1=positive [default: as in the data].", panel=TEXT_PANEL
    )
    separator: str = option("\n\n", "Text between demonstrations.", panel=TEXT_PANEL, read=unescape)
    out: Path | None = option(
        None,
        "Write the demonstrations in the chosen order to this JSONL file, for 'sparsort order --order given'.",
        short="-o",
    )


@generated
def choose(
    file: Annotated[
        Path, typer.Argument(help="Demonstrations with their labels; or, with -k, the rows to draw them from.")
    ],
    prompt: FewShotPrompt,
    data: DataSpec,
    options: ChooseOptions,
    export: ExportOptions,
    model: ModelSpec,
    as_json: JsonOption = False,
) -> None:
    """Choose the order of demonstrations by a criterion that queries the model: GlobalE, LocalE, PDO, best on dev, …."""
    from sparsort.curriculum.demos.export import check_export
    from sparsort.recipes.choose.choose import choose_order, needs_labels
    from sparsort.recipes.choose.prior import reads_prior
    from sparsort.recipes.choose.rows import read_rows

    # An unknown criterion or format is reported before any file is read.
    scores_labels = needs_labels(options.by)
    if export.export is not None:
        check_export(export.export, export.format, "chat" if prompt.chat else "plain")
    rows = read_rows(
        file,
        options.queries,
        prompt=prompt.template,  # type: ignore[arg-type]
        label=options.label,
        k=options.k,
        max_queries=options.max_queries,
        seed=options.seed,
        data=data,
    )
    labels = rows.label_set(options.label, options.labels) if scores_labels or options.labels else {}
    chosen = choose_order(
        rows.demos,
        rows.queries,
        by=options.by,
        prompt=prompt,
        label=options.label,
        labels=labels or None,
        prior=options.prior,
        pool=rows.pool if reads_prior(options.by) else (),
        separator=options.separator,
        orders=options.orders,
        allow_leaks=options.allow_leaks,
        model=model,
        seed=options.seed,
    )
    if options.out is not None:
        _write(chosen.demos, options.out)
    if export.export is not None:
        chosen.export(export.export, export.format)
    if as_json:
        show_json(chosen.summary() | {"out": str(options.out) if options.out else None} | export.to_json())
        return
    _show(chosen, rows.demos)
    if options.out is not None:
        show(f"Demonstrations: {options.out}")
    export.show()


def _write(demos: list[dict[str, Any]], out: Path) -> None:
    from sparsort.storage.files import write_atomically

    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in demos]
    with write_atomically(out) as temporary:
        # Half of a surrogate pair cannot be encoded. "backslashreplace" writes it as the escape that JSON has for it.
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _show(chosen: ChosenOrder, demos: list[dict[str, Any]]) -> None:
    from sparsort.curriculum.demos.pool.rows import id_of

    names = [one_line(str(id_of(row, place)), _MOST_OF_ID) for place, row in enumerate(demos)]
    table = Table(number("rank"), number("score"), prose("order, first to last"))
    for rank, (order, score) in enumerate(zip(chosen.candidates[:_ORDERS_SHOWN], chosen.scores, strict=False), 1):
        table.add_row(str(rank), f"{score:.4g}", " ".join(names[place] for place in order))
    table.show()
    show(
        f"{chosen.by}: best of {len(chosen.candidates)} orders over {chosen.queries} queries, {chosen.tokens_read:,} tokens read."
    )
    for sentence in chosen.notes:
        note(sentence)
