"""A report on disk: report.html, report.md, report.json and its figures, all made from one `Report`.

Contract: equal reports give equal files. In an SVG, every mark that has a tooltip shows it when pointed at. All text from data
passes through an XML writer. The functions for figures must run inside `style.styled()`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from sparsort.curriculum.ablation.report.figures import panels, sheets
from sparsort.curriculum.ablation.report.figures.style import PALETTE, Picture, Tips, need_matplotlib, plain, styled
from sparsort.curriculum.ablation.report.numbers.shape import Report
from sparsort.curriculum.ablation.report.page.html import render
from sparsort.curriculum.ablation.report.page.markdown import markdown
from sparsort.storage.files import write_atomically
from sparsort.terminal.progress import progress

Format = Literal["svg", "png", "pdf"]

# These fonts are narrower than DejaVu Sans, which figures are laid out with, so no text exceeds its room.
FONT = "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_LONG = re.compile(r"-?\d+\.\d{3,}")
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}

# In HTML, an SVG element must have no prefix.
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def write_report(report: Report, folder: Path, *, figures: Path | None = None) -> list[Path]:
    """Write the report into `folder`.

    Args:
        report: from `summary.summarise`.
        folder: the folder for report.html, report.md, report.json, and figures/ with every sheet as SVG and PNG.
        figures: another folder for every sheet as PDF, and as PNG at 300 dots per inch, for a paper.

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
                drawn.append((panel, themed_svg(panel.picture, f"f{number}")))
                advance(1)
        with styled(sheets.SIZE):
            for sheet in sheets.sheets(report):
                written += [_write_picture(sheet, folder / "figures", kind) for kind in ("svg", "png")]
                if figures is not None:
                    written += [_write_picture(sheet, figures, kind, dpi=300) for kind in ("pdf", "png")]
                pictures.append((sheet.name, sheet.caption))
                advance(1)
    # Not indented, because the orders by item are long lists of short numbers.
    numbers = json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n"
    texts = {"report.html": render(report, drawn), "report.md": markdown(report, pictures), "report.json": numbers}
    # The page is written last, when all other files are complete.
    for name, text in reversed(texts.items()):
        with write_atomically(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*(folder / name for name in texts), *written]


def _write_picture(picture: Picture, folder: Path, kind: Format, dpi: int = 160) -> Path:
    path = folder / f"{picture.name}.{kind}"
    with write_atomically(path) as temporary:
        if kind == "svg":
            temporary.write_text(svg(picture), encoding="utf-8")
        else:
            # Without the date and the version of matplotlib, equal figures give equal files.
            metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
            picture.figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata)
    return path


# SVG


def svg(picture: Picture) -> str:
    """The figure as an SVG file."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(_tree(picture), encoding="unicode") + "\n"


def themed_svg(picture: Picture, prefix: str) -> str:
    """The figure as markup for the page: its colours are the page's variables for light and dark, and its font is the page's.

    Args:
        picture: the figure.
        prefix: the beginning of all ids, which must differ from those of other figures on the page.
    """
    root = _tree(picture)
    # A style sheet inside an SVG would apply to the whole page.
    for child in list(root.findall(f"{{{_SVG}}}defs")):
        for sheet in child.findall(f"{{{_SVG}}}style"):
            child.remove(sheet)
        if not len(child):
            root.remove(child)
    # From points, 72 per inch, to CSS pixels, 96 per inch.
    width = float(root.get("viewBox", "0 0 1 1").split()[2]) * 4 / 3
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for element in root.iter():
        for name in ("id", _LINK, "clip-path"):
            if value := element.get(name):
                element.set(name, re.sub(r"^(url\(#|#|)", rf"\g<1>{prefix}-", value))
        if style := element.get("style"):
            style = style.replace(f"font-family: {FONT}; ", "")
            element.set("style", re.sub("#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), style))
    root.set("style", f"width:{width:.0f}px")
    root.set("role", "img")
    root.set("aria-label", plain(picture.caption, 400))
    return ET.tostring(root, encoding="unicode")


def _tree(picture: Picture) -> ET.Element:
    """The XML of a figure with its tooltips, without metadata and ids that nothing refers to."""
    buffer = io.StringIO()
    picture.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        # White space between elements has no meaning and takes room.
        element.tail = None
        if not (element.text or "").strip():
            element.text = None
        _shorten(element)
    _add_tips(root, picture.tips)
    used = {element.get(_LINK, "")[1:] for element in root.iter()}
    # The value of clip-path is url(#id).
    used |= {element.get("clip-path", "")[5:-1] for element in root.iter()}
    for element in root.iter():
        if element.get("id", "") not in used:
            element.attrib.pop("id", None)
    return root


def _shorten(element: ET.Element) -> None:
    """Remove rotations by 0, round coordinates to hundredths of a point, and set the fonts."""
    if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        del element.attrib["transform"]
    for name in ("d", "x", "y", "transform"):
        # Coordinates make up most of a file, and a hundredth of a point is invisible.
        if value := element.get(name):
            rounded = _LONG.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
            element.set(name, " ".join(rounded.split()))
    if style := element.get("style"):
        element.set("style", style.replace("'DejaVu Sans', sans-serif", FONT))


def _add_tips(root: ET.Element, tips: Tips) -> None:
    """Wrap every mark that has a tooltip in a group with a title."""
    for group in [element for element in root.iter(f"{{{_SVG}}}g") if element.get("id") in tips.marks]:
        texts = tips.marks[group.attrib.pop("id")]
        shapes = list(_shapes(group))
        # Unless there is one shape for each tooltip, the tooltips cannot be assigned, and the group gets the first.
        if len(texts) == 1 or len(texts) != len(shapes):
            _add_title(group, *texts[0])
            continue
        # From the last to the first, so that the places of the others stay valid.
        for (parent, place), (text, arm) in zip(reversed(shapes), reversed(texts), strict=True):
            mark = parent[place]
            parent.remove(mark)
            wrapped = ET.Element(f"{{{_SVG}}}g")
            wrapped.append(mark)
            _add_title(wrapped, text, arm)
            parent.insert(place, wrapped)


def _shapes(group: ET.Element) -> Iterator[tuple[ET.Element, int]]:
    """Yield the parent and the place of every shape that is drawn, in order; shapes in <defs> are not drawn."""
    for place, child in enumerate(group):
        if child.tag in (f"{{{_SVG}}}use", f"{{{_SVG}}}path"):
            yield group, place
        elif child.tag != f"{{{_SVG}}}defs":
            yield from _shapes(child)


def _add_title(group: ET.Element, text: str, arm: str) -> None:
    group.set("class", "mark")
    if arm:
        group.set("data-arm", plain(arm, 200))
    if text:
        # Browsers show the title of an element as its tooltip, and only if it is the first child.
        title = ET.Element(f"{{{_SVG}}}title")
        title.text = plain(text, 400)
        group.insert(0, title)
