"""The sites of a model where states are read, by name.

| site | tensor (H: hidden size) |
| --- | --- |
| `pre_norm` | input of the final norm, width H; without one, output of the last block, or input of the head if widths differ |
| `post_norm` | output of the final norm, which the head reads, width H |
| `layer:N` | output of block N, counted from 0, or from the end if negative, width H |
| `mlp`, `mlp:N` | inner activation of the MLP of the last block (of block N): the input of its down projection, MLP width |
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
    """The module to hook, and whether its input or its output is read."""

    name: str
    module: nn.Module
    reads: Literal["input", "output"]


def blocks_of(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    """Find the decoder's list of blocks; a `SparsortError` if the architecture shares or nests its blocks."""
    # The first list of the configured length, otherwise the only list that is not inside another one. The configured length may
    # count something else, such as the blocks of the encoder, or attention layers, of which a block has two.
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
    """The norms outside of the blocks, of which one may be the final norm. The caller finds out which by a forward pass."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [m for m in decoder.modules() if id(m) not in inside and "norm" in type(m).__name__.lower()]


def find_site(name: str, *, blocks: nn.ModuleList, final_norm: nn.Module | None, hidden_size: int) -> Site:
    """Find the site of this name in a model.

    Raises:
        SparsortError: the name is unknown (the message suggests the nearest one), the block does not exist, the site is
            `post_norm` and there is no final norm, or the block does not have a single MLP (mixture of experts).
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
    """Refuse a misspelt site before a model is loaded."""
    if name not in ("pre_norm", "post_norm", "mlp") and not name.startswith(("layer:", "mlp:")):
        raise unknown_choice("site", name, ("pre_norm", "post_norm", "mlp", "mlp:N", "layer:N"))


def _down_projection(block: nn.Module, name: str, hidden_size: int) -> nn.Module:
    """The last projection outside of attention whose output has the hidden size."""
    modules = dict(block.named_modules())
    # The output projection of attention also has the hidden size. transformers names attention modules "attn" or "attention".
    attention = [path for path, module in modules.items() if path and "attn" in _label(path, module)]
    projections = {
        path: module
        for path, module in modules.items()
        if _out_features(module) == hidden_size
        and not any(path.startswith(f"{head}.") or path == head for head in attention)
    }
    if not projections or any("expert" in path for path in projections):
        obstacle = "a mixture of experts" if any("expert" in path for path in modules) else "no plain MLP"
        raise SparsortError(
            f"site {name!r}: this block has {obstacle}, so there is no single inner activation. Use 'pre_norm' or 'post_norm'."
        )
    last: nn.Module = list(projections.values())[-1]
    return last


def _label(path: str, module: nn.Module) -> str:
    return f"{path.rpartition('.')[2]} {type(module).__name__}".lower().replace("attention", "attn")


def _out_features(module: Any) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    # In the class Conv1D of transformers (GPT-2), the number of output features is called nf.
    return int(module.nf) if type(module).__name__ == "Conv1D" else None
