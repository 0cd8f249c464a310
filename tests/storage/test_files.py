"""`sparsort.storage.files`: JSON on disk, and the errors by which libraries report a disk that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.storage.files import disk_errors, write_atomically, write_json

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_VALUES, repeat=st.sampled_from([1, 100]))
def test_json_is_read_back_unchanged(value: Any, repeat: int, tmp_path: Path) -> None:
    whole = {"list": [value] * repeat, "value": value}
    write_json(tmp_path / "a.json", whole)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == whole
    if repeat == 1:
        assert text == json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("repeat", [1, 100])
def test_half_of_a_surrogate_pair_is_read_back(repeat: int, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"list": ["a\ud800é"] * repeat})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"list": ["a\ud800é"] * repeat}


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


def test_a_symlink_stays_and_its_file_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "target.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    for text in ("first", "second"):
        with write_atomically(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_a_pipe_gets_the_bytes_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with write_atomically(pipe) as temporary:
            temporary.write_text("text")
            assert temporary.parent != pipe.parent
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
    assert not temporary.exists()


def test_stdout_keeps_what_was_printed_when_it_is_a_file(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from sparsort.storage.files import write_atomically\n"
        "print('before', flush=True)\n"
        "with write_atomically(Path('/dev/stdout')) as temporary: temporary.write_text('written\\n')\n"
        "print('after')"
    )
    with (tmp_path / "out.txt").open("a") as out:
        subprocess.run([sys.executable, "-P", "-c", code], stdout=out, check=True)
    assert (tmp_path / "out.txt").read_text() == "before\nwritten\nafter\n"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_device_that_is_full_is_reported_and_stays() -> None:
    with (
        pytest.raises(SparsortError, match=r"cannot write /dev/full: the disk is full"),
        write_atomically(Path("/dev/full")) as temporary,
    ):
        temporary.write_text("text")
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("name", ["", "."])
def test_a_folder_cannot_be_written_as_a_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match="it is a folder"), write_atomically(Path(name)):
        raise AssertionError("the block ran")
    with pytest.raises(SparsortError, match="it is a folder"), write_atomically(tmp_path):
        raise AssertionError("the block ran")
