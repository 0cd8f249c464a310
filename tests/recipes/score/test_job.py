"""`recipes.score.job`: parts, and shards of a job in any process, give the table of one process, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from command_line import run

import sparsort
from sparsort.errors import SparsortError
from sparsort.recipes.score import job as module
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.job import ScoreJob, part_from_environment, run_shards
from sparsort.recipes.score.score import score_file
from sparsort.scoring.data.readers import TextReader
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.scorers.run_shards import Coverage

PROMPT = PromptSpec("Question: {question}\nAnswer:")
SHARD_ROWS = 8
ROWS = [{"id": f"q{n}", "question": f"{n} apples" + " and Rome" * (n % 7)} for n in range(60)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def scorer(make_tiny_model: Callable[..., Path]) -> ScorerConfig:
    model = ModelSpec(str(make_tiny_model("llama")), dtype="float32", device="cpu")
    return ScorerConfig(model=model, outliers="rms")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_job(file: Path, scorer: ScorerConfig, out: Path) -> ScoreJob:
    return ScoreJob(file=file, scorer=scorer, prompt=PROMPT, out=out, shard_rows=SHARD_ROWS)


def test_every_division_gives_the_same_folder(file: Path, scorer: ScorerConfig, tmp_path: Path) -> None:
    whole = score_file(file, scorer=scorer, prompt=PROMPT, out=tmp_path / "whole", shard_rows=SHARD_ROWS)
    expected = contents(tmp_path / "whole")
    assert whole.scores.ids == [row["id"] for row in ROWS]
    live = scorer.load()
    for n in (1, 2, 3, 5, 9):
        out, order = tmp_path / f"parts-{n}", [*range(n)][::-1]
        for k in order:
            # One half of the parts is scored by a scorer in memory, the other by the recipe.
            if k % 2:
                options: dict[str, Any] = {"out": out, "shard_rows": SHARD_ROWS, "part": (k, n)}
                coverage = live.score(file, PROMPT, **options)
            else:
                coverage = score_file(file, scorer=scorer, prompt=PROMPT, out=out, shard_rows=SHARD_ROWS, part=(k, n))
            assert coverage.complete == (k == 0)
            assert coverage.scored == len(range(k, 8, n))
        assert contents(out) == expected, n
        assert coverage.load().ids == whole.scores.ids


def test_shards_of_a_pickled_job_in_any_order(file: Path, scorer: ScorerConfig, tmp_path: Path) -> None:
    score_file(file, scorer=scorer, prompt=PROMPT, out=tmp_path / "whole", shard_rows=SHARD_ROWS)
    job = ForkingPickler.loads(ForkingPickler.dumps(make_job(file, scorer, tmp_path / "out")))
    assert run_shards(job, [5, 2]) == Coverage(
        folder=tmp_path / "out", total=8, done=2, scored=2, kept=0, complete=False
    )
    assert run_shards(job, [2, 7, 0]).kept == 1
    with pytest.raises(SparsortError, match=r"there is no shard 8: .*rows.jsonl has 8 shards, counted from 0"):
        run_shards(job, [8])
    assert run_shards(job, range(8)).complete
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_model_is_loaded_once_for_all_calls(
    file: Path, scorer: ScorerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    real = ScoreJob.load
    monkeypatch.setattr(ScoreJob, "load", lambda self, text: loads.append(self.out) or real(self, text))
    monkeypatch.setattr(module, "_last", None)
    one, other = make_job(file, scorer, tmp_path / "one"), make_job(file, scorer, tmp_path / "other")
    for number in range(3):
        run_shards(one, [number])
    run_shards(other, [0])
    assert loads == [tmp_path / "one", tmp_path / "other"]


def test_one_process_checks_the_rows_and_the_others_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"question": "{n} apples"}}\n' for n in range(8 * 1024)), encoding="utf-8")
    read: list[int] = []
    real = TextReader._units

    def units(self: TextReader, start: int) -> Any:
        for unit in real(self, start):
            read.append(start)
            yield unit

    monkeypatch.setattr(TextReader, "_units", units)
    scorer = ScorerConfig(scorer="compression")
    for k in range(4):
        read.clear()
        score_file(file, scorer=scorer, prompt=PROMPT, out=tmp_path / "out", shard_rows=1024, part=(k, 4))
        # Two shards, and a few looks at the first record. The first process has read the file twice before.
        assert len(read) - 2 * 1024 <= (10 if k else 2 * 8 * 1024 + 10)
    assert sparsort.Scores.load(tmp_path / "out").ids == [str(n) for n in range(8 * 1024)]


def test_rows_that_changed_after_the_check_are_noticed(file: Path, tmp_path: Path) -> None:
    scorer = ScorerConfig(scorer="compression")
    options: dict[str, Any] = {"scorer": scorer, "prompt": PROMPT, "out": tmp_path / "out", "shard_rows": SHARD_ROWS}
    score_file(file, **options, part=(0, 2))
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([lines[0].replace("apples", "pears"), *lines[1:]]), encoding="utf-8")
    with pytest.raises(SparsortError, match=r"the data has changed since shard-00000\.parquet was scored"):
        score_file(file, **options, part=(0, 2))
    # Another file of the same size and time is another file.
    file.write_text("".join(lines), encoding="utf-8")
    assert score_file(file, **options, part=(1, 2)).complete


def test_settings_of_the_file_are_part_of_what_is_restored(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("".join(f"a{n},b{n}\n" for n in range(40)), encoding="utf-8")
    seen = open_rows(file, columns=["question", "other"]).snapshot()
    same, swapped, named = (
        open_rows(file, columns=columns, id_column=name)
        for columns, name in (
            (["question", "other"], None),
            (["other", "question"], None),
            (["question", "other"], "other"),
        )
    )
    assert [source.restore(seen) for source in (same, swapped, named)] == [True, False, False]
    assert same.count() == 40
    assert next(iter(same.rows(30))).fields == {"question": "a30", "other": "b30"}


def test_a_failed_start_leaves_no_folder(file: Path, scorer: ScorerConfig, tmp_path: Path) -> None:
    for wrong in (PromptSpec("{qestion}"), PROMPT):
        bad = ScorerConfig(model=ModelSpec(str(tmp_path / "nowhere")))
        with pytest.raises(SparsortError):
            score_file(file, scorer=bad, prompt=wrong, out=tmp_path / "out", part=(0, 2))
        assert not (tmp_path / "out").exists()


def test_calls_that_cannot_be_shared_are_refused(file: Path, scorer: ScorerConfig, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=r"part=\(0, 2\) needs a folder .*out='FOLDER'"):
        scorer.load().score(file, PROMPT, part=(0, 2))  # type: ignore[call-overload]
    for options in ({"part": (0, 2)}, {"workers": 2}, {"devices": ["cpu", "cpu"]}):
        with pytest.raises(SparsortError, match=r"need a folder that they share. Pass out='FOLDER' \(--out\)"):
            score_file(file, scorer=scorer, prompt=PROMPT, **options)
    live = ScorerConfig(model=ModelSpec(scorer.model.load()))
    with pytest.raises(SparsortError, match=r"a model in memory cannot be sent to worker processes\. Give its name"):
        score_file(file, scorer=live, prompt=PROMPT, out=tmp_path / "out", workers=2)
    with pytest.raises(SparsortError, match="expected a number from 1 on, or 'auto'"):
        score_file(file, scorer=scorer, prompt=PROMPT, out=tmp_path / "out", workers=0)
    with pytest.raises(SparsortError, match="expected \\(k, n\\)"):
        score_file(file, scorer=scorer, prompt=PROMPT, out=tmp_path / "out", part=(2, 2))


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
ARRAY |= {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "6"}


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, (1, 2)),
        (ARRAY, (2, 4)),
        ({**ARRAY, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (2 * 3 + 1, 12)),
        # torchrun numbers the processes of all nodes, and Slurm those that it started itself.
        ({**ARRAY, "RANK": "4", "WORLD_SIZE": "5", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (14, 20)),
    ],
)
def test_the_part_is_taken_from_the_environment(environment: dict[str, str], part: tuple[int, int]) -> None:
    assert part_from_environment(environment)[0] == part


def test_an_environment_without_a_part_is_refused() -> None:
    with pytest.raises(SparsortError, match=r"neither Slurm's variables .* nor torchrun's .* Pass K/N, such as 0/4"):
        part_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    with pytest.raises(SparsortError, match="WORLD_SIZE is 'many'; expected a whole number"):
        part_from_environment({"RANK": "0", "WORLD_SIZE": "many"})


def test_an_incomplete_folder_has_its_exit_code_and_its_status(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    score = ["score", file, "-p", "{question}", "--scorer", "compression", "--shard-rows", SHARD_ROWS, "--out", out]
    first = json.loads(run(*score, "--part", "0/3", "--json", code=4).stdout)
    assert first == {"out": str(out), "done": 3, "total": 8, "scored": 3, "kept": 0, "complete": False}
    status = json.loads(run("status", out, "--json").stdout)
    assert (status["done"], status["total"], status["rows"], status["complete"]) == (3, 8, 60, False)
    (worker,) = status["workers"]
    assert (worker["shards"], worker["rows"], worker["state"]) == (3, 24, "alive")
    shown = run("status", out).stdout
    assert "3 of 8 shards are done. The run is not complete." in shown
    assert run(*score, "--part", "0/3", code=4).stdout.startswith("0 shards scored, 3 were done before.\n3 of 8")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    second = run(*score, "--part", "env", code=4)
    assert second.stderr == "part 1/3, from RANK=1, WORLD_SIZE=3\n"
    assert "6 of 8 shards are done" in second.stdout
    assert "8 of 8 shards are done" in run(*score, "--part", "2/3").stdout
    assert run("status", out).stdout == "8 of 8 shards are done. The run is complete.\n"
    assert "60 of 60 rows scored" in run(*score).stdout
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        assert "expected K/N with K from 0" in run(*score, "--part", wrong, code=2).stderr
    assert "is not a score folder" in run("status", tmp_path, code=2).stderr


def test_a_function_that_writes_turns_needs_a_chat_template_before_weights_are_read(
    file: Path, make_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(make_tiny_model("llama"), tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    scorer = ScorerConfig(model=ModelSpec(str(folder), device="cpu"))
    monkeypatch.setattr(ScorerConfig, "load", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    prompt = PromptSpec.of(lambda row: [{"role": "user", "content": row["question"]}])
    with pytest.raises(SparsortError, match="has no chat template"):
        score_file(file, scorer=scorer, prompt=prompt)


@pytest.mark.parametrize("how", [{"workers": 2}, {"devices": ["cpu", "cpu"]}], ids=["workers", "devices"])
def test_what_cannot_be_sent_to_workers_is_refused(file: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    scorer = ScorerConfig(scorer="length", unit="characters")
    for rows, prompt in ((ROWS, PROMPT), (file, PromptSpec.of(_question))):
        with pytest.raises(SparsortError, match="cannot be sent to worker processes"):
            score_file(rows, scorer=scorer, prompt=prompt, out=tmp_path / "out", **how)


def _question(row: dict[str, Any]) -> str:
    return str(row["question"])
