"""How a model is trained: one frozen, checked configuration.

Contract: impossible settings are refused on construction, before a row is read or a model is loaded. The fields in `IDENTITY`
determine the losses of a run. The other fields divide its work, or set how often it is saved and measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from sparsort.conditions import Table, When, excludes, needs, refuse_unread_fields
from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.metrics import METRICS, MetricName
from sparsort.options import option, same_option
from sparsort.recipes.train.model import PRESETS
from sparsort.registry import listed
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import TEXT_PANEL
from sparsort.trackers import NO_TRACKER, TRACKERS

CURRICULUM_PANEL = "Curriculum"
TRAINING_PANEL = "Training"
WORK_PANEL = "How the work is divided"

LearningRateSchedule = Literal["constant", "linear", "cosine", "wsd"]
Dtype = Literal["auto", "float32", "bfloat16"]

# Steps, batch and held-out rows determine the losses too, and are known once the data has been read.
IDENTITY = (
    "model",
    "learning_rate",
    "lr_schedule",
    "warmup_steps",
    "max_length",
    "eval_steps",
    "online",
    "online_metric",
    "seed",
    "dtype",
    "revision",
)


# The conditions under which each setting is read; see `sparsort.conditions`.
_PRETRAINED = When(
    holds=lambda values: values["model"] not in PRESETS,
    why="{model} starts from random weights, and nothing is read for it",
    instead={"model": "FOLDER"},
)
READ_BY: Table = {
    "revision": (_PRETRAINED,),
    "trust_remote_code": (_PRETRAINED,),
    "online_metric": (needs("online", "the difficulty is not learned in training", online=True),),
    "epochs": (excludes("max_steps", "{max_steps} sets the length of the run"),),
}


class TrainOptions(TypedDict, total=False):
    """The fields of `TrainConfig`, where a function takes them as keywords."""

    model: str
    epochs: int
    max_steps: int | None
    per_device_batch: int | None
    accumulate: int
    learning_rate: float
    lr_schedule: LearningRateSchedule
    warmup_steps: int
    max_length: int
    eval_share: float | None
    eval_steps: int | None
    online: bool
    online_metric: MetricName
    save_steps: int
    report_to: str
    workers: int
    seed: int
    dtype: Dtype
    revision: str | None
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        model: "tiny" or "small", a Llama over bytes from scratch; a hub id, a folder, a .gguf file or "demo".
        epochs: passes over the data; for a plan in pool mode, passes through its pacing.
        max_steps: optimiser steps, instead of `epochs`.
        per_device_batch: examples that a device processes at once; by default its part of the global batch, or 8.
        accumulate: micro-batches of a device in one step.
        learning_rate: the highest learning rate of AdamW.
        lr_schedule: the schedule in transformers: "constant", "linear" and "cosine" (both fall to 0), or "wsd"
            (warmup_stable_decay), which is constant until the last fifth of the run.
        warmup_steps: steps in which the learning rate rises from 0.
        max_length: tokens at which a text is cut.
        eval_share: the share of the rows that is held out at random; by default 0.1 with scores and 0 with a plan.
        eval_steps: steps between two measurements of the held-out loss; None for one measurement at the end.
        online: whether the difficulty is learned from the model in training, which then changes the plan.
        online_metric: sparsity metric of the hidden states.
        save_steps: steps between two checkpoints.
        report_to: "none", or trackers of transformers, such as "tensorboard", separated by commas.
        workers: processes that load data.
        seed: seed for the weights of a model from scratch, dropout, the held-out rows, and a plan that is made here.
        dtype: "float32"; "bfloat16" for computation in bfloat16 with weights in float32; "auto" for the latter on a GPU that
            supports it.
        revision: hub revision of the model.
        trust_remote_code: whether code that ships with the model may run.
    """

    model: str = same_option(
        ModelSpec,
        "name",
        default="tiny",
        help="tiny or small (from scratch, over bytes), hub id, folder, .gguf file or 'demo'.",
    )
    epochs: int = option(1, "Passes over the data.", panel=TRAINING_PANEL)
    max_steps: int | None = option(None, "Optimiser steps, instead of --epochs.", panel=TRAINING_PANEL)
    per_device_batch: int | None = option(
        None,
        "Examples that a device processes at once [default: its part of the global batch, or 8].",
        panel=WORK_PANEL,
    )
    accumulate: int = option(1, "Micro-batches of a device in one step.", panel=WORK_PANEL)
    learning_rate: float = option(5e-4, "The highest learning rate.", panel=TRAINING_PANEL, flag="--lr")
    lr_schedule: LearningRateSchedule = option(
        "cosine", f"{listed(get_args(LearningRateSchedule))}.", panel=TRAINING_PANEL
    )
    warmup_steps: int = option(0, "Steps in which the learning rate rises.", panel=TRAINING_PANEL)
    max_length: int = option(
        1024, "Tokens at which a text is cut.", panel=TEXT_PANEL, flag="--cut-length", retired=("--max-length",)
    )
    eval_share: float | None = option(
        None, "Share of the rows to hold out [default: 0.1; with --plan none].", panel=TRAINING_PANEL
    )
    eval_steps: int | None = option(None, "Steps between held-out losses [default: at the end].", panel=TRAINING_PANEL)
    online: bool = option(False, "Learn the difficulty during training.", panel=CURRICULUM_PANEL)
    online_metric: MetricName = option(
        "hoyer",
        "Sparsity metric for --online: {names}.",
        names="kernels.sparsity.metrics:METRICS",
        panel=CURRICULUM_PANEL,
    )
    save_steps: int = option(500, "Steps between checkpoints.", panel=WORK_PANEL)
    report_to: str = option(
        NO_TRACKER, f"{TRACKERS.listed()}, or other trackers of transformers, separated by commas.", panel=WORK_PANEL
    )
    workers: int = option(0, "Processes that load data.", panel=WORK_PANEL)
    seed: int = option(0, "Seed for the weights, dropout, held-out rows and plan.", panel=TRAINING_PANEL)
    dtype: Dtype = same_option(ModelSpec, "dtype", help=f"{listed(get_args(Dtype))}.")
    revision: str | None = same_option(ModelSpec, "revision")
    trust_remote_code: bool = same_option(ModelSpec, "trust_remote_code")

    def __post_init__(self) -> None:
        for name, choices in {"lr_schedule": get_args(LearningRateSchedule), "dtype": get_args(Dtype)}.items():
            if getattr(self, name) not in choices:
                raise unknown_choice(name.replace("_", " "), getattr(self, name), choices)
        least = dict.fromkeys(("warmup_steps", "workers", "seed"), 0) | {"max_length": 2}
        least |= dict.fromkeys(("epochs", "max_steps", "per_device_batch", "accumulate", "eval_steps", "save_steps"), 1)
        for name, bound in least.items():
            value = getattr(self, name)
            optional = value is None and name in ("max_steps", "per_device_batch", "eval_steps")
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < bound):
                flag = " (--cut-length)" if name == "max_length" else ""
                raise SparsortError(f"{name}{flag} must be a whole number of at least {bound}, not {value!r}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SparsortError(
                f"learning_rate (--lr) must be a number above 0, such as 5e-4, not {self.learning_rate!r}."
            )
        if self.eval_share is not None and not 0 <= self.eval_share < 1:
            raise SparsortError(
                f"eval_share is the share of the rows to hold out, from 0 to below 1, not {self.eval_share!r}."
            )
        if self.online_metric not in METRICS:
            raise unknown_choice("online metric", self.online_metric, METRICS)
        refuse_unread_fields(self, READ_BY)

    @property
    def spec(self) -> ModelSpec:
        """The model in the form in which it is loaded: in float32 on the CPU, from where Trainer moves it to a device."""
        return ModelSpec(
            self.model,
            dtype="float32",
            device="cpu",
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


def make_config(config: TrainConfig | None, changes: Mapping[str, Any]) -> TrainConfig:
    """Change some fields of a configuration.

    Raises:
        SparsortError: an unknown field, or a value that does not fit.
    """
    names = [field.name for field in fields(TrainConfig)]
    for name in changes:
        if name not in names:
            raise unknown_choice("setting of train", name, names)
    return TrainConfig(**{**(asdict(config) if config else {}), **changes})
