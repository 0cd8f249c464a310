"""`sparsort.storage.integrity`: JSON that sparsort wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsort.errors import SparsortError
from sparsort.storage.integrity import parse_own_json, read_sealed, seal


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_sparsort_never_writes_is_not_its_json(number: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        parse_own_json(f'{{"a": [{number}]}}')
    path = tmp_path / "file.json"
    path.write_text(f'{{"a": {number}, "digest": "{seal({"a": float(number)})["digest"]}"}}')
    with pytest.raises(SparsortError, match=r"file\.json cannot be read .*not finite.*Make it again\."):
        read_sealed(path, next_step="Make it again.")


def test_numbers_come_back_as_they_are() -> None:
    assert parse_own_json('[1, 1.5, 1e300, -0.0, 5e-324, "NaN"]') == [1, 1.5, 1e300, -0.0, 5e-324, "NaN"]


def test_deep_nesting_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_own_json("[" * 100_000)
