"""Properties of the Triton kernel that need a GPU: wide sorts, large tensors, and the choice of the public function."""

from __future__ import annotations

import pytest
import torch

from sparsort.kernels import backend
from sparsort.kernels.sparsity.metrics import METRIC_NAMES
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
L0 = [METRIC_NAMES.index("l0_relative"), METRIC_NAMES.index("l0_absolute")]
GINI, L1 = METRIC_NAMES.index("gini"), METRIC_NAMES.index("l1")


# Compiling the sort takes 15 to 25 seconds a width and dtype: the narrowest and the usual width in every dtype, the
# widest in one. The binned Gini compiles in a few.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (640, 896, 2048, 3584, 4096, 5120, 8192, 16384, 32768)
CASES = [("binned", width, dtype) for width in WIDTHS for dtype in DTYPES]
CASES += [("exact", width, dtype) for width in (640, 4096) for dtype in DTYPES]
CASES += [("exact", width, torch.bfloat16) for width in (16384, 32768)]


def assert_close(ours, states, *, gini="exact", gini_bound=None):
    wanted = sparsity_rows_ref(states.cpu().double(), gini="none" if gini == "none" else "exact").values_NM
    error = (ours.cpu().double() - wanted).abs()
    error[:, L1] /= wanted[:, L1]
    if gini == "none":
        assert ours[:, GINI].isnan().all()
        error[:, GINI] = 0.0
    tolerance = torch.full_like(error, 1e-5)
    tolerance[:, L0] = 1.5 / states.shape[-1]
    if gini_bound is not None:
        tolerance[:, GINI] = gini_bound.cpu().double()
    assert (error <= tolerance).all(), dict(zip(METRIC_NAMES, error.amax(0).tolist(), strict=True))


@pytest.mark.parametrize(("gini", "width", "dtype"), CASES)
def test_model_widths_equal_float64(gini, width, dtype, normal):
    states = normal(6, width).cuda()
    states[3:, :: max(1, width // 4)] *= 1000.0
    states = states.to(dtype)
    ours = backend.sparsity_rows(states, gini=gini)
    assert_close(ours.values_NM, states, gini_bound=ours.gini_bound_N)


def test_the_backend_chooses_triton():
    choice = backend.sparsity_implementation("cuda")
    assert choice.value == "triton", choice.reason
    chosen = backend._runner(torch.ones(1, 8, device="cuda"), "exact")
    assert chosen.__module__ == "sparsort.kernels.sparsity.triton_rows"


def test_batches_of_any_size_share_one_compilation():
    from sparsort.kernels.sparsity.triton_rows import _rows_kernel

    def compiled():
        return sum(len(caches[0]) for caches in _rows_kernel.device_caches.values())

    backend.sparsity_rows(torch.ones(2, 3, 64, device="cuda"), gini="none")
    after_first = compiled()
    for shape in [(1, 1, 64), (16, 16, 64), (4, 17, 64)]:
        backend.sparsity_rows(torch.ones(shape, device="cuda"), gini="none")
    assert compiled() == after_first


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
    assert_close(backend.sparsity_rows(whole, tokens, gini="none").values_NM, rows, gini="none")
    columns = whole.view(H, 2 * T)
    columns.zero_()
    columns[:, 5] = rows[0]
    ours = backend.sparsity_rows(columns.t(), torch.tensor([5], device="cuda"), gini="none")
    assert_close(ours.values_NM, rows[:1], gini="none")


def test_no_copy_of_the_states():
    """Scoring few tokens of a large tensor allocates for the tokens, not for the tensor."""
    states = torch.randn(64, 1024, 1024, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    index = torch.arange(100, device="cuda")
    backend.sparsity_rows(states, index, gini="none")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backend.sparsity_rows(states, index, gini="none")
    assert torch.cuda.max_memory_allocated() - before < 2**20
