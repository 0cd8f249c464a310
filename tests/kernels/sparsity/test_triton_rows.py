"""The Triton kernel against the float64 reference: on a GPU where there is one, else in Triton's interpreter.

The interpreter is slow (20 to 80 ms a row, and a sort far more), so widths are few and the sort is tried up to 128.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.kernels import backend
from sparsort.kernels.sparsity.checks import MAX_TRITON_WIDTH, FinalNorm
from sparsort.kernels.sparsity.metrics import METRIC_NAMES
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref

pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 was not set before Triton loaded", allow_module_level=True)

from sparsort.kernels.sparsity import triton_rows as rows  # noqa: E402
from sparsort.kernels.sparsity.triton_rows import _float32_not_above, sparsity_rows_triton  # noqa: E402

# In the interpreter NumPy warns where a row that gets NaN divides by zero on the way; a GPU has no such warning.
pytestmark = [pytest.mark.gpu] if CUDA else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if CUDA else "cpu"
KINDS = ("gaussian", "cauchy", "lognormal", "tied", "constant", "one_hot", "massive", "half_zero", "huge", "tiny")
GINI, L1 = METRIC_NAMES.index("gini"), METRIC_NAMES.index("l1")
L0 = [METRIC_NAMES.index("l0_relative"), METRIC_NAMES.index("l0_absolute")]


def assert_agrees(states, index=None, *, gini="none", **options):
    """The kernel agrees with float64 to 1e-5, binned Gini within its bound; in wide rows a coordinate may tie with τ."""
    ours = sparsity_rows_triton(states.to(DEVICE), index, gini=gini, **_on_device(options))
    wanted = sparsity_rows_ref(states, index, gini="exact" if gini != "none" else "none", **options)
    values, truth = ours.values_NM.cpu().double(), wanted.values_NM.double()
    assert torch.equal(ours.reason_N.cpu(), wanted.reason_N)
    good = wanted.reason_N == 0
    assert values[~good].isnan().all()
    values, truth = values[good], truth[good]
    scale = torch.ones_like(truth)
    scale[..., L1] = truth[..., L1]
    tolerance = torch.full_like(truth, 1e-5) * scale
    tolerance[..., L0] = 1.5 / states.shape[-1] if states.shape[-1] > 1000 else 1e-6
    if gini == "binned":
        bound = ours.gini_bound_N.cpu().double()[good]
        assert (bound >= 0).all()
        tolerance[..., GINI] = bound
    else:
        assert ours.gini_bound_N is None
    error = (values - truth).abs()
    if gini == "none":
        assert values[..., GINI].isnan().all()
        error[..., GINI] = 0.0
    assert (error <= tolerance).all(), [(METRIC_NAMES[m], error[..., m].max().item()) for m in range(len(METRIC_NAMES))]
    return ours


def _on_device(options):
    moved = dict(options)
    if moved.get("dim_scale") is not None:
        moved["dim_scale"] = moved["dim_scale"].to(DEVICE)
    if norm := moved.get("norm"):
        moved["norm"] = FinalNorm(weight=norm.weight.to(DEVICE), eps=norm.eps, offset=norm.offset)
    return moved


def stack(rows, dtype, kinds=KINDS):
    return torch.from_numpy(np.stack([rows[kind] for kind in kinds])).to(dtype)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 100, 128])
def test_narrow_rows(width, make_rows):
    assert_agrees(stack(make_rows(width), torch.float32), gini="binned", l0_threshold=0.5)


@pytest.mark.parametrize("width", [1, 3, 128])
def test_exact_gini(width, make_rows):
    kinds = ("gaussian", "tied", "constant", "one_hot", "massive")
    assert_agrees(stack(make_rows(width), torch.float32, kinds), gini="exact", l0_threshold=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [640, 1025])
def test_wide_rows(width, dtype, make_rows):
    assert_agrees(stack(make_rows(width), dtype), gini="binned", l0_threshold=0.5)


def test_float16_rows(make_rows):
    kinds = ("gaussian", "lognormal", "tied", "constant", "one_hot", "half_zero")
    assert_agrees(stack(make_rows(300), torch.float16, kinds), l0_threshold=0.5)
    subnormal = torch.tensor([[6e-8, 1.2e-7, 0.0, 3e-7]]).half()
    assert_agrees(subnormal, gini="exact")


def test_ties_at_every_cut():
    """Rows of few distinct values, with the cut inside a tie, between two values, and at the first and the last."""
    rows = [[2.0] * n + [1.0] * (200 - n) for n in (1, 2, 3, 10, 11, 20, 199)]
    rows += [[5.0] + [1.0] * 50 + [0.0] * 149, [float(i % 7) for i in range(200)]]
    assert_agrees(torch.tensor(rows))
    assert_agrees(torch.tensor(rows[1::2]).bfloat16())


def test_rows_without_metrics_say_why():
    states = torch.ones(7, 10)
    states[0] = 0.0
    states[1, 3] = torch.nan
    states[2, 9] = torch.inf
    states[3, 0] = -torch.inf
    states[4] = -0.0
    states[5] = torch.nan
    for gini in ("binned", "exact"):
        ours = assert_agrees(states, gini=gini)
        assert ours.reason_N.tolist() == [1, 2, 2, 2, 1, 2, 0]
    assert sparsity_rows_triton(states.to(DEVICE), gini="binned").gini_bound_N[:6].isnan().all()


@pytest.mark.parametrize(
    "cut",
    [
        lambda whole: whole[..., 0],
        lambda whole: whole[..., 1].transpose(0, 1),
        lambda whole: whole[:, ::2, 3:, 0],
        lambda whole: whole[:, :, 3, :],
        lambda whole: whole[1, :, :, 0],
        lambda whole: whole[:1, :1, 2, 0].expand(4, 6),
        lambda whole: whole.flip(0)[..., 0],
    ],
)
def test_index_and_strides(cut, normal):
    states = cut(normal(2, 5, 12, 2))
    tokens = states.shape[:-1].numel()
    index = torch.tensor([tokens - 1, 0, tokens // 2, 0])
    assert_agrees(states, index)
    assert_agrees(states, index.int())
    assert_agrees(states)


def test_a_token_outside_of_the_row_has_no_metrics(normal):
    """On a GPU the index is not read on the host: the kernel itself must not read beyond the states."""
    index = torch.tensor([0, 6, -1, 5])
    if not CUDA:
        with pytest.raises(SparsortError, match="tokens 0 to 5"):
            sparsity_rows_triton(normal(2, 3, 8), index)
        return
    ours = sparsity_rows_triton(normal(2, 3, 8).cuda(), index.cuda())
    assert ours.reason_N.tolist() == [0, 2, 2, 0]
    assert ours.values_NM[1:3].isnan().all()


def test_scale_with_zeros(normal):
    states = normal(4, 40)
    states[0, 2] = torch.nan
    states[1, 5] = 1e30
    scale = normal(40)
    scale[[2, 5, 39]] = 0.0
    for gini in ("exact", "binned"):
        assert_agrees(states, dim_scale=scale, gini=gini)
    assert_agrees(states, dim_scale=torch.zeros(40))
    assert_agrees(states.bfloat16(), dim_scale=scale.double())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_sites_before_and_after_the_norm_from_one_read(offset, eps, normal):
    states = normal(7, 100)
    states[:5] *= torch.tensor([[1e-30], [1e-10], [1e4], [1e30], [1e-6]])
    states[5] = 0.0
    states[6, 1] = torch.nan
    norm = FinalNorm(weight=normal(100), eps=eps, offset=offset)
    ours = assert_agrees(states, norm=norm, gini="binned")
    assert ours.values_NM.shape == (2, 7, len(METRIC_NAMES))
    scale = torch.stack([normal(100), normal(100)])
    scale[0, 1] = scale[1, 1] = scale[1, 7] = 0.0
    # NaN in a left-out dimension harms the site after the norm, whose mean square has read it, and not the one before.
    assert assert_agrees(states, norm=norm, dim_scale=scale).reason_N[:, 6].tolist() == [0, 2]
    assert_agrees(states, torch.tensor([3, 1]), norm=norm, dim_scale=scale[0])


def test_fused_norm_equals_torch_norm(normal):
    states, weight = normal(3, 64), normal(64)
    after = torch.nn.functional.rms_norm(states, (64,), weight, 1e-5)
    fused = sparsity_rows_triton(states.to(DEVICE), norm=FinalNorm(weight=weight.to(DEVICE), eps=1e-5), gini="exact")
    torch.testing.assert_close(fused.values_NM[1].cpu(), sparsity_rows_ref(after).values_NM, rtol=1e-5, atol=1e-5)


def test_bound_holds_where_bins_are_worst():
    """All of the mass at the edges of bins, below the lowest bin, or under one massive coordinate."""
    steps = torch.arange(1000) % 2
    edges = 1 + steps * (1 / 16 - 1e-6)
    below = torch.linspace(0, 2.0**-16, 1000)
    below[0] = 1.0
    massive = torch.linspace(0.5, 1.0, 1000)
    massive[7] = 60000.0
    heavy = torch.exp(torch.linspace(-40, 3, 1000))
    zeros = torch.zeros(1000)
    zeros[:2] = torch.tensor([1.0, 2.0**-17])
    ours = assert_agrees(torch.stack([edges, below, massive, heavy, zeros, massive.sqrt()]), gini="binned")
    assert (ours.gini_bound_N.cpu() < torch.tensor([0.01, 0.01, 0.01, 1e-4, 1e-4, 5e-3])).all()


def test_the_bound_for_gaussian_rows_is_as_documented(normal):
    assert assert_agrees(normal(2, 4096), gini="binned").gini_bound_N.max() < 2.4e-4


def test_twice_run_is_bitwise_the_same(normal, monkeypatch):
    """Also into memory that held something else: every output is written."""
    states = normal(5, 100).to(DEVICE)
    norm = FinalNorm(weight=normal(100).to(DEVICE))
    first = sparsity_rows_triton(states, norm=norm, gini="binned")
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **options):
        tensor = new_empty(self, *args, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    second = sparsity_rows_triton(states, norm=norm, gini="binned")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    alone = sparsity_rows_triton(states, torch.tensor([3]), norm=norm, gini="binned")
    assert torch.equal(alone.values_NM[:, 0], first.values_NM[:, 3])


def test_no_rows():
    values, reason, bound = sparsity_rows_triton(torch.ones(2, 0, 4, device=DEVICE), gini="binned")
    assert values.shape == (0, len(METRIC_NAMES))
    assert reason.shape == bound.shape == (0,)


def test_arguments_that_the_kernel_does_not_support_are_refused():
    for states in (torch.ones(2, 3, dtype=torch.float64), torch.ones(1, MAX_TRITON_WIDTH + 1)):
        with pytest.raises(SparsortError, match="torch reference"):
            sparsity_rows_triton(states.to(DEVICE))


@pytest.mark.parametrize("has_norm", [False, True])
def test_a_metric_that_the_kernel_lacks_comes_from_the_reference(has_norm, normal, monkeypatch):
    monkeypatch.setattr(rows, "_OTHERS", [*rows._OTHERS, L1])
    states = normal(2, 3, 20).to(DEVICE)
    states[0, 1] = 0.0
    norm = FinalNorm(weight=torch.ones(20, device=DEVICE)) if has_norm else None
    index = torch.tensor([4, 1, 2], device=DEVICE)
    ours = sparsity_rows_triton(states, index, norm=norm, gini="none")
    wanted = sparsity_rows_ref(states, index, norm=norm, gini="none")
    assert torch.equal(ours.reason_N, wanted.reason_N)
    torch.testing.assert_close(ours.values_NM[..., L1], wanted.values_NM[..., L1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.values_NM, wanted.values_NM, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.skipif(CUDA, reason="the override is for the interpreter")
def test_the_backend_reaches_the_kernel(normal, monkeypatch):
    states = normal(2, 3, 20)
    wanted = backend.sparsity_metrics(states)
    monkeypatch.setenv("SPARSORT_SPARSITY", "triton")
    ours = backend.sparsity_metrics(states)
    assert any(not torch.equal(ours[name], wanted[name]) for name in METRIC_NAMES), "the reference ran"
    for name in METRIC_NAMES:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 1 / 3, 1e-50, 3e38, 1e300])
def test_threshold_rounds_down(tau):
    rounded = _float32_not_above(tau)
    single = np.float32(min(rounded, 3.5e38))
    assert rounded <= tau
    assert float(single) == rounded
    if tau < 3e38:
        assert float(np.nextafter(single, np.float32(np.inf))) > tau
