"""`curriculum.ablation.store.store`: outcomes are read back as written, and a store of another model is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outcome_stores import FEATURES, GROUP, IDENTITY, blocks, grid, make, outcomes, rows
from work import count_calls

from sparsort.curriculum.ablation.store import folder as store_folder
from sparsort.curriculum.ablation.store.outcomes import Outcomes
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.errors import SparsortError

# What comes back


def test_outcomes_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    store = make(tmp_path / "a" / "store")
    given_ = outcomes(grid("p0", 7), labels=6)
    store.write(GROUP, given_)
    found = make(tmp_path / "a" / "store").read(GROUP)
    assert rows(found) == rows(given_)
    assert found.pairs() == given_.pairs()
    assert (found.log_p.dtype, found.n_tokens.dtype, found.features.dtype) == (np.float32, np.int32, np.float32)
    assert found.text is None
    assert np.isnan(found.features[::2, 1]).all()


def test_generated_text_of_any_script_is_read_back(tmp_path: Path) -> None:
    texts = ["", "#### 42\n", "数学\u2028", "عربي", "🤗\x00\ufffd", "e\u0301 é", 'a,"b"\\']
    store = make(tmp_path)
    store.write("gsm8k", outcomes(grid("p", len(texts)), labels=0, text=texts))
    found = store.read("gsm8k")
    assert found.text == texts
    assert found.log_p.shape == found.n_tokens.shape == (len(texts), 0)
    with pytest.raises(SparsortError, match="not valid Unicode"):
        store.write("gsm8k", outcomes(grid("r", 1), labels=0, text=["\ud800"]))
    assert len(blocks(store)) == 1


def test_nothing_is_no_outcome_and_no_block(tmp_path: Path) -> None:
    store = make(tmp_path)
    found = store.read("never/written")
    assert (found.log_p.shape, found.n_tokens.shape, found.features.shape) == ((0, 0), (0, 0), (0, 3))
    store.write(GROUP, outcomes([]))
    assert store.groups() == []
    assert len(store.read(GROUP)) == 0
    assert store.missing(GROUP, [("p", "q")]) == [("p", "q")]
    assert store.compact(GROUP)


def test_a_store_without_features_keeps_the_rest(tmp_path: Path) -> None:
    store = OutcomeStore(tmp_path, IDENTITY, feature_names=())
    store.write("g", Outcomes(prefix=["p"], query=["q"], log_p=[[-1.0]], n_tokens=[[2]], features=np.empty((1, 0))))  # type: ignore[arg-type]
    found = store.read("g")
    assert found.features.shape == (1, 0)
    assert found.log_p.tolist() == [[-1.0]]


def test_the_first_of_two_equal_outcomes_counts(tmp_path: Path) -> None:
    store = make(tmp_path)
    first, second = outcomes(grid("p", 3), seed=1), outcomes([("r", "q0"), *grid("p", 5), ("r", "q0")], seed=2)
    store.write(GROUP, first)
    store.write(GROUP, second)
    found = store.read(GROUP)
    assert found.pairs() == [*grid("p", 3), ("r", "q0"), ("p", "q3"), ("p", "q4")]
    assert found.log_p.tolist() == [*first.log_p.tolist(), *second.log_p[[0, 4, 5]].tolist()]


def test_missing_names_each_lacking_pair_once_in_order(tmp_path: Path) -> None:
    store, other = make(tmp_path), make(tmp_path)
    store.write(GROUP, outcomes(grid("p", 3)))
    asked = [("r", "q1"), ("p", "q2"), ("r", "q0"), ("r", "q1"), ("p", "q3")]
    assert store.missing(GROUP, asked) == [("r", "q1"), ("r", "q0"), ("p", "q3")]
    other.write(GROUP, outcomes([("r", "q1")]))
    assert store.missing(GROUP, asked) == [("r", "q0"), ("p", "q3")]
    assert store.missing("another", asked[:1]) == asked[:1]
    assert store.missing(GROUP, asked) == [("r", "q0"), ("p", "q3")]


def test_missing_reads_a_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, reads = make(tmp_path), []
    for i in range(3):
        store.write(GROUP, outcomes(grid(f"p{i}", 2)))
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or whole(path))
    for _ in range(3):
        assert store.missing(GROUP, grid("p1", 3)) == [("p1", "q2")]
    assert len(reads) == 3
    store.write(GROUP, outcomes([("p1", "q2")]))
    assert store.missing(GROUP, grid("p1", 3)) == []
    assert len(reads) == 4


def test_missing_knows_that_a_block_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    store.write(GROUP, outcomes(grid("p", 2)))
    store.write(GROUP, outcomes(grid("r", 2)))
    assert store.missing(GROUP, grid("p", 2)) == []
    blocks(store)[0].write_bytes(b"")
    assert len(make(tmp_path).read(GROUP)) == 2
    assert store.missing(GROUP, grid("p", 2)) == grid("p", 2)
    assert "set aside" in caplog.text


OPERATION = st.tuples(
    st.sampled_from(["write", "write", "compact", "missing", "reopen"]),
    st.integers(0, 1),
    st.lists(st.tuples(st.sampled_from("pr"), st.sampled_from("stu")), max_size=4),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPERATION, max_size=12))
def test_any_course_of_operations_equals_a_dictionary(
    fsyncless: None, tmp_path_factory: pytest.TempPathFactory, course: list[tuple[str, int, list[tuple[str, str]]]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    stores, model = [make(folder), make(folder)], {"a/b": {}, "a": {}}  # type: ignore[var-annotated]
    for step, (verb, which, pairs) in enumerate(course):
        store, group = stores[step % 2], ["a/b", "a"][which]
        if verb == "write":
            made = outcomes(pairs, seed=step)
            store.write(group, made)
            for i, pair in enumerate(pairs):
                model[group].setdefault(pair, made.log_p[i].tobytes())
        elif verb == "compact":
            assert store.compact(group)
        elif verb == "missing":
            assert store.missing(group, pairs) == [pair for pair in dict.fromkeys(pairs) if pair not in model[group]]
        else:
            stores[step % 2] = make(folder)
    for group, expected in model.items():
        found = OutcomeStore.existing(folder).read(group)
        assert {pair: found.log_p[i].tobytes() for i, pair in enumerate(found.pairs())} == expected
        assert found.pairs() == list(expected)
    assert OutcomeStore.existing(folder).groups() == sorted(group for group in model if model[group])


def test_ten_thousand_pairs_are_read_at_once(fsyncless: None, tmp_path: Path) -> None:
    store = make(tmp_path)
    for i in range(100):
        store.write(GROUP, outcomes(grid(hashlib.blake2b(b"%d" % i).hexdigest()[:32], 100), labels=6, seed=i))
    # About 110 calls for each of the 100 blocks; one for each pair would add 10,000.
    assert count_calls(lambda: store.read(GROUP)) < 15_000
    assert len(store.read(GROUP)) == 10_000
    assert store.compact(GROUP)
    assert len(blocks(store)) == 1
    assert len(store.read(GROUP)) == 10_000


# What is refused


def test_a_store_of_another_model_is_refused_by_what_differs(tmp_path: Path) -> None:
    make(tmp_path, layers=(1, 2)).write(GROUP, outcomes(grid("p", 1)))
    assert len(make(tmp_path, layers=[1, 2]).read(GROUP)) == 1
    with pytest.raises(SparsortError) as caught:
        OutcomeStore(tmp_path, {**IDENTITY, "weights": "ef56", "revision": None}, feature_names=FEATURES)
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == ['  weights: "ab12" → "ef56"', "  layers: [1, 2] → absent", "  revision: absent → null"]
    assert str(tmp_path) in lines[0]
    assert "another folder" in lines[-1]


@pytest.mark.parametrize("names", [("hoyer", "norm"), ("norm", "hoyer", "entropy"), ("hoyer", "norm", "entropy", "x")])
def test_a_store_of_other_features_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    make(tmp_path)
    with pytest.raises(SparsortError, match=r'feature_names: \["hoyer", "norm", "entropy"\] → '):
        OutcomeStore(tmp_path, IDENTITY, feature_names=names)


def test_outcomes_unlike_those_of_the_store_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.write(GROUP, outcomes(grid("p", 1), labels=2))
    with pytest.raises(SparsortError, match=r"have 4 features; .* has 3: hoyer, norm, entropy"):
        store.write(GROUP, Outcomes(prefix=["p"], query=["q"], log_p=[[0]], n_tokens=[[1]], features=[[0, 0, 0, 0]]))  # type: ignore[arg-type]
    for fresh in (store, make(tmp_path)):
        with pytest.raises(SparsortError, match=r"have 3 labels and no text; those of group .* have 2 labels"):
            fresh.write(GROUP, outcomes(grid("r", 1), labels=3))
        with pytest.raises(SparsortError, match="2 labels and generated text"):
            fresh.write(GROUP, outcomes(grid("r", 1), labels=2, text=["t"]))
    assert len(store.read(GROUP)) == 1


def test_a_block_moved_between_groups_or_stores_is_refused(tmp_path: Path) -> None:
    store, other = make(tmp_path / "a"), make(tmp_path / "b", weights="other")
    store.write("g", outcomes(grid("p", 1)))
    other.write("g", outcomes(grid("p", 1)))
    store.write("h", outcomes(grid("p", 1)))
    block = next((store.folder / "groups" / "h").glob("block-*"))
    block.rename(store.folder / "groups" / "g" / block.name)
    with pytest.raises(SparsortError, match=r"written for another store or group .*'h'"):
        store.read("g")
    block = blocks(store)[0]
    block.rename(other.folder / "groups" / "g" / block.name)
    with pytest.raises(SparsortError, match="Move it back"):
        other.read("g")


@pytest.mark.parametrize("name", ["notes.txt", "block-000000.parquet", "groups"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SparsortError, match=f"no result store: it contains {name}"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_without_a_store_is_not_read(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SparsortError, match=r"no result store: it has no store\.json"):
            OutcomeStore.existing(folder)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "was not written by sparsort"),
        ('{"format": "sparsort-scores", "version": 1}', "was not written by sparsort"),
        ('{"format": "sparsort-outcomes", "version": 3}', "format version 3; this sparsort reads 1 and 2"),
        ('{"format": "sparsort-outcomes", "version": 2, "identity": {}, "feature_names": []}', "content has changed"),
        ('{"format": "sparsort-outcomes", "version": 1}', "lacks what its outcomes depend on"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(SparsortError, match=message):
        make(tmp_path)
    assert (tmp_path / "store.json").read_text() == text


def test_identities_and_notes_are_json(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match="identity is not made of JSON values"):
        make(tmp_path, layers={1, 2})
    store = make(tmp_path)
    for value in (float("nan"), object(), np.float32(1)):
        with pytest.raises(SparsortError, match="note 'n' is not made of JSON values"):
            store.put_note(GROUP, "n", value)
    assert store.get_note(GROUP, "n") is None


# Names


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=16))
def test_names_and_file_names_correspond(name: str) -> None:
    made = store_folder.file_name(name, "group")
    assert store_folder.name_of_file(made) == name
    assert made == made.lower()
    assert made.isascii()
    assert made not in {".", ".."}
    assert not made.startswith(".")
    assert not set(made) & set('/\\:*?"<>| \x00')


def test_names_that_make_no_file_name_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path)
    for name in ("", "x" * 201, "数" * 23, "\ud800"):
        with pytest.raises(SparsortError, match="the group name"):
            store.write(name, outcomes(grid("p", 1)))
    store.write("../TREC k=8", outcomes(grid("p", 1)))
    assert store.groups() == ["../TREC k=8"]
    assert [path.name for path in (tmp_path / "groups").iterdir()] == ["%2e.+%54%52%45%43%20k%3d8"]


# Notes, and what is there


def test_notes_are_kept_by_group_and_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    assert store.get_note(GROUP, "demonstrations") is None
    assert store.get_note(GROUP, "demonstrations", default=[]) == []
    store.put_note(GROUP, "demonstrations", {"ids": (3, 1), "text": "é\n"})
    store.put_note(GROUP, "probes/seed 3", None)
    store.put_note("other", "demonstrations", 7)
    again = make(tmp_path)
    assert again.get_note(GROUP, "demonstrations") == {"ids": [3, 1], "text": "é\n"}
    assert again.get_note(GROUP, "probes/seed 3", default=1) is None
    store.put_note(GROUP, "demonstrations", [2])
    assert again.get_note(GROUP, "demonstrations") == [2]
    assert again.groups() == []
    path = next(tmp_path.glob("groups/*/note-demonstrations.json"))
    path.write_text("[2")
    assert again.get_note(GROUP, "demonstrations", default="none") == "none"
    assert "set aside as note-demonstrations.json.broken" in caplog.text


def test_the_summary_counts_the_stored_outcomes(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.write("a", outcomes(grid("p", 3)))
    store.write("a", outcomes(grid("p", 4)))
    store.write("b/c", outcomes(grid("p", 5)))
    store.put_note("d", "n", 1)
    (tmp_path / "groups" / ".DS_Store").touch()
    found = store.summary()
    assert (found.groups, found.blocks, found.rows, found.broken) == (2, 3, 12, 0)
    sizes = [path.stat().st_size for path in tmp_path.rglob("groups/*/*") if path.is_file()]
    assert found.bytes == sum(sizes)
    assert store.groups() == ["a", "b/c"]


def test_a_store_that_exists_is_opened_without_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path).write(GROUP, outcomes(grid("p", 3)))
    monkeypatch.setattr(os, "open", lambda *arguments: pytest.fail("opened for a lock or a sync"))
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: pytest.fail("made a folder"))
    for store in (make(tmp_path), OutcomeStore.existing(tmp_path)):
        assert len(store.read(GROUP)) == 3
        assert (store.identity, store.feature_names) == (IDENTITY, FEATURES)
    assert json.loads((tmp_path / "store.json").read_text())["identity"] == IDENTITY
