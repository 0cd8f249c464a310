"""The cache of values computed for rows: a value is reused, bit for bit, if everything that it depends on is the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handshake import Child

import sparsort
from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import load_model
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.prompts.prompt import Encoded, Prompt
from sparsort.scoring.scorers.candidates import CandidateScorer
from sparsort.scoring.scorers.losses import EntropyScorer, LossScorer
from sparsort.scoring.scorers.sentence_vectors import embed_rows
from sparsort.scoring.scorers.sparsity import SparsityScorer
from sparsort.scoring.store import row_cache
from sparsort.scoring.store.row_cache import RowCache, context_of, key_of
from sparsort.storage import cache as user_cache

ROWS = [{"q": f"How many apples are {number} apples?", "a": str(number)} for number in range(12)]
NEW = [{"q": "Is Paris the capital of Italy?", "a": "No"}]
PROMPT, ANSWER = "Question: {q}\nAnswer:", " {a}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the folder of its rows."""
    monkeypatch.setenv("SPARSORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSORT_CACHE_ROWS_GB", "1")
    return tmp_path / "cache" / "rows"


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> str:
    return str(make_tiny_model("llama"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every walk of the model, which is what a cache saves."""
    walked: list[int] = []
    walk = Backbone.walk

    def counted(self: Backbone, ids: Any, how: Any, sites: Any) -> Iterator[Any]:
        walked.append(len(ids))
        return walk(self, ids, how, sites)

    monkeypatch.setattr(Backbone, "walk", counted)
    return walked


def _own(model: str) -> Backbone:
    """A backbone whose model nobody was handed."""
    backbone = Backbone(load_model(model))
    backbone.mark_as_own()
    return backbone


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.rows"))


SCORERS = {
    "gini": lambda model: SparsityScorer(model),
    "mean_metric": lambda model: SparsityScorer(model, pooling="mean_metric", metric="hoyer"),
    "answer": lambda model: SparsityScorer(model, pooling="answer", site="layer:0"),
    "rms": lambda model: SparsityScorer(model, outliers="rms", pooling="mean_state"),
    "drop": lambda model: SparsityScorer(model, outliers="drop:3"),
    "answer_loss": lambda model: LossScorer(model),
    "prompt_loss": lambda model: LossScorer(model, on="prompt"),
    "entropy": lambda model: EntropyScorer(model),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_second_call_reads_nothing_and_gives_the_same_bits(
    name: str, model: str, cache: Path, reads: list[int]
) -> None:
    options = {"prompt": PROMPT, "answer": ANSWER}
    plain = SCORERS[name](model).score(ROWS, **options)
    reads.clear()
    first = SCORERS[name](model).score(ROWS, **options, cache=RowCache())
    n_first = sum(reads)
    reads.clear()
    counts = RowCache()
    second = SCORERS[name](model).score(ROWS, **options, cache=counts)
    assert not reads
    assert counts.summary() == {"from_cache": n_first, "read": 0}
    # Read in the same batches, the first call gives what a call without a cache gives, and the second repeats it.
    assert first.table.equals(plain.table)
    assert second.table.equals(plain.table)
    assert plain.provenance["environment"].get("rows_from_cache") is None
    assert first.provenance["environment"]["rows_from_cache"] == 0
    assert second.provenance["environment"]["rows_from_cache"] == len(ROWS)
    settings = [{**scores.provenance, "environment": None} for scores in (plain, second)]
    assert settings[0] == settings[1]


def test_only_new_rows_are_read(model: str, cache: Path, reads: list[int]) -> None:
    first = embed_rows(_own(model), ROWS, Prompt.of(PROMPT), cache=RowCache())
    own = _own(model)
    reads.clear()
    second = embed_rows(own, [*ROWS[::-1], *NEW], Prompt.of(PROMPT), cache=RowCache())
    assert reads == [1]
    assert np.array_equal(second[:-1], first[::-1])
    assert second.dtype == first.dtype == np.float32
    alone = embed_rows(own, NEW, Prompt.of(PROMPT))
    assert np.array_equal(second[-1:], alone)


def test_copies_of_a_row_are_read_once_and_get_the_value_that_is_kept(
    model: str, cache: Path, reads: list[int]
) -> None:
    # With a budget of one row a batch, copies would be read in batches of other widths.
    scorer = SparsityScorer(model, token_budget=20)
    rows = [*ROWS, *ROWS[::-1], ROWS[0]]
    counts = RowCache()
    first = scorer.score([dict(row) for row in rows], PROMPT, cache=counts)
    assert reads == [len(ROWS)]
    assert counts.summary() == {"from_cache": len(ROWS) + 1, "read": len(ROWS)}
    second = scorer.score(rows, PROMPT, cache=RowCache())
    assert second.table.equals(first.table)
    assert np.array_equal(first.difficulty[: len(ROWS)], first.difficulty[len(ROWS) : -1][::-1])


def test_another_metric_of_the_same_states_is_found(model: str, cache: Path, reads: list[int]) -> None:
    SparsityScorer(model).score(ROWS, PROMPT, cache=RowCache())
    reads.clear()
    found = SparsityScorer(model, metric="hoyer").score(ROWS, PROMPT, cache=RowCache())
    assert not reads
    assert np.array_equal(found.difficulty, SparsityScorer(model, metric="hoyer").score(ROWS, PROMPT).difficulty)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What differs: options of the scorer, and of `score`.
    "dtype": ({"dtype": "bfloat16"}, {}),
    "site": ({"site": "post_norm"}, {}),
    "pooling": ({"pooling": "mean_metric"}, {}),
    "outliers": ({"outliers": "rms"}, {}),
    "l0_threshold": ({"l0_threshold": 0.5}, {}),
    "prompt": ({}, {"prompt": "Question: {q}\nAnswer: "}),
    "chat": ({}, {"chat": True}),
    "system": ({}, {"chat": True, "system": "Be kind."}),
    "truncation": ({}, {"truncation": "left", "max_length": 9}),
    "answer": ({}, {"answer": ANSWER}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_never_found(change: str, model: str, cache: Path) -> None:
    SparsityScorer(model, dtype="float32").score(ROWS, PROMPT, cache=RowCache())
    options, asked = CHANGES[change]
    counts = RowCache()
    scorer = SparsityScorer(model, **{"dtype": "float32", **options})
    found = scorer.score(ROWS, **{"prompt": PROMPT, **asked}, cache=counts)
    assert counts.from_cache == 0
    assert counts.read >= len(ROWS)
    assert found.table.equals(scorer.score(ROWS, **{"prompt": PROMPT, **asked}).table)


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer", "template"])
def test_a_changed_model_folder_is_never_found(what: str, model: str, cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, tmp_path / "model")
    asked: dict[str, Any] = {"prompt": "{q}", "chat": what == "template"}
    SparsityScorer(str(folder)).score(ROWS, **asked, cache=RowCache())
    if what == "weights":
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if "down_proj" in name)
        weights[name][0, 0] += 1.0
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif what == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    elif what == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("[assistant]", "[model]"))
    counts = RowCache()
    scorer = SparsityScorer(str(folder))
    found = scorer.score(ROWS, **asked, cache=counts)
    assert counts.summary() == {"from_cache": 0, "read": len(ROWS)}
    assert found.table.equals(scorer.score(ROWS, **asked).table)


def test_devices_and_engines_have_contexts_of_their_own(
    model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = _own(model)
    usual = context_of(backbone, site="x")
    assert context_of(backbone, site="x") == usual
    seen = [usual]
    monkeypatch.setattr("sparsort.kernels.backend.device_name", lambda device: "Another CPU")
    seen.append(context_of(backbone, site="x"))
    monkeypatch.setattr("sparsort.scoring.scorers.base.versions", lambda: {"torch": "99"})
    seen.append(context_of(backbone, site="x"))
    monkeypatch.setattr(backbone.config, "_attn_implementation", "another")
    seen.append(context_of(backbone, site="x"))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    seen.append(context_of(backbone, site="x"))
    monkeypatch.setattr(row_cache, "VERSION", -1)
    seen.append(context_of(backbone, site="x"))
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(context_of(backbone, site="x"))
    assert len({json.dumps(context, sort_keys=True) for context in seen}) == len(seen)


def test_a_key_depends_on_every_id_and_both_borders() -> None:
    usual = Encoded(ids=[1, 2, 3], n_lead=1, answer_start=3)
    others = [
        Encoded(ids=[1, 2, 4], n_lead=1, answer_start=3),
        Encoded(ids=[1, 2, 3, 3], n_lead=1, answer_start=3),
        Encoded(ids=[1, 2, 3], n_lead=0, answer_start=3),
        Encoded(ids=[1, 2, 3], n_lead=1, answer_start=2),
        Encoded(ids=[3, 1, 2, 3], n_lead=1, answer_start=3),
        Encoded(ids=[2**32 + 1, 2, 3], n_lead=1, answer_start=3),
    ]
    assert len({key_of(item) for item in (usual, *others)}) == len(others) + 1
    assert key_of(Encoded(ids=[1, 2, 3], n_lead=1, answer_start=3, n_dropped=7)) == key_of(usual)
    assert row_cache.key_of_all([usual]) != key_of(usual)


def test_damaged_files_are_removed_and_their_rows_are_read_again(
    model: str,
    cache: Path,
    damages: Callable[[Path], Iterator[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scorer = SparsityScorer(model)
    plain = scorer.score(ROWS, PROMPT)
    scorer.score(ROWS, PROMPT, cache=RowCache())
    (path,) = _files(cache)
    content = path.read_bytes()
    for what in damages(path):
        exists = path.exists()
        caplog.clear()
        counts = RowCache()
        scores = scorer.score(ROWS, PROMPT, cache=counts)
        assert counts.summary() == {"from_cache": 0, "read": len(ROWS)}, what
        assert scores.table.equals(plain.table), what
        assert ("is damaged" in caplog.text) == exists
        # The same rows in the same batches give the same file.
        assert path.read_bytes() == content
    # A file of another context in this one's folder is not this one's.
    other = path.parent.with_name("0" * 32)
    path.parent.rename(other)
    shutil.copytree(other, path.parent)
    assert row_cache._read_folder(other) == ({}, True)
    assert not list(other.iterdir())


def test_values_that_are_no_numbers_are_not_kept(cache: Path) -> None:
    counts = RowCache()

    def read(numbers: list[int]) -> tuple[np.ndarray[Any, Any], list[str]]:
        return np.array([[number, np.nan] for number in numbers], dtype=float), ["" if n else "zero" for n in numbers]

    for expected in ({"from_cache": 0, "read": 2}, {"from_cache": 1, "read": 3}):
        values, reasons = counts.through({"a": 1}, [b"0" * 16, b"1" * 16], read)
        assert reasons == ["zero", ""]
        assert values[1, 0] == 1
        assert counts.summary() == expected
    assert [user_cache.entries("rows")[0].kind, len(_files(cache))] == ["rows", 1]


def test_the_files_are_for_their_owner(model: str, cache: Path) -> None:
    SparsityScorer(model).score(ROWS, PROMPT, cache=RowCache())
    (path,) = _files(cache)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def _fill(value: float, width: int = 4) -> Callable[[list[int]], tuple[np.ndarray[Any, Any], list[str]]]:
    return lambda numbers: (np.full((len(numbers), width), value), [""] * len(numbers))


def _key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_small_files_are_merged_and_nothing_is_lost(cache: Path) -> None:
    for number in range(row_cache._MAX_FILES + 5):
        RowCache().through({"a": 1}, [_key(number)], _fill(number))
    assert len(_files(cache)) <= row_cache._MAX_FILES
    counts = RowCache()
    keys = [_key(number) for number in range(row_cache._MAX_FILES + 5)]
    values, _ = counts.through({"a": 1}, keys, _fill(-1))
    assert counts.read == 0
    assert values[:, 0].tolist() == list(range(len(keys)))


def test_large_files_are_not_merged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "_LARGE_BYTES", 100)
    for number in range(row_cache._MAX_FILES + 5):
        RowCache().through({"a": 1}, [_key(number)], _fill(number))
    assert len(_files(cache)) == row_cache._MAX_FILES + 5


def test_a_reader_whose_files_are_merged_meanwhile_looks_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        RowCache().through({"a": 1}, [_key(number)], _fill(number))
    monkeypatch.setattr(row_cache, "_MAX_FILES", 1)
    (folder,) = cache.iterdir()
    read_bytes = Path.read_bytes
    merged: list[bool] = []

    def slow(path: Path) -> bytes:
        if not merged:
            merged.append(True)
            row_cache._merge(folder)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", slow)
    files, complete = row_cache._read_folder(folder)
    assert complete
    assert sorted(row_cache._joined(files.values())) == [_key(number) for number in range(4)]


def test_the_cache_is_bounded_and_the_least_recently_used_go_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        RowCache().through({"context": number}, [_key(number)], _fill(number, width=1000))
        for path in _files(cache):
            if path.stat().st_mtime > 1e6:
                os.utime(path, (number + 1, number + 1))
    # Reading the oldest makes it the most recent.
    counts = RowCache()
    counts.through({"context": 0}, [_key(0)], _fill(-1))
    assert counts.from_cache == 1
    size = _files(cache)[0].stat().st_size
    monkeypatch.setenv("SPARSORT_CACHE_ROWS_GB", str(3.5 * size / 1e9))
    RowCache().through({"context": 9}, [_key(9)], _fill(9, width=1000))
    assert sum(path.stat().st_size for path in _files(cache)) <= 3.5 * size
    left = []
    for number in (0, 1, 2, 3, 4, 5, 9):
        counts = RowCache()
        counts.through({"context": number}, [_key(number)], lambda numbers: (np.zeros((1, 1)), ["not kept"]))
        left += [number] * counts.from_cache
    assert left == [0, 5, 9]


_PROCESS = """
import sys
import numpy as np
from sparsort.scoring.store import row_cache
from sparsort.scoring.store.row_cache import RowCache
row_cache._MAX_FILES = 3
start, n = int(sys.argv[1]), 40
def read(numbers):
    return np.array([[float(start + i)] for i in numbers]), [""] * len(numbers)
for number in range(n):
    key = (start + number).to_bytes(16, "big")
    values, _ = RowCache().through({"a": 1}, [key], lambda _: (np.array([[float(start + number)]]), [""]))
    assert values.tolist() == [[start + number]], values
print("done")
"""


def test_processes_that_write_and_merge_at_once_lose_nothing(cache: Path) -> None:
    with contextlib.ExitStack() as stack:
        starts = (0, 20, 40)
        processes = [stack.enter_context(Child(_PROCESS, start, stderr=subprocess.PIPE)) for start in starts]
        for process in processes:
            out, err = process.communicate()
            assert (process.returncode, out, err) == (0, "done\n", "")
    counts = RowCache()
    values, _ = counts.through({"a": 1}, [_key(number) for number in range(80)], _fill(-1, width=1))
    assert values[:, 0].tolist() == list(range(80))
    assert counts.read == 0
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_result(
    model: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file")
    scorer = SparsityScorer(model)
    counts = RowCache()
    scores = scorer.score(ROWS, PROMPT, cache=counts, shard_rows=4)
    assert scores.table.equals(scorer.score(ROWS, PROMPT, shard_rows=4).table)
    assert counts.read == len(ROWS)
    assert caplog.text.count("not cached") == 1


def test_a_model_that_a_caller_holds_is_refused(model: str, cache: Path) -> None:
    own = SparsityScorer(model)
    for scorer in (
        SparsityScorer(own.loaded.model, tokenizer=own.loaded.tokenizer),
        SparsityScorer(load_model(model)),
        SparsityScorer(own.loaded),
    ):
        with pytest.raises(SparsortError, match=r"passed as an object.*pass the name or folder"):
            scorer.score(ROWS, PROMPT, cache=RowCache())
    with pytest.raises(SparsortError, match="passed as an object"):
        embed_rows(Backbone(own.loaded), ROWS, Prompt.of(PROMPT), cache=RowCache())
    own.score(ROWS, PROMPT, cache=RowCache())


def test_a_model_that_was_edited_since_is_refused(model: str, cache: Path) -> None:
    scorer = SparsityScorer(model)
    scorer.score(ROWS, PROMPT, cache=RowCache())
    with torch.no_grad():
        next(scorer.loaded.model.parameters()).mul_(1.5)
    with pytest.raises(SparsortError, match="has changed since it was loaded"):
        scorer.score(ROWS, PROMPT, cache=RowCache())


def test_the_newer_settings_of_precision_are_part_of_the_context(model: str, cache: Path) -> None:
    backbone = _own(model)
    seen = [context_of(backbone)]
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            seen.append(context_of(backbone))
    finally:
        matmul.fp32_precision = before
    assert context_of(backbone) == seen[0]
    assert len({json.dumps(context, sort_keys=True) for context in seen}) == len(seen)


def test_a_cache_that_has_no_effect_is_refused(model: str, cache: Path, tmp_path: Path) -> None:
    scorer = SparsityScorer(model)
    with pytest.raises(SparsortError, match="out= and cache= were given"):
        scorer.score(ROWS, PROMPT, cache=RowCache(), out=tmp_path / "scores")
    with pytest.raises(SparsortError, match=r"cache=.*has no effect"):
        sparsort.CompressionScorer().score(ROWS, PROMPT, cache=RowCache())
    with pytest.raises(SparsortError, match="cache= has no effect on candidates"):
        CandidateScorer(scorer.loaded).score(ROWS, PROMPT, cache=RowCache())
    assert not _files(cache)


def test_code_that_ships_with_a_model_is_no_part_of_its_weights(model: str, cache: Path) -> None:
    backbone = _own(model)
    assert row_cache.obstacle(backbone) is None
    backbone.loaded.model.add_module("own", type("Own", (torch.nn.Module,), {"__module__": "transformers_modules.x"})())
    backbone.mark_as_own()
    assert "runs its own code" in str(row_cache.obstacle(backbone))
