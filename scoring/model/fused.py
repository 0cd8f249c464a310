"""Compiles the steps between the matrix products of a decoder: norms, rotary embeddings, activations, softmax weights.

Contract: the results are the same up to rounding, and they are rounded less often, because a fused step rounds to the dtype of
the model only at its end. Blocks are replaced only during a pass, so the model is unchanged afterwards.

Trade-off: the faster a processor multiplies matrices, the larger is the share of these steps in a pass, and the more time fusing
saves (`benchmarks/speed/ablation.py` with and without `--compile`). The compiler first takes half a minute, or less if its cache
has the result. Compiling is therefore optional, and meant for long runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsort.errors import SparsortError

_Function = TypeVar("_Function", bound=Callable[..., Any])
# The largest number of variants of one block. torch compiles a variant for each combination of dimensions of size 1 (one row, one
# token, one prefix).
_VARIANTS = 64


def fused(function: _Function) -> _Function:
    """Compile a function once for all shapes. It may change its arguments in place."""
    return _fused(function)  # type: ignore[return-value]


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with _settings():
            return compiled(*args)

    return run


def check_compiler() -> None:
    """Raise a `SparsortError` if there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise SparsortError(
            "compiling the model needs a C++ compiler, and none was found. Install g++ or clang (or set CXX), or do not pass "
            "compile."
        ) from None


def cause_of(error: BaseException) -> str:
    """The cause of a compiler error in one line: the first line that is not a heading such as "backend='inductor' raised:"."""
    lines = [line.strip() for line in str(error).splitlines()]
    causes = [line for line in lines if line and not line.endswith("raised:")]
    return causes[0][:200].rstrip(".") if causes else type(error).__name__


class FusedBlocks:
    """The compiled blocks of a decoder. The blocks may differ only in their weights."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        check_compiler()
        self._blocks = list(blocks)
        self._calls = [torch.compile(block._call_impl, dynamic=True) for block in self._blocks]
        self._slow = [
            (parent, name) for block in self._blocks for parent in block.modules() for name in _slow_activations(parent)
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the blocks of the model by the compiled ones inside the `with` block."""
        fast = _GeluTanh()
        originals = [(parent, name, getattr(parent, name)) for parent, name in self._slow]
        # `nn.Module.__call__` calls `_compiled_call_impl` if it is set. `Module.compile` sets it too, so it is restored.
        original_calls: list[Any] = [block._compiled_call_impl for block in self._blocks]
        with _settings():
            try:
                for parent, name, _ in originals:
                    setattr(parent, name, fast)
                for block, call in zip(self._blocks, self._calls, strict=True):
                    block._compiled_call_impl = call
                yield
            finally:
                for parent, name, activation in originals:
                    setattr(parent, name, activation)
                for block, call in zip(self._blocks, original_calls, strict=True):
                    block._compiled_call_impl = call


class _GeluTanh(nn.Module):
    """x · σ(2z) with z = √(2/π)·(x + 0.044715·x³), which equals x/2 · (1 + tanh z), but the sigmoid is cheaper."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def _slow_activations(parent: nn.Module) -> list[str]:
    from transformers.activations import GELUTanh

    return [name for name, child in parent.named_children() if type(child) is GELUTanh]


@contextmanager
def _settings() -> Iterator[None]:
    # `layer_idx` is an int attribute of each block. Without the first flag, dynamo specialises on it and compiles every block.
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=_VARIANTS):
        yield
