"""The command `sparsort report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sparsort.options import option
from sparsort.recipes.cli.options import JsonOption, generated
from sparsort.terminal.printing import show, show_json

EXAMPLE = "Example: `sparsort report my-ablation --figures figures`"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The options of `sparsort report`; see `recipes.report.make_report`."""

    out: Path | None = option(
        None, "Folder for the report [default: the folder 'report' next to the results].", short="-o"
    )
    figures: Path | None = option(
        None, "Also save every figure for a paper in this folder: as PDF, and as PNG at 300 dpi."
    )
    title: str | None = option(None, "Title of the report.")


@generated
def report(
    results: Annotated[
        Path, typer.Argument(help="Folder given to 'sparsort ablate --out', or the folder 'results' in it.")
    ],
    options: ReportOptions,
    as_json: JsonOption = False,
) -> None:
    """Write the report of an ablation as one HTML file, and as Markdown and JSON, with figures."""
    from sparsort.recipes.report import make_report

    written = make_report(results, options.out, figures=options.figures, title=options.title)
    if as_json:
        show_json(written.summary())
        return
    for warning in written.report["warnings"]:
        show(f"Warning: {warning['text']}")
    for finding in written.report["findings"]:
        if finding["task"] is None or len(written.report["tasks"]) == 1:
            show(f"{finding['title']}:")
            for sentence in finding["sentences"]:
                show(f"  {sentence}")
    show(f"Report: {written.page}")
    if options.figures is not None:
        show(f"Figures: {options.figures}")
