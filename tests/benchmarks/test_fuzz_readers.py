"""A short run of `benchmarks/checks/fuzz_readers.py`: every reader gives a result or a SparsortError for damaged or odd files.

The corpus of past failures is replayed in full, and each kind is given a few new examples, the same in every run.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "checks"
sys.path.insert(0, str(BENCHMARKS))
try:
    fuzz: Any = importlib.import_module("fuzz_readers")
    mutations: Any = importlib.import_module("fuzz_mutations")
    kinds: Any = importlib.import_module("fuzz_kinds")
finally:
    sys.path.remove(str(BENCHMARKS))

EXAMPLES = 12
# The readers of the other kinds train or load a model, a second each; the long run includes them.
FAST = [kind for kind in kinds.ALL if kind.share >= 1]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", FAST, ids=lambda kind: kind.name)
def test_a_reader_gives_a_result_or_a_sparsort_error(kind: Any, tmp_path: Path) -> None:
    with kinds.no_bars():
        fuzzer = fuzz.Fuzzer(kind, tmp_path / "work")
        for of_kind, found in fuzz.corpus():
            if of_kind == kind.name:
                fuzzer.read(found)
        tally = fuzzer.explore(EXAMPLES, seed=1)
    assert not tally.failures, tally.examples
    assert tally.results + tally.refused >= EXAMPLES // 2


def test_the_corpus_has_only_existing_kinds() -> None:
    names = {kind.name for kind in kinds.ALL}
    assert {of_kind for of_kind, _ in fuzz.corpus()} <= names


def test_a_reader_that_lets_an_error_escape_is_found_and_its_example_is_shrunk(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "a.json").write_text('{"a": {"b": 1}, "c": [1, 2, 3]}', encoding="utf-8")

    def read(folder: Path) -> dict[str, Any]:
        try:
            held = json.loads((folder / "a.json").read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise fuzz.SparsortError("refused") from error
        return {"b": held["a"]["b"] + 1}

    tally = fuzz.Fuzzer(fuzz.Kind(name="careless", make=make, read=read), tmp_path / "work").explore(150, seed=0)
    assert tally.results
    assert tally.refused
    assert any(signature.startswith(("KeyError", "TypeError")) for signature in tally.failures)
    assert all(len(found) == 1 for _, found in tally.examples.values())


def test_mutations_depend_only_on_their_list() -> None:
    files = {"a.json": b'{"a": [1, {"b": null}]}', "b": b"some text"}
    assert mutations.apply(files, [["flip", 1, 3, 0], ["value", 0, 3, 0]]) == mutations.apply(
        files, [["flip", 1, 3, 0], ["value", 0, 3, 0]]
    )
    assert mutations.apply(files, [["remove", 0]]) == {"b": b"some text"}
    assert mutations.apply(files, [["value", 0, 0, 1]])["a.json"] == b'{"a": true}'
    assert mutations.apply(files, [["cut", 1, 4]])["b"] == b"some"
    assert files["b"] == b"some text"
