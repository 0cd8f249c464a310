"""Where in the model a state is read: the sites by name, found on a loaded model.

| site | tensor |
| --- | --- |
| `pre_norm` | input of the final norm, width H; without one the last block's output, or what the head reads if widths differ |
| `post_norm` | output of the final norm, what the head reads, width H |
| `layer:N` | output of block N, counted from 0, negative from the end, width H |
| `mlp`, `mlp:N` | inner activation of the last block's MLP (of block N's): the input of its down projection, width of the MLP |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sparsort.errors import SparsortError, unknown_choice

_SITE = re.compile(r"(?P<kind>layer|mlp):(?P<number>-?\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One place: the module to hook, and whether its input or its output is read."""

    name: str
    module: nn.Module
    reads: Literal["input", "output"]


def blocks_of(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder's list of blocks: the first module list of the configured length, else the only one within no other.

    The configured length may count something else: the encoder's blocks, or attentions of which a block has two.

    Raises:
        SparsortError: there is none (an architecture that shares or nests its blocks).
    """
    lists = {path: each for path, each in decoder.named_modules() if isinstance(each, nn.ModuleList) and len(each)}
    for module in lists.values():
        if len(module) == n_layers:
            return module
    outer = [
        module for path, module in lists.items() if not any(path.startswith(f"{other}.") for other in lists if other)
    ]
    if len(outer) == 1:
        return outer[0]
    raise SparsortError(
        f"{type(decoder).__name__} has no list of {n_layers} blocks, so this architecture is not supported. "
        "Use another model, or a length or compression scorer."
    )


def norm_candidates(decoder: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """Modules that may be the final norm: norms that stand outside the blocks. The caller probes which one it is."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [m for m in decoder.modules() if id(m) not in inside and "norm" in type(m).__name__.lower()]


def find_site(name: str, *, blocks: nn.ModuleList, final_norm: nn.Module | None, hidden_size: int) -> Site:
    """Resolve a site's name on a model.

    Raises:
        SparsortError: an unknown name (the nearest is suggested), a block that is not there, a model without a final
            norm asked for `post_norm`, a block without a single MLP (mixture of experts).
    """
    last = len(blocks) - 1
    if name == "pre_norm":
        return Site(name=name, module=final_norm or blocks[last], reads="input" if final_norm else "output")
    if name == "post_norm":
        if final_norm is None:
            raise SparsortError(
                "this model has no final norm, so it has no site 'post_norm'. Use 'pre_norm', the last block's output."
            )
        return Site(name=name, module=final_norm, reads="output")
    match = _SITE.fullmatch(name)
    if not match and name != "mlp":
        raise unknown_choice(
            "site", name, ("pre_norm", "post_norm", "mlp", f"mlp:0 … mlp:{last}", f"layer:0 … layer:{last}")
        )
    number = int(match["number"]) if match else last
    if not -len(blocks) <= number <= last:
        raise SparsortError(
            f"site {name!r}: the model has {len(blocks)} blocks, numbered 0 to {last} (or -1 to -{len(blocks)})."
        )
    if match and match["kind"] == "layer":
        return Site(name=name, module=blocks[number], reads="output")
    return Site(name=name, module=_down_projection(blocks[number], name, hidden_size), reads="input")


def check_site(name: str) -> None:
    """Catch a misspelt site before a model is loaded for it."""
    if name not in ("pre_norm", "post_norm", "mlp") and not name.startswith(("layer:", "mlp:")):
        raise unknown_choice("site", name, ("pre_norm", "post_norm", "mlp", "mlp:N", "layer:N"))


def _down_projection(block: nn.Module, name: str, hidden_size: int) -> nn.Module:
    """The last projection outside attention that comes back to the model's width."""
    attention = [path for path, module in block.named_modules() if path and "attn" in _label(path, module)]
    found = [
        (path, module)
        for path, module in block.named_modules()
        if _out_features(module) == hidden_size
        and not any(path.startswith(f"{head}.") or path == head for head in attention)
    ]
    experts = sum("expert" in path for path, _ in found)
    if not found or experts:
        what = (
            "a mixture of experts"
            if experts or any("expert" in path for path, _ in block.named_modules())
            else "no plain MLP"
        )
        raise SparsortError(
            f"site {name!r}: this block has {what}, so there is no single inner activation. Use 'pre_norm' or 'post_norm'."
        )
    module: nn.Module = found[-1][1]
    return module


def _label(path: str, module: nn.Module) -> str:
    return f"{path.rpartition('.')[2]} {type(module).__name__}".lower().replace("attention", "attn")


def _out_features(module: Any) -> int | None:
    # transformers' Conv1D (GPT-2) calls it nf.
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if type(module).__name__ == "Conv1D" else None
