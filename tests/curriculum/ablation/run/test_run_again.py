"""An ablation that is run again with another recipe in its folder, or of which a part cannot be done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsort
from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.results.cells import Cell
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.run.run import AblationRunner
from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import LoadedModel, load_model

WORDS = ["moon", "tree", "river", "stone", "cloud", "lamp", "paper", "glass", "wheel", "garden", "window", "bread"]


def write(path: Path, numbers: range) -> None:
    rows = [
        {"text": f"{WORDS[n % 12]} {n} of {WORDS[n * 7 % 12]} and {WORDS[n * 5 % 11]}", "label": str(n * 13 % 3)}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train.jsonl", range(60))
    write(folder / "test.jsonl", range(200, 209))
    return folder


@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("llama")), dtype="float32")


def a_task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "toy",
        "prompt": "Text: {text}\nKind:",
        "answer": " {label}",
        "labels": {"0": "good", "1": "rather bad", "2": "odd"},
        "train": "train.jsonl",
        "test": "test.jsonl",
    }
    return Task(**fields | changes)


def a_recipe(folder: Path, **changes: Any) -> Ablation:
    fields: dict[str, Any] = {
        "tasks": (a_task(),),
        "data": folder,
        "shots": (3,),
        "random_orders": 4,
        "dev_rows": 5,
        "test_rows": 9,
        "sampled_probes": False,
    }
    return Ablation(**fields | changes)


def only(results: Results) -> Cell:
    (group,) = [group for group in results.cells if not group.contextual]
    return group


# With a single row, the shape of the orders does not show whether all queries share one set.
@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("selector", ["random", "bm25"])
def test_more_and_fewer_test_rows_in_one_folder(
    folder: Path, loaded: LoadedModel, tmp_path: Path, selector: str, least: int
) -> None:
    def asked(test_rows: int) -> dict[str, Any]:
        orderers = ("similarity_ascending", "length_ascending")
        return {
            "selectors": (selector,),
            "sets": 1,
            "test_rows": test_rows,
            "orderers": orderers,
            "choosers": ("mdl",),
        }

    def run(out: Path, test_rows: int) -> sparsort.AblationReport:
        return sparsort.ablate(a_recipe(folder, **asked(test_rows)), out=out, model=loaded, report=False)

    few = run(tmp_path / "one", least)
    more = run(tmp_path / "one", 9)
    whole = run(tmp_path / "other", 9)
    assert 0 < more.tokens_read < whole.tokens_read
    fewer = run(tmp_path / "other", least)
    # The dev rows too are queried after the demonstrations of a single query.
    assert fewer.tokens_read == 0 or (selector, least) == ("bm25", 1)
    if selector == "random":
        # What the smaller recipe does not ask is still known of the larger one.
        kept = sparsort.ablate(
            a_recipe(folder, **asked(9)), out=tmp_path / "other", model=loaded, run=False, report=False
        )
        assert [arm.name for arm in only(kept.results).arms] == [arm.name for arm in only(whole.results).arms]
    for done, other in ((more, whole), (fewer, few)):
        for arm, like in zip(only(done.results).arms, only(other.results).arms, strict=True):
            np.testing.assert_allclose(arm.log_p, like.log_p, atol=1e-4, err_msg=arm.name)


def test_another_test_file_in_one_folder(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "train.jsonl", range(60))
    recipe = a_recipe(data, sets=2, orderers=("similarity_ascending", "length_ascending"), choosers=("mdl",))
    for out, numbers in (("one", range(200, 209)), ("one", range(300, 309)), ("other", range(300, 309))):
        write(data / "test.jsonl", numbers)
        done = sparsort.ablate(recipe, out=tmp_path / out, model=loaded, report=False)
        if out == "one":
            after_another = only(done.results)
    (orders,) = {
        arm.name: arm.order_of_item for arm in only(done.results).arms if arm.name == "similarity_ascending"
    }.values()
    assert len({tuple(order) for order in orders.reshape(-1, 3).tolist()}) > 1
    for arm, like in zip(after_another.arms, only(done.results).arms, strict=True):
        np.testing.assert_array_equal(arm.order_of_item, like.order_of_item, err_msg=arm.name)
        np.testing.assert_allclose(arm.log_p, like.log_p, atol=1e-4, err_msg=arm.name)
    # Taken as it is, a store says nothing about queries that it has not seen.
    write(data / "test.jsonl", range(400, 409))
    with pytest.raises(SparsortError, match="no complete demonstration set"):
        sparsort.ablate(recipe, out=tmp_path / "one", model=loaded, run=False, report=False)


def test_probes_of_another_number_of_orders_choose_nothing(
    folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(_reader: Any, _texts: Any, _showing: Any, orders: Any, _seed: int) -> dict[str, Any]:
        texts = [f"Text: the {word} of {len(orders)}\nKind:" for word in WORDS[: len(orders)]]
        return {"texts": texts, "tokens": 9.0, "sampling_tokens": 7}

    # A model of random weights writes nothing that reads as a query.
    monkeypatch.setattr("sparsort.curriculum.ablation.run.run.probes", sampled)
    changes: dict[str, Any] = {"sets": 1, "orderers": ("given",), "sampled_probes": True, "choosers": ("globale",)}
    few, more = (a_recipe(folder, random_orders=number, **changes) for number in (3, 5))
    first = sparsort.ablate(few, out=tmp_path, model=loaded, report=False)
    sparsort.ablate(more, out=tmp_path, model=loaded, report=False)
    now = sparsort.ablate(few, out=tmp_path, model=loaded, run=False, report=False)
    assert "globale" in {arm.name for arm in only(first.results).arms}
    assert "globale" not in {arm.name for arm in only(now.results).arms}
    again = sparsort.ablate(few, out=tmp_path, model=loaded, report=False)
    assert only(again.results).arm("globale").order == only(first.results).arm("globale").order


def test_the_cost_of_a_stopped_run_is_noted(
    folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_recipe(folder, sets=1, orderers=("given",), choosers=("mdl",))
    whole = sparsort.ablate(recipe, out=tmp_path / "whole", model=loaded, report=False)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AblationRunner, "_note_tokens", stop)
        with pytest.raises(KeyboardInterrupt):
            sparsort.ablate(recipe, out=tmp_path / "stopped", model=loaded, report=False)
    rest = sparsort.ablate(recipe, out=tmp_path / "stopped", model=loaded, report=False)
    assert rest.tokens_read == 0
    assert rest.results.provenance["tokens"] == whole.results.provenance["tokens"]


def test_a_model_is_a_name_a_folder_or_a_loaded_one(
    folder: Path, loaded: LoadedModel, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    recipe = a_recipe(folder, sets=1, orderers=("given",), choosers=("mdl",), dtype="float32")
    first = sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False)
    again = sparsort.ablate(recipe, out=tmp_path, model=make_tiny_model("llama"), report=False)
    assert first.tokens_read > again.tokens_read == 0
    with pytest.raises(SparsortError, match=r"Identity.*load_model"):
        sparsort.ablate(recipe, out=tmp_path, model=torch.nn.Identity(), report=False)


def test_another_sparsity_gives_another_order(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    def orders(out: Path, **changes: Any) -> list[list[list[int]] | None]:
        recipe = a_recipe(
            folder, sets=3, orderers=("sparse_to_dense", "length_ascending"), choosers=("mdl",), **changes
        )
        group = only(sparsort.ablate(recipe, out=out, model=loaded, report=False).results)
        return [group.arm(name).order for name in recipe.orderers]

    gini, lengths = orders(tmp_path / "one")
    other = orders(tmp_path / "one", site="mlp:0", metric="hoyer")
    assert other == orders(tmp_path / "two", site="mlp:0", metric="hoyer")
    assert other[0] != gini
    assert other[1] == lengths


def test_tasks_whose_names_begin_alike_share_no_group(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    tasks = (a_task(name="glue/one"), a_task(name="glue/two", prompt="T: {text}\nK:"))
    recipe = a_recipe(folder, tasks=tasks, sets=1, orderers=("given",), choosers=("mdl",))
    done = sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False)
    assert {group.task for group in done.results.cells} == {"glue/one", "glue/two"}


def test_a_chooser_that_cannot_judge_is_named_and_costs_no_other(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    # No row of the pool bears the last label.
    task = a_task(labels={"0": "good", "1": "rather bad", "2": "odd", "3": "never"})
    recipe = a_recipe(folder, tasks=(task,), sets=1, orderers=("given",), choosers=("pdo_prior", "pdo", "pdo_null"))
    done = sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False)
    assert {arm.name for arm in only(done.results).arms} >= {"given", "pdo", "pdo_null"}
    assert any("pdo_prior" in note and "positive" in note for note in done.results.provenance["incomplete"])
    # It reads content-free inputs alone, so dev rows are no matter.
    bare = a_recipe(folder, sets=1, dev_rows=0, orderers=("given",), choosers=("pdo_null",))
    group = only(sparsort.ablate(bare, out=tmp_path / "none", model=loaded, report=False).results)
    assert group.arm("pdo_null").choosing_tokens[0] > 0


def test_choosing_by_query_costs_every_prefix(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    for selector in ("random", "bm25"):
        recipe = a_recipe(folder, selectors=(selector,), sets=1, orderers=("given",), choosers=("mdl",))
        group = only(sparsort.ablate(recipe, out=tmp_path / selector, model=loaded, report=False).results)
        np.testing.assert_allclose(group.arm("mdl").tokens, 4 * group.random[0].tokens)


def test_chat_without_a_chat_template_is_refused(
    folder: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    base = load_model(str(make_tiny_model("llama")), dtype="float32")
    base.tokenizer.chat_template = None
    with pytest.raises(SparsortError, match="has no chat template"):
        sparsort.ablate(a_recipe(folder, tasks=(a_task(chat=True),)), out=tmp_path, model=base, report=False)
