"""Write the report of an ablation as one HTML file, Markdown, JSON and figures. The recipe for `sparsort report`.

Contract: no model is queried, and the results are not changed. A second call replaces the files of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.errors import SparsortError

if TYPE_CHECKING:
    from sparsort.curriculum.ablation.report.numbers.shape import Report
    from sparsort.curriculum.ablation.results.results import Results


@dataclass(frozen=True, kw_only=True)
class Written:
    """A report on disk: its numbers, and its files with the page first."""

    report: Report
    files: list[Path]

    @property
    def page(self) -> Path:
        """The HTML file."""
        return self.files[0]

    def summary(self) -> dict[str, Any]:
        """The numbers without the demonstrations, and the files, as JSON values."""
        numbers: dict[str, Any] = {
            name: value for name, value in self.report.items() if name not in ("demonstrations", "texts")
        }
        return numbers | {"files": [str(path) for path in self.files]}


def write_report(
    results: Results | str | Path,
    out: str | Path | None = None,
    *,
    figures: str | Path | None = None,
    title: str | None = None,
) -> Path:
    """Write the report of an ablation and return the path of its page.

    Args:
        results: `Results`, or a folder that contains them.
        out: folder for report.html, report.md, report.json and figures/; by default `report` next to the results.
        figures: another folder, for every figure in a form for papers: PDF, and PNG at 300 dots per inch.
        title: title of the report.

    Raises:
        SparsortError: there are no results, matplotlib is missing, or a folder cannot be written.
    """
    return make_report(results, out, figures=figures, title=title).page


def make_report(
    results: Results | str | Path,
    out: str | Path | None = None,
    *,
    figures: str | Path | None = None,
    title: str | None = None,
) -> Written:
    """Write the report like `write_report`, and return its numbers and files."""
    from sparsort.curriculum.ablation.report.figures.style import need_matplotlib
    from sparsort.curriculum.ablation.report.numbers.summary import summarise
    from sparsort.curriculum.ablation.report.write import write_report as write
    from sparsort.curriculum.ablation.results.file import find_results
    from sparsort.curriculum.ablation.results.results import Results

    # A missing library is reported before minutes of reading and computing.
    need_matplotlib()
    if isinstance(results, Results):
        if out is None:
            raise SparsortError("write_report was given results and no folder; pass out=, the folder for the report.")
        folder = Path(out).expanduser()
    else:
        source = find_results(Path(results).expanduser())
        results = Results.load(source)
        default = source.parent / "report" if source.name == "results" else source / "report"
        folder = default if out is None else Path(out).expanduser()
    report = summarise(results, **({} if title is None else {"title": title}))
    files = write(report, folder, figures=None if figures is None else Path(figures).expanduser())
    return Written(report=report, files=files)
