"""The recipe, the plan and its cost: checked on construction, written without loss, counted against brute force."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toml_text import dump

from sparsort.curriculum.ablation.recipe.ablation import (
    ORDERERS,
    Ablation,
    DemoSet,
    applies,
    base_order,
    demo_sets,
    depends_on_query,
    probes_of,
    skipped_criteria,
)
from sparsort.curriculum.ablation.recipe.options import DEFAULT_ORDERERS
from sparsort.curriculum.ablation.recipe.selectors import SELECTORS
from sparsort.curriculum.ablation.recipe.splits import split_rows
from sparsort.curriculum.ablation.recipe.tasks import Task, load_task
from sparsort.curriculum.ablation.run.cost import Lengths, estimate, measure, shared_nodes
from sparsort.curriculum.demos.criteria import CRITERIA
from sparsort.curriculum.demos.order import order_indices
from sparsort.errors import SparsortError

TASK = Task(name="moods", prompt="Review: {text}\nMood:", answer=" {label}", labels={"0": "bad", "1": "good"})
DENSITIES = ["density", "density_gain", "density_rank"]
SUMS = Task(name="sums", prompt="{q} =", answer=" {answer}", label="answer", judge="number", max_new_tokens=5)


def ablation(**changes: Any) -> Ablation:
    return Ablation(**{"tasks": (TASK,), **changes})


# The recipe


def test_a_recipe_survives_toml_and_json() -> None:
    recipe = Ablation(
        tasks=("trec", TASK, load_task("gsm8k")),
        data=Path("some") / "folder",
        shots=(3,),
        orderers=("u_shape", "reverse:reverse:given"),
        choosers=(),
        calibrated=(True,),
        label_score="mean",
        max_demo_chars=700,
    )
    assert Ablation.from_table(tomllib.loads(dump(recipe.to_table()))) == recipe
    assert Ablation.from_table(json.loads(json.dumps(recipe.to_table()))) == recipe
    assert Ablation.from_table(tomllib.loads(dump(ablation().to_table()))) == ablation()


def test_a_recipe_is_read_from_a_file_and_its_paths_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.toml").write_text('prompt = "{q}:"\nanswer = " {a}"\nlabel = "a"\njudge = "exact"\n')
    path = tmp_path / "study" / "recipe.toml"
    path.write_text('tasks = ["mr", "mine.toml", {name = "x", prompt = "{q}", answer = "{a}", label = "a", '
                    'judge = "exact"}]\ndata = "rows"\nshots = [2, 4]\n')  # fmt: skip
    recipe = Ablation.from_toml(path)
    assert recipe.data == tmp_path / "study" / "rows"
    assert recipe.shots == (2, 4)
    assert [task.name for task in recipe.load_tasks()] == ["mr", "mine", "x"]
    path.write_text(f'tasks = ["mr"]\ndata = "{tmp_path}"\n')
    assert Ablation.from_toml(str(path)).data == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('orderes = ["u_shape"]', r"recipe\.toml: there is no 'orderes' in an ablation\. Did you mean 'orderers'\?"),
        ("sets = 3", r"recipe\.toml: the ablation has no 'tasks', which it needs"),
        ('tasks = "mr"', r"recipe\.toml: tasks is 'mr', but a list \(of text or a task's table\) is expected"),
        ('tasks = ["mr"]\nsets = 2.5', "sets is 2.5, but a whole number is expected"),
        ('tasks = ["mr"]\nsets = "2"', "sets is '2', but a whole number is expected"),
        ('tasks = ["mr"]\nshots = [4, "8"]', r"shots is \[4, '8'\], but a list \(of a whole number\)"),
        ('tasks = ["mr"]\nsampled_probes = 1', "sampled_probes is 1, but true or false is expected"),
        ('tasks = ["mr"]\nlabel_score = "sumo"', r"unknown label_score 'sumo'\. Did you mean 'sum'\?"),
        ('tasks = [{name = "x", promt = "{q}"}]', r"there is no 'promt' in a task\. Did you mean 'prompt'\?"),
        ("tasks = [", "not valid TOML"),
    ],
)
def test_a_broken_recipe_is_refused_with_the_fault_and_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(SparsortError, match=message):
        Ablation.from_toml(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "has no tasks"),
        ({"shots": ()}, "has no shots"),
        ({"selectors": ()}, "has no selectors"),
        ({"calibrated": ()}, "has no calibrated"),
        ({"tasks": ("mr", "mr")}, "names 'mr' twice among its tasks"),
        ({"shots": (4, 4)}, "names 4 twice among its shots"),
        ({"calibrated": (True, True)}, "twice among its calibrated"),
        ({"shots": (1,)}, "an order needs at least 2 demonstrations"),
        ({"sets": 0}, "sets = 0; at least 1"),
        ({"first_seed": -1}, "first_seed = -1"),
        ({"random_orders": 1}, "random_orders = 1; at least 2"),
        ({"test_rows": 0}, "test_rows = 0"),
        ({"dev_rows": -1}, "dev_rows = -1"),
        ({"max_demo_chars": 0}, "max_demo_chars = 0"),
        ({"selectors": ("randm",)}, "unknown selector 'randm'.* Did you mean 'random'"),
        ({"selectors": ("first",)}, "one set only"),
        ({"orderers": ("u_shap",)}, "unknown orderer 'u_shap'.* Did you mean 'u_shape'"),
        ({"orderers": ("random",)}, "random orders always run"),
        ({"choosers": ("globalE!",)}, "unknown criterion 'globalE!'.* Did you mean 'globale'"),
        ({"metric": "ginny"}, "unknown metric 'ginny'.* Did you mean 'gini'"),
        ({"label_score": "avg"}, "unknown label_score 'avg'"),
        ({"dev_rows": 0}, "pdo, pdo_prior, best_on_dev, density choose by dev rows"),
        ({"tasks": "mr"}, "tasks is 'mr'"),
    ],
)
def test_a_wrong_recipe_is_refused_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        ablation(**changes)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "moods.toml"
    path.write_text('prompt = "{q}:"\nanswer = " {a}"\nlabel = "a"\njudge = "exact"\n')
    with pytest.raises(SparsortError, match="'moods' twice"):
        list(demo_sets(ablation(tasks=(TASK, str(path)))))


@pytest.mark.parametrize("changes", [{"site": "pre_nrm"}, {"pooling": "lst"}, {"outliers": "drop"}, {"dtype": "fp7"}])
def test_names_of_the_scoring_modules_are_checked_before_a_model_is_loaded(changes: dict[str, str]) -> None:
    ablation().check()
    with pytest.raises(SparsortError, match=next(iter(changes.values()))):
        ablation(**changes).check()


def test_the_reverse_of_every_default_orderer_is_a_default_too() -> None:
    scores = np.random.default_rng(0).permutation(6) + 1.0
    keys: dict[str, Any] = {"difficulty": scores, "similarity": scores, "lengths": scores}
    ruled = [name for name in DEFAULT_ORDERERS if name != "random_scores"]
    orders = {tuple(order_indices(name, 6, **keys).tolist()) for name in ruled}
    assert {order[::-1] for order in orders} == orders
    assert {base_order(name) for name in DEFAULT_ORDERERS} <= set(ORDERERS)


def test_needs_of_orderers_and_criteria() -> None:
    assert depends_on_query("reverse:similarity_ascending")
    assert not depends_on_query("u_shape")
    assert depends_on_query("u_shape", "knn")
    assert [name for name in CRITERIA if applies(name, SUMS)] == ["best_on_dev", *DENSITIES, "cone"]
    assert all(applies(name, TASK) for name in CRITERIA)
    assert [name for name in CRITERIA if applies(name, TASK, "bm25")] == ["mdl"]


def test_queries_that_a_criterion_reads() -> None:
    on_dev = ["pdo", "pdo_prior", "globale_unlabelled", "best_on_dev", *DENSITIES]
    assert {probes_of(name, sampled=True) for name in on_dev} == {"dev"}
    assert {probes_of(name, sampled=True) for name in ("globale", "locale", "density+locale")} == {"sampled"}
    assert {probes_of(name, sampled=False) for name in ("globale", "locale", "density+locale")} == {"dev"}
    assert {probes_of(name, sampled=True) for name in ("pdo_null", "mdl", "cone")} == {"none"}


# The plan


def test_the_plan_goes_breadth_first() -> None:
    recipe = ablation(tasks=("mr", TASK), shots=(2, 3), sets=2, first_seed=5, selectors=("random", "balanced"))
    plan = list(demo_sets(recipe))
    assert plan[:3] == [
        DemoSet(task="mr", selector="random", k=2, seed=5),
        DemoSet(task="mr", selector="balanced", k=2, seed=5),
        DemoSet(task="moods", selector="random", k=2, seed=5),
    ]
    assert [(unit.seed, unit.k, unit.task) for unit in plan[::2]] == list(
        itertools.product((5, 6), (2, 3), ("mr", "moods"))
    )
    # Stopped anywhere, no cell is more than one set ahead of another.
    for stop in range(len(plan)):
        counts = [
            sum((unit.task, unit.selector, unit.k) == cell for unit in plan[:stop])
            for cell in itertools.product(("mr", "moods"), ("random", "balanced"), (2, 3))
        ]
        assert max(counts) - min(counts) <= 1


def test_all_orders_are_run_where_they_are_few() -> None:
    found = ablation(random_orders=30).orders(4, 0)
    assert sorted(map(tuple, found.tolist())) == list(itertools.permutations(range(4)))
    assert len(ablation(random_orders=24).orders(3, 0)) == 6
    assert ablation(random_orders=150).orders(5, 0).shape == (120, 5)


@pytest.mark.parametrize("k", [4, 6, 8, 9, 12])
def test_random_orders_are_distinct_seeded_and_grow(k: int) -> None:
    few, many = (ablation(random_orders=count).orders(k, 3) for count in (16, 20))
    assert len({tuple(order) for order in many.tolist()}) == 20
    assert (np.sort(many, axis=1) == np.arange(k)).all()
    assert (many[:16] == few).all()
    assert (ablation(random_orders=16).orders(k, 4) != few).any()
    with pytest.raises(ValueError, match="read-only"):
        few[0, 0] = 1


def test_every_order_is_as_likely_as_another() -> None:
    # 3 of the 6 orders of 3: under uniform draws each order is in half of the sets.
    found = [tuple(order) for seed in range(600) for order in ablation(random_orders=3).orders(3, seed).tolist()]
    counts = np.array([found.count(order) for order in itertools.permutations(range(3))])
    assert counts.sum() == 1800
    # Six standard deviations of a binomial with 600 draws of one half.
    assert (np.abs(counts - 300) < 6 * math.sqrt(150)).all()


# The cost


@given(st.integers(1, 5).flatmap(lambda k: st.lists(st.permutations(range(k)), min_size=1, max_size=12)))
def test_shared_nodes_are_the_different_beginnings(orders: list[list[int]]) -> None:
    beginnings = {tuple(order[:depth]) for order in orders for depth in range(1, len(order) + 1)}
    assert shared_nodes(np.array(orders, dtype=np.int64)) == len(beginnings)


def test_no_orders_read_nothing() -> None:
    assert shared_nodes(np.empty((0, 4), dtype=np.int64)) == 0


LENGTHS = Lengths(
    task=TASK,
    n_test=10,
    n_dev=4,
    n_pool=100,
    head=3,
    demo=7.0,
    query=5.0,
    dev=6.0,
    longest_demo=9,
    longest_query=8,
    labels=(1, 2),
    content_free=(4, 3, 4),
    generated=0,
)
PLAIN: dict[str, Any] = {"orderers": (), "choosers": (), "calibrated": (False,), "sets": 2, "shots": (3,)}


# 10 test rows of 5 tokens, 4 dev rows of 6 and 3 content-free inputs of 11 together, each with 3 tokens of labels, without
# demonstrations.
BARE = 10 * 5 + 4 * 6 + 11 + 17 * 3


def test_the_cost_of_random_orders_is_counted_by_hand() -> None:
    cost = estimate(ablation(**PLAIN), [LENGTHS])
    (row,) = cost.rows
    # All 6 orders of 3: 3 + 6 + 6 different beginnings a set.
    assert (row.sets, row.prefixes, row.pairs) == (2, 12, 2 * 6 * 10)
    assert row.prefix_tokens == 2 * (3 + 15 * 7)
    assert row.query_tokens == 120 * 5
    assert row.label_tokens == 120 * 3
    assert (row.generated_tokens, row.score_tokens) == (0, BARE)
    # Each of the two labels is scored after a whole prompt of its own.
    assert row.plain_tokens == 120 * (2 * (3 + 21 + 5) + 3)
    assert row.longest_prompt == 3 + 3 * 9 + 8 + 2
    assert cost.tokens == row.tokens == row.prefix_tokens + 600 + 360 + BARE
    assert (cost.sets, cost.pairs, cost.plain_tokens) == (2, 120, row.plain_tokens)


@pytest.mark.parametrize(
    ("changes", "pairs", "query_tokens"),
    [
        # Three content-free inputs after each of 12 prefixes.
        ({"calibrated": (False, True)}, 36, 12 * 11),
        ({"choosers": ("best_on_dev",)}, 12 * 4, 12 * 4 * 6),
        ({"choosers": ("pdo", "density", "best_on_dev")}, 12 * 4, 12 * 4 * 6),
        # A probe sampled under each of 6 orders, read under each.
        ({"choosers": ("globale", "locale")}, 72, 72 * 5),
        ({"choosers": ("globale",), "sampled_probes": False}, 12 * 4, 12 * 4 * 6),
        ({"choosers": ("mdl",)}, 0, 0),
        # The loss on each of 10 queries after 12 prefixes, without labels.
        ({"choosers": ("mdl", "cone")}, 120, 120 * 5),
        ({"choosers": ("pdo_null",)}, 36, 12 * 11),
        ({"choosers": ("density+pdo",)}, 12 * 4, 12 * 4 * 6),
        # All orders of 3 are read already.
        ({"orderers": ("sparse_to_dense", "similarity_ascending")}, 0, 0),
    ],
)
def test_further_queries_add_to_the_cost(changes: dict[str, Any], pairs: int, query_tokens: int) -> None:
    (row,) = estimate(ablation(**{**PLAIN, **changes}), [LENGTHS]).rows
    assert (row.pairs, row.query_tokens) == (120 + pairs, 600 + query_tokens)


def test_tokens_for_cone_and_for_sampled_probes_are_counted() -> None:
    plain, cone, sampled = (
        estimate(ablation(**{**PLAIN, "choosers": choosers}), [LENGTHS]).rows[0]
        for choosers in ((), ("cone",), ("globale",))
    )
    assert cone.label_tokens == plain.label_tokens
    # ConE reads the 15 beginnings of the random orders again; a probe is written after each of 6 whole prompts.
    assert cone.prefix_tokens - plain.prefix_tokens == 2 * (3 + 15 * 7)
    assert sampled.prefix_tokens - plain.prefix_tokens == 2 * 6 * (3 + 3 * 7)
    assert cone.plain_tokens - plain.plain_tokens == 120 * (3 + 21 + 5)


def test_scores_and_embeddings_cost_a_reading_each() -> None:
    def score_tokens(*orderers: str, selector: str = "random") -> int:
        recipe = ablation(**{**PLAIN, "orderers": orderers, "selectors": (selector,)})
        return estimate(recipe, [LENGTHS]).rows[0].score_tokens

    assert score_tokens("u_shape", "sparse_to_dense") == 2 * 3 * 7 + BARE
    assert score_tokens("u_shape", "perplexity_ascending") == 2 * 2 * 3 * 7 + BARE
    assert score_tokens("similarity_ascending") == 2 * 3 * 7 + 10 * 5 + BARE
    assert score_tokens("length_ascending", "random_scores") == BARE
    assert score_tokens(selector="knn") == 100 * 7 + 10 * 5 + BARE
    assert score_tokens(selector="bm25") == BARE
    # The pool and the queries are embedded; each of 50 rows, half of the pool, is the only demonstration
    # before each of 30 × 10 queries; there are 10 sets per query.
    embedded = 100 * 7 + 10 * 5 + BARE
    assert score_tokens(selector="topk_cone") == embedded + 2 * (50 * (3 + 7) + 10 * 30 * 5)
    assert score_tokens(selector="topk_mdl") == embedded + 2 * 10 * 10 * (3 + 3 * 7 + 5 + 3)
    none, cone, mdl = (
        estimate(ablation(**{**PLAIN, "selectors": (name,)}), [LENGTHS]).rows[0]
        for name in ("knn", "topk_cone", "topk_mdl")
    )
    assert (cone.pairs - none.pairs, mdl.pairs - none.pairs) == (2 * 10 * 30, 2 * 10 * 10)
    assert cone.plain_tokens - none.plain_tokens == 2 * 10 * 30 * (3 + 7 + 5)
    assert mdl.plain_tokens - none.plain_tokens == 2 * 10 * 10 * (2 * (3 + 3 * 7 + 5) + 3)
    bare = estimate(ablation(**{**PLAIN, "choosers": ("density_gain",), "shots": (3, 4)}), [LENGTHS])
    assert [row.score_tokens for row in bare.rows] == [BARE, 0]


def test_generation_pays_for_its_answers_and_not_for_labels() -> None:
    lengths = dataclasses.replace(LENGTHS, task=SUMS, labels=(), generated=5)
    recipe = ablation(
        **{**PLAIN, "tasks": (SUMS,), "calibrated": (False, True), "choosers": ("globale", "best_on_dev")}
    )
    (row,) = estimate(recipe, [lengths]).rows
    assert row.pairs == 120 + 48
    assert (row.label_tokens, row.generated_tokens) == (0, 168 * 5)
    assert row.longest_prompt == 3 + 27 + 8 + 5


def test_a_set_for_each_query_shares_nothing_between_queries() -> None:
    recipe = ablation(**{**PLAIN, "selectors": ("bm25",), "choosers": ("best_on_dev",)})
    (row,) = estimate(recipe, [LENGTHS]).rows
    assert (row.prefixes, row.pairs) == (120, 120)
    assert row.prefix_tokens == 2 * 10 * (3 + 15 * 7)


def test_more_work_costs_more() -> None:
    base = estimate(ablation(sets=2), [LENGTHS])
    for more in ({"sets": 3}, {"shots": (4, 8, 12)}, {"random_orders": 20}):
        assert estimate(ablation(**{"sets": 2, **more}), [LENGTHS]).tokens > base.tokens
    assert base.tokens < base.plain_tokens
    assert [row.k for row in base.rows] == [4, 8]


def test_a_cost_is_json() -> None:
    found = json.loads(json.dumps(estimate(ablation(sets=1), [LENGTHS]).to_dict()))
    assert found["tokens"] == sum(row["tokens"] for row in found["rows"])
    assert found["rows"][0]["task"] == "moods"


def test_a_task_without_lengths_is_named() -> None:
    with pytest.raises(SparsortError, match=r"'mr' has no lengths"):
        estimate(Ablation(tasks=("mr",)), [LENGTHS])


def test_lengths_are_counted_on_the_texts() -> None:
    train = [{"text": f"word{at} " * (1 + at % 2), "label": at % 2} for at in range(40)]
    splits = split_rows(TASK, train, [{"text": "alpha beta", "label": 1}], n_test=5, n_dev=4)
    lengths = measure(TASK, splits, lambda text: len(text.split()))
    assert (lengths.n_test, lengths.n_dev, lengths.n_pool) == (1, 4, 36)
    assert lengths.query == 4
    assert (lengths.head, lengths.generated) == (0, 0)
    assert lengths.demo == np.mean([len(TASK.demo_text(row).split()) for row in splits.pool])
    assert (lengths.longest_demo, lengths.longest_query) == (5, 4)
    assert (lengths.labels, lengths.content_free) == ((1, 1), (3, 2, 3))
    measured = measure(dataclasses.replace(TASK, instruction="Rate this."), splits, len)
    assert measured.head == len("Rate this.\n\n")
    assert measure(TASK, dataclasses.replace(splits, dev=[]), len).dev == 0


def test_every_selector_has_a_cost() -> None:
    rows = estimate(ablation(sets=1, shots=(3,), selectors=tuple(SELECTORS)), [LENGTHS]).rows
    assert [row.selector for row in rows] == list(SELECTORS)
    assert all(row.tokens > 0 for row in rows)


def test_more_shots_than_neighbours_to_choose_from_are_refused() -> None:
    with pytest.raises(SparsortError, match=r"'topk_cone' chooses among 30 neighbours; 31 shots"):
        ablation(selectors=("random", "topk_cone"), shots=(4, 31))
    assert ablation(selectors=("topk_mdl",), shots=(30,)).shots == (30,)


def test_skipped_criteria_are_reported_with_the_reason() -> None:
    assert skipped_criteria(ablation(choosers=("pdo", "cone", "mdl"))) == []
    notes = skipped_criteria(ablation(choosers=("pdo", "cone", "mdl"), selectors=("random", "bm25")))
    assert notes == [
        "moods, bm25: cone skipped: they read sets that all queries share, but this selector gives each query its own "
        "demonstrations.",
        "moods, bm25: pdo skipped: these criteria choose one order for all queries, but this selector gives each query its own "
        "demonstrations.",
    ]
