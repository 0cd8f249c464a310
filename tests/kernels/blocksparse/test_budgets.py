"""From block scores to blocks: against plain Python lists, with ties and scores that are no numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget, check_budget, choose

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)
# Few distinct values make ties; zeros of both signs are one value.
SCORES = st.sampled_from([-3.0, -0.0, 0.0, 0.5, 1.25, 1.25, 2.0, 1e-40, math.nan, math.inf, -math.inf])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def as_number(score: float) -> float:
    """What a score counts as: infinities as the highest and the lowest number, NaN as the lowest."""
    return -1e300 if math.isnan(score) else max(min(score, 1e300), -1e300)


def plain_order(scores: list[float], own: int) -> list[int]:
    """Visible blocks, the local one first, then from the highest score, ties by number."""
    known = {n: as_number(scores[n]) for n in range(own + 1)}
    others = [n for n in known if n != own]
    return ([own] if own >= 0 else []) + sorted(others, key=lambda n: (-known[n], n))


def plain_shares(scores: list[float], own: int) -> list[float]:
    """The softmax over the visible blocks."""
    known = [as_number(score) for score in scores[: own + 1]]
    above = [math.exp(score - max(known)) for score in known]
    return [share / sum(above) for share in above]


@st.composite
def scored(draw):
    """Scores of some queries, as the dtype holds them, and each query's own block."""
    N, queries, dtype = draw(st.integers(0, 7)), draw(st.integers(0, 4)), draw(DTYPES)
    rows = [[draw(SCORES) for _ in range(N)] for _ in range(queries)]
    scores = torch.tensor(rows, dtype=torch.float64).reshape(queries, N).to(dtype)
    own = [draw(st.integers(-1, N - 1)) for _ in range(queries)]
    return scores, own


def check(scores, own, budget, keep):
    """`choose` equals the plain order, cut by `keep(order, shares)` and the budget's slots."""
    made = choose(scores, torch.tensor(own, dtype=torch.int32), budget)
    slots = min(budget.slots, scores.shape[-1])
    assert made.dtype == torch.int32
    assert made.shape == (*scores.shape[:-1], slots)
    for t, (row, block) in enumerate(zip(scores.double().tolist(), own, strict=True)):
        taken = keep(plain_order(row, block), plain_shares(row, block))[:slots]
        assert made[t].tolist() == taken + [-1] * (slots - len(taken))


@SETTINGS
@given(scored(), st.integers(1, 9))
def test_a_fixed_budget_takes_the_highest(case, blocks):
    check(*case, FixedBudget(blocks=blocks), lambda order, _: order)


@SETTINGS
@given(scored(), st.floats(0, 1), st.integers(1, 9))
def test_a_threshold_takes_what_reaches_it_and_the_local_block(case, threshold, most):

    def keep(order, shares):
        assume(all(abs(share - threshold) > 1e-5 for share in shares) or threshold == 0)
        return [n for n in order if n == order[0] or shares[n] >= threshold]

    check(*case, ThresholdBudget(threshold=threshold, most=most), keep)


@SETTINGS
@given(scored(), st.floats(0.01, 1), st.integers(1, 9))
def test_top_p_takes_the_fewest_that_reach_it(case, p, most):

    def keep(order, shares):
        taken, mass = [], 0.0
        for n in order:
            assume(abs(mass - p) > 1e-5 or p == 1)
            if taken and mass >= p and p < 1:
                break
            taken.append(n)
            mass += shares[n]
        return taken

    check(*case, TopPBudget(p=p, most=most), keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("blocks", "N"), [(1, 300), (16, 300), (300, 300)])
def test_many_blocks_with_ties_are_in_a_stable_sorts_order(normal, blocks, N, dtype):
    scores = (normal(3, 20, N) * 3).round().div(3).to(dtype)
    scores[:, ::2] *= 1e4
    own = torch.arange(20) * 13
    made = choose(scores, own, FixedBudget(blocks=blocks))
    for g in range(3):
        for t in range(20):
            order = plain_order(scores[g, t].double().tolist(), int(own[t]))[:blocks]
            assert made[g, t].tolist() == order + [-1] * (blocks - len(order))


def test_all_of_the_mass_is_every_visible_block():
    # Shares that rounding makes reach 1 before the last.
    scores = torch.tensor([[0.0, -60.0, -70.0, -math.inf, 0.0, 5.0]])
    assert choose(scores, torch.tensor([4]), TopPBudget(p=1.0, most=9)).tolist() == [[4, 0, 1, 2, 3, -1]]


def test_the_local_block_takes_a_slot_and_nothing_after_it_is_seen():
    scores = torch.tensor([[9.0, 1.0, 5.0, 100.0]])
    assert choose(scores, torch.tensor([2]), FixedBudget(blocks=2)).tolist() == [[2, 0]]
    assert choose(scores, torch.tensor([2]), FixedBudget(blocks=9)).tolist() == [[2, 0, 1, -1]]
    assert choose(scores, torch.tensor([-1]), FixedBudget(blocks=2)).tolist() == [[-1, -1]]


def test_budgets_by_share_differ_by_query():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    own = torch.tensor([3, 3])
    by_mass = choose(scores, own, TopPBudget(p=0.9, most=4))
    assert by_mass.tolist() == [[3, 0, 1, 2], [3, 0, -1, -1]]
    by_share = choose(scores, own, ThresholdBudget(threshold=0.2, most=3))
    assert by_share.tolist() == [[3, 0, 1], [3, 0, -1]]


def test_choosing_has_no_gradient_and_leaves_the_scores_as_they_are():
    scores = torch.tensor([[1.0, math.nan, 3.0]], requires_grad=True)
    before = scores.detach().clone()
    assert not choose(scores, torch.tensor([2]), TopPBudget(p=0.5, most=3)).requires_grad
    assert torch.equal(scores.detach().nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def test_own_blocks_broadcast_over_leading_axes(normal):
    scores = normal(2, 3, 5, 4)
    own = torch.tensor([0, 1, 2, 3, 3])
    made = choose(scores, own, FixedBudget(blocks=3))
    for b in range(2):
        for g in range(3):
            assert torch.equal(made[b, g], choose(scores[b, g], own, FixedBudget(blocks=3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBudget(blocks=0), "blocks is 0; expected a whole number of 1 or more"),
        (lambda: FixedBudget(blocks=2.5), "blocks is 2.5"),
        (lambda: FixedBudget(blocks=True), "blocks is True"),
        (lambda: ThresholdBudget(threshold=0.1, most=0), "most is 0"),
        (lambda: ThresholdBudget(threshold=1.1, most=2), "threshold is 1.1"),
        (lambda: ThresholdBudget(threshold=math.nan, most=2), "threshold is nan"),
        (lambda: TopPBudget(p=0.0, most=2), "p is 0.0"),
        (lambda: TopPBudget(p=math.nan, most=2), "p is nan"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(make, message):
    with pytest.raises(SparsortError, match=message):
        make()


def test_an_object_that_is_not_a_budget_is_refused():
    for budget in (FixedBudget(blocks=2), ThresholdBudget(threshold=0.1, most=3), TopPBudget(p=0.9, most=4)):
        assert check_budget(budget) is budget
    for wrong in (4, None, "fixed", FixedBudget):
        with pytest.raises(SparsortError, match=r"the budget is .*; expected FixedBudget"):
            check_budget(wrong)
