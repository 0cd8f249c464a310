"""Demonstrations of a DSPy program, chosen and ordered by sparsort.

Contract: `SparsortFewShot` is a `Teleprompter` that sets the demonstrations of every predictor to examples of the
training set, the same objects, without a call of a model. They are set once for all queries, so selectors and orders
that look at the query are refused; examples of the validation set, exact or nearly so, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from sparsort.errors import SparsortError
from sparsort.extras import need
from sparsort.paths import spell
from sparsort.recipes.adapters.demonstrations import BY_QUERY, SELECTORS, DemoChooser, DemoOptions
from sparsort.values import is_missing

need("dspy", "dspy", "an optimiser of DSPy")

from dspy.primitives import Example  # noqa: E402
from dspy.teleprompt import Teleprompter  # noqa: E402

__all__ = ["DemoOptions", "SparsortFewShot", "order_examples"]

Program = TypeVar("Program")


class SparsortFewShot(Teleprompter):  # type: ignore[misc]
    """Set k training examples as the demonstrations of every predictor, in sparsort's order.

    Args:
        k: how many.
        options: how they are chosen and ordered. Without `prompt`, a validation example is compared by the input fields
            that its `with_inputs` names.

    Raises:
        SparsortError: the selector or the order needs a query.
    """

    def __init__(self, k: int, options: DemoOptions) -> None:
        _refuse_by_query(options)
        super().__init__()
        self.k = k
        self.options = options

    def compile(
        self, student: Program, *, trainset: Sequence[Example], valset: Sequence[Example] | None = None
    ) -> Program:
        """A copy of the program with demonstrations.

        Args:
            student: the program; it is not changed.
            trainset: the pool. Scores that are N numbers are in its order; a table finds a row by its id or its content.
            valset: what the program will be asked; nothing of it becomes a demonstration.

        Raises:
            SparsortError: fewer than k examples are left, one has no score, or only some of the chosen have all of a
                predictor's fields: DSPy puts those last, whatever their order.
        """
        options = _compared_by_inputs(self.options, trainset)
        chooser = DemoChooser(map(_row, trainset), options, held_out=map(_row, valset or ()))
        demos = [trainset[position] for position in chooser.choose(None, self.k)]
        compiled: Any = student.reset_copy()  # type: ignore[attr-defined]
        for name, predictor in compiled.named_predictors():
            _check_complete_alike(demos, list(predictor.signature.fields), name)
            predictor.demos = list(demos)
        program: Program = compiled
        return program


def order_examples(examples: Sequence[Example], options: DemoOptions) -> list[Example]:
    """The same examples, first to last, as `predictor.demos` takes them. `options.select` takes no part.

    Raises:
        SparsortError: the order needs a query, or an example has no score.
    """
    options = dataclasses.replace(options, select="first")
    _refuse_by_query(options)
    chooser = DemoChooser(map(_row, examples), options)
    return [examples[position] for position in chooser.choose(None, len(examples))]


def _row(example: Example) -> dict[str, Any]:
    return dict(example.items())


def _refuse_by_query(options: DemoOptions) -> None:
    if not options.by_query:
        return
    what = f"order {options.order!r}" if options.by_similarity else f"selection method {options.select!r}"
    raise SparsortError(
        f"the {what} looks at the query, but a DSPy program is compiled once for all queries. "
        f"Select by one of: {', '.join(name for name in SELECTORS if name not in BY_QUERY)}; "
        "order by difficulty, by length, or as they come."
    )


def _compared_by_inputs(options: DemoOptions, trainset: Sequence[Example]) -> DemoOptions:
    if options.prompt is not None or not trainset:
        return options
    try:
        names = list(trainset[0].inputs().keys())
    except ValueError:  # with_inputs was not called
        return options
    return dataclasses.replace(options, prompt=" ".join(f"{{{spell([name])}}}" for name in names) or None)


def _check_complete_alike(demos: Sequence[Example], fields: Sequence[str], predictor: str) -> None:
    lacking = [[name for name in fields if is_missing(demo.get(name))] for demo in demos]
    if any(lacking) and not all(lacking):
        names = dict.fromkeys(name for absent in lacking for name in absent)
        raise SparsortError(
            f"of the {len(demos)} demonstrations of the predictor {predictor!r}, {sum(map(bool, lacking))} lack "
            f"{' or '.join(names)}. DSPy puts incomplete demonstrations before complete ones, so their order would "
            "not hold. Give training examples that have the same fields."
        )
