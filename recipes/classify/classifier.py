"""A few-shot classifier for scikit-learn: demonstrations in a prompt, label probabilities of a language model, calibrated.

Contract: the prediction for a row does not depend on the other rows of a call, unless `transductive` is set. `fit` draws the
demonstrations, reads other training rows to estimate how the prompt favours labels, and measures there what each ingredient
gains. No weights are trained. Predictions are the same in every process and batch, up to the rounding of the model's arithmetic.

Shapes: n rows, O orders, L classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from sparsort.curriculum.ablation.recipe.splits import alike_rows
from sparsort.curriculum.demos.criteria.distributions import Floats
from sparsort.curriculum.demos.criteria.label_bias import evenly_by_label, fit_bias, shares_by_em
from sparsort.curriculum.demos.criteria.label_calibration import (
    DEFAULT_LABEL_CALIBRATION,
    LABEL_CALIBRATIONS,
    BiasEvidence,
    LabelCalibrationEntry,
    LabelCalibrationName,
    combine_orders,
    measure_gains,
)
from sparsort.curriculum.demos.demonstrator import Demonstrator
from sparsort.curriculum.demos.known import Known, RowNumbers
from sparsort.curriculum.demos.order import SHARED_PROMPT_ORDERS, order_entry
from sparsort.curriculum.demos.permutations import random_permutations
from sparsort.curriculum.demos.pool.pool import DemoPool, input_fields
from sparsort.curriculum.demos.select import SELECTORS, SHARED_PROMPT_SELECTORS, SelectorName
from sparsort.recipes.classify.inputs import (
    ClassifierError,
    Prior,
    Row,
    class_names,
    estimator_rows,
    label_field,
    make_task,
    prior_shares,
)
from sparsort.recipes.classify.labels import LabelReader
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.functions import PROMPT_COLUMN
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.prompts.types import PromptWriter
from sparsort.terminal.tables import Table, number, prose
from sparsort.values import is_missing

AUTO = "auto"
# Fewer rows estimate a bias poorly; batches of fewer queries say little about their label shares.
FEWEST_ROWS, FEWEST_QUERIES = 16, 32
# The largest total variation between a prior and other label shares that causes no warning.
_MOST_SHIFT = 0.25
_WIDTH = 100


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies rows with a few demonstrations in a language model's prompt.

    `X` is anything that holds rows: texts, dictionaries, a dictionary of columns, a frame of pandas or polars, an Arrow table, a
    `datasets.Dataset`, or an array of numbers, whose columns are named x0, x1, ….

    Args:
        model: name, folder or hub id of a causal language model, a loaded model, or a `ModelSpec` with dtype, device and so on.
        k: number of demonstrations in the prompt.
        select: how they are selected from the training rows; a name in `SELECTORS` that needs neither query nor embeddings.
        order: "auto" for random orders drawn by `random_state`, or a name in `ORDERS`. After calibration the choice of an order
            hardly matters (`benchmarks/studies/classify`).
        n_orders: number of random orders whose label log-probabilities are averaged. Cost grows in proportion.
        calibration: a name in `LABEL_CALIBRATIONS`: "none", "contextual", "batch" or "fitted".
        prior: the label shares of the rows to predict: "uniform" (also None), "pool" (those of `y`), "mixed" (the mean of both),
            "estimated" (from the rows passed to `fit` as `unlabelled`), or a mapping from class to share.
        prompt: format string over the columns, such as "Review: {text}\\nSentiment:"; a function from a row to its text; or a
            `PromptSpec`, which also sets the answer's template, the chat template and the system turn. None puts every column
            on a line of its own.
        label_words: class → the words for it in the prompt; by default the class itself.
        separator: text between demonstrations.
        instruction: first block of the prompt.
        calibration_rows: most training rows, outside the prompt, that are read to estimate the bias.
        transductive: estimate the bias from the rows passed to `predict` instead. A prediction then depends on the whole call.
        random_state: seed for the demonstrations, their orders and the calibration rows.

    Attributes:
        classes_: (L,) the classes, sorted.
        demonstrations_: the rows in the prompt, with their label, in the first order.
        compared_fields_: the fields by which near-duplicates of rows are found.
        prior_: (L,) the label shares that predictions assume.
        gains_: for each ingredient a `Gain`: what it gained on the calibration rows, and the tokens that `fit` read for it.
        tokens_read_: tokens that the model read in `fit`, also those that only serve to measure the gains.
        model_name_: the name of the model.
        n_features_in_, feature_names_in_: as in scikit-learn, for arrays and frames.
    """

    def __init__(
        self,
        model: Any = "demo",
        *,
        k: int = 8,
        select: SelectorName = "balanced",
        order: str = AUTO,
        n_orders: int = 1,
        calibration: LabelCalibrationName = DEFAULT_LABEL_CALIBRATION,
        prior: Prior | None = None,
        prompt: str | PromptWriter | PromptSpec | None = None,
        label_words: Mapping[Any, str] | None = None,
        separator: str = "\n\n",
        instruction: str = "",
        calibration_rows: int = 64,
        transductive: bool = False,
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.k = k
        self.select = select
        self.order = order
        self.n_orders = n_orders
        self.calibration = calibration
        self.prior = prior
        self.prompt = prompt
        self.label_words = label_words
        self.separator = separator
        self.instruction = instruction
        self.calibration_rows = calibration_rows
        self.transductive = transductive
        self.random_state = random_state

    def fit(self, X: Any, y: Any, *, unlabelled: Any = None) -> FewShotClassifier:
        """Select and order the demonstrations, and estimate the bias of the prompt.

        Args:
            X: n training rows.
            y: their classes.
            unlabelled: rows without classes, like those to be predicted. The prior "estimated" reads them, and batch calibration
                where no labelled rows are left.

        Raises:
            SparsortError: bad input; the message says what to do.
        """
        self._check_settings()
        rows = self._rows(X, reset=True)
        classes, gold = self._classes(y, len(rows))
        names, label = class_names(classes.tolist()), label_field(rows)
        for row, at in zip(rows, gold.tolist(), strict=True):
            row[label] = names[at]
        self.classes_ = classes
        spec, function = PromptSpec.of(self.prompt).as_column()
        self.task_ = make_task(
            rows, names, spec, label=label, words=self.label_words, separator=self.separator,
            instruction=self.instruction,
        )  # fmt: skip
        read = [] if function is None else input_fields(function, rows, label)
        self.compared_fields_ = [name for name in read if name != PROMPT_COLUMN] or input_fields(self.task_.prompt)
        # A row that the prompt cannot show is reported before anything is read.
        for row in rows:
            self.task_.query_text(row)
        counts = np.bincount(gold, minlength=len(classes))
        shares = prior_shares(self.prior, classes.tolist(), counts)
        others = [] if unlabelled is None else self._rows(unlabelled, reset=False)
        if shares is None and not others and not self.transductive:
            raise ClassifierError(
                "the prior 'estimated' needs rows like those to be predicted. Pass them to fit as unlabelled=, or set "
                "transductive=True, or take the prior 'uniform' or 'pool'."
            )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        shown = self._select(rows, label, seed)
        self._orders = self._draw_orders([rows[at] for at in shown], seed)
        self.demonstrations_ = self._orders[0]
        held_out = self._calibration_rows(rows, gold, shown, seed)
        self._warn_about_rows(len(held_out), len(others), counts)
        reader = self._reader()
        self._calibration = self._usable_calibration(len(held_out), len(others))
        self._evidence, tokens = self._read_evidence(reader, [rows[at] for at in held_out], gold[held_out], others)
        self._bias = None if self.transductive else self._calibration.estimate(self._evidence)
        self.prior_ = self._estimate_shares(self._evidence.unlabelled) if shares is None else shares
        self.tokens_read_ = int(sum(tokens_O.sum() for tokens_O in tokens.values()))
        self.model_name_ = reader.model_name
        # A transductive bias is estimated from the rows to predict, not in `fit`.
        read_for_bias = {} if self.transductive else tokens
        self.gains_ = measure_gains(
            self._calibration,
            self._evidence,
            self.prior_,
            tokens=read_for_bias,
            prior_tokens=self._prior_tokens(tokens),
        )
        return self

    def predict_log_proba(self, X: Any) -> Floats:
        """The logarithm of the probability of each class, (n, L).

        Raises:
            SparsortError: rows without a field of the prompt, or a prompt longer than the model's context.
        """
        return self.predict_with_cost(X)[0]

    def predict_with_cost(self, X: Any) -> tuple[Floats, int]:
        """`predict_log_proba`, and the number of tokens that the model read for it.

        Raises:
            SparsortError: as `predict_log_proba`.
        """
        check_is_fitted(self, "classes_")
        rows = self._rows(X, reset=False)
        reader = self._reader()
        log_p, tokens_O = reader.scores(self._orders, [self.task_.query_text(row) for row in rows], title="rows")
        bias, shares = self._bias, self.prior_
        if bias is None:
            bias = self._calibration.estimate(replace(self._evidence, labelled=None, unlabelled=log_p))
            shares = self._estimate_shares(log_p) if self._prior_is_estimated else shares
        log_proba = combine_orders(bias.remove(log_p), np.log(shares))
        self._warn_about_shares(log_proba, shares)
        return log_proba, int(tokens_O.sum())

    def predict_proba(self, X: Any) -> Floats:
        """The probability of each class, (n, L)."""
        proba: Floats = np.exp(self.predict_log_proba(X))
        return proba

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row, (n,)."""
        best = self.predict_log_proba(X).argmax(axis=1)
        predicted: NDArray[Any] = self.classes_[best]
        return predicted

    def query_texts(self, X: Any) -> list[str]:
        """The text of each row, as the prompt contains it after the demonstrations."""
        check_is_fitted(self, "classes_")
        return [self.task_.query_text(row) for row in self._rows(X, reset=False)]

    def gains_table(self) -> str:
        """What each ingredient gained on rows outside the prompt, and its cost in tokens, as a table of text."""
        check_is_fitted(self, "classes_")
        if not self.gains_:
            return "Nothing was measured: too few labelled rows are left outside the prompt."
        table = Table(prose("ingredient"), number("balanced accuracy"), number("log loss"), number("tokens in fit"))
        for gain in self.gains_:
            accuracy = f"{100 * gain.balanced_accuracy:.1f} ± {196 * gain.standard_error:.1f} %"
            table.add_row(gain.ingredient, accuracy, f"{gain.log_loss:.3f}", f"{gain.tokens:,}")
        measuring = self.tokens_read_ - self.gains_[-1].tokens
        note = f"Only to measure these gains, fit read another {measuring:,} tokens." if measuring else ""
        return "\n".join([*table.lines(_WIDTH), *filter(None, [note])])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.dict = True
        tags.classifier_tags.poor_score = True  # a language model knows nothing of arbitrary numbers
        return tags

    @property
    def _prior_is_estimated(self) -> bool:
        return isinstance(self.prior, str) and self.prior == "estimated"

    def _check_settings(self) -> None:
        entry = SELECTORS.check(self.select)
        if entry.name not in SHARED_PROMPT_SELECTORS:
            raise ClassifierError(
                f"select is {self.select!r}, which needs {', '.join(sorted(entry.needs))}. All rows share one prompt here; take "
                f"{SHARED_PROMPT_SELECTORS.listed()}."
            )
        if self.order != AUTO and not order_entry(self.order).needs <= {"lengths"}:
            needs = ", ".join(sorted(order_entry(self.order).needs - {"lengths"}))
            raise ClassifierError(
                f"order is {self.order!r}, which needs {needs}, and a classifier has none. Take {AUTO}, "
                f"{SHARED_PROMPT_ORDERS.listed()}."
            )
        for name, value, least in (
            ("k", self.k, 1),
            ("n_orders", self.n_orders, 1),
            ("calibration_rows", self.calibration_rows, 0),
        ):
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ClassifierError(f"{name} is {value!r}; expected a whole number of at least {least}.")
        if self.n_orders > 1 and self.order != AUTO:
            raise ClassifierError(
                f"n_orders is {self.n_orders}, and order={self.order!r} names one order. Take order='auto'."
            )
        if self.n_orders > math.factorial(min(self.k, 20)):
            raise ClassifierError(
                f"n_orders is {self.n_orders}, and {self.k} demonstrations have fewer orders. Take fewer."
            )
        calibration = LABEL_CALIBRATIONS.check(self.calibration)
        if self.transductive and calibration.needs != {"rows"}:
            usable = LABEL_CALIBRATIONS.listed(lambda one: one.needs == {"rows"})
            raise ClassifierError(f"transductive needs a calibration that reads rows without classes: {usable}.")

    def _classes(self, y: Any, n_rows: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if y is None:
            raise ClassifierError("FewShotClassifier requires y to be passed, but the target y is None.")
        y = y.to_list() if hasattr(y, "to_list") else y
        # NumPy would write a missing class as the text "nan" next to classes that are texts.
        missing = [at for at, value in enumerate(np.asarray(y, dtype=object).ravel()) if is_missing(value)]
        if missing:
            raise ClassifierError(f"row {missing[0]} of y has no class. Remove the row, or give it one.")
        y = column_or_1d(np.asarray(y), warn=True)
        check_classification_targets(y)
        check_consistent_length(y, range(n_rows))
        classes, gold = np.unique(y, return_inverse=True)
        if self.k > n_rows:
            raise ClassifierError(f"k is {self.k}, and X has {n_rows} samples. Take a smaller k.")
        return classes, gold.astype(np.int64)

    def _rows(self, X: Any, *, reset: bool) -> list[Row]:
        rows = estimator_rows(self, X, reset=reset)
        function = PromptSpec.of(self.prompt).as_column()[1]
        return rows if function is None else function.add_column(rows)

    def _select(self, rows: list[Row], label: str, seed: int) -> list[int]:
        pool = DemoPool(rows, prompt=self.task_.prompt, label=label, ids=[str(at) for at in range(len(rows))])
        demonstrator = Demonstrator(selector=self.select, k=self.k, seed=seed)
        return demonstrator.choose(Known(pool)).indices

    def _draw_orders(self, demos: list[Row], seed: int) -> list[list[Row]]:
        if self.order == AUTO:
            orders = random_permutations(len(demos), self.n_orders, seed).tolist()
        else:
            pool = DemoPool(demos, prompt=self.task_.prompt, ids=[str(at) for at in range(len(demos))])
            demonstrator = Demonstrator(order=self.order, seed=seed)
            lengths = RowNumbers.of(np.array([len(self.task_.demo_text(demo)) for demo in demos]))
            orders = [demonstrator.positions(Known(pool, lengths=lengths))]
        return [[demos[at] for at in order] for order in orders]

    def _calibration_rows(self, rows: list[Row], gold: NDArray[np.int64], shown: list[int], seed: int) -> list[int]:
        """Positions of rows outside the prompt and unlike it, their classes as even as the rows allow."""
        in_prompt = set(shown)
        left = [at for at in range(len(rows)) if at not in in_prompt]
        order = [left[at] for at in evenly_by_label(gold[left].tolist(), seed=seed).tolist()]
        # The model could copy the answer of a near-duplicate from its demonstration. Twice as many candidates as needed replace
        # those that are excluded.
        candidates = order[: 2 * self.calibration_rows]
        alike = alike_rows(self.compared_fields_, [rows[at] for at in candidates], [rows[at] for at in shown])
        return [at for place, at in enumerate(candidates) if place not in alike][: self.calibration_rows]

    def _reader(self) -> LabelReader:
        return LabelReader(self.task_, ModelSpec.of(self.model))

    def _read_evidence(
        self, reader: LabelReader, labelled: list[Row], gold: NDArray[np.int64], others: list[Row]
    ) -> tuple[BiasEvidence, dict[str, NDArray[np.int64]]]:
        """The label scores, and how many tokens were read for each part of them under each order."""
        tokens: dict[str, NDArray[np.int64]] = {}

        def read(part: str, texts: list[str], title: str, orders: int | None = None) -> Floats | None:
            if not texts:
                return None
            scores, tokens[part] = reader.scores(self._orders[:orders], texts, title=title)
            return scores

        needs = self._calibration.needs
        # Batch calibration reads unlabelled rows under every order if there are no labelled ones. The prior needs one order.
        is_for_bias = "rows" in needs and not labelled and not self.transductive
        needs_unlabelled = is_for_bias or (self._prior_is_estimated and bool(labelled))
        # In this order, so that the demonstrations, which are read once, count as read for the calibration.
        inputs = self.task_.content_free_texts() if "content_free" in needs else []
        content_free = read("content_free", inputs, "content-free inputs")
        scores = read("rows", [self.task_.query_text(row) for row in labelled], "calibration rows")
        queries = [self.task_.query_text(row) for row in others] if needs_unlabelled else []
        unlabelled = read(
            "rows" if is_for_bias else "prior", queries, "unlabelled rows", orders=None if is_for_bias else 1
        )
        evidence = BiasEvidence(
            orders=len(self._orders),
            labels=len(self.classes_),
            labelled=scores,
            gold=gold if labelled else None,
            unlabelled=unlabelled,
            content_free=content_free,
        )
        return evidence, tokens

    def _prior_tokens(self, tokens: Mapping[str, NDArray[np.int64]]) -> int:
        """The tokens that only the prior needed: the unlabelled rows, and the labelled ones unless the calibration read them."""
        if "prior" not in tokens:
            return 0
        is_shared = "rows" in self._calibration.needs and not self.transductive
        return int(tokens["prior"].sum()) + (0 if is_shared else int(tokens["rows"][0]))

    def _usable_calibration(self, n_labelled: int, n_unlabelled: int) -> LabelCalibrationEntry:
        """The calibration, or the contextual one if no row is left for it."""
        entry = LABEL_CALIBRATIONS[self.calibration]
        has = {"content_free": True, "rows": n_labelled or n_unlabelled or self.transductive, "gold": n_labelled}
        if all(has[need] for need in entry.needs):
            return entry
        (fallback, *_) = LABEL_CALIBRATIONS.needing("content_free")
        warnings.warn(
            f"no training rows are left outside the prompt for the calibration {entry.name!r}, so {fallback!r} is used. Pass "
            "rows, a smaller k, or unlabelled rows.",
            stacklevel=3,
        )
        return LABEL_CALIBRATIONS[fallback]

    def _estimate_shares(self, log_p_OPL: Floats | None) -> Floats:
        """The label shares of unlabelled rows, from the scores of the first order."""
        uniform = np.full(len(self.classes_), 1.0 / len(self.classes_))
        if log_p_OPL is None or self._evidence.labelled is None:
            return uniform
        return shares_by_em(log_p_OPL[0], fit_bias(self._evidence.labelled[0], self._evidence.gold))

    def _warn_about_rows(self, n_labelled: int, n_unlabelled: int, counts: NDArray[np.int64]) -> None:
        if (
            0 < n_labelled < FEWEST_ROWS
            and n_unlabelled < FEWEST_ROWS
            and LABEL_CALIBRATIONS[self.calibration].needs & {"rows"}
        ):
            warnings.warn(
                f"the calibration is estimated from {n_labelled} rows outside the prompt; {FEWEST_ROWS} or more are advisable.",
                stacklevel=3,
            )
        pool = counts / counts.sum()
        uniform = np.full(len(pool), 1.0 / len(pool))
        if self.prior is None and _shift(pool, uniform) > _MOST_SHIFT:
            shares = ", ".join(
                f"{value} {share:.0%}" for value, share in zip(self.classes_.tolist(), pool, strict=True)
            )
            warnings.warn(
                f"the classes of y are unevenly distributed ({shares}), and predictions assume even shares. Pass prior='pool' if "
                "the rows to predict have the shares of y, or prior='uniform' to keep even shares.",
                stacklevel=3,
            )

    def _warn_about_shares(self, log_proba: Floats, shares: Floats) -> None:
        mean = np.exp(log_proba).mean(axis=0)
        if len(log_proba) >= FEWEST_QUERIES and _shift(mean, shares) > _MOST_SHIFT:
            parts = zip(self.classes_.tolist(), mean, shares, strict=True)
            listed = ", ".join(f"{value} {share:.0%} (prior {prior:.0%})" for value, share, prior in parts)
            warnings.warn(
                f"the predictions and the prior disagree: {listed}. If the rows have other label shares than the prior, pass "
                "them as prior=, or prior='estimated' with unlabelled rows.",
                stacklevel=3,
            )


def _shift(shares: Floats, others: Floats) -> float:
    """Total variation distance between two distributions over the labels."""
    return float(np.abs(shares - others).sum() / 2)
