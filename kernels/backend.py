"""The choice of implementation, dtype and device, each with its reason.

Contract: a `Decision` is (value, reason), and `sparsort env` prints both. Environment variables override the choice:
`SPARSORT_SPARSITY` and `SPARSORT_BLOCKSPARSE` (auto, triton, torch) and `SPARSORT_DEVICE` (auto, cpu, cuda, cuda:1, …). An
override that cannot be met is an error. `sparsity_metrics` and `sparsity_rows` give the same results with every implementation.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.checks import MAX_TRITON_WIDTH, check_states
from sparsort.kernels.sparsity.checks import FinalNorm as FinalNorm
from sparsort.kernels.sparsity.checks import GiniMethod as GiniMethod
from sparsort.kernels.sparsity.checks import RowMetrics as RowMetrics
from sparsort.kernels.sparsity.metrics import METRIC_NAMES as METRIC_NAMES
from sparsort.kernels.sparsity.metrics import METRICS as METRICS
from sparsort.kernels.sparsity.metrics import ROW_REASONS as ROW_REASONS
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref

T = TypeVar("T")

# The oldest version that the kernels were compiled and tested with.
_OLDEST_TRITON = (3, 6)


@dataclass(frozen=True)
class Decision(Generic[T]):
    """A chosen value, and the reason for it."""

    value: T
    reason: str


def default_device() -> Decision[torch.device]:
    """Choose the device that models run on: `SPARSORT_DEVICE` if set, else the current CUDA device, else the CPU.

    Raises:
        SparsortError: `SPARSORT_DEVICE` names a device that this machine does not have.
    """
    given = os.environ.get("SPARSORT_DEVICE", "auto").strip() or "auto"
    if given != "auto":
        return Decision(_named_device(given), f"SPARSORT_DEVICE={given}")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return Decision(device, f"CUDA is available ({torch.cuda.get_device_name(device)})")
    return Decision(torch.device("cpu"), "no CUDA device")


def use_device() -> str:
    """Return a sentence that lists this machine's devices, for errors about a device that cannot be used."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(1, count))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return f"Use auto, or a device of this machine: {', '.join(names)}."


def compute_dtype(device: torch.device | str) -> Decision[torch.dtype]:
    """Choose the dtype of a forward pass on `device`: bfloat16 if the device has native bfloat16 products, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Decision(torch.bfloat16, f"{torch.cuda.get_device_name(device)} has native bfloat16")
        return Decision(torch.float32, f"{torch.cuda.get_device_name(device)} has no native bfloat16")
    if device.type != "cpu":
        return Decision(torch.float32, f"bfloat16 is not known to be native on {device.type}")
    feature = _cpu_bf16_feature()
    if feature is None:
        return Decision(
            torch.float32, f"this {platform.machine()} CPU has no native bfloat16 (AVX512-BF16, AMX or Arm BF16)"
        )
    return Decision(torch.bfloat16, f"the CPU has {feature}")


def sparsity_implementation(device: torch.device | str) -> Decision[str]:
    """Choose the implementation that measures rows on `device`: "triton" or "torch".

    Raises:
        SparsortError: `SPARSORT_SPARSITY` is unknown, or requests Triton where it cannot run.
    """
    return _implementation("SPARSORT_SPARSITY", torch.device(device))


def blocksparse_implementation(device: torch.device | str) -> Decision[str]:
    """Choose the implementation of block-sparse attention on `device`: "triton" or "torch".

    Raises:
        SparsortError: `SPARSORT_BLOCKSPARSE` is unknown, or requests Triton where it cannot run.
    """
    return _implementation("SPARSORT_BLOCKSPARSE", torch.device(device))


def sparsity_metrics(states: Tensor, *, l0_threshold: float = 1.0) -> dict[str, Tensor]:
    """Compute every sparsity metric of every state.

    Args:
        states: (..., H) floating point, any strides. The metrics are differentiable, except for the L0 counts.
        l0_threshold: τ of `l0_absolute`, in the states' own units.

    Returns:
        Metric name (see `METRICS`) → tensor of shape (...): float64 for float64 states, else float32. If a state is all zero or
        not finite, all of its metrics are NaN.

    Raises:
        SparsortError: `states` is not a floating-point tensor with a last axis of at least one coordinate.
    """
    check_states(states)
    values_NM = sparsity_rows(states, l0_threshold=l0_threshold).values_NM
    return {name: values_NM[:, m].reshape(states.shape[:-1]) for m, name in enumerate(METRICS)}


def sparsity_rows(
    states: Tensor,
    index: Tensor | None = None,
    *,
    dim_scale: Tensor | None = None,
    norm: FinalNorm | None = None,
    l0_threshold: float = 1.0,
    gini: GiniMethod = "exact",
) -> RowMetrics:
    """Compute every metric of the chosen rows, which are read in place.

    Args:
        states: (N, H), (B, T, H) or more leading axes, any strides; never copied as a whole.
        index: (N,) token numbers b·T + t; None: every token.
        dim_scale: (H,), or (2, H) with `norm`: factor for each coordinate. A zero excludes the dimension from the row and from
            its width.
        norm: the model's final RMS norm; if given, the states are measured before and after it, from one read.
        l0_threshold: τ of `l0_absolute`, in the states' own units.
        gini: "exact", "binned" (with a certified error bound), or "none" (NaN).

    Returns:
        RowMetrics: values (N, M) in the order of `METRICS`, reason (N,), and Gini's bound (N,) or None; with `norm`, each has a
        leading axis of 2.

    Raises:
        SparsortError: an argument does not fit; see `sparsity/checks.py`.
    """
    check_states(states)
    run = _runner(states, gini)
    return run(states, index, dim_scale=dim_scale, norm=norm, l0_threshold=l0_threshold, gini=gini)


def _runner(states: Tensor, gini: GiniMethod) -> Callable[..., RowMetrics]:
    """Return the implementation for these states: the chosen one, or torch if the kernel cannot take them."""
    decision = sparsity_implementation(states.device)
    if decision.value == "torch":
        return sparsity_rows_ref
    # These obstacles depend on the states, so they are not part of the decision for the device.
    obstacle = None
    if states.dtype == torch.float64:
        obstacle = "float64 states need float64 arithmetic, and the kernel computes in float32"
    elif states.requires_grad and torch.is_grad_enabled():
        obstacle = "the kernel has no gradient"
    elif states.shape[-1] > MAX_TRITON_WIDTH:
        obstacle = f"rows of width {states.shape[-1]} are wider than the kernel's maximum of {MAX_TRITON_WIDTH}"
    elif gini == "exact":
        obstacle = _sort_obstacle(states)
    if obstacle is None:
        from sparsort.kernels.sparsity.triton_rows import sparsity_rows_triton

        return sparsity_rows_triton
    # A kernel that was requested by name is never replaced silently.
    if decision.reason == "SPARSORT_SPARSITY=triton":
        raise SparsortError(f"SPARSORT_SPARSITY=triton cannot be met: {obstacle}. Unset it, or set it to torch.")
    return sparsity_rows_ref


def _implementation(variable: str, device: torch.device) -> Decision[str]:
    """Choose Triton if the GPU supports it, else torch, unless the environment variable names an implementation."""
    given = os.environ.get(variable, "auto").strip().lower() or "auto"
    if given not in ("auto", "triton", "torch"):
        raise unknown_choice(f"value of {variable}", given, ("auto", "triton", "torch"))
    if given == "torch":
        return Decision("torch", f"{variable}=torch")
    # Triton's interpreter runs the kernels on a CPU, a thousand times slower. It is meant for tests, so it is used only if
    # Triton is requested by name.
    interpreted = given == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = _triton_obstacle(device, interpreted)
    if given == "triton":
        if obstacle:
            raise SparsortError(f"{variable}=triton cannot be met: {obstacle}. Unset it, or set it to torch.")
        return Decision("triton", f"{variable}=triton")
    if obstacle:
        return Decision("torch", obstacle)
    return Decision("triton", f"Triton {_triton().value} on {torch.cuda.get_device_name(device)}")


def _triton_obstacle(device: torch.device, interpreted: bool) -> str | None:
    """Return the reason why Triton cannot run on `device`, or None."""
    if device.type != "cuda" and not interpreted:
        return f"Triton has no {device.type} backend"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs, but this torch is built for ROCm"
    triton = _triton()
    if triton.value is None:
        return triton.reason
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


@functools.cache
def _triton() -> Decision[str | None]:
    """Return the version of the installed Triton, or None and why it cannot be used. Cached, because it reads files."""
    if importlib.util.find_spec("triton") is None:
        return Decision(None, "Triton is not installed")
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return Decision(None, "the installed Triton has no version metadata")
    if tuple(int(part) for part in installed.split(".")[:2]) < _OLDEST_TRITON:
        return Decision(None, f"Triton {installed} is older than {'.'.join(map(str, _OLDEST_TRITON))}")
    return Decision(installed, "installed")


def _sort_obstacle(states: Tensor) -> str | None:
    """Return the reason why this device cannot sort these rows, or None. A sort needs the row in shared memory, as float32."""
    if states.device.type != "cuda":
        return None
    # The kernel pads a row to a power of two of at least 128 coordinates.
    required = 4 * max(128, 1 << (states.shape[-1] - 1).bit_length())
    # `Any` because torch's stubs lack the attribute.
    properties: Any = torch.cuda.get_device_properties(states.device)
    given = properties.shared_memory_per_block_optin
    if required <= given:
        return None
    return f"the exact Gini of rows of width {states.shape[-1]} takes {required} bytes of shared memory, but the GPU has {given}"


def _named_device(given: str) -> torch.device:
    """Return the device that `SPARSORT_DEVICE` names, if this machine has it."""
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise SparsortError(f"SPARSORT_DEVICE={given!r} is not a device. {use_device()}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise SparsortError(f"SPARSORT_DEVICE is {given}, but torch sees {count} CUDA devices. {use_device()}")
    return device


def device_name(device: torch.device | str) -> str:
    """Return the vendor's name of a device's processor; "cpu" is this machine's processor."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


@functools.cache
def _cpu_bf16_feature() -> str | None:
    """Return the name of the processor's native bfloat16 instructions, or None."""
    flags = _cpu_flags()
    for flag, feature in (("amx_bf16", "AMX bfloat16"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16")):
        if flag in flags:
            return feature
    return None


def _cpu_flags() -> frozenset[str]:
    """Return the processor's features, named as in /proc/cpuinfo; if that file does not exist, as reported by torch."""
    # x86 lists its features under "flags", Arm under "Features".
    features = _cpuinfo("flags", "Features")
    if features is not None:
        return frozenset(features.split())
    return frozenset(name for name, has in torch.cpu.get_capabilities().items() if has is True)


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str | None:
    """Return the first value of these keys in /proc/cpuinfo; None if it has no such key or does not exist."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.strip()
    return None
