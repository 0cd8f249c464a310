"""A checkpoint with an index branch, read back.

Contract: `save_pretrained` of a model with an index branch writes a checkpoint of its family: transformers reads it as the
dense model that it also is, and `load_sparse` with the index branch. The weights go through transformers' own loading, so that
shards, dtypes, device maps and conversions are its business.
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
    """Read a model that `save_pretrained` wrote with its index branch.

    Args:
        folder: a folder, or whatever else `from_pretrained` takes.
        kwargs: of `AutoModelForCausalLM.from_pretrained` (dtype, device_map, …).

    Raises:
        SparsortError: a checkpoint without an index branch, with parts of one, or with another one than its configuration
            says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("attn_implementation", "output_loading_info", "ignore_mismatched_sizes"):
        if name in kwargs:
            raise SparsortError(f"load_sparse does not take {name}; leave it out.")
    model_config = kwargs.pop("config", None) or AutoConfig.from_pretrained(folder)
    wanted = getattr(model_config, "sparse_attention", None)
    if wanted is None:
        raise SparsortError(
            f"{folder} has no index branch: its configuration has no sparse_attention. Load it with AutoModelForCausalLM and "
            "give the model to sparsort.attach_index_branch."
        )
    config = SparseAttentionConfig.from_json(wanted, stored=True)
    # No public call names the class that AutoModelForCausalLM would make.
    family: Any = AutoModelForCausalLM._model_mapping[type(model_config)]
    model, report = _with_branch(family, config).from_pretrained(
        folder, config=model_config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    _check_report(report, folder, config)
    model.__class__ = family
    loaded: PreTrainedModel = model
    return loaded


def _with_branch(family: Any, config: SparseAttentionConfig) -> Any:
    """The family's class, whose models have an index branch before their weights are read."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, *args, **kwargs)
        attach_index_branch(self, config)

    # transformers looks at the source of the class's module, and at its name.
    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__init__": make}
    return type(family.__name__, (family,), names)


def _check_report(report: dict[str, Any], folder: str | Path, config: SparseAttentionConfig) -> None:
    """Refuse weights of another shape, an index branch that is not all there, and one that would not all be used."""
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        name, found, expected = wrong[0]
        raise SparsortError(
            f"{name} in {folder} has shape {tuple(found)} and its configuration says {tuple(expected)} ({len(wrong)} such "
            "weights). For an index branch that is index_dim, or the selector: set sparse_attention in config.json to what it "
            "was saved with."
        )
    dropped = sorted(name for name in report["unexpected_keys"] if _BRANCH in name)
    if dropped:
        raise SparsortError(
            f"{folder} has {len(dropped)} weights of an index branch, such as {dropped[0]}, that have no place in the one "
            f"asked for: {_asked(folder, config)}. Ask for what it was saved with; to start another from its dense weights, load "
            "it with AutoModelForCausalLM and call sparsort.attach_index_branch."
        )
    missing = sorted(name for name in report["missing_keys"] if _BRANCH in name)
    if missing:
        raise SparsortError(
            f"{folder} lacks {len(missing)} weights of the index branch that its configuration names, such as {missing[0]}. To "
            "start from its dense weights, load it with AutoModelForCausalLM and call sparsort.attach_index_branch."
        )


def _asked(folder: str | Path, config: SparseAttentionConfig) -> str:
    """What a configuration asks for of all that decides the weights, beside what the folder says where that differs."""
    from transformers import AutoConfig

    saved = getattr(AutoConfig.from_pretrained(folder), "sparse_attention", None)
    there = SparseAttentionConfig.from_json(saved, stored=True) if saved else config
    parts = []
    for name in ("selector", "index_dim", "index_norm", "layers"):
        now, then = getattr(config, name), getattr(there, name)
        parts.append(f"{name}={now!r}" + (f" (saved with {then!r})" if then != now else ""))
    return ", ".join(parts)
