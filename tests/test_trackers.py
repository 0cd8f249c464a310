"""Progress reported to trackers: TensorBoard's own event files, and substitutes for wandb and trackio with their interface."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsort import LengthScorer, ablate
from sparsort.errors import SparsortError
from sparsort.trackers import Meter, check_trackers, tracked, tracker_names

ROWS = [{"text": "word " * (n + 1)} for n in range(10)]


class _Substitute:
    """A module with `init` and `finish`, whose runs have `log`, as wandb and trackio have; everything is recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *, fails_at: int | None = None) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.is_finished = False
        self.fails_at = fails_at
        module = types.ModuleType(name)
        vars(module).update(init=self._init, finish=self._finish, run=None)
        monkeypatch.setitem(sys.modules, name, module)
        self.module = module

    def _init(self, **options: Any) -> _Substitute:
        sys.stdout.write("a banner\n")
        self.started.append(options)
        return self

    def log(self, values: dict[str, float], step: int = -1) -> None:
        if len(self.logged) == self.fails_at:
            raise ConnectionError("the server is gone\nand more")
        self.logged.append((step, values))

    def _finish(self) -> None:
        self.is_finished = True


def _events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in TensorBoard's event files, by name, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("none", ()),
        ("", ()),
        ([], ()),
        ("tensorboard", ("tensorboard",)),
        ("wandb, trackio,wandb", ("wandb", "trackio")),
        (["trackio", "none"], ("trackio",)),
    ],
)
def test_names_are_read_from_a_text_or_a_list(given: Any, names: tuple[str, ...]) -> None:
    assert tracker_names(given) == names


def test_an_unknown_or_missing_tracker_is_an_error_before_any_row_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # None makes the import fail as if the package were not installed.
    monkeypatch.setitem(sys.modules, "wandb", None)
    unreadable: Any = object()
    with pytest.raises(SparsortError, match=r"wandb is needed for report_to='wandb'\. Install it with: pip install"):
        LengthScorer("characters").score(unreadable, report_to="wandb")
    with pytest.raises(SparsortError, match=r"unknown tracker for report_to 'tensorbord'\. Did you mean 'tensorboard'"):
        ablate(unreadable, out="nowhere", report_to="tensorbord")
    assert check_trackers("none") == ()


def test_a_score_reports_rows_and_statuses_to_tensorboard(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*ROWS, {"text": None}]
    LengthScorer("characters").score(rows, "{text}", out=tmp_path / "scores", shard_rows=4, report_to="tensorboard")
    scalars = _events(tmp_path / "scores.runs")
    assert scalars["progress/rows"] == [(4, 4.0), (8, 8.0), (11, 11.0)]
    assert scalars["status/ok"] == [(4, 4.0), (8, 8.0), (11, 10.0)]
    [failures] = [values for name, values in scalars.items() if name.startswith("status/") and name != "status/ok"]
    assert failures == [(11, 1.0)]
    assert all(rate > 0 for _, rate in scalars["progress/rows_per_second"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_settings_and_the_progress_and_print_nothing_to_stdout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    substitute = _Substitute(monkeypatch, name)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    LengthScorer("characters").score(ROWS, "{text}", out=tmp_path / "scores", report_to=name)
    [options] = substitute.started
    assert (options["project"], options["name"]) == ("mine", "score")
    assert options["config"]["scorer"] == "length"
    assert [(step, values["progress/rows"], values["status/ok"]) for step, values in substitute.logged] == [
        (10, 10, 10)
    ]
    assert substitute.is_finished
    assert capsys.readouterr() == ("", "a banner\n")


def test_a_run_of_wandb_that_the_caller_started_is_used_and_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    substitute = _Substitute(monkeypatch, "wandb")
    vars(substitute.module)["run"] = substitute
    LengthScorer("characters").score(ROWS, "{text}", report_to="wandb")
    # At the steps of the caller's run, which counts them by itself.
    assert [(step, values["progress/rows"]) for step, values in substitute.logged] == [(-1, 10)]
    assert substitute.started == []
    assert not substitute.is_finished


def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_work_continues(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing, sound = _Substitute(monkeypatch, "wandb", fails_at=1), _Substitute(monkeypatch, "trackio")
    monkeypatch.setattr(Path, "mkdir", lambda *_args, **_options: None)
    with caplog.at_level(logging.WARNING, logger="sparsort"):
        scores = LengthScorer("characters").score(ROWS, "{text}", shard_rows=3, report_to=["wandb", "trackio"])
    assert len(scores) == 10
    assert [step for step, _ in failing.logged] == [3]
    assert [step for step, _ in sound.logged] == [3, 6, 9, 10]
    assert caplog.messages == ["wandb failed, and nothing more is reported to it: the server is gone"]
    assert not failing.is_finished


def test_an_error_in_the_work_still_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    substitute = _Substitute(monkeypatch, "trackio")
    with pytest.raises(KeyboardInterrupt), tracked("trackio", "score"):
        raise KeyboardInterrupt
    assert substitute.is_finished


def test_a_meter_reports_at_most_once_a_second_with_the_rate_since_the_last_report() -> None:
    now, reports = [0.0], []
    meter = Meter(lambda values, step: reports.append((step, dict(values))), "rows", clock=lambda: now[0])
    for now[0], count in ((0.5, 4), (2.0, 6), (2.5, 10)):
        meter.advance(count)
    assert reports == [(10, {"progress/rows": 10, "progress/rows_per_second": 5.0})]
    meter.count({"status/ok": 20})
    now[0] = 4.0
    meter.report({"tokens": 7})
    rates = {"progress/rows": 20, "progress/rows_per_second": 5.0}
    assert reports[1:] == [(20, {**rates, "status/ok": 20, "tokens": 7})]


def test_an_ablation_reports_its_estimates_after_every_set(
    tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    rows = [{"id": f"r{n}", "text": f"film number {n}", "label": ("good", "bad")[n % 2]} for n in range(40)]
    data = tmp_path / "films.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"name": "films", "prompt": "Film: {text}\nMark:", "answer": " {label}", "train": str(data)}
    report = ablate(
        {"tasks": [{**task, "labels": {"good": "good", "bad": "bad"}}], "model": str(make_tiny_model("llama"))},
        out=tmp_path / "out",
        report=False,
        report_to="tensorboard",
        **{"shots": (2,), "sets": 2, "orderers": ("length_ascending",), "choosers": (), "dev_rows": 4},
    )
    scalars = _events(tmp_path / "out" / "runs")
    assert scalars["progress/sets"] == [(1, 1.0), (2, 2.0)]
    assert scalars["progress/tokens_read"][-1] == (2, report.tokens_read)
    for cell in report.results.cells:
        place = f"films/{cell.selector}/k2{'/contextual' if cell.contextual else ''}"
        random = float(np.mean([arm.correct for arm in cell.random]))
        [arm] = [arm for arm in cell.arms if arm.name == "length_ascending"]
        assert scalars[f"{place}/random_accuracy"][-1][1] == pytest.approx(random)
        difference = float(arm.correct.mean()) - random
        assert scalars[f"{place}/difference/length_ascending"][-1][1] == pytest.approx(difference, abs=1e-6)
