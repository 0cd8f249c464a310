"""Applies the language-model head at chosen positions: losses of given tokens, and the entropy of the next token.

Contract: the logits equal those of the forward pass of the model. For some models the matrix of the head is not enough (Gemma
caps its logits, Granite and Cohere scale them). These steps are therefore applied as well, and the result is compared with the
model once. A model that transforms its logits in another way is refused.

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsort.errors import SparsortError, first_line
from sparsort.scoring.model.backbone import decoder_of
from sparsort.scoring.model.fused import fused

# The number of positions whose logits are in memory at a time: 128 × 262144 × 4 bytes are 134 MB.
_POSITIONS_AT_ONCE = 128
# The number of rows of the matrix in one product: the logits of 512 positions × 8192 rows stay in the cache.
_VOCABULARY_AT_ONCE = 8192
# Configuration keys of a cap on the logits, cap · tanh(logit / cap), and the prefixes of keys of caps inside blocks.
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_CAPS_WITHIN_BLOCKS = ("attn_", "gate_", "mlp_", "moe_", "router_")
# A logit that is this far below the largest one has the weight exp(−10⁴) = 0 in fp32.
_FAR_BELOW = -1e4


class Head:
    """The head of a causal language model, applied to `post_norm` states.

    Raises:
        SparsortError: the model has no output embedding, or its logits cannot be computed from it.
    """

    def __init__(self, model: Any, config: Any, name: str, *, compile: bool = False) -> None:
        self._accumulate = fused(_accumulate) if compile else _accumulate
        self._matrix = model.get_output_embeddings()
        if getattr(self._matrix, "weight", None) is None:
            raise SparsortError(
                f"{name!r} has no language-model head of one matrix, so there are no losses, entropies or answers. "
                "Use a sparsity, length or compression scorer."
            )
        # A cap hardly changes the small logits of the check below, so an unknown cap is refused by its key.
        caps = [key for key, value in vars(config).items() if "softcap" in key.replace("_", "") and value]
        if unknown := [key for key in caps if key not in _CAPS and not key.startswith(_CAPS_WITHIN_BLOCKS)]:
            raise SparsortError(
                f"{name!r} caps its logits in a way that sparsort does not know ({unknown[0]}). Use another scorer."
            )
        self._cap = next((value for key in _CAPS if (value := getattr(config, key, None))), None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)
        for divisor in ("logits_scaling", "logits_mup_width_multiplier"):
            self._scale /= float(getattr(config, divisor, None) or 1.0)
        self._check(model, name)

    def logits(self, states_NH: Tensor) -> Tensor:
        """(N, V) fp32 logits."""
        return self._finish(self._matrix(states_NH).float())

    @torch.inference_mode()
    def losses(self, states_NH: Tensor, targets_N: Tensor) -> Tensor:
        """(N,) fp64 negative log-likelihood, in nats, of each target token given its state."""
        parts = zip(torch.split(states_NH, _POSITIONS_AT_ONCE), torch.split(targets_N, _POSITIONS_AT_ONCE), strict=True)
        losses = [
            torch.nn.functional.cross_entropy(self.logits(states), targets, reduction="none")
            for states, targets in parts
        ]
        return torch.cat(losses).double()

    @torch.inference_mode()
    def of_tokens(self, states_NH: Tensor, targets_N: Tensor) -> Tensor:
        """(N,) fp32 logits of one token per state."""
        # The product is computed in fp32, because in bf16 half of the labels of a task would tie.
        weight = self._matrix.weight[targets_N].float()
        logits = (states_NH.float() * weight).sum(dim=1)
        bias = getattr(self._matrix, "bias", None)
        return self._finish(logits if bias is None else logits + bias[targets_N].float())

    @torch.inference_mode()
    def normalisers(self, states_NH: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) log-sum-exp of the logits, and (N,) entropy of the next token in nats, both fp32.

        The vocabulary is processed in parts, so that the (N, V) logits are never in memory.
        """
        weight, bias = self._matrix.weight, getattr(self._matrix, "bias", None)
        plain = self._scale == 1.0 and not self._cap
        top = states_NH.new_full((len(states_NH),), -torch.inf, dtype=torch.float32)
        total, moment = torch.zeros_like(top), torch.zeros_like(top)
        for start in range(0, len(weight), _VOCABULARY_AT_ONCE):
            part = slice(start, start + _VOCABULARY_AT_ONCE)
            logits = torch.nn.functional.linear(states_NH, weight[part], None if bias is None else bias[part])
            top, total, moment = self._accumulate(logits if plain else self._finish(logits), top, total, moment)
        # With p = w / total, the entropy −Σ p·log p is log total − Σ w·(l − top) / total.
        return top + total.log(), total.log() - moment / total

    def _finish(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        logits = logits * self._scale if self._scale != 1.0 else logits
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits

    @torch.inference_mode()
    def entropies(self, states_NH: Tensor) -> Tensor:
        """(N,) fp64 entropy of the next token, in nats."""
        entropies = []
        for states in torch.split(states_NH, _POSITIONS_AT_ONCE):
            log_p = self.logits(states).log_softmax(dim=-1)
            # For a logit of −∞ the product is 0 · −∞, which is NaN; its contribution to the entropy is 0.
            entropies.append(-(log_p.exp() * log_p).nan_to_num().sum(dim=-1))
        return torch.cat(entropies).double()

    @torch.inference_mode()
    def _check(self, model: Any, name: str) -> None:
        """Compare the logits of a few tokens with those of the model."""
        device = next(model.parameters()).device
        ids = torch.arange(3, device=device)[None]
        states: list[Tensor] = []
        hook = decoder_of(model).register_forward_hook(lambda _module, _args, output: states.append(output[0]))
        try:
            theirs = model(input_ids=ids, use_cache=False).logits
        except Exception as error:  # the blocks run on token ids alone, but the logits may need more, with any error
            raise SparsortError(
                f"{name!r} computes no logits from token ids alone ({first_line(error).rstrip('.')}). Use a sparsity, length or "
                "compression scorer."
            ) from error
        finally:
            hook.remove()
        # The same steps in another order may differ by a few roundings of the dtype at the size of the largest logit.
        tolerance = 8 * torch.finfo(theirs.dtype).eps * max(1.0, float(theirs.abs().max()))
        fits = len(states) == 1 and states[0].shape[-1] == self._matrix.weight.shape[-1]
        ours = self.logits(states[0][0]) if fits else theirs.new_zeros(0)
        theirs = theirs[0].float()
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True):
            raise SparsortError(
                f"{name!r} computes its logits in a way that sparsort does not know, so losses, entropies and answers would "
                "be wrong. Use a sparsity, length or compression scorer, and report the model."
            )


def _accumulate(logits_NV: Tensor, top: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Update the sums of an online softmax by the logits of one part of the vocabulary.

    Args:
        logits_NV: the logits l of the part; V is its size.
        top: (N,) the largest logit so far.
        total: (N,) Σ w, with w = exp(l − top).
        moment: (N,) Σ w·(l − top).

    Returns:
        The new `top`, `total` and `moment`.
    """
    logits_NV = logits_NV.float()
    new_top = torch.maximum(top, logits_NV.amax(dim=1))
    old = torch.exp(top - new_top)
    # A logit of −∞ has the weight 0, but 0 · −∞ would be NaN in the moment.
    shifted = (logits_NV - new_top[:, None]).clamp_(min=_FAR_BELOW)
    weights = shifted.exp()
    # Under a new top, each old term w·(l − top) changes by w·(top − new top) and is scaled by exp(top − new top). At the start
    # `top` is −∞ and `total` is 0; without the condition their product would be NaN.
    move = torch.where(total > 0, top - new_top, 0.0)
    moment = (moment + total * move) * old + (weights * shifted).sum(dim=1)
    return new_top, total * old + weights.sum(dim=1), moment
