"""The folder of a plan: whatever is damaged in it is refused, in the present version and in the one without digests."""

import copy
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sparsort import SparsortError
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.storage import integrity

REVERSED = Path(__file__).parents[3] / "data" / "plan_reversed"
N = 60
DIFFICULTY = np.random.default_rng(7).normal(size=N)
LENGTHS = np.random.default_rng(8).integers(1, 60, N)
GROUPS = ["web"] * 40 + ["code"] * 20
# Together they have every array that a plan may have.
PLANS = {
    "paced": {"batch_size": 8, "stages": 5, "pacing": Pacing(kind="root", start=0.2, until=0.5), "groups": GROUPS},
    "packed": {"batch_size": 4, "packing": "best_fit", "pack_length": 64, "lengths": LENGTHS, "stages": 2},
    "quotas": {
        **{"batch_size": 8, "mode": "pool", "steps": 20, "pacing": "linear:start=0.4"},
        **{"groups": GROUPS, "quotas": {"web": 0.6, "code": 0.4}, "ids": [f"row {-n:04d}" for n in range(N)]},
    },
}


def plan_of(name):
    return plan_curriculum(DIFFICULTY, **PLANS[name])


def without_digests(folder):
    """Turn a folder into what version 1 wrote."""
    path = folder / "plan.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    shapes = {name: [record["dtype"], record["length"]] for name, record in found["arrays"].items()}
    path.write_text(json.dumps(integrity.seal({**found, "version": 1, "arrays": shapes}), indent=2), encoding="utf-8")


def batches_of(plan):
    return [plan.batch(number, epoch).tolist() for epoch in (0, 1) for number in range(plan.n_batches)]


def is_refused(folder):
    try:
        CurriculumPlan.open(folder)
    except SparsortError:
        return True
    return False


def test_the_plans_here_have_every_array():
    names = {name for plan in PLANS for name in plan_of(plan)._arrays}
    every = {"difficulty", "order", "ids", "lengths", "groups", "group_edges", "available"}
    assert names == every | {"sequence", "batch_edges", "item_edges"}


@pytest.mark.parametrize("name", PLANS)
def test_any_damage_to_any_file_is_refused(name, tmp_path, damages):
    plan = plan_of(name).save(tmp_path / "plan")
    whole = batches_of(plan)
    tried = 0
    for path in sorted((tmp_path / "plan").iterdir()):
        before = path.read_bytes()
        for what in damages(path):
            if path.exists() and path.read_bytes().split() == before.split():
                continue  # the line break at the end of plan.json
            assert is_refused(tmp_path / "plan"), (path.name, what)
            tried += 1
    assert tried > 30
    assert batches_of(CurriculumPlan.open(tmp_path / "plan")) == whole


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_without_digests_opens_and_any_damage_that_changes_a_batch_is_refused(name, tmp_path, damages):
    plan = plan_of(name).save(tmp_path / "plan")
    without_digests(tmp_path / "plan")
    whole = batches_of(plan)
    assert CurriculumPlan.open(tmp_path / "plan").fingerprint == plan.fingerprint
    refused = 0
    for path in sorted((tmp_path / "plan").iterdir()):
        for _ in damages(path):
            try:
                opened = CurriculumPlan.open(tmp_path / "plan")
            except SparsortError:
                refused += 1
            else:  # a space in the header of an array
                assert batches_of(opened) == whole
    assert refused > 30


def test_an_order_that_was_changed_after_saving_is_damage(tmp_path):
    with pytest.raises(SparsortError, match=r"plan_reversed is damaged: its arrays have changed"):
        CurriculumPlan.open(REVERSED)
    folder = tmp_path / "plan"
    folder.mkdir()
    for path in REVERSED.iterdir():
        shutil.copy(path, folder / path.name)
    order = np.load(folder / "order.npy")
    np.save(folder / "order.npy", order[::-1])
    assert CurriculumPlan.open(folder).order.tolist() == order[::-1].tolist()
    np.save(folder / "order.npy", np.repeat(order[::-2], 2))
    with pytest.raises(SparsortError, match="its arrays have changed"):
        CurriculumPlan.open(folder)


def test_difficulties_that_float32_cannot_hold_are_no_damage(tmp_path):
    """Their order follows from float64, and the folder keeps float32."""
    plan = plan_curriculum(1 + np.arange(N)[::-1] * 1e-12, batch_size=8).save(tmp_path)
    assert len(set(plan.difficulty.tolist())) == 1
    without_digests(tmp_path)
    assert CurriculumPlan.open(tmp_path).order.tolist() == list(range(N))[::-1]


def test_digests_are_added_to_an_intact_plan_that_is_saved_again_and_only_to_that(tmp_path, caplog):
    plan = plan_of("packed").save(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    without_digests(tmp_path)
    CurriculumPlan.open(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 1
    plan.save(tmp_path)
    assert (tmp_path / "plan.json").read_text() == text
    without_digests(tmp_path)
    with (tmp_path / "sequence.npy").open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\0\0\0\0")
    with pytest.raises(SparsortError, match="its arrays have changed"):
        plan.save(tmp_path)  # which is mapped from there
    with caplog.at_level(logging.WARNING, "sparsort"):
        plan_of("packed").save(tmp_path)
    assert "have changed since they were written. The plan is written again." in caplog.text
    assert (tmp_path / "plan.json").read_text() == text
    assert batches_of(CurriculumPlan.open(tmp_path)) == batches_of(plan_of("packed"))


def test_saving_the_same_plan_again_writes_what_is_damaged_and_nothing_else(tmp_path, caplog):
    plan_of("quotas").save(tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    plan_of("quotas").save(tmp_path)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    (tmp_path / "order.npy").unlink()
    with caplog.at_level(logging.WARNING, "sparsort"):
        plan_of("quotas").save(tmp_path)
    assert "order.npy is damaged: it is missing. The plan is written again." in caplog.text
    assert {name: content for name, (content, _) in before.items()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }


def test_a_read_only_folder_of_the_old_version_is_read_and_saved_to(tmp_path, monkeypatch):
    plan = plan_of("paced").save(tmp_path)
    without_digests(tmp_path)
    before = (tmp_path / "plan.json").read_bytes()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert plan_of("paced").save(tmp_path).fingerprint == plan.fingerprint
    assert (tmp_path / "plan.json").read_bytes() == before


def test_a_process_maps_the_plan_that_it_was_given_and_no_other(tmp_path):
    plan = plan_of("paced").save(tmp_path / "plan")
    assert batches_of(copy.copy(plan)) == batches_of(plan_of("paced"))  # by way of its pickled state
    shutil.rmtree(tmp_path / "plan")
    plan_of("packed").save(tmp_path / "plan")
    with pytest.raises(SparsortError, match="contains another plan than when it was opened"):
        copy.copy(plan)


def described(folder):
    return json.loads((folder / "plan.json").read_text(encoding="utf-8"))


def seal(folder, description):
    (folder / "plan.json").write_text(json.dumps(integrity.seal(description)), encoding="utf-8")


# Each is read if it is there, and no setting shows whether it was.
OPTIONAL = {"ids", "groups"}
KINDS = PLANS | {
    "sorted": {"batch_size": 8},
    "sorted in stages": {"batch_size": 8, "stages": 3, "seed": 1},
    "folded": {"batch_size": 8, "schedule": "folded", "folds": 2},
    "shuffle": {"batch_size": 8, "schedule": "shuffle"},
    "as given": {"batch_size": 8, "schedule": "as_given"},
    "tokens": {"token_budget": 256, "lengths": LENGTHS},
    "like lengths": {"batch_size": 8, "group_by_length": 4, "lengths": LENGTHS, "stages": 3},
    "pool of tokens": {
        "token_budget": 256,
        "lengths": LENGTHS,
        "mode": "pool",
        "steps": 12,
        "pacing": "linear:start=0.4",
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_a_sealed_description_without_one_of_its_arrays_is_refused(name, tmp_path):
    plan_curriculum(DIFFICULTY, **KINDS[name]).save(tmp_path)
    assert not is_refused(tmp_path)
    whole = described(tmp_path)
    for array in whole["arrays"].keys() - OPTIONAL:
        others = {other: record for other, record in whole["arrays"].items() if other != array}
        seal(tmp_path, {**whole, "arrays": others})
        assert is_refused(tmp_path), array


@pytest.mark.parametrize("place", [("groups",), ("ids", "column"), ("ids", "sample")])
def test_a_sealed_description_without_a_note_that_the_plan_reads_is_refused(place, tmp_path):
    plan_of("quotas").save(tmp_path)
    description = described(tmp_path)
    part = description["notes"]
    for name in place[:-1]:
        part = part[name]
    del part[place[-1]]
    seal(tmp_path, description)
    assert is_refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("groups", "web, code"),
        ("groups", ["web", 1]),
        ("scores", [{"scorer": "array"}]),
        ("scores", {"score": "array"}),
        ("unscored", "0"),
        ("fingerprint", 5),
        ("content", {"fields": "text", "digest": "0", "sample": {}}),
        ("ids", {"column": "id", "digest": "0", "sample": {"first": "0"}}),
    ],
)
def test_a_sealed_description_with_notes_of_other_types_is_refused(name, value, tmp_path):
    plan_of("quotas").save(tmp_path)
    description = described(tmp_path)
    description["notes"][name] = value
    seal(tmp_path, description)
    assert is_refused(tmp_path)
