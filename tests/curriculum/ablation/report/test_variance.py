"""Reports of studies without variance: few sets, outcomes that never differ, one label. What can be had is in its range, the rest
is null with a reason, and nothing that is read holds a number that does not exist.

The oracle is exact: differences of outcomes are fractions, so whether sets differ is decided without rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsort.curriculum.ablation.report.figures import forest, panels, sheets
from sparsort.curriculum.ablation.report.figures.style import Tips, blank, styled
from sparsort.curriculum.ablation.report.numbers import rows
from sparsort.curriculum.ablation.report.numbers.shape import Difference, Report
from sparsort.curriculum.ablation.report.numbers.summary import summarise
from sparsort.curriculum.ablation.report.page.html import arm_rows
from sparsort.curriculum.ablation.report.page.markdown import markdown
from sparsort.curriculum.ablation.report.write import write_report
from sparsort.curriculum.ablation.results.cells import Arm, ArmKind, Cell, SetInfo
from sparsort.curriculum.ablation.results.results import Results

ARMS: dict[str, ArmKind] = {"given": "named", "pdo": "chosen", "oracle_best": "oracle"}
K = 2
Outcomes = NDArray[np.int64]

# What is None by design and not for want of a number.
NAMES = {"k", "task", "reason", "model"}
# Words that a missing number would leave in a sentence.
HOLES = re.compile(r"(?i:\bnan\b|\binf\b|∞)|\bNone\b")


def arm(name: str, kind: ArmKind, predicted_SQ: Outcomes, gold_Q: Outcomes, labels: int) -> Arm:
    """An arm that predicts these labels; with no label, 1 is a right answer and 0 a wrong one."""
    sets, items = predicted_SQ.shape
    right = predicted_SQ == gold_Q if labels else predicted_SQ.astype(bool)
    return Arm(
        name=name,
        kind=kind,
        order=[list(range(K))] * sets,
        log_p=np.zeros((sets, items, labels)),
        predicted=predicted_SQ if labels else np.full((sets, items), -1),
        correct=right,
        tokens=np.full(sets, 20.0),
        choosing_tokens=np.full(sets, 50.0 if kind == "chosen" else 0.0),
    )


def group(task: str, gold_Q: Outcomes, random_RSQ: Outcomes, arms_ASQ: Outcomes, labels: int, calibrated: bool) -> Cell:
    sets, names = random_RSQ.shape[1], [f"label {place}" for place in range(labels)]
    return Cell(
        task=task,
        selector="random",
        k=K,
        contextual=calibrated,
        labels=names,
        items=[f"{task} {item}" for item in range(len(gold_Q))],
        gold=[names[place] for place in gold_Q] if labels else ["answer"] * len(gold_Q),
        sets=[
            SetInfo(seed=s, demo_ids=["a", "b"], demo_labels=[], demo_tokens=[], prompt="prompt") for s in range(sets)
        ],
        random=[arm("random", "random", one, gold_Q, labels) for one in random_RSQ],
        arms=[arm(name, kind, one, gold_Q, labels) for (name, kind), one in zip(ARMS.items(), arms_ASQ, strict=True)],
    )


@st.composite
def studies(draw: st.DrawFn) -> Results:
    """One or two tasks whose outcomes vary little or not at all."""
    groups: list[Cell] = []
    for task in ("one", "two")[: draw(st.integers(1, 2))]:
        sets, orders, items = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
        labels = draw(st.sampled_from([0, 1, 2, 3]))
        rng = np.random.default_rng(draw(st.integers(0, 10**6)))
        most = max(labels, 2 if not labels else 1)
        gold = rng.integers(0, max(labels, 1), items)
        for calibrated in draw(st.sampled_from([(False,), (False, True)])):
            shape = (orders + len(ARMS), sets, items)
            kind = draw(st.sampled_from(["constant", "one item", "equal differences", "alike in all sets", "any"]))
            outcomes = np.full(shape, draw(st.integers(0, most - 1)))
            if kind == "one item":
                place = tuple(draw(st.integers(0, size - 1)) for size in shape)
                outcomes[place] = (outcomes[place] + 1) % most
            elif kind == "equal differences":
                outcomes = np.broadcast_to(rng.integers(0, most, (shape[0], 1, 1)), shape)
            elif kind == "alike in all sets":
                outcomes = np.broadcast_to(rng.integers(0, most, (shape[0], 1, items)), shape)
            elif kind == "any":
                outcomes = rng.integers(0, most, shape)
            groups.append(group(task, gold, outcomes[: -len(ARMS)], outcomes[-len(ARMS) :], labels, calibrated))
    return Results(cells=groups, provenance={"model": "tiny"})


def gains(one: Cell, name: str) -> list[Fraction]:
    """The arm's difference to the mean random order in every set, exactly."""
    found = []
    for place in range(len(one.sets)):
        own = int(one.arm(name).correct[place].sum())
        others = sum(int(other.correct[place].sum()) for other in one.random)
        found.append(Fraction(own, len(one.items)) - Fraction(others, len(one.random) * len(one.items)))
    return found


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of JSON in a value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(inner)


def check_difference(one: Difference, tested: bool) -> None:
    assert -1 <= one["value"] <= 1
    ends = [one["adjusted_low"], one["low"], one["value"], one["high"], one["adjusted_high"]]
    rest = [
        one["p"],
        one["p_adjusted"],
        one["verdict"],
        one["smallest_visible"],
        one["sets_needed"],
        one["items_needed"],
    ]
    if not tested:
        assert ends[:2] + ends[3:] == [None] * 4
        assert rest == [None] * 6
        assert one["reason"]
        return
    assert None not in (*ends, *rest[:3])
    numbers = [float(end) for end in ends if end is not None]
    assert numbers == sorted(numbers)
    assert numbers[0] >= -1
    assert numbers[-1] <= 1
    p, adjusted = one["p"], one["p_adjusted"]
    assert p is not None
    assert adjusted is not None
    assert 0 <= p <= adjusted <= 1
    assert one["smallest_visible"] is None or 0 < one["smallest_visible"] <= 1
    assert one["sets_needed"] is None or one["sets_needed"] >= 3
    assert one["items_needed"] is None or one["items_needed"] >= 1


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(studies())
def test_every_number_is_in_its_range_or_null_with_a_reason(results: Results) -> None:
    report = summarise(results)
    json.dumps(report, allow_nan=False)
    for name in ("cells", "pooled", "calibration"):
        for one in objects(report[name]):  # type: ignore[literal-required]
            absent = [field for field, value in one.items() if value is None and field not in NAMES]
            assert not absent or one["reason"], (absent, one)
    for own, cell in zip(results.cells, report["cells"], strict=True):
        for shown in cell["arms"]:
            differs = len(set(gains(own, shown["name"]))) > 1
            check_difference(shown["difference"], len(own.sets) >= 3 and differs and shown["kind"] != "oracle")
            right = {int(of_set.sum()) for of_set in own.arm(shown["name"]).correct}
            assert (shown["low"] is not None) == (len(own.sets) >= 3 and len(right) > 1)
            if shown["low"] is not None and shown["high"] is not None:
                assert 0 <= shown["low"] <= shown["accuracy"] <= shown["high"] <= 1
            assert 0 <= shown["percentile"] <= 100
        parts = cell["random"]
        for value in (parts["sd_orders"], parts["sd_noise"], parts["real_share"], parts["sd_sets"]):
            assert value is None or 0 <= value <= 1
    for pool in report["pooled"]:
        alike = [own for own in results.cells if own.contextual is pool["calibrated"]]
        for one in pool["arms"]:
            by_task = [gains(own, one["name"]) for own in alike]
            tested = sum(map(len, by_task)) >= 3 and any(len(set(task)) > 1 for task in by_task)
            check_difference(one["difference"], tested)
    for pair in report["calibration"]:
        for change in pair["arms"]:
            check_difference(change["change"], change["change"]["p"] is not None)


def words(report: Report) -> list[str]:
    """All that is read of a report without its figures."""
    texts = [sentence for finding in report["findings"] for sentence in (finding["title"], *finding["sentences"])]
    texts += [*report["notes"], *(one["text"] for one in report["warnings"])]
    texts += [str(cell[name]) for row in arm_rows(report) for cell in row["cells"] for name in ("shown", "interval")]
    texts += [forest.describe(shown["difference"]) for cell in report["cells"] for shown in cell["arms"]]
    return [*texts, markdown(report, [])]


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(studies())
def test_no_sentence_mentions_a_missing_number(results: Results) -> None:
    report = summarise(results)
    for text in words(report):
        assert not HOLES.search(text), text[:400]
    few = {cell["task"] for cell in report["cells"] if cell["sets"] < 3}
    for finding in report["findings"]:
        if finding["task"] in few:
            text = " ".join(finding["sentences"])
            assert "run sparsort ablate with --sets 3 or more (10 are better)" in text
            assert not re.search(r"95 % interval|would have to exceed|\bp [=<]", text)


# By hand


def flat_study(sets: int, *, labels: int = 2, items: int = 20, lean: int | None = None) -> Results:
    """Outcomes that never differ; or, with `lean`, one row of `lean` that the first random order answers otherwise."""
    gold = np.arange(items) % labels
    outcomes = np.zeros((2 + len(ARMS), sets, items), dtype=np.int64)
    if lean is not None:
        outcomes[0, :, ::lean] = 1
    groups = [group("films", gold, outcomes[:2], outcomes[2:], labels, calibrated) for calibrated in (False, True)]
    return Results(cells=groups, provenance={"model": "tiny"})


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (1, "One demonstration set allows no interval"),
        (2, "Two demonstration sets allow no interval"),
        (4, "outcomes that do not differ between 4 demonstration sets allow no interval"),
    ],
)
def test_the_reason_and_the_next_step_replace_the_number(sets: int, says: str) -> None:
    report = summarise(flat_study(sets))
    (sentence, *_) = report["findings"][0]["sentences"]
    assert says.lower() in sentence.lower()
    assert ("--sets 3 or more" if sets < 3 else "more test rows") in sentence
    assert report["findings"][0]["tested"] is False
    for cell in report["cells"]:
        for shown in cell["arms"]:
            assert shown["difference"]["sets_needed"] is shown["difference"]["smallest_visible"] is None


def test_untested_arms_count_in_the_family() -> None:
    """The claim is picked from all arms: one that cannot be tested must not make the others look better."""
    rng = np.random.default_rng(0)
    gold = np.zeros(12, dtype=np.int64)
    random = rng.integers(0, 2, (3, 8, 12))
    varied = rng.integers(0, 2, (8, 12))
    # "given" answers as the random orders do, which are one order repeated.
    same = np.stack([random[0]] * 3)
    report = summarise(
        Results(cells=[group("t", gold, same, np.stack([random[0], varied, varied]), 2, False)], provenance={})
    )
    given_arm, pdo = (shown["difference"] for shown in report["cells"][0]["arms"][:2])
    assert given_arm["p"] is given_arm["verdict"] is None
    assert pdo["p"] is not None
    assert pdo["p_adjusted"] == pytest.approx(min(1.0, 2 * pdo["p"]))


def test_a_task_without_spread_takes_part_in_the_mean_over_tasks() -> None:
    rng = np.random.default_rng(1)
    gold = np.zeros(6, dtype=np.int64)
    level, varied = np.zeros((6, 4, 6), dtype=np.int64), rng.integers(0, 2, (6, 4, 6))
    groups = [
        group("flat", gold, level[:3], level[3:], 2, False),
        group("varied", gold, varied[:3], varied[3:], 2, False),
    ]
    report = summarise(Results(cells=groups, provenance={}))
    (pool,) = report["pooled"]
    own = [float(np.mean([float(gain) for gain in gains(groups[1], name)])) for name in ("given", "pdo")]
    assert [one["difference"]["value"] for one in pool["arms"]] == pytest.approx([value / 2 for value in own])
    assert all(one["difference"]["p"] is not None for one in pool["arms"])
    # Constant within each task and different between them is no spread over sets.
    opposite = np.ones_like(level)
    groups = [
        group("flat", gold, level[:3], opposite[3:], 2, False),
        group("other", gold, opposite[:3, :3], level[3:, :3], 2, False),
    ]
    (pool,) = summarise(Results(cells=groups, provenance={}))["pooled"]
    for one in pool["arms"]:
        assert one["difference"]["value"] == pytest.approx(0.0)
        assert one["difference"]["reason"] == (
            "outcomes that do not differ between the demonstration sets of any task allow no interval"
        )


# One label


@pytest.mark.parametrize(("lean", "share"), [(None, 1.0), (10, 0.95), (9, 0.925)])
def test_a_model_that_gives_one_label_is_reported_first(lean: int | None, share: float) -> None:
    report = summarise(flat_study(3, lean=lean))
    assert report["cells"][0]["random"]["label_share"][0] == pytest.approx(share)
    if share < 0.95:
        assert report["warnings"] == []
        return
    plain, calibrated = report["warnings"]
    assert (plain["cell"], plain["model"], plain["label"]) == ("films/random/2/plain", "tiny", "label 0")
    assert (plain["share"], plain["gold_share"]) == (pytest.approx(share), pytest.approx(0.5))
    assert f"tiny predicts 'label 0' for {100 * share:.1f} % of the test rows" in plain["text"]
    assert "It is 50.0 % of the gold labels" in plain["text"]
    assert "with contextual calibration: tiny" in calibrated["text"]
    text = markdown(report, [])
    assert text.index("> **Warning.** films, k = 2") < text.index("| Model |")


def test_one_sided_test_rows_are_distinguished_from_a_one_sided_model() -> None:
    gold = np.array([0] * 19 + [1])
    outcomes = np.zeros((2 + len(ARMS), 3, 20), dtype=np.int64)
    report = summarise(Results(cells=[group("t", gold, outcomes[:2], outcomes[2:], 2, False)], provenance={}))
    (warning,) = report["warnings"]
    assert (warning["model"], warning["gold_share"]) == (None, pytest.approx(0.95))
    assert "the model predicts 'label 0'" in warning["text"]
    assert "also 95.0 % of the gold labels" in warning["text"]
    one = summarise(Results(cells=[group("t", gold * 0, outcomes[:2], outcomes[2:], 1, False)], provenance={}))
    assert one["warnings"] == []


# Figures and the page


def test_a_report_without_variance_is_written_without_a_warning(tmp_path: Path) -> None:
    # pytest makes a warning of matplotlib's an error.
    write_report(summarise(flat_study(3)), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index('class="warnings"') < page.index('<dl class="facts">')
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "A mark without a line has no interval: " in text
    for file in ("report.md", "report.json"):
        assert not re.search(r"\bNaN\b|\bInfinity\b|\bnan\b", (tmp_path / file).read_text(encoding="utf-8"))
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b|\binf\b|>None<", text)


@pytest.mark.parametrize("numbers", [True, False])
def test_an_arm_without_an_interval_is_a_mark_without_a_line(numbers: bool) -> None:
    report = summarise(flat_study(2))
    arms = {shown["name"]: shown["difference"] for shown in report["cells"][0]["arms"] if shown["kind"] != "oracle"}
    with styled(8):
        figure, tips = blank(4, 2), Tips()
        axes = figure.add_axes((0.3, 0.2, 0.4, 0.7))
        forest.draw_forest(axes, arms, rows.blocks(report), tips, limit=forest.limit_of(arms.values()), numbers=numbers)
        figure.canvas.draw()
    (marks,) = axes.collections
    assert len(marks.get_offsets()) == len(arms)
    written = [text.get_text() for text in axes.texts]
    assert written.count("no interval") == (len(arms) if numbers else 1)
    assert next(text for text, _ in next(iter(tips.marks.values()))) == (
        "given: 0.0 points; two demonstration sets allow no interval"
    )
    with styled(panels.SIZE):
        captions = [panel.picture.caption for panel in panels.panels(report) if panel.section == "forest"]
    with styled(sheets.SIZE):
        captions += [sheet.caption for sheet in sheets.sheets(report) if sheet.name.startswith("forest")]
    assert len(captions) == 4
    assert all(caption.endswith("two demonstration sets allow no interval.") for caption in captions)
