"""What scikit-learn's users pass to a classifier: rows, prompt, classes and prior, checked before a model is loaded.

Contract: an array or a list of lists is validated by scikit-learn, with its errors, and its columns are named x0, x1, …, like
those of a frame whose columns have no text as names; anything else is read by `rows_of`. A class keeps the type that it has
in `y`; a task knows classes by their text. Shapes: n rows, L classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils.validation import validate_data

from sparsort.curriculum.ablation.recipe.tasks import Task, task_from_flags
from sparsort.curriculum.demos.criteria.distributions import Floats
from sparsort.curriculum.demos.criteria.label_bias import PriorName, given_shares, named_shares
from sparsort.errors import SparsortError
from sparsort.paths import spell
from sparsort.scoring.data.rows import rows_of
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.values import as_text

Prior = PriorName | Mapping[Any, float]
Row = dict[str, Any]


class ClassifierError(SparsortError, ValueError):
    """A mistake in the arguments of a classifier; scikit-learn expects a ValueError."""


def estimator_rows(estimator: Any, X: Any, *, reset: bool) -> list[Row]:
    """The rows of `X`, one dictionary each.

    Args:
        estimator: the estimator; for arrays and frames its `n_features_in_` and `feature_names_in_` are set or checked.
        X: anything that holds rows.
        reset: whether the estimator is being fitted.

    Raises:
        ValueError: an array that scikit-learn refuses.
        SparsortError: as `rows_of`.
    """
    if _is_array(X):
        values = validate_data(estimator, X, reset=reset, dtype=None).tolist()
        return [{f"x{at}": value for at, value in enumerate(row)} for row in values]
    # A lazy frame of polars computes its columns, with a warning, so they are asked for last.
    if hasattr(X, "iloc") and hasattr(X, "columns"):
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        if not all(isinstance(name, str) for name in X.columns):
            X = X.set_axis([f"x{at}" for at in range(len(X.columns))], axis="columns")
    # Ids play no part here, so that rows drawn with replacement may repeat them.
    return [dict(row) for row in rows_of(X)]


def class_names(classes: Sequence[Any]) -> list[str]:
    """The text of each class, which must differ.

    Raises:
        ClassifierError: fewer than two classes, or two with the same text.
    """
    names = [as_text(value, field="y", where="y") for value in classes]
    if len(names) < 2:
        raise ClassifierError(
            f"y has the single class {names[0]!r}; a classifier needs at least two classes. Pass rows of every class."
        )
    if len(set(names)) < len(names):
        raise ClassifierError(f"two classes of y have the same text: {', '.join(names)}. Give each its own name.")
    return names


def label_field(rows: Sequence[Row]) -> str:
    """A name for the field of the class that the rows do not have yet."""
    name = "label"
    while rows and name in rows[0]:
        name += "_"
    return name


def make_task(
    rows: Sequence[Row],
    names: Sequence[str],
    prompt: PromptSpec,
    *,
    label: str,
    words: Mapping[Any, str] | None,
    separator: str,
    instruction: str,
) -> Task:
    """The few-shot task of a classifier.

    Without a prompt, every field of the first row gets a line of its own, followed by the label's.

    Raises:
        SparsortError: a prompt that does not fit the rows, or words that do not fit the classes.
    """
    if prompt.template is None:
        fields = [{name: value for name, value in rows[0].items() if name != label}]
        prompt = PromptSpec.of(f"{default_template(fields)}\nlabel:", **_other_fields(prompt))
    given = {str(key): text for key, text in (words or {}).items()}
    if unknown := sorted(given.keys() - set(names)):
        raise ClassifierError(f"label_words has {unknown[0]!r}, which is not a class of y: {', '.join(names)}.")
    return task_from_flags(
        rows,
        prompt=prompt.for_demonstrations,
        answer=prompt.answer,
        label=label,
        labels={name: given.get(name, name) for name in names},
        name="classifier",
        separator=separator,
        instruction=instruction,
        chat=prompt.chat,
        system=prompt.system,
    )


def prior_shares(prior: Prior | None, classes: Sequence[Any], counts_L: NDArray[np.int64]) -> Floats | None:
    """The share of each class among the queries, (L,), or None if it is to be estimated.

    Args:
        prior: as `FewShotClassifier`; None for "uniform".
        classes: (L,) the classes.
        counts_L: rows of each class in the training data.

    Raises:
        SparsortError: an unknown name, or shares that do not fit the classes.
    """
    if isinstance(prior, Mapping):
        return given_shares([str(value) for value in classes], prior, "prior")
    name = "uniform" if prior is None else prior
    if not isinstance(name, str) or name not in get_args(PriorName):
        raise ClassifierError(
            f"prior is {prior!r}; expected one of {', '.join(get_args(PriorName))}, or a share for every class, such as "
            f"{{{classes[0]!r}: 0.8, …}}."
        )
    return None if name == "estimated" else named_shares(name, counts_L)


def default_template(rows: Sequence[Row]) -> str:
    """Every field of the first row on a line of its own, with its name."""
    return "\n".join(f"{_plain(name)}: {{{spell([name])}}}" for name in rows[0])


def _plain(name: str) -> str:
    """A column's name as literal text of a template."""
    return name.replace("{", "{{").replace("}", "}}")


def _other_fields(prompt: PromptSpec) -> Any:
    return {name: getattr(prompt, name) for name in ("answer", "system", "chat")}


def _is_array(X: Any) -> bool:
    if isinstance(X, np.ndarray):
        return X.ndim != 1 or not len(X) or X.dtype.kind not in "OU"
    if issparse(X) or hasattr(X, "__array_interface__") or (hasattr(X, "__array__") and not hasattr(X, "columns")):
        return not hasattr(X, "to_list")
    return isinstance(X, Sequence) and bool(len(X)) and isinstance(X[0], (list, tuple, np.ndarray))
