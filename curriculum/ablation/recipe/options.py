"""The fields of a recipe that are also options of the command line.

Contract: importing this module imports neither torch nor NumPy, because `--help` reads the options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsort.errors import unknown_choice
from sparsort.options import option, parts, whole_numbers

_PANEL = "Design"
# Each order is followed by its reverse, which is an entry of its own or "reverse:NAME".
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
    """The design of an ablation: what is compared, and how often. `Ablation` documents the fields."""

    shots: tuple[int, ...] = option(
        (4, 8),
        "Demonstrations in a prompt [default: 4,8].",
        panel=_PANEL,
        short="-k",
        kind=str | None,
        read=whole_numbers("--shots"),
    )
    sets: int = option(10, "Number of demonstration sets.", panel=_PANEL)
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
        "Criteria that choose an order with the model's help: {names} "
        "[default: globale, locale, pdo, pdo_prior, best_on_dev, density].",
        names="curriculum.demos.criteria:CRITERIA",
        panel=_PANEL,
        kind=str | None,
        read=parts,
    )
    random_orders: int = option(16, "Number of random orders of each set.", panel=_PANEL)
    test_rows: int = option(256, "Number of test rows.", panel=_PANEL)
    dev_rows: int = option(32, "Rows by which criteria choose an order.", panel=_PANEL)
    label_score: Literal["sum", "mean"] = option("sum", "sum or mean over a label's tokens.", panel=_PANEL)
    calibrated: tuple[bool, ...] = option(
        (False, True),
        "Contextual calibration: off, on or both [default: both].",
        panel=_PANEL,
        parameter="contextual",
        kind=str | None,
        read=_contextual,
    )
    max_demo_chars: int | None = option(None, "Exclude longer demonstrations.", panel=_PANEL)
