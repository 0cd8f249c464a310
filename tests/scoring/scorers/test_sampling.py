"""Fits on a sample of rows depend on the set of rows only, and not on their order, copies or file."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsort
from sparsort.errors import SparsortError
from sparsort.scoring.data.digests import SAMPLE_ROWS, digest_of, sample_by_digest
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.scorers import run_shards as engine
from sparsort.scoring.scorers import sparsity
from sparsort.scoring.scorers.base import Request
from sparsort.scoring.scorers.candidates import CandidateScorer
from sparsort.scoring.scorers.pooling import fit_outliers
from sparsort.scoring.store.scores import Scores

PROMPT = "Question: {question}\nAnswer:"
COUNT = SAMPLE_ROWS + 84


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """More rows than a sample has, the lengths of which rise, so that the first ones are not like the others."""
    return [{"id": f"q{n}", "question": f"{n} apples" + " and Rome" * (n // 60)} for n in range(COUNT)]


@pytest.fixture
def scorer(make_tiny_model: Callable[..., Path]) -> sparsort.SparsityScorer:
    return sparsort.SparsityScorer(str(make_tiny_model("llama")), outliers="rms", dtype="float32", device="cpu")


def _shuffled(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    return random.Random(seed).sample(list(rows), len(rows))


@given(
    digests=st.lists(st.integers(0, 40).map(lambda n: f"{n:032x}"), max_size=60),
    n=st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_the_sample_is_the_smallest_hashes_of_the_different_digests(digests: list[str], n: int, seed: int) -> None:
    found = sample_by_digest(((digest, digest) for digest in digests), n)
    keys = {
        digest: hashlib.blake2b(digest.encode(), digest_size=16, key=b"sparsort sample").hexdigest()
        for digest in digests
    }
    assert found == sorted(keys, key=keys.__getitem__)[:n]
    moved = random.Random(seed).sample(digests, len(digests))
    assert sample_by_digest(((digest, digest) for digest in moved), n) == found


def test_many_copies_of_a_row_take_one_place_in_the_sample(rows: list[dict[str, Any]]) -> None:
    question = {"question": "the same"}
    copies = [{"id": f"c{n}", **question} for n in range(COUNT)]
    source = open_rows(_shuffled(copies + rows, 0), content=["question"])
    texts = [row.fields["question"] for row in source.sample(COUNT)]
    assert len(set(texts)) == len(texts) == COUNT
    # A copy adds nothing, wherever it is.
    with_copies = [row.digest for row in source.sample(SAMPLE_ROWS)]
    once = open_rows([*rows, {"id": "c", **question}], content=["question"])
    assert [row.digest for row in once.sample(SAMPLE_ROWS)] == with_copies


def _forms(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The rows as every kind of source that is streamed differently."""
    folder.mkdir()
    lines = folder / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_csv(str(folder / "rows.csv"))
    table.to_parquet(str(folder / "rows.parquet"))
    return {
        "list": rows,
        "lines": lines,
        "csv": folder / "rows.csv",
        "parquet": folder / "rows.parquet",
        "table": table,
    }


def test_scores_do_not_depend_on_the_order_of_the_rows(
    scorer: sparsort.SparsityScorer, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = scorer.score(rows, PROMPT)
    of_id = dict(zip(whole.ids, whole.difficulty, strict=True))
    for seed, (form, data) in enumerate(_forms(_shuffled(rows, 1), tmp_path / "forms").items()):
        found = scorer.score(data, PROMPT, shard_rows=100 + seed)
        assert found.provenance["outliers"] == whole.provenance["outliers"], form
        np.testing.assert_allclose(found.difficulty, [of_id[name] for name in found.ids], rtol=1e-5, err_msg=form)
    first = scorer.score(rows[:SAMPLE_ROWS], PROMPT)
    assert first.provenance["outliers"]["scale"] != whole.provenance["outliers"]["scale"]


def test_every_candidate_is_fitted_on_the_same_sample(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    model = {"model": str(make_tiny_model("llama")), "dtype": "float32", "device": "cpu"}
    grid = {"sites": ["pre_norm"], "poolings": ["last", "mean_metric"], "outliers": ["rms", "drop:3"]}
    one, other = (CandidateScorer(**model, **grid).score(data, PROMPT) for data in (rows, _shuffled(rows, 2)))
    assert one.provenance["fits"] == other.provenance["fits"]
    assert len(one.provenance["fits"]) == 4
    for name in one.metrics:
        of_id = dict(zip(one.ids, one.column(name), strict=True))
        np.testing.assert_allclose(other.column(name), [of_id[key] for key in other.ids], rtol=1e-4, err_msg=name)


def test_the_ablations_rule_does_not_depend_on_the_order_of_the_pool(
    make_tiny_model: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    from sparsort.curriculum.ablation.recipe.ablation import Ablation
    from sparsort.curriculum.ablation.recipe.tasks import Task
    from sparsort.curriculum.ablation.run.model import Engine
    from sparsort.curriculum.ablation.store.order_notes import order_note, orders_of

    task = Task(name="t", prompt=PROMPT, answer=" {label}", labels={"a": "a", "b": "b"})
    ablation = Ablation(
        tasks=(task,), model=str(make_tiny_model("llama")), dtype="float32", device="cpu", outliers="rms"
    )
    asked = Engine(ablation)
    one, other = (asked.sparsity(task, rows[:5], pool) for pool in (rows, _shuffled(rows, 3)))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    # A note of a version that fitted on the first rows is not taken for one of this rule.
    from sparsort.curriculum.ablation.recipe.ablation import DemoSet
    from sparsort.curriculum.ablation.recipe.task_data import SetDemos

    shown = [{**row, "label": "a"} for row in rows[:2]]
    named = {"sparse_to_dense": np.array([[1, 0]]), "given": np.array([[0, 1]])}
    note = order_note(ablation, task, SetDemos(rows=shown, of_query=np.array([[0, 1]])), named, [])
    unit = DemoSet(task="t", selector="random", k=2, seed=0)
    assert set(orders_of(note, ablation, unit, [])) == {"sparse_to_dense", "given"}
    del note["sparsity"]["sampling"]
    assert set(orders_of(note, ablation, unit, [])) == {"given"}


def _by_position(rule: str, mean_square_H: Any, n_states: int) -> Any:
    """A fit as the version before recorded it."""
    fit = fit_outliers(rule, mean_square_H, n_states)
    del fit.record["sampling"]
    return fit


def _score_part(scorer: sparsort.SparsityScorer, rows: Any, out: Path, part: tuple[int, int]) -> None:
    prompt = Prompt.of(PROMPT)
    source = open_rows(rows, content=prompt.fields)
    job = scorer.prepare(source, Request(prompt_or_none=prompt, truncation="error", max_length=None), None)
    engine.run_part(source, job, out=out, part=part, shard_rows=100)


def test_runs_of_the_version_before_open_and_are_not_continued(
    scorer: sparsort.SparsityScorer, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsity, "fit_outliers", _by_position)
    before = scorer.score(rows, PROMPT, shard_rows=100, out=tmp_path / "whole")
    _score_part(scorer, rows, tmp_path / "half", (0, 2))
    monkeypatch.undo()
    assert "sampling" not in Scores.load(tmp_path / "whole").provenance["outliers"]
    again = scorer.score(rows, PROMPT, shard_rows=100, out=tmp_path / "whole")
    np.testing.assert_array_equal(again.difficulty, before.difficulty)
    # Its rule is used again where scores are to compare with these.
    like = scorer.score(rows[:2], PROMPT, like=again)
    np.testing.assert_allclose(like.difficulty, before.difficulty[:2], rtol=1e-5)
    assert like.provenance["outliers"] == before.provenance["outliers"]
    with pytest.raises(SparsortError, match=r"unfinished run.*order of the rows.*--out"):
        scorer.score(rows, PROMPT, shard_rows=100, out=tmp_path / "half")
    # One of this version is continued.
    _score_part(scorer, rows, tmp_path / "new", (0, 2))
    found = scorer.score(rows, PROMPT, shard_rows=100, out=tmp_path / "new")
    assert len(found) == COUNT
    assert found.provenance["outliers"]["sampling"] == "distinct rows by digest"


def test_a_digest_is_of_the_fields_that_the_prompt_reads(rows: list[dict[str, Any]]) -> None:
    renamed = [{**row, "id": f"other {row['id']}"} for row in rows]
    one, other = (open_rows(data, content=["question"]).sample(20) for data in (rows, renamed))
    assert [row.digest for row in one] == [row.digest for row in other]
    assert one[0].digest == digest_of({"question": one[0].fields["question"]})
