"""The curriculum over real processes: several ranks over gloo, and runs that are killed at random moments.

This file is also the program that trains. `python test_loading_processes.py` imports torch and transformers once, reads
one job a line and forks a process for each of its ranks; every rank writes down, as it happens, which rows the model got
and the loss of it, bit by bit. So a process that is killed leaves all that it did, and starting another costs little.
"""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handshake import die, die_in, search_path

from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.curriculum.loading.plan.planning import plan_curriculum

BASE, LENGTH = 16, 6
EXAMPLES = Path(__file__).parents[3] / "examples"
Line = dict[str, Any]


# What a rank does


def _rows(n: int) -> list[dict[str, list[int]]]:
    tokens = np.random.default_rng(0).integers(0, BASE * BASE, (n, LENGTH))
    tokens[:, 0], tokens[:, 1] = np.divmod(np.arange(n), BASE)
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=BASE * BASE, attention_dropout=0.3, **size))


def _numbers(inputs: dict[str, Any]) -> list[Any]:
    """The rows in a batch; of a packed batch, those of each sequence, which begin where position 0 is followed by 1."""
    numbers = inputs["input_ids"][:, :-1] * BASE + inputs["input_ids"][:, 1:]
    if "position_ids" not in inputs:
        return numbers[:, 0].tolist()
    begins = (inputs["position_ids"][:, :-1] == 0) & (inputs["position_ids"][:, 1:] == 1)
    return [row[here].tolist() for row, here in zip(numbers, begins, strict=True)]


def _write(path: Path, **line: Any) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def _write_step(job: dict[str, Any], rank: int, **line: Any) -> None:
    """Write down a step. A job with `dies` = (lines, moment) dies at that function call after that many lines of its own."""
    path = Path(job["log"]) / f"rank-{rank}.jsonl"
    _write(path, **line)
    lines, moment = job.get("dies", (None, 0))
    job["written"] = job.get("written", 0) + 1
    if job["written"] == lines:
        die_in(moment)
    elif lines is not None and job["written"] > lines:
        die()


def _train_with_trainer(job: dict[str, Any], rank: int) -> None:
    """transformers' Trainer, and DDP where there are several ranks."""
    from transformers import TrainingArguments, default_data_collator

    from sparsort.curriculum.loading.online.measure import OnlineDifficulty
    from sparsort.curriculum.loading.trainer.trainer import CurriculumTrainer

    class Written(CurriculumTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows = _numbers(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            _write_step(job, rank, step=self.state.global_step, rows=rows, loss=float(loss).hex())
            return loss

    class Measured(OnlineDifficulty):
        def collect(self, rows: Any, step: int, **masks: Any) -> None:
            super().collect(rows, step, **masks)
            _write(Path(job["log"]) / f"measured-{rank}.jsonl", step=step, rows=rows.tolist())

    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_steps": 1, "learning_rate": 0.01}
    trainer = Written(
        _model(),
        TrainingArguments(job["folder"], **{**options, **job["options"]}),
        curriculum=job["plan"],
        online=Measured() if job.get("online") else None,
        train_dataset=_rows(job["n"]),
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=job.get("resume"))


def _train_in_a_loop(job: dict[str, Any], rank: int) -> None:
    """A plain PyTorch loop with a checkpoint of everything after each step."""
    import torch
    from transformers import default_data_collator

    from sparsort.curriculum.loading.loader.loader import CurriculumLoader

    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plan, file = CurriculumPlan.open(job["plan"]), Path(job["folder"]) / "checkpoint.pt"
    loader = CurriculumLoader(
        plan, _rows(job["n"]), collate_fn=default_data_collator, num_workers=job.get("workers", 0)
    )
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        loader.load_state_dict(json.loads(saved["loader"]))
    model.train()
    for epoch in range(loader.epoch, job["epochs"]):
        loader.set_epoch(epoch)
        for inputs in loader:
            step = epoch * plan.n_batches + loader.batch - 1
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _write_step(job, rank, step=step, rows=_numbers(inputs), loss=float(loss).hex())
            state = json.dumps(loader.state_dict())
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**saved, "random": torch.get_rng_state(), "loader": state}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)


def _run_an_example(job: dict[str, Any], rank: int) -> None:
    os.chdir(job["folder"])
    sys.argv = [job["example"], *job.get("arguments", [])]
    runpy.run_path(job["example"], run_name="__main__")


WORK = {"trainer": _train_with_trainer, "loop": _train_in_a_loop, "example": _run_an_example}


def _rank(job: dict[str, Any], rank: int) -> None:
    """Runs in a forked process and never returns."""
    code = 1
    try:
        with (Path(job["log"]) / f"output-{rank}.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if job["world"] > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "MASTER_PORT": job["port"]}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
        WORK[job["kind"]](job, rank)
        code = 0
    except BaseException:  # noqa: BLE001  whatever it is, it must not unwind into the server's own stack
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import sparsort.curriculum.loading.trainer.trainer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        ranks = range(job["world"])
        pids = []
        for rank in ranks:
            if (pid := os.fork()) == 0:
                _rank(job, rank)
            pids.append(pid)
        sys.stdout.write(json.dumps(pids) + "\n")
        sys.stdout.flush()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


# The tests


class Server:
    def __init__(self) -> None:
        environment = {
            **os.environ,
            **search_path(),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, log: Path, kind: str, *, world: int = 1, **job: Any) -> list[int]:
        log.mkdir(parents=True, exist_ok=True)
        assert self.process.stdin
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        job = {"kind": kind, "world": world, "log": str(log), "port": port, "folder": str(log), **job}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pids: list[int] = self._read()
        return pids

    def finish(self) -> list[int]:
        codes: list[int] = self._read()
        return codes

    def run(self, log: Path, kind: str, **job: Any) -> list[list[Line]]:
        """Run to the end, and what each rank wrote down."""
        self.start(log, kind, **job)
        codes = self.finish()
        assert not any(codes), "\n".join(path.read_text()[-3000:] for path in sorted(log.glob("output-*.txt")))
        return [_lines(log, rank) for rank in range(len(codes))]

    def _read(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    with server.process as process:
        yield server
        assert process.stdin
        process.stdin.close()
        assert process.wait() == 0


def _lines(log: Path, rank: int = 0, what: str = "rank") -> list[Line]:
    file = log / f"{what}-{rank}.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _plan(folder: Path, n: int, **settings: Any) -> CurriculumPlan:
    difficulty = np.random.default_rng(2).integers(0, 20, n).astype(np.float32)
    return plan_curriculum(
        difficulty, data=_rows(n), out=folder, **{"batch_size": 8, "stages": 3, "seed": 5, **settings}
    )


def _planned(plan: CurriculumPlan, steps: range) -> list[list[int]]:
    return [plan.batch(step % plan.n_batches, step // plan.n_batches).tolist() for step in steps]


def _global(ranks: list[list[Line]]) -> dict[int, list[Any]]:
    """Step to global batch: a rank's micro-batches one after the other, the ranks' rows in turn."""
    parts: list[dict[int, list[Any]]] = []
    for lines in ranks:
        parts.append({})
        for line in lines:
            parts[-1].setdefault(line["step"], []).extend(line["rows"])
    found = {}
    for step in parts[0]:
        whole: list[Any] = [None] * sum(len(part[step]) for part in parts)
        for rank, part in enumerate(parts):
            whole[rank :: len(parts)] = part[step]
        found[step] = whole
    assert all(part.keys() == parts[0].keys() for part in parts)
    return found


def test_four_ranks_see_every_row_exactly_once_an_epoch(server: Server, tmp_path: Path) -> None:
    plan = _plan(tmp_path / "plan", 103)
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "no"}
    ranks = server.run(tmp_path / "run", "trainer", world=4, plan=str(plan.folder), n=103, options=options)
    found = _global(ranks)
    assert list(found.values()) == _planned(plan, range(26))
    for epoch in range(2):
        seen = [row for step in range(13 * epoch, 13 * epoch + 13) for row in found[step]]
        assert len(seen) == 103
        assert set(seen) == set(range(103))


def test_two_ranks_resume_exactly_and_one_continues_their_order(server: Server, tmp_path: Path) -> None:
    plan = _plan(tmp_path / "plan", 61, later_epochs="shuffle")
    common: dict[str, Any] = {"plan": str(plan.folder), "n": 61}
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 13}
    straight = server.run(tmp_path / "two", "trainer", world=2, options=two, **common)
    assert list(_global(straight).values()) == _planned(plan, range(13))

    checkpoint = str(tmp_path / "two" / "checkpoint-5")
    again = server.run(tmp_path / "again", "trainer", world=2, options=two, resume=checkpoint, **common)
    assert again == [[line for line in lines if line["step"] >= 5] for lines in straight]

    one = {"per_device_train_batch_size": 8, "max_steps": 13, "dataloader_num_workers": 2}
    alone = server.run(tmp_path / "one", "trainer", options=one, resume=checkpoint, **common)
    assert list(_global(alone).values()) == _planned(plan, range(5, 13))
    three = {"per_device_train_batch_size": 4, "max_steps": 10}
    back = server.run(
        tmp_path / "back", "trainer", world=2, options=three, resume=str(tmp_path / "one" / "checkpoint-8"), **common
    )
    assert list(_global(back).values()) == _planned(plan, range(8, 10))


def test_packed_sequences_stay_whole_and_in_order_over_ranks_and_a_resume(server: Server, tmp_path: Path) -> None:
    lengths = [LENGTH] * 61
    plan = _plan(tmp_path / "plan", 61, lengths=lengths, packing="next_fit", pack_length=20, batch_size=4, stages=None)
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 2}
    job: dict[str, Any] = {"plan": str(plan.folder), "n": 61, "world": 2, "options": options}
    straight = server.run(tmp_path / "straight", "trainer", **job)
    steps = range(2 * plan.n_batches)
    bins = [plan.bins(step % plan.n_batches, step // plan.n_batches) for step in steps]
    assert max(len(rows) for held in bins for rows in held) == 3
    assert list(_global(straight).values()) == [[rows.tolist() for rows in held] for held in bins]
    resumed = server.run(tmp_path / "resumed", "trainer", resume=str(tmp_path / "straight" / "checkpoint-4"), **job)
    assert resumed == [[line for line in lines if line["step"] >= 4] for lines in straight]


@pytest.mark.parametrize(
    ("world", "settings", "at"),
    [
        (1, {"stages": 3}, [5, 8, 9]),
        (2, {"mode": "pool", "steps": 9, "pacing": "linear:start=0.3", "stages": 3}, [3, 4, 12]),
    ],
    ids=["one_pass", "pool"],
)
def test_an_online_curriculum_is_planned_again_and_resumes_exactly(
    server: Server, tmp_path: Path, world: int, settings: dict[str, Any], at: list[int]
) -> None:
    plan = _plan(tmp_path / "plan", 61, **settings)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world, "num_train_epochs": 2}
    job: dict[str, Any] = {"plan": str(plan.folder), "n": 61, "options": options, "world": world, "online": True}
    straight = server.run(tmp_path / "straight", "trainer", **job)
    for rank, lines in enumerate(straight):
        measured = _lines(tmp_path / "straight", rank, "measured")
        assert measured == [{"step": line["step"], "rows": line["rows"]} for line in lines]
    found, planned = list(_global(straight).values()), _planned(plan, range(2 * plan.n_batches))
    edge = plan.stage_edges[1] if plan.settings.mode == "pool" else plan.n_batches
    assert found[:edge] == planned[:edge]
    assert found[edge:] != planned[edge:]
    for step in at:
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed = server.run(tmp_path / f"from-{step}", "trainer", resume=checkpoint, **job)
        assert resumed == [[line for line in lines if line["step"] >= step] for lines in straight], step
    server.start(tmp_path / "off", "trainer", resume=checkpoint, **{**job, "online": False})
    assert server.finish() == [1] * world
    assert "Resume with the same online=" in (tmp_path / "off" / "output-0.txt").read_text()


def _is_killed(server: Server, log: Path, kind: str, **job: Any) -> bool:
    server.start(log, kind, **job)
    return server.finish() == [-signal.SIGKILL]


def test_twenty_kills_at_random_steps_change_nothing(server: Server, tmp_path: Path) -> None:
    plan = _plan(tmp_path / "plan", 203, batch_size=5)
    steps, job = 3 * plan.n_batches, {"plan": str(plan.folder), "n": 203, "epochs": 3}
    ((straight),) = server.run(tmp_path / "straight", "loop", **job)
    assert [line["rows"] for line in straight] == _planned(plan, range(steps))

    chance, log, kills = random.Random(11), tmp_path / "killed", 0
    for _ in range(20):
        # A step with its checkpoint takes about 9,000 function calls.
        dies = (chance.randrange(1, 7), chance.randrange(1, 9_000))
        kills += _is_killed(server, log, "loop", workers=chance.choice([0, 0, 0, 2]), dies=dies, **job)
    assert kills == 20
    ((killed),) = server.run(log, "loop", **job)

    by_step = {line["step"]: line for line in killed}
    assert [by_step[step] for step in range(steps)] == straight
    assert all(line == by_step[line["step"]] for line in killed)  # what was done twice was the same both times
    assert len(killed) <= steps + kills  # and a kill costs no more than the step that it met


def test_a_trainer_killed_twice_ends_where_it_would_have(server: Server, tmp_path: Path) -> None:
    plan = _plan(tmp_path / "plan", 61)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    job: dict[str, Any] = {"plan": str(plan.folder), "n": 61, "options": options}
    ((straight),) = server.run(tmp_path / "straight", "trainer", **job)
    log = tmp_path / "killed"
    for number, dies in enumerate([(7, 1), (10, 20_000)]):
        assert _is_killed(server, log, "trainer", resume=number > 0 or None, dies=dies, **job)
    ((killed),) = server.run(log, "trainer", resume=True, **job)
    assert _last_times(killed) == _last_times(straight)
    assert list(_global([straight]).values()) == _planned(plan, range(16))
    assert len(killed) <= len(straight) + 2 * 4  # a kill may meet the checkpoint of the step before


def _last_times(lines: list[Line]) -> dict[int, list[tuple[list[int], str]]]:
    """Step to its two micro-batches, as they were done the last time; an earlier time must be the beginning of the same."""
    found: dict[int, list[tuple[list[int], str]]] = {}
    for line in lines:
        found.setdefault(line["step"], []).append((line["rows"], line["loss"]))
    for done in found.values():
        for place, earlier in enumerate(done[:-2]):
            assert earlier in done[-2:], place
    return {step: done[-2:] for step, done in found.items()}


@pytest.mark.parametrize(
    ("example", "world"),
    [("curriculum_trainer", 1), ("curriculum_pytorch", 1), ("curriculum_accelerate", 1), ("curriculum_accelerate", 2)],
)
def test_the_examples_run(server: Server, tmp_path: Path, example: str, world: int) -> None:
    server.run(tmp_path, "example", example=str(EXAMPLES / f"{example}.py"), world=world)
    assert re.search(r": the same (batches|losses)", (tmp_path / "output-0.txt").read_text())


if __name__ == "__main__":
    _serve()
