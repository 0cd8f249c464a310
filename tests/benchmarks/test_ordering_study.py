"""The ordering study's answers as one file, from which the data of its page are restored exactly."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.store.outcomes import Outcomes
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.errors import SparsortError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "studies" / "ordering"


@pytest.fixture(scope="module")
def outcomes() -> Any:
    """The script's module. Its folder is on the path while it is imported, as it does for a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("ordering_study_outcomes")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def recipe(tmp_path: Path) -> Ablation:
    rows = [{"text": f"the {word} film", "label": str(n % 2)} for n, word in enumerate("abcdefghijklmnopqrst")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = Task(name="films", prompt="{text}:", answer=" {label}", labels={"0": "bad", "1": "good"}, train="rows.jsonl")
    return Ablation(tasks=(task,), data=tmp_path, test_rows=4, dev_rows=4, shots=(2,), choosers=())


def filled(folder: Path, recipe: Ablation) -> tuple[OutcomeStore, set[str], set[str]]:
    """A store with a group of two labels, and the digests of its test and of its dev queries."""
    data = TaskData(recipe.load_tasks()[0], recipe)
    texts = Texts(data.task, None)
    # Every other test query is one whose labels the rule of scoring concerns.
    test = [texts.query_digests(texts.query([], text))[place % 2] for place, text in enumerate(data.test_texts)]
    dev = [texts.query_digests(texts.query([], text))[0] for text in data.dev_texts]
    rng = np.random.default_rng(0)
    store = OutcomeStore(folder, {"weights": "ab"}, feature_names=("hoyer", "entropy"))
    for group, prefix in (("films/random/k4/seed0", "p"), ("films/none", "none")):
        store.write(
            group,
            Outcomes(
                prefix=np.array([prefix] * 8),
                query=np.array(test + dev),
                log_p=-rng.exponential(size=(8, 2)),
                n_tokens=rng.integers(1, 4, size=(8, 2)),
                features=rng.normal(size=(8, 2)),
            ),
        )
    store.put_note("films/random/k4/seed0", "orders", {"ids": ["a", "b"]})
    return store, set(test), set(dev)


def test_values_that_arms_and_choosers_read_are_restored_exactly(
    outcomes: Any, recipe: Ablation, tmp_path: Path
) -> None:
    store, test, dev = filled(tmp_path / "store", recipe)
    outcomes.pack(store, recipe, tmp_path / "kept.parquet")
    found = outcomes.unpack(tmp_path / "kept.parquet", tmp_path / "again")
    assert (found.identity, found.feature_names) == (store.identity, store.feature_names)
    assert found.groups() == store.groups()
    assert found.get_note("films/random/k4/seed0", "orders") == {"ids": ["a", "b"]}
    for group in store.groups():
        was, now = store.read(group), found.read(group)
        assert now.pairs() == was.pairs()
        np.testing.assert_array_equal(now.log_p, was.log_p)
        np.testing.assert_array_equal(now.n_tokens, was.n_tokens)
        kept = np.array([query in dev or group.endswith("/none") for query in was.query.tolist()])
        np.testing.assert_array_equal(now.features[kept], was.features[kept])
        assert np.isnan(now.features[~kept]).all()
        assert set(was.query[~kept].tolist()) <= test


def test_another_file_and_another_store_are_refused(outcomes: Any, recipe: Ablation, tmp_path: Path) -> None:
    store, _, _ = filled(tmp_path / "store", recipe)
    outcomes.pack(store, recipe, tmp_path / "kept.parquet")
    OutcomeStore(tmp_path / "other", {"weights": "cd"}, feature_names=store.feature_names)
    with pytest.raises(SparsortError, match="another model"):
        outcomes.unpack(tmp_path / "kept.parquet", tmp_path / "other")
    (tmp_path / "none.parquet").write_text("no Parquet", encoding="utf-8")
    with pytest.raises(SparsortError, match="is not a packed ordering study"):
        outcomes.unpack(tmp_path / "none.parquet", tmp_path / "new")
    content = bytearray((tmp_path / "kept.parquet").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "kept.parquet").write_bytes(content)
    with pytest.raises(SparsortError, match=r"kept.parquet is damaged"):
        outcomes.unpack(tmp_path / "kept.parquet", tmp_path / "new")
