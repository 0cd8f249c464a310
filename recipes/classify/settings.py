"""The rows, classes and priors of a classifier, checked before a model is loaded.

Contract: a class keeps the type that it has in `y`; a task knows classes by their text. Shapes: n rows, L classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.tasks import Task, task_from_flags
from sparsort.curriculum.demos.criteria.distributions import Floats
from sparsort.curriculum.demos.select import SELECTORS
from sparsort.errors import SparsortError
from sparsort.paths import spell
from sparsort.registry import Registry
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.values import as_text

PriorName = Literal["uniform", "pool", "mixed", "estimated"]
Prior = PriorName | Mapping[Any, float]
Row = dict[str, Any]

# All rows share one prompt, so its demonstrations cannot depend on the row.
USABLE_SELECTORS = Registry(SELECTORS.kind, (entry for entry in SELECTORS.values() if entry.needs <= {"label"}))


class ClassifierError(SparsortError, ValueError):
    """A mistake in the arguments of a classifier; scikit-learn expects a ValueError."""


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
    """A name for the field of the class that no row has already."""
    taken = {name for row in rows[:1] for name in row}
    name = "label"
    while name in taken:
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
        ClassifierError: an unknown name, or shares that do not fit the classes.
    """
    uniform = np.full(len(classes), 1.0 / len(classes))
    pool = counts_L / counts_L.sum()
    if prior is None:
        return uniform
    if isinstance(prior, Mapping):
        return _given_shares(prior, classes)
    shares: dict[str, Floats | None] = {
        "uniform": uniform,
        "pool": pool,
        "mixed": (uniform + pool) / 2,
        "estimated": None,
    }
    if not isinstance(prior, str) or prior not in shares:
        raise ClassifierError(
            f"prior is {prior!r}; expected one of {', '.join(get_args(PriorName))}, or a share for every class, such as "
            f"{{{classes[0]!r}: 0.8, …}}."
        )
    return shares[prior]


def _given_shares(prior: Mapping[Any, float], classes: Sequence[Any]) -> Floats:
    by_text = {str(key): value for key, value in prior.items()}
    if sorted(by_text) != sorted(map(str, classes)):
        raise ClassifierError(
            f"prior has shares for {sorted(by_text)}; the classes are {sorted(map(str, classes))}. Give each one share."
        )
    shares = np.array([float(by_text[str(value)]) for value in classes])
    if not all(0.0 < share < math.inf for share in shares):
        raise ClassifierError(f"prior is {dict(prior)!r}; every share must be a number above 0.")
    normalised: Floats = shares / shares.sum()
    return normalised


def default_template(rows: Sequence[Row]) -> str:
    """Every field of the first row on a line of its own, with its name."""
    return "\n".join(f"{_plain(name)}: {{{spell([name])}}}" for name in rows[0])


def _plain(name: str) -> str:
    """A column's name as literal text of a template."""
    return name.replace("{", "{{").replace("}", "}}")


def _other_fields(prompt: PromptSpec) -> Any:
    return {name: getattr(prompt, name) for name in ("answer", "system", "chat")}
