"""Detects whether a model in memory has been edited, without reading its weights.

Contract: two fingerprints of one model are equal unless the model was edited between them in a way that leaves a trace. Such
edits are: a parameter or buffer that was replaced, converted, moved, or changed by operations of torch; another module, class,
`forward`, hook, activation function, epsilon or other plain setting of a module; another configuration; a pruned weight; an
index branch.

Limits: torch does not count changes in place through `.data`, `.numpy()` or a pointer, or any changes of tensors that were
created in inference mode. A fingerprint does not reveal them; only a hash of all bytes would. The same is true of changes in
lists and dictionaries of modules, and of functions that are replaced in the Python modules that call them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, type(None))
# Rotary embeddings that recompute their frequencies in every pass, so that their buffers change without an edit.
_RECOMPUTED = ("longrope", "dynamic")


class ModelFingerprint:
    """The state of a model (a torch module with a configuration) at the time of the call."""

    def __init__(self, model: Any) -> None:
        self._facts = _facts(model)
        # As long as these aliases exist, no other tensor can be allocated at the address of a parameter.
        self._aliases = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]

    def fits(self, model: Any) -> bool:
        """Whether the model is unchanged, within the limits above."""
        return self._facts == _facts(model)


def _facts(model: Any) -> list[Any]:
    facts: list[Any] = [repr(model.config.to_dict())]
    facts += [tuple(getattr(torch_module, name)) for name in _GLOBAL_HOOKS]
    # With duplicates, so that a module that is used in two places and is replaced in one of them changes the list.
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
        # Tensors that were created in inference mode have no version counter.
        version = None if value.is_inference() else value._version
        return _address(value), version, value.dtype, value.device, tuple(value.shape), value.stride()
    if isinstance(value, _PLAIN):
        # As text, because a NaN does not equal itself, and True equals 1.
        return repr(value)
    return id(value) if callable(value) else None


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        # A wrapper subclass, such as a quantised tensor, has no memory of its own.
        return id(tensor)
