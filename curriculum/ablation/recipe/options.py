"""The settings of an ablation's design that the command line has, too.

No torch and no NumPy: the command line reads the options of the fields before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsort.errors import unknown_choice
from sparsort.options import option, parts, whole_numbers

_PANEL = "Design"
# Each with its reverse: by name where it has one, else "reverse:…".
DEFAULT_ORDERERS: tuple[str, ...] = (
    "sparse_to_dense",
    "dense_to_sparse",
    "u_shape",
    "reverse:u_shape",
    "inverted_u",
    "reverse:inverted_u",
    "perplexity_ascending",
    "reverse:perplexity_ascending",
    "similarity_ascending",
    "similarity_descending",
    "length_ascending",
    "length_descending",
    "random_scores",
)
_CONTEXTUAL = {"off": (False,), "on": (True,), "both": (False, True)}


def _contextual(text: str) -> tuple[bool, ...]:
    if text not in _CONTEXTUAL:
        raise unknown_choice("setting of contextual calibration", text, _CONTEXTUAL)
    return _CONTEXTUAL[text]


@dataclass(frozen=True, kw_only=True)
class DesignOptions:
    """What an ablation compares, and how often; `Ablation` says what each setting means."""

    shots: tuple[int, ...] = option(
        (4, 8),
        "Demonstrations in a prompt [default: 4,8].",
        panel=_PANEL,
        short="-k",
        kind=str | None,
        read=whole_numbers("--shots"),
    )
    sets: int = option(10, "Demonstration sets.", panel=_PANEL)
    first_seed: int = option(0, "Seed of the first set.", panel=_PANEL)
    selectors: tuple[str, ...] = option(
        ("random",),
        "How sets are drawn: {names} [default: random].",
        names="curriculum.ablation.recipe.selectors:SELECTORS",
        panel=_PANEL,
        kind=str | None,
        read=parts,
    )
    orderers: tuple[str, ...] = option(
        DEFAULT_ORDERERS,
        "Orders to compare: {names}; or reverse:ORDER [default: all, with their reverses].",
        names="curriculum.demos.order:ORDERS",
        panel=_PANEL,
        kind=str | None,
        read=parts,
    )
    choosers: tuple[str, ...] = option(
        ("globale", "locale", "pdo", "pdo_prior", "best_on_dev", "density"),
        "Criteria that choose an order by the model [default: globale, locale, pdo, pdo_prior, best_on_dev, density].",
        panel=_PANEL,
        kind=str | None,
        read=parts,
    )
    random_orders: int = option(16, "Random orders of each set.", panel=_PANEL)
    test_rows: int = option(256, "Test rows.", panel=_PANEL)
    dev_rows: int = option(32, "Rows that choose an order.", panel=_PANEL)
    label_score: Literal["sum", "mean"] = option("sum", "sum or mean of a label's tokens.", panel=_PANEL)
    calibrated: tuple[bool, ...] = option(
        (False, True),
        "Contextual calibration: off, on or both [default: both].",
        panel=_PANEL,
        parameter="contextual",
        kind=str | None,
        read=_contextual,
    )
    max_demo_chars: int | None = option(None, "Leave out longer demonstrations.", panel=_PANEL)
