"""Load a checkpoint that has an index branch.

Contract: `save_pretrained` of a model with an index branch writes an ordinary checkpoint of the model's family. transformers
reads it as the dense model, and `load_sparse` reads it with the index branch. transformers loads the weights in both cases, so
shards, dtypes, device maps and conversions work as usual.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.attention.attach import attach_index_branch
from sparsort.attention.config import SparseAttentionConfig
from sparsort.errors import SparsortError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BRANCH = ".index_branch."


def load_sparse(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model that `save_pretrained` wrote with its index branch.

    Args:
        folder: a folder, or another source that `from_pretrained` takes.
        kwargs: arguments of `AutoModelForCausalLM.from_pretrained` (dtype, device_map, …).

    Returns:
        The model with its index branch, as an instance of its family's own class.

    Raises:
        SparsortError: the checkpoint has no index branch, an incomplete one, or one that does not match its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("attn_implementation", "output_loading_info", "ignore_mismatched_sizes"):
        if name in kwargs:
            raise SparsortError(f"load_sparse does not take {name}, because it sets the value itself. Do not pass it.")
    model_config = kwargs.pop("config", None) or AutoConfig.from_pretrained(folder)
    wanted = getattr(model_config, "sparse_attention", None)
    if wanted is None:
        raise SparsortError(
            f"{folder} has no index branch: its configuration has no sparse_attention. Load it with AutoModelForCausalLM and "
            "pass the model to sparsort.attach_index_branch."
        )
    config = SparseAttentionConfig.from_json(wanted, stored=True)
    # transformers has no public function that returns the class which AutoModelForCausalLM would instantiate.
    family: Any = AutoModelForCausalLM._model_mapping[type(model_config)]
    # Mismatched sizes are not an error for transformers here, so that the error below can name index_dim and the selector.
    model, report = _with_branch(family, config).from_pretrained(
        folder, config=model_config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    _check_report(report, folder, config)
    # From here on the model is an ordinary member of its family, which pickles, saves and deep-copies as such.
    model.__class__ = family
    loaded: PreTrainedModel = model
    return loaded


def _with_branch(family: Any, config: SparseAttentionConfig) -> Any:
    """Return a subclass of the family's class whose models have an index branch before their weights are loaded."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, *args, **kwargs)
        attach_index_branch(self, config)

    # transformers inspects the class's name and the source of its module, so both must be those of the family.
    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__init__": make}
    return type(family.__name__, (family,), names)


def _check_report(report: dict[str, Any], folder: str | Path, config: SparseAttentionConfig) -> None:
    """Refuse weights with the wrong shape, an incomplete index branch, and weights that would not be used."""
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        name, stored, expected = wrong[0]
        raise SparsortError(
            f"{name} in {folder} has shape {tuple(stored)}, but its configuration says {tuple(expected)} ({len(wrong)} such "
            "weights). The shapes of an index branch depend on index_dim and the selector: set sparse_attention in "
            "config.json to the values that the model was saved with."
        )
    dropped = sorted(name for name in report["unexpected_keys"] if _BRANCH in name)
    if dropped:
        raise SparsortError(
            f"{folder} has {len(dropped)} weights of an index branch, such as {dropped[0]}, that the requested configuration "
            f"has no place for: {_describe(folder, config)}. Request the settings it was saved with. To start a new index branch "
            "from the dense weights, load the model with AutoModelForCausalLM and call sparsort.attach_index_branch."
        )
    missing = sorted(name for name in report["missing_keys"] if _BRANCH in name)
    if missing:
        raise SparsortError(
            f"{folder} lacks {len(missing)} weights of the index branch that its configuration describes, such as {missing[0]}. "
            "To start from the dense weights, load the model with AutoModelForCausalLM and call sparsort.attach_index_branch."
        )


def _describe(folder: str | Path, config: SparseAttentionConfig) -> str:
    """Return the settings that determine the weights, each with the saved value if that differs."""
    from transformers import AutoConfig

    saved = getattr(AutoConfig.from_pretrained(folder), "sparse_attention", None)
    saved_config = SparseAttentionConfig.from_json(saved, stored=True) if saved else config
    parts = []
    for name in ("selector", "index_dim", "index_norm", "layers"):
        now, then = getattr(config, name), getattr(saved_config, name)
        parts.append(f"{name}={now!r}" + (f" (saved with {then!r})" if then != now else ""))
    return ", ".join(parts)
