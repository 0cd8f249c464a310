"""The command line as a script and a person meet it: output, exit codes, messages, interrupts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import run
from handshake import Child

from sparsort.scoring.store.scores import Scores

ROWS = [{"id": f"q{n}", "question": f"How many apples are left of {n}?", "answer": str(n)} for n in range(12)]
PROMPT = r"Question: {question}\nAnswer:"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> str:
    return str(make_tiny_model("llama"))


def test_score_writes_a_folder_and_prints_one_object(file: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    result = run("score", file, "--model", model, "--prompt", PROMPT, "--out", out, "--json")
    summary = json.loads(result.stdout)
    assert summary["status"] == {"ok": 12}
    assert summary["provenance"]["prompt"]["turns"] == [["text", "Question: {question}\nAnswer:"]]
    scores = Scores.load(out)
    assert scores.ids == [row["id"] for row in ROWS]
    again = run("score", file, "--model", model, "--prompt", PROMPT, "--out", out)
    assert "12 of 12 rows scored" in again.stdout
    other = run("score", file, "--model", model, "--prompt", PROMPT, "--out", out, "--site", "post_norm", code=2)
    assert "site" in other.stderr


def test_rows_without_a_score_are_told_and_strict_fails(model: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Paris"}\n{"question": ""}\n', encoding="utf-8")
    result = run("score", path, "--model", model, "--prompt", PROMPT)
    assert "1 of 2 rows have no score: 1 empty" in result.stderr
    run("score", path, "--model", model, "--prompt", PROMPT, "--strict", code=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "{qestion}"], "Did you mean 'question'"),
        (["--prompt", "no field"], "uses no field"),
        ([], "id, question, answer"),
        (["--prompt", PROMPT, "--metric", "ginni"], "Did you mean 'gini'"),
        (["--prompt", PROMPT, "--site", "prenorm"], "Did you mean 'pre_norm'"),
        (["--prompt", PROMPT, "--scorer", "sparsty"], "Did you mean 'sparsity'"),
        (["--prompt", PROMPT, "--truncation", "both"], "unknown truncation"),
        (["--prompt", PROMPT, "--id-column", "idd"], "idd"),
        (["--prompt", PROMPT, "--scorer", "answer_loss"], "--answer"),
        (["--prompt", PROMPT, "--shard-rows", "0"], "shard_rows"),
        (["--prompt", PROMPT, "--token-budget", "0"], "token_budget"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(arguments: list[str], message: str, file: Path, model: str) -> None:
    result = run("score", file, "--model", model, *arguments, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_the_scorer_column_asks_for_its_column(file: Path) -> None:
    assert "--column NAME" in run("score", file, "--scorer", "column", code=2).stderr


def test_a_folder_without_a_model_and_a_missing_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in run("score", file, "--model", tmp_path / "empty", "--prompt", PROMPT, code=2).stderr
    assert "rows.jsonl" in run("score", tmp_path / "row.jsonl", "--prompt", PROMPT, code=2).stderr


def test_order_prints_the_prompt_and_one_object(file: Path, model: str, tmp_path: Path) -> None:
    asked = ["order", file, "--model", model, "--query", "How many pears are left?"]
    found = json.loads(run(*asked, "--json", "--out", tmp_path / "prompt.txt").stdout)
    assert sorted(demo["id"] for demo in found["demonstrations"]) == sorted(row["id"] for row in ROWS)
    difficulties = [demo["difficulty"] for demo in found["demonstrations"]]
    assert difficulties == sorted(difficulties, reverse=True)
    assert found["prompt"].endswith("Question: How many pears are left?\nAnswer:")
    assert (tmp_path / "prompt.txt").read_text(encoding="utf-8") == found["prompt"]
    assert found["prompt"] in run(*asked).stdout


@pytest.mark.parametrize(
    "select", ["random", "first", "bm25", "knn", "mmr", "kdpp", "vote_k", "spread", "difficulty_matched"]
)
def test_every_selection_runs(select: str, file: Path, model: str) -> None:
    found = json.loads(
        run("order", file, "--model", model, "-q", "How many pears?", "-k", 2, "--select", select, "--json").stdout
    )
    assert len(found["demonstrations"]) == 2


def test_scores_made_before_are_used(file: Path, model: str, tmp_path: Path) -> None:
    run(
        "score",
        file,
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--out",
        tmp_path / "s",
        "--scorer",
        "answer_loss",
        "-a",
        " {answer}",
    )
    asked = ["order", file, "-q", "How many pears?", "--scores", tmp_path / "s", "--json"]
    found = json.loads(run(*asked, "--order", "perplexity_ascending").stdout)
    scores = Scores.load(tmp_path / "s")
    assert [demo["id"] for demo in found["demonstrations"]] == scores.ranked()
    assert "hard_to_easy" in run(*asked, "--order", "sparse_to_dense", code=2).stderr


def test_a_query_among_its_demonstrations_is_refused(file: Path, model: str) -> None:
    asked = ["order", file, "--model", model, "-q", "how many  apples are left of 3 ?"]
    assert "q3" in run(*asked, code=2).stderr
    run(*asked, "--allow-leaks")


def test_a_budget_drops_the_farthest_and_says_so(file: Path, model: str) -> None:
    asked = ["order", file, "--model", model, "-q", "How many pears?", "--order", "given"]
    found = json.loads(run(*asked, "--max-tokens", 80, "--json").stdout)
    kept = [demo["kept"] for demo in found["demonstrations"]]
    assert found["n_tokens"] <= 80
    assert kept == sorted(kept)
    assert 0 < sum(kept) < 12
    assert "dropped" in found["notes"][-1]
    assert "the query alone needs" in run(*asked, "--max-tokens", 3, code=2).stderr


def test_a_query_of_several_columns_is_json(file: Path, model: str) -> None:
    asked = ["order", file, "--model", model, "--prompt", "{question} {id}", "-q"]
    assert '"question": "…"' in run(*asked, "Paris", code=2).stderr
    assert "is not valid JSON" in run(*asked, "{question: 1}", code=2).stderr
    run(*asked, '{"question": "Paris", "id": "x"}')


@pytest.mark.demo_model
def test_env_names_the_model_and_the_reasons(demo_model: Path) -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["demo_model"] == str(demo_model)
    assert set(found["choices"]) == {"device", "dtype", "sparsity", "blocksparse"}
    assert all(choice["value"] and choice["reason"] for choice in found["choices"].values())
    assert str(demo_model) in run("env").stdout


# Scores four rows, which fill two shards of two, says so, and waits inside the fifth: an interrupt finds it there however loaded
# the machine is.
_WAITING = """
from handshake import hold
from sparsort.scoring.scorers import baselines
plain, scored = baselines.CompressionScorer.value, []
def value(self, row, text):
    if len(scored) == 4:
        hold("waiting")
    scored.append(row.id)
    return plain(self, row, text)
baselines.CompressionScorer.value = value
from sparsort.__main__ import main
main()
"""


def test_an_interrupt_keeps_what_is_done_and_the_same_command_resumes(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    command = ["score", str(file), "--scorer", "compression", "--prompt", "{question}"]
    command += ["--out", str(out), "--shard-rows", "2"]
    with Child(_WAITING, *command, stderr=subprocess.PIPE) as process:
        assert process.line() == "waiting"
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        errors = process.stderr.read()
        process.wait()
    assert process.returncode == 130, errors
    assert f"To resume from there, run the same command again: sparsort score {file}" in errors
    assert "Traceback" not in errors
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    assert sorted(before) == ["shard-00000.parquet", "shard-00001.parquet"]
    run(*command)
    assert Scores.load(out).ids == [row["id"] for row in ROWS]
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in before.items())


def test_a_reader_that_goes_away_is_no_error(file: Path) -> None:
    command = f"{sys.executable} -m sparsort score --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--select", "knn"], "needs the number of demonstrations"),
        (["--select", "knn", "--ids", "q1"], "--ids q1 names the demonstrations"),
        (["--scorer", "length", "--order", "sparse_to_dense"], "the same order is called 'hard_to_easy'"),
        (["--select", "knnn", "-k", "2"], "Did you mean 'knn'"),
        (["--order", "random:reverse"], "unknown order"),
    ],
)
def test_mistakes_in_order(arguments: list[str], message: str, file: Path, model: str) -> None:
    assert message in run("order", file, "--model", model, "-q", "How many pears?", *arguments, code=2).stderr


def test_selection_by_a_fitted_score_fits_on_the_pool(file: Path, model: str) -> None:
    asked = ["order", file, "--model", model, "-q", "How many pears are left?", "--outliers", "rms", "--json"]
    everything = json.loads(run(*asked).stdout)
    of_all = {demo["id"]: demo["difficulty"] for demo in everything["demonstrations"]}
    few = json.loads(run(*asked, "-k", 3, "--select", "difficulty_matched").stdout)
    for demo in few["demonstrations"]:
        assert demo["difficulty"] == pytest.approx(of_all[demo["id"]], rel=1e-3)


def test_scores_of_another_prompt_are_told(file: Path, model: str, tmp_path: Path) -> None:
    run("score", file, "--scorer", "random", "--prompt", "{question}", "--out", tmp_path / "s")
    found = json.loads(
        run(
            "order", file, "-q", "How many pears?", "--scores", tmp_path / "s", "--order", "easy_to_hard", "--json"
        ).stdout
    )
    assert "another prompt" in found["notes"][0]


def test_the_length_order_is_that_of_the_demonstration_in_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "long-id-" * 9, "question": "a", "answer": "b"}, {"id": "x", "question": "Paris is", "answer": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = json.loads(run("order", path, "-q", "Rome?", "--order", "length_ascending", "--json").stdout)
    assert [demo["id"] for demo in found["demonstrations"]] == ["long-id-" * 9, "x"]
