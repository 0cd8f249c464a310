"""Reads the language-model head at chosen positions only: losses of given tokens, entropy of the next.

Contract: logits are those of the model's own forward pass. The head's matrix alone does not make them for every model
(Gemma caps them, Granite and Cohere scale them), so what follows the matrix is applied too and the result is checked
against the model once; a model that does something else to its logits is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsort.errors import SparsortError, first_line
from sparsort.scoring.model.backbone import decoder_of
from sparsort.scoring.model.fused import fused

# Positions whose logits stand in memory at once: 128 × 262144 × 4 bytes are 134 MB.
_POSITIONS_AT_ONCE = 128
# Rows of the head's matrix in one product: 512 positions × 8192 logits stay in the cache.
_VOCABULARY_AT_ONCE = 8192
# What configurations call a cap on the logits, cap · tanh(logit / cap), and how the names of caps within blocks begin.
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_CAPS_WITHIN_BLOCKS = ("attn_", "gate_", "mlp_", "moe_", "router_")
# exp of it is 0 in fp32.
_FAR_BELOW = -1e4


class Head:
    """The head of a causal language model, applied to `post_norm` states.

    Raises:
        SparsortError: no output embedding, or logits that cannot be made from it.
    """

    def __init__(self, model: Any, config: Any, name: str, *, compile: bool = False) -> None:
        self._take_in = fused(_take_in) if compile else _take_in
        self._matrix = model.get_output_embeddings()
        if getattr(self._matrix, "weight", None) is None:
            raise SparsortError(
                f"{name!r} has no language-model head of one matrix, so there are no losses, entropies and answers. "
                "Use a sparsity, length or compression scorer."
            )
        # A cap hardly shows on the small logits of the check below, so one that is not known is refused by its name.
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
        """(N, vocabulary) fp32 logits."""
        return self._finish(self._matrix(states_NH).float())

    @torch.inference_mode()
    def losses(self, states_NH: Tensor, targets_N: Tensor) -> Tensor:
        """(N,) negative log-likelihood in nats of `targets_N`, each predicted from its state."""
        parts = zip(torch.split(states_NH, _POSITIONS_AT_ONCE), torch.split(targets_N, _POSITIONS_AT_ONCE), strict=True)
        losses = [
            torch.nn.functional.cross_entropy(self.logits(states), targets, reduction="none")
            for states, targets in parts
        ]
        return torch.cat(losses).double()

    @torch.inference_mode()
    def of_tokens(self, states_NH: Tensor, targets_N: Tensor) -> Tensor:
        """(N,) fp32 logits of one token each, computed in fp32: in bf16 half of the labels of a task would tie."""
        weight = self._matrix.weight[targets_N].float()
        logits = (states_NH.float() * weight).sum(dim=1)
        bias = getattr(self._matrix, "bias", None)
        return self._finish(logits if bias is None else logits + bias[targets_N].float())

    @torch.inference_mode()
    def normalisers(self, states_NH: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) log of the softmax's sum, and (N,) entropy in nats of the next token's distribution, both fp32."""
        weight, bias = self._matrix.weight, getattr(self._matrix, "bias", None)
        plain = self._scale == 1.0 and not self._cap
        top = states_NH.new_full((len(states_NH),), -torch.inf, dtype=torch.float32)
        total, moment = torch.zeros_like(top), torch.zeros_like(top)
        for start in range(0, len(weight), _VOCABULARY_AT_ONCE):
            part = slice(start, start + _VOCABULARY_AT_ONCE)
            logits = torch.nn.functional.linear(states_NH, weight[part], None if bias is None else bias[part])
            top, total, moment = self._take_in(logits if plain else self._finish(logits), top, total, moment)
        return top + total.log(), total.log() - moment / total

    def _finish(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        logits = logits * self._scale if self._scale != 1.0 else logits
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits

    @torch.inference_mode()
    def entropies(self, states_NH: Tensor) -> Tensor:
        """(N,) entropy in nats of the next token's distribution."""
        entropies = []
        for states in torch.split(states_NH, _POSITIONS_AT_ONCE):
            log_p = self.logits(states).log_softmax(dim=-1)
            entropies.append(-(log_p.exp() * log_p).nan_to_num().sum(dim=-1))
        return torch.cat(entropies).double()

    @torch.inference_mode()
    def _check(self, model: Any, name: str) -> None:
        """Compare the logits of a few tokens with the model's own, from the states that `Backbone.head_site` gives."""
        device = next(model.parameters()).device
        ids = torch.arange(3, device=device)[None]
        states: list[Tensor] = []
        hook = decoder_of(model).register_forward_hook(lambda _module, _args, output: states.append(output[0]))
        try:
            theirs = model(input_ids=ids, use_cache=False).logits
        except Exception as error:  # its blocks run on token ids alone, but a class may want more for its logits
            raise SparsortError(
                f"{name!r} computes no logits from token ids alone ({first_line(error).rstrip('.')}). Use a sparsity, length or "
                "compression scorer."
            ) from error
        finally:
            hook.remove()
        # One rounding of the model's dtype at the logits' size is what a different order of the same steps may cost.
        tolerance = 8 * torch.finfo(theirs.dtype).eps * max(1.0, float(theirs.abs().max()))
        fits = len(states) == 1 and states[0].shape[-1] == self._matrix.weight.shape[-1]
        ours = self.logits(states[0][0]) if fits else theirs.new_zeros(0)
        theirs = theirs[0].float()
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True):
            raise SparsortError(
                f"{name!r} computes its logits in a way that sparsort does not know, so losses, entropies and answers would "
                "be wrong. Use a sparsity, length or compression scorer, and report the model."
            )


def _take_in(logits_NV: Tensor, top: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, Σ w and Σ w·(l − largest) with w = exp(l − largest), each (N,), with more of the vocabulary taken in."""
    logits_NV = logits_NV.float()
    new_top = torch.maximum(top, logits_NV.amax(dim=1))
    old = torch.exp(top - new_top)
    # A logit of −∞ weighs nothing, and 0 · ∞ would be NaN.
    shifted = (logits_NV - new_top[:, None]).clamp_(min=_FAR_BELOW)
    weights = shifted.exp()
    # Σ w·(l − top) under a new top: the old sum's terms move by (old top − new top).
    move = torch.where(total > 0, top - new_top, 0.0)
    moment = (moment + total * move) * old + (weights * shifted).sum(dim=1)
    return new_top, total * old + weights.sum(dim=1), moment
