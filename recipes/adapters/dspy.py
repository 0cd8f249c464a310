"""Demonstrations of a DSPy program, chosen and ordered by sparsort.

Contract: `SparsortFewShot` is a `Teleprompter` that sets the demonstrations of every predictor to examples of the
training set, the same objects, without a call of a model. They are set once for all queries, so selectors and orders
that depend on the query are refused. Examples of the validation set, exact or nearly so, are excluded.

DSPy silently drops a demonstration that lacks every input or every output of a predictor's signature, and puts demonstrations
that lack some field before complete ones. A program that could use no demonstration is therefore refused, and so is a predictor
that would use only some of them or reorder them. If a predictor could use no demonstration, but another predictor of the program
could, it gets none and is named in a warning.
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
        k: the number of demonstrations.
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
            valset: the queries of the program; no example of it becomes a demonstration.

        Raises:
            SparsortError: fewer than k examples remain; an example has no score; the chosen examples have no input and output of
                any predictor; or only some of them have these, or have all fields of a predictor, so that DSPy would drop the
                former or reorder the latter.
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
    """The same examples, first to last, for `predictor.demos`. `options.select` has no effect.

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
    method = f"order {options.order!r}" if options.by_similarity else f"selection method {options.select!r}"
    raise SparsortError(
        f"the {method} depends on the query, but a DSPy program is compiled once for all queries. "
        f"Select by one of: {', '.join(SELECTORS.names(lambda entry: not entry.looks_at_query))}; "
        "order by difficulty, by length, or as they come."
    )


def _compared_by_inputs(options: DemoOptions, trainset: Sequence[Example]) -> DemoOptions:
    if options.prompt is not None or not trainset:
        return options
    try:
        names = list(trainset[0].inputs().keys())
    except ValueError:
        # `with_inputs` was not called, so the example does not say which fields are inputs.
        return options
    return dataclasses.replace(options, prompt=" ".join(f"{{{spell([name])}}}" for name in names) or None)


def _why_unused(demos: Sequence[Example], signature: Any, predictor: str) -> str:
    """A sentence that says why DSPy would show no demonstration to a predictor; "" if it would show some."""
    if any(_is_shown(demo, signature) for demo in demos):
        return ""
    inputs, outputs = ", ".join(signature.input_fields), ", ".join(signature.output_fields)
    has = ", ".join(dict.fromkeys(name for demo in demos for name, value in demo.items() if not is_missing(value)))
    return (
        f"The predictor {predictor!r} has the inputs {inputs} and the outputs {outputs}; the chosen training examples "
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
