"""The selectors of an ablation: those of `demos.select` that can draw several sets, and two that query the model.

Contract: `SELECTORS` is the one place that lists them. A selector that has a seed draws one set for each seed. A selector without
a seed would always choose the same set, so it chooses from a half of the pool that is drawn with the seed (`splits.draw_half`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsort.curriculum.demos.select import SELECTORS as DEMO_SELECTORS
from sparsort.curriculum.demos.select import DemoSelectorEntry
from sparsort.curriculum.demos.select.selectors import select_nearest
from sparsort.errors import SparsortError
from sparsort.registry import Registry

ModelSelectorName = Literal["topk_cone", "topk_mdl"]


@dataclass(frozen=True, kw_only=True)
class ModelSelectorEntry(DemoSelectorEntry):
    """A selector that queries the model about the nearest neighbours of each query, which `function` finds.

    Attributes:
        model_scores: "query" if the model scores the query's own text after each neighbour alone; "labels" if it scores the
            labels after several sets of neighbours.
    """

    name: ModelSelectorName
    model_scores: Literal["query", "labels"]


MODEL_SELECTORS = Registry(
    "selector",
    (
        ModelSelectorEntry(
            name="topk_cone",
            help="those nearest neighbours of each query that, shown alone, make the query's own text least surprising",
            source="TopK + ConE, arXiv 2401.12087",
            needs=frozenset({"embeddings", "query_embedding"}),
            function=select_nearest,
            model_scores="query",
        ),
        ModelSelectorEntry(
            name="topk_mdl",
            help="among several sets of each query's nearest neighbours, the one under which the predicted label is most certain",
            source="TopK + MDL, arXiv 2212.10375",
            needs=frozenset({"embeddings", "query_embedding"}),
            function=select_nearest,
            model_scores="labels",
        ),
    ),
)


def _draws_several(entry: DemoSelectorEntry) -> bool:
    """Whether another seed, or another half of the pool, gives another set."""
    # A selector without a seed that needs nothing takes the first rows of the file, and one with `names_rows` takes the rows that
    # the caller lists. Both give the same set every time.
    return entry.is_seeded or bool(entry.needs and not entry.names_rows)


SELECTORS: Registry[DemoSelectorEntry] = Registry(
    "selector", (*(entry for entry in DEMO_SELECTORS.values() if _draws_several(entry)), *MODEL_SELECTORS.values())
)


def check_selector(name: str) -> DemoSelectorEntry:
    """The entry of a selector.

    Raises:
        SparsortError: there is no such selector, or it cannot draw several sets.
    """
    if name in DEMO_SELECTORS and name not in SELECTORS:
        raise SparsortError(
            f"the selector {name!r} gives one set only, and an ablation compares several. Choose one of: "
            f"{', '.join(SELECTORS)}."
        )
    return SELECTORS.check(name)


def looks_at_query(name: str) -> bool:
    """Whether a selector of `SELECTORS` gives each query its own demonstrations."""
    return SELECTORS[name].looks_at_query
