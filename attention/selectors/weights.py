"""The small weights that selectors add to a layer, and their initial values.

Contract: initial values come from a separate generator, seeded by the configuration's seed and the layer's number. They are
drawn on the CPU in float32 and then cast, so they are identical on every device and, except for rounding, in every dtype. The
global random state does not change.

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
    """The sizes and settings of the attention module that a selector is added to.

    Attributes:
        layer: number of the layer, from 0.
        hidden: C.
        heads, groups: H and G.
        width: D.
        normed: whether the module normalises its queries and keys.
        eps: epsilon of the RMS norms.
        spread: standard deviation of the model's initial weights.
        device, dtype: device and dtype of the module's own weights.
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
        """Read the shape from an attention module of transformers (Llama, Qwen, Mistral, Gemma 3 and similar).

        Raises:
            SparsortError: the module has no separate `q_proj` and `k_proj`, or no configuration with the number of its heads.
        """
        # `Any` because transformers is untyped.
        untyped: Any = module
        projection: Any = getattr(untyped, "q_proj", None)
        config: Any = getattr(untyped, "config", None)
        if projection is None or not hasattr(untyped, "k_proj") or not hasattr(config, "num_key_value_heads"):
            raise SparsortError(
                f"a selector cannot be added to {type(module).__name__}: expected q_proj and k_proj, and a configuration with "
                "num_attention_heads and num_key_value_heads, as in Llama, Qwen, Mistral and Gemma 3. Keep this layer dense."
            )
        heads = config.num_attention_heads
        weight = projection.weight
        # Quantised weights are stored as integers. The selector's weights then take the dtype that the model computes in.
        dtype = weight.dtype if weight.is_floating_point() else getattr(config, "dtype", None) or torch.float32
        return cls(
            layer=int(untyped.layer_idx),
            hidden=config.hidden_size,
            heads=heads,
            groups=config.num_key_value_heads,
            width=getattr(untyped, "head_dim", None) or config.hidden_size // heads,
            normed=getattr(untyped, "q_norm", None) is not None and getattr(untyped, "k_norm", None) is not None,
            eps=getattr(config, "rms_norm_eps", 1e-6),
            spread=getattr(config, "initializer_range", None) or 0.02,
            device=weight.device,
            dtype=dtype,
        )

    def check_index_width(self, index_dim: int | None) -> None:
        """Refuse an odd head width D as the default index width I, because the rotary embedding rotates pairs of coordinates.

        Raises:
            SparsortError: `index_dim` is None and D is odd.
        """
        if index_dim is None and self.width % 2:
            raise SparsortError(
                f"layer {self.layer} has heads of width {self.width}, which is the default of index_dim; expected an even width, "
                f"because the rotary embedding rotates pairs. Set an even one, such as index_dim={self.width + 1}."
            )

    def generator(self, seed: int) -> torch.Generator:
        """Return the generator for this layer's initial weights."""
        # The factor keeps the streams of neighbouring seeds and layers apart.
        return torch.Generator(device="cpu").manual_seed((seed * 100_003 + self.layer) % 2**63)

    def drawn(self, *size: int, spread: float, generator: torch.Generator) -> nn.Parameter:
        """Draw a weight of this size from a normal distribution with mean 0 and standard deviation `spread`."""
        # Draw on the CPU in float32 and then cast, so that every device and dtype starts from the same values.
        values = torch.empty(size, dtype=torch.float32, device="cpu").normal_(0.0, spread, generator=generator)
        return nn.Parameter(values.to(self.device, self.dtype))

    def linear(
        self, inputs: int, outputs: int, *, generator: torch.Generator, spread: float | None = None, bias: bool = False
    ) -> nn.Linear:
        """Return a linear layer with a normal weight (`spread`, or the model's spread if None) and a bias of 0."""
        # Build it on the meta device, because a plain nn.Linear draws from the global generator.
        layer = nn.Linear(inputs, outputs, bias=bias, device="meta")
        layer.weight = self.drawn(
            outputs, inputs, spread=self.spread if spread is None else spread, generator=generator
        )
        if bias:
            layer.bias = nn.Parameter(torch.zeros(outputs, device=self.device, dtype=self.dtype))
        return layer


class RMSNorm(nn.Module):
    """RMS norm x / √(mean(x²) + eps) · weight, computed in float32 or wider; the weight starts at 1."""

    def __init__(self, width: int, shape: LayerShape) -> None:
        super().__init__()
        self.eps = shape.eps
        self.weight = nn.Parameter(torch.ones(width, device=shape.device, dtype=shape.dtype))

    def forward(self, states: Tensor) -> Tensor:
        wide = states if states.dtype == torch.float64 else states.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(states.dtype)


def apply_linear(linear: nn.Linear, states: Tensor) -> Tensor:
    """Apply `linear` to states whose dtype may differ from its weight's; under autocast, autocast casts both."""
    out: Tensor = linear(states.to(linear.weight.dtype))
    return out
