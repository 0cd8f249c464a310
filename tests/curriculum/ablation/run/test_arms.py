"""Every arm of an ablation against its definition, read from plain passes over whole prompts: orders, choosers, sets, judges."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsort
from sparsort.curriculum.ablation.recipe.ablation import Ablation, demo_sets
from sparsort.curriculum.ablation.recipe.selectors import SELECTORS
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.results.cells import Cell
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.run import probing, run
from sparsort.curriculum.ablation.run.model import Engine
from sparsort.curriculum.ablation.store.order_notes import neighbour_group
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.curriculum.demos.criteria.mdl_and_cone import organisations
from sparsort.errors import SparsortError
from sparsort.scoring.answers.generation import Generated
from sparsort.scoring.answers.reader import FEATURES
from sparsort.scoring.loading.load import LoadedModel, load_model

WORDS = ["moon", "tree", "river", "stone", "cloud", "lamp", "paper", "glass", "wheel", "garden", "window", "bread"]
LABELS = {"0": "good", "1": "rather bad", "2": "odd"}
PROMPT = "Text: {text}\nKind:"
FREE = ("N/A", "", "[MASK]")
CHOOSERS = ("globale_unlabelled", "locale_unlabelled", "pdo", "pdo_prior", "pdo_null", "best_on_dev", "density", "mdl")
Floats = np.ndarray[Any, Any]


def write(path: Path, numbers: range) -> list[dict[str, str]]:
    rows = [
        {
            "text": f"{WORDS[n % 12]} {n} of {' '.join(WORDS[n * step % 12] for step in range(2, 3 + n % 4))}{'!' * (n % 40)}",
            "label": str((n * 7 + n // 5) % 3),
        }
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train.jsonl", range(40))
    write(folder / "test.jsonl", range(200, 206))
    return folder


@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("gemma3")), dtype="float32", device="cpu")


def a_recipe(folder: Path, **changes: Any) -> Ablation:
    task = Task(name="toy", prompt=PROMPT, answer=" {label}", labels=LABELS, train="train.jsonl", test="test.jsonl")
    fields: dict[str, Any] = {
        "tasks": (task,),
        "data": folder,
        "sets": 1,
        "shots": (4,),
        "random_orders": 5,
        "dev_rows": 7,
    }
    return Ablation(**fields | {"sampled_probes": False, "choosers": CHOOSERS} | changes)


def cell(results: Results, *, calibrated: bool = False) -> Cell:
    (group,) = [group for group in results.cells if group.contextual is calibrated]
    return group


@pytest.fixture(scope="module")
def done(folder: Path, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return sparsort.ablate(a_recipe(folder), out=tmp_path_factory.mktemp("out"), model=loaded, report=False).results


@pytest.fixture(scope="module")
def shown(folder: Path, done: Results) -> list[dict[str, str]]:
    """The demonstrations of the only set, in the selector's order."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [rows[int(name.removeprefix("train:"))] for name in cell(done).sets[0].demo_ids]


def asked(folder: Path, group: Cell) -> list[str]:
    """The test rows in the group's order."""
    texts = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()]
    return [texts[int(name.removeprefix("test:"))] for name in group.items]


# The model, plainly


def log_p(loaded: LoadedModel, before: str, answer: str) -> Floats:
    """The log-probability of each of the answer's tokens, by one pass over the whole text."""
    encoded = loaded.tokenizer(before + answer, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    with torch.inference_mode():
        read = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if end > len(before) and end > begin]
    return np.array([float(read[i - 1, ids[0, i]]) for i in places])


def states(loaded: LoadedModel, text: str, *, normed: bool) -> Floats:
    """(T, H) states before or after the final norm, without those of special tokens in front."""
    seen: list[torch.Tensor] = []
    hook = loaded.model.model.norm.register_forward_hook(lambda _m, given, made: seen.extend((given[0], made)))
    encoded = loaded.tokenizer(text, return_offsets_mapping=True)
    with torch.inference_mode():
        loaded.model(input_ids=torch.tensor([encoded["input_ids"]]))
    hook.remove()
    real = [end > begin for begin, end in encoded["offset_mapping"]]
    return np.asarray(seen[1 if normed else 0][0].double())[real]


def demos_in(order: list[int], rows: list[dict[str, str]]) -> str:
    return "".join(f"Text: {rows[i]['text']}\nKind: {LABELS[rows[i]['label']]}\n\n" for i in order)


def shares(loaded: LoadedModel, before: str, text: str, over: Callable[[Floats], float] = np.sum) -> Floats:
    """(L,) the labels' probabilities by their tokens' sum or mean, which sum to one."""
    score = np.array([over(log_p(loaded, f"{before}Text: {text}\nKind:", f" {words}")) for words in LABELS.values()])
    p: Floats = np.exp(score - score.max())
    return p / p.sum()


def test_the_words_of_what_was_shown_are_kept(done: Results, shown: list[dict[str, str]], folder: Path) -> None:
    group = cell(done)
    texts = [group.demo_texts[name] for name in group.sets[0].demo_ids]
    assert texts == [f"Text: {row['text']}\nKind: {LABELS[row['label']]}" for row in shown]
    assert group.item_texts == [f"Text: {text}\nKind:" for text in asked(folder, group)]
    # They make the prompt that the model read.
    first = group.random[0].order
    assert first is not None
    assert group.sets[0].prompt == "\n\n".join([*(texts[place] for place in first[0]), group.item_texts[0]])


# Orders


def test_orders_by_a_number_of_each_demonstration(
    done: Results, shown: list[dict[str, str]], loaded: LoadedModel
) -> None:
    def gini(values: Floats) -> float:
        x = np.sort(np.abs(values))
        n = len(x)
        return float((2 * np.arange(1, n + 1) - n - 1) @ x / (n * x.sum()))

    sparsity = [gini(states(loaded, f"Text: {row['text']}\nKind:", normed=False)[-1]) for row in shown]
    loss = [-log_p(loaded, f"Text: {row['text']}\nKind:", f" {LABELS[row['label']]}").mean() for row in shown]
    length = [len(demos_in([i], shown)) for i in range(4)]
    group = cell(done)
    for values in (sparsity, loss, length):
        assert len({round(value, 9) for value in values}) == 4
    rising = {
        "dense_to_sparse": sparsity,
        "perplexity_ascending": loss,
        "length_ascending": length,
    }
    for name, values in rising.items():
        assert group.arm(name).order == [np.argsort(values).tolist()], name
    falling = {
        "sparse_to_dense": sparsity,
        "reverse:perplexity_ascending": loss,
        "length_descending": length,
    }
    for name, values in falling.items():
        assert group.arm(name).order == [np.argsort(values)[::-1].tolist()], name


def test_orders_by_similarity_are_each_query_s_own(
    done: Results, shown: list[dict[str, str]], loaded: LoadedModel, folder: Path
) -> None:
    def embedded(text: str) -> Floats:
        mean = states(loaded, f"Text: {text}\nKind:", normed=True).mean(axis=0)
        unit: Floats = mean / np.linalg.norm(mean)
        return unit

    near = np.array([[embedded(text) @ embedded(row["text"]) for row in shown] for text in asked(folder, cell(done))])
    rising = np.argsort(near, axis=1)
    assert len(np.unique(rising, axis=0)) > 1
    group = cell(done)
    np.testing.assert_array_equal(group.arm("similarity_ascending").order_of_item[0], rising)  # type: ignore[index]
    np.testing.assert_array_equal(group.arm("similarity_descending").order_of_item[0], rising[:, ::-1])  # type: ignore[index]


# Choosers


@pytest.fixture(scope="module")
def read(done: Results, shown: list[dict[str, str]], loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """What the model says to the dev rows, to nothing and to the test rows, (R, queries, L), under every random order."""
    data = TaskData(a_recipe(folder).load_tasks()[0], a_recipe(folder))
    befores = [demos_in(arm.order[0], shown) for arm in cell(done).random if arm.order is not None]
    dev = [row["text"] for row in data.splits.dev]

    def log_p_after(texts: list[str]) -> Floats:
        return np.array([[shares(loaded, before, text) for text in texts] for before in befores])

    last = [[states(loaded, f"{before}Text: {text}\nKind:", normed=True)[-1] for text in dev] for before in befores]
    return {
        "dev": log_p_after(dev),
        "free": log_p_after(list(FREE)),
        "test": log_p_after(asked(folder, cell(done))),
        "gold": [int(row["label"]) for row in data.splits.dev],
        "prior": np.bincount([int(row["label"]) for row in data.splits.pool]) / len(data.splits.pool),
        "last": np.array(last),
    }


def entropy(p: Floats) -> Floats:
    found: Floats = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    return found


def relative_l0(values: Floats) -> Floats:
    """The share of a state's magnitudes above their mean by more than their deviation."""
    sizes = np.abs(values)
    found: Floats = (sizes > sizes.mean(axis=-1, keepdims=True) + sizes.std(axis=-1, ddof=1, keepdims=True)).mean(
        axis=-1
    )
    return found


@pytest.mark.parametrize("calibrated", [False, True])
def test_choosers_take_what_their_rule_names(done: Results, read: dict[str, Any], calibrated: bool) -> None:
    """Scores by hand; where several orders share the best one, any of them is right."""
    p = read["dev"]
    if calibrated:
        p = p / read["free"].mean(axis=1, keepdims=True)
        p = p / p.sum(axis=-1, keepdims=True)
    mean = p.mean(axis=1)
    histogram = (p.argmax(axis=-1)[..., None] == np.arange(3)).mean(axis=1)
    gold = np.array(read["gold"])
    right, sure = (p.argmax(axis=-1) == gold).mean(axis=1), np.log(p[:, np.arange(len(gold)), gold]).mean(axis=1)
    wanted = {
        "globale_unlabelled": entropy(histogram),
        "locale_unlabelled": entropy(p).mean(axis=1),
        "pdo": -(mean * np.log(mean * 3)).sum(axis=1),
        "pdo_prior": -(mean * np.log(mean / read["prior"])).sum(axis=1),
        # Ties of accuracy go to the likelihood of the right labels.
        "best_on_dev": right + 1e-4 * sure,
    }
    if not calibrated:
        nothing = read["free"].mean(axis=1)
        wanted["pdo_null"] = -(nothing * np.log(nothing * 3)).sum(axis=1)
    group = cell(done, calibrated=calibrated)
    orders = [arm.order[0] for arm in group.random if arm.order is not None]
    assert len(orders) == 5
    for name, score in wanted.items():
        chosen = group.arm(name).order
        assert chosen is not None
        assert score[orders.index(chosen[0])] >= score.max() - 1e-6, name
        # A rule that could not tell orders apart would be tested by nothing.
        assert np.ptp(score) > 1e-6 or name == "globale_unlabelled", name


def test_mdl_takes_for_each_query_the_surest_order(done: Results, read: dict[str, Any]) -> None:
    group = cell(done)
    orders = [arm.order[0] for arm in group.random if arm.order is not None]
    surest = entropy(read["test"]).argmin(axis=0)
    assert len(set(surest.tolist())) > 1
    found = group.arm("mdl").order_of_item
    assert found is not None
    assert found[0].tolist() == [orders[r] for r in surest]


def test_density_takes_the_order_with_the_densest_last_states(done: Results, read: dict[str, Any]) -> None:
    group = cell(done)
    orders = [arm.order[0] for arm in group.random if arm.order is not None]
    density = relative_l0(read["last"]).mean(axis=1)
    chosen = group.arm("density").order
    assert chosen is not None
    assert density[orders.index(chosen[0])] >= density.max() - 1e-9
    assert np.ptp(density) > 0


def test_probes_sampled_from_the_model_are_what_globale_reads(
    folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [f"Text: the {word} is late\nKind: odd\n\nText: cut" for word in WORDS[:5]]
    monkeypatch.setattr(probing, "sample_probes", lambda _reader, prefixes, **_options: written[: len(prefixes)])
    recipe = a_recipe(folder, sampled_probes=True, choosers=("globale", "locale"), orderers=("given",))
    results = sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).results
    group = cell(results)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    demos = [rows[int(name.removeprefix("train:"))] for name in group.sets[0].demo_ids]
    orders = [arm.order[0] for arm in group.random if arm.order is not None]
    p = np.array([[shares(loaded, demos_in(o, demos), f"the {word} is late") for word in WORDS[:5]] for o in orders])
    for name, score in (
        ("globale", entropy((p.argmax(axis=-1)[..., None] == np.arange(3)).mean(axis=1))),
        ("locale", entropy(p).mean(axis=1)),
    ):
        chosen = group.arm(name).order
        assert chosen is not None
        assert score[orders.index(chosen[0])] >= score.max() - 1e-6, name


# Scores, sets, judges


def test_a_label_s_mean_is_over_its_tokens(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    recipe = a_recipe(folder, label_score="mean", orderers=("given",), choosers=("mdl",))
    group = cell(sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).results)
    prompt = group.sets[0].prompt
    tokens = [log_p(loaded, prompt, f" {words}") for words in LABELS.values()]
    assert len({len(one) for one in tokens}) > 1
    np.testing.assert_allclose(group.random[0].log_p[0, 0], [one.mean() for one in tokens], atol=1e-3)


@pytest.mark.parametrize("selector", sorted(set(SELECTORS) - {"random", "bm25"}))
def test_every_selector_makes_sets(selector: str, folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    recipe = a_recipe(
        folder, selectors=(selector,), shots=(3,), random_orders=2, orderers=("length_ascending",), choosers=("mdl",)
    )
    group = cell(sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).results)
    data = TaskData(recipe.load_tasks()[0], recipe)
    each = group.demo_ids_of_item[0] if group.demo_ids_of_item else [group.sets[0].demo_ids]
    assert len(each) in (1, 6)
    assert all(len(set(ids)) == 3 and set(ids) <= set(data.pool_by_id) for ids in each)
    if selector == "balanced":
        assert sorted(data.pool_by_id[name]["label"] for name in each[0]) == ["0", "1", "2"]
    if selector == "knn":
        # No seed changes what is nearest, so a set is chosen from the half of the pool that its seed draws.
        half = np.random.default_rng(0).permutation(len(data.splits.pool))[: (len(data.splits.pool) + 1) // 2]
        means = {
            str(row["id"]): states(loaded, f"Text: {row['text']}\nKind:", normed=True).mean(axis=0)
            for row in (data.splits.pool[place] for place in half)
        }
        for text, ids in zip(asked(folder, group), each, strict=True):
            query = states(loaded, f"Text: {text}\nKind:", normed=True).mean(axis=0)
            near = {n: query @ m / np.linalg.norm(query) / np.linalg.norm(m) for n, m in means.items()}
            assert set(ids) == set(sorted(near, key=lambda n: -near[n])[:3])


def near_of(
    folder: Path, loaded: LoadedModel, group: Cell, recipe: Ablation
) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """The test rows' texts, and for each its nearest rows in the half of the pool that seed 0 draws."""
    pool = TaskData(recipe.load_tasks()[0], recipe).splits.pool
    half = [pool[place] for place in np.random.default_rng(0).permutation(len(pool))[: (len(pool) + 1) // 2]]

    def mean(text: str) -> Floats:
        found: Floats = states(loaded, f"Text: {text}\nKind:", normed=True).mean(axis=0)
        return found / np.linalg.norm(found)

    means = np.array([mean(row["text"]) for row in half])
    texts = asked(folder, group)
    return texts, [[half[place] for place in np.argsort(-(means @ mean(text)))] for text in texts]


def test_topk_cone_takes_the_neighbours_after_which_the_query_costs_least(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    recipe = a_recipe(
        folder, selectors=("topk_cone",), shots=(2, 3), random_orders=2, orderers=("given",), choosers=("mdl",)
    )
    done = sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False)
    for group in (group for group in done.results.cells if not group.contextual):
        assert group.demo_ids_of_item is not None
        texts, near = near_of(folder, loaded, group, recipe)
        for text, neighbours, ids in zip(texts, near, group.demo_ids_of_item[0], strict=True):
            loss = [-log_p(loaded, demos_in([0], [row]), f"Text: {text}\nKind:").sum() for row in neighbours]
            # The cheapest is first, and therefore farthest from the query.
            assert ids == [neighbours[place]["id"] for place in np.argsort(loss)[: group.k]]
    # Losses after single neighbours are computed once for all k, and stored.
    assert sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).tokens_read == 0


def test_neighbours_that_another_process_reads_are_not_read_twice(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    recipe = a_recipe(folder, selectors=("topk_cone",), shots=(2, 3), random_orders=2, orderers=("given",), choosers=())
    engine = Engine(recipe, loaded)
    store, other = (OutcomeStore(tmp_path, engine.identity, feature_names=engine.feature_names) for _ in range(2))
    running = run.AblationRunner(recipe, engine, store)
    two, three = demo_sets(recipe)
    alone = neighbour_group(running.tasks["toy"].task, two)
    assert alone == neighbour_group(running.tasks["toy"].task, three)
    with other.claim(alone) as held:
        assert held
        assert running.run_set(two) is False
        assert running.tokens_read == 0
    assert running.run_set(two)
    once = len(store.read(alone))
    assert once == 6 * min(30, (len(running.tasks["toy"].pool) + 1) // 2)
    assert running.run_set(three)
    assert len(store.read(alone)) == once
    # A few blocks and not one a neighbour.
    assert len(list(store.folder.rglob("*loss*/*.parquet"))) <= 3


def test_a_chat_that_exceeds_the_context_is_refused_before_the_model_runs(
    folder: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    small = load_model(str(make_tiny_model("llama", max_position_embeddings=800)), dtype="float32", device="cpu")
    # Marks that are longer than the turns.
    small.tokenizer.chat_template = (
        "{% for m in messages %}<|the {{ m.role }} says the following|>{{ m.content }}<|end of turn|>{% endfor %}"
    )
    (task,) = a_recipe(folder).load_tasks()
    recipe = a_recipe(folder, tasks=(replace(task, chat=True, answer="{label}"),), shots=(2, 12), choosers=())
    with pytest.raises(SparsortError, match=r"prompts of \d+ tokens with k = 12 \(set 0\).*fewer shots"):
        sparsort.ablate(recipe, out=tmp_path, model=small, report=False)
    assert not list((tmp_path / "store").rglob("*.parquet"))


def test_topk_cone_refuses_a_chat_template_that_cannot_be_cut(
    folder: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    chatty = load_model(str(make_tiny_model("llama")), dtype="float32", device="cpu")
    # The number of turns comes first, so no prompt begins like a shorter one.
    chatty.tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    (task,) = a_recipe(folder).load_tasks()
    recipe = a_recipe(
        folder,
        tasks=(replace(task, chat=True, answer="{label}"),),
        selectors=("topk_cone",),
        shots=(2,),
        choosers=("mdl",),
    )
    with pytest.raises(SparsortError, match="cannot be cut between demonstrations and query"):
        sparsort.ablate(recipe, out=tmp_path, model=chatty, report=False)


def test_topk_mdl_takes_the_set_of_neighbours_under_which_the_label_is_surest(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    recipe = a_recipe(
        folder, selectors=("topk_mdl",), shots=(2,), random_orders=2, orderers=("given",), choosers=("mdl",)
    )
    group = cell(sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).results)
    assert group.demo_ids_of_item is not None
    texts, near = near_of(folder, loaded, group, recipe)
    # Sets by rank among the neighbours; how they are drawn has a test of its own.
    ranks = organisations(np.tile(np.arange(len(near[0])), (len(texts), 1)), 2, seed=0)
    chosen = []
    for query, (text, neighbours) in enumerate(zip(texts, near, strict=True)):
        unsure = [entropy(shares(loaded, demos_in(one, neighbours), text, np.mean)) for one in ranks[query].tolist()]
        chosen.append(int(np.argmin(unsure)))
        wanted = [neighbours[place]["id"] for place in ranks[query, chosen[-1]]]
        assert group.demo_ids_of_item[0][query] == wanted
    assert len(set(chosen)) > 1
    assert sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).tokens_read == 0


@pytest.mark.parametrize("judge", ["number", "math", "exact"])
def test_written_answers_are_judged_and_the_best_order_on_dev_rows_is_taken(
    judge: str, folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = [
        {"text": f"{n} and {n}", "label": f"{n} + {n} #### {2 * n}" if judge == "number" else str(2 * n)}
        for n in range(3, 33)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums), encoding="utf-8")
    task = Task(name="sums", prompt=PROMPT, answer=" {label}", judge=judge, train="sums.jsonl", stop=("\nText",))
    recipe = a_recipe(
        tmp_path, tasks=(task,), test_rows=5, random_orders=6, orderers=("given",), choosers=("best_on_dev", "pdo")
    )

    # Right after the demonstrations that end with the smallest sum, otherwise one too many.
    def writes(_reader: Any, chunks: tuple[str, ...], queries: list[str], **_options: Any) -> Generated:
        numbers = [int(query.split()[1]) for query in queries]
        ends = [int(chunk.split()[1]) for chunk in chunks]
        off = int(ends[-1] != min(ends)) if ends else 1
        marked = "so #### {}" if judge == "number" else "$\\boxed{{{}}}$" if judge == "math" else " {} "
        return Generated(
            texts=[marked.format(2 * n + off) for n in numbers],
            ids=[[1]] * len(queries),
            ended=[True] * len(queries),
            tokens_read=1,
            features=np.zeros((len(queries), len(FEATURES))),
        )

    monkeypatch.setattr(run, "generate", writes)
    done = sparsort.ablate(recipe, out=tmp_path / "out", model=loaded, report=False)
    (group,) = done.results.cells
    smallest = int(np.argmin([int(name.removeprefix("train:")) for name in group.sets[0].demo_ids]))
    for arm in group.random:
        assert arm.order is not None
        assert arm.correct.all() == arm.correct.any() == (arm.order[0][-1] == smallest)
    assert 0 < sum(bool(arm.correct.all()) for arm in group.random) < 6
    assert group.arm("best_on_dev").correct.all()
    assert "pdo" not in {arm.name for arm in group.arms}
    assert any("pdo skipped: they read label scores" in note for note in done.notes)
