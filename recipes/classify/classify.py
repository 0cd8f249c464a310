"""Classify the rows of a file with a few-shot prompt, and look at the errors: the recipe for `sparsort classify`.

Contract: the predictions are those of `FewShotClassifier` with the same settings. Test rows never take part in `fit`, except that
with the prior "estimated" their texts are read, without labels, to estimate the label shares. Balanced accuracy and proper
scores are reported next to accuracy, because accuracy alone rewards the most frequent label.

Shapes: n test rows, L classes.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.splits import alike_rows
from sparsort.errors import SparsortError
from sparsort.paths import column_of
from sparsort.recipes.classify.spec import ClassifySpec
from sparsort.scoring.data.rows import RowSource
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import DataSpec
from sparsort.storage.files import write_atomically, write_json
from sparsort.values import text_if_any, without

if TYPE_CHECKING:
    from sparsort.recipes.classify.classifier import FewShotClassifier

PREDICTIONS, RESULTS = "predictions.jsonl", "results.json"
_HELD_OUT, _MOST_HELD_OUT = 0.2, 256
_WORST_ERRORS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Classified:
    """Predictions for the test rows, and how good they are.

    Attributes:
        ids: (n,) ids of the test rows.
        texts: (n,) the query of each row, as the prompt contains it.
        classes: (L,) the classes as text.
        proba: (n, L) probabilities.
        gold: (n,) positions of the right classes, or None if the test rows have no label.
        gains: what each ingredient gained in `fit`; see `FewShotClassifier.gains_`.
        notes: warnings, one sentence each.
        seconds: of `fit` and `predict`.
        tokens: tokens that the model read in both.
        provenance: model and settings.
    """

    ids: list[str]
    texts: list[str]
    classes: list[str]
    proba: NDArray[np.float64]
    gold: NDArray[np.int64] | None
    gains: list[dict[str, Any]]
    gains_table: str
    notes: list[str]
    seconds: dict[str, float]
    tokens: int
    provenance: dict[str, Any]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(n,) positions of the predicted classes."""
        best: NDArray[np.int64] = self.proba.argmax(axis=1)
        return best

    def measures(self) -> dict[str, Any]:
        """Accuracy with its 95 % interval, balanced accuracy, log loss in nats, Brier score, and the majority's share.

        The interval is Wilson's. Empty if the test rows have no label.
        """
        if self.gold is None:
            return {}
        from scipy.stats import binomtest
        from sklearn.metrics import balanced_accuracy_score, log_loss

        right, n, every = self.predicted == self.gold, len(self.gold), range(len(self.classes))
        with warnings.catch_warnings():
            # A class without a test row has no recall.
            warnings.simplefilter("ignore", UserWarning)
            balanced = float(balanced_accuracy_score(self.gold, self.predicted))
        return {
            "rows": n,
            "accuracy": float(right.mean()),
            "accuracy_interval": tuple(map(float, binomtest(int(right.sum()), n).proportion_ci(method="wilson"))),
            "balanced_accuracy": balanced,
            "log_loss": float(log_loss(self.gold, self.proba, labels=every)),
            # `sklearn.metrics.brier_score_loss` takes several classes from version 1.7 on.
            "brier": float(((self.proba - np.eye(len(self.classes))[self.gold]) ** 2).sum(axis=1).mean()),
            "majority": float(np.bincount(self.gold).max() / n),
        }

    def by_class(self) -> list[dict[str, Any]]:
        """For every class: rows, rows predicted, precision, recall, and the class it is most often taken for."""
        if self.gold is None:
            return []
        from sklearn.metrics import confusion_matrix

        confusion = confusion_matrix(self.gold, self.predicted, labels=range(len(self.classes)))
        rows = []
        for at, name in enumerate(self.classes):
            total, predicted, right = int(confusion[at].sum()), int(confusion[:, at].sum()), int(confusion[at, at])
            others = np.where(np.arange(len(self.classes)) == at, -1, confusion[at])
            taken_for = self.classes[int(others.argmax())] if others.max() > 0 else None
            rows.append(
                {
                    "class": name,
                    "rows": total,
                    "predicted": predicted,
                    "precision": right / predicted if predicted else None,
                    "recall": right / total if total else None,
                    "taken_for": taken_for,
                }
            )
        return rows

    def worst_errors(self, most: int = _WORST_ERRORS) -> list[dict[str, Any]]:
        """The wrong predictions of the highest probability: id, text, right and predicted class, probability."""
        if self.gold is None:
            return []
        wrong = np.flatnonzero(self.predicted != self.gold)
        ranked = wrong[np.argsort(-self.proba[wrong].max(axis=1), kind="stable")][:most]
        return [
            {
                "id": self.ids[at],
                "text": self.texts[at],
                "gold": self.classes[int(self.gold[at])],
                "predicted": self.classes[int(self.predicted[at])],
                "probability": float(self.proba[at].max()),
            }
            for at in ranked.tolist()
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything but the predictions, as JSON values."""
        return {
            "measures": self.measures(),
            "classes": self.by_class() or [{"class": name} for name in self.classes],
            "worst_errors": self.worst_errors(),
            "gains": self.gains,
            "notes": self.notes,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "provenance": self.provenance,
        }

    def save(self, folder: str | Path) -> None:
        """Write `predictions.jsonl` and `results.json`, each atomically.

        Raises:
            SparsortError: the disk refuses.
        """
        target = Path(folder).expanduser()
        with write_atomically(target / PREDICTIONS) as path:
            lines = (json.dumps(row, ensure_ascii=False) for row in self.predictions())
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        write_json(target / RESULTS, self.to_json())

    def predictions(self) -> list[dict[str, Any]]:
        """One row for each test row: id, predicted class, probabilities, and the right class where it is known."""
        rows: list[dict[str, Any]] = [
            {"id": name, "predicted": self.classes[best], "probabilities": dict(zip(self.classes, proba, strict=True))}
            for name, best, proba in zip(self.ids, self.predicted.tolist(), self.proba.tolist(), strict=True)
        ]
        for row, gold in zip(rows, [] if self.gold is None else self.gold.tolist(), strict=self.gold is not None):
            row["gold"] = self.classes[gold]
        return rows


def classify(
    file: Any,
    test: Any = None,
    *,
    model: Any = "demo",
    prompt: Any,
    settings: ClassifySpec = ClassifySpec(),
    data: DataSpec = DataSpec(),
) -> Classified:
    """Classify the rows of `test` with demonstrations from `file`.

    Args:
        file: labelled rows.
        test: the rows to classify, with or without labels; None to hold out a fifth of `file`, at most 256 rows.
        model: a name, or a `ModelSpec`.
        prompt: a format string over the columns, a function from a row to its text, or a `PromptSpec`.
        settings: the settings of the classifier.
        data: how the rows are read.

    Raises:
        SparsortError: bad input; the message says what to do.
    """
    source = data.open(file)
    ids, rows, y = _labelled(source, settings.label)
    gold: list[str] | None
    if test is None:
        kept, held_out = _hold_out(y, settings.seed)
        named, gold = [(ids[at], rows[at]) for at in held_out], [y[at] for at in held_out]
        rows, y = [rows[at] for at in kept], [y[at] for at in kept]
    else:
        named, gold = _test_rows(data.open(test), settings.label)
    classifier = _classifier(model, prompt, settings)
    queries = [row for _, row in named]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        started = time.monotonic()
        classifier.fit(rows, y, unlabelled=queries if settings.prior == "estimated" else None)
        fitted = time.monotonic()
        log_proba, tokens = classifier.predict_with_cost(queries)
        ended = time.monotonic()
    classes = [str(value) for value in classifier.classes_]
    return Classified(
        ids=[name for name, _ in named],
        texts=classifier.query_texts(queries),
        classes=classes,
        proba=np.exp(log_proba),
        gold=None if gold is None else _positions(gold, classes),
        gains=[asdict(gain) for gain in classifier.gains_],
        gains_table=classifier.gains_table(),
        notes=[
            *(str(one.message) for one in caught if issubclass(one.category, UserWarning)),
            *_copied(classifier, queries),
        ],
        seconds={"fit": round(fitted - started, 2), "predict": round(ended - fitted, 2)},
        tokens=classifier.tokens_read_ + tokens,
        provenance={"model": classifier.model_name_, "task": classifier.task_.digest, **settings.to_json()},
    )


def _classifier(model: Any, prompt: Any, settings: ClassifySpec) -> FewShotClassifier:
    from sparsort.recipes.classify.classifier import FewShotClassifier

    return FewShotClassifier(
        ModelSpec.of(model),
        k=settings.k,
        select=settings.select,  # type: ignore[arg-type]
        order=settings.order,
        n_orders=settings.n_orders,
        calibration=settings.calibration,  # type: ignore[arg-type]
        prior=_prior(settings.prior),
        prompt=prompt,
        label_words=_words(settings.labels),
        separator=settings.separator,
        instruction=settings.instruction,
        calibration_rows=settings.calibration_rows,
        random_state=settings.seed,
    )


def _labelled(source: RowSource, label: str) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """The ids, the fields without the label, and the labels."""
    source.require([column_of(label)])
    ids, rows, y = [], [], []
    for row in source.rows():
        value = text_if_any(row.fields, label, where=f"{source.name}: {row.name}")
        if value is None:
            raise SparsortError(
                f"{source.name}: {row.name} has no value in the label column {label!r}. Remove the row, or give it one."
            )
        rows.append(without(row.fields, label))
        ids.append(row.id)
        y.append(value)
    return ids, rows, y


def _test_rows(source: RowSource, label: str) -> tuple[list[tuple[str, dict[str, Any]]], list[str] | None]:
    named, gold = [], []
    for row in source.rows():
        named.append((row.id, without(row.fields, label)))
        gold.append(text_if_any(row.fields, label, where=f"{source.name}: {row.name}"))
    known = [value for value in gold if value is not None]
    if known and len(known) < len(gold):
        raise SparsortError(
            f"{source.name}: {len(gold) - len(known)} of {len(gold)} test rows have no label. Give all of them one, or none."
        )
    return named, known or None


def _hold_out(y: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Positions of the rows that stay, and of those held out, with the classes in the same shares where that is possible."""
    from sklearn.model_selection import train_test_split

    if len(y) < 2:
        raise SparsortError(
            f"there is {len(y)} labelled row, and without a test file some rows are held out. Pass more rows, or test= (--test)."
        )
    size = min(max(round(_HELD_OUT * len(y)), 1), _MOST_HELD_OUT)
    cannot_stratify = min(Counter(y).values()) < 2 or size < len(set(y))
    kept, held_out = train_test_split(
        range(len(y)), test_size=size, random_state=seed, stratify=None if cannot_stratify else y
    )
    return list(kept), list(held_out)


def _copied(classifier: FewShotClassifier, queries: Sequence[dict[str, Any]]) -> list[str]:
    """A note if the prompt shows rows that are to be classified, so that the model could copy their labels."""
    alike = alike_rows(classifier.compared_fields_, queries, classifier.demonstrations_)
    if not alike:
        return []
    return [
        f"{len(alike)} of the {len(queries)} rows to classify are, or nearly are, demonstrations, so the model can copy their "
        "labels. Remove them from one of the two files."
    ]


def _positions(gold: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    if unknown := sorted(set(gold) - set(classes)):
        raise SparsortError(
            f"the test rows have the label {unknown[0]!r}, which no training row has: {', '.join(classes)}. Remove those rows."
        )
    place = {name: at for at, name in enumerate(classes)}
    return np.array([place[value] for value in gold], dtype=np.int64)


def _prior(text: str | None) -> Any:
    if text is None or "=" not in text:
        return text
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.rpartition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError as error:
            raise SparsortError(f"the prior {text!r} has {part!r}; write class=share, separated by commas.") from error
    return shares


def _words(text: str | None) -> Mapping[str, str] | None:
    from sparsort.curriculum.ablation.recipe.tasks import parse_labels

    return None if text is None else parse_labels(text)
