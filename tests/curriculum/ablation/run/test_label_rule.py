"""Stored outcomes and the rule by which labels are scored: those that it concerns are computed again, all others reused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sparsort
from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import LoadedModel, load_model

# The tokenizer joins the label "s" with the last token of a text that ends in "apple".
ENDS = ["apple", "moon", "lamp"]
NOTES = ("orders", "tokens", "probes", "spent")


@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("llama")), dtype="float32")


@pytest.fixture
def recipe(tmp_path: Path) -> Ablation:
    rows = [{"text": f"row {n} of {n * 7 % 31} is one {ENDS[n % 3]}", "label": str(n % 2)} for n in range(40)]
    for name, part in (("train", rows[:31]), ("test", rows[31:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    task = Task(
        name="toy",
        prompt="{text}",
        answer="{label}",
        labels={"0": "s", "1": " no"},
        train="train.jsonl",
        test="test.jsonl",
    )
    return Ablation(
        tasks=(task,),
        data=tmp_path,
        sets=1,
        shots=(2,),
        random_orders=2,
        test_rows=9,
        dev_rows=4,
        orderers=("length_ascending",),
        choosers=("mdl", "cone", "density_gain"),
        sampled_probes=False,
    )


def moved_names(recipe: Ablation, loaded: LoadedModel) -> dict[str, str]:
    """The names of the queries that the rule concerns, to those under which an earlier version filed them."""
    (task,) = recipe.load_tasks()
    data, texts = TaskData(task, recipe), Texts(task, loaded.tokenizer)
    queries = [*data.test_texts, *data.dev_texts, *task.content_free_texts()]
    names = {texts.pair((), query)[1]: texts.query_digests(query)[0] for query in queries}
    assert len(names) == len(set(queries))
    moved = {name: plain for name, plain in names.items() if name != plain}
    endings = {query.rsplit(" ", 1)[-1] for query in queries if texts.pair((), query)[1] in moved}
    # A query without text ends in the whitespace of the prefix.
    assert endings == {"apple", ""}
    return moved


def as_an_earlier_version(new: OutcomeStore, folder: Path, moved: dict[str, str]) -> OutcomeStore:
    """The same store, but that all outcomes have plain names, and those that the rule concerns other numbers."""
    old = OutcomeStore(folder, new.identity, feature_names=new.feature_names)
    for group in new.groups():
        held = new.read(group)
        is_moved = np.isin(held.query, list(moved))
        old.write(
            group,
            replace(
                held,
                query=np.array([moved.get(name, name) for name in held.query.tolist()]),
                log_p=held.log_p - 50.0 * is_moved[:, None] * np.arange(held.log_p.shape[1]),
                features=held.features + is_moved[:, None],
            ),
        )
    for group in new.groups():
        for name in NOTES:
            if (note := new.get_note(group, name)) is not None:
                old.put_note(group, name, note)
    return old


def names(store: OutcomeStore, group: str) -> set[str]:
    return set(store.read(group).query.tolist())


def same(one: Results, other: Results) -> None:
    for group, like in zip(one.cells, other.cells, strict=True):
        arms = [*group.random, *group.arms]
        for arm, like_arm in zip(arms, [*like.random, *like.arms], strict=True):
            assert arm.name == like_arm.name
            np.testing.assert_allclose(arm.log_p, like_arm.log_p, atol=1e-4, err_msg=arm.name)
            np.testing.assert_array_equal(arm.predicted, like_arm.predicted)


def test_a_store_of_an_earlier_version(recipe: Ablation, loaded: LoadedModel, tmp_path: Path) -> None:
    fresh = sparsort.ablate(recipe, out=tmp_path / "new", model=loaded, report=False)
    new = OutcomeStore.existing(tmp_path / "new" / "store")
    moved = moved_names(recipe, loaded)
    old = as_an_earlier_version(new, tmp_path / "old" / "store", moved)
    held = {group: set(old.read(group).pairs()) for group in old.groups()}
    assert sum(group.endswith("/loss") for group in held) == 1
    # Its numbers are not taken for those of the rule.
    with pytest.raises(SparsortError, match="no complete demonstration set"):
        sparsort.ablate(recipe, out=tmp_path / "old", model=loaded, run=False, report=False)
    again = sparsort.ablate(recipe, out=tmp_path / "old", model=loaded, report=False)
    assert 0 < again.tokens_read < fresh.tokens_read
    same(again.results, fresh.results)
    for group, before in held.items():
        # What the rule does not concern was not asked again; losses on a query's own text are no matter of labels.
        added = set(old.read(group).pairs()) - before
        assert {name for _, name in added} == (set() if group.endswith("/loss") else {*moved} & names(new, group))
    kept = sparsort.ablate(recipe, out=tmp_path / "old", model=loaded, run=False, report=False)
    same(kept.results, fresh.results)
    assert sparsort.ablate(recipe, out=tmp_path / "old", model=loaded, report=False).tokens_read == 0


def test_a_store_is_read_with_its_own_tokenizer(
    recipe: Ablation, loaded: LoadedModel, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    sparsort.ablate(recipe, out=tmp_path / "out", model=loaded, report=False)
    sparsort.ablate(recipe, out=tmp_path / "out", model=make_tiny_model("llama"), run=False, report=False)
    other = replace(loaded, tokenizer=loaded.tokenizer.train_new_from_iterator(["another vocabulary"] * 9, 300))
    with pytest.raises(SparsortError, match="whose tokenizer is not that of"):
        sparsort.ablate(recipe, out=tmp_path / "out", model=other, run=False, report=False)
