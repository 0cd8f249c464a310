"""The command `sparsort calibrate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.options import option, parts, same_option
from sparsort.recipes.cli.options import JsonOption, RowsArgument, generated
from sparsort.recipes.score.config import SCORER_PANEL, ScorerConfig
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.terminal.printing import note, show, show_json
from sparsort.terminal.tables import Table, number, prose

if TYPE_CHECKING:
    from sparsort.scoring.calibration.calibration import Calibration

EXAMPLE = (
    r"Example: `sparsort calibrate data.jsonl -p 'Question: {question}\nAnswer:' -a ' {answer}' --out calibration.json`"
)
_REFERENCES = "References"
_MOST_NOTES = 5


def _parts_if_any(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else parts(text)


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """The options of `sparsort calibrate` besides those of the prompt, the data and the model; see `recipes.calibrate`."""

    level: str | None = option(None, "Column that rises with human difficulty.", panel=_REFERENCES)
    correct: str | None = option(
        None, "Column with 1 if the model's answer was right, and 0 otherwise.", panel=_REFERENCES
    )
    target: str | None = option(
        None,
        "Reference that the score is chosen by: loss, correct or level [default: the first of these that exists].",
        panel=_REFERENCES,
    )
    no_loss: bool = option(False, "Do not compare with the model's own loss.", panel=_REFERENCES)
    sites: tuple[str, ...] | None = option(
        None,
        "Comma-separated sites [default: pre_norm,post_norm,mlp].",
        panel=SCORER_PANEL,
        kind=str | None,
        read=_parts_if_any,
    )
    poolings: tuple[str, ...] | None = option(
        None, "Comma-separated poolings [default: all].", panel=SCORER_PANEL, kind=str | None, read=_parts_if_any
    )
    outliers: tuple[str, ...] = option(
        ("none", "drop:3", "rms"),
        "Comma-separated outlier rules [default: none,drop:3,rms].",
        panel=SCORER_PANEL,
        kind=str | None,
        read=parts,
    )
    l0_threshold: float = same_option(ScorerConfig, "l0_threshold")
    draws: int = option(1000, "Bootstrap draws, and permutations.")
    seed: int = option(0, "Seed of the halves, the draws and the permutations.")
    top: int = option(3, "Candidates shown for each reference.")
    out: Path | None = option(
        None, "File for the calibration (.json); run the same command again to resume after a stop.", short="-o"
    )


@generated
def calibrate(
    file: RowsArgument,
    prompt: PromptSpec,
    data: DataSpec,
    options: CalibrateOptions,
    model: ModelSpec,
    as_json: JsonOption = False,
) -> None:
    """Find out whether a sparsity score measures difficulty for this model, prompt and FILE, and which score does."""
    from sparsort.recipes.calibrate import calibrate as run

    calibration = run(
        file,
        prompt,
        id_column=data.id_column,
        columns=data.columns,
        level=options.level,
        correct=options.correct,
        target=options.target,
        own_loss=not options.no_loss,
        sites=options.sites,
        poolings=options.poolings,
        outliers=options.outliers,
        l0_threshold=options.l0_threshold,
        model=model,
        n_boot=options.draws,
        # The observed arrangement counts as one permutation.
        n_perm=options.draws - 1,
        seed=options.seed,
        out=options.out,
    )
    if as_json:
        show_json(calibration.to_dict() | {"out": str(options.out) if options.out else None})
    else:
        _show(calibration, options.top, options.out)


def _show(calibration: Calibration, top: int, out: Path | None) -> None:
    percent = f"{100 * float(calibration.settings['level']):g} %"
    names: tuple[str, ...] = ("ρ", "ρ, length fixed", "p", "levels r")
    title = f"{len(calibration.candidates)} candidates, all rows"
    table = Table(prose("reference"), prose("candidate"), *map(number, names), title=title)
    for name, judgement in calibration.judgements.items():
        for place, row in enumerate(calibration.best(name, top)):
            label = f"{name} (n = {judgement.n_rows})" if place == 0 else ""
            adjusted = row["p"] if row["fixed_p"] is None else row["fixed_p"]
            numbers = (_interval(row, ""), _interval(row, "fixed_"), _p(adjusted), _r(row["of_levels"]))
            table.add_row(label, row["candidate"], *numbers)
    table.show()
    names = ("held-out ρ", "held-out ρ, length fixed", "p")
    title = "Chosen on one half of the rows, tested on the other"
    table = Table(prose("reference"), *map(number, names), prose("verdict"), title=title)
    for name, judgement in calibration.judgements.items():
        if name != "length":
            plain, fixed = (_interval(vars(part), "") for part in (judgement.plain, judgement.fixed))
            table.add_row(name, plain, fixed, _p(judgement.fixed.p), judgement.verdict)
    table.show()
    show(
        f"Intervals: {percent} bootstrap. p holds length fixed, except for the reference length. In the first table it is "
        "adjusted for all candidates; in the second it tests the whole choice.\n"
        "levels r correlates the means of the reference's levels, which looks better than ρ per example."
    )
    for sentence in calibration.left_out[:_MOST_NOTES]:
        note(f"note: {sentence}")
    if len(calibration.left_out) > _MOST_NOTES:
        note(f"note: {len(calibration.left_out) - _MOST_NOTES} more were not compared (see --json)")
    show(calibration.sentence())
    if out is not None:
        show(f"Calibration: {out}  (sparsort score FILE --calibration {out})")


def _interval(row: dict[str, Any], prefix: str) -> str:
    rho, low, high = (row[f"{prefix}{name}"] for name in ("rho", "low", "high"))
    if rho is None or math.isnan(rho):
        return ""
    return f"{rho:+.2f}, no interval" if low is None or math.isnan(low) else f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"


def _p(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _r(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
