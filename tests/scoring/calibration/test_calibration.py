"""From a table of candidates to a calibration and its file, on tables made with a known truth; no model runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsort.errors import SparsortError
from sparsort.scoring.calibration.calibration import Calibration
from sparsort.scoring.calibration.compare import compare
from sparsort.scoring.calibration.definition import Definition
from sparsort.scoring.calibration.verdict import judge
from sparsort.scoring.data.rows import Row
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.scorers.candidates import Candidate
from sparsort.scoring.store.score_tables import score_table
from sparsort.scoring.store.scores import Scores

Array = NDArray[np.float64]
QUICK: dict[str, Any] = {"n_boot": 100, "n_perm": 39}
NAMES = [
    f"pre_norm/{pooling}/rms/{metric}" for pooling in ("last", "answer") for metric in ("gini", "hoyer", "l0_absolute")
]
N = 120


def _table(values: dict[str, Array], *, loss: Array | None = None, status: list[str] | None = None) -> Scores:
    rng = np.random.default_rng(99)
    rows = [Row(n, f"q{n}", {}, f"{n:032x}") for n in range(N)]
    status = status or ["ok"] * N
    extra: dict[str, Array] = (
        {} if loss is None else {"answer_loss": loss, "answer_tokens": rng.integers(1, 9, N) * 1.0}
    )
    first = next(iter(values.values()))
    table = score_table(
        rows,
        difficulty=np.where([state == "ok" for state in status], np.nan_to_num(first), np.nan),
        status=status,
        reason=["" if state == "ok" else "why" for state in status],
        n_tokens=rng.integers(5, 50, N),
        n_truncated=[0] * N,
        metrics=values | extra,
    )
    provenance = {
        "prompt": {"turns": [["text", "Q: {q}\nA:"]], "answer": " {a}"},
        "fits": {f"pre_norm/{p}/rms": {"rule": "rms", "n_states": 9, "scale": [0.5, 0.25]} for p in ("last", "answer")},
        "l0_threshold": 1.0,
        "weights": "sha256:" + "a" * 64,
        "tokenizer": "sha256:" + "b" * 64,
        "dtype": "bfloat16",
        "environment": {"model": "some/model"},
        "source": "list of 120 rows",
    }
    return Scores(table, provenance)


def _values(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=N) for name in NAMES}


@pytest.fixture(scope="module")
def found() -> Calibration:
    values = _values()
    loss = -values["pre_norm/last/rms/hoyer"] + 0.4 * np.random.default_rng(1).normal(size=N)
    values["pre_norm/last/rms/l0_absolute"] = np.ones(N)
    level = np.random.default_rng(2).integers(1, 6, N).astype(float)
    level[:7] = np.nan
    return compare(_table(values, loss=loss), {"level": level}, revision="main", notes=["a note"], **QUICK)


def test_the_score_to_use_is_the_one_that_follows_the_target(found: Calibration) -> None:
    made = found.definition
    assert (found.target, found.verdict) == ("loss", "carries difficulty")
    assert (made.candidate.name, made.orientation) == ("pre_norm/last/rms/hoyer", -1)
    assert made.fit["scale"] == [0.5, 0.25]
    assert (made.model, made.revision, made.answer) == ("some/model", "main", None)
    assert made.prompt == Prompt.of("Q: {q}\nA:")
    assert list(found.judgements) == ["loss", "level", "length"]
    assert found.judgements["level"].verdict == "carries nothing here"
    assert found.sentence().startswith("Carries difficulty: pre_norm/last/rms/hoyer, a lower value is harder")
    assert "no candidate follows level" in found.sentence("level")


def test_every_reference_has_its_own_rows_and_numbers(found: Calibration) -> None:
    assert [found.judgements[name].n_rows for name in found.judgements] == [120, 113, 120]
    assert found.left_out[0] == "a note"
    assert "pre_norm/last/rms/l0_absolute does not vary" in found.left_out
    best = found.best("loss", 2)
    assert best[0]["candidate"] == "pre_norm/last/rms/hoyer"
    assert abs(best[0]["fixed_rho"]) > abs(best[1]["fixed_rho"])
    assert best[0]["fixed_p"] == pytest.approx(1 / 40)
    assert found.best("length", 1)[0]["fixed_rho"] is None
    constant = found.candidates.index("pre_norm/last/rms/l0_absolute")
    assert np.isnan(found.judgements["loss"].associations.rho[constant])
    with pytest.raises(SparsortError, match="Did you mean 'level'"):
        found.best("lvl")


def test_references_of_the_same_rows_are_judged_as_each_alone() -> None:
    values = _values(3)
    level = np.random.default_rng(4).normal(size=N)
    table = _table(values)
    together = compare(table, {"level": level, "other": -level}, target="level", **QUICK)
    alone = judge(
        np.stack(list(values.values()), axis=1)[:, :3],
        level[:, None],
        table.column("n_tokens")[:, None].astype(float),
        np.zeros(3, dtype=np.int64),
        seed=0,
        **QUICK,
    )[0]
    np.testing.assert_allclose(together.judgements["level"].associations.fixed_rho[:3], alone.associations.fixed_rho)
    np.testing.assert_allclose(
        together.judgements["level"].associations.rho, -together.judgements["other"].associations.rho
    )


def test_the_length_held_fixed_is_that_of_what_a_candidate_reads() -> None:
    rng = np.random.default_rng(5)
    table = _table(_values(5), loss=rng.normal(size=N))
    answer_length = table.column("answer_tokens")
    values = {name: answer_length + 0.1 * rng.normal(size=N) for name in NAMES}
    found = compare(_table(values, loss=answer_length + 0.1 * rng.normal(size=N)), {}, **QUICK)
    fixed = np.abs(found.judgements["loss"].associations.fixed_rho)
    # The prompt's length explains nothing here, the answer's everything.
    assert fixed[:3].min() > 0.9
    assert fixed[3:].max() < 0.4


def test_rows_without_a_score_and_candidates_without_values_are_excluded() -> None:
    values = _values(6)
    values["pre_norm/answer/rms/gini"][:40] = np.nan
    values["pre_norm/answer/rms/hoyer"][:6] = np.nan
    level = np.random.default_rng(6).normal(size=N)
    found = compare(_table(values, status=["too_long"] * 3 + ["ok"] * (N - 3)), {"level": level}, **QUICK)
    assert found.judgements["level"].n_rows == N - 6
    assert found.left_out == ("pre_norm/answer/rms/gini has no value in more than a tenth of the rows",)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({}, "nothing to calibrate against"),
        ({"level": np.ones(N)}, "reference 'level': it is the same in every row"),
        (
            {"level": np.r_[np.arange(30.0), np.full(N - 30, np.nan)]},
            r"90 of 120 rows lack it.*30 rows can be compared",
        ),
        ({"level": np.full(N, np.nan)}, "0 rows can be compared"),
        ({"level": np.ones(3)}, "has 3 values, and there are 120 rows"),
    ],
)
def test_references_that_say_nothing(references: dict[str, Array], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        compare(_table(_values()), references, **QUICK)


def test_candidates_that_say_nothing() -> None:
    level = np.random.default_rng(0).normal(size=N)
    with pytest.raises(SparsortError, match=r"no row could be scored \(120 not_finite\)"):
        compare(
            _table({name: np.full(N, np.nan) for name in NAMES}, status=["not_finite"] * N), {"level": level}, **QUICK
        )
    with pytest.raises(SparsortError, match="no candidate has a value"):
        compare(_table({name: np.full(N, np.nan) for name in NAMES}), {"level": level}, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "lvel"}, "Did you mean 'level'"),
        ({"level": 1.0}, "between 0 and 1"),
        ({"n_boot": 10}, "at least 100 draws"),
        ({"n_perm": 38}, "at least 39 permutations"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        compare(_table(_values()), {"level": np.arange(N) * 1.0}, **QUICK | options)


# The file


def test_a_file_is_read_back(found: Calibration, tmp_path: Path) -> None:
    found.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert again.definition == found.definition
    assert again.definition.digest == found.definition.digest
    assert (again.target, again.candidates, list(again.left_out)) == (
        found.target,
        found.candidates,
        list(found.left_out),
    )
    assert again.sentence() == found.sentence()
    assert again.best("level") == found.best("level")
    again.save(tmp_path / "d.json")
    assert (tmp_path / "d.json").read_text() == (tmp_path / "c.json").read_text()
    held = json.loads((tmp_path / "c.json").read_text())
    assert (held["verdict"], held["sentence"]) == (found.verdict, found.sentence())


def test_a_missing_interval_is_a_sentence_in_the_summary_and_null_in_the_file(
    found: Calibration, tmp_path: Path
) -> None:
    loss = found.judgements["loss"]
    nothing = dict.fromkeys(("rho", "low", "high", "p"), np.nan)
    judged = replace(
        loss,
        verdict="carries length only",
        plain=replace(loss.plain, low=np.nan, high=np.nan, reason="all draws of the rows give the same number"),
        fixed=replace(loss.fixed, **nothing, holds=False, reason="a candidate does not vary"),
    )
    made = replace(found, judgements={**found.judgements, "loss": judged})
    assert "length held fixed unknown (a candidate does not vary)" in made.sentence()
    assert "(no interval: all draws of the rows give the same number), p = " in made.sentence()
    assert "nan" not in made.sentence()
    made.save(tmp_path / "c.json")
    held = json.loads((tmp_path / "c.json").read_text())["reference loss"]
    assert held["fixed"]["rho"] is held["fixed"]["low"] is held["plain"]["low"] is None
    assert held["fixed"]["reason"] == "a candidate does not vary"
    assert "was not compared" in held["associations"]["reason"]
    assert Calibration.load(tmp_path / "c.json").sentence() == made.sentence()
    # Files of version 1 have no reasons; every ρ in them is a number.
    old = {**found.to_dict(), "version": 1}
    for side in ("plain", "fixed"):
        del old["reference loss"][side]["reason"]
    assert Calibration.from_dict(old).judgements["loss"].fixed.reason == ""


def _without(found: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != key}


def test_files_that_are_not_a_calibration_are_refused(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(SparsortError, match="there is no calibration"):
        Calibration.load(path)
    found.save(path)
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "", "[1, 2", "\x00\x01"):
        path.write_text(text)
        with pytest.raises(SparsortError, match="cannot be read as a calibration"):
            Calibration.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SparsortError, match="cannot be read as a calibration"):
        Calibration.load(path)
    held = json.loads(whole)
    reference = held["reference loss"]
    broken: list[tuple[Any, str]] = [
        ([], "not a calibration of sparsort"),
        ({"format": "sparsort-scores"}, "not a calibration of sparsort"),
        (held | {"version": 3}, "has format version 3; this sparsort reads 1 and 2"),
        (_without(held, "version"), "is damaged: it has no format version. Calibrate again"),
        (held | {"n_rows": held["n_rows"] + 1}, "has changed since it was written"),
        (_without(held, "digest"), "has changed since it was written"),
        (held | {"verdict": "carries nothing here"}, "is damaged"),
        (_without(held, "definition"), "is damaged"),
        (_without(held, "reference loss"), "is damaged"),
        (held | {"definition": _without(held["definition"], "weights")}, "is damaged"),
        (held | {"definition": held["definition"] | {"candidate": "gini"}}, "is damaged"),
        (held | {"candidates": held["candidates"][:-1]}, "is damaged"),
        (held | {"left_out": None}, "left_out is of type NoneType, not list"),
        (held | {"n_rows": True}, "n_rows is of type bool, not int"),
        *(
            (
                held | {"definition": held["definition"] | {name: value}},
                f"{name} is of type {type(value).__name__}, not ",
            )
            for name, value in (("l0_threshold", "x"), ("model", 5), ("answer", 5), ("fit", [1]), ("tokenizer", None))
        ),
        (held | {"reference loss": reference | {"verdict": "yes"}}, "is damaged"),
        (held | {"reference loss": reference | {"best": 99}}, "is damaged"),
        (held | {"reference loss": reference | {"fixed": {"rho": 1}}}, "is damaged"),
    ]
    for value, message in broken:
        path.write_text(json.dumps(value))
        with pytest.raises(SparsortError, match=message):
            Calibration.load(path)


# What a definition refuses


def _definition(**changes: Any) -> Definition:
    made = Definition(
        candidate=Candidate(site="pre_norm", pooling="last", outliers="none", metric="gini"),
        orientation=1,
        fit={"rule": "none"},
        l0_threshold=1.0,
        turns=(("text", "Q: {q}"),),
        answer=None,
        model="some/model",
        revision=None,
        weights="sha256:1",
        tokenizer="sha256:2",
        dtype="float32",
    )
    return replace(made, **changes)


def test_a_digest_changes_with_what_changes_a_number_only() -> None:
    made = _definition()
    for name, value in {
        "orientation": -1,
        "fit": {"rule": "drop:1", "n_states": 3, "dims": [2]},
        "l0_threshold": 0.5,
        "turns": (("text", "{q}"),),
        "answer": " {a}",
        "weights": "sha256:3",
        "tokenizer": "sha256:3",
    }.items():
        assert _definition(**{name: value}).digest != made.digest, name
    assert _definition(model="a copy", revision="main", dtype="bfloat16").digest == made.digest


def test_another_prompt_or_model_is_refused_with_what_to_do() -> None:
    made = _definition()
    made.refuse_other_prompt(Prompt.of("Q: {q}"))
    with pytest.raises(
        SparsortError, match=r"'Q: \{q\}'.*'Question: \{q\}'.*omit prompt \(--prompt\) and messages \(--messages\)"
    ):
        made.refuse_other_prompt(Prompt.of("Question: {q}"))
    with pytest.raises(SparsortError, match="for the prompt 'Q"):
        made.refuse_other_prompt(Prompt.of("Q: {q}", chat=True))
    with pytest.raises(SparsortError, match=r"reads the prompt alone.*omit the answer"):
        made.refuse_other_prompt(Prompt.of("Q: {q}", answer=" {a}"))
    with pytest.raises(SparsortError, match="pass that answer"):
        _definition(answer=" {a}").refuse_other_prompt(Prompt.of("Q: {q}"))
    made.refuse_other_model("a copy", "sha256:1", "sha256:2")
    with pytest.raises(SparsortError, match=r"for the model 'some/model'.*'x' has different weights.*--model"):
        made.refuse_other_model("x", "sha256:9", "sha256:2")
    with pytest.raises(SparsortError, match=r"at revision main.*tokenizer"):
        _definition(revision="main").refuse_other_model("x", "sha256:1", "sha256:9")
