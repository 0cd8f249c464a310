"""The command `sparsort report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsort.recipes.cli.options import JsonOption
from sparsort.terminal.printing import show, show_json


def report(
    results: Annotated[Path, typer.Argument(help="Folder of 'sparsort ablate --out', or the folder 'results' in it.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the report [default: 'report' beside the results].")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", help="Also save every figure for a paper in this folder: PDF, PNG at 300 dpi."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the report.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of an ablation: one HTML file, and the same as Markdown and JSON, with figures."""
    from sparsort.recipes.report import make_report

    written = make_report(results, out, figures=figures, title=title)
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
    if figures is not None:
        show(f"Figures: {figures}")
