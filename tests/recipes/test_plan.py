"""`sparsort plan`: what it prints against the plan itself, and every mistake as one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from command_line import run
from typer.testing import CliRunner

from sparsort import ColumnScorer
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import app
from sparsort.recipes.plan import PlanOptions, make_plan, named_paths
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.store.score_tables import score_table, scores_schema
from sparsort.scoring.store.scores import Scores

N = 60
ROWS: list[dict[str, Any]] = [
    {
        "id": f"q{n:03d}",
        "text": f"row {n}",
        "source": "web" if n % 3 else "code",
        "tokens": 5 + 7 * n % 40,
        "empty": None,
    }
    for n in range(N)
]
HARD = [float((37 * n) % N) for n in range(N)]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _scores(folder: Path, rows: list[dict[str, Any]], difficulty: list[float], tokens: list[int] | None = None) -> Path:
    """A score folder with these difficulties; NaN is a row without one."""
    read = list(open_rows(rows).rows())
    status = ["empty" if np.isnan(value) else "ok" for value in difficulty]
    counts = tokens if tokens is not None else [0] * len(rows)
    values = np.array(difficulty)
    table = score_table(read, values, status, [""] * len(rows), counts, [0] * len(rows), {"length": values})
    Scores(table, {"scorer": "length", "id_column": "id", "content": None}).save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return _scores(tmp_path / "scores", ROWS, HARD, [row["tokens"] for row in ROWS])


def _run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["plan", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def _mistake(*arguments: Any) -> str:
    result = _run(*arguments, code=2)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return str(result.stderr)


def test_the_plan_is_that_of_python_and_the_table_that_of_its_batches(scores: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    asked = [scores, "--data", data, "--batch-size", 7, "--stages", 3, "--seed", 5]
    found = json.loads(_run(*asked, "--out", out, "--json").stdout)
    ours = plan_curriculum(Scores.load(scores), data=ROWS, batch_size=7, stages=3, seed=5)
    assert found["fingerprint"] == ours.fingerprint == CurriculumPlan.open(out).fingerprint
    assert found["exact"] is True
    assert [found["rows"], found["batches"], found["unscored"], found["cut"]] == [N, ours.n_batches, 0, None]
    assert [part["batches"] for part in found["parts"]] == [
        [ours.stage_edges[s], ours.stage_edges[s + 1] - 1] for s in range(3)
    ]
    for part in found["parts"]:
        rows = [int(row) for k in range(part["batches"][0], part["batches"][1] + 1) for row in ours.batch(k)]
        assert part["examples"] == len(rows)
        assert part["difficulty"]["mean"] == pytest.approx(sum(HARD[row] for row in rows) / len(rows))
        assert part["difficulty"]["lowest"] == min(HARD[row] for row in rows)
        assert part["difficulty"]["highest"] == max(HARD[row] for row in rows)
        assert part["length"]["mean"] == pytest.approx(sum(ROWS[row]["tokens"] for row in rows) / len(rows))
    assert CurriculumPlan.open(out).lengths is None
    again = _run(*asked, "--out", out)
    assert f"Plan: {out}" in again.stdout
    assert f"fingerprint: {ours.fingerprint}" in again.stdout
    assert "every example is seen once per epoch" in again.stdout


def test_the_order_of_the_data_decides_not_that_of_the_scores(scores: Path, tmp_path: Path) -> None:
    turned = _write(tmp_path / "turned.jsonl", ROWS[::-1])
    out = tmp_path / "plan"
    _run(scores, "--data", turned, "--batch-size", 60, "--out", out)
    rows = CurriculumPlan.open(out).batch(0)
    assert [HARD[N - 1 - row] for row in rows.tolist()] == sorted(HARD)


def test_every_option_reaches_the_settings(scores: Path, data: Path, tmp_path: Path) -> None:
    def settings(*more: Any) -> dict[str, Any]:
        return dict(json.loads(_run(scores, "--data", data, "--json", *more).stdout)["settings"])

    default = CurriculumSettings(batch_size=4).to_json()
    assert settings("--batch-size", 4) == default
    pool = ["--mode", "pool", "--pacing", "root:start=0.2,until=0.5", "--steps", 30, "--groups", "source"]
    quotas = ["--quota", "web=0.75", "--quota", "code=0.25", "--direction", "hard_to_easy", "--stages", 3]
    assert settings("--batch-size", 4, *pool, *quotas, "--seed", 3, "--unscored", "first") == default | {
        "mode": "pool",
        "pacing": "root:start=0.2,until=0.5",
        "steps": 30,
        "quotas": {"web": 0.75, "code": 0.25},
        "direction": "hard_to_easy",
        "stages": 3,
        "seed": 3,
        "unscored": "first",
    }
    assert settings("--batch-size", 4, "--schedule", "folded", "--folds", 3, "--warm-up", 0.3) == default | {
        "schedule": "folded",
        "folds": 3,
        "warm_up": 0.3,
    }
    lengths = ["--batch-tokens", 90, "--cut-length", 30, "--group-by-length", "--stages", 2]
    assert settings(*lengths, "--later-epochs", "shuffle") == default | {
        "batch_size": None,
        "token_budget": 90,
        "max_length": 30,
        "group_by_length": True,
        "stages": 2,
        "later_epochs": "shuffle",
    }
    assert settings("--batch-size", 2, "--packing", "next_fit", "--pack-length", 64) == default | {
        "batch_size": 2,
        "packing": "next_fit",
        "pack_length": 64,
    }


def test_lengths_from_the_scores_and_from_a_field_make_the_same_batches(
    scores: Path, data: Path, tmp_path: Path
) -> None:
    asked = ["--data", data, "--batch-tokens", 100, "--cut-length", 25, "--json"]
    counted = json.loads(_run(scores, *asked).stdout)
    named = json.loads(_run(scores, *asked, "--lengths", "tokens").stdout)
    assert counted["fingerprint"] == named["fingerprint"]
    assert counted["cut"] == sum(row["tokens"] > 25 for row in ROWS) > 0
    without = _scores(tmp_path / "without", ROWS, HARD)
    assert json.loads(_run(without, *asked, "--lengths", "tokens").stdout)["cut"] == counted["cut"]
    assert "length" in _mistake(without, *asked)
    assert json.loads(_run(without, "--batch-size", 4, "--json").stdout)["parts"][0]["length"] is None
    assert "'source'" in _mistake(scores, *asked, "--lengths", "source")


def test_several_scores_are_combined_by_name(scores: Path, data: Path, tmp_path: Path) -> None:
    other = _scores(tmp_path / "other", ROWS, HARD[::-1])
    asked = ["--data", data, "--batch-size", N, "--json"]
    first = json.loads(_run(f"a={scores}", f"b={other}", *asked, "--weight", "a=1000", "--weight", "b=1").stdout)
    assert first["scores"] == {"a": "length", "b": "length"}
    out = tmp_path / "plan"
    _run(scores, other, "--batch-size", N, "--weight", "scores=1000", "--weight", "other=1", "--out", out)
    rows = CurriculumPlan.open(out).batch(0).tolist()
    assert [HARD[row] for row in rows] == sorted(HARD)
    assert "Did you mean" in _mistake(scores, other, "--batch-size", 4, "--combination", "rank_avg")
    assert "weights lack other" in _mistake(scores, other, "--batch-size", 4, "--weight", "scores=1")
    assert "weigh several" in _mistake(scores, "--batch-size", 4, "--weight", "scores=1")
    assert "two scores are called 'scores'" in _mistake(scores, scores, "--batch-size", 4)


def test_a_path_that_exists_is_no_name(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named_paths([str(odd)]) == {"a=b": str(odd)}
    assert named_paths(["a=b=c", "x/y.parquet"]) == {"a": "b=c", "y": "x/y.parquet"}


def test_groups_that_are_shown_do_not_change_the_plan(scores: Path, data: Path) -> None:
    asked = [scores, "--data", data, "--batch-size", 6, "--stages", 2, "--json"]
    plain, shown = json.loads(_run(*asked).stdout), json.loads(_run(*asked, "--show-groups", "source").stdout)
    assert plain["fingerprint"] == shown["fingerprint"]
    assert plain["parts"][0]["groups"] is None
    assert shown["group_names"] == ["code", "web"]
    assert shown["group_shares"] == pytest.approx([1 / 3, 2 / 3])
    assert json.loads(_run(*asked, "--groups", "source").stdout)["fingerprint"] != plain["fingerprint"]


def test_rows_that_a_pool_never_shows_are_reported(scores: Path, data: Path) -> None:
    asked = [scores, "--batch-size", 4, "--mode", "pool", "--pacing", "linear:start=0.1", "--steps", 20]
    found = json.loads(_run(*asked, "--json").stdout)
    ours = plan_curriculum(Scores.load(scores), batch_size=4, mode="pool", pacing="linear:start=0.1", steps=20)
    drawn = [int(row) for k in range(20) for row in ours.batch(k)]
    assert found["coverage"]["never"] == pytest.approx(1 - len(set(drawn)) / N)
    assert found["coverage"]["most"] == max(drawn.count(row) for row in drawn)
    sentence = f"{100 * found['coverage']['never']:.2f} % of the examples are never seen in an epoch (counted)"
    assert sentence in _run(*asked).stdout


def test_scores_of_more_rows_and_rows_without_a_score_are_counted(tmp_path: Path) -> None:
    scores = _scores(tmp_path / "scores", ROWS, [float("nan")] * 4 + HARD[4:])
    found = json.loads(
        _run(scores, "--data", _write(tmp_path / "few.jsonl", ROWS[:50]), "--batch-size", 5, "--json").stdout
    )
    assert [found["rows"], found["unused_scores"], found["unscored"]] == [50, 10, 4]
    assert found["parts"][-1]["unscored"] == pytest.approx(4 / 5)
    printed = _run(scores, "--batch-size", 5).stdout
    assert "rows without a score: 4 (they come last)" in printed
    assert "no score" in printed
    first = json.loads(_run(scores, "--batch-size", 5, "--unscored", "first", "--json").stdout)
    assert first["parts"][0]["unscored"] > 0
    assert "4 of 60 rows have no score" in _mistake(scores, "--batch-size", 5, "--unscored", "error")


def test_one_row_and_rows_without_any_score_under_a_shuffle(tmp_path: Path) -> None:
    one = _scores(tmp_path / "one", ROWS[:1], [3.0], [4])
    found = json.loads(_run(one, "--batch-size", 1, "--json", "--draw", tmp_path / "one.png").stdout)
    assert [found["rows"], found["batches"], len(found["parts"])] == [1, 1, 1]
    nothing = _scores(tmp_path / "nothing", ROWS, [float("nan")] * N)
    found = json.loads(
        _run(nothing, "--batch-size", 8, "--schedule", "shuffle", "--json", "--draw", tmp_path / "nothing.png").stdout
    )
    assert found["parts"][0]["difficulty"] is None


POOL = ["--batch-size", "4", "--mode", "pool", "--pacing", "linear", "--steps", "9"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "4", "--schedule", "sortd"], "Did you mean 'sorted'"),
        (["--batch-size", "4", "--direction", "hard_to_esy"], "Did you mean 'hard_to_easy'"),
        (["--batch-size", "4", "--mode", "pol"], "Did you mean 'pool'"),
        (["--batch-size", "4", "--stages", "4", "--pacing", "rot:start=0.2"], "Did you mean 'root'"),
        (["--batch-size", "4", "--stages", "4", "--pacing", "root:begin=0.2"], "setting of a pacing"),
        (["--batch-size", "4", "--stages", "4", "--pacing", "root:start=1.5"], "above 0 and at most 1"),
        (["--batch-size", "4", "--pacing", "root:start=0.2"], "stages=100"),
        ([], "exactly one"),
        (["--batch-size", "4", "--batch-tokens", "100"], "exactly one"),
        (["--batch-size", "61"], "above the 60 rows"),
        (["--batch-size", "0"], "at least 1"),
        (["--batch-size", "4", "--stages", "99"], "99 stages do not fit"),
        (["--batch-size", "4", "--mode", "pool", "--steps", "5"], "needs a pacing"),
        ([*POOL, "--quota", "web"], "--quota web=0.7"),
        ([*POOL, "--quota", "web=lots"], "NAME=NUMBER"),
        ([*POOL, "--quota", "web=0.5", "--quota", "web=0.5"], "twice"),
        (["--batch-size", "4", "--quota", "web=1"], "one pass"),
        (["--batch-size", "4", "--draw", "plan.bmp"], "png, pdf, svg"),
        (["--batch-size", "4", "--groups", "source"], "--data"),
        (["--batch-size", "4", "--lengths", "tokens"], "--data"),
        (["--batch-size", "4", "--combination", "mean"], "rank_average"),
        (["--batch-size", "4", "--compare", "plan"], "--draw"),
        (["--batch-size", "4", "--compare", "absent", "--draw", "plan.png"], "no curriculum plan"),
        (["--batch-size", "4", "--epoch", "-1"], "epochs count from 0"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(arguments: list[str], message: str, scores: Path) -> None:
    assert message in _mistake(scores, *arguments)


def test_fields_and_quotas_that_the_data_does_not_have(scores: Path, data: Path) -> None:
    asked = [scores, "--data", data, "--batch-size", 4]
    assert "Did you mean 'source'" in _mistake(*asked, "--groups", "sorce")
    assert "'empty'" in _mistake(*asked, "--groups", "empty")
    pool = [*asked, "--mode", "pool", "--pacing", "linear", "--steps", 9, "--groups", "source"]
    assert "unknown group in quotas 'books'" in _mistake(*pool, "--quota", "web=0.5", "--quota", "books=0.5")
    assert "no share for the group(s) code" in _mistake(*pool, "--quota", "web=1")


def test_scores_that_do_not_fit(tmp_path: Path, scores: Path, data: Path) -> None:
    few = _scores(tmp_path / "few", ROWS[:50], HARD[:50])
    assert "10 of 60 rows have no score" in _mistake(few, "--data", data, "--batch-size", 4)
    assert "numbers of rows differ" in _mistake(few, scores, "--batch-size", 4)
    nan = _scores(tmp_path / "nan", ROWS, [float("nan")] * N)
    assert "every difficulty is NaN" in _mistake(nan, "--batch-size", 4)
    same = _scores(tmp_path / "same", ROWS, [2.0] * N)
    assert "same difficulty" in _mistake(same, "--batch-size", 4)
    empty = tmp_path / "empty.parquet"
    Scores(pa.Table.from_pylist([], schema=scores_schema([])), {"scorer": "length"}).to_parquet(empty)
    assert "no rows" in _mistake(empty, "--batch-size", 4)
    changed = _write(tmp_path / "changed.jsonl", [{**row, "text": "else"} for row in ROWS[:3]])
    strict = tmp_path / "strict.parquet"
    Scores(Scores.load(scores).table, {"scorer": "length", "id_column": "id", "content": ["text"]}).to_parquet(strict)
    assert "is not the row that was scored" in _mistake(strict, "--data", changed, "--batch-size", 1)


def test_paths_of_other_files_are_refused(tmp_path: Path, scores: Path, data: Path) -> None:
    assert "lacks the column" in _mistake(data, "--batch-size", 4)
    (tmp_path / "nothing").mkdir()
    assert "nothing" in _mistake(tmp_path / "nothing", "--batch-size", 4)
    assert "absent" in _mistake(tmp_path / "absent", "--batch-size", 4)
    out = tmp_path / "plan"
    _run(scores, "--batch-size", 4, "--out", out)
    assert "another plan" in _mistake(scores, "--batch-size", 5, "--out", out)
    assert "is a curriculum plan" in _mistake(out, "--batch-size", 4)
    assert "holds the scores" in _mistake(scores, "--batch-size", 4, "--out", scores)
    assert "is a file" in _mistake(scores, "--batch-size", 4, "--out", data)
    assert "rows.jsonl" in _mistake(scores, "--data", tmp_path / "row.jsonl", "--batch-size", 4)


def test_saved_plans_are_drawn_next_to_this_one(scores: Path, data: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "plain", tmp_path / "figure.svg"
    _run(scores, "--batch-size", 4, "--schedule", "shuffle", "--out", out)
    asked = [scores, "--data", data, "--batch-size", 6, "--show-groups", "source", "--draw", figure]
    _run(*asked, "--compare", out, "--compare", f"again={out}")
    drawn = figure.read_text(encoding="utf-8")
    assert all(name in drawn for name in ("this plan", "plain", "again", "web", "code"))
    few = _scores(tmp_path / "few", ROWS[:50], HARD[:50])
    assert "for the 60 rows" in _mistake(
        few,
        "--batch-size",
        5,
        "--compare",
        out,
        "--draw",
        figure,
        "--data",
        _write(tmp_path / "few.jsonl", ROWS[:50]),
        "--show-groups",
        "source",
    )


def test_a_missing_matplotlib_is_reported_before_any_work(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SparsortError, match=r"sparsort\[plots\]"):
        make_plan(
            tmp_path / "absent",
            settings=CurriculumSettings(batch_size=4),
            options=PlanOptions(draw=tmp_path / "plan.png"),
        )
    assert make_plan(scores, settings=CurriculumSettings(batch_size=4)).figure is None


def test_the_example_of_the_help_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsort.recipes.cli.commands.plan import EXAMPLE

    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(root / "examples")
    for command in EXAMPLE.split("`")[1::2]:
        result = CliRunner().invoke(app, command.split()[1:])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_planning_does_not_import_torch(scores: Path) -> None:
    code = (
        "import sys; from sparsort.recipes.plan import make_plan; "
        "from sparsort.curriculum.loading.plan.settings import CurriculumSettings; "
        f"make_plan({str(scores)!r}, settings=CurriculumSettings(batch_size=4)); "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_describes_itself_as_the_command_prints_it(tmp_path: Path) -> None:
    rows = [
        {"id": f"r{place}", "hard": float(place % 7), "other": float(place % 5), "kind": "ab"[place % 2]}
        for place in range(40)
    ]
    for name, column in (("first", "hard"), ("second", "other")):
        ColumnScorer(column).score(rows, out=tmp_path / name)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores, out = [tmp_path / "first", tmp_path / "second"], tmp_path / "plan"
    printed = run(
        "plan", *scores, "--data", data, "--batch-size", "4", "--stages", "2", "--out", out, "--groups", "kind"
    ).stdout
    plan = CurriculumPlan.open(out)
    assert printed.replace("\n", " ").split("Plan:")[0].split() == plan.describe().split()
    assert "rank_average of their percentiles" in plan.describe()
    assert "epoch 1" in plan.describe(epoch=1)
    assert repr(plan).startswith("CurriculumPlan(40 rows in 10 batches an epoch; sorted")
