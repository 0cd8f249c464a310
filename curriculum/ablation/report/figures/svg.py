"""Drawn figures as files and as markup: SVG that stands by itself, SVG for the page, PNG and PDF.

Contract: equal figures give equal bytes. In `svg` every mark that was given a tip says it when pointed at. `themed` is the
same for the page: palette colours become CSS variables, so that it follows light and dark; text takes the page's font; ids
are the figure's own. Everything from data passes through an XML writer. To be called inside `style.styled()`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from sparsort.curriculum.ablation.report.figures.style import PALETTE, Picture, Tips, plain
from sparsort.storage.files import write_atomically

Format = Literal["svg", "png", "pdf"]

# Narrower than the font that figures are laid out with, so that nothing grows beyond the room it was given.
FONT = "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_LONG = re.compile(r"-?\d+\.\d{3,}")
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}

ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def svg(picture: Picture) -> str:
    """The figure as an SVG file."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(_tree(picture), encoding="unicode") + "\n"


def themed(picture: Picture, prefix: str) -> str:
    """The figure as markup for the page; `prefix` makes its ids differ from those of other figures there."""
    root = _tree(picture)
    for child in list(root.findall(f"{{{_SVG}}}defs")):
        for sheet in child.findall(f"{{{_SVG}}}style"):
            child.remove(sheet)
        if not len(child):
            root.remove(child)
    width = float(root.get("viewBox", "0 0 1 1").split()[2]) * 4 / 3
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for element in root.iter():
        for name in ("id", _LINK, "clip-path"):
            if given := element.get(name):
                element.set(name, re.sub(r"^(url\(#|#|)", rf"\g<1>{prefix}-", given))
        if style := element.get("style"):
            style = style.replace(f"font-family: {FONT}; ", "")
            element.set(
                "style", re.sub("#[0-9a-f]{6}", lambda found: _VARIABLES.get(found.group(), found.group()), style)
            )
    root.set("style", f"width:{width:.0f}px")
    root.set("role", "img")
    root.set("aria-label", plain(picture.caption, 400))
    return ET.tostring(root, encoding="unicode")


def write(picture: Picture, folder: Path, kind: Format, dpi: int = 160) -> Path:
    """Write the figure into `folder` and return its path.

    Raises:
        SparsortError: the folder cannot be written.
    """
    path = folder / f"{picture.name}.{kind}"
    with write_atomically(path) as temporary:
        if kind == "svg":
            temporary.write_text(svg(picture), encoding="utf-8")
        else:
            metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
            picture.figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata)
    return path


def _tree(picture: Picture) -> ET.Element:
    buffer = io.StringIO()
    picture.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        element.tail = None
        if not (element.text or "").strip():
            element.text = None
        _lighten(element)
    _add_tips(root, picture.tips)
    used = {element.get(_LINK, "")[1:] for element in root.iter()}
    used |= {element.get("clip-path", "")[5:-1] for element in root.iter()}
    for element in root.iter():
        if element.get("id", "") not in used:
            element.attrib.pop("id", None)
    return root


def _lighten(element: ET.Element) -> None:
    """Leave out turns by nothing, and round coordinates to hundredths of a point; set our fonts."""
    if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        del element.attrib["transform"]
    for name in ("d", "x", "y", "transform"):
        if given := element.get(name):
            short = _LONG.sub(lambda found: f"{float(found.group()):.2f}".rstrip("0").rstrip("."), given)
            element.set(name, " ".join(short.split()))
    if style := element.get("style"):
        element.set("style", style.replace("'DejaVu Sans', sans-serif", FONT))


def _add_tips(root: ET.Element, tips: Tips) -> None:
    """Wrap every mark with a tip into a group with a title; a group with other than one mark a tip gets one title as a whole."""
    for group in [element for element in root.iter(f"{{{_SVG}}}g") if element.get("id") in tips.marks]:
        said = tips.marks[group.attrib.pop("id")]
        drawn = list(_drawn(group))
        if len(said) == 1 or len(said) != len(drawn):
            _entitle(group, *said[0])
            continue
        for (parent, place), (text, arm) in zip(reversed(drawn), reversed(said), strict=True):
            mark = parent[place]
            parent.remove(mark)
            wrapped = ET.Element(f"{{{_SVG}}}g")
            wrapped.append(mark)
            _entitle(wrapped, text, arm)
            parent.insert(place, wrapped)


def _drawn(group: ET.Element) -> Iterator[tuple[ET.Element, int]]:
    """Parent and place of every shape that is drawn, in order; what stands in <defs> is not."""
    for place, child in enumerate(group):
        if child.tag in (f"{{{_SVG}}}use", f"{{{_SVG}}}path"):
            yield group, place
        elif child.tag != f"{{{_SVG}}}defs":
            yield from _drawn(child)


def _entitle(group: ET.Element, text: str, arm: str) -> None:
    group.set("class", "mark")
    if arm:
        group.set("data-arm", plain(arm, 200))
    if text:
        title = ET.Element(f"{{{_SVG}}}title")
        title.text = plain(text, 400)
        group.insert(0, title)
