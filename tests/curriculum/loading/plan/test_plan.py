import copy
import itertools
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort import SparsortError
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum

N = 103
DIFFICULTY = np.random.default_rng(7).normal(size=N)
LENGTHS = np.random.default_rng(8).integers(1, 60, N)
GROUPS = ["web"] * 80 + ["code"] * 23

ONE_PASS = {
    "sorted": {},
    "reverse": {"direction": "hard_to_easy"},
    "stages": {"stages": 3},
    "random": {"direction": "random", "stages": 3},
    "paced": {"stages": 5, "pacing": Pacing(kind="root", start=0.2, until=0.5)},
    "folded": {"schedule": "folded"},
    "interleaved": {"schedule": "interleaved"},
    "shuffle": {"schedule": "shuffle"},
    "as_given": {"schedule": "as_given"},
    "warm_up": {"warm_up": 0.3},
    "later": {"later_epochs": "shuffle"},
    "groups": {"groups": GROUPS, "stages": 4},
    "lengths": {"stages": 3, "group_by_length": True, "lengths": LENGTHS},
    "tokens": {"batch_size": None, "token_budget": 200, "lengths": LENGTHS},
    "tokens_stages": {
        "batch_size": None,
        "token_budget": 200,
        "lengths": LENGTHS,
        "stages": 3,
        "group_by_length": True,
    },
    "tokens_shuffle": {"batch_size": None, "token_budget": 200, "lengths": LENGTHS, "schedule": "shuffle"},
    "next_fit": {"batch_size": 4, "packing": "next_fit", "pack_length": 64, "lengths": LENGTHS},
    "best_fit": {"batch_size": 4, "packing": "best_fit", "pack_length": 64, "lengths": LENGTHS, "stages": 2},
}
POOL = {
    "pool": {},
    "pool_reverse": {"direction": "hard_to_easy"},
    "pool_tokens": {"batch_size": None, "token_budget": 200, "lengths": LENGTHS},
    "pool_quotas": {"groups": GROUPS, "quotas": {"web": 0.5, "code": 0.5}},
}


def plan_of(name, **more):
    if name in ONE_PASS:
        return plan_curriculum(DIFFICULTY, **{"batch_size": 8, **ONE_PASS[name], **more})
    given_ = {"batch_size": 8, "mode": "pool", "steps": 40, "pacing": "linear:start=0.2", **POOL[name], **more}
    return plan_curriculum(DIFFICULTY, **given_)


def sequence(plan, epoch=0):
    return [plan.batch(number, epoch).tolist() for number in range(plan.n_batches)]


@pytest.mark.parametrize("name", ONE_PASS)
def test_each_row_comes_once_an_epoch(name):
    plan = plan_of(name)
    for epoch in range(3):
        assert sorted(itertools.chain(*sequence(plan, epoch))) == list(range(N))


@pytest.mark.parametrize("name", [*ONE_PASS, *POOL])
def test_a_batch_does_not_depend_on_what_was_asked_before(name):
    plan, again = plan_of(name), plan_of(name)
    forward = [sequence(plan, epoch) for epoch in range(2)]
    asked = [(number, epoch) for number in range(again.n_batches) for epoch in range(2)]
    random.Random(0).shuffle(asked)
    for number, epoch in asked:
        assert again.batch(number, epoch).tolist() == forward[epoch][number]
    assert plan.fingerprint == again.fingerprint


@pytest.mark.parametrize("name", [*ONE_PASS, *POOL])
def test_saved_opened_and_sent_to_a_process_it_is_the_same(name, tmp_path):
    plan = plan_of(name)
    saved = plan.save(tmp_path / "plan")
    opened = copy.deepcopy(CurriculumPlan.open(tmp_path / "plan"))
    for epoch in range(2):
        assert sequence(plan, epoch) == sequence(saved, epoch) == sequence(opened, epoch)
        assert sequence(copy.deepcopy(plan), epoch) == sequence(plan, epoch)
    assert plan.fingerprint == saved.fingerprint == opened.fingerprint
    assert [plan.share(k) for k in range(plan.n_batches)] == [opened.share(k) for k in range(plan.n_batches)]
    assert plan.save(tmp_path / "plan").fingerprint == plan.fingerprint  # saving again changes nothing
    with pytest.raises(SparsortError, match="already contains another plan"):
        plan_of(name, seed=1).save(tmp_path / "plan")


def test_only_what_is_left_to_chance_depends_on_seed_and_epoch():
    for name in ("stages", "random", "paced", "shuffle", "warm_up", "lengths", "pool"):
        plan = plan_of(name)
        assert sequence(plan, 0) != sequence(plan, 1)
        assert sequence(plan, 0) != sequence(plan_of(name, seed=1), 0)
    for name in ("sorted", "folded", "interleaved", "as_given"):
        plan = plan_of(name)
        assert sequence(plan, 0) == sequence(plan, 5) == sequence(plan_of(name, seed=1), 0)


def test_sorted_is_sorted_and_its_reverse_is_exact():
    rows = list(itertools.chain(*sequence(plan_of("sorted"))))
    assert rows == np.argsort(DIFFICULTY, kind="stable").tolist()
    assert list(itertools.chain(*sequence(plan_of("reverse")))) == rows[::-1]


@pytest.mark.parametrize(
    "pair", [{"stages": 3}, {"stages": 5, "pacing": "root:start=0.3"}, {"warm_up": 0.3}, {"schedule": "folded"}]
)
def test_the_controls_share_batch_sizes_and_shares(pair):
    plans = [
        plan_curriculum(DIFFICULTY, batch_size=8, direction=way, **pair)
        for way in ("easy_to_hard", "hard_to_easy", "random")
    ]
    sizes = [[len(rows) for rows in sequence(plan)] for plan in plans]
    shares = [[plan.share(number) for number in range(plan.n_batches)] for plan in plans]
    assert sizes[0] == sizes[1] == sizes[2]
    assert shares[0] == shares[1] == shares[2]


@pytest.mark.parametrize(
    "name",
    [
        "sorted",
        "reverse",
        "stages",
        "random",
        "paced",
        "warm_up",
        "lengths",
        "groups",
        "pool",
        "pool_reverse",
        "pool_tokens",
        "tokens_stages",
    ],
)
def test_no_row_comes_before_its_share_is_available(name):
    plan = plan_of(name)
    reference = plan_of(name) if "order" in plan._arrays else plan_of("stages")
    rank = np.empty(N, dtype=int)
    rank[reference.order] = np.arange(N)
    for epoch in range(2):
        for number in range(plan.n_batches):
            assert rank[plan.batch(number, epoch)].max() < round(plan.share(number, epoch) * N)
    if plan.settings.mode == "one_pass":
        assert plan.share(plan.n_batches - 1) == 1.0


def test_pool_follows_its_pacing():
    plan = plan_of("pool")
    pacing = Pacing(kind="linear", start=0.2)
    for number in range(40):
        wanted = 0.2 + 0.8 * number / 40
        assert pacing.share(number, 40) == pytest.approx(wanted)
        assert round(plan.share(number) * N) == np.ceil(wanted * N - 1e-9)


@pytest.mark.parametrize("name", ["tokens", "tokens_stages", "tokens_shuffle", "pool_tokens"])
def test_no_batch_is_over_its_token_budget(name):
    plan = plan_of(name)
    for epoch in range(2):
        for rows in sequence(plan, epoch):
            assert LENGTHS[rows].max() * len(rows) <= 200
            assert len(rows) >= plan.smallest_batch


@pytest.mark.parametrize("name", ["next_fit", "best_fit"])
def test_bins_hold_what_they_can_and_say_the_same_as_batches(name):
    plan = plan_of(name)
    for epoch in range(2):
        for number in range(plan.n_batches):
            bins = plan.bins(number, epoch)
            assert list(itertools.chain(*(held.tolist() for held in bins))) == plan.batch(number, epoch).tolist()
            assert all(LENGTHS[held].sum() <= 64 for held in bins)
            assert plan.smallest_batch <= len(bins) <= 4


def test_next_fit_keeps_the_order_of_the_curriculum():
    assert list(itertools.chain(*sequence(plan_of("next_fit")))) == np.argsort(DIFFICULTY, kind="stable").tolist()


def test_stages_are_kept_by_grouping_and_tokens():
    """The rows of stage s are the same whatever is done inside it."""
    plain = plan_of("tokens_stages", group_by_length=False)
    grouped = plan_of("tokens_stages")
    for stage in range(3):
        rows = [
            {row for number in range(*plan.stage_edges[stage : stage + 2]) for row in plan.batch(number)}
            for plan in (plain, grouped)
        ]
        assert rows[0] == rows[1]
        assert {grouped.stage(number) for number in range(*grouped.stage_edges[stage : stage + 2])} == {stage}


def test_later_epochs_of_cut_batches_keep_the_batches_and_their_stages():
    plan = plan_of("tokens_stages")
    first, second = sequence(plan, 0), sequence(plan, 1)
    assert first != second
    for a, b in itertools.pairwise(plan.stage_edges):
        assert sorted(first[a:b]) == sorted(second[a:b])


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 400),
    size=st.integers(1, 40),
    stages=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_number_of_rows(n, size, stages, epoch, seed):
    size = min(size, n)
    difficulty = np.round(np.random.default_rng(seed).normal(size=n), 1) + np.linspace(0, 1e-3, n)
    plan = plan_curriculum(difficulty, batch_size=size, stages=min(stages, -(-n // size)), seed=seed)
    batches = sequence(plan, epoch)
    assert sorted(itertools.chain(*batches)) == list(range(n))
    assert {len(rows) for rows in batches} <= {plan.smallest_batch, plan.smallest_batch + 1}
    assert plan.smallest_batch + (n % plan.n_batches > 0) <= size


def test_a_plan_folder_is_only_read(tmp_path):
    folder = tmp_path / "plan"
    for name in ("paced", "lengths", "shuffle"):
        plan_of(name).save(folder)
        held = sorted(path.name for path in folder.iterdir())
        assert sequence(CurriculumPlan.open(folder), 2) == sequence(plan_of(name), 2)
        assert sorted(path.name for path in folder.iterdir()) == held
        shutil.rmtree(folder)


def test_a_plan_has_a_folder_of_its_own(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SparsortError, match=r"contains other files, such as manifest\.json"):
        plan_of("sorted").save(tmp_path)
    (tmp_path / "manifest.json").unlink()
    np.save(tmp_path / "order.npy", np.arange(3))  # left by a kill
    assert sequence(plan_of("sorted").save(tmp_path)) == sequence(plan_of("sorted"))


def test_an_edited_plan_is_refused(tmp_path):
    plan_of("sorted").save(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"batch_size": 8', '"batch_size": 4'))
    with pytest.raises(SparsortError, match="has changed since it was written"):
        CurriculumPlan.open(tmp_path)


def test_in_memory_it_outlives_its_folder(tmp_path):
    plan = plan_of("lengths").save(tmp_path / "plan").in_memory()
    shutil.rmtree(tmp_path / "plan")
    assert sequence(copy.deepcopy(plan), 1) == sequence(plan_of("lengths"), 1)


def test_threads_on_one_plan_agree(tmp_path):
    plan = plan_curriculum(np.random.default_rng(0).random(200_000), batch_size=1000, stages=7)
    wanted = [plan.batch(number, 1).tolist() for number in range(0, 200, 9)]
    shared = copy.deepcopy(plan)
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda number: shared.batch(number, 1).tolist(), list(range(0, 200, 9)) * 4)
        assert list(found) == wanted * 4


def test_batches_cross_the_borders_of_blocks():
    n = 100_000  # blocks hold 32768 places
    plan = plan_curriculum(np.arange(n)[::-1].astype(float), batch_size=3001)
    assert list(itertools.chain(*sequence(plan))) == list(range(n))[::-1]
    wide = plan_curriculum(np.arange(n).astype(float), batch_size=70_000, schedule="shuffle")
    assert sorted(itertools.chain(*sequence(wide, 3))) == list(range(n))


def test_a_pool_by_tokens_never_draws_less_than_it_says():
    plan = plan_curriculum(
        DIFFICULTY, mode="pool", steps=20, pacing="linear:start=0.01", token_budget=100, lengths=np.full(N, 10)
    )
    assert {len(rows) for rows in sequence(plan)} == {10}
    assert plan.smallest_batch == 10


@pytest.mark.parametrize("more", [{}, {"stages": 4}, {"schedule": "folded"}])
def test_a_warm_up_keeps_its_curriculum_in_later_epochs_of_cut_batches(more):
    plan = plan_of("tokens", warm_up=0.5, **more)
    plain = plan_of("tokens", **more)
    warm = round(0.5 * N)
    for epoch in range(3):
        early = list(itertools.chain(*sequence(plan, epoch)))[:warm]
        if not more.get("stages"):
            assert early == list(itertools.chain(*sequence(plan, 0)))[:warm]
        assert set(early) == set(list(itertools.chain(*sequence(plan, 0)))[:warm])
        assert sorted(itertools.chain(*sequence(plan, epoch))) == list(range(N))
    assert sequence(plan, 1) != sequence(plan, 2)
    assert plain.n_batches <= plan.n_batches  # a batch more where the warm-up ends


def test_a_share_of_best_fit_reaches_its_window():
    n = 3000
    lengths = np.random.default_rng(0).integers(1, 100, n)
    plan = plan_curriculum(np.arange(n) * 1.0, batch_size=8, packing="best_fit", pack_length=128, lengths=lengths)
    assert all(plan.batch(number).max() < round(plan.share(number) * n) for number in range(plan.n_batches))
    assert plan.share(0) == 1024 / n


def test_an_array_that_changes_later_does_not_change_the_plan():
    difficulty = DIFFICULTY.astype(np.float32)
    plan = plan_curriculum(difficulty, batch_size=8)
    difficulty[:] = 0
    assert plan.difficulty.tolist() == DIFFICULTY.astype(np.float32).tolist()


def test_a_revision_takes_over_from_its_batch_on():
    plan = plan_of("pool")
    revised = plan.revised(-DIFFICULTY, start=10)
    assert revised.fingerprint != plan.fingerprint
    easiest = set(np.argsort(-DIFFICULTY)[: round(revised.share(10) * N)].tolist())
    assert set(revised.batch(10).tolist()) <= easiest
    assert revised.share(39) == plan.share(39)
    with pytest.raises(SparsortError, match="does not include batch 9 of epoch 0"):
        revised.batch(9)
    same = plan.revised(DIFFICULTY, start=10)
    assert [same.batch(k).tolist() for k in range(10, 40)] == sequence(plan)[10:]
    twice = revised.revised(DIFFICULTY, start=20)
    assert (twice.revision, twice.notes["revises"]) == ({"number": 2, "epoch": 0, "start": 20}, plan.fingerprint)


def test_one_pass_is_revised_between_epochs(tmp_path):
    plan = plan_of("stages")
    revised = plan.revised(-DIFFICULTY, epoch=1).save(tmp_path / "revised")
    reverse = plan_curriculum(-DIFFICULTY, batch_size=8, stages=3)
    assert [revised.batch(k, 1).tolist() for k in range(revised.n_batches)] == sequence(reverse, 1)
    with pytest.raises(SparsortError, match="between epochs, not at batch 4"):
        plan.revised(-DIFFICULTY, start=4)
    for name in ("tokens", "best_fit"):
        with pytest.raises(SparsortError, match="with batch_size and without packing"):
            plan_of(name).revised(DIFFICULTY, epoch=1)
    with pytest.raises(SparsortError, match="one difficulty per row"):
        plan.revised(DIFFICULTY[:5], epoch=1)


def test_a_batch_that_is_not_there_is_refused():
    plan = plan_of("sorted")
    for number, epoch in ((13, 0), (-1, 0), (0, -1)):
        with pytest.raises(SparsortError, match=r"an epoch has batches 0 to 12"):
            plan.batch(number, epoch)


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    with pytest.raises(SparsortError, match="contains no curriculum plan"):
        CurriculumPlan.open(tmp_path)
    plan_of("sorted").save(tmp_path / "plan")
    description = tmp_path / "plan" / "plan.json"
    text = description.read_text()
    description.write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(SparsortError, match=r"format version 99; this sparsort reads 1 and 2"):
        CurriculumPlan.open(tmp_path / "plan")
    description.write_text(text[:40])
    with pytest.raises(SparsortError, match=r"cannot be read"):
        CurriculumPlan.open(tmp_path / "plan")
    description.write_text(text)
    np.save(tmp_path / "plan" / "order.npy", np.arange(5, dtype=np.uint32))
    with pytest.raises(SparsortError, match=r"bytes, and .* were written"):
        CurriculumPlan.open(tmp_path / "plan")
    (tmp_path / "plan" / "order.npy").unlink()
    with pytest.raises(SparsortError, match="it is missing"):
        CurriculumPlan.open(tmp_path / "plan")


def test_no_global_random_state_is_touched():
    import torch

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for name in [*ONE_PASS, *POOL]:
        sequence(plan_of(name), 1)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
