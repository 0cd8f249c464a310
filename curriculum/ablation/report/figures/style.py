"""How figures look: the palette for light and dark, matplotlib's settings, and what a drawn figure carries with it.

Contract: figures are drawn in the light theme's colours alone; `svg.themed` turns those into the page's variables. Text from data
goes through `plain` and is never read as mathematics.
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

# Name -> light, dark. The labels' colours are Paul Tol's bright scheme; blue and orange, teal and purple stay apart for
# every common colour blindness, and kinds of arms differ in shape too.
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
    """The light theme's colour of that name."""
    return PALETTE[name][0]


def plain(text: object, limit: int = 34) -> str:
    """Text from data as a figure can show it: on one line, without control characters, cut with an ellipsis."""
    shown = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in str(text)).strip()
    return shown if len(shown) <= limit else shown[: limit - 1].rstrip() + "…"


def slug(text: str, limit: int = 40) -> str:
    """Text from data as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:limit]


@dataclass
class Tips:
    """What marks say when pointed at, and the arm that each belongs to. Add before the figure is written."""

    marks: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, artist: Any, text: str, arm: str = "") -> None:
        """Let `artist` as a whole say `text`."""
        self.add_each(artist, [(text, arm)])

    def add_each(self, artist: Any, said: Sequence[tuple[str, str]]) -> None:
        """Let the parts of a collection say one text each; (text, arm) pairs in the order of the parts."""
        name = f"mark-{len(self.marks)}"
        artist.set_gid(name)
        self.marks[name] = list(said)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure: its file name, what it shows in one sentence, and its marks' tips."""

    name: str
    caption: str
    figure: Any
    tips: Tips


def need_matplotlib() -> None:
    """Raise the error that names the extra when figures cannot be drawn."""
    need("matplotlib", "plots", "the figures of a report")


@contextlib.contextmanager
def styled(size: float = 8.5) -> Iterator[None]:
    """Matplotlib's settings of the house, with text of `size` points, for drawing and writing alike."""
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
        "axes.unicode_minus": True,
        "xtick.color": muted,
        "ytick.color": ink,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 0,
        "grid.color": colour("faint"),
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "sparsort",
        "pdf.fonttype": 42,
        "figure.facecolor": colour("paper"),
        "savefig.facecolor": colour("paper"),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A label in a script that the bundled font lacks: the SVG's text is right all the same.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        yield


def blank(width: float, height: float) -> Any:
    """An empty figure of that size in inches, with a canvas that can measure text."""
    need("matplotlib", "plots", "the figures of a report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def text_width(texts: Iterable[str], size: float) -> float:
    """Inches that the widest of some texts takes at `size` points."""
    figure = blank(1, 1)
    renderer = figure.canvas.get_renderer()
    widths = [figure.text(0, 0, text, fontsize=size).get_window_extent(renderer).width for text in texts]
    return max(widths, default=0.0) / 72
