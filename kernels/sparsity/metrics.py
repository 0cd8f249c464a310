"""The table of the sparsity metrics of a hidden state.

Contract: `METRICS` is the only list of the metrics, and its order is the order of the columns in every table of metrics. This
module does not import torch. To add a metric, add an entry here, add its name to `MetricName`, and compute it in `torch_rows.py`
under that name. `triton_rows.py` calls the reference for metrics that its kernel does not write.

Legend: a = |h|, e = h², d the width of the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsort.errors import SparsortError
from sparsort.registry import Entry, Registry

MetricName = Literal[
    "top1_energy",
    "top5_energy",
    "top10_energy",
    "top1_magnitude",
    "top5_magnitude",
    "top10_magnitude",
    "l0_relative",
    "l0_absolute",
    "hoyer",
    "gini",
    "effective_rank_magnitude",
    "effective_rank_energy",
    "l1",
]


@dataclass(frozen=True, kw_only=True)
class MetricEntry(Entry):
    """One metric. `reads` names the settings of `kernels.backend.sparsity_rows` that change its value.

    Attributes:
        formula: its definition.
        higher_is_sparser: whether a higher value means a sparser state.
    """

    formula: str
    higher_is_sparser: bool

    @property
    def sign(self) -> int:
        """The factor that makes the value increase with sparsity: 1 or −1."""
        return 1 if self.higher_is_sparser else -1


_METRIC_SET = "arXiv 2603.03415"


def _top(percent: int, quantity: str, symbol: str) -> MetricEntry:
    return MetricEntry(
        name=f"top{percent}_{quantity}",
        help=f"share of the {quantity} in the largest {percent} % of the coordinates",
        source=_METRIC_SET,
        formula=f"Σ of the largest max(1, ⌊{percent / 100:g}·d⌋) of {symbol} / Σ{symbol}",
        higher_is_sparser=True,
    )


METRICS = Registry(
    "metric",
    (
        _top(1, "energy", "e"),
        _top(5, "energy", "e"),
        _top(10, "energy", "e"),
        _top(1, "magnitude", "a"),
        _top(5, "magnitude", "a"),
        _top(10, "magnitude", "a"),
        MetricEntry(
            name="l0_relative",
            help="share of the coordinates far above the mean magnitude",
            source=_METRIC_SET,
            formula="share of a > mean(a) + std(a), unbiased",
            higher_is_sparser=False,
        ),
        MetricEntry(
            name="l0_absolute",
            help="share of the coordinates above a threshold in the state's own units",
            source=_METRIC_SET,
            formula="share of a > τ (`l0_threshold`, 1 by default)",
            higher_is_sparser=False,
            reads=frozenset({"l0_threshold"}),
        ),
        MetricEntry(
            name="hoyer",
            help="ratio of the L1 and the L2 norm, scaled to [0, 1]",
            source="Hoyer 2004",
            formula="(√d − Σa/√Σe) / (√d − 1)",
            higher_is_sparser=True,
        ),
        MetricEntry(
            name="gini",
            help="inequality of the magnitudes",
            source="Hurley and Rickard 2009",
            formula="2·Σ i·a₍ᵢ₎ / (d·Σa) − (d + 1)/d, a ascending",
            higher_is_sparser=True,
            reads=frozenset({"gini"}),
        ),
        MetricEntry(
            name="effective_rank_magnitude",
            help="effective number of coordinates by magnitude, as a share of the width",
            source="Roy and Vetterli 2007",
            formula="exp(H(a/Σa)) / d",
            higher_is_sparser=False,
        ),
        MetricEntry(
            name="effective_rank_energy",
            help="effective number of coordinates by energy, as a share of the width",
            source="Roy and Vetterli 2007",
            formula="exp(H(e/Σe)) / d",
            higher_is_sparser=False,
        ),
        MetricEntry(
            name="l1",
            help="sum of the magnitudes; follows the scale of the state, so only a diagnostic",
            source=_METRIC_SET,
            formula="Σa",
            higher_is_sparser=False,
        ),
    ),
)
METRIC_NAMES: tuple[str, ...] = tuple(METRICS)

# The reasons why a row has no metrics, by code. Code 0 means that the row has metrics.
ROW_REASONS: tuple[str, ...] = ("", "zero", "not_finite")


def check_l0_threshold(l0_threshold: float) -> None:
    """Check the threshold of `l0_absolute`.

    Raises:
        SparsortError: the threshold is not a finite number of at least 0.
    """
    if not 0 <= l0_threshold < float("inf"):
        raise SparsortError(
            f"l0_threshold is {l0_threshold}; expected a finite number of at least 0, in the state's own units, such as 1."
        )
