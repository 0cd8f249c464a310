"""The torch reference against the plain oracle, at its edges, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.checks import FinalNorm
from sparsort.kernels.sparsity.metrics import METRICS, ROW_REASONS
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref, top_counts

KINDS = ("gaussian", "cauchy", "lognormal", "tied", "constant", "one_hot", "massive", "half_zero", "huge", "tiny")
SMOOTH = [m for m, name in enumerate(METRICS) if not name.startswith("l0")]
L1 = tuple(METRICS).index("l1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 100, 640, 1024, 4096])
def test_every_metric_agrees_with_the_oracle(width, dtype, make_rows, plain_metrics):
    rows = make_rows(width)
    kinds = [kind for kind in KINDS if dtype != torch.float16 or kind not in ("huge", "tiny", "cauchy")]
    states = torch.from_numpy(np.stack([rows[kind] for kind in kinds])).to(dtype)
    values, reason, bound = sparsity_rows_ref(states, l0_threshold=0.5)
    assert reason.tolist() == [0] * len(kinds)
    assert bound is None
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for kind, state, row in zip(kinds, states.double().numpy(), values.double().numpy(), strict=True):
        wanted = plain_metrics(state, tau=0.5)
        np.testing.assert_allclose(row, [wanted[name] for name in METRICS], rtol=1e-6, atol=1e-6, err_msg=kind)


def test_gaussian_rows_have_the_known_values(normal):
    states = normal(200, 3584)
    mean = dict(zip(METRICS, sparsity_rows_ref(states).values_NM.mean(0).tolist(), strict=True))
    known = {
        "top10_magnitude": 0.26,
        "top10_energy": 0.44,
        "l0_relative": 0.16,
        "gini": 2**0.5 - 1,
        "effective_rank_magnitude": 0.753,  # exp(log E|h| − E|h|log|h| / E|h|) of a normal h
    }
    for name, value in known.items():
        assert mean[name] == pytest.approx(value, abs=0.005), name


def test_shares_count_in_integers():
    assert top_counts(1) == (1, 1, 1)
    assert top_counts(640) == (6, 32, 64)
    # 0.1 * 70 and 0.05 * 140 are whole, 0.07 * 100 in floats is not: every width must give the integer floor.
    for d in range(1, 5000):
        assert top_counts(d) == (max(1, d // 100), max(1, d // 20), max(1, d // 10))


def test_rows_without_metrics_say_why():
    states = torch.ones(6, 8)
    states[0] = 0.0
    states[1, 3] = torch.nan
    states[2, 3] = torch.inf
    states[3, 3] = -torch.inf
    states[4] = -0.0
    values, reason, _ = sparsity_rows_ref(states)
    assert [ROW_REASONS[code] for code in reason] == ["zero", "not_finite", "not_finite", "not_finite", "zero", ""]
    assert reason.dtype == torch.int8
    assert values[:5].isnan().all()
    assert values[5].isfinite().all()


def test_one_coordinate_is_defined():
    values = dict(zip(METRICS, sparsity_rows_ref(torch.tensor([[-3.0]])).values_NM[0].tolist(), strict=True))
    assert values["hoyer"] == values["gini"] == values["l0_relative"] == 0.0
    assert values["top1_energy"] == values["effective_rank_energy"] == 1.0
    assert values["l1"] == 3.0


@pytest.mark.parametrize("factor", [5e-324, 1e-310, 1e-300, 1e300])
def test_float64_rows_at_the_ends_of_the_range(factor):
    states = torch.tensor([[3.0, -2.0, 0.0, 1.0]], dtype=torch.float64)
    values = sparsity_rows_ref(states * factor).values_NM
    if factor >= 1e-300:
        smooth = [column for column in SMOOTH if column != L1]
        torch.testing.assert_close(values[:, smooth], sparsity_rows_ref(states).values_NM[:, smooth])
    assert values[0, L1].item() == pytest.approx(6 * factor)


def test_index_reads_tokens_in_place_of_any_strides(normal):
    whole = normal(3, 5, 12, 2)
    index = torch.tensor([14, 0, 7, 7])
    for states in (whole[..., 0], whole[..., 1].transpose(0, 1), whole[:, ::2, :, 0], whole[:, :, 3, :]):
        tokens = states.shape[0] * states.shape[1]
        chosen = index[index < tokens]
        ours = sparsity_rows_ref(states, chosen).values_NM
        plain = sparsity_rows_ref(states.reshape(tokens, -1)[chosen].clone()).values_NM
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_a_zero_in_the_scale_excludes_the_dimension(normal):
    states = normal(4, 10)
    states[0, 2] = torch.nan
    scale = normal(10).abs() + 0.5
    scale[[2, 5]] = 0.0
    kept = scale.nonzero().squeeze(1)
    ours = sparsity_rows_ref(states, dim_scale=scale)
    plain = sparsity_rows_ref((states.double() * scale.double())[:, kept])
    torch.testing.assert_close(ours.values_NM.double(), plain.values_NM, rtol=1e-6, atol=1e-7)
    assert ours.reason_N.tolist() == [0] * 4
    none_left = sparsity_rows_ref(states, dim_scale=torch.zeros(10))
    assert none_left.reason_N.tolist() == [ROW_REASONS.index("zero")] * 4
    assert none_left.values_NM.isnan().all()


def test_final_norm_measures_before_and_after(normal):
    states = normal(4, 10) * torch.tensor([[1e-30], [1.0], [1e3], [1e30]])
    norm = FinalNorm(weight=normal(10).abs(), eps=1e-6, offset=1.0)
    scale = torch.stack([torch.ones(10), normal(10).abs() + 0.1])
    scale[1, 3] = 0.0
    values, reason, bound = sparsity_rows_ref(states, norm=norm, dim_scale=scale, gini="binned")
    assert values.shape == (2, 4, len(METRICS))
    assert reason.shape == bound.shape == (2, 4)
    wide = states.double()
    after = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    torch.testing.assert_close(values[0], sparsity_rows_ref(states).values_NM, rtol=1e-6, atol=0)
    plain = sparsity_rows_ref(after, dim_scale=scale[1]).values_NM
    torch.testing.assert_close(values[1].double(), plain, rtol=1e-6, atol=1e-30)
    zero = sparsity_rows_ref(torch.zeros(1, 10), norm=FinalNorm(weight=norm.weight, eps=0.0))
    assert zero.reason_N.tolist() == [[1], [1]]


def test_gradients(normal):
    states = normal(3, 12, dtype=torch.float64).requires_grad_()
    norm = FinalNorm(weight=normal(12, dtype=torch.float64))

    def smooth(x):
        return sparsity_rows_ref(x, norm=norm).values_NM[..., SMOOTH]

    assert torch.autograd.gradcheck(smooth, (states,))
    with_bad_rows = normal(3, 6, dtype=torch.float64)
    with_bad_rows[0] = 0.0
    with_bad_rows[1, 1] = torch.nan
    with_bad_rows.requires_grad_()
    sparsity_rows_ref(with_bad_rows).values_NM[2, SMOOTH].sum().backward()
    assert with_bad_rows.grad[0].eq(0).all()
    assert with_bad_rows.grad[2].isfinite().all()


def test_chunks_do_not_change_the_result(monkeypatch, normal):
    states = normal(37, 64)
    whole = sparsity_rows_ref(states)
    monkeypatch.setattr("sparsort.kernels.sparsity.torch_rows._CHUNK_ELEMENTS", 64 * 5)
    torch.testing.assert_close(sparsity_rows_ref(states).values_NM, whole.values_NM, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows(shape):
    values, reason, bound = sparsity_rows_ref(torch.ones(shape), gini="binned")
    assert values.shape == (0, len(METRICS))
    assert reason.shape == bound.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": torch.tensor([0, 6])}, "tokens 0 to 5"),
        ({"index": torch.tensor([-1])}, "tokens 0 to 5"),
        ({"index": torch.tensor([[1]])}, r"shape \(N,\)"),
        ({"index": torch.tensor([True] * 6)}, "nonzero"),
        ({"dim_scale": torch.ones(3)}, r"shape \(4,\)"),
        ({"dim_scale": torch.ones(2, 4)}, r"shape \(4,\)"),
        ({"dim_scale": torch.ones(4, dtype=torch.int64)}, "floating point"),
        ({"norm": FinalNorm(weight=torch.ones(5))}, "final norm's weight"),
        ({"norm": FinalNorm(weight=torch.ones(4), eps=-1.0)}, "eps"),
        ({"l0_threshold": float("nan")}, "l0_threshold"),
        ({"gini": "exakt"}, "Did you mean 'exact'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(SparsortError, match=message):
        sparsity_rows_ref(torch.ones(2, 3, 4), **arguments)
