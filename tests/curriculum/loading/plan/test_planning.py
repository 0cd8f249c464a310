import hashlib
import json

import numpy as np
import pytest

import sparsort
from sparsort import SparsortError
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.scoring.data.digests import digest_of

ROWS = [
    {"id": f"r{number:02d}", "text": "word " * (1 + number % 7), "lang": "de" if number % 5 == 0 else "en"}
    for number in range(40)
]


@pytest.fixture(scope="module")
def scores():
    return sparsort.LengthScorer().score(ROWS, prompt="{text}")


def rows_of(plan):
    return [row for number in range(plan.n_batches) for row in plan.batch(number).tolist()]


def test_scores_plan_their_own_rows_with_ties_by_id(scores):
    plan = plan_curriculum(scores, batch_size=8)
    assert rows_of(plan) == sorted(range(40), key=lambda row: (len(ROWS[row]["text"]), ROWS[row]["id"]))
    assert plan.notes["scores"]["difficulty"]["scorer"] == "length"


def test_rows_in_another_order_give_the_same_ids(scores):
    turned = [ROWS[row] for row in np.random.default_rng(0).permutation(40)]
    for more in ({}, {"stages": 3}, {"schedule": "shuffle"}, {"direction": "random"}):
        straight = plan_curriculum(scores, data=ROWS, batch_size=8, **more)
        other = plan_curriculum(scores, data=turned, batch_size=8, **more)
        assert [ROWS[row]["id"] for row in rows_of(straight)] == [turned[row]["id"] for row in rows_of(other)]


def test_scores_that_miss_rows_are_refused_and_more_of_them_are_counted(scores):
    with pytest.raises(SparsortError, match=r"1 of 41 rows have no score: row 40 \(id 'new'\)"):
        plan_curriculum(scores, data=[*ROWS, {"id": "new", "text": "word"}], batch_size=8)
    plan = plan_curriculum(scores, data=ROWS[5:], batch_size=8)
    assert (plan.n_rows, plan.notes["unused_scores"]) == (35, 5)
    with pytest.raises(SparsortError, match="is not the row that was scored under this id"):
        plan_curriculum(scores, data=[{**ROWS[0], "text": "changed"}, *ROWS[1:]], batch_size=8)


def test_a_plan_notes_the_content_of_its_rows(scores):
    noted = plan_curriculum(scores, batch_size=8).notes["content"]
    assert noted["fields"] == ["text"]
    assert noted == plan_curriculum(scores, data=ROWS, batch_size=8).notes["content"]
    lines = "".join(f"{digest_of({'text': row['text']})}\n" for row in ROWS)
    assert noted["digest"] == hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()
    other = plan_curriculum(scores, data=ROWS[::-1], batch_size=8).notes["content"]
    assert other["fields"] == noted["fields"]
    assert other["digest"] != noted["digest"]


def test_a_dataset_is_matched_as_rows_are(scores, tmp_path):
    import datasets

    plan = plan_curriculum(scores, data=datasets.Dataset.from_list(ROWS), batch_size=8, groups="lang")
    assert rows_of(plan) == rows_of(plan_curriculum(scores, data=ROWS, batch_size=8, groups="lang"))
    assert plan.notes["groups"] == ["de", "en"]


def test_a_path_and_several_scores(scores, tmp_path):
    scores.save(tmp_path / "scores")
    assert rows_of(plan_curriculum(tmp_path / "scores", batch_size=8)) == rows_of(plan_curriculum(scores, batch_size=8))
    other = np.arange(40.0)[::-1]
    both = plan_curriculum({"length": scores, "mine": other}, batch_size=8, weights={"length": 1, "mine": 3})
    ranks = {name: np.argsort(np.argsort(column)) for name, column in (("length", scores.difficulty), ("mine", other))}
    first, last = rows_of(both)[:10], rows_of(both)[-10:]
    assert ranks["mine"][first].mean() < ranks["mine"][last].mean()
    with pytest.raises(SparsortError, match="numbers of rows differ: length 40, mine 39"):
        plan_curriculum({"length": scores, "mine": other[:39]}, batch_size=8)


def test_lengths_come_with_the_scores(scores):
    counted = sparsort.RandomScorer().score(ROWS, prompt="{text}")
    with pytest.raises(SparsortError, match="need the length of each row"):
        plan_curriculum(counted, data=ROWS, token_budget=64)
    known = plan_curriculum(scores, data=ROWS[::-1], token_budget=64)
    assert known.lengths.tolist() == scores.column("n_tokens")[::-1].tolist()
    plan = plan_curriculum(counted, data=ROWS, token_budget=64, lengths=[len(row["text"]) for row in ROWS])
    assert all(
        max(len(ROWS[row]["text"]) for row in plan.batch(k)) * len(plan.batch(k)) <= 64 for k in range(plan.n_batches)
    )


def test_max_length_is_noted():
    plan = plan_curriculum(np.arange(6.0), lengths=[5, 9, 30, 4, 50, 8], token_budget=40, max_length=20)
    assert (plan.notes["cut"], plan.lengths.tolist()) == (2, [5, 9, 20, 4, 20, 8])


@pytest.mark.parametrize(("unscored", "place"), [("last", -1), ("first", 0)])
def test_rows_without_a_score_are_where_they_are_put(unscored, place):
    difficulty = np.array([3.0, np.nan, -np.inf, np.inf, 1.0])
    plan = plan_curriculum(difficulty, batch_size=2, unscored=unscored)
    rows = rows_of(plan)
    assert rows[place] == 1
    assert [row for row in rows if row != 1] == [2, 4, 0, 3]
    assert plan.notes["unscored"] == 1
    with pytest.raises(SparsortError, match=r"1 of 5 rows have no score \(NaN\), such as row 1"):
        plan_curriculum(difficulty, batch_size=2, unscored="error")


_PACED = {"batch_size": 1, "mode": "pool", "steps": 2, "pacing": "linear"}


@pytest.mark.parametrize(
    ("difficulty", "given_", "message"),
    [
        ([], {"batch_size": 1}, "there are no rows"),
        ([np.nan, np.nan], {"batch_size": 1}, "every difficulty is NaN"),
        ([2.0, 2.0, 2.0], {"batch_size": 1}, "same difficulty, 2.0, so the rows cannot be ordered"),
        ([1.0, 2.0], {"batch_size": 3}, "batch_size=3 is above the 2 rows"),
        ([1.0, 2.0], {}, "exactly one, such as batch_size=32"),
        ([1.0, 2.0], {"batch_size": 1, "token_budget": 5}, "exactly one"),
        ([1.0, 2.0], {"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ([1.0, 2.0], {"batch_size": 1, "stages": 3}, "3 stages do not fit in an epoch of 2 batches"),
        ([1.0, 2.0], {"batch_size": 1, "schedule": "folded", "folds": 5}, "5 folds need at least as many rows"),
        ([1.0, 2.0], {"batch_size": 1, "schedule": "sortd"}, r"unknown schedule 'sortd'. Did you mean 'sorted'"),
        ([1.0, 2.0], {"batch_size": 1, "shedule": "sorted"}, r"unknown setting 'shedule'. Did you mean 'schedule'"),
        ([1.0, 2.0], {"batch_size": 1, "mode": "pool"}, "pool mode needs a pacing, .* and steps"),
        ([1.0, 2.0], {"batch_size": 1, "pacing": "linear"}, "one pass with a pacing needs stages"),
        ([1.0, 2.0], {"batch_size": 1, "pacing": "linear:start=1.5", "stages": 2}, "start"),
        (
            [1.0, 2.0],
            {"batch_size": 1, "schedule": "shuffle", "stages": 2},
            "stages=2 has no effect: schedule='shuffle' has its own order",
        ),
        ([1.0, 2.0], {"batch_size": 1, "schedule": "shuffle", "direction": "random"}, "no easy and hard end"),
        ([1.0, 2.0], {"batch_size": 1, "warm_up": 1.0}, "between 0 and 1, not 1.0"),
        ([1.0, 2.0], {"batch_size": 1, "steps": 3}, "steps=3 has no effect: one pass shows each example once"),
        ([1.0, 2.0], {"batch_size": 1, "group_by_length": True}, "there are no stages"),
        ([1.0, 2.0], {"batch_size": 1, "folds": 2}, "folds=2 has no effect: folded and interleaved read it"),
        (
            [1.0, 2.0],
            {"batch_size": 1, "direction": "random", "unscored": "first"},
            "unscored='first' has no effect: .*direction='random'",
        ),
        ([1.0, 2.0], {"batch_size": 1, "stages": 1, "pacing": "linear:power=3"}, "power=3.0 has no effect"),
        ([1.0, 2.0], {**_PACED, "schedule": "folded"}, "schedule='folded' has no effect: pool mode"),
        ([1.0, 2.0], {**_PACED, "group_by_length": True}, "group_by_length=True has no effect: pool mode"),
        ([1.0, 2.0], {"batch_size": 1, "packing": "next_fit"}, "packing needs both"),
        ([1.0, 2.0], {"token_budget": 8, "packing": "next_fit", "pack_length": 4}, "give batch_size, not token_budget"),
        ([1.0, 2.0], {"token_budget": 8, "max_length": 9}, "max_length=9 is above the 8 tokens"),
        ([1.0, 2.0], {"token_budget": 8, "lengths": [4, 9]}, r"row 1 \(9 tokens\)\. Cut them with max_length=8"),
        (
            [1.0, 2.0],
            {"token_budget": 8, "lengths": [4]},
            r"one number of tokens per row, \(2,\), not an array of shape \(1,\)",
        ),
        ([1.0, 2.0], {"batch_size": 1, "groups": "lang"}, "names a field of the data: pass data too"),
        ([1.0, 2.0], {"batch_size": 1, "groups": ["a"]}, "1 groups for 2 rows"),
        ([1.0, 2.0], {"batch_size": 1, "ids": ["a"]}, "1 ids for 2 rows"),
        ([1.0, 2.0], {"batch_size": 1, "ids": ["a", "a"]}, "'a': an id identifies one row"),
        (
            [1.0, 2.0],
            {"batch_size": 1, "combination": "rank"},
            r"unknown combination 'rank'. Did you mean 'rank_average'",
        ),
        ([1.0, 2.0], {"batch_size": 1, "schedule": "as_given", "later_epochs": "shuffle"}, "no easy and hard end"),
        ([1.0, 2.0], {"batch_size": 1, "pacing": 0.2, "stages": 1}, "pacing must be a Pacing or its text"),
        ([1.0, 2.0], {"batch_size": 1, "warm_up": "0.3"}, "between 0 and 1, not '0.3'"),
        ([1.0, 2.0], {"batch_size": 1, "weights": {"difficulty": 2}}, "only one score was given"),
        ([1.0, 2.0], {"batch_size": 1, "combination": "lexicographic"}, "combination='lexicographic' has no effect"),
        ([1.0, 2.0], {"batch_size": 1, "combination": "lexicografic"}, "Did you mean 'lexicographic'"),
        ([1.0, 2.0], {"batch_size": 1, "id_column": "uid"}, "id_column='uid' has no effect: numbers have no ids"),
        ([[1.0], [2.0]], {"batch_size": 1}, r"one number per row, \(N,\), not float64 of shape \(2, 1\)"),
    ],
)
def test_arguments_that_make_no_plan_are_refused(difficulty, given_, message):
    with pytest.raises(SparsortError, match=message):
        plan_curriculum(np.array(difficulty), **given_)


POOL = {"mode": "pool", "steps": 5, "pacing": "linear", "batch_size": 4}


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"a": 0.5, "c": 0.5}, "unknown group in quotas 'c'"),
        ([0.5, 0.5], "shares above 0 that sum to 1"),
        ({"a": "0.5", "b": 0.5}, "shares above 0 that sum to 1"),
        ({"a": 1.0}, r"have no share for the group\(s\) b"),
        ({"a": 0.5, "b": 0.4}, "sum to 1"),
        ({"a": 0.2, "b": 0.8}, "the quota 0.8 of group 'b' is up to 4 examples of a batch of 4, and the group has 2"),
    ],
)
def test_quotas_that_cannot_be_met_are_refused(quotas, message):
    with pytest.raises(SparsortError, match=message):
        plan_curriculum(np.arange(10.0), groups=["a"] * 8 + ["b"] * 2, quotas=quotas, **POOL)


def test_quotas_need_groups():
    with pytest.raises(SparsortError, match="pass groups"):
        plan_curriculum(np.arange(10.0), quotas={"a": 1.0}, **POOL)


def test_one_row_is_a_plan():
    plan = plan_curriculum([0.5], batch_size=1)
    assert rows_of(plan) == [0]


def test_settings_survive_json():
    asked = CurriculumSettings.from_json({**POOL, "quotas": {"a": 0.5, "b": 0.5}, "pacing": "root:start=0.2,power=3"})
    assert CurriculumSettings.from_json(json.loads(json.dumps(asked.to_json()))) == asked


def test_numbers_of_numpy_are_numbers():
    plan = plan_curriculum(np.arange(10.0), batch_size=np.int64(4), warm_up=np.float32(0.5), seed=np.int32(1))
    assert json.loads(json.dumps(plan.settings.to_json()))["batch_size"] == 4


def test_rows_without_the_id_are_found_by_content(scores):
    bare = [{"text": row["text"] + row["id"]} for row in ROWS]
    scored = sparsort.LengthScorer().score([{**row, "id": str(n)} for n, row in enumerate(bare)], prompt="{text}")
    assert plan_curriculum(scored, data=bare, batch_size=8).n_rows == 40


def test_a_tensor_that_numpy_cannot_read_is_refused_with_advice():
    import torch

    with pytest.raises(SparsortError, match=r"cannot be read as numbers .*tensor\.detach\(\)\.float\(\)\.numpy\(\)"):
        plan_curriculum(torch.ones(4, dtype=torch.bfloat16), batch_size=2)


def test_a_path_that_holds_no_scores_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(SparsortError, match=r"rows\.jsonl"):
        plan_curriculum(tmp_path / "rows.jsonl", batch_size=1)
