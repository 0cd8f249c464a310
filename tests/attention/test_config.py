"""The configuration of sparse attention: what it refuses, and that JSON restores it exactly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors import SELECTORS
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget
from sparsort.kernels.blocksparse.selection import check_block_size

_BUDGETS = st.one_of(
    st.just({}),
    st.floats(0, 1).map(lambda share: {"threshold": share}),
    st.floats(0, 1, exclude_min=True).map(lambda share: {"top_p": share}),
)
_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "selector": st.sampled_from(tuple(SELECTORS)),
        "block_size": st.integers(1, 512),
        "blocks": st.integers(1, 512),
        "index_dim": st.none() | st.integers(1, 128).map(lambda half: 2 * half),
        "index_norm": st.sampled_from([True, False, None]),
        "alignment_weight": st.floats(0, 1e6),
        "layers": st.none() | st.lists(st.integers(0, 99), min_size=1, unique=True),
        "seed": st.integers(0, 2**62),
    },
)


@given(_FIELDS, _BUDGETS)
def test_json_restores_it_exactly(fields: dict[str, Any], budget: dict[str, Any]) -> None:
    config = SparseAttentionConfig(**fields, **budget, stored=True)
    back = SparseAttentionConfig.from_json(json.loads(json.dumps(config.to_json())), stored=True)
    assert back == config
    assert hash(back) == hash(config)


def test_fields_that_are_not_in_the_json_have_their_defaults() -> None:
    assert SparseAttentionConfig.from_json({"selector": "moba"}) == SparseAttentionConfig(selector="moba")


def test_layers_keep_their_order() -> None:
    assert SparseAttentionConfig(layers=[3, 0, 2]).layers == (3, 0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"blocks": 7}, FixedBudget(blocks=7)),
        ({"blocks": 7, "threshold": 0.1}, ThresholdBudget(threshold=0.1, most=7)),
        ({"blocks": 7, "threshold": 0.0}, ThresholdBudget(threshold=0.0, most=7)),
        ({"blocks": 7, "top_p": 0.9}, TopPBudget(p=0.9, most=7)),
    ],
)
def test_the_budget(fields: dict[str, Any], budget: object) -> None:
    assert SparseAttentionConfig(**fields).budget() == budget


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"selector": "mobba"}, "Did you mean 'moba'"),
        ({"selector": 3}, "unknown selector 3"),
        ({"block_sise": 4}, "Did you mean 'block_size'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 1.5}, "block_size is 1.5"),
        ({"block_size": True}, "block_size is True"),
        ({"block_size": 2**70}, "expected at most 1048576"),
        ({"blocks": 2**70}, "expected at most 2147483647"),
        ({"blocks": 0}, "blocks is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"threshold": 0.1, "top_p": 0.9}, "expected at most one"),
        ({"threshold": 1.1}, "threshold is 1.1"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": "0.1"}, "threshold is '0.1'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"index_dim": 0}, "index_dim is 0"),
        ({"index_dim": 33}, "Use 34, for example"),
        ({"index_norm": "yes"}, "index_norm is 'yes'"),
        ({"index_norm": np.array([1, 0])}, "index_norm is array"),
        ({"index_norm": 1}, "index_norm is 1"),
        ({"alignment_weight": -0.1}, "alignment_weight is -0.1"),
        ({"alignment_weight": math.inf}, "alignment_weight is inf"),
        ({"alignment_weight": math.nan}, "alignment_weight is nan"),
        ({"alignment_weight": None}, "alignment_weight is None"),
        ({"layers": [1, 2, 1]}, "names a layer twice"),
        ({"layers": []}, "names no layer"),
        ({"layers": [-1]}, "is -1"),
        ({"layers": [0.5]}, "is 0.5"),
        ({"layers": "12"}, "layers is '12'"),
        ({"layers": 2}, "layers is 2"),
        ({"selector": "moba", "index_dim": 8}, "index_dim=8 has no effect: index_branch, seer, lm_trained read it"),
        ({"selector": "seer", "index_norm": False}, "index_norm=False has no effect"),
        ({"selector": "nsa", "alignment_weight": 0.5}, "alignment_weight=0.5 has no effect"),
        ({"selector": "window", "top_p": 0.5}, "top_p=0.5 has no effect"),
        ({"selector": "random", "threshold": 0.5}, "threshold=0.5 has no effect"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        SparseAttentionConfig.from_json(values)


def test_the_largest_block_is_that_of_the_kernels() -> None:
    largest = SparseAttentionConfig(block_size=2**20).block_size
    check_block_size(largest)
    with pytest.raises(SparsortError):
        check_block_size(largest + 1)


def test_only_a_table_is_read() -> None:
    with pytest.raises(SparsortError, match="from a table"):
        SparseAttentionConfig.from_json("moba")  # type: ignore[arg-type]


def test_reading_a_configuration_loads_no_torch() -> None:
    script = "import sys, sparsort.attention.config as c; c.SparseAttentionConfig(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_numbers_of_numpy_are_kept_as_pythons() -> None:
    given = {"block_size": np.int64(16), "layers": np.array([0, 2]), "top_p": np.float32(0.5), "seed": np.int32(3)}
    config = SparseAttentionConfig.from_json(given)
    assert config == SparseAttentionConfig(block_size=16, layers=(0, 2), top_p=0.5, seed=3)
    assert SparseAttentionConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_number_beyond_the_range_of_a_float_is_refused() -> None:
    with pytest.raises(SparsortError, match="threshold is a number beyond the range of a float"):
        SparseAttentionConfig(threshold=10**400)
