"""Warnings that come first in a report: cells in which the model gives one label to nearly every row, whatever it is shown.

Contract: from the cells of a report alone, over all random orders and sets of a cell together. Where the test rows themselves
hold so much of that label, the warning says so: then the rows are one-sided, and the model may be right.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsort.curriculum.ablation.report.numbers.rows import percent
from sparsort.curriculum.ablation.report.numbers.shape import ONE_LABEL, Cell, OneLabel

# Shares are means of means, so the exact limit may come out a little below itself.
_ROUNDING = 1e-9


def one_label(cells: Sequence[Cell], model: object = None) -> list[OneLabel]:
    """A warning for every cell whose random orders, pooled, predict one label for at least `ONE_LABEL` of the rows.

    Args:
        cells: of the report.
        model: its name, where it is known.
    """
    name = None if model is None else str(model)
    return [
        _warning(cell, name) for cell in cells if len(cell["labels"]) > 1 and _most(cell)[1] >= ONE_LABEL - _ROUNDING
    ]


def _most(cell: Cell) -> tuple[int, float]:
    """The label predicted most often, and its share."""
    share_L = cell["random"]["label_share"]
    place = max(range(len(share_L)), key=share_L.__getitem__)
    return place, share_L[place]


def _warning(cell: Cell, model: str | None) -> OneLabel:
    place, share = _most(cell)
    label, gold_share = cell["labels"][place], cell["gold_share"][place]
    calibration = ", with contextual calibration" if cell["calibrated"] else ""
    text = (
        f"{cell['task']}, k = {cell['k']}, {cell['selector']} demonstrations{calibration}: {model or 'the model'} predicts "
        f"{label!r} for {percent(share)} % of the test rows, over all random orders. "
    )
    if gold_share >= ONE_LABEL - _ROUNDING:
        text += (
            f"That label is also {percent(gold_share)} % of the gold labels, so these test rows hardly tell a good order from a "
            "bad one. Choose test rows with more of the other labels."
        )
    else:
        rest = (
            "differences between orders come from the few other rows"
            if share < 1 - _ROUNDING
            else "orders cannot differ"
        )
        text += (
            f"It is {percent(gold_share)} % of the gold labels, so accuracy here measures how often that label is right, not "
            f"what an order does: {rest}. Try another prompt or model"
            + ("." if cell["calibrated"] else ", or contextual calibration.")
        )
    return OneLabel(cell=cell["id"], model=model, label=label, share=share, gold_share=gold_share, text=text)
