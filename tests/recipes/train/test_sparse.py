"""`train` with a recipe: sparse attention and the order of the data in one run, and an interruption changes no result.

The oracle is a loop without Trainer: the plan's batches, one optimiser, and `model.sparse_attention` set by hand in front of
every step. Runs are compared by the bytes of their history and weights.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ForkServer
from transformers import AutoModelForCausalLM

import sparsort
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.recipes.train import loop as train_loop
from sparsort.recipes.train.config import TrainConfig
from sparsort.recipes.train.model import make_model, make_tokenizer
from sparsort.recipes.train.recipe import RECIPES, Recipe, read_recipe
from sparsort.recipes.train.sparse import SparseTraining, summary
from sparsort.recipes.train.train import train

ROOT = Path(__file__).parents[3]
TEXT = "{question} {answer}"
N, MAX_LENGTH, LR, STEPS = 32, 32, 2e-3, 12
_BLOCKS = {"block_size": 4, "blocks": 2}
ATTENTION: dict[str, Any] = {"selector": "index_branch", **_BLOCKS, "index_dim": 8, "alignment_weight": 0.5}
RECIPE: dict[str, Any] = {
    "train": {
        **{"max_length": MAX_LENGTH, "learning_rate": LR, "lr_schedule": "constant"},
        **{"max_steps": STEPS, "save_steps": 5, "seed": 5},
    },
    "curriculum": {"stages": 2, "batch_size": 4},
    "attention": ATTENTION,
    "schedule": {"warmup_share": 0.25, "start": 6, "anneal_share": 0.5},
}
# Settings of the recipe that other selectors do not read, and refuse.
UNREAD = {"moba": ("index_dim", "alignment_weight"), "lm_trained": ("alignment_weight",)}
# Of 12 steps: 3 of warm-up, then from 6 blocks to 2 in 6 steps.
MODES = [*[("full", 6)] * 3, *[("sparse", blocks) for blocks in (6, 5, 5, 4, 3, 3, 2, 2, 2)]]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    lines = (ROOT / "examples" / "graded.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: N + 6]]


@pytest.fixture(scope="module")
def data(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows, their lengths as scores, and held-out rows."""
    scores = [float(len(row["question"])) for row in rows[:N]]
    return {"data": rows[:N], "text": TEXT, "scores": scores, "eval_data": rows[N:]}


@pytest.fixture(scope="module")
def whole(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(**data, out=out, recipe=RECIPE)
    return out


def _changed(**tables: dict[str, Any]) -> dict[str, Any]:
    made = {name: {**RECIPE.get(name, {}), **tables.get(name, {})} for name in {**RECIPE, **tables}}
    for name in set(UNREAD.get(made["attention"]["selector"], ())) - set(tables.get("attention", {})):
        del made["attention"][name]
    return made


def _history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def _losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in _history(out) if "loss" in entry]


def _ids(rows: list[dict[str, Any]]) -> list[list[int]]:
    """ByT5: a byte is its value and 3, and 1 ends a text."""
    return [[*(byte + 3 for byte in TEXT.format(**row).encode()), 1][:MAX_LENGTH] for row in rows]


def _batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _same(left: Path, right: Path) -> None:
    assert (left / "history.jsonl").read_bytes() == (right / "history.jsonl").read_bytes()
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (left, right)]
    assert weights[0] == weights[1]


# One run


def test_the_losses_are_those_of_a_plain_loop(data: dict[str, Any], whole: Path) -> None:
    plan, ids = CurriculumPlan.open(whole / "plan"), _ids(data["data"])
    with torch.random.fork_rng(devices=[]):
        model = make_model("tiny", make_tokenizer("tiny"), 5, longest=MAX_LENGTH)
    sparsort.attach_index_branch(model, **ATTENTION, seed=5)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    expected = []
    for step, (mode, blocks) in enumerate(MODES):
        state = model.sparse_attention
        state.mode, state.budget = mode, FixedBudget(blocks=blocks)
        epoch, number = divmod(step, plan.n_batches)
        loss = model(**_batch([ids[row] for row in plan.batch(number, epoch)])).loss
        expected.append((loss.item(), state.lm_loss.item(), sum(v.item() for v in state.alignment.values()) / 2))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = [entry for entry in _history(whole) if "loss" in entry]
    for name, values in zip(("loss", "sparse/lm_loss", "sparse/kl"), zip(*expected, strict=True), strict=True):
        assert [entry[name] for entry in found] == pytest.approx(list(values), rel=1e-3), name
    assert expected[-1][1] < expected[0][1] - 0.5


def test_the_model_that_is_saved_is_sparse_and_its_loss_the_held_out_one(data: dict[str, Any], whole: Path) -> None:
    losses = {}
    for name, model in (
        ("sparse", sparsort.load_sparse(whole / "model")),
        ("dense", AutoModelForCausalLM.from_pretrained(whole / "model")),
    ):
        total = count = 0.0
        for row in _ids(data["eval_data"]):
            with torch.no_grad():
                total += model(**_batch([row])).loss.item() * (len(row) - 1)
            count += len(row) - 1
        losses[name] = total / count
    found = _history(whole)[-1]["eval_loss"]
    assert found == pytest.approx(losses["sparse"], rel=1e-5)
    assert found != pytest.approx(losses["dense"], rel=1e-4)


def test_the_logs_and_the_result_say_what_attention_did(data: dict[str, Any], whole: Path) -> None:
    entries = [entry for entry in _history(whole) if "loss" in entry]
    measured = {"mass", "recall", "blocks", "most_blocks", "dead", "gflops", "gflops_dense"}
    for entry, (mode, blocks) in zip(entries, MODES, strict=True):
        names = {name.removeprefix("sparse/") for name in entry if name.startswith("sparse/")}
        assert names == {"lm_loss", "kl", "kl/0", "kl/1"} | (measured if mode == "sparse" else set())
        if mode == "sparse":
            assert entry["sparse/most_blocks"] == blocks
    result = train(**data, out=whole, recipe=RECIPE)
    assert result.resumed == STEPS
    assert result.sparse is not None
    # A tenth of 12 steps: the last two.
    last = entries[-2:]
    for name in measured - {"most_blocks"}:
        assert result.sparse[name] == pytest.approx(sum(entry[f"sparse/{name}"] for entry in last) / 2)
    dense, spent = (sum(entry[f"sparse/{name}"] for entry in last) for name in ("gflops_dense", "gflops"))
    assert result.sparse["saving"] == pytest.approx(dense / spent)
    assert json.loads((whole / "result.json").read_text())["sparse"] == result.sparse


def test_an_interrupted_run_continues_and_ends_the_same(
    data: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train_loop.TextTrainer.training_step
    for torn, begins in ((7, 0), (11, 5)):

        def tear(self: Any, *args: Any, at: int = torn, **kwargs: Any) -> Any:
            if self.state.global_step == at:
                raise SystemExit
            return step(self, *args, **kwargs)

        monkeypatch.setattr(train_loop.TextTrainer, "training_step", tear)
        with pytest.raises(SystemExit):
            train(**data, out=tmp_path / "run", recipe=RECIPE)
        assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{begins + 5}").exists()
    monkeypatch.undo()
    assert train(**data, out=tmp_path / "run", recipe=RECIPE).resumed == 10
    _same(tmp_path / "run", whole)


def test_another_recipe_in_the_same_folder_is_refused_with_what_differs(data: dict[str, Any], whole: Path) -> None:
    for other, message in (
        (_changed(attention={"selector": "moba"}), r"attention selector \('index_branch' there, 'moba' now\)"),
        (_changed(attention={"alignment_weight": 1.0}), r"attention alignment_weight \(0\.5 there, 1\.0 now\)"),
        (_changed(schedule={"warmup_share": 0.5}), r"attention warmup_share \(0\.25 there, 0\.5 now\)"),
        ({"train": RECIPE["train"], "curriculum": RECIPE["curriculum"]}, "attention selector .* None now"),
    ):
        with pytest.raises(SparsortError, match=message):
            train(**data, out=whole, recipe=other)


def test_a_dense_run_is_no_sparse_one(data: dict[str, Any], tmp_path: Path) -> None:
    result = train(**data, out=tmp_path, recipe={"train": {**RECIPE["train"], "max_steps": 1}})
    assert result.sparse is None
    assert not [name for name in _history(tmp_path)[0] if name.startswith("sparse/")]
    with pytest.raises(SparsortError, match=r"attention selector \(None there, 'index_branch' now\)"):
        train(**data, out=tmp_path, recipe=_changed(train={"max_steps": 1}))


@pytest.mark.parametrize(
    "curriculum", [{"packing": "next_fit", "pack_length": 64, "batch_size": 4}, {"token_budget": 96}]
)
def test_every_kind_of_batch_trains_in_any_division(
    curriculum: dict[str, Any], data: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**_changed(train={"max_steps": 2}), "curriculum": curriculum}
    result = train(**data, out=tmp_path / "whole", recipe=recipe)
    assert result.sparse is not None
    assert result.sparse["mass"] is not None
    if "token_budget" in curriculum:
        return
    train(**data, out=tmp_path / "parts", recipe=recipe, per_device_batch=2, accumulate=2)
    # A mean over tokens where the whole batch has one over labels: rows of unlike length differ by a little.
    assert _losses(tmp_path / "parts") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-2)


def test_texts_shorter_than_a_block_leave_nothing_to_choose(tmp_path: Path) -> None:
    rows = [{"question": "Why?", "answer": "x" * (n % 3)} for n in range(8)]
    recipe = {"train": {"max_steps": 2}, "attention": {}}
    result = train(rows, TEXT, out=tmp_path, curriculum={"schedule": "shuffle"}, recipe=recipe, eval_share=0.25)
    assert result.eval_loss is not None
    assert result.sparse is not None
    assert (result.sparse["mass"], result.sparse["recall"], result.sparse["most_blocks"]) == (None, None, 1)


def test_an_online_difficulty_goes_with_it(data: dict[str, Any], tmp_path: Path) -> None:
    curriculum = {"mode": "pool", "pacing": "linear:start=0.3", "batch_size": 4}
    recipe = {**_changed(train={"max_steps": 3}), "curriculum": curriculum}
    assert train(**data, out=tmp_path, recipe=recipe, online=True).sparse is not None


# A model that is there


def test_a_frozen_base_is_not_changed(
    data: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[int] = []
    loop = train_loop.run_trainer

    def kept(*args: Any, **kwargs: Any) -> Any:
        trainer, resumed = loop(*args, **kwargs)
        handed.extend(weight.numel() for group in trainer.optimizer.param_groups for weight in group["params"])
        return trainer, resumed

    monkeypatch.setattr(train_loop, "run_trainer", kept)
    folder = make_tiny_model("llama")
    attention = {"selector": "seer", "block_size": 4, "blocks": 2, "index_dim": 8, "freeze_base": True}
    recipe = {**_changed(train={"max_steps": 2}), "attention": attention}
    train(**data, out=tmp_path, recipe=recipe, model=str(folder))
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    sparse = sparsort.load_sparse(tmp_path / "model").state_dict()
    branch = {name: weight for name, weight in sparse.items() if ".index_branch." in name}
    assert all(torch.equal(weight, sparse[name]) for name, weight in before.items())
    assert sum(handed) == sum(weight.numel() for weight in branch.values()) > 0
    fresh = sparsort.attach_index_branch(
        AutoModelForCausalLM.from_pretrained(folder), selector="seer", block_size=4, blocks=2, index_dim=8, seed=5
    ).state_dict()
    assert not any(torch.equal(weight, fresh[name]) for name, weight in branch.items())


def test_a_model_with_an_index_branch_keeps_training_it(data: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    trained = sparsort.load_sparse(whole / "model").state_dict()
    sparse = read_recipe(_changed(attention={"blocks": 3})).sparse
    assert sparse is not None
    model = make_model(str(whole / "model"), make_tokenizer("tiny"), 0, longest=MAX_LENGTH)
    sparse.attach(model, str(whole / "model"), STEPS)
    assert {name: weight.tolist() for name, weight in model.state_dict().items()} == {
        name: weight.tolist() for name, weight in trained.items()
    }
    assert model.sparse_attention.config.blocks == 3
    with pytest.raises(SparsortError, match=r"would drop.*--recipe"):
        train(**data, out=tmp_path / "dense", model=str(whole / "model"))
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"selector": "moba"}, r"selector \('index_branch' there, 'moba' in the recipe\)"),
        # Its weights have the same names and shapes.
        ({"selector": "lm_trained"}, r"selector \('index_branch' there, 'lm_trained' in the recipe\)"),
        ({"index_dim": 16}, r"differ in index_dim \(8 there, 16 in the recipe\)\."),
        ({"index_norm": False}, r"differ in index_norm \(True there, False in the recipe\)\."),
        ({"layers": [0]}, r"differ in layers \(None there, \(0,\) in the recipe\)\."),
    ],
)
def test_a_recipe_that_would_drop_a_trained_branch_is_refused_before_anything_is_written(
    attention: dict[str, Any], message: str, data: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(SparsortError, match=message):
        train(**data, out=tmp_path / "run", model=str(whole / "model"), recipe=_changed(attention=attention))
    assert not (tmp_path / "run").exists()


def test_another_branch_is_trained_on_a_copy_that_is_dense_by_its_configuration(
    data: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(whole / "model", tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    del config["sparse_attention"]
    (copied / "config.json").write_text(json.dumps(config))
    recipe = _changed(attention={"selector": "moba"}, train={"max_steps": 1})
    train(**data, out=tmp_path / "moba", model=str(copied), recipe=recipe)
    # MoBA has no weights that could be dropped.
    recipe = _changed(train={"max_steps": 1})
    train(**data, out=tmp_path / "branch", model=str(tmp_path / "moba" / "model"), recipe=recipe)
    weights = sparsort.load_sparse(tmp_path / "branch" / "model").state_dict()
    assert any(".index_branch." in name for name in weights)


@pytest.mark.parametrize(
    ("family", "overrides", "attention", "message"),
    [
        ("gemma3", {"layer_types": ["sliding_attention"] * 3}, {}, "every layer .* sliding window"),
        ("gpt2", {}, {}, "model type 'gpt2'.* cannot be given an index branch"),
        ("llama", {}, {"layers": [0, 3]}, "layers names layer 3"),
        ("tiny", {}, {"selector": "seer", "freeze_base": True}, "'tiny' starts from random weights"),
        ("tiny", {}, {"layers": [7]}, "layers names layer 7"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(
    family: str,
    overrides: dict[str, Any],
    attention: dict[str, Any],
    message: str,
    data: dict[str, Any],
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = family if family == "tiny" else str(make_tiny_model(family, **overrides))
    with pytest.raises(SparsortError, match=message):
        train(**data, out=tmp_path / "run", recipe=_changed(attention=attention), model=model)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_trains_a_model_that_loads(
    name: str, data: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(make_tiny_model("llama")) if name == "sparse_retrofit" else "tiny"
    result = train(
        **data, out=tmp_path, recipe=name, curriculum={"batch_size": 2}, model=model, max_steps=2, max_length=160
    )
    assert result.sparse is not None
    assert result.sparse["mass"] is not None
    assert (result.sparse["kl"] is not None) == (name in ("sparse", "sparse_retrofit"))
    loaded = sparsort.load_sparse(tmp_path / "model")
    shipped = read_recipe(name).sparse
    assert shipped is not None
    assert loaded.sparse_attention.config == shipped.attention
    assert CurriculumPlan.open(tmp_path / "plan").settings.stages == 10


# What a recipe may say


def test_the_shipped_recipes_are_those_that_are_named() -> None:
    found = sorted(path.stem for path in (ROOT / "recipes" / "train" / "presets").glob("*.toml"))
    assert found == sorted(RECIPES)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("sparce", "Did you mean 'sparse'"),
        ("nowhere.toml", "cannot read nowhere.toml"),
        ({"atention": {}}, r"unknown table .*'atention'.* Did you mean 'attention'"),
        ({"attention": 3}, r"expected a table, \[attention\]"),
        ({"attention": {"selecter": "moba"}}, "Did you mean 'selector'"),
        ({"train": {"epochs": 2, "max_steps": 3}}, "epochs=2 has no effect: max_steps=3 sets the length"),
        ({"attention": {"freeze_bass": True}}, "Did you mean 'freeze_base'"),
        ({"attention": {"selector": "mobba"}}, "Did you mean 'moba'"),
        ({"attention": {"blocks": "many"}}, "blocks is 'many', but a whole number is expected"),
        ({"attention": {}, "schedule": {"warm_share": 0.1}}, "Did you mean 'warmup_share'"),
        ({"attention": {}, "schedule": {"warmup_share": 1.5}}, "from 0 to 1, not 1.5"),
        ({"attention": {}, "schedule": {"warmup_share": "half"}}, "warmup_share is 'half', but a number is expected"),
        ({"attention": {}, "schedule": {"warmup_share": 1.5}}, "^the recipe: warmup_share"),
        ({"attention": {"selector": "mobba"}}, "^the recipe: unknown selector"),
        ({"train": {"epochs": 0}}, "^the recipe: epochs must be"),
        (
            {"attention": {"top_p": 0.9}, "schedule": {"start": 2, "anneal_share": 0.5}},
            r"^the recipe: start=2\.0 is not a valid top_p",
        ),
        (
            {"attention": {"threshold": 0.1}, "schedule": {"start": 2, "anneal_share": 0.5}},
            r"start=2\.0 is not a valid threshold",
        ),
        (
            {"attention": {}, "schedule": {"start": math.inf, "anneal_share": 0.5}},
            "start=inf is not a number of blocks",
        ),
        ({}, "the recipe is empty"),
        (5, r"a recipe is a name \(sparse, .*not 5"),
        (["sparse"], r"a recipe is a name"),
        (b"sparse", r"a recipe is a name"),
        ({"attention": {}, "schedule": {"start": 4}}, "belong together"),
        ({"attention": {}, "schedule": {"anneal_share": 0.2}}, "belong together"),
        (
            {"attention": {}, "schedule": {"warmup_share": 0.8, "start": 4, "anneal_share": 0.3}},
            "more than the whole run",
        ),
        ({"attention": {"selector": "window", "freeze_base": True}}, "'window' has no weights"),
        ({"schedule": {"warmup_share": 0.1}}, r"there is no \[attention\]"),
        ({"train": {"learning_rat": 1e-3}}, "Did you mean 'learning_rate'"),
        ({"train": {"lr_schedule": "cosin"}}, "Did you mean 'cosine'"),
        ({"curriculum": {"stage": 3}}, "Did you mean 'stages'"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_with_the_nearest_name(recipe: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        read_recipe(recipe)


def test_a_start_that_the_budget_cannot_be_is_refused_before_training(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = _changed(schedule={"start": 0.5})
    with pytest.raises(SparsortError, match=r"^the recipe: start=0\.5 is not a number of blocks"):
        train(**data, out=tmp_path / "run", recipe=recipe)
    assert not (tmp_path / "run").exists()


def test_an_empty_file_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("# nothing\n")
    with pytest.raises(SparsortError, match=r"empty\.toml is empty, so it has the same effect as no recipe"):
        read_recipe(tmp_path / "empty.toml")


def test_too_many_stages_say_that_the_recipe_has_them(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        SparsortError, match=r"10 stages do not fit in an epoch of 4 batches.*those of the recipe: .*--stages"
    ):
        train(**data, out=tmp_path, recipe="sparse")


def test_a_file_says_what_the_tables_say(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        "[train]\nmax_steps = 3\n[curriculum]\nstages = 2\n[attention]\nselector = 'moba'\nlayers = [1]\n"
        "freeze_base = false\n[schedule]\nwarmup_share = 0.5\nstart = 20\nanneal_share = 0.25\n"
    )
    attention = sparsort.SparseAttentionConfig(selector="moba", layers=(1,))
    expected = SparseTraining(attention=attention, warmup_share=0.5, start=20.0, anneal_share=0.25)
    found = read_recipe(tmp_path / "mine.toml")
    assert found == Recipe(train={"max_steps": 3}, curriculum={"stages": 2}, sparse=expected)
    assert found == read_recipe(str(tmp_path / "mine.toml"))
    schedule = expected.schedule(10)
    assert (schedule.warmup_steps, schedule.start, schedule.anneal_steps) == (5, 20.0, 2)
    assert expected.schedule(1).warmup_steps == 1


def test_arguments_override_the_recipe_and_the_settings_that_they_exclude() -> None:
    recipe = Recipe(
        train={"max_steps": 3, "eval_share": 0.2, "learning_rate": 1e-3}, curriculum={"stages": 2, "batch_size": 4}
    )
    assert recipe.without({"learning_rate"}) == recipe
    assert recipe.without({"epochs"}).train == {"eval_share": 0.2, "learning_rate": 1e-3}
    assert recipe.without({"schedule"}).curriculum == {"batch_size": 4}
    assert recipe.without({"token_budget"}).curriculum == {"stages": 2}
    assert recipe.without({"eval_data"}).train == {"max_steps": 3, "learning_rate": 1e-3}
    with_plan = recipe.without({"plan"})
    assert (with_plan.train, with_plan.curriculum) == ({"max_steps": 3, "learning_rate": 1e-3}, {})


def test_a_recipe_and_a_whole_configuration_of_training_exclude_each_other(
    data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SparsortError, match="only the settings that differ from the recipe, by name"):
        train(**data, out=tmp_path, recipe=RECIPE, config=TrainConfig())


def test_the_summary_omits_what_was_not_measured() -> None:
    log: list[dict[str, Any]] = [{"loss": 1.0, "sparse/kl": float(n)} for n in range(20)]
    log.append({"eval_loss": 2.0})
    assert summary(log)["kl"] == 18.5
    assert summary(log)["mass"] is None
    assert summary(log)["saving"] is None


@pytest.mark.slow
def test_two_processes_train_as_one(data: dict[str, Any], whole: Path, tmp_path: Path, forks: ForkServer) -> None:
    call = f"train(**{data!r}, out={str(tmp_path / 'run')!r}, recipe={RECIPE!r})"
    code = f"from sparsort.recipes.train.train import train\n{call}\n"
    codes = forks.run_ranks(tmp_path / "ranks", code)
    assert codes == [0, 0], (tmp_path / "ranks-0.err").read_text(encoding="utf-8")
    assert _losses(tmp_path / "run") == pytest.approx(_losses(whole), rel=1e-2)
    assert _history(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(_history(whole)[-1]["eval_loss"], rel=1e-2)
