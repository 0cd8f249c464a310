"""Demonstrations of a DSPy program, chosen and ordered by sparsort.

Contract: `SparsortFewShot` is a `Teleprompter` that sets the demonstrations of every predictor to examples of the
training set, the same objects, without a call of a model. They are set once for all queries, so selectors and orders
that look at the query are refused; examples of the validation set, exact or nearly so, are left out.

DSPy silently drops a demonstration that lacks every input or every output of a predictor's signature, and puts those that lack
some field before those that lack none. So a program that could use no demonstration is refused, as is a predictor that would use
only some or reorder them; a predictor that could use none, in a program where another can, gets none and is named in a warning.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from sparsort.errors import SparsortError
from sparsort.extras import need
from sparsort.paths import spell
from sparsort.recipes.adapters.demonstrations import SELECTORS, DemoChooser, DemoOptions
from sparsort.values import is_missing

need("dspy", "dspy", "an optimiser of DSPy")

from dspy.primitives import Example  # noqa: E402
from dspy.teleprompt import Teleprompter  # noqa: E402

__all__ = ["DemoOptions", "SparsortFewShot", "order_examples"]

Program = TypeVar("Program")
_LOG = logging.getLogger("sparsort")


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
            SparsortError: fewer than k examples are left, one has no score, no predictor has an input and an output among the
                fields of the chosen, or only some of the chosen have them, or have all of a predictor's fields: DSPy drops the
                first and moves the second, whatever their order.
        """
        options = _compared_by_inputs(self.options, trainset)
        chooser = DemoChooser(map(_row, trainset), options, held_out=map(_row, valset or ()))
        demos = [trainset[position] for position in chooser.choose(None, self.k)]
        compiled: Any = student.reset_copy()  # type: ignore[attr-defined]
        predictors = compiled.named_predictors()
        unused = {name: why for name, predictor in predictors if (why := _why_unused(demos, predictor.signature, name))}
        if len(unused) == len(predictors) and demos:
            raise SparsortError(
                f"no demonstration could be used. {' '.join(unused.values())} DSPy drops a demonstration that lacks every "
                "input or every output, and the program would run without any. Rename the fields of the training examples, "
                "or those of the signature, so that they agree."
            )
        for name, predictor in predictors:
            if name in unused:
                _LOG.warning("%s It gets no demonstrations.", unused[name])
            else:
                _check_kept_alike(demos, predictor.signature, name)
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
        f"Select by one of: {', '.join(SELECTORS.names(lambda entry: not entry.looks_at_query))}; "
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


def _why_unused(demos: Sequence[Example], signature: Any, predictor: str) -> str:
    """A sentence on why DSPy would show a predictor not one of the demonstrations, "" where it would show some."""
    if any(_is_shown(demo, signature) for demo in demos):
        return ""
    inputs, outputs = ", ".join(signature.input_fields), ", ".join(signature.output_fields)
    has = ", ".join(dict.fromkeys(name for demo in demos for name, value in demo.items() if not is_missing(value)))
    return (
        f"The predictor {predictor!r} has the inputs {inputs} and the outputs {outputs}; the training examples that were chosen "
        f"have {has or 'no field'}."
    )


def _is_shown(demo: Example, signature: Any) -> bool:
    """Whether a demonstration has an input and an output of the signature."""
    return all(
        any(not is_missing(demo.get(name)) for name in fields)
        for fields in (signature.input_fields, signature.output_fields)
    )


def _check_kept_alike(demos: Sequence[Example], signature: Any, predictor: str) -> None:
    lacking = [[name for name in signature.fields if is_missing(demo.get(name))] for demo in demos]
    if any(lacking) and not all(lacking):
        names = dict.fromkeys(name for absent in lacking for name in absent)
        raise SparsortError(
            f"of the {len(demos)} demonstrations of the predictor {predictor!r}, {sum(map(bool, lacking))} lack "
            f"{' or '.join(names)}. DSPy puts incomplete demonstrations before complete ones, so their order would "
            "not hold. Give training examples that have the same fields."
        )
    dropped = sum(not _is_shown(demo, signature) for demo in demos)
    if dropped:
        raise SparsortError(
            f"of the {len(demos)} demonstrations of the predictor {predictor!r}, {dropped} lack every input "
            f"({', '.join(signature.input_fields)}) or every output ({', '.join(signature.output_fields)}), and DSPy would show "
            "nothing of them. Give training examples that have the same fields."
        )
    if absent := [name for name in signature.input_fields if all(is_missing(demo.get(name)) for demo in demos)]:
        _LOG.warning(
            "The demonstrations of the predictor %r lack the input %s; DSPy shows them as incomplete examples.",
            predictor,
            ", ".join(absent),
        )
