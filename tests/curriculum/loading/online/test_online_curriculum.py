"""Learning the order while training: runs that were interrupted against runs that were not, ranks against ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forks import ForkServer
from torch import Tensor, nn

from sparsort.curriculum.loading.loader.loader import CurriculumLoader
from sparsort.curriculum.loading.online.gathering import gather
from sparsort.curriculum.loading.online.measure import OnlineDifficulty
from sparsort.curriculum.loading.online.observations import Observations
from sparsort.curriculum.loading.online.online_curriculum import OnlineCurriculum
from sparsort.curriculum.loading.online.running_difficulty import RunningDifficulty
from sparsort.curriculum.loading.plan.planning import plan_curriculum
from sparsort.errors import SparsortError

N, WIDTH, STEPS = 48, 16, 24
PLANS: dict[str, dict[str, Any]] = {
    "pool": {"mode": "pool", "pacing": "linear:start=0.3", "steps": STEPS, "stages": 4, "batch_size": 6},
    "one_pass": {"batch_size": 6, "stages": 2},
}


class Toy(nn.Module):
    """A language model whose head reads the embeddings as they are."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        vocabulary, width = table.shape
        self.embedding = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        # Made on the meta device first, so that no global random state is drawn from.
        self.head = nn.Linear(width, vocabulary, bias=False, device="meta").to_empty(device="cpu")
        generator = torch.Generator().manual_seed(1)
        self.head.weight.data.copy_(torch.randn((vocabulary, width), generator=generator) / width**0.5)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> Any:
        states = self.embedding(input_ids)
        logits = self.head(states)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def setting(
    plan_name: str, *, rank: int = 0, world_size: int = 1, micro_batches: int = 1, workers: int = 0
) -> tuple[Toy, CurriculumLoader]:
    rng = np.random.default_rng(4)
    dataset = [{"input_ids": torch.tensor([row, (row * 7) % N]), "labels": torch.tensor([row, 1])} for row in range(N)]
    plan = plan_curriculum(rng.normal(size=N), seed=3, **PLANS[plan_name])
    toy = Toy(torch.randn((N, WIDTH), generator=torch.Generator().manual_seed(2)))
    loader = CurriculumLoader(
        plan, dataset, rank=rank, world_size=world_size, micro_batches=micro_batches, num_workers=workers, verify=False
    )
    return toy, loader


def steps_of(toy: Toy, loader: CurriculumLoader, epochs: int, micro_batches: int = 1) -> Iterator[tuple[Any, ...]]:
    """Train; after each optimiser step, what it was made of."""
    rows: list[int] = []
    losses: list[float] = []
    while loader.epoch < epochs:
        for batch in loader:
            loss = toy(**batch).loss / micro_batches
            loss.backward()
            rows += loader.rows.tolist()
            losses.append(loss.item())
            if len(losses) == micro_batches:
                with torch.no_grad():
                    for weight in toy.parameters():
                        weight -= 0.5 * weight.grad
                toy.zero_grad()
                yield loader.latest, tuple(rows), tuple(losses)
                rows, losses = [], []


def weights_of(toy: Toy) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in toy.state_dict().items()}


@pytest.mark.parametrize(("plan_name", "epochs"), [("pool", 1), ("one_pass", 3)])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_resume_after_any_step_continues_as_if_nothing_had_happened(
    plan_name: str, epochs: int, micro_batches: int, tmp_path: Path
) -> None:
    toy, loader = setting(plan_name, micro_batches=micro_batches)
    checkpoints = []
    with OnlineCurriculum(toy, loader) as online:
        whole = []
        for number, step in enumerate(steps_of(toy, loader, epochs, micro_batches)):
            whole.append(step)
            online.save(tmp_path / str(number))
            checkpoints.append(weights_of(toy))
        at_end = online.running.difficulty(1000)
    toy, loader = setting(plan_name, micro_batches=micro_batches)
    with OnlineCurriculum(toy, loader):
        assert list(steps_of(toy, loader, epochs, micro_batches)) == whole
    toy, loader = setting(plan_name, micro_batches=micro_batches)
    unrevised = [rows for _, rows, _ in steps_of(toy, loader, epochs, micro_batches)]
    assert unrevised != [rows for _, rows, _ in whole]

    for number in range(len(whole)):
        toy, loader = setting(plan_name, micro_batches=micro_batches)
        toy.load_state_dict(checkpoints[number])
        with OnlineCurriculum(toy, loader) as online:
            online.load(tmp_path / str(number))
            # A checkpoint may be rotated away while what was loaded from it is followed.
            shutil.rmtree(tmp_path / str(number))
            assert list(steps_of(toy, loader, epochs, micro_batches)) == whole[number + 1 :]
            online.save(tmp_path / "end")
            assert online.running.difficulty(1000).tobytes() == at_end.tobytes()


def test_a_resume_between_a_revision_and_its_first_step_does_not_revise_twice(tmp_path: Path) -> None:
    toy, loader = setting("pool", micro_batches=2)
    edge = loader.plan.stage_edges[1]
    with OnlineCurriculum(toy, loader) as online:
        steps = steps_of(toy, loader, 1, 2)
        for _ in range(edge):
            next(steps)
        weights = weights_of(toy)
        # The next stage's first batch has been asked for, and its first micro-batch trained on, when the checkpoint is taken.
        batch = next(iter(loader))
        toy(**batch).loss.backward()
        toy.zero_grad()
        online.save(tmp_path)
        assert loader.plan.revision is not None
        fingerprint = loader.plan.fingerprint
        rest = list(steps_of(toy, loader, 1, 2))
    toy, loader = setting("pool", micro_batches=2)
    toy.load_state_dict(weights)
    with OnlineCurriculum(toy, loader) as online:
        online.load(tmp_path)
        resumed = steps_of(toy, loader, 1, 2)
        first = next(resumed)
        assert loader.plan.fingerprint == fingerprint
        assert [first, *resumed] == rest
    assert json.loads((tmp_path / "online.json").read_text())["loader"]["batch"] == edge


def test_workers_change_nothing(tmp_path: Path) -> None:
    results = []
    for workers in (0, 2):
        toy, loader = setting("pool", workers=workers)
        with OnlineCurriculum(toy, loader):
            results.append(list(steps_of(toy, loader, 1)))
    assert results[0] == results[1]


def test_only_training_passes_of_new_micro_batches_are_observed() -> None:
    toy, loader = setting("one_pass")
    with OnlineCurriculum(toy, loader) as online:
        toy(input_ids=torch.tensor([[1, 2]]))
        for batch in loader:
            with torch.no_grad():
                toy(**batch)
            toy(**batch)
            toy(**batch)
            toy.eval()
            toy(**batch)
            toy.train()
            if loader.batch == 3:
                break
        found = online.online.drain()
    expected = [loader.plan.batch(number) for number in range(3)]
    assert found.rows.tolist() == np.concatenate(expected).tolist()
    assert found.steps.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert loader.on_stage is None


def test_a_compiled_model_is_observed_alike() -> None:
    found = []
    for compiled in (False, True):
        toy, loader = setting("pool")
        with OnlineCurriculum(toy, loader) as online:
            run = torch.compile(toy, backend="eager") if compiled else toy
            for batch in loader:
                run(**batch).loss.backward()
                if loader.batch == 3:
                    break
            seen = online.online.drain()
            found.append((seen.rows.tolist(), seen.steps.tolist(), seen.values.tolist()))
    assert found[0] == found[1]
    assert len(found[0][0]) == 18


def test_the_revised_order_is_that_of_the_running_difficulty() -> None:
    toy, loader = setting("pool")
    original = loader.plan.fingerprint
    with OnlineCurriculum(toy, loader) as online:
        steps = steps_of(toy, loader, 1)
        for _ in range(loader.plan.stage_edges[1] + 1):
            next(steps)
        edge = loader.plan.stage_edges[1]
        assert loader.plan.revision == {"number": 1, "epoch": 0, "start": edge}
        assert loader.plan.notes["revises"] == original
        assert online.running.next_step > 0
        assert loader.plan.order.tolist() == np.argsort(online.running.difficulty(edge), kind="stable").tolist()


def test_one_folder_holds_the_last_checkpoint_only(tmp_path: Path) -> None:
    toy, loader = setting("pool")
    with OnlineCurriculum(toy, loader) as online:
        for _ in steps_of(toy, loader, 1):
            online.save(tmp_path)
            names = sorted(path.name for path in tmp_path.iterdir())
            about = json.loads((tmp_path / "online.json").read_text())
            assert names == sorted({"online.json", about["running"], about["plan"]} - {None})


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    toy, loader = setting("pool")
    online = OnlineCurriculum(toy, loader)
    online.save(tmp_path)
    online.close()
    with pytest.raises(SparsortError, match="cannot read an online curriculum"):
        online.load(tmp_path / "nowhere")
    with (
        OnlineCurriculum(toy, loader, online=OnlineDifficulty(metric="gini")) as other,
        pytest.raises(SparsortError, match="cannot be averaged"),
    ):
        other.load(tmp_path)
    toy, loader = setting("one_pass")
    with OnlineCurriculum(toy, loader) as other, pytest.raises(SparsortError, match="was saved for the plan"):
        other.load(tmp_path)
    about = json.loads((tmp_path / "online.json").read_text())
    (tmp_path / "online.json").write_text(json.dumps(about | {"version": 9}))
    with OnlineCurriculum(toy, loader) as other, pytest.raises(SparsortError, match="has format version 9"):
        other.load(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_damage_to_what_was_saved_is_refused(
    version: int, tmp_path: Path, damages: Callable[[Path], Iterator[str]]
) -> None:
    toy, loader = setting("pool")
    with OnlineCurriculum(toy, loader) as online:
        online.save(tmp_path)
        path = tmp_path / "online.json"
        about = json.loads(path.read_text())
        if version == 1:
            del about["digest"]
            path.write_text(json.dumps(about | {"version": 1}))
            online.load(tmp_path)
            path.write_text(json.dumps(about | {"version": 1, "spare": 0}))
            with pytest.raises(SparsortError, match=r"online.json is damaged: it has other fields"):
                online.load(tmp_path)
            return
        tried = 0
        for what in damages(path):
            if path.exists() and path.read_bytes().strip() == json.dumps(about, indent=2).encode():
                continue  # the line break at the end
            with pytest.raises(SparsortError):
                _load(online, tmp_path, what)
            tried += 1
        assert tried > 15


def _load(online: OnlineCurriculum, folder: Path, what: str) -> None:
    online.load(folder)
    pytest.fail(what)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6, "schedule": "shuffle"}, "does not use the difficulty"),
        ({"batch_size": 6, "direction": "random"}, "does not use the difficulty"),
        ({"token_budget": 20}, "cut for the order"),
        ({"batch_size": 2, "packing": "next_fit", "pack_length": 8}, "cut for the order"),
    ],
)
def test_a_plan_that_cannot_be_revised_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    plan = plan_curriculum(np.arange(N), lengths=np.full(N, 2), **settings)
    toy, loader = setting("pool")
    with pytest.raises(SparsortError, match=message):
        OnlineCurriculum(toy, CurriculumLoader(plan, loader.dataset, collate_fn=list, verify=False))
    with pytest.raises(SparsortError, match="running difficulty has 5 rows"):
        OnlineCurriculum(toy, loader, running=RunningDifficulty(5))


# Several processes


def test_without_other_ranks_gathering_only_orders() -> None:
    one = Observations(rows=np.array([5, 2, 9]), steps=np.array([1, 1, 0]), values=np.array([0.1, 0.2, 0.3]))
    assert gather(one).rows.tolist() == [9, 2, 5]


_RANK = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import test_online_curriculum as tests
from torch.nn.parallel import DistributedDataParallel
from sparsort.curriculum.loading.online.online_curriculum import OnlineCurriculum

out, rank = Path(sys.argv[2]), int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
toy, loader = tests.setting("pool", rank=rank, world_size=2)
wrapped = DistributedDataParallel(toy)
fingerprints, orders = [], []
with OnlineCurriculum(wrapped, loader) as online:
    for batch in loader:
        wrapped(**batch).loss.backward()
        with torch.no_grad():
            for weight in toy.parameters():
                weight -= 0.5 * weight.grad
        toy.zero_grad()
        fingerprints.append(loader.plan.fingerprint)
        orders.append(loader.plan.batch(loader.latest[1]).tolist())
        if loader.batch == 15:
            online.save(out / "saved")
            dist.barrier()
            torch.save(toy.state_dict(), out / f"weights-{rank}.pt")
    online._fold(tests.STEPS)
    state = online.running.difficulty(1000).tolist()
(out / f"{rank}.json").write_text(json.dumps([fingerprints, orders, state]))
dist.destroy_process_group()
"""


def test_two_processes_get_the_same_revised_plans_and_one_continues_with_them(
    tmp_path: Path, forks: ForkServer
) -> None:
    codes = forks.run_ranks(tmp_path / "ranks", _RANK, Path(__file__).parent, tmp_path)
    assert codes == [0, 0], (tmp_path / "ranks-0.err").read_text(encoding="utf-8")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    fingerprints, orders, _ = first
    assert len(set(fingerprints)) == 4
    assert len(orders) == STEPS

    # One process resumes from the checkpoint of two, and the current stage has the same global batches.
    toy, loader = setting("pool")
    with OnlineCurriculum(toy, loader) as online:
        online.load(tmp_path / "saved")
        toy.load_state_dict(torch.load(tmp_path / "weights-0.pt", weights_only=True))
        rows = [list(rows) for _, rows, _ in steps_of(toy, loader, 1)]
    assert rows == orders[15:]
