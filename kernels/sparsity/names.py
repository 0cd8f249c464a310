"""The sparsity metrics by name, and which way each points (arXiv 2603.03415 and the sources in `reference.py`)."""

from __future__ import annotations

# True: a higher value means a sparser state. The order is the order of every table of metrics.
HIGHER_IS_SPARSER: dict[str, bool] = {
    "top1_energy": True,
    "top5_energy": True,
    "top10_energy": True,
    "top1_magnitude": True,
    "top5_magnitude": True,
    "top10_magnitude": True,
    "l0_relative": False,
    "l0_absolute": False,
    "hoyer": True,
    "gini": True,
    "effective_rank_magnitude": False,
    "effective_rank_energy": False,
    "l1": False,
}
METRICS: tuple[str, ...] = tuple(HIGHER_IS_SPARSER)

# Why a row has no metrics, by code: code 0 is a row that has them.
ROW_REASONS: tuple[str, ...] = ("", "zero", "not_finite")
