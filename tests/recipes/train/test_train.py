"""`sparsort train`: the losses are those of a plain loop over the plan's batches, and an interruption changes no loss.

The oracle is written here: bytes to ids, one optimiser, one clipped step for each batch of the plan, no Trainer. Runs are
compared by the bytes of their history and weights.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ForkServer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import app
from sparsort.recipes.train.folder import locked_folder
from sparsort.recipes.train.model import make_model, make_tokenizer
from sparsort.recipes.train.text import TextCollator
from sparsort.recipes.train.train import train
from sparsort.scoring.store.scores import Scores
from sparsort.storage import manifests

ROOT = Path(__file__).parents[3]
TEXT = "{question} {answer}"
N, MAX_LENGTH, LR = 42, 24, 2e-3
IGNORED = -100
CURRICULUM = {"stages": 3, "batch_size": 4, "later_epochs": "shuffle"}
CONFIG: dict[str, Any] = {
    "max_length": MAX_LENGTH,
    "learning_rate": LR,
    "lr_schedule": "constant",
    "epochs": 3,
    "save_steps": 5,
    "seed": 5,
}
STEPS = 33  # 3 epochs of ceil(42 / 4) batches
OPTIONS = (
    *("--stages", 3, "--batch-size", 4, "--later-epochs", "shuffle", "--cut-length", MAX_LENGTH, "--lr", LR),
    *("--lr-schedule", "constant", "--epochs", 3, "--save-steps", 5, "--seed", 5),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the example, the next ten to hold out, and their lengths as scores."""
    folder = tmp_path_factory.mktemp("data")
    lines = (ROOT / "examples" / "graded.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:N]), encoding="utf-8")
    (folder / "held.jsonl").write_text("".join(lines[N : N + 10]), encoding="utf-8")
    asked = ["score", folder / "rows.jsonl", "--prompt", TEXT, "--scorer", "compression", "--out", folder / "scores"]
    assert CliRunner().invoke(app, [str(part) for part in asked]).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(data / "rows.jsonl", TEXT, out=out, eval_data=data / "held.jsonl", **_asked(data), **CONFIG)
    return out


def _asked(data: Path) -> dict[str, Any]:
    return {"scores": data / "scores", "curriculum": CURRICULUM}


def _cli(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in ("train", *arguments)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def _history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def _losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in _history(out) if "loss" in entry]


def _ids(path: Path) -> list[list[int]]:
    """ByT5: a byte is its value and 3, and 1 ends a text."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    return [[*(byte + 3 for byte in text.encode()), 1][:MAX_LENGTH] for text in texts]


def _loss(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """The mean over the tokens that are predicted, one row at a time and without padding."""
    each = [
        cross_entropy(model(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="sum") for row in rows
    ]
    return torch.stack(each).sum() / sum(len(row) - 1 for row in rows)


def _same(left: Path, right: Path) -> None:
    assert (left / "history.jsonl").read_bytes() == (right / "history.jsonl").read_bytes()
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (left, right)]
    assert weights[0] == weights[1]


def test_the_losses_are_those_of_a_plain_loop(data: Path, whole: Path) -> None:
    plan, rows = CurriculumPlan.open(whole / "plan"), _ids(data / "rows.jsonl")
    expected = []
    with torch.random.fork_rng(devices=[]):
        model = make_model("tiny", make_tokenizer("tiny"), CONFIG["seed"], longest=MAX_LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for epoch in range(3):
        for number in range(plan.n_batches):
            loss = _loss(model, [rows[row] for row in plan.batch(number, epoch)])
            expected.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert _losses(whole) == pytest.approx(expected, rel=1e-4)
    assert [entry["step"] for entry in _history(whole)] == [*range(1, STEPS + 1), STEPS]
    assert expected[-1] < expected[0] - 0.5
    trained = AutoModelForCausalLM.from_pretrained(whole / "model")
    with torch.no_grad():
        held = _loss(trained, _ids(data / "held.jsonl")).item()
    assert _history(whole)[-1]["eval_loss"] == pytest.approx(held, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    assert tokenizer("Zoë")["input_ids"] == [*(byte + 3 for byte in "Zoë".encode()), 1]


def test_the_plan_is_that_of_the_scores(data: Path, whole: Path) -> None:
    expected = plan_curriculum(Scores.load(data / "scores"), seed=CONFIG["seed"], **CURRICULUM)
    plan = CurriculumPlan.open(whole / "plan")
    assert [plan.batch(k).tolist() for k in range(11)] == [expected.batch(k).tolist() for k in range(11)]


def test_a_division_of_the_work_changes_rounding_only(data: Path, whole: Path, tmp_path: Path) -> None:
    divided = {**CONFIG, "per_device_batch": 2, "accumulate": 2, "workers": 1}
    train(data / "rows.jsonl", TEXT, out=tmp_path / "run", eval_data=data / "held.jsonl", **_asked(data), **divided)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(whole), rel=1e-4)


# `sparsort` that is killed in its next training step once the checkpoint named by argv[1] is sealed; argv[2:]: its arguments.
_KILLED = """
import sys
from handshake import die_in
from sparsort.storage import manifests
from sparsort.__main__ import main
plain, last = manifests.write_manifest, sys.argv.pop(1)
def write_manifest(folder, **options):
    plain(folder, **options)
    if folder.name == last:
        die_in(5_000)
manifests.write_manifest = write_manifest
main()
"""


def test_a_killed_run_continues_and_ends_the_same(data: Path, whole: Path, tmp_path: Path, forks: ForkServer) -> None:
    out = tmp_path / "run"
    command = [data / "rows.jsonl", "--text", TEXT, "--scores", data / "scores", "--eval-data", data / "held.jsonl"]
    command = [*map(str, (*command, *OPTIONS, "--out", out))]
    assert forks.run(tmp_path / "killed", (_KILLED, ["checkpoint-10", "train", *command], {})) == [-signal.SIGKILL]
    assert not (out / "result.json").exists()
    # Written by the kill's victim or not, a checkpoint without its manifest does not count.
    (out / "checkpoints" / "checkpoint-1000").mkdir()
    summary = json.loads(_cli(*command, "--json").stdout)
    assert summary["resumed"] == 10
    assert summary["steps"] == STEPS
    _same(out, whole)
    again = json.loads(_cli(*command, "--json").stdout)
    assert {**again, "resumed": 0, "seconds": 0} == {**summary, "resumed": 0, "seconds": 0}
    assert again["resumed"] == STEPS
    assert "finished before" in _cli(*command).stdout


def test_an_interrupt_keeps_a_checkpoint_and_exits_with_130(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Online, so that what was learnt of the rows has to come back too; in the second epoch it has made another plan.
    online = [data / "rows.jsonl", "--text", TEXT, "--scores", data / "scores", *OPTIONS]
    online += ["--later-epochs", "repeat", "--eval-share", 0, "--online"]
    handler = signal.getsignal(signal.SIGINT)
    _cli(*online, "--out", tmp_path / "straight")
    write_manifest = manifests.write_manifest

    def write_and_interrupt(folder: Path, **options: Any) -> None:
        write_manifest(folder, **options)
        if folder.name == "checkpoint-15":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write_manifest", write_and_interrupt)
        stopped = _cli(*online, "--out", tmp_path / "run", code=130)
    assert "interrupted" in stopped.stderr
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run" / "result.json").exists()
    checkpoints = [int(path.name.partition("-")[2]) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert 15 <= max(checkpoints) < STEPS
    resumed = json.loads(_cli(*online, "--out", tmp_path / "run", "--json").stdout)
    assert resumed["resumed"] == max(checkpoints)
    _same(tmp_path / "run", tmp_path / "straight")
    (revised,) = (tmp_path / "run" / "checkpoints" / f"checkpoint-{STEPS}").rglob("plan.json")
    first, last = CurriculumPlan.open(tmp_path / "run" / "plan"), CurriculumPlan.open(revised.parent)
    assert last.revision == {"number": 2, "epoch": 2, "start": 0}
    assert first.order.tolist() != last.order.tolist()


def test_a_folder_with_another_run_is_refused_with_what_differs(data: Path, whole: Path, tmp_path: Path) -> None:
    def again(file: Path = data / "rows.jsonl", **changes: Any) -> Any:
        curriculum = {**CURRICULUM, **changes.pop("curriculum", {})}
        config = {**CONFIG, **changes}
        held = data / "held.jsonl"
        return train(file, TEXT, out=whole, scores=data / "scores", curriculum=curriculum, eval_data=held, **config)

    with pytest.raises(SparsortError, match=r"learning_rate \(0\.002 there, 0\.003 now\)"):
        again(learning_rate=3e-3)
    with pytest.raises(SparsortError, match=r"curriculum stages \(3 there, 4 now\)"):
        again(curriculum={"stages": 4})
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((data / "rows.jsonl").read_text().splitlines(keepends=True)[:41]))
    with pytest.raises(SparsortError, match="training texts"):
        again(fewer)
    assert again(save_steps=7, per_device_batch=1, accumulate=4).resumed == STEPS


def test_a_folder_in_which_another_process_trains_is_refused(data: Path, tmp_path: Path) -> None:
    asked = (data / "rows.jsonl", "--text", TEXT, "--schedule", "shuffle", "--out", tmp_path, "--max-steps", 1)
    with locked_folder(tmp_path):
        assert "another process is training" in " ".join(_cli(*asked, code=2).output.split())
    _cli(*asked, "--model", "tiny", "--cut-length", 8)


def test_a_plan_of_these_rows_is_followed(data: Path, whole: Path, tmp_path: Path) -> None:
    plan = CurriculumPlan.open(whole / "plan")
    result = train(data / "rows.jsonl", TEXT, out=tmp_path, plan=whole / "plan", **CONFIG)
    assert result.plan == plan.fingerprint
    assert result.eval_loss is None
    assert _losses(tmp_path) == _losses(whole)


def test_a_plan_of_rows_that_changed_since_is_refused(data: Path, tmp_path: Path) -> None:
    plan_curriculum(data / "scores", batch_size=4, out=tmp_path / "plan")
    lines = (data / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    changed = lines[3].replace("?", "!")
    for rows in ([*lines[:3], changed, *lines[4:]], lines[::-1]):
        (tmp_path / "changed.jsonl").write_text("".join(rows), encoding="utf-8")
        asked = (tmp_path / "changed.jsonl", "--text", TEXT, "--plan", tmp_path / "plan", "--out", tmp_path / "run")
        assert "not the rows that the plan was made for" in " ".join(_cli(*asked, code=2).output.split())


def test_a_plan_that_knows_nothing_of_its_rows_is_taken_by_name_or_unverified(data: Path, tmp_path: Path) -> None:
    n = len((data / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    plan_curriculum(list(range(n)), batch_size=8, out=tmp_path / "plan")
    plan_curriculum(list(range(n)), batch_size=8, fingerprint="rows v1", out=tmp_path / "named")
    asked = (data / "rows.jsonl", "--text", TEXT, "--max-steps", "1", "--out", tmp_path / "run")
    message = " ".join(_cli(*asked, "--plan", tmp_path / "plan", code=2).output.split())
    assert "cannot tell whether these are the rows" in message
    assert "here (--fingerprint); or pass verify=False (--no-verify)" in message
    _cli(*asked, "--plan", tmp_path / "named", "--fingerprint", "rows v2", code=2)
    _cli(*asked, "--plan", tmp_path / "named", "--fingerprint", "rows v1")
    with pytest.raises(SparsortError, match=r"verify=False \(--no-verify\) concerns a plan that was made before"):
        train(data / "rows.jsonl", TEXT, out=tmp_path / "other", scores=data / "scores", verify=False, **CONFIG)
    result = train(data / "rows.jsonl", TEXT, out=tmp_path / "free", plan=tmp_path / "plan", verify=False, max_steps=1)
    assert result.steps == 1


@pytest.mark.parametrize(
    "curriculum",
    [
        {"packing": "next_fit", "pack_length": 64, "batch_size": 3},
        {"token_budget": 96, "stages": 2},
        {"mode": "pool", "pacing": "linear:start=0.3", "batch_size": 4},
        {"schedule": "shuffle"},
    ],
)
def test_every_kind_of_batch_trains(curriculum: dict[str, Any], data: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "epochs": 1, "max_steps": 3, "eval_share": 0.2, "lr_schedule": "wsd", "warmup_steps": 1}
    scores = None if curriculum.get("schedule") == "shuffle" else data / "scores"
    result = train(data / "rows.jsonl", TEXT, out=tmp_path, scores=scores, curriculum=curriculum, **config)
    assert (result.steps, result.rows, result.eval_rows) == (3, 34, 8)
    assert result.loss is not None
    assert result.eval_loss is not None
    assert CurriculumPlan.open(tmp_path / "plan").n_rows == 34
    rates = [entry["learning_rate"] for entry in _history(tmp_path) if "loss" in entry]
    assert rates[0] < LR


def test_a_given_model_is_trained_further(data: Path, make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = str(make_tiny_model("llama"))
    arguments = (data / "rows.jsonl", "--text", TEXT, "--scores", data / "scores", "--model", model, "--max-steps", 2)
    shown = _cli(*arguments, "--cut-length", 16, "--out", tmp_path / "run").stdout
    assert "38 trained on, 4 held out" in shown
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, tmp_path / "run/model")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<eos>"


def test_padding_has_no_label_and_an_end_that_pads_has_one() -> None:
    batch = TextCollator(pad_token_id=1)([{"input_ids": [7, 8, 9, 1]}, {"input_ids": [5, 1]}])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 1], [5, 1, 1, 1]]
    assert batch["labels"].tolist() == [[7, 8, 9, 1], [5, 1, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "{qestion}"], "Did you mean 'question'"),
        (["--text", "no field"], "uses no field"),
        (["--scores", None], "--schedule shuffle"),
        (["--scores", "nowhere"], "nowhere"),
        (["--schedule", "sortd"], "Did you mean 'sorted'"),
        (["--lr-schedule", "cosin"], "Did you mean 'cosine'"),
        (["--dtype", "float8"], "unknown dtype"),
        (["--report-to", "tensorbord"], "Did you mean 'tensorboard'"),
        (["--model", "smal"], "Did you mean 'small'"),
        (["--batch-size", 6, "--per-device-batch", 4], "per_device_train_batch_size=3"),
        (["--batch-size", 5, "--accumulate", 2], "5"),
        (["--batch-size", 100], "above the 38 rows"),
        (["--mode", "pool"], "pacing"),
        (["--warmup-steps", 1000], "warmup_steps=1000"),
        (["--lr", 0], "learning_rate"),
        (["--eval-share", 1.5], "eval_share"),
        (["--eval-share", 0.2, "--eval-data", "HELD"], "eval_share"),
        (["--online", "--schedule", "shuffle"], "nothing to learn online"),
        (["--online"], "--mode pool"),
        (["--online-metric", "hoier", "--online"], "Did you mean 'hoyer'"),
        (["--online-metric", "gini"], "--online-metric gini has no effect"),
        (["--epochs", 2, "--max-steps", 3], "--epochs 2 has no effect: --max-steps 3 sets the length of the run"),
        (["--plan", "PLAN"], "not both"),
        (["--plan", "PLAN", "--scores", None, "--stages", 2], "its own settings"),
        (["--plan", "PLAN", "--scores", None, "--eval-share", 0.1], "--eval-data"),
        (["--plan", "nowhere", "--scores", None], "nowhere"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    arguments: list[Any], message: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"--text": TEXT, "--scores": data / "scores", "--out": tmp_path / "run"}
    places = {"HELD": data / "held.jsonl", "PLAN": whole / "plan"}
    given = list(arguments)
    flags: list[Any] = []
    while given:
        name = given.pop(0)
        if given and not str(given[0]).startswith("--"):
            options[name] = places.get(given[0], given[0]) if isinstance(given[0], str) else given[0]
            given.pop(0)
        else:
            flags.append(name)
    command = [part for name, value in options.items() if value is not None for part in (name, value)]
    result = _cli(data / "rows.jsonl", *command, *flags, code=2)
    assert message in result.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_rows_that_do_not_fit_are_refused_by_name(data: Path, whole: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    with pytest.raises(SparsortError, match="the plan has 42 rows and the data has 41"):
        train(rows[:41], TEXT, out=tmp_path / "a", plan=whole / "plan")
    stranger = {**rows[0], "id": "stranger", "question": "Who?"}
    with pytest.raises(SparsortError, match=r"1 of 43 rows have no score.*'stranger'"):
        train([*rows, stranger], TEXT, out=tmp_path / "b", scores=data / "scores", eval_share=0.0)
    empty = [*rows, {**stranger, "question": " ", "answer": ""}]
    with pytest.raises(SparsortError, match=r"1 of 43 rows .* have an empty text: 'stranger'"):
        train(empty, TEXT, out=tmp_path / "c", scores=data / "scores", eval_share=0.0)
    assert list((tmp_path / "c").rglob("*.arrow")) == []


@pytest.mark.slow
def test_two_processes_train_as_one(data: Path, whole: Path, tmp_path: Path, forks: ForkServer) -> None:
    command = [data / "rows.jsonl", "--text", TEXT, "--scores", data / "scores", "--eval-data", data / "held.jsonl"]
    command = ["train", *command, *OPTIONS, "--out", tmp_path / "run", "--json"]
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sparsort")
    run = (sys.executable, "-m", *launcher, *command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, run)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS
    assert _losses(tmp_path / "run") == pytest.approx(_losses(whole), rel=1e-3)
    assert _history(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(_history(whole)[-1]["eval_loss"], rel=1e-3)

    # Both processes pass over what one of them finds damaged, here the random state of the other.
    history = (tmp_path / "run" / "history.jsonl").read_bytes()
    newest = tmp_path / "run" / "checkpoints" / f"checkpoint-{STEPS}"
    listed = json.loads((newest / manifests.FILE).read_text(encoding="utf-8"))["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= listed.keys()
    (newest / "rng_state_1.pth").write_bytes((newest / "rng_state_1.pth").read_bytes()[:-1])
    (tmp_path / "run" / "result.json").unlink()
    codes = forks.run_ranks(tmp_path / "again", "from sparsort.__main__ import main; main()", *command)
    log = (tmp_path / "again-0.err").read_text(encoding="utf-8")
    assert codes == [0, 0], log
    assert json.loads((tmp_path / "again-0.out").read_text(encoding="utf-8"))["resumed"] == 30
    assert f"checkpoint-{STEPS} is damaged and is passed over: rng_state_1.pth" in log
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == history


def test_losses_reach_the_tracker_and_a_missing_one_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"text": "so it goes " * (1 + n % 3)} for n in range(8)]
    curriculum: dict[str, Any] = {"schedule": "shuffle"}
    result = train(
        rows, "{text}", out=tmp_path / "run", curriculum=curriculum, max_steps=2, report_to="tensorboard, none"
    )
    # A second file has the settings.
    runs = [EventAccumulator(str(file)).Reload() for file in (tmp_path / "run").rglob("events.out.tfevents.*")]
    [losses] = [run.Scalars("train/loss") for run in runs if "train/loss" in run.Tags()["scalars"]]
    assert [one.step for one in losses] == [1, 2]
    assert losses[-1].value == pytest.approx(result.loss)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, message in {"wandb": "Install it with: pip install", "tensorbord": "Did you mean 'tensorboard'"}.items():
        with pytest.raises(SparsortError, match=message):
            train(rows, "{text}", out=tmp_path / name, curriculum=curriculum, max_steps=2, report_to=name)
        assert not list((tmp_path / name).rglob("*.safetensors"))
