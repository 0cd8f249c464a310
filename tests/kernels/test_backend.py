"""Which implementation runs, and why; and the public functions' contract."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import sparsort
from sparsort.errors import SparsortError
from sparsort.kernels import backend
from sparsort.kernels.sparsity.metrics import METRIC_NAMES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch):
    monkeypatch.delenv("SPARSORT_SPARSITY", raising=False)
    monkeypatch.delenv("SPARSORT_DEVICE", raising=False)
    backend._triton.cache_clear()
    yield
    backend._triton.cache_clear()


def pretend_cuda(monkeypatch, capability=(9, 0), bf16=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "Pretend GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _name: SimpleNamespace())
    monkeypatch.setattr(backend, "version", lambda _name: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", None)


def test_sparsity_metrics_keeps_leading_axes():
    for shape in [(5,), (2, 5), (2, 3, 5), (2, 3, 4, 5), (0, 5), (2, 0, 5)]:
        metrics = sparsort.sparsity_metrics(torch.ones(shape))
        assert tuple(metrics) == METRIC_NAMES
        assert {value.shape for value in metrics.values()} == {torch.Size(shape[:-1])}
    assert sparsort.sparsity_metrics(torch.ones(3, dtype=torch.float64))["gini"].dtype == torch.float64
    assert sparsort.sparsity_metrics(torch.ones(3, dtype=torch.bfloat16))["gini"].dtype == torch.float32


def test_sparsity_metrics_equals_rows_of_any_layout(normal):
    states = normal(4, 6, 10).transpose(0, 1)[..., ::2]
    metrics = sparsort.sparsity_metrics(states)
    for b in range(6):
        for t in range(4):
            alone = sparsort.sparsity_metrics(states[b, t].clone())
            assert {name: value.item() for name, value in alone.items()} == {
                name: value[b, t].item() for name, value in metrics.items()
            }


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([[1.0, 2.0]], "must be a torch tensor .* got list"),
        (torch.ones(2, 3).numpy(), "must be a torch tensor .* got ndarray"),
        (torch.ones(2, 3, dtype=torch.int64), "got torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), "got torch.complex64"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.ones(2, 0), r"got shape \(2, 0\)"),
    ],
)
def test_arguments_that_are_not_states_are_refused(states, message):
    with pytest.raises(SparsortError, match=message):
        sparsort.sparsity_metrics(states)


def test_the_cpu_runs_the_reference_and_says_why():
    choice = backend.sparsity_implementation("cpu")
    assert choice == backend.Decision("torch", "Triton has no cpu backend")
    assert backend.default_device().value == torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_cuda_runs_triton(monkeypatch):
    pretend_cuda(monkeypatch)
    choice = backend.sparsity_implementation(torch.device("cuda"))
    assert choice == backend.Decision("triton", "Triton 3.6.0 on Pretend GPU")
    assert backend.default_device() == backend.Decision(torch.device("cuda", 1), "CUDA is available (Pretend GPU)")
    assert backend.compute_dtype("cuda").value == torch.bfloat16


def test_cuda_falls_back_with_the_reason(monkeypatch):
    pretend_cuda(monkeypatch, capability=(7, 5), bf16=False)
    assert backend.compute_dtype("cuda") == backend.Decision(torch.float32, "Pretend GPU has no native bfloat16")
    assert "older than compute capability 8.0" in backend.sparsity_implementation("cuda").reason
    monkeypatch.setattr(backend, "version", lambda _name: "3.5.1+git")
    backend._triton.cache_clear()
    assert backend.sparsity_implementation("cuda") == backend.Decision("torch", "Triton 3.5.1+git is older than 3.6")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _name: None)
    backend._triton.cache_clear()
    assert backend.sparsity_implementation("cuda") == backend.Decision("torch", "Triton is not installed")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm" in backend.sparsity_implementation("cuda").reason


@pytest.mark.parametrize(
    ("width", "shared", "gini", "falls_back"),
    [
        (32768, 101_376, "exact", True),
        (16385, 101_376, "exact", True),
        (16384, 101_376, "exact", False),
        (32768, 101_376, "binned", False),
        (32768, 232_448, "exact", False),
    ],
)
def test_a_sort_that_shared_memory_cannot_hold_falls_back(width, shared, gini, falls_back, monkeypatch):
    pretend_cuda(monkeypatch)
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device=None: properties)
    states = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, requires_grad=False, shape=torch.Size([2, width])
    )
    assert (backend._runner(states, gini) is backend.sparsity_rows_ref) == falls_back
    monkeypatch.setenv("SPARSORT_SPARSITY", "triton")
    if falls_back:
        with pytest.raises(
            SparsortError, match=f"width {width} takes 131072 bytes of shared memory, but the GPU has 101376"
        ):
            backend._runner(states, gini)


def test_the_version_of_triton_is_looked_up_once(monkeypatch):
    pretend_cuda(monkeypatch)
    calls = []
    monkeypatch.setattr(backend, "version", lambda name: calls.append(name) or "3.6.0")
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        assert backend.sparsity_implementation(device).value == "triton"
    assert calls == ["triton"]


def test_overrides(monkeypatch):
    pretend_cuda(monkeypatch)
    monkeypatch.setenv("SPARSORT_SPARSITY", "torch")
    assert backend.sparsity_implementation("cuda") == backend.Decision("torch", "SPARSORT_SPARSITY=torch")
    monkeypatch.setenv("SPARSORT_SPARSITY", "triton")
    assert backend.sparsity_implementation("cuda") == backend.Decision("triton", "SPARSORT_SPARSITY=triton")
    monkeypatch.setenv("SPARSORT_SPARSITY", "tritom")
    with pytest.raises(SparsortError, match="Did you mean 'triton'"):
        backend.sparsity_implementation("cuda")
    monkeypatch.setenv("SPARSORT_DEVICE", "cuda:1")
    assert backend.default_device() == backend.Decision(torch.device("cuda:1"), "SPARSORT_DEVICE=cuda:1")
    monkeypatch.setenv("SPARSORT_DEVICE", "cuda:2")
    with pytest.raises(SparsortError, match=r"torch sees 2 CUDA devices.*machine: cpu, cuda, cuda:1"):
        backend.default_device()
    monkeypatch.setenv("SPARSORT_DEVICE", "gpu")
    with pytest.raises(SparsortError, match="is not a device"):
        backend.default_device()


def test_only_devices_of_this_machine_are_advised(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" not in backend.use_device()
    pretend_cuda(monkeypatch)
    assert "machine: cpu, cuda, cuda:1." in backend.use_device()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "cuda:1, mps." in backend.use_device()


def test_an_override_that_cannot_be_met_is_an_error(monkeypatch):
    monkeypatch.setenv("SPARSORT_SPARSITY", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SparsortError, match="SPARSORT_SPARSITY=triton cannot be met: Triton has no cpu backend"):
        backend.sparsity_metrics(torch.ones(2, 3))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for states in (torch.ones(2, 3).double(), torch.ones(2, 3, requires_grad=True), torch.ones(1, 40000)):
        with pytest.raises(SparsortError, match="SPARSORT_SPARSITY=triton cannot be met"):
            backend.sparsity_metrics(states)


@pytest.mark.parametrize(
    ("cpuinfo", "dtype", "reason"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16\n", torch.bfloat16, "the CPU has AMX bfloat16"),
        ("flags\t\t: fpu avx512_bf16\n", torch.bfloat16, "the CPU has AVX512-BF16"),
        ("Features\t: fp asimd bf16 i8mm\n", torch.bfloat16, "the CPU has Arm BF16"),
        ("flags\t\t: fpu avx2\n", torch.float32, "no native bfloat16"),
    ],
)
def test_the_dtype_follows_the_processor(cpuinfo, dtype, reason, monkeypatch):
    monkeypatch.setattr(backend.Path, "exists", lambda _path: True)
    monkeypatch.setattr(backend.Path, "read_text", lambda _path, **_options: f"processor\t: 0\n{cpuinfo}")
    backend._cpu_bf16_feature.cache_clear()
    choice = backend.compute_dtype(CPU)
    backend._cpu_bf16_feature.cache_clear()
    assert choice.value == dtype
    assert reason in choice.reason


def test_a_device_is_named_as_its_maker_does(monkeypatch):
    monkeypatch.setattr(backend.Path, "exists", lambda _path: True)
    monkeypatch.setattr(backend.Path, "read_text", lambda _path, **_options: "model name\t: Some CPU @ 2 GHz\n" * 2)
    assert backend.device_name("cpu") == "Some CPU @ 2 GHz"
    monkeypatch.setattr(backend.Path, "exists", lambda _path: False)
    monkeypatch.setattr(backend.platform, "processor", lambda: "")
    assert backend.device_name("cpu") == backend.platform.machine()
    assert backend.device_name("meta") == "meta"
