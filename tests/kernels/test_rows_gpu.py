"""What only a GPU shows of the Triton kernel: wide sorts, large tensors, and the public door's choice."""

from __future__ import annotations

import pytest
import torch

from sparsort.kernels import backend
from sparsort.kernels.sparsity.names import METRICS
from sparsort.kernels.sparsity.reference import sparsity_rows_ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
L0 = [METRICS.index("l0_relative"), METRICS.index("l0_absolute")]
L1 = METRICS.index("l1")


def assert_close(ours, states, gini_bound=None):
    wanted = sparsity_rows_ref(states.cpu().double()).values_NM
    error = (ours.cpu().double() - wanted).abs()
    error[:, L1] /= wanted[:, L1]
    tolerance = torch.full_like(error, 1e-5)
    tolerance[:, L0] = 1.5 / states.shape[-1]
    if gini_bound is not None:
        tolerance[:, METRICS.index("gini")] = gini_bound.cpu().double()
    assert (error <= tolerance).all(), dict(zip(METRICS, error.amax(0).tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [640, 896, 2048, 3584, 4096, 5120, 8192, 16384, 32768])
@pytest.mark.parametrize("gini", ["exact", "binned"])
def test_model_widths_equal_float64(width, dtype, gini, normal):
    states = normal(6, width).cuda()
    states[3:, :: max(1, width // 4)] *= 1000.0
    states = states.to(dtype)
    ours = backend.sparsity_rows(states, gini=gini)
    assert_close(ours.values_NM, states, ours.gini_bound_N)


def test_the_backend_chooses_triton():
    choice = backend.sparsity_implementation("cuda")
    assert choice.value == "triton", choice.reason
    assert "sparsort" in backend.sparsity_rows.__module__


def test_wider_rows_and_float64_fall_back(normal):
    for states in (normal(2, 40000), normal(2, 100, dtype=torch.float64)):
        assert_close(backend.sparsity_rows(states.cuda()).values_NM, states)


def test_offsets_beyond_32_bits(normal):
    """9 GiB of bfloat16: rows that lie past 2³¹ elements, and a column stride that passes it within a row."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    T, H = 600_000, 4096
    whole = torch.zeros(2, T, H, dtype=torch.bfloat16, device="cuda")
    rows = normal(3, H).bfloat16().cuda()
    tokens = torch.tensor([T - 1, T + T // 2, 2 * T - 1], device="cuda")
    whole.view(-1, H)[tokens] = rows
    assert_close(backend.sparsity_rows(whole, tokens, gini="none").values_NM[:, :9], rows)
    columns = whole.view(H, 2 * T)
    columns.zero_()
    columns[:, 5] = rows[0]
    ours = backend.sparsity_rows(columns.t(), torch.tensor([5], device="cuda"))
    assert_close(ours.values_NM, rows[:1])


def test_no_copy_of_the_states():
    """Scoring few tokens of a large tensor allocates for the tokens, not for the tensor."""
    states = torch.randn(64, 1024, 1024, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    index = torch.arange(100, device="cuda")
    backend.sparsity_rows(states, index)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backend.sparsity_rows(states, index)
    assert torch.cuda.max_memory_allocated() - before < 2**20
