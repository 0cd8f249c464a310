"""Arguments that the operations of block-sparse attention refuse, and the messages."""

from __future__ import annotations

import math

import pytest
import torch

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.ops import align, attend, index_select
from sparsort.kernels.blocksparse.selection import every_block


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch):
    monkeypatch.delenv("SPARSORT_BLOCKSPARSE", raising=False)


LAYOUT = Layout.plain(2, 6)


def inputs_but(**changes):
    made = {
        "query": torch.zeros(2, 4, 6, 8),
        "key": torch.zeros(2, 2, 6, 8),
        "value": torch.zeros(2, 2, 6, 8),
        "index_query": torch.zeros(2, 2, 6, 4),
        "index_key": torch.zeros(2, 6, 4),
        "selection": every_block(LAYOUT, 2, 4),
        "layout": LAYOUT,
    }
    return made | changes


WRONG = [
    ("query", torch.zeros(2, 5, 6, 8), "5 query heads cannot be divided into 2 groups"),
    ("query", torch.zeros(2, 0, 6, 8), "0 query heads"),
    ("query", torch.zeros(2, 4, 7, 8), r"query has shape \(2, 4, 7, 8\); expected \(2, any, 6, any\)"),
    ("query", torch.zeros(3, 4, 6, 8), r"query has shape \(3, 4, 6, 8\)"),
    ("query", torch.zeros(2, 6, 8), r"query has shape \(2, 6, 8\)"),
    ("query", torch.zeros(2, 4, 6, 8, dtype=torch.int64), "query is torch.int64; expected float16"),
    ("query", torch.zeros(2, 4, 6, 8, dtype=torch.complex64), "query is torch.complex64"),
    ("query", [[0.0]], "query must be a torch tensor, got list"),
    (
        "query",
        torch.zeros(2, 4, 6, 8, device="meta"),
        "(key|index_query) is on cpu and query on meta; move them to one device",
    ),
    ("key", torch.zeros(2, 2, 6, 7), r"key has shape \(2, 2, 6, 7\); expected \(2, any, 6, 8\)"),
    ("key", torch.zeros(2, 2, 7, 8), r"key has shape \(2, 2, 7, 8\)"),
    ("key", torch.zeros(2, 0, 6, 8), "into 0 groups|value has shape"),
    ("key", torch.zeros(2, 2, 6, 8, dtype=torch.bfloat16), "key is torch.bfloat16 and query is torch.float32; cast"),
    ("value", torch.zeros(2, 2, 6, 9), r"value has shape \(2, 2, 6, 9\); expected \(2, 2, 6, 8\)"),
    ("value", torch.zeros(2, 2, 6, 8).half(), "value is torch.float16 and query is torch.float32"),
    ("bias", torch.zeros(2, 2, 6, 3), r"bias has shape \(2, 2, 6, 3\); expected \(2, 2, 6, 2\)"),
    ("bias", torch.zeros(2, 2, 6, 2, dtype=torch.int32), "bias is torch.int32"),
    ("index_query", torch.zeros(2, 2, 6, 5), r"index_key has shape \(2, 6, 4\); expected \(2, 6, 5\)"),
    ("index_query", torch.zeros(2, 3, 6, 4), r"index_query has shape \(2, 3, 6, 4\); expected \(2, 2, 6, any\)"),
    ("index_query", torch.zeros(2, 2, 5, 4), r"index_query has shape \(2, 2, 5, 4\)"),
    ("index_query", torch.zeros(2, 2, 6, 4).double(), "index_query is torch.float64 and query is torch.float32"),
    ("index_key", torch.zeros(2, 1, 6, 4), r"index_key has shape \(2, 1, 6, 4\); expected \(2, 6, 4\)"),
    ("index_key", torch.zeros(2, 6, 4).double(), "index_key is torch.float64 and index_query is torch.float32"),
    ("lse", torch.zeros(2, 2, 6), r"lse has shape \(2, 2, 6\); expected \(2, 4, 6\)"),
    ("selection", every_block(LAYOUT, 1, 4), r"\(rows, groups, queries\) = \(2, 1, 6\); expected \(2, 2, 6\)"),
    ("selection", every_block(Layout.plain(1, 6), 2, 4), r"= \(1, 2, 6\); expected \(2, 2, 6\)"),
    ("selection", every_block(Layout.plain(2, 5), 2, 4), r"= \(2, 2, 5\); expected \(2, 2, 6\)"),
    ("selection", every_block(LAYOUT, 2, 4, "meta"), "the selection is on meta and the query on cpu"),
    ("selection", None, "selection must be a Selection, got NoneType"),
    ("selection", torch.zeros(2, 2, 6, 2, dtype=torch.int32), "selection must be a Selection, got Tensor"),
    ("query", torch.zeros(2, 4, 6, 0), r"key has shape \(2, 2, 6, 8\); expected \(2, any, 6, 0\)"),
    ("layout", None, r"layout must be a Layout, got NoneType; make one by Layout.plain"),
    ("layout", Layout.plain(2, 6, 8), r"key has shape \(2, 2, 6, 8\); expected \(2, any, 8, 8\)|index_key has shape"),
]


@pytest.mark.parametrize(("name", "given", "message"), WRONG)
def test_tensors_that_do_not_fit_are_refused(name, given, message):
    arguments = inputs_but(**{name: given})
    tried = 0
    for operation, names in (
        (attend, ("query", "key", "value", "selection", "layout", "bias")),
        (align, ("query", "key", "index_query", "index_key", "selection", "layout", "lse")),
    ):
        if name in names:
            tried += 1
            with pytest.raises(SparsortError, match=message):
                operation(**{each: arguments[each] for each in names if each in arguments})
    assert tried


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("index_query", torch.zeros(2, 2, 6, 5), r"index_key has shape \(2, 6, 4\); expected \(2, 6, 5\)"),
        ("index_query", torch.zeros(2, 2, 5, 4), r"index_query has shape \(2, 2, 5, 4\); expected \(2, any, 6, any\)"),
        (
            "index_query",
            torch.zeros(2, 2, 6, 4).double(),
            "index_key is torch.float32 and index_query is torch.float64",
        ),
        ("index_key", torch.zeros(2, 7, 4), r"index_key has shape \(2, 7, 4\)"),
        ("index_key", torch.zeros(2, 6, 4, dtype=torch.int8), "index_key is torch.int8"),
        ("index_key", torch.zeros(2, 6, 4, device="meta"), "index_key is on meta and index_query on cpu"),
    ],
)
def test_index_tensors_that_do_not_fit_are_refused(name, given, message):
    arguments = inputs_but(**{name: given})
    arguments = {each: arguments[each] for each in ("index_query", "index_key", "layout")}
    with pytest.raises(SparsortError, match=message):
        index_select(**arguments, budget=FixedBudget(blocks=2), block_size=4)


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True, None, 2**20 + 1, 2**70])
def test_an_invalid_block_size_is_refused(size):
    with pytest.raises(
        SparsortError, match=f"block_size is {size!r}; expected a whole number of keys from 1 to 1048576"
    ):
        index_select(torch.zeros(2, 2, 6, 4), torch.zeros(2, 6, 4), LAYOUT, FixedBudget(blocks=1), block_size=size)


def test_an_invalid_budget_is_refused():
    for given in (2, None, FixedBudget):
        with pytest.raises(SparsortError, match=r"the budget is .*; expected FixedBudget"):
            index_select(torch.zeros(2, 2, 6, 4), torch.zeros(2, 6, 4), LAYOUT, given, block_size=4)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "1", True, 1j])
def test_a_scale_that_is_not_a_finite_number_is_refused(scale):
    query, key, value, index_query, index_key, selection, _ = inputs_but().values()
    with pytest.raises(SparsortError, match=r"the scale is .*; expected a finite number"):
        index_select(index_query, index_key, LAYOUT, FixedBudget(blocks=1), block_size=4, scale=scale)
    with pytest.raises(SparsortError, match="the scale is"):
        attend(query, key, value, selection, LAYOUT, scale=scale)
    with pytest.raises(SparsortError, match="the scale is"):
        align(query, key, index_query, index_key, selection, LAYOUT, index_scale=scale)


def test_tensors_without_a_width_or_a_group_are_refused():
    query, key, value, index_query, index_key, selection, _ = inputs_but().values()
    with pytest.raises(SparsortError, match="query has width 0"):
        attend(query[..., :0], key[..., :0], value[..., :0], selection, LAYOUT)
    with pytest.raises(SparsortError, match="index_query has width 0"):
        index_select(index_query[..., :0], index_key[..., :0], LAYOUT, FixedBudget(blocks=1), block_size=4)
    with pytest.raises(SparsortError, match="index_query has no groups"):
        index_select(index_query[:, :0], index_key, LAYOUT, FixedBudget(blocks=1), block_size=4)


def test_an_argument_that_is_not_a_tensor_is_refused_under_autocast_too():
    _, key, value, *_, selection, _ = inputs_but().values()
    with torch.autocast("cpu"), pytest.raises(SparsortError, match="value must be a torch tensor, got list"):
        attend(torch.zeros(2, 4, 6, 8), key, value.tolist(), selection, LAYOUT)


def test_triton_forced_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSORT_BLOCKSPARSE", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query, key, value, index_query, index_key, selection, _ = inputs_but().values()
    message = "SPARSORT_BLOCKSPARSE=triton cannot be met: Triton has no cpu backend. Unset it, or set it to torch"
    with pytest.raises(SparsortError, match=message):
        attend(query, key, value, selection, LAYOUT)
    with pytest.raises(SparsortError, match=message):
        align(query, key, index_query, index_key, selection, LAYOUT)
    with pytest.raises(SparsortError, match=message):
        index_select(index_query, index_key, LAYOUT, FixedBudget(blocks=1), block_size=4)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SparsortError, match="float64 tensors need float64 arithmetic"):
        attend(query.double(), key.double(), value.double(), selection, LAYOUT)
    monkeypatch.setenv("SPARSORT_BLOCKSPARSE", "tritn")
    with pytest.raises(SparsortError, match=r"unknown value of SPARSORT_BLOCKSPARSE 'tritn'\. Did you mean 'triton'"):
        attend(query, key, value, selection, LAYOUT)
