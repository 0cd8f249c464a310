"""The check that a curriculum can be mixed into a trainer: the trainer must leave batches to transformers' Trainer.

Contract: a trainer that chooses its own batches is refused on construction, before a model is loaded, and the error names its
class. Either it would bypass the plan, or the plan would bypass it: a trainer that repeats each prompt for a group of completions
needs batches in its own layout, or groups are split and advantages are normalised across different prompts.

TRL's GRPOTrainer and RLOOTrainer are accepted, because their layout is known (`generation`). Trainers that generate within a
step, for the prompts of that step only, are accepted too (TRL's OnlineDPOTrainer, GKDTrainer): they use the batches that they
get.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from sparsort.curriculum.loading.trainer.generation import GROUPED, generates_in_groups
from sparsort.errors import SparsortError

_SAMPLER, _LOADER, _INPUTS = "_get_train_sampler", "get_train_dataloader", "_prepare_inputs"
_GENERATION = ("num_generations", "generation_batch_size", "steps_per_generation")


def refuse_mixin_after_trainer(trainer: type, mixin: type) -> None:
    """Refuse `class Mine(SFTTrainer, CurriculumMixin)`, in which the trainer's own `__init__` comes first.

    Raises:
        SparsortError: a trainer comes before the mixin among the bases.
    """
    before = trainer.__mro__[1 : trainer.__mro__.index(mixin)]
    if first := next((cls for cls in before if issubclass(cls, Trainer) and not issubclass(cls, mixin)), None):
        raise SparsortError(
            f"class {trainer.__name__} has {first.__name__} before {mixin.__name__} among its bases, so the mixin would "
            f"have no effect. Put the mixin first: class {trainer.__name__}({mixin.__name__}, {first.__name__})."
        )


def refuse_own_batches(trainer: type, mixin: type, args: Any = None, *, plan_packs: bool = False) -> None:
    """Refuse a class of trainer that chooses, orders or generates its own training batches.

    Args:
        trainer: the class that is constructed, a subclass of `mixin`.
        mixin: the class that adds a curriculum to a trainer.
        args: the trainer's arguments, if they are known.
        plan_packs: whether the plan packs rows.

    Raises:
        SparsortError: a class in the MRO defines its own sampler or train dataloader or generates batches, or the arguments
            make the trainer pack or shuffle the rows.
    """
    for cls in trainer.__mro__:
        is_trusted = cls in Trainer.__mro__ or cls.__module__.startswith("sparsort.")
        if not is_trusted and (reason := _own_batches(cls, mixin)):
            raise _refusal(cls, reason, args)
    if generates_in_groups(trainer):
        # `shuffle_dataset` is on by default there and has an effect on the sampler only, which the plan replaces.
        return
    if generating := [name for name in _GENERATION if getattr(args, name, None) is not None]:
        raise _refusal(_nearest_class(trainer, mixin), f"{type(args).__name__} sets {generating[0]}", args)
    name = _nearest_class(trainer, mixin).__name__
    # An SFTTrainer that does not prepare the dataset neither packs nor shuffles it, and `packing` chooses the collator only.
    is_prepared = not (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset")
    if getattr(args, "packing", False) is True and (is_prepared or plan_packs):
        raise SparsortError(
            f"packing=True makes {name} replace the rows of the plan by packed sequences. Either pack with the plan, which keeps "
            "its order: plan_curriculum(…, packing='next_fit', pack_length=…) and packing=False. Or pack first "
            "(trl.pack_dataset), plan the packed sequences without packing, and pass them with "
            "dataset_kwargs={'skip_prepare_dataset': True}."
        )
    if getattr(args, "shuffle_dataset", False) is True and is_prepared:
        raise SparsortError(
            f"shuffle_dataset=True makes {name} put the rows into an order of its own, which is not that of the plan; omit it: "
            "the plan orders the rows."
        )


def _own_batches(cls: type, mixin: type) -> str | None:
    """A description of how a class chooses its own batches; None if it does not."""
    own = vars(cls)
    if f"{cls.__module__}.{cls.__qualname__}" in GROUPED:
        return None
    if _SAMPLER in own:
        return f"it defines {_SAMPLER}"
    # A subclass of the mixin may override the loader and build on it.
    if issubclass(cls, mixin):
        return None
    if _LOADER in own:
        return f"it defines {_LOADER}"
    if _INPUTS in own and _generates(own[_INPUTS]):
        return f"it generates in {_INPUTS}"
    return None


def _generates(method: Callable[..., Any]) -> bool:
    # A heuristic: the method uses a name with "generat", such as `self._generate` or `self.generation_config`.
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and any("generat" in name for name in (*code.co_names, *code.co_varnames))


def _nearest_class(trainer: type, mixin: type) -> type:
    """The next trainer class after the mixin in the MRO; the trainer itself if there is none."""
    after = trainer.__mro__[trainer.__mro__.index(mixin) + 1 :]
    return next((cls for cls in after if cls is not Trainer and issubclass(cls, Trainer)), trainer)


def _refusal(cls: type, reason: str, args: Any) -> SparsortError:
    option = " and shuffle_dataset=False" if hasattr(args, "shuffle_dataset") else ""
    return SparsortError(
        f"{cls.__name__} chooses its own training batches ({reason}), which a curriculum would replace: use it without "
        f"CurriculumMixin, on rows that are already in order (train_dataset.select(plan.order){option}), or mix the curriculum "
        "into a trainer whose batches are known, such as TRL's SFTTrainer, DPOTrainer or GRPOTrainer."
    )
