"""sparsort: rank examples by how sparsely a language model represents them, and order data by that rank.

The public names are imported on first use, so `import sparsort` and `sparsort --help` import neither torch nor transformers.

A call prints nothing. What it has to say goes to the logger "sparsort": DEBUG for each piece of work, INFO for its beginning and
end, WARNING for what may change a result or cost time. `logging.basicConfig(level="INFO")` shows it.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsort.errors import SparsortError as SparsortError

if TYPE_CHECKING:
    from sparsort.attention.attach import attach_index_branch as attach_index_branch
    from sparsort.attention.attach import load_sparse as load_sparse
    from sparsort.attention.config import SparseAttentionConfig as SparseAttentionConfig
    from sparsort.curriculum.ablation.results.results import Results as Results
    from sparsort.curriculum.demos.export import export_demonstrations as export_demonstrations
    from sparsort.curriculum.demos.order import order_demos as order_demos
    from sparsort.curriculum.demos.prompt import assemble as assemble
    from sparsort.curriculum.demos.prompt import build_prompt as build_prompt
    from sparsort.curriculum.demos.select import select_demos as select_demos
    from sparsort.curriculum.loading.loader.loader import CurriculumLoader as CurriculumLoader
    from sparsort.curriculum.loading.online.difficulty_sampler import DifficultySampler as DifficultySampler
    from sparsort.curriculum.loading.online.measure import OnlineDifficulty as OnlineDifficulty
    from sparsort.curriculum.loading.plan.pacing import Pacing as Pacing
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan as CurriculumPlan
    from sparsort.curriculum.loading.plan.planning import plan_curriculum as plan_curriculum
    from sparsort.curriculum.loading.trainer.grpo_difficulty import DifficultyMixin as DifficultyMixin
    from sparsort.curriculum.loading.trainer.trainer import CurriculumMixin as CurriculumMixin
    from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer as CurriculumTrainer
    from sparsort.kernels.backend import sparsity_metrics as sparsity_metrics
    from sparsort.recipes.ablate import ablate as ablate
    from sparsort.recipes.calibrate import calibrate as calibrate
    from sparsort.recipes.choose.choose import choose_order as choose_order
    from sparsort.recipes.classify.classifier import FewShotClassifier as FewShotClassifier
    from sparsort.recipes.features import SparsityFeatures as SparsityFeatures
    from sparsort.recipes.report import write_report as write_report
    from sparsort.scoring.calibration.calibration import CalibratedScorer as CalibratedScorer
    from sparsort.scoring.calibration.calibration import Calibration as Calibration
    from sparsort.scoring.scorers.baselines import ColumnScorer as ColumnScorer
    from sparsort.scoring.scorers.baselines import CompressionScorer as CompressionScorer
    from sparsort.scoring.scorers.baselines import LengthScorer as LengthScorer
    from sparsort.scoring.scorers.baselines import RandomScorer as RandomScorer
    from sparsort.scoring.scorers.losses import EntropyScorer as EntropyScorer
    from sparsort.scoring.scorers.losses import LossScorer as LossScorer
    from sparsort.scoring.scorers.sparsity import SparsityScorer as SparsityScorer
    from sparsort.scoring.store.row_cache import RowCache as RowCache
    from sparsort.scoring.store.scores import Scores as Scores

__version__ = "0.1.0"

# Public name → the module that defines it.
_HOME = {
    "ColumnScorer": "scoring.scorers.baselines",
    "CompressionScorer": "scoring.scorers.baselines",
    "EntropyScorer": "scoring.scorers.losses",
    "LengthScorer": "scoring.scorers.baselines",
    "LossScorer": "scoring.scorers.losses",
    "RandomScorer": "scoring.scorers.baselines",
    "RowCache": "scoring.store.row_cache",
    "Scores": "scoring.store.scores",
    "SparsityScorer": "scoring.scorers.sparsity",
    "CurriculumLoader": "curriculum.loading.loader.loader",
    "CurriculumPlan": "curriculum.loading.plan.plan",
    "CurriculumMixin": "curriculum.loading.trainer.trainer",
    "CurriculumTrainer": "curriculum.loading.trainer.trainer",
    "DifficultyMixin": "curriculum.loading.trainer.grpo_difficulty",
    "DifficultySampler": "curriculum.loading.online.difficulty_sampler",
    "OnlineDifficulty": "curriculum.loading.online.measure",
    "Pacing": "curriculum.loading.plan.pacing",
    "plan_curriculum": "curriculum.loading.plan.planning",
    "ablate": "recipes.ablate",
    "choose_order": "recipes.choose.choose",
    "Calibration": "scoring.calibration.calibration",
    "CalibratedScorer": "scoring.calibration.calibration",
    "Results": "curriculum.ablation.results.results",
    "FewShotClassifier": "recipes.classify.classifier",
    "SparsityFeatures": "recipes.features",
    "calibrate": "recipes.calibrate",
    "write_report": "recipes.report",
    "assemble": "curriculum.demos.prompt",
    "build_prompt": "curriculum.demos.prompt",
    "export_demonstrations": "curriculum.demos.export",
    "order_demos": "curriculum.demos.order",
    "select_demos": "curriculum.demos.select",
    "sparsity_metrics": "kernels.backend",
    "SparseAttentionConfig": "attention.config",
    "attach_index_branch": "attention.attach",
    "load_sparse": "attention.attach",
}

__all__ = ["SparsortError", "__version__", *sorted(_HOME)]


# Without a handler of the application, Python would write warnings to stderr.
logging.getLogger("sparsort").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsort' has no attribute {name!r}")
    value = getattr(import_module(f"sparsort.{_HOME[name]}"), name)
    # Cached, so that the next access does not come back to this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
