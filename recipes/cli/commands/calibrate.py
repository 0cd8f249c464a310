"""The command `sparsort calibrate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsort.options import parts
from sparsort.recipes.cli.options import JsonOption, generated
from sparsort.recipes.score.config import SCORER_PANEL
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.terminal.printing import note, show, show_json
from sparsort.terminal.tables import Table, number, prose

if TYPE_CHECKING:
    from sparsort.scoring.calibration.calibration import Calibration

_REFERENCES = "References"


@generated
def calibrate(
    file: Annotated[
        Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv, .parquet, or a saved datasets folder.")
    ],
    prompt: PromptSpec,
    data: DataSpec,
    *,
    level: Annotated[
        str | None, typer.Option(help="Column that rises with human difficulty.", rich_help_panel=_REFERENCES)
    ] = None,
    correct: Annotated[
        str | None, typer.Option(help="Column of 1 (the model was right) and 0.", rich_help_panel=_REFERENCES)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Reference that chooses the score: loss, correct or level [default: the first there is].",
            rich_help_panel=_REFERENCES,
        ),
    ] = None,
    no_loss: Annotated[
        bool, typer.Option("--no-loss", help="Leave the model's own loss out.", rich_help_panel=_REFERENCES)
    ] = False,
    sites: Annotated[
        str | None,
        typer.Option(help="Comma-separated sites [default: pre_norm,post_norm,mlp].", rich_help_panel=SCORER_PANEL),
    ] = None,
    poolings: Annotated[
        str | None, typer.Option(help="Comma-separated poolings [default: all].", rich_help_panel=SCORER_PANEL)
    ] = None,
    outliers: Annotated[
        str, typer.Option(help="Comma-separated outlier rules.", rich_help_panel=SCORER_PANEL)
    ] = "none,drop:3,rms",
    l0_threshold: Annotated[float, typer.Option(help="Threshold of l0_absolute.", rich_help_panel=SCORER_PANEL)] = 1.0,
    model: ModelSpec,
    draws: Annotated[int, typer.Option(help="Bootstrap draws, and permutations.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of halves, draws and permutations.")] = 0,
    top: Annotated[int, typer.Option(help="Candidates shown for each reference.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File for the calibration (.json); run again to go on after a stop."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find out whether a sparsity score carries difficulty for this model, prompt and FILE, and which one."""
    from sparsort.recipes.calibrate import calibrate as run

    found = run(
        file,
        prompt,
        id_column=data.id_column,
        columns=data.columns,
        level=level,
        correct=correct,
        target=target,
        own_loss=not no_loss,
        sites=None if sites is None else parts(sites),
        poolings=None if poolings is None else parts(poolings),
        outliers=parts(outliers),
        l0_threshold=l0_threshold,
        model=model,
        n_boot=draws,
        n_perm=draws - 1,
        seed=seed,
        out=out,
    )
    if as_json:
        show_json(found.to_dict() | {"out": str(out) if out else None})
    else:
        _show(found, top, out)


def _show(found: Calibration, top: int, out: Path | None) -> None:
    percent = f"{100 * float(found.settings['level']):g} %"
    names: tuple[str, ...] = ("ρ", "ρ, length fixed", "p", "levels r")
    title = f"{len(found.candidates)} candidates, all rows"
    table = Table(prose("reference"), prose("candidate"), *map(number, names), title=title)
    for name, judgement in found.judgements.items():
        for place, row in enumerate(found.best(name, top)):
            label = f"{name} (n = {judgement.n_rows})" if place == 0 else ""
            adjusted = row["p"] if row["fixed_p"] is None else row["fixed_p"]
            numbers = (_interval(row, ""), _interval(row, "fixed_"), _p(adjusted), _r(row["of_levels"]))
            table.add_row(label, row["candidate"], *numbers)
    table.show()
    names = ("held-out ρ", "held-out ρ, length fixed", "p")
    title = "Chosen on one half of the rows, read on the other"
    table = Table(prose("reference"), *map(number, names), prose("verdict"), title=title)
    for name, judgement in found.judgements.items():
        if name != "length":
            plain, fixed = (_interval(vars(part), "") for part in (judgement.plain, judgement.fixed))
            table.add_row(name, plain, fixed, _p(judgement.fixed.p), judgement.verdict)
    table.show()
    show(
        f"Intervals: {percent} bootstrap. p: with length fixed (length: plain), adjusted for all candidates above, of the whole "
        "choice below.\nlevels r: correlation of the means of the reference's levels, which flatters: ρ is per example."
    )
    for sentence in found.left_out[:_MOST_NOTES]:
        note(f"note: {sentence}")
    if len(found.left_out) > _MOST_NOTES:
        note(f"note: and {len(found.left_out) - _MOST_NOTES} more that were not compared (see --json)")
    show(found.sentence())
    if out is not None:
        show(f"Calibration: {out}  (sparsort score FILE --calibration {out})")


_MOST_NOTES = 5


def _interval(row: dict[str, Any], prefix: str) -> str:
    rho, low, high = (row[f"{prefix}{name}"] for name in ("rho", "low", "high"))
    if rho is None or math.isnan(rho):
        return ""
    return f"{rho:+.2f}, no interval" if low is None or math.isnan(low) else f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"


def _p(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _r(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
