"""Whether a model in memory is still as it was, without reading its weights.

Contract: two fingerprints of one model are equal unless it was edited between them in a way that leaves a trace: a parameter or
buffer that was replaced, converted, moved or changed through torch's own operations; another module, class, `forward`, hook,
activation function, epsilon or other plain setting of a module; another configuration; a pruned weight; an index branch.

The limit: torch counts no changes that are made in place through `.data`, `.numpy()` or a pointer, nor any to tensors that were
made in inference mode. A fingerprint does not show them; only a hash of all bytes would. The same holds for changes in lists and
dictionaries that modules hold, and for functions that are replaced in the Python modules that they are called from.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, type(None))
# Rotary embeddings that recompute their frequencies in every pass.
_RECOMPUTED = ("longrope", "dynamic")


class ModelFingerprint:
    """What a model was like when this was made.

    Args:
        model: a torch module with a configuration.
    """

    def __init__(self, model: Any) -> None:
        self._facts = _facts(model)
        # While these aliases exist, no other tensor gets the address of one of them.
        self._held = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]

    def fits(self, model: Any) -> bool:
        """Whether the model is still the same, as far as that shows; see the limit above."""
        return self._facts == _facts(model)


def _facts(model: Any) -> list[Any]:
    facts: list[Any] = [repr(model.config.to_dict())]
    facts += [tuple(getattr(torch_module, name)) for name in _GLOBAL_HOOKS]
    for name, module in model.named_modules(remove_duplicate=False):
        facts += [name, type(module), id(type(module).forward)]
        facts += [tuple(getattr(module, hooks)) for hooks in _HOOKS]
        facts += [(key, _stamp(weight)) for key, weight in module._parameters.items()]
        if any(kind in str(getattr(module, "rope_type", "")) for kind in _RECOMPUTED):
            continue
        facts += [(key, _stamp(buffer)) for key, buffer in module._buffers.items()]
        facts += [(key, _stamp(value)) for key, value in sorted(vars(module).items())]
    return facts


def _stamp(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Tensors of inference mode have no counter.
        version = None if value.is_inference() else value._version
        return _address(value), version, value.dtype, value.device, tuple(value.shape), value.stride()
    if isinstance(value, _PLAIN):
        # As text, in which a NaN equals itself and True differs from 1.
        return repr(value)
    return id(value) if callable(value) else None


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        # A wrapper, such as a quantised tensor's, has no memory of its own.
        return id(tensor)
