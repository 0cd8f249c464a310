"""Sparse attention in `sparsort train`: what is attached, what of it learns, when it is sparse, and what came of it.

Contract: a model that cannot be made sparse is refused by its configuration alone, before anything is written. A checkpoint
that has an index branch goes on with it, and a recipe with another is refused. All of `identity` decides the losses of a run.
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
# What decides the weights of a branch; block_size only where the table says so.
_SHAPED = ("selector", "layers", "index_dim", "index_norm", "block_size")
_LAST = 0.1  # share of a run's steps over which its measures are averaged
_AVERAGED = ("lm_loss", "kl", "mass", "recall", "blocks", "dead", "gflops", "gflops_dense")


@dataclass(frozen=True, kw_only=True)
class SparseTraining:
    """How a run trains sparse attention.

    Attributes:
        attention: what is attached; a run's seed is added to its own (`seeded`).
        freeze_base: train the selector only, on a model that is there.
        warmup_share: of the run's steps, over the full support first.
        start: with `anneal_share`, what the budget's number (blocks, threshold or top_p) begins with.
        anneal_share: of the run's steps, behind the warm-up, in which it reaches the configured one.

    Raises:
        SparsortError: shares that are none, a start that the budget cannot be, or a frozen base beside a selector without
            weights.
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
                "may be 1 at most."
            )
        if (self.start is None) != (self.anneal_share == 0):
            raise SparsortError(
                f"start={self.start!r} and anneal_share={self.anneal_share!r} belong together: the budget goes from start to the "
                "configured one in that share of the run. Give both, or neither."
            )
        self._check_start()
        if self.freeze_base and self.attention.selector not in _LEARNED:
            raise SparsortError(
                f"freeze_base = true leaves nothing to train: the selector {self.attention.selector!r} has no weights. Choose "
                f"one that has ({', '.join(_LEARNED)}), or leave freeze_base out."
            )

    def _check_start(self) -> None:
        start, attention = self.start, self.attention
        if start is None:
            return
        share = next((name for name in ("threshold", "top_p") if getattr(attention, name) is not None), None)
        number = isinstance(start, int | float) and not isinstance(start, bool)
        if share is None and not (number and 1 <= start < math.inf):
            raise SparsortError(f"start={start!r} is no number of blocks; expected 1 or more.")
        if share is not None and not (number and 0 < start <= 1):
            raise SparsortError(
                f"start={start!r} is no {share}, which the budget goes by; expected a share above 0 and at most 1."
            )

    def seeded(self, seed: int) -> SparseTraining:
        """The same in a run with this seed: the selector's weights, like the model's, follow from it."""
        return replace(self, attention=replace(self.attention, seed=self.attention.seed + seed))

    def schedule(self, steps: int) -> SparseSchedule:
        """The shares as steps of a run; a share above 0 is one step at least."""
        from sparsort.attention.training.schedule import SparseSchedule

        warmup, anneal = (
            max(1, round(share * steps)) if share else 0 for share in (self.warmup_share, self.anneal_share)
        )
        return SparseSchedule(warmup_steps=warmup, start=self.start, anneal_steps=anneal)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model whose configuration this cannot be attached to.

        Raises:
            SparsortError: it cannot; no such model; a frozen base that was never trained; trained weights of another index
                branch, which would be dropped.
        """
        from transformers import AutoModelForCausalLM

        model = spec.name
        if self.freeze_base and model in PRESETS:
            raise SparsortError(
                f"freeze_base = true trains a selector on a model that was trained before, and {model!r} starts from random "
                "weights. Name a checkpoint with model (--model), or leave freeze_base out."
            )
        config = _configuration(spec)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise SparsortError(f"the model {model!r} is a {config.model_type}, which is no causal language model.")
        if dropout := getattr(config, "attention_dropout", 0):
            raise SparsortError(
                f"the model {model!r} drops out {dropout} of its attention weights in training, which block-sparse attention "
                "does not do. Set attention_dropout to 0 in its config.json."
            )
        asked, there = self.attention, _learned_branch(config)
        shapes = _branch_shapes(config, asked)
        if there is None or (there.selector == asked.selector and _branch_shapes(config, there) == shapes):
            return
        differing = ", ".join(
            f"{name} ({getattr(there, name)!r} there, {getattr(asked, name)!r} in the recipe)"
            for name in _SHAPED
            if getattr(there, name) != getattr(asked, name)
            and (name != "block_size" or SELECTORS[asked.selector].shaped_by_blocks)
        )
        raise SparsortError(
            f"the model {model!r} has a trained index branch, which this recipe would drop: they differ in {differing}. Go on "
            "with it by the recipe that it was trained by, or a .toml file with the same [attention]. To train another on its "
            "dense weights, take sparse_attention out of the config.json of a copy of the model."
        )

    def attach(self, model: Any, spec: ModelSpec | str, steps: int) -> SparseAttentionCallback:
        """Make a model sparse, in place, and freeze what does not learn.

        Args:
            model: with the dense weights of the model that `spec` names.
            spec: the model as it was loaded.
            steps: of the run.

        Returns:
            What drives and measures it in Trainer.
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
    """What decides the losses of a run, as JSON values by name; the same names, with None, for dense attention."""
    shape = sparse or SparseTraining(attention=SparseAttentionConfig())
    own = {name: value for name, value in asdict(shape).items() if name != "attention"}
    values = {**shape.attention.to_json(), **own}
    return {f"attention {name}": None if sparse is None else value for name, value in values.items()}


def refuse_to_drop(spec: ModelSpec) -> None:
    """Refuse a checkpoint with an index branch that dense training would drop.

    Raises:
        SparsortError: it has one.
    """
    config = Path(spec.name).expanduser() / "config.json"
    if config.is_file() and _has_branch(_configuration(spec)):
        raise SparsortError(
            f"the model {spec.name!r} has sparse attention, which training without a recipe would drop. Go on with it by the "
            "recipe that it was trained by, such as recipe='sparse' (--recipe sparse)."
        )


def summary(log: list[dict[str, Any]]) -> dict[str, float | None]:
    """What a run's sparse attention came to: means over the last tenth of its steps, None where nothing was measured.

    Args:
        log: of Trainer.

    Returns:
        lm_loss, kl, mass, recall, blocks, dead, gflops and gflops_dense as `SparseAttentionCallback` logs them, most_blocks, and
        `saving`, how many times fewer operations attention takes than dense attention would, by formula.
    """
    steps = [entry for entry in log if "loss" in entry]
    last = steps[-max(1, math.ceil(_LAST * len(steps))) :]
    values = {name: [entry[f"sparse/{name}"] for entry in last if f"sparse/{name}" in entry] for name in _AVERAGED}
    found: dict[str, float | None] = {name: sum(held) / len(held) if held else None for name, held in values.items()}
    found["most_blocks"] = max(
        (entry["sparse/most_blocks"] for entry in last if "sparse/most_blocks" in entry), default=None
    )
    spent, dense = sum(values["gflops"]), sum(values["gflops_dense"])
    return {**found, "saving": dense / spent if spent else None}


def _configuration(spec: ModelSpec) -> Any:
    """The configuration of a model, without its weights."""
    from transformers import AutoConfig, LlamaConfig

    from sparsort.scoring.loading.demo_model import hint_at, quiet_transformers, resolve_model
    from sparsort.scoring.loading.hub import cached_only

    model = str(spec.name)
    if model in PRESETS:
        return LlamaConfig(**PRESETS[model])
    resolved = resolve_model(model)
    given: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    if resolved.gguf_file:
        given["gguf_file"] = resolved.gguf_file
    if resolved.is_hub_id:
        given["local_files_only"] = cached_only(resolved.folder_or_id, revision=spec.revision)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(resolved.folder_or_id, **given)
    except (OSError, ValueError, KeyError) as error:
        raise SparsortError(
            f"cannot read the configuration of the model {model!r}: {first_line(error)}{hint_at(model, error)} Give a "
            "folder with config.json and weights, a hub id that this machine can reach, or 'tiny' or 'small'."
        ) from error


def _has_branch(config: Any) -> bool:
    # Other libraries may keep something else under this name.
    found = getattr(config, "sparse_attention", None)
    return isinstance(found, Mapping) and "selector" in found


def _learned_branch(config: Any) -> SparseAttentionConfig | None:
    """The sparse attention of a checkpoint, by its configuration, if it has trained weights of its own."""
    if not _has_branch(config):
        return None
    found = SparseAttentionConfig.from_json(config.sparse_attention, stored=True)
    return found if found.selector in _LEARNED else None


def _branch_shapes(config: Any, attention: SparseAttentionConfig) -> dict[str, tuple[int, ...]]:
    """The weights that sparse attention adds to a model of this configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    from sparsort.attention.attach import attach_index_branch

    with torch.device("meta"):
        # A copy: what is attached writes into it.
        model = attach_index_branch(AutoModelForCausalLM.from_config(copy.deepcopy(config)), attention)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items() if _BRANCH in name}


def _trained_branch(spec: ModelSpec, attention: SparseAttentionConfig) -> dict[str, Any]:
    """The weights of the index branch that a checkpoint has; none of a dense one, or of a selector without weights."""
    if spec.name in PRESETS:
        return {}
    config = _configuration(spec)
    if _learned_branch(config) is None:
        return {}
    import torch

    from sparsort.attention.attach import load_sparse
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
