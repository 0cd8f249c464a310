"""The numbers of the report against plain loops, and its sentences against a known truth."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from simulated_results import simulate

from sparsort.curriculum.ablation.report.numbers import compare, rows
from sparsort.curriculum.ablation.report.numbers.shape import Report
from sparsort.curriculum.ablation.report.numbers.summary import summarise
from sparsort.curriculum.ablation.report.page.head import duration, facts
from sparsort.curriculum.ablation.results.cells import Arm, Cell
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.statistics import differences as statistics

ARMS = ["sparse_to_dense", "similarity_ascending", "pdo", "density", "oracle_best"]


def with_sets(group: Cell, places: list[int]) -> Cell:
    """The group with only these demonstration sets, in this order."""

    def taken(arm: Arm) -> Arm:
        fields = ("log_p", "predicted", "correct", "tokens", "choosing_tokens")
        return replace(
            arm,
            order=None if arm.order is None else [arm.order[place] for place in places],
            order_of_item=None if arm.order_of_item is None else arm.order_of_item[places],
            **{name: getattr(arm, name)[places] for name in fields},
        )

    return replace(
        group,
        sets=[group.sets[place] for place in places],
        random=[taken(arm) for arm in group.random],
        arms=[taken(arm) for arm in group.arms],
    )


@pytest.fixture(scope="module")
def results() -> Results:
    """Two tasks and two k, on and off; one cell has fewer sets, another lacks an arm, as where a study was stopped."""
    made = simulate(["mr", "trec"], shots=(2, 3), sets=9, orders=5, items=24, arms=ARMS, seed=3)
    groups = []
    for group in made.cells:
        if group.key[:3] == ("mr", "balanced", 3):
            group = with_sets(group, list(range(7)))
        if group.key == ("trec", "balanced", 2, False):
            group = replace(group, arms=[arm for arm in group.arms if arm.name != "density"])
        groups.append(group)
    return Results(cells=groups, provenance=made.provenance | {"seconds": 3725.0, "versions": {"torch": "2"}})


@pytest.fixture(scope="module")
def report(results: Results) -> Report:
    return summarise(results)


# The numbers


def test_a_cell_against_plain_loops(results: Results, report: Report) -> None:
    for group, cell in zip(results.cells, report["cells"], strict=True):
        S, Q, R = len(group.sets), len(group.items), len(group.random)
        assert (cell["sets"], cell["items"], cell["orders"]) == (S, Q, R)
        for arm, shown in zip(group.arms, cell["arms"], strict=True):
            gains, places, right = [], [], 0
            for s in range(S):
                own = sum(bool(value) for value in arm.correct[s])
                others = [sum(bool(value) for value in one.correct[s]) for one in group.random]
                right += own
                gains.append((own - sum(others) / R) / Q)
                places.append(sum(1.0 if own > other else 0.5 if own == other else 0.0 for other in others) / R)
            assert shown["name"] == arm.name
            assert shown["accuracy"] == pytest.approx(right / (S * Q))
            assert shown["difference"]["value"] == pytest.approx(sum(gains) / S)
            assert shown["percentile"] == pytest.approx(100 * sum(places) / S)
            assert shown["tokens_per_answer"] == pytest.approx(
                float(np.mean(arm.tokens)) + float(np.mean(arm.choosing_tokens)) / Q
            )
            counts = Counter(int(value) for value in arm.predicted.ravel())
            assert shown["label_share"] == pytest.approx(
                [counts[index] / (S * Q) for index in range(len(group.labels))]
            )
            entropies = []
            for s in range(S):
                shares = [count / Q for count in Counter(int(value) for value in arm.predicted[s]).values()]
                entropies.append(-sum(share * math.log(share) for share in shares) / math.log(len(group.labels)))
            assert shown["label_entropy_by_set"] == pytest.approx(entropies, abs=1e-12)
        accuracies = [[one.correct[s].mean() for one in group.random] for s in range(S)]
        np.testing.assert_allclose(cell["random"]["accuracy_by_set"], accuracies)
        seen = math.sqrt(sum(np.var(values, ddof=1) for values in accuracies) / S)
        assert cell["random"]["sd_orders"] == pytest.approx(seen)


def test_intervals_and_verdicts_are_those_of_the_statistics(results: Results, report: Report) -> None:
    for group, cell in zip(results.cells, report["cells"], strict=True):
        tested = [arm for arm in cell["arms"] if arm["kind"] != "oracle"]
        p = []
        for shown in tested:
            found = statistics.difference(group.arm(shown["name"]).correct, group.random_correct)
            strict = statistics.difference(
                group.arm(shown["name"]).correct, group.random_correct, level=1 - 0.05 / len(tested)
            )
            one = shown["difference"]
            assert (one["low"], one["high"]) == (found.low, found.high)
            assert (one["adjusted_low"], one["adjusted_high"], one["p"]) == (strict.low, strict.high, strict.p_value)
            assert one["adjusted_low"] <= one["low"] <= one["high"] <= one["adjusted_high"]
            p.append(strict.p_value)
        for shown, adjusted in zip(tested, holm_by_hand(p), strict=True):
            one = shown["difference"]
            assert one["p_adjusted"] == pytest.approx(adjusted)
            expected = "nothing" if adjusted >= 0.05 else "helps" if one["value"] > 0 else "hurts"
            assert one["verdict"] == expected
        oracle = next(arm["difference"] for arm in cell["arms"] if arm["kind"] == "oracle")
        assert (oracle["p"], oracle["verdict"], oracle["low"]) == (None, None, None)


def holm_by_hand(p: list[float]) -> list[float]:
    return [
        max(min(1.0, sum(other >= one for other in p) * one) for one in [value for value in p if value <= mine])
        for mine in p
    ]


def test_all_tasks_count_alike_whatever_their_sets(results: Results, report: Report) -> None:
    assert [(pool["k"], pool["calibrated"]) for pool in report["pooled"]] == [
        (k, on) for on in (False, True) for k in (None, 2, 3)
    ]
    for pool in report["pooled"]:
        for arm in pool["arms"]:
            by_task: dict[str, dict[int, list[float]]] = {}
            for group in results.cells:
                if group.contextual is not pool["calibrated"] or pool["k"] not in (None, group.k):
                    continue
                if arm["name"] not in [one.name for one in group.arms]:
                    continue
                gains = (group.arm(arm["name"]).correct - group.random_correct.mean(axis=0)).mean(axis=1)
                for one, gain in zip(group.sets, gains, strict=True):
                    by_task.setdefault(group.task, {}).setdefault(one.seed, []).append(gain)
            tasks = [float(np.mean([np.mean(gains) for gains in seeds.values()])) for seeds in by_task.values()]
            assert arm["difference"]["value"] == pytest.approx(float(np.mean(tasks)))
            assert arm["clusters"] == sum(map(len, by_task.values()))
            assert arm["tasks"] == list(by_task)
    density = {
        pool["id"]: arm["tasks"] for pool in report["pooled"] for arm in pool["arms"] if arm["name"] == "density"
    }
    assert density["balanced/2/plain"] == ["mr"]
    assert density["balanced/all/plain"] == ["mr", "trec"]


def test_calibration_compares_the_sets_that_both_cells_have(results: Results) -> None:
    off, on = (group for group in results.cells if group.key[:3] == ("trec", "balanced", 3))
    moved = replace(on, sets=[replace(one, demo_ids=[f"other {name}" for name in one.demo_ids]) for one in on.sets])
    assert summarise(Results(cells=[off, moved], provenance={}))["calibration"] == []
    turned = with_sets(on, [8, 5, 6, 0, 2, 1, 3])
    first = with_sets(off, list(range(7)))
    (pair,) = summarise(Results(cells=[first, turned], provenance={}))["calibration"]
    assert pair["sets"] == 6
    shared = [0, 1, 2, 3, 5, 6]
    by_name = {arm["name"]: arm for arm in pair["arms"]}
    assert by_name["pdo"]["off"] == pytest.approx(off.arm("pdo").correct[shared].mean())
    assert by_name["pdo"]["on"] == pytest.approx(on.arm("pdo").correct[shared].mean())
    assert by_name["random"]["off"] == pytest.approx(off.random_correct[:, shared].mean())
    change = by_name["pdo"]["change"]
    by_set = statistics.difference(on.arm("pdo").correct[shared], off.arm("pdo").correct[shared])
    assert (change["value"], change["low"], change["high"]) == pytest.approx((by_set.value, by_set.low, by_set.high))


@pytest.mark.parametrize(("sets", "alpha"), [(3, 0.05), (10, 0.05 / 18), (80, 0.01)])
def test_the_smallest_visible_difference_is_seen_four_times_in_five(sets: int, alpha: float) -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    drawn = rng.normal(compare._visible(sets, alpha), 1.0, size=(20_000, sets))
    seen = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < alpha
    assert seen.mean() == pytest.approx(0.8, abs=0.015)


def test_the_report_is_json_without_holes(report: Report) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_what_every_item_saw_is_in_the_report(results: Results, report: Report) -> None:
    for group, view in zip(results.cells, report["demonstrations"], strict=True):
        for number, shown in enumerate(view["sets"]):
            assert [demo["id"] for demo in shown["demos"]] == group.sets[number].demo_ids
            assert shown["prompt"] == group.sets[number].prompt
            assert shown["random_orders"] == [arm.order[number] for arm in group.random if arm.order]
            for arm in group.arms:
                assert shown["orders"][arm.name] == (arm.order[number] if arm.order else None)
            by_item = group.arm("similarity_ascending").order_of_item
            assert by_item is not None
            assert shown["order_of_item"] == {"similarity_ascending": by_item[number].tolist()}


def test_the_words_of_what_was_shown_are_in_the_report_once_a_task(results: Results) -> None:
    groups = []
    for group in results.cells:
        shown = {name: f"demonstration {name}" for one in group.sets for name in one.demo_ids}
        groups.append(replace(group, demo_texts=shown, item_texts=[f"item {name}" for name in group.items]))
    texts = summarise(replace(results, cells=groups))["texts"]
    assert list(texts) == ["mr", "trec"]
    for group in groups:
        assert texts[group.task]["demos"].items() >= group.demo_texts.items()
        assert texts[group.task]["items"] == {name: f"item {name}" for name in group.items}
    assert summarise(results)["texts"]["mr"] == {"demos": {}, "items": {}}


# The words


def test_findings_state_the_known_truth() -> None:
    effects = {"sparse_to_dense": 0.2, "u_shape": -0.2, "random_scores": 0.0, "pdo": 0.2}
    results = simulate(
        ["mr", "sst5"], shots=(4,), sets=30, orders=8, items=60, effects=effects, arms=list(effects), seed=1
    )
    for finding in summarise(results)["findings"]:
        suffix = "" if finding["task"] is None else " (k = 4)"
        assert sorted(finding["helps"]) == [f"pdo{suffix}", f"sparse_to_dense{suffix}"], finding["title"]
        assert finding["hurts"] == [f"u_shape{suffix}"]
        assert "2 help: " in finding["sentences"][0]
        assert "1 hurts: u_shape (−" in finding["sentences"][0]
        assert "The other one shows no significant difference." in finding["sentences"][0]
    overall = summarise(results)["findings"][0]
    assert any(
        "sparse_to_dense helps without reading more tokens than a random order." in sentence
        for sentence in overall["sentences"]
    )


def test_an_orderer_run_on_some_tasks_is_reported_with_its_tasks() -> None:
    effects = {"sparse_to_dense": 0.2, "pdo": 0.2}
    results = simulate(
        ["mr", "sst5"], shots=(4,), sets=30, orders=8, items=60, effects=effects, arms=list(effects), seed=1
    )
    groups = [
        replace(group, arms=[arm for arm in group.arms if arm.name != "pdo" or group.task == "sst5"])
        for group in results.cells
    ]
    overall = summarise(replace(results, cells=groups))["findings"][0]
    assert sorted(overall["helps"]) == ["pdo", "sparse_to_dense"]
    assert "pdo on sst5 alone (+" in overall["sentences"][0]
    assert "sparse_to_dense (+" in overall["sentences"][0]


def test_a_null_result_is_reported_with_the_power_of_the_study() -> None:
    effects = dict.fromkeys(("sparse_to_dense", "pdo"), 0.0)
    results = simulate(
        ["mr", "rte"], shots=(4,), sets=10, items=60, effects=effects, arms=list(effects), calibrated=(False,)
    )
    report = summarise(results)
    overall, mr, _ = report["findings"]
    assert (overall["helps"], overall["hurts"]) == ([], [])
    assert "No orderer of 2 differs significantly from the mean random order" in overall["sentences"][0]
    visible = float(np.median([arm["difference"]["smallest_visible"] or 0 for arm in report["pooled"][0]["arms"]]))
    assert f"for a true difference of {100 * visible:.1f} points" in overall["sentences"][1]
    assert "this study has 80 % power for a true difference of" in mr["sentences"][0]
    assert "before Holm's correction" in mr["sentences"][0]
    cells = [cell["random"] for cell in report["cells"]]
    seen, real = (sum((cell[name] or 0) ** 2 for cell in cells) for name in ("sd_orders", "sd_orders_true"))
    assert f"; {100 * real / seen:.0f} % of that variance" in overall["sentences"][-2]


def test_one_set_is_not_tested() -> None:
    results = simulate(["mr"], shots=(2,), sets=1, orders=3, items=20, arms=["pdo", "oracle_best"], calibrated=(False,))
    report = summarise(results)
    difference = report["cells"][0]["arms"][0]["difference"]
    assert [difference[name] for name in ("low", "p", "verdict", "smallest_visible")] == [None] * 4  # type: ignore[literal-required]
    assert "results do not generalise to other sets" in report["findings"][0]["sentences"][0]
    assert any(note.startswith("Only one demonstration set") for note in report["notes"])


def test_notes_say_what_is_uneven(report: Report, results: Results) -> None:
    text = " ".join(report["notes"])
    assert "7 to 9 demonstration sets" in text
    assert "Fewer than 10 random orders" in text
    assert "trec/balanced/2/plain (density)" in text
    incomplete = replace(results, provenance={"incomplete": ["mr, k = 2: cone", "mr, k = 2: cone"]})
    assert "Unfinished, and therefore excluded: mr, k = 2: cone." in summarise(incomplete)["notes"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0551, "+5.5"), (-0.003, "−0.3"), (0.0001, "0.0"), (-0.0001, "0.0"), (None, "–")]
)
def test_points(value: float | None, shown: str) -> None:
    assert rows.points(value) == shown


def test_numbers_in_words() -> None:
    assert [rows.probability(p) for p in (None, 0.0004, 0.0316, 1.0)] == ["–", "< .001", ".032", "1.000"]
    assert [rows.count(n) for n in (None, 7, 7.26, 1234567)] == ["–", "7", "7.3", "1\u202f234\u202f567"]
    assert [duration(seconds) for seconds in (38, 720, 9123)] == ["38 s", "12 min", "2 h 32 min"]


def test_the_head_describes_the_run(report: Report) -> None:
    shown = dict(facts(report))
    assert shown["Tasks"] == "mr, trec"
    assert shown["Demonstrations"] == "k = 2 and 3, balanced"
    assert shown["Demonstration sets"] == "7 and 9 per cell"
    assert shown["Orderers"] == "2 rules, 2 chosen with the model, 1 oracles"
    assert (shown["Time of all processes"], shown["Versions"], shown["Model"]) == ("1 h 2 min", "torch 2", "simulated")


def test_counts_and_names_as_text() -> None:
    assert [rows.count(value) for value in (7, 7.25, 99.94, 99.96, 1234.5)] == ["7", "7.2", "99.9", "100", "1\u202f234"]
    assert [rows.join_names("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
