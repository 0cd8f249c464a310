"""The small weights that selectors add to a layer, and how they start.

Contract: first values come from a generator of their own, seeded by the configuration's seed and the layer's number, drawn on
the CPU in float32 and then cast: the same on every device and in every dtype, and no global random state moves.

Legend: C hidden width, H query heads, G groups (key/value heads), D head width, I a selector's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a selector needs to know of the attention module that it joins.

    Attributes:
        layer: the layer's number.
        hidden: C.
        heads, groups: H and G.
        width: D.
        normed: whether the module norms its queries and keys.
        eps: of RMS norms.
        spread: standard deviation of the model's first weights.
        device, dtype: of the module's own weights.
    """

    layer: int
    hidden: int
    heads: int
    groups: int
    width: int
    normed: bool
    eps: float
    spread: float
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module) -> LayerShape:
        """Read from an attention module of transformers (Llama, Qwen, Mistral, Gemma 3 and others like them).

        Raises:
            SparsortError: the module has no separate `q_proj` and `k_proj`, or says nothing of its heads.
        """
        # Any: transformers is untyped.
        found: Any = module
        projection: Any = getattr(found, "q_proj", None)
        config: Any = getattr(found, "config", None)
        if projection is None or not hasattr(found, "k_proj") or not hasattr(config, "num_key_value_heads"):
            raise SparsortError(
                f"a selector cannot join {type(module).__name__}: it needs q_proj and k_proj, and a configuration with "
                "num_attention_heads and num_key_value_heads, as Llama, Qwen, Mistral and Gemma 3 have them."
            )
        heads = config.num_attention_heads
        weight = projection.weight
        # Quantised weights are whole numbers: a selector beside them computes in what the model computes in.
        dtype = weight.dtype if weight.is_floating_point() else getattr(config, "dtype", None) or torch.float32
        return cls(
            layer=int(found.layer_idx),
            hidden=config.hidden_size,
            heads=heads,
            groups=config.num_key_value_heads,
            width=getattr(found, "head_dim", None) or config.hidden_size // heads,
            normed=getattr(found, "q_norm", None) is not None and getattr(found, "k_norm", None) is not None,
            eps=getattr(config, "rms_norm_eps", 1e-6),
            spread=getattr(config, "initializer_range", None) or 0.02,
            device=weight.device,
            dtype=dtype,
        )

    def check_index_width(self, index_dim: int | None) -> None:
        """Refuse to take an odd head width D for the index width I, because rotary embedding turns pairs of coordinates.

        Raises:
            SparsortError: `index_dim` is None and D is odd.
        """
        if index_dim is None and self.width % 2:
            raise SparsortError(
                f"layer {self.layer} has heads of width {self.width}, and rotary pairs need an even index width. "
                f"Give one, such as index_dim={self.width + 1}."
            )

    def generator(self, seed: int) -> torch.Generator:
        """For this layer's first weights."""
        return torch.Generator(device="cpu").manual_seed((seed * 100_003 + self.layer) % 2**63)

    def drawn(self, *size: int, spread: float, generator: torch.Generator) -> nn.Parameter:
        """A weight of this size, normal around 0."""
        values = torch.empty(size, dtype=torch.float32, device="cpu").normal_(0.0, spread, generator=generator)
        return nn.Parameter(values.to(self.device, self.dtype))

    def linear(
        self, inputs: int, outputs: int, *, generator: torch.Generator, spread: float | None = None, bias: bool = False
    ) -> nn.Linear:
        """A linear map; its weight normal with the model's spread unless another is given, its bias 0."""
        # On the meta device, because a plain nn.Linear draws from the global generator.
        made = nn.Linear(inputs, outputs, bias=bias, device="meta")
        made.weight = self.drawn(outputs, inputs, spread=self.spread if spread is None else spread, generator=generator)
        if bias:
            made.bias = nn.Parameter(torch.zeros(outputs, device=self.device, dtype=self.dtype))
        return made


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, in float32 or wider; the weight starts at 1."""

    def __init__(self, width: int, shape: LayerShape) -> None:
        super().__init__()
        self.eps = shape.eps
        self.weight = nn.Parameter(torch.ones(width, device=shape.device, dtype=shape.dtype))

    def forward(self, states: Tensor) -> Tensor:
        wide = states if states.dtype == torch.float64 else states.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(states.dtype)


def apply_linear(linear: nn.Linear, states: Tensor) -> Tensor:
    """`linear` of states that may have another dtype than its weight; autocast casts them itself."""
    out: Tensor = linear(states.to(linear.weight.dtype))
    return out
