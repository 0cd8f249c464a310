"""Few-shot examples of a LangChain prompt, chosen and ordered by sparsort.

Contract: `SparsortExampleSelector` is a `BaseExampleSelector` for `FewShotPromptTemplate`. The input variables of the prompt are
the query. An example that is the query itself, or nearly so, is not chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsort.extras import need
from sparsort.recipes.adapters.demonstrations import DemoChooser, DemoOptions
from sparsort.scoring.data.rows import rows_of

need("langchain_core", "langchain", "example selectors of LangChain")

from langchain_core.example_selectors import BaseExampleSelector  # noqa: E402

__all__ = ["DemoOptions", "SparsortExampleSelector"]


class SparsortExampleSelector(BaseExampleSelector):  # type: ignore[misc]
    """Choose k of the examples for every input, and order them.

    Args:
        examples: the pool, in any form that `open_rows` reads.
        k: the number of examples in a prompt.
        options: how they are chosen and ordered.
    """

    def __init__(self, examples: Any, k: int, options: DemoOptions) -> None:
        self.examples: list[dict[str, Any]] = [dict(example) for example in rows_of(examples)]
        self.k = k
        self.options = options
        self._chooser: DemoChooser | None = None

    def add_example(self, example: Mapping[str, Any]) -> None:
        """Add an example to the pool. Its score has to be in `options.scores`, or in the example itself."""
        self.examples.append(dict(example))
        self._chooser = None

    def select_examples(self, input_variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Copies of the chosen examples, first to last; the last one is next to the query.

        Raises:
            SparsortError: fewer than k examples remain, or one has no score.
        """
        if self._chooser is None:
            self._chooser = DemoChooser(self.examples, self.options)
        return [dict(self.examples[position]) for position in self._chooser.choose(input_variables, self.k)]
