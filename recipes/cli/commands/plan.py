"""The command `sparsort plan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsort.curriculum.loading.plan.settings import BATCH_PANEL, ORDER_PANEL, CurriculumSettings
from sparsort.errors import SparsortError
from sparsort.options import shares
from sparsort.recipes.cli.options import JsonOption, generated
from sparsort.recipes.cli.options_curriculum import GroupsOption, PlannedCurriculum
from sparsort.scoring.prompts.spec import DataSpec
from sparsort.terminal.printing import one_line, show, show_json
from sparsort.terminal.tables import Table, number, prose

if TYPE_CHECKING:
    from sparsort.curriculum.loading.inspect.summary import PlanSummary

EXAMPLE = (
    "Example: `sparsort score examples/graded.jsonl --scorer column --column steps --out scores`, then "
    "`sparsort plan scores --data examples/graded.jsonl --batch-size 8 --stages 4 --show-groups kind --draw plan.png`"
)


@generated
def plan(
    scores: Annotated[
        list[str], typer.Argument(help="Score folders or files; several are combined. PATH or NAME=PATH.")
    ],
    *,
    data: Annotated[
        Path | None, typer.Option(help="Rows to train on, matched to the scores [default: the scored rows].")
    ] = None,
    rows: DataSpec,
    curriculum: PlannedCurriculum,
    groups: GroupsOption = None,
    combination: Annotated[
        str,
        typer.Option(help="Of scores: rank_average, lexicographic or intersection.", rich_help_panel=ORDER_PANEL),
    ] = "rank_average",
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", help="NAME=2: of a score in rank_average; once for each.", rich_help_panel=ORDER_PANEL
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Field of the data with the tokens of a row [default: as the scores counted].",
            rich_help_panel=BATCH_PANEL,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the plan, to train with.")] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Your name for the data, for loaders that have no id or text to compare.")
    ] = None,
    draw: Annotated[Path | None, typer.Option("--draw", help="File for the figure: .png, .pdf or .svg.")] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--beside", help="Saved plan to draw beside this one: PATH or NAME=PATH; may be repeated."),
    ] = None,
    show_groups: Annotated[
        str | None, typer.Option(help="Field whose shares are shown, without changing the plan.")
    ] = None,
    epoch: Annotated[int, typer.Option(help="The epoch to show, from 0.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Plan the batches of a training run from SCORES, and show what they hold: a curriculum before it is trained on."""
    from sparsort.recipes.plan import make_plan

    made = make_plan(
        named_paths(scores),
        settings=CurriculumSettings.from_json(curriculum),
        data=data,
        id_column=rows.id_column,
        columns=rows.columns,
        groups=groups,
        show_groups=show_groups,
        lengths=lengths,
        combination=combination,  # type: ignore[arg-type]
        weights=shares("--weight")(weight),
        epoch=epoch,
        out=out,
        fingerprint=fingerprint,
        draw=draw,
        beside=named_paths(beside or [], "plans"),
    )
    if as_json:
        show_json(made.to_json())
        return
    _show(made.summary, combination)
    if out is not None:
        show(f"Plan: {out}")
    if draw is not None:
        show(f"Figure: {draw}")


def named_paths(texts: Sequence[str], what: str = "scores") -> dict[str, str]:
    """Paths by name, from PATH or NAME=PATH each; a path without a name has that of its file.

    Raises:
        SparsortError: two have one name.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or Path(text).exists():
            name, path = Path(text).stem or text, text
        if name in found:
            raise SparsortError(
                f"two {what} are called {name!r}: {found[name]} and {path}. Name them, as in first={found[name]} second={path}."
            )
        found[name] = path
    return found


def _show(summary: PlanSummary, combination: str) -> None:
    show(f"{summary.what}; {_size(summary)}")
    about = "" if summary.exact else "≈"
    show(
        f"{summary.rows:,} rows in {summary.batches:,} batches, "
        f"{about}{sum(part.examples for part in summary.parts) / summary.batches:,.1f} examples each"
        + (f"; epoch {summary.epoch}" if summary.epoch else "")
    )
    if summary.scores:
        how = f", {combination} of their percentiles" if len(summary.scores) > 1 else ""
        named = [
            scorer if len(summary.scores) == 1 else f"{name} ({scorer})" for name, scorer in summary.scores.items()
        ]
        show(f"difficulty: {', '.join(named)}{how}")
    _show_table(summary)
    if summary.group_names:
        held = _shares(summary.group_names, summary.group_shares, most=10).replace("\xa0", " ")
        show(f"groups in the data: {held}")
    stand = {"last": "they stand last", "first": "they stand first"}.get(summary.settings["unscored"], "")
    show(f"rows without a score: {summary.unscored:,}{f' ({stand})' if summary.unscored and stand else ''}")
    if summary.cut is not None:
        show(f"rows cut: {summary.cut:,}")
    show(f"scores of no row: {summary.unused_scores:,}")
    show(_seen(summary))
    if summary.below_batch:
        show(
            f"the pacing allows less than a batch needs in {summary.below_batch:,} batches, which draw from just enough"
        )
    if not summary.exact:
        looked = sum(part.looked_at for part in summary.parts)
        show(f"≈ from {looked:,} of {summary.batches:,} batches, evenly spaced over each part")
    show(f"fingerprint: {summary.fingerprint}")


def _size(summary: PlanSummary) -> str:
    size, budget = summary.settings["batch_size"], summary.settings["token_budget"]
    if summary.settings["packing"] != "none":
        return f"batches of {size} packed sequences"
    return f"batches of {budget} tokens" if size is None else f"batch size {size}"


def _seen(summary: PlanSummary) -> str:
    seen = summary.coverage
    if summary.settings["mode"] == "one_pass":
        return "every example is seen once an epoch"
    never = f"{100 * seen.never:.2f} % of the examples are never seen in an epoch"
    how = "counted" if seen.exact else "expected value"
    most = "" if seen.most is None else f", at most {seen.most:,} times"
    return f"{never} ({how}); an example is seen {seen.mean:.2f} times on average{most}"


def _show_table(summary: PlanSummary) -> None:
    parts, about = summary.parts, "" if summary.exact else "≈"
    whole = len(parts) > 1 and parts[-1].stages[1] > 0
    columns: dict[str, list[str]] = {
        "stage" if whole else "part": [
            _span(*part.stages, 0) if whole else str(place) for place, part in enumerate(parts, 1)
        ],
        "batches": [_span(*part.batches, 0) for part in parts],
        "examples": [f"{part.examples:,}" for part in parts],
        "available": [_percents(part.share) for part in parts],
        "difficulty": [f"{about}{part.difficulty.mean:.4g}" if part.difficulty else "–" for part in parts],
        "from … to": [
            f"{part.difficulty.lowest:.4g} … {part.difficulty.highest:.4g}" if part.difficulty else "–"
            for part in parts
        ],
    }
    if any(part.unscored for part in parts):
        columns["no score"] = [f"{100 * part.unscored:.0f} %" for part in parts]
    if any(part.length for part in parts):
        columns["tokens"] = [f"{about}{part.length.mean:,.1f}" if part.length else "–" for part in parts]
        columns["padding"] = ["–" if part.padding is None else f"{100 * part.padding:.0f} %" for part in parts]
    if len(summary.group_names) > 1:
        columns["groups"] = [_shares(summary.group_names, part.groups or [], most=5) for part in parts]
    shown = Table(*(prose(name) if name == "groups" else number(name) for name in columns))
    for line in zip(*columns.values(), strict=True):
        shown.add_row(*line)
    shown.show()


_MOST_OF_NAME = 40


def _span(first: int, last: int, origin: int) -> str:
    return f"{first + origin:,}" if first == last else f"{first + origin:,}–{last + origin:,}"


def _percents(pair: tuple[float, float]) -> str:
    first, last = (f"{100 * share:.3g}" for share in pair)
    return f"{first} %" if first == last else f"{first}–{last} %"


def _shares(names: Sequence[str], shares: Sequence[float], most: int) -> str:
    """The largest first."""
    ranked = sorted(zip(shares, names, strict=False), key=lambda pair: -pair[0])
    # A name and its share stay on one line.
    said = [f"{one_line(name, _MOST_OF_NAME)}\xa0{100 * share:.0f}\xa0%" for share, name in ranked[:most]]
    return ", ".join(said) + (f", {len(ranked) - most} more" if len(ranked) > most else "")
