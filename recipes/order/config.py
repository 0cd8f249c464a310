"""What `sparsort order` selects, how it orders that, and how the prompt is put together.

No torch and no NumPy: the command line reads the options of the fields before anything heavy is imported.
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
    """What to select, how to order it, and how the prompt is put together.

    `order` is None for the hardest first: by sparsity, `sparse_to_dense`; by any other score, `hard_to_easy`. An
    option that differs from its default and has no effect is refused by `order_file`; see `recipes.order.conditions`.
    """

    prompt: PromptSpec = PromptSpec()
    data: DataSpec = DataSpec()
    k: int | None = option(
        None, "Demonstrations to select [default: all of FILE, up to 64].", flag="--shots", short="-k"
    )
    select: str = option(
        "random", "random, first, ids, balanced, bm25, knn, mmr, kdpp, vote_k, spread or difficulty_matched."
    )
    ids: tuple[str, ...] | None = option(None, "Comma-separated ids, for --select ids.", kind=str | None, read=_ids)
    label: str | None = option(None, "Label column, for --select balanced.")
    order: str | None = option(
        None,
        "sparse_to_dense, dense_to_sparse, easy_to_hard, …, or reverse:ORDER "
        "[default: the hardest first: sparse_to_dense by sparsity, hard_to_easy by any other score].",
    )
    max_tokens: int | None = option(None, "Token budget of the whole prompt.")
    drop: Any = option("farthest", "What a budget drops: farthest, nearest, longest or error.", kind=str)
    separator: str = option("\n\n", "Between demonstrations.", read=unescape)
    missing: Any = option(
        "error", "What happens to a demonstration without a score: error, first, last or drop.", kind=str
    )
    embedder: str | None = option(None, "Sentence embedder for knn and the like [default: the model's own states].")
    allow_leaks: bool = option(False, "Allow the query among its own demonstrations.")
    allow_zero_shot: bool = option(False, "Allow a budget to drop every demonstration.")
    seed: int = option(0, "Seed of random selection and order.")
