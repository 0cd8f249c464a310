"""An ablation from data to results on a small model, held against plain scoring of whole prompts, pair by pair."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import ForkServer

import sparsort
from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.results.cells import Arm, Cell
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.run.model import Engine
from sparsort.errors import SparsortError
from sparsort.scoring.loading.load import LoadedModel, load_model

WORDS = ["moon", "tree", "river", "stone", "cloud", "lamp", "paper", "glass", "wheel", "garden", "window", "bread"]
PLACES = ["Rome", "Oslo", "Quito", "Cairo", "Lima", "Perth", "Delhi", "Turin"]


def rows(count: int, start: int) -> list[dict[str, str]]:
    made = []
    for number in range(start, start + count):
        word, place = WORDS[number % len(WORDS)], PLACES[number % len(PLACES)]
        text = f"the {word} number {number} of {place} is {WORDS[(number * 7) % 12]} and {WORDS[(number * 5 + 3) % 12]}"
        made.append({"text": text, "label": str(number * 13 % 3)})
    return made


def write(path: Path, data: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train.jsonl", rows(60, 0))
    write(folder / "test.jsonl", rows(9, 200))
    return folder


@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("llama")), dtype="float32")


def a_task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "toy",
        "prompt": "Text: {text}\nKind:",
        "answer": " {label}",
        "labels": {"0": "good", "1": "rather bad", "2": "odd"},
        "train": "train.jsonl",
        "test": "test.jsonl",
    }
    return Task(**fields | changes)


def a_recipe(folder: Path, **changes: Any) -> Ablation:
    fields: dict[str, Any] = {
        "tasks": (a_task(),),
        "data": folder,
        "sets": 2,
        "shots": (3,),
        "random_orders": 4,
        "dev_rows": 5,
        "test_rows": 9,
        "sampled_probes": False,
        "choosers": ("globale_unlabelled", "locale_unlabelled", "pdo", "best_on_dev", "density", "mdl"),
    }
    return Ablation(**fields | changes)


def only(results: Results, *, calibrated: bool = False) -> Cell:
    (group,) = [group for group in results.cells if group.contextual is calibrated]
    return group


def plain_log_p(loaded: LoadedModel, prompt: str, answer: str) -> float:
    encoded = loaded.tokenizer(prompt + answer, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    with torch.inference_mode():
        log_p = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt) and end > begin]
    return sum(float(log_p[i - 1, ids[0, i]]) for i in places)


def whole_prompt(folder: Path, task: Task, group: Cell, arm: Arm, s: int, q: int) -> str:
    """The prompt of an item, put together from the files and the ids alone."""
    data = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    by_id = {f"train:{number}": row for number, row in enumerate(data)}
    test = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    order = arm.order[s] if arm.order is not None else arm.order_of_item[s, q].tolist()  # type: ignore[index]
    ids = group.demo_ids_of_item[s][q] if group.demo_ids_of_item else group.sets[s].demo_ids
    parts = []
    for place in order:
        row = by_id[ids[place]]
        assert task.labels is not None
        parts.append(f"Text: {row['text']}\nKind: {task.labels[row['label']]}\n\n")
    query = test[int(group.items[q].removeprefix("test:"))]
    return "".join(parts) + f"Text: {query['text']}\nKind:"


@pytest.mark.parametrize("selector", ["random", "bm25"])
def test_every_arm_is_what_plain_scoring_gives(
    folder: Path, loaded: LoadedModel, tmp_path: Path, selector: str
) -> None:
    recipe = a_recipe(folder, selectors=(selector,))
    done = sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False)
    group = only(done.results)
    assert len(group.sets) == 2
    assert len(group.random) == 4
    names = {arm.name for arm in group.arms}
    assert names >= {"sparse_to_dense", "similarity_ascending", "length_descending", "oracle_best", "mdl"}
    assert ("density" in names) == (selector == "random")
    generator = np.random.default_rng(0)
    for arm in [*group.random[:2], *group.arms]:
        s, q = int(generator.integers(2)), int(generator.integers(len(group.items)))
        prompt = whole_prompt(folder, a_task(), group, arm, s, q)
        expected = [plain_log_p(loaded, prompt, answer) for answer in a_task().label_texts()]
        np.testing.assert_allclose(arm.log_p[s, q], expected, atol=2e-3, err_msg=arm.name)
        assert arm.predicted[s, q] == int(np.argmax(expected))
        assert arm.correct[s, q] == (a_task().label_names()[arm.predicted[s, q]] == group.gold[q])


def test_contextual_calibration_divides_by_the_content_free_answers(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    done = sparsort.ablate(a_recipe(folder), out=tmp_path, model=loaded, report=False)
    off, on = only(done.results), only(done.results, calibrated=True)
    for name in ("sparse_to_dense", "similarity_ascending"):
        arm, s, q = off.arm(name), 1, 4
        demos = whole_prompt(folder, a_task(), off, arm, s, q).rpartition("Text: ")[0]
        free = []
        for text in ("N/A", "", "[MASK]"):
            log_p = np.array([plain_log_p(loaded, f"{demos}Text: {text}\nKind:", a) for a in a_task().label_texts()])
            free.append(np.exp(log_p - log_p.max()) / np.exp(log_p - log_p.max()).sum())
        p = np.exp(arm.log_p[s, q] - arm.log_p[s, q].max())
        expected = np.log(p / p.sum()) - np.log(np.mean(free, axis=0))
        np.testing.assert_allclose(on.arm(name).log_p[s, q], expected, atol=2e-3)


def test_choosers_take_the_order_that_their_rule_names(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    done = sparsort.ablate(a_recipe(folder), out=tmp_path, model=loaded, report=False)
    group = only(done.results)
    accuracy = np.array([arm.accuracy for arm in group.random])
    np.testing.assert_array_equal(group.arm("oracle_best").accuracy, accuracy.max(axis=0))
    np.testing.assert_array_equal(group.arm("oracle_worst").accuracy, accuracy.min(axis=0))
    # LocalE by hand: dev rows are those of the pool's split, asked under each random order.
    from sparsort.curriculum.ablation.recipe.task_data import TaskData

    data = TaskData(a_task(), a_recipe(folder))
    s = 1
    mean_entropy = []
    for arm in group.random:
        demos = whole_prompt(folder, a_task(), group, arm, s, 0).rpartition("Text: ")[0]
        entropies = []
        for text in data.dev_texts:
            log_p = np.array([plain_log_p(loaded, demos + text, a) for a in a_task().label_texts()])
            p = np.exp(log_p - log_p.max()) / np.exp(log_p - log_p.max()).sum()
            entropies.append(-(p * np.log(p)).sum())
        mean_entropy.append(np.mean(entropies))
    best = group.random[int(np.argmax(mean_entropy))]
    assert best.order is not None
    assert group.arm("locale_unlabelled").order is not None
    assert group.arm("locale_unlabelled").order[s] == best.order[s]  # type: ignore[index]
    assert group.arm("locale_unlabelled").choosing_tokens[s] > 0


def test_no_test_row_is_a_demonstration(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    copy = tmp_path / "leaky"
    copy.mkdir()
    test = rows(9, 200)
    write(copy / "train.jsonl", [*test, *rows(30, 0)])
    write(copy / "test.jsonl", test)
    done = sparsort.ablate(a_recipe(copy, sets=6), out=tmp_path / "out", model=loaded, report=False)
    leaky = {f"train:{number}" for number in range(9)}
    shown = {name for one in only(done.results).sets for name in one.demo_ids}
    assert shown
    assert not shown & leaky
    assert any("9 training rows were excluded" in note for note in done.notes)


def test_run_again_reads_nothing_and_more_orders_read_only_what_is_new(
    folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = a_recipe(folder, orderers=("sparse_to_dense",), random_orders=2)
    monkeypatch.setattr("sparsort.curriculum.ablation.run.model.device_name", lambda _device: "one processor")
    first = sparsort.ablate(few, out=tmp_path, model=loaded, report=False)
    assert first.tokens_read > 0
    assert first.results.provenance["machine"].startswith("one processor (")
    monkeypatch.setattr("sparsort.curriculum.ablation.run.model.device_name", lambda _device: "another")
    again = sparsort.ablate(few, out=tmp_path, model=loaded, report=False)
    assert again.tokens_read == 0
    # A machine that was asked for nothing is no source of the numbers.
    assert again.results.provenance["machine"] == first.results.provenance["machine"]
    many = a_recipe(folder, orderers=("sparse_to_dense", "length_ascending"))
    more = sparsort.ablate(many, out=tmp_path, model=loaded, report=False)
    assert [name.split(" (")[0] for name in more.results.provenance["machine"].split("), ")] == [
        "another",
        "one processor",
    ]
    whole = sparsort.ablate(many, out=tmp_path / "whole", model=loaded, report=False)
    assert 0 < more.tokens_read < whole.tokens_read
    for arm, other in zip(only(more.results).arms, only(whole.results).arms, strict=True):
        np.testing.assert_array_equal(arm.predicted, other.predicted)
    np.testing.assert_array_equal(only(more.results).random_correct[:2], only(first.results).random_correct)


def test_text_that_is_not_unicode_is_refused(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    test = rows(9, 200)
    test[3]["text"] += " \ud83d"
    write(data / "train.jsonl", rows(60, 0))
    write(data / "test.jsonl", test)
    with pytest.raises(SparsortError, match=r"test:3.*surrogate"):
        sparsort.ablate(a_recipe(data), out=tmp_path / "out", model=loaded, report=False)


def test_another_model_or_other_data_is_refused(
    folder: Path, loaded: LoadedModel, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    recipe = a_recipe(folder, sets=1, orderers=("given",), choosers=("mdl",))
    sparsort.ablate(recipe, out=tmp_path / "out", model=loaded, report=False)
    other = load_model(str(make_tiny_model("qwen3")), dtype="float32")
    with pytest.raises(SparsortError, match="weights"):
        sparsort.ablate(recipe, out=tmp_path / "out", model=other, report=False)
    changed = tmp_path / "changed"
    changed.mkdir()
    write(changed / "train.jsonl", rows(60, 1000))
    write(changed / "test.jsonl", rows(9, 200))
    again = a_recipe(changed, sets=1, orderers=("given",), choosers=("mdl",))
    with pytest.raises(SparsortError, match="other demonstrations"):
        sparsort.ablate(again, out=tmp_path / "out", model=loaded, report=False)


def test_more_shots_than_the_context_holds_are_refused(
    folder: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    small = load_model(str(make_tiny_model("llama", max_position_embeddings=64)), dtype="float32")
    with pytest.raises(SparsortError, match="fewer shots"):
        sparsort.ablate(a_recipe(folder, shots=(8,)), out=tmp_path, model=small, report=False)


def test_more_shots_than_rows_are_refused_before_anything_runs(folder: Path) -> None:
    from sparsort.recipes.ablate import estimate_cost

    with pytest.raises(SparsortError, match="a pool of 55 rows, and 200 shots"):
        estimate_cost(a_recipe(folder, shots=(3, 200)))


def test_chat_prompts_are_those_of_the_template(
    folder: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    chatty = load_model(str(make_tiny_model("llama")), dtype="float32")
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    recipe = a_recipe(folder, sets=1, tasks=(a_task(chat=True),))
    group = only(sparsort.ablate(recipe, out=tmp_path, model=chatty, report=False).results)
    prompt = group.sets[0].prompt
    assert prompt.count("<user>") == 4
    assert prompt.count("<assistant>") == 4
    assert prompt.endswith("<assistant>")
    ids = chatty.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answers = a_task().label_names()
    expected = []
    for answer in answers:
        whole = chatty.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            log_p = chatty.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        expected.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(ids), len(whole))))
    np.testing.assert_allclose(group.random[0].log_p[0, 0], expected, atol=2e-3)


def test_in_chat_too_a_label_that_begins_another_is_scored_with_what_follows_it(
    make_tiny_model: Callable[..., Path],
) -> None:
    tokenizer = load_model(str(make_tiny_model("llama")), dtype="float32").tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    labels = {"0": "good", "1": "good film", "2": "odd"}
    texts = Texts(a_task(labels=labels, chat=True), tokenizer)
    assert texts.answers == ["good</assistant>", "good film</assistant>", "odd</assistant>"]
    demo = "".join(texts.prefix([{"text": "x", "label": "1"}]))
    assert "<assistant>" + texts.answers[1] in demo
    assert Texts(a_task(chat=True), tokenizer).answers == a_task().label_names()
    # A label that the mark itself holds, a mark of white space alone, none, and a template that ends with a user's turn.
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    assert Texts(a_task(labels={"0": "end", "1": "endless"}, chat=True), tokenizer).answers == [
        "end<|end|>",
        "endless<|end|>",
    ]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert Texts(a_task(labels=labels, chat=True), tokenizer).answers[0] == "good\n\n"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Texts(a_task(labels=labels, chat=True), tokenizer).answers == ["good", "good film", "odd"]
    tokenizer.chat_template = (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('last must be user') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert Texts(a_task(labels=labels, chat=True), tokenizer).answers == ["good", "good film", "odd"]


def test_a_chat_template_that_refuses_the_turns_is_reported(
    folder: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    chatty = load_model(str(make_tiny_model("llama")), dtype="float32")
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    task = a_task(chat=True, system="Be good.", answer="{label}")
    with pytest.raises(SparsortError, match=r"no system role.*Omit its system turn"):
        sparsort.ablate(a_recipe(folder, tasks=(task,)), out=tmp_path, model=chatty, report=False)


def test_a_label_that_begins_another_is_scored_with_what_follows_it(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    task = a_task(labels={"0": "good", "1": "good film", "2": "odd"})
    recipe = a_recipe(folder, sets=1, tasks=(task,), orderers=("length_ascending",), choosers=("mdl",))
    group = only(sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).results)
    arm = group.random[0]
    prompt = whole_prompt(folder, task, group, arm, 0, 3)
    expected = [plain_log_p(loaded, prompt, f" {label}\n\n") for label in task.label_names()]
    np.testing.assert_allclose(arm.log_p[0, 3], expected, atol=2e-3)


def test_sampled_probes_and_the_loss_on_the_query(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    recipe = a_recipe(
        folder, sets=1, sampled_probes=True, orderers=("given",), choosers=("cone", "globale", "locale_unlabelled")
    )
    done = sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False)
    group = only(done.results)
    # A model with random weights writes nothing that parses as a query. That is reported, and no probe is invented.
    assert ("globale" in {arm.name for arm in group.arms}) != any(
        "globale" in note for note in done.results.provenance["incomplete"]
    )
    cone, task = group.arm("cone"), a_task()
    assert cone.order_of_item is not None
    for q in (0, 5):
        losses = []
        for arm in group.random:
            prompt = whole_prompt(folder, task, group, arm, 0, q)
            demos, _, query = prompt.rpartition("\n\n")
            losses.append(-plain_log_p(loaded, demos + "\n\n", query))
        best = group.random[int(np.argmin(losses))]
        assert best.order is not None
        assert cone.order_of_item[0, q].tolist() == best.order[0]


def test_generation_is_judged_by_what_is_written(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    task = Task(
        name="write",
        prompt="Text: {text}\nKind:",
        answer=" {label}",
        judge="exact",
        stop=("\n",),
        max_new_tokens=6,
        train="train.jsonl",
        test="test.jsonl",
    )
    recipe = a_recipe(
        folder, sets=1, tasks=(task,), orderers=("length_ascending",), choosers=("best_on_dev", "density")
    )
    group = only(sparsort.ablate(recipe, out=tmp_path, model=loaded, report=False).results)
    assert group.labels == []
    assert {arm.name for arm in group.arms} >= {"length_ascending", "density", "best_on_dev", "oracle_best"}
    assert not any(arm.correct.any() for arm in group.random)
    from sparsort.curriculum.ablation.store.store import OutcomeStore

    store = OutcomeStore.existing(tmp_path / "store")
    (name,) = [name for name in store.groups() if "seed0" in name]
    outcomes = store.read(name)
    assert outcomes.text is not None
    assert outcomes.log_p.shape[1] == 0
    prompt = group.sets[0].prompt
    with torch.inference_mode():
        ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            ids = torch.cat([ids, loaded.model(input_ids=ids).logits[:, -1].argmax(-1)[:, None]], dim=1)
    whole = loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert whole.removeprefix(prompt).split("\n")[0] in outcomes.text
    # Of answers that are what was written under an order, that order gets every one right.
    data = tmp_path / "answered"
    data.mkdir()
    (data / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    test = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    demos = prompt.rpartition("Text: ")[0]
    for row in test:
        ids = loaded.tokenizer(f"{demos}Text: {row['text']}\nKind:", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            written = loaded.model.generate(
                ids, max_new_tokens=6, do_sample=False, eos_token_id=loaded.tokenizer.eos_token_id, pad_token_id=0
            )
        text = loaded.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        row["label"] = text.split("\n")[0].strip() or "nothing"
    write(data / "test.jsonl", test)
    answered = a_recipe(data, sets=1, tasks=(task,), orderers=("given",), choosers=(), calibrated=(True,))
    done = sparsort.ablate(answered, out=tmp_path / "again", model=loaded, report=False)
    (group,) = done.results.cells
    np.testing.assert_array_equal(group.random[0].correct[0], [gold != "nothing" for gold in group.gold])
    assert group.random[0].correct.any()
    assert not group.contextual


def test_predictions_of_a_single_label_are_reported(
    folder: Path, loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "one"
    data.mkdir()
    write(data / "train.jsonl", rows(40, 0))
    write(data / "test.jsonl", [{**row, "label": "0"} for row in rows(9, 200)])
    with caplog.at_level(logging.WARNING, logger="sparsort"):
        done = sparsort.ablate(
            a_recipe(data, sets=1, choosers=("mdl",)), out=tmp_path / "out", model=loaded, report=False
        )
    assert any("label" in note and "only" in note for note in done.notes)


# Runs an ablation; argv: its recipe, its folder, the block after which it dies, and at which function call from there (0, 0: it
# does not).
_CHILD = """
import sys, json
from pathlib import Path
import sparsort
from handshake import die_in
from sparsort.curriculum.ablation.store.store import OutcomeStore
recipe, last, moment = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[3]), int(sys.argv[4])
plain, written = OutcomeStore.write, 0
def write(self, group, outcomes):
    global written
    plain(self, group, outcomes)
    written += 1
    if written == last:
        die_in(moment)
OutcomeStore.write = write
sparsort.ablate(recipe, out=sys.argv[2], report=False)
"""


@pytest.mark.slow
def test_killed_runs_and_two_at_once_end_with_the_same_results(
    folder: Path, tmp_path: Path, make_tiny_model: Callable[..., Path], forks: ForkServer
) -> None:
    model = str(make_tiny_model("llama"))
    recipe = a_recipe(folder, model=model, dtype="float32", sets=3, shots=(3, 5), random_orders=6)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_table()), encoding="utf-8")
    expected = sparsort.ablate(recipe, out=tmp_path / "whole", report=False).results
    for dies in ((1, 1_000), (9, 20_000)):
        job = (_CHILD, [file, tmp_path / "killed", *dies], {})
        assert forks.run(tmp_path / "once", job) == [-signal.SIGKILL]
    job = (_CHILD, [file, tmp_path / "killed", 0, 0], {})
    assert forks.run(tmp_path / "both", job, job) == [0, 0], (tmp_path / "both-0.err").read_text(encoding="utf-8")
    found = Results.load(tmp_path / "killed" / "results")
    for group, other in zip(found.cells, expected.cells, strict=True):
        assert group.key == other.key
        assert group.sets == other.sets
        for arm, like in zip([*group.random, *group.arms], [*other.random, *other.arms], strict=True):
            assert arm.name == like.name
            np.testing.assert_array_equal(arm.predicted, like.predicted)
            np.testing.assert_allclose(arm.log_p, like.log_p, atol=1e-4)


def test_numbers_of_the_engine_do_not_depend_on_other_rows(folder: Path, loaded: LoadedModel) -> None:
    engine = Engine(a_recipe(folder), loaded)
    some = rows(6, 0)
    alone = np.concatenate([engine.sparsity(a_task(), [row], some) for row in some])
    np.testing.assert_allclose(engine.sparsity(a_task(), some, some), alone, atol=1e-5)
    np.testing.assert_allclose(
        engine.loss(a_task(), some), np.concatenate([engine.loss(a_task(), [row]) for row in some]), atol=1e-4
    )
