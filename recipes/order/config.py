"""The configuration of `sparsort order`: selection, order, and assembly of the prompt.

Contract: this module imports neither torch nor NumPy, because the command line reads the options of the fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsort.options import names_in, option, unescape
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec


def _ids(text: str | None) -> tuple[str, ...] | None:
    return names_in(text) if text else None


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """How demonstrations are selected, ordered and put into a prompt.

    If `order` is None, the hardest demonstration comes first: the order is `sparse_to_dense` for sparsity, and `hard_to_easy` for
    any other score. `order_file` refuses an option that differs from its default and has no effect; see
    `recipes.order.conditions`.
    """

    prompt: PromptSpec = PromptSpec()
    data: DataSpec = DataSpec()
    k: int | None = option(
        None, "Demonstrations to select [default: all of FILE, up to 64].", flag="--shots", short="-k"
    )
    select: str = option("random", "{names}.", names="curriculum.demos.select:SELECTORS")
    ids: tuple[str, ...] | None = option(None, "Comma-separated ids, for --select ids.", kind=str | None, read=_ids)
    label: str | None = option(None, "Label column, for --select balanced.")
    order: str | None = option(
        None,
        "{names}; or reverse:ORDER [default: the hardest first: sparse_to_dense for sparsity, hard_to_easy for other scores].",
        names="curriculum.demos.order:ORDERS",
    )
    max_tokens: int | None = option(None, "Token budget of the whole prompt.")
    drop: Any = option("farthest", "What --max-tokens drops: {names}.", names="curriculum.demos.prompt:Drop", kind=str)
    separator: str = option("\n\n", "Text between demonstrations.", read=unescape)
    missing: Any = option(
        "error",
        "What happens to a demonstration without a score: {names}.",
        names="curriculum.demos.order:Missing",
        kind=str,
    )
    embedder: str | None = option(
        None, "Sentence embedder for --select knn and the like [default: the model's own states]."
    )
    allow_leaks: bool = option(False, "Allow the query among its own demonstrations.")
    allow_zero_shot: bool = option(False, "Allow --max-tokens to drop every demonstration.")
    seed: int = option(0, "Seed of a random selection or order.")
