"""The settings of `sparsort classify`. Nothing heavy is imported here, because `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsort.options import option, unescape
from sparsort.scoring.prompts.spec import TEXT_PANEL


@dataclass(frozen=True, kw_only=True)
class ClassifySpec:
    """The settings of a classification besides model, prompt and data; see `FewShotClassifier`.

    Attributes:
        label: the field of the class: a column, or a path as in a template ("meta.label").
        labels: words of the classes in the prompt, such as "0=negative,1=positive".
        k, select, order, n_orders, calibration, prior, calibration_rows, separator, instruction: see `FewShotClassifier`; a
            prior may also be written "0=0.8,1=0.2".
        seed: seed for every random draw.
    """

    label: str = option("label", "Field of the class: a column, or a path such as meta.label.", panel=TEXT_PANEL)
    labels: str | None = option(
        None,
        "Values and words of the classes, as in 0=negative,1=positive [default: as in the data].",
        panel=TEXT_PANEL,
    )
    separator: str = option("\n\n", "Text between demonstrations.", panel=TEXT_PANEL, read=unescape)
    instruction: str = option("", "First block of the prompt.", panel=TEXT_PANEL, read=unescape)
    k: int = option(8, "Number of demonstrations.", flag="--shots", short="-k")
    select: str = option(
        "balanced", "Selection of the demonstrations: {names}.", names="curriculum.demos.select:SHARED_PROMPT_SELECTORS"
    )
    order: str = option(
        "auto", "auto, for random orders, or {names}.", names="curriculum.demos.order:SHARED_PROMPT_ORDERS"
    )
    n_orders: int = option(1, "Random orders whose predictions are averaged; the cost grows in proportion.")
    calibration: str = option(
        "batch",
        "Calibration of the label probabilities: {names}.",
        names="curriculum.demos.criteria.label_calibration:LABEL_CALIBRATIONS",
    )
    prior: str | None = option(
        None,
        "Label shares of the rows to classify: uniform; pool: those of FILE; mixed: the mean of both; estimated: from the rows "
        "to classify; or shares such as 0=0.8,1=0.2 [default: uniform].",
    )
    calibration_rows: int = option(64, "Most rows of FILE, outside the prompt, that are read for the calibration.")
    seed: int = option(0, "Seed of every random draw.")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dict(vars(self))
