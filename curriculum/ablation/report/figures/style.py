"""The style of all figures: the palette for the light and the dark theme, matplotlib's settings, and the parts of a drawn figure.

Contract: figures are drawn only in the colours of the light theme, which `write.themed_svg` replaces by the page's variables.
Text from data goes through `plain` and is never parsed as mathematics.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsort.extras import need

# Name → light, dark. The colours of labels are Paul Tol's bright scheme. Blue and orange, and teal and purple, are
# distinguishable with every common form of colour blindness, and the kinds of arms also differ in shape. No two light colours may
# be equal, because `write.themed_svg` identifies a colour by its light value.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e6e9ec"),
    "muted": ("#59636d", "#a4adb6"),
    "faint": ("#dde1e5", "#363d45"),
    "band": ("#eff2f5", "#20262d"),
    "paper": ("#ffffff", "#14181c"),
    "random": ("#98a2ac", "#77828d"),
    "helps": ("#0b69b0", "#5cb1f2"),
    "hurts": ("#c44d15", "#f28e5c"),
    "named": ("#14786b", "#4cc2b0"),
    "chosen": ("#86399a", "#d493e6"),
    "label0": ("#4477aa", "#5a8fc4"),
    "label1": ("#ee6677", "#e8707f"),
    "label2": ("#228833", "#3fa550"),
    "label3": ("#ccbb44", "#d6c655"),
    "label4": ("#66ccee", "#5fbfe0"),
    "label5": ("#aa3377", "#c65a97"),
    "label6": ("#997700", "#b8942b"),
    "rest": ("#bbbbbc", "#83878b"),
}
LABEL_COLOURS = tuple(name for name in PALETTE if name.startswith("label"))
KIND_COLOUR = {"named": "named", "chosen": "chosen", "oracle": "muted", "random": "random"}
KIND_MARKER = {"named": "o", "chosen": "D", "oracle": "|", "random": "o"}
KIND_NAME = {"named": "rules", "chosen": "chosen with the model", "oracle": "oracles", "random": "random orders"}


def colour(name: str) -> str:
    """The colour of that name in the light theme."""
    return PALETTE[name][0]


def plain(text: object, limit: int = 34) -> str:
    """Text from data on one line without control characters, cut with an ellipsis after `limit` characters."""
    # The Unicode categories C and Z are control characters and separators.
    line = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in str(text)).strip()
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def slug(text: str, limit: int = 40) -> str:
    """Text from data in a form that can be a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:limit]


# The text of a mark's tooltip, and the arm that the mark belongs to, or "".
Tip = tuple[str, str]


@dataclass
class Tips:
    """The tooltips of marks by the id of the mark in the SVG. They must be added before the figure is written."""

    marks: dict[str, list[Tip]] = field(default_factory=dict)

    def add(self, artist: Any, text: str, arm: str = "") -> None:
        """Give one tooltip to the whole of an artist."""
        self.add_each(artist, [(text, arm)])

    def add_each(self, artist: Any, tips: Sequence[Tip]) -> None:
        """Give a tooltip to each part of a collection, in the order of the parts."""
        # matplotlib writes the gid of an artist as the id of its group in the SVG.
        name = f"mark-{len(self.marks)}"
        artist.set_gid(name)
        self.marks[name] = list(tips)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure with its file name, a caption of one sentence, and the tooltips of its marks."""

    name: str
    caption: str
    figure: Any
    tips: Tips


def need_matplotlib() -> None:
    """Raise an error that names the extra to install if matplotlib is missing."""
    need("matplotlib", "plots", "the figures of a report")


@contextlib.contextmanager
def styled(size: float = 8.5) -> Iterator[None]:
    """Apply the settings for matplotlib, with text of `size` points; figures must be drawn and written inside the block."""
    matplotlib = need("matplotlib", "plots", "the figures of a report")
    ink, muted = colour("ink"), colour("muted")
    settings = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": size,
        "axes.titlesize": size + 0.5,
        "axes.labelsize": size,
        "xtick.labelsize": size - 0.5,
        "ytick.labelsize": size,
        # A name such as "$x$" is data and not mathematics.
        "text.parse_math": False,
        "text.color": ink,
        "axes.edgecolor": muted,
        "axes.labelcolor": muted,
        "axes.titlecolor": ink,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        # A minus sign instead of a hyphen, as in the texts of the report.
        "axes.unicode_minus": True,
        "xtick.color": muted,
        "ytick.color": ink,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 0,
        "grid.color": colour("faint"),
        "grid.linewidth": 0.6,
        # Text stays text in SVG, and the salt makes ids the same in every run; type 42 embeds fonts as TrueType in PDF.
        "svg.fonttype": "none",
        "svg.hashsalt": "sparsort",
        "pdf.fonttype": 42,
        "figure.facecolor": colour("paper"),
        "savefig.facecolor": colour("paper"),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The bundled font lacks some scripts. The text in the SVG is correct nevertheless.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        yield


def blank(width: float, height: float) -> Any:
    """An empty figure of `width` × `height` inches, with a canvas that can measure text."""
    need_matplotlib()
    # Not through pyplot, which keeps every figure alive and may open windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # At 72 dots per inch, a pixel is a point.
    figure = Figure(figsize=(width, height), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def text_width(texts: Iterable[str], size: float) -> float:
    """The width in inches of the widest text at `size` points."""
    figure = blank(1, 1)
    renderer = figure.canvas.get_renderer()
    widths = [figure.text(0, 0, text, fontsize=size).get_window_extent(renderer).width for text in texts]
    return max(widths, default=0.0) / 72
