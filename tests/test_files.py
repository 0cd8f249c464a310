"""`sparsort.files`: JSON on disk, and the errors by which libraries report a disk that cannot be written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.files import disk_errors, write_json

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_VALUES, repeat=st.sampled_from([1, 100]))
def test_json_comes_back(value: Any, repeat: int, tmp_path: Path) -> None:
    whole = {"list": [value] * repeat, "value": value}
    try:
        json.dumps(whole, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    write_json(tmp_path / "a.json", whole)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == whole
    if repeat == 1:
        assert text == json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def test_each_item_of_a_long_list_is_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"shards": [{"index": index, "rows": [1]} for index in range(100)]})
    lines = (tmp_path / "a.json").read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["{", '  "shards": [', '    {"index": 0, "rows": [1]},']
    assert len(lines) == 104


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        # As safetensors 0.8 and torch 2.13 say it on a full tmpfs.
        (
            Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full; free some room and run the same command again",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 71552 vs 71440"),
            "PyTorch could not write the whole of a file",
        ),
    ],
)
def test_errors_of_the_disk_are_one_sentence(error: Exception, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=f"cannot write .*model: {message}"), disk_errors(tmp_path / "model"):
        raise error


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shape mismatch"), ValueError("(os error)"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, disk_errors(tmp_path):
            raise error
        assert found.value is error
