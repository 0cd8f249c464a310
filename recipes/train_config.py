"""How a model is trained: one frozen, checked configuration.

Contract: what cannot be is refused on construction, before a row is read or a model loaded. The fields of `IDENTITY` decide
the losses of a run; the others divide its work, or say how often to look at it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from sparsort.conditions import Table, excludes, needs, refuse_unread_fields
from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.metrics import METRICS

LearningRateSchedule = Literal["constant", "linear", "cosine", "wsd"]
Dtype = Literal["auto", "float32", "bfloat16"]

# Steps, batch and held-out rows decide too, and are known when the data is.
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
)


# What a setting needs to be read; see `sparsort.conditions`.
READ_BY: Table = {
    "online_metric": (needs("online", "the difficulty is not learned in training", online=True),),
    "epochs": (excludes("max_steps", "{max_steps} sets the length of the run"),),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        model: "tiny" or "small", a Llama over bytes from scratch; a hub id, a folder, a .gguf file or "demo".
        epochs: passes over the data; of a plan in pool mode, courses of its pacing.
        max_steps: optimiser steps, instead of `epochs`.
        per_device_batch: examples that a device sees at once; by default, what the global batch leaves to it, or 8.
        accumulate: micro-batches of a device in one step.
        learning_rate: its peak, of AdamW.
        lr_schedule: of transformers: "constant", "linear" and "cosine" (both to 0), or "wsd" (warmup_stable_decay), constant
            until the last fifth of the run.
        warmup_steps: in which the learning rate rises from 0.
        max_length: tokens at which a text is cut.
        eval_share: of the rows, held out by chance; 0.1 with scores and 0 with a plan unless given.
        eval_steps: steps between two looks at the held-out loss; None for one at the end.
        online: learn the difficulty from the model in training, and plan again from it.
        online_metric: sparsity metric of the hidden states.
        save_steps: steps between two checkpoints.
        report_to: "none", or a tracker of transformers, such as "tensorboard".
        workers: processes that load data.
        seed: of the weights of a model from scratch, of dropout, of what is held out, and of a plan made here.
        dtype: "float32"; "bfloat16", computing in it with weights in float32; "auto", the latter on a GPU that has it.
    """

    model: str = "tiny"
    epochs: int = 1
    max_steps: int | None = None
    per_device_batch: int | None = None
    accumulate: int = 1
    learning_rate: float = 5e-4
    lr_schedule: LearningRateSchedule = "cosine"
    warmup_steps: int = 0
    max_length: int = 1024
    eval_share: float | None = None
    eval_steps: int | None = None
    online: bool = False
    online_metric: str = "hoyer"
    save_steps: int = 500
    report_to: str = "none"
    workers: int = 0
    seed: int = 0
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        for name, choices in {"lr_schedule": get_args(LearningRateSchedule), "dtype": get_args(Dtype)}.items():
            if getattr(self, name) not in choices:
                raise unknown_choice(name.replace("_", " "), getattr(self, name), choices)
        least = {
            "epochs": 1,
            "max_steps": 1,
            "per_device_batch": 1,
            "accumulate": 1,
            "warmup_steps": 0,
            "max_length": 2,
        }
        least |= {"eval_steps": 1, "save_steps": 1, "workers": 0, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            optional = value is None and name in ("max_steps", "per_device_batch", "eval_steps")
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < bound):
                raise SparsortError(f"{name} must be a whole number of at least {bound}, not {value!r}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SparsortError(f"learning_rate must be a number above 0, such as 5e-4, not {self.learning_rate!r}.")
        if self.eval_share is not None and not 0 <= self.eval_share < 1:
            raise SparsortError(
                f"eval_share is the share of the rows to hold out, from 0 to below 1, not {self.eval_share!r}."
            )
        if self.online_metric not in METRICS:
            raise unknown_choice("online metric", self.online_metric, METRICS)
        refuse_unread_fields(self, READ_BY)


def make_config(config: TrainConfig | None = None, **changes: Any) -> TrainConfig:
    """A configuration with some fields changed.

    Raises:
        SparsortError: an unknown field, or a value that does not fit.
    """
    names = [found.name for found in fields(TrainConfig)]
    for name in changes:
        if name not in names:
            raise unknown_choice("setting of train", name, names)
    return TrainConfig(**{**(asdict(config) if config else {}), **changes})
