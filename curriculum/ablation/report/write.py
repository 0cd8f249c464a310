"""A report on disk: report.html, report.md, report.json and its figures, all from one `Report`."""

from __future__ import annotations

import json
from pathlib import Path

from sparsort.curriculum.ablation.report.figures import panels, sheets, svg
from sparsort.curriculum.ablation.report.figures.style import need_matplotlib, styled
from sparsort.curriculum.ablation.report.numbers.shape import Report
from sparsort.curriculum.ablation.report.page.html import render
from sparsort.curriculum.ablation.report.page.markdown import markdown
from sparsort.storage.files import write_atomically
from sparsort.terminal.progress import progress


def write_report(report: Report, folder: Path, *, figures: Path | None = None) -> list[Path]:
    """Write the report into `folder`.

    Args:
        report: from `summary.summarise`.
        folder: gets report.html, report.md, report.json, and figures/ with every sheet as SVG and PNG.
        figures: another folder, for a paper: every sheet as PDF, and as PNG at 300 dots per inch.

    Returns:
        The paths, the page first.

    Raises:
        SparsortError: matplotlib is missing, or a folder cannot be written.
    """
    need_matplotlib()
    drawn, pictures, written = [], [], []
    with progress("drawing", None) as advance:
        with styled(panels.SIZE):
            for number, panel in enumerate(panels.panels(report)):
                drawn.append((panel, svg.themed(panel.picture, f"f{number}")))
                advance(1)
        with styled(sheets.SIZE):
            for sheet in sheets.sheets(report):
                written += [svg.write(sheet, folder / "figures", kind) for kind in ("svg", "png")]
                if figures is not None:
                    written += [svg.write(sheet, figures, "pdf"), svg.write(sheet, figures, "png", dpi=300)]
                pictures.append((sheet.name, sheet.caption))
                advance(1)
    # Not indented: orders by item are long lists of short numbers.
    numbers = json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n"
    page, plain = render(report, drawn), markdown(report, pictures)
    for name, text in (("report.json", numbers), ("report.md", plain), ("report.html", page)):
        with write_atomically(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / "report.html", folder / "report.md", folder / "report.json", *written]
