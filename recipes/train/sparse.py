"""Sparse attention in `sparsort train`: the selector that is attached, the weights that are trained, the schedule, and measures.

Contract: a model that cannot be made sparse is refused by its configuration alone, before anything is written. Training resumes
the index branch of a checkpoint that has one, and a recipe with another branch is refused. `identity` has all settings that
determine the losses of a run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors import SELECTORS
from sparsort.errors import SparsortError, first_line
from sparsort.recipes.train.model import PRESETS
from sparsort.scoring.model.spec import ModelSpec

if TYPE_CHECKING:
    from sparsort.attention.training.callback import SparseAttentionCallback
    from sparsort.attention.training.schedule import SparseSchedule

_LEARNED = SELECTORS.names(lambda entry: entry.has_weights)
_BRANCH = ".index_branch."
# The settings that determine the weights of a branch. block_size does so only for the selectors whose entry says so.
_SHAPED = ("selector", "layers", "index_dim", "index_norm", "block_size")
# The share of a run's steps, at its end, over which the measures are averaged.
_LAST = 0.1
_AVERAGED = ("lm_loss", "kl", "mass", "recall", "blocks", "dead", "gflops", "gflops_dense")


@dataclass(frozen=True, kw_only=True)
class SparseTraining:
    """How a run trains sparse attention.

    Attributes:
        attention: the sparse attention; the seed of the run is added to its seed (`seeded`).
        freeze_base: whether only the selector is trained, on an existing model.
        warmup_share: the share of the run's steps, at its beginning, in which every query attends to all keys.
        start: with `anneal_share`, the first value of the budget's number (blocks, threshold or top_p).
        anneal_share: the share of the run's steps, after the warm-up, in which that number reaches its configured value.

    Raises:
        SparsortError: shares that are not between 0 and 1, a start that is not a valid budget, or a frozen base with a selector
            that has no weights.
    """

    attention: SparseAttentionConfig
    freeze_base: bool = False
    warmup_share: float = 0.0
    start: float | None = None
    anneal_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_share", "anneal_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SparsortError(f"{name} is a share of the run's steps, from 0 to 1, not {getattr(self, name)!r}.")
        if self.warmup_share + self.anneal_share > 1:
            raise SparsortError(
                f"warmup_share={self.warmup_share} and anneal_share={self.anneal_share} are more than the whole run. Their sum "
                "may be at most 1."
            )
        if (self.start is None) != (self.anneal_share == 0):
            raise SparsortError(
                f"start={self.start!r} and anneal_share={self.anneal_share!r} belong together: the budget goes from start to the "
                "configured number in that share of the run. Give both, or neither."
            )
        self._check_start()
        if self.freeze_base and self.attention.selector not in _LEARNED:
            raise SparsortError(
                f"freeze_base = true leaves nothing to train: the selector {self.attention.selector!r} has no weights. Choose "
                f"one that has weights ({', '.join(_LEARNED)}), or omit freeze_base."
            )

    def _check_start(self) -> None:
        start, attention = self.start, self.attention
        if start is None:
            return
        share = next((name for name in ("threshold", "top_p") if getattr(attention, name) is not None), None)
        number = isinstance(start, int | float) and not isinstance(start, bool)
        if share is None and not (number and 1 <= start < math.inf):
            raise SparsortError(f"start={start!r} is not a number of blocks; expected 1 or more.")
        if share is not None and not (number and 0 < start <= 1):
            raise SparsortError(
                f"start={start!r} is not a valid {share}, which sets the budget; expected a share above 0 and at most 1."
            )

    def seeded(self, seed: int) -> SparseTraining:
        """The same settings for a run with this seed, which determines the selector's weights as well as the model's."""
        return replace(self, attention=replace(self.attention, seed=self.attention.seed + seed))

    def schedule(self, steps: int) -> SparseSchedule:
        """The shares as numbers of steps; a share above 0 is at least one step."""
        from sparsort.attention.training.schedule import SparseSchedule

        warmup, anneal = (
            max(1, round(share * steps)) if share else 0 for share in (self.warmup_share, self.anneal_share)
        )
        return SparseSchedule(warmup_steps=warmup, start=self.start, anneal_steps=anneal)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model to which this sparse attention cannot be attached, by the model's configuration.

        Raises:
            SparsortError: the model is not supported, or there is no such model; the frozen base was never trained; or the model
                has trained weights of another index branch, which would be dropped.
        """
        from transformers import AutoModelForCausalLM

        model = spec.name
        if self.freeze_base and model in PRESETS:
            raise SparsortError(
                f"freeze_base = true trains a selector on a model that was trained before, and {model!r} starts from random "
                "weights. Name a checkpoint with model (--model), or omit freeze_base."
            )
        config = _configuration(spec)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise SparsortError(f"the model {model!r} is a {config.model_type}, which is not a causal language model.")
        if dropout := getattr(config, "attention_dropout", 0):
            raise SparsortError(
                f"the model {model!r} drops out {dropout} of its attention weights in training, which block-sparse attention "
                "does not do. Set attention_dropout to 0 in its config.json."
            )
        wanted, trained = self.attention, _learned_branch(config)
        shapes = _branch_shapes(config, wanted)
        if trained is None or (trained.selector == wanted.selector and _branch_shapes(config, trained) == shapes):
            return
        differing = ", ".join(
            f"{name} ({getattr(trained, name)!r} there, {getattr(wanted, name)!r} in the recipe)"
            for name in _SHAPED
            if getattr(trained, name) != getattr(wanted, name)
            and (name != "block_size" or SELECTORS[wanted.selector].shaped_by_blocks)
        )
        raise SparsortError(
            f"the model {model!r} has a trained index branch, which this recipe would drop: they differ in {differing}. "
            "Continue with the recipe that it was trained with, or a .toml file with the same [attention]. To train another "
            "branch on its dense weights, remove sparse_attention from the config.json of a copy of the model."
        )

    def attach(self, model: Any, spec: ModelSpec | str, steps: int) -> SparseAttentionCallback:
        """Make a model sparse, in place, and freeze the weights that are not trained.

        Args:
            model: a model with the dense weights of the model that `spec` names.
            spec: the model as it was loaded.
            steps: steps of the run.

        Returns:
            The callback that applies the schedule and takes the measures in Trainer.
        """
        from sparsort.attention.attach import attach_index_branch
        from sparsort.attention.training.callback import SparseAttentionCallback

        trained = _trained_branch(ModelSpec.of(spec), self.attention)
        attach_index_branch(model, self.attention)
        model.load_state_dict(trained, strict=False)
        for weight, parameter in model.named_parameters():
            if self.freeze_base and _BRANCH not in weight:
                parameter.requires_grad_(False)
        return SparseAttentionCallback(self.schedule(steps))


def identity(sparse: SparseTraining | None) -> dict[str, Any]:
    """The settings that determine the losses of a run, as JSON values; for dense attention, the same names with None."""
    shape = sparse or SparseTraining(attention=SparseAttentionConfig())
    own = {name: value for name, value in asdict(shape).items() if name != "attention"}
    values = {**shape.attention.to_json(), **own}
    return {f"attention {name}": None if sparse is None else value for name, value in values.items()}


def refuse_to_drop(spec: ModelSpec) -> None:
    """Refuse a checkpoint whose index branch dense training would drop.

    Raises:
        SparsortError: the checkpoint has an index branch.
    """
    config = Path(spec.name).expanduser() / "config.json"
    if config.is_file() and _has_branch(_configuration(spec)):
        raise SparsortError(
            f"the model {spec.name!r} has sparse attention, which training without a recipe would drop. Continue with the "
            "recipe that it was trained with, such as recipe='sparse' (--recipe sparse)."
        )


def summary(log: list[dict[str, Any]]) -> dict[str, float | None]:
    """The measures of a run's sparse attention: means over the last tenth of its steps, or None if nothing was measured.

    Args:
        log: the log of Trainer.

    Returns:
        lm_loss, kl, mass, recall, blocks, dead, gflops and gflops_dense as `SparseAttentionCallback` logs them, most_blocks, and
        `saving`: the operations of dense attention divided by those of this attention, by formula.
    """
    steps = [entry for entry in log if "loss" in entry]
    last = steps[-max(1, math.ceil(_LAST * len(steps))) :]
    values = {name: [entry[f"sparse/{name}"] for entry in last if f"sparse/{name}" in entry] for name in _AVERAGED}
    means: dict[str, float | None] = {
        name: sum(logged) / len(logged) if logged else None for name, logged in values.items()
    }
    means["most_blocks"] = max(
        (entry["sparse/most_blocks"] for entry in last if "sparse/most_blocks" in entry), default=None
    )
    spent, dense = sum(values["gflops"]), sum(values["gflops_dense"])
    return {**means, "saving": dense / spent if spent else None}


def _configuration(spec: ModelSpec) -> Any:
    """The configuration of a model, without its weights."""
    from transformers import AutoConfig, LlamaConfig

    from sparsort.scoring.loading.demo_model import hint_at, quiet_transformers, resolve_model
    from sparsort.scoring.loading.hub import cached_only

    model = str(spec.name)
    if model in PRESETS:
        return LlamaConfig(**PRESETS[model])
    resolved = resolve_model(model)
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    if resolved.gguf_file:
        options["gguf_file"] = resolved.gguf_file
    if resolved.is_hub_id:
        options["local_files_only"] = cached_only(resolved.folder_or_id, revision=spec.revision)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(resolved.folder_or_id, **options)
    except (OSError, ValueError, KeyError) as error:
        raise SparsortError(
            f"cannot read the configuration of the model {model!r}: {first_line(error)}{hint_at(model, error)} Give a "
            "folder with config.json and weights, a hub id that this machine can reach, or 'tiny' or 'small'."
        ) from error


def _has_branch(config: Any) -> bool:
    # Other libraries may use this name for something else.
    entry = getattr(config, "sparse_attention", None)
    return isinstance(entry, Mapping) and "selector" in entry


def _learned_branch(config: Any) -> SparseAttentionConfig | None:
    """The sparse attention in the configuration of a checkpoint, if its selector has weights."""
    if not _has_branch(config):
        return None
    attention = SparseAttentionConfig.from_json(config.sparse_attention, stored=True)
    return attention if attention.selector in _LEARNED else None


def _branch_shapes(config: Any, attention: SparseAttentionConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that sparse attention adds to a model with this configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    from sparsort.attention.attach import attach_index_branch

    # The meta device allocates no memory for the weights.
    with torch.device("meta"):
        # Attaching writes into the configuration, so it gets a copy.
        model = attach_index_branch(AutoModelForCausalLM.from_config(copy.deepcopy(config)), attention)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items() if _BRANCH in name}


def _trained_branch(spec: ModelSpec, attention: SparseAttentionConfig) -> dict[str, Any]:
    """The weights of a checkpoint's index branch; empty for a dense checkpoint, and for a selector without weights."""
    if spec.name in PRESETS:
        return {}
    config = _configuration(spec)
    if _learned_branch(config) is None:
        return {}
    import torch

    from sparsort.attention.loading import load_sparse
    from sparsort.scoring.loading.demo_model import quiet_transformers, resolve_model

    config.sparse_attention = attention.to_json()
    with quiet_transformers():
        loaded = load_sparse(
            resolve_model(str(spec.name)).folder_or_id,
            config=config,
            dtype=torch.float32,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
        )
    return {name: weight for name, weight in loaded.state_dict().items() if _BRANCH in name}
