"""The summary of a plan and its figure, against a loop over its batches."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.loading.inspect.drawing import BATCHES, draw_plans
from sparsort.curriculum.loading.inspect.summary import (
    RowAttributes,
    coverage_of,
    measure_batches,
    spaced,
    summarise,
)
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError

pytest.importorskip("matplotlib", reason="the extra plots, an optional one, is not installed")

SETTINGS: list[dict[str, Any]] = [
    {"batch_size": 7},
    {"batch_size": 7, "stages": 4, "direction": "hard_to_easy", "unscored": "first"},
    {"batch_size": 3, "stages": 25, "pacing": "root:start=0.2,until=0.5"},
    {"batch_size": 5, "schedule": "folded", "folds": 3},
    {"batch_size": 5, "schedule": "shuffle"},
    {"batch_size": 5, "warm_up": 0.3, "later_epochs": "shuffle"},
    {"token_budget": 90, "stages": 3, "group_by_length": True},
    {"batch_size": 2, "packing": "best_fit", "pack_length": 64, "stages": 2},
    {"batch_size": 6, "mode": "pool", "pacing": "linear:start=0.1", "steps": 31},
    {"token_budget": 120, "mode": "pool", "pacing": "step:start=0.3,until=0.5", "steps": 12},
]


def _rows(n: int, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(size=n).round(1)
    difficulty[generator.random(n) < 0.1] = np.nan
    return {
        "scores": difficulty,
        "lengths": generator.integers(1, 50, n),
        "groups": [str(name) for name in generator.choice(["code", "books", "web"], n, p=[0.2, 0.3, 0.5])],
    }


@pytest.mark.parametrize("asked", SETTINGS, ids=lambda asked: "-".join(map(str, asked.values())))
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_numbers_are_those_of_the_batches(asked: dict[str, Any], epoch: int) -> None:
    rows = _rows(150)
    plan = plan_curriculum(**rows, max_length=40, **asked)
    found = summarise(plan, epoch=epoch)
    assert found.exact
    assert [found.rows, found.batches, found.cut] == [150, plan.n_batches, int((rows["lengths"] > 40).sum())]
    numbers = [k for part in found.parts for k in range(part.batches[0], part.batches[1] + 1)]
    assert numbers == list(range(plan.n_batches))
    assert len(found.parts) <= 20
    for part in found.parts:
        batches = [plan.batch(k, epoch).tolist() for k in range(part.batches[0], part.batches[1] + 1)]
        seen = [row for batch in batches for row in batch]
        hard = sorted(float(np.float32(rows["scores"][row])) for row in seen if not math.isnan(rows["scores"][row]))
        tokens = [min(40, int(rows["lengths"][row])) for row in seen]
        assert part.examples == len(seen)
        assert part.unscored == pytest.approx(1 - len(hard) / len(seen))
        assert part.difficulty is None if not hard else part.difficulty is not None
        if part.difficulty is not None:
            spread = part.difficulty
            assert spread.mean == pytest.approx(math.fsum(hard) / len(hard), abs=1e-6)
            assert [spread.lowest, spread.highest] == [hard[0], hard[-1]]
            for value, share in ((spread.low, 0.1), (spread.median, 0.5), (spread.high, 0.9)):
                assert sum(other <= value for other in hard) >= share * len(hard)
                assert sum(other < value for other in hard) < share * len(hard)
        assert part.length is not None
        assert part.length.mean == pytest.approx(sum(tokens) / len(tokens))
        room = sum(max(min(40, int(rows["lengths"][row])) for row in batch) * len(batch) for batch in batches)
        if "pack_length" in asked:
            room = 64 * sum(len(plan.bins(k, epoch)) for k in range(part.batches[0], part.batches[1] + 1))
        assert part.padding == pytest.approx(1 - sum(tokens) / room)
        counted = Counter(rows["groups"][row] for row in seen)
        assert part.groups == pytest.approx([counted[name] / len(seen) for name in ("books", "code", "web")])
        assert part.share == (plan.share(part.batches[0], epoch), plan.share(part.batches[1], epoch))
    drawn = Counter(row for k in range(plan.n_batches) for row in plan.batch(k, epoch).tolist())
    assert found.coverage.never == pytest.approx(1 - len(drawn) / 150)
    assert found.coverage.mean == pytest.approx(drawn.total() / 150)
    assert found.coverage.most == max(drawn.values())
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["exact"] is True


def test_stages_are_the_parts_up_to_twenty_and_put_together_above() -> None:
    few = summarise(plan_curriculum(np.arange(200.0), batch_size=2, stages=20))
    assert [part.stages for part in few.parts] == [(s, s) for s in range(20)]
    many = summarise(plan_curriculum(np.arange(200.0), batch_size=2, stages=50))
    assert len(many.parts) == 20
    stages = [stage for part in many.parts for stage in range(part.stages[0], part.stages[1] + 1)]
    assert stages == list(range(50))
    one = summarise(plan_curriculum(np.arange(200.0), batch_size=2))
    assert len(one.parts) == 10


@pytest.mark.parametrize(
    "asked",
    [
        {"batch_size": 16, "stages": 5},
        {"batch_size": 16, "mode": "pool", "pacing": "linear:start=0.1", "steps": 900},
        {"token_budget": 400, "mode": "pool", "pacing": "root:start=0.2,until=0.5", "steps": 900},
        {
            "batch_size": 16,
            "mode": "pool",
            "pacing": "linear:start=0.1",
            "steps": 900,
            "quotas": {"books": 0.7, "code": 0.2, "web": 0.1},
        },
    ],
    ids=["one_pass", "pool", "tokens", "quotas"],
)
def test_a_sampled_summary_is_marked_and_close(asked: dict[str, Any]) -> None:
    plan = plan_curriculum(**_rows(8000), **asked)
    exact, sampled = summarise(plan), summarise(plan, all_batches=200)
    assert exact.exact
    assert not sampled.exact
    assert sum(part.looked_at for part in sampled.parts) <= 200
    assert sampled.coverage.exact == (plan.settings.mode == "one_pass")
    assert sampled.coverage.never == pytest.approx(exact.coverage.never, abs=0.01)
    assert sampled.coverage.mean == pytest.approx(exact.coverage.mean, rel=0.01)
    for one, other in zip(exact.parts, sampled.parts, strict=True):
        assert one.batches == other.batches
        assert one.examples == pytest.approx(other.examples, rel=0 if "batch_size" in asked else 0.05)
        assert one.difficulty is not None
        assert other.difficulty is not None
        assert one.difficulty.mean == pytest.approx(other.difficulty.mean, abs=0.15)


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_spaced_batches_rise_stay_inside_and_are_as_many_as_asked(first: int, count: int, most: int) -> None:
    found = list(spaced(first, first + count, most))
    assert len(found) == min(most, count)
    assert all(first <= number < first + count for number in found)
    assert all(one < other for one, other in itertools.pairwise(found))
    gaps = [other - one for one, other in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_pool_that_draws_every_row_has_full_coverage() -> None:
    plan = plan_curriculum(np.arange(12.0), batch_size=12, mode="pool", pacing="constant", steps=40)
    assert coverage_of(plan, 0).never == 0
    sampled = coverage_of(plan, 0, sample=4)
    assert [sampled.never, sampled.exact, sampled.most] == [0, False, None]


def test_a_revised_plan_is_described_from_its_first_batch_on() -> None:
    plan = plan_curriculum(np.arange(90.0), batch_size=6, mode="pool", pacing="linear", steps=30, stages=3)
    revised = plan.revised(np.arange(90.0)[::-1], epoch=1, start=10)
    found = summarise(revised, epoch=1)
    assert [part.batches for part in found.parts] == [(10, 19), (20, 29)]
    assert draw_plans(revised, epoch=1).axes[0].get_xlim() == (9.5, 29.5)
    with pytest.raises(SparsortError, match="does not include batch"):
        summarise(revised, epoch=0)


def test_infinities_are_ends_and_no_part_of_the_mean() -> None:
    plan = plan_curriculum(np.array([-np.inf, 1.0, 2.0, 3.0, np.inf, np.inf]), batch_size=6)
    (part,) = summarise(plan).parts
    assert part.difficulty is not None
    assert [part.difficulty.lowest, part.difficulty.mean, part.difficulty.highest] == [-np.inf, 2.0, np.inf]
    spread = summarise(plan).to_json()["parts"][0]["difficulty"]
    assert [spread["lowest"], spread["highest"]] == ["-inf", "inf"]
    draw_plans(plan)


def test_the_figure_shows_the_batches() -> None:
    rows = _rows(600)
    plan = plan_curriculum(**rows, batch_size=30, mode="pool", pacing="linear:start=0.1", steps=10, stages=10)
    figure = draw_plans(plan)
    difficulty, share, length, groups = figure.axes
    (line,) = difficulty.lines
    means = [float(np.nanmean(np.float64(np.float32(rows["scores"][plan.batch(k)])))) for k in range(plan.n_batches)]
    assert line.get_xdata().tolist() == [x for k in range(10) for x in (k - 0.5, k + 0.5)]
    assert line.get_ydata() == pytest.approx(np.repeat(means, 2), abs=1e-6)
    assert share.lines[0].get_ydata() == pytest.approx(np.repeat([plan.share(k) for k in range(10)], 2))
    tokens = [float(rows["lengths"][plan.batch(k)].mean()) for k in range(10)]
    assert length.lines[0].get_ydata() == pytest.approx(np.repeat(tokens, 2))
    bands = [band.get_paths()[0].vertices for band in groups.collections if len(band.get_paths()[0].vertices) > 4]
    books = [sum(rows["groups"][row] == "books" for row in plan.batch(k).tolist()) / 30 for k in range(10)]
    assert {round(y, 6) for y in bands[0][:, 1]} == {0.0} | {round(value, 6) for value in books}
    code = [sum(rows["groups"][row] == "code" for row in plan.batch(k).tolist()) / 30 for k in range(10)]
    edges = {round(value, 6) for pair in zip(books, code, strict=True) for value in (pair[0], sum(pair))}
    assert {round(y, 6) for y in bands[1][:, 1]} == edges
    assert max(bands[2][:, 1]) == pytest.approx(1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["books", "code", "web", "in the data"]


def test_points_do_not_mix_stages() -> None:
    plan = plan_curriculum(np.arange(1000.0), batch_size=8, stages=7)
    line = draw_plans(plan).axes[0].lines[0]
    assert {edge - 0.5 for edge in plan.stage_edges} <= set(line.get_xdata().tolist())


def test_plans_side_by_side_share_their_scales(tmp_path: Path) -> None:
    rows = _rows(500)
    plans = {
        "curriculum": plan_curriculum(**rows, batch_size=10, stages=5),
        "plain": plan_curriculum(rows["scores"], batch_size=10, schedule="shuffle"),
        "pool": plan_curriculum(rows["scores"] * 9, batch_size=10, mode="pool", pacing="linear", steps=20),
    }
    figure = draw_plans(plans, tmp_path / "figure.svg", lengths=rows["lengths"], groups=rows["groups"])
    assert len(figure.axes) == 3 * 4
    for row in range(4):
        assert len({axes.get_ylim() for axes in figure.axes[row::4]}) == 1
    written = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert all(name in written for name in plans)
    assert not list(tmp_path.glob(".*"))


def test_more_groups_than_colours_share_the_last() -> None:
    groups = [f"source $_{n % 12}^" for n in range(240)]
    figure = draw_plans(plan_curriculum(np.arange(240.0), groups=groups, batch_size=24))
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries[-2:] == ["5 more", "in the data"]
    assert len(entries) == 9


def test_a_large_plan_is_drawn_from_few_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_curriculum(np.arange(200_000, dtype=np.float32), batch_size=4, stages=30)
    asked: list[int] = []
    batch = CurriculumPlan.batch

    def counted(self: CurriculumPlan, number: int, epoch: int = 0) -> Any:
        asked.append(number)
        return batch(self, number, epoch)

    monkeypatch.setattr(CurriculumPlan, "batch", counted)
    draw_plans(plan)
    assert 100 <= len(asked) <= BATCHES + 1
    assert min(asked) < plan.n_batches / 100
    assert max(asked) > 0.99 * plan.n_batches


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "PNG"])
def test_figures_are_written_whole_and_the_same_again(suffix: str, tmp_path: Path) -> None:
    plan = plan_curriculum(np.arange(40.0), batch_size=4)
    draw_plans(plan, tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 1000
    if suffix == "png":
        draw_plans(plan, tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan = plan_curriculum(np.arange(40.0), batch_size=4)
    with pytest.raises(SparsortError, match="png, pdf, svg"):
        draw_plans(plan, tmp_path / "plan.jpeg2")
    with pytest.raises(SparsortError, match="no plan to draw"):
        draw_plans({})
    with pytest.raises(SparsortError, match="39 lengths to show for the 40 rows"):
        draw_plans(plan, lengths=np.ones(39, dtype=int))
    with pytest.raises(SparsortError, match="2 groups to show for the 40 rows"):
        summarise(plan, groups=["a", "b"])


def test_shown_lengths_are_cut_as_the_plan_cuts() -> None:
    plan = plan_curriculum(np.arange(4.0), batch_size=2, lengths=[9, 9, 9, 9], max_length=5)
    (part,) = measure_batches(plan, [0, 2], RowAttributes.of(plan, lengths=[1, 5, 6, 100]))
    assert part.length is not None
    assert [part.length.lowest, part.length.mean, part.length.highest] == [1, 4, 5]


def test_a_configuration_in_one_line() -> None:
    plan = plan_curriculum(np.arange(40.0), batch_size=4, stages=3, pacing="root:start=0.2", direction="random")
    assert plan.settings.describe() == "sorted, random order, root:start=0.2, 3 stages"
    assert plan_curriculum(np.arange(9.0), batch_size=4, schedule="as_given").settings.describe() == "as given"
