"""Fuses what stands between the matrix products of a decoder: norms, rotary embeddings, activations, softmax weights.

Contract: the same numbers but for rounding, and less of that: a fused step rounds to the model's dtype once, at its end.
The model is left as it was: blocks are replaced for the length of a pass only.

The trade-off: the faster a processor multiplies matrices, the more of a pass is such steps, so that fusing them pays
(`benchmarks/speed/ablation.py` with and without `--compile`); the compiler takes half a minute first, less where it has done it
before. So it is for long runs, when asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsort.errors import SparsortError

_Function = TypeVar("_Function", bound=Callable[..., Any])
# Forms of one block that differ in what is one (a row, a token, a prefix): each is compiled by itself.
_FORMS = 64


def fused(function: _Function) -> _Function:
    """`function` compiled once for all shapes; it may change its arguments in place as it stands."""
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
    """Refuse to fuse where no C++ compiler is.

    Raises:
        SparsortError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise SparsortError(
            "compiling the model needs a C++ compiler, and none was found. Install g++ or clang (or set CXX), or leave "
            "compile out."
        ) from None


def cause_of(error: BaseException) -> str:
    """What went wrong in compiling, in a line: the first that is no heading."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.endswith("raised:")]
    return told[0][:200].rstrip(".") if told else type(error).__name__


class FusedBlocks:
    """A decoder's blocks, compiled.

    Args:
        blocks: the blocks, alike but for their weights.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        check_compiler()
        self._blocks = list(blocks)
        self._calls = [torch.compile(block._call_impl, dynamic=True) for block in self._blocks]
        self._slow = [
            (parent, name) for block in self._blocks for parent in block.modules() for name in _slow_activations(parent)
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the blocks compiled within the block."""
        fast = _GeluTanh()
        plain = [(parent, name, getattr(parent, name)) for parent, name in self._slow]
        usual: list[Any] = [block._compiled_call_impl for block in self._blocks]
        with ExitStack() as stack:
            stack.enter_context(_settings())
            try:
                for parent, name, _ in plain:
                    setattr(parent, name, fast)
                for block, call in zip(self._blocks, self._calls, strict=True):
                    block._compiled_call_impl = call
                yield
            finally:
                for parent, name, activation in plain:
                    setattr(parent, name, activation)
                for block, call in zip(self._blocks, usual, strict=True):
                    block._compiled_call_impl = call


class _GeluTanh(nn.Module):
    """x · σ(2z) with z = √(2/π)·(x + 0.044715·x³), which is x/2 · (1 + tanh z) with the cheaper of the two functions."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def _slow_activations(parent: nn.Module) -> list[str]:
    from transformers.activations import GELUTanh

    return [name for name, child in parent.named_children() if type(child) is GELUTanh]


@contextmanager
def _settings() -> Iterator[None]:
    # A block's place among its like is a number in it, which would else make each block a program of its own.
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=_FORMS):
        yield
