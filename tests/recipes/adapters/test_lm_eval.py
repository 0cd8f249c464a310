"""The sampler in the real lm-evaluation-harness: a task's YAML, a local file of documents, the harness's dummy model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsort import LengthScorer
from sparsort.errors import SparsortError

pytest.importorskip("lm_eval")

import lm_eval
from jinja2 import UndefinedError
from lm_eval.api.samplers import SAMPLER_REGISTRY, get_sampler
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from sparsort.recipes.adapters.lm_eval import DemoOptions, QueryTask, SparsortSampler, register, sampler

TRAIN = [
    {"question": "Who painted the ceiling of the chapel?", "answer": "Michelangelo", "hard": 2.0},
    {"question": "How far is it to the moon?", "answer": "far", "hard": 5.0},
    {"question": "What is the name of the longest river in Rome?", "answer": "Tiber", "hard": 1.0},
    {"question": "When did the first train leave the new station?", "answer": "at noon", "hard": 4.0},
    {"question": "Which metal melts in the hand?", "answer": "gallium", "hard": 3.0},
]
TEST = [
    {"question": "Where do the swallows go in winter?", "answer": "south", "hard": 0.0},
    {"question": "who painted the ceiling of the chapel", "answer": "Michelangelo", "hard": 0.0},
]
TASK = """
task: local
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
  cache_dir: {folder}/cache
test_split: test
fewshot_split: {split}
{task_class}
fewshot_config:
  sampler: {sampler}
num_fewshot: {shots}
output_type: generate_until
generation_kwargs: {{until: ["\\n"], do_sample: false}}
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
QUERY_TASK = "class: !function sparsort.recipes.adapters.lm_eval.QueryTask"


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    """The harness's registry of samplers, put back afterwards."""
    before = dict(SAMPLER_REGISTRY)
    yield SAMPLER_REGISTRY
    SAMPLER_REGISTRY.clear()
    SAMPLER_REGISTRY.update(before)


def _write_task(
    folder: Path,
    name: str,
    *,
    options: str | None = None,
    split: str = "train",
    task_class: str = QUERY_TASK,
    shots: int = 4,
) -> None:
    for split_name, rows in (("train", TRAIN), ("test", TEST)):
        (folder / f"{split_name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TASK.format(folder=folder, split=split, task_class=task_class, sampler=name, shots=shots)
    (folder / "local.yaml").write_text(text)
    if options is not None:
        (folder / "demos.py").write_text(
            "from sparsort.recipes.adapters.lm_eval import DemoOptions, sampler\n"
            f"ordered = sampler(DemoOptions({options}))\n"
        )


@contextmanager
def _the_harness_may_draw() -> Iterator[None]:
    """Put `random` back: the harness draws a name for a task that has one already."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _evaluate(folder: Path) -> dict[str, Any]:
    """One run of the harness with its dummy model, without the seeds that would set the global generators."""
    with _the_harness_may_draw():
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model="dummy",
            tasks=["local"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=7,
        )
    return results


def _task(folder: Path) -> Any:
    with _the_harness_may_draw():
        return TaskManager(include_path=folder, include_defaults=False).load(["local"])["tasks"]["local"]


def _prompts(folder: Path) -> list[str]:
    """The prompts that the harness would send to a model, by document."""
    task = _task(folder)
    task.set_fewshot_seed(7)
    with _the_harness_may_draw():
        task.build_all_requests()
    return [str(instance.args[0]) for instance in sorted(task.instances, key=lambda instance: instance.doc_id)]


def _prompt(rows: list[dict[str, Any]], query: dict[str, Any]) -> str:
    shots = "".join(f"Q: {row['question']}\nA: {row['answer']}\n\n" for row in rows)
    return f"{shots}Q: {query['question']}\nA:"


def test_a_run_sees_our_order_and_its_results_can_be_written(tmp_path: Path) -> None:
    _write_task(
        tmp_path, "!function demos.ordered", options="order='hard_to_easy', select='first', score_column='hard'"
    )
    results = _evaluate(tmp_path)
    samples = {sample["doc_id"]: sample["arguments"][0][0] for sample in results["samples"]["local"]}
    # The first four by difficulty. The second query nearly equals the first row, so it gets the other four.
    assert samples == {
        0: _prompt([TRAIN[1], TRAIN[3], TRAIN[0], TRAIN[2]], TEST[0]),
        1: _prompt([TRAIN[1], TRAIN[3], TRAIN[4], TRAIN[2]], TEST[1]),
    }
    assert _prompts(tmp_path) == list(samples.values())
    json.dumps(results["configs"], default=handle_non_serializable)


def test_saved_scores_order_the_documents(tmp_path: Path) -> None:
    LengthScorer("characters").score(TRAIN, prompt="{question}").save(tmp_path / "scores")
    options = f"order='easy_to_hard', select='first', scores={str(tmp_path / 'scores')!r}"
    _write_task(tmp_path, "!function demos.ordered", options=options, shots=3)
    assert _prompts(tmp_path)[0] == _prompt([TRAIN[1], TRAIN[0], TRAIN[2]], TEST[0])


def test_a_selector_by_words_sees_the_query(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    options = "order='similarity_ascending', select='bm25', prompt='{question}'"
    _write_task(tmp_path, "!function demos.ordered", options=options, shots=1)
    assert _prompts(tmp_path)[1] == _prompt([TRAIN[2]], TEST[1])


def test_a_registered_name_is_known_to_the_yaml(tmp_path: Path, registry: dict[str, Any]) -> None:
    for order in ("length_ascending", "length_descending"):  # the second replaces the first
        register(DemoOptions(order=order, select="first", text=lambda row: str(row["question"])), "by_length")
    assert issubclass(get_sampler("by_length"), SparsortSampler)
    _write_task(tmp_path, "by_length", shots=3)
    assert _prompts(tmp_path)[0] == _prompt([TRAIN[2], TRAIN[0], TRAIN[1]], TEST[0])
    with pytest.raises(SparsortError, match="already has a sampler called 'first_n'"):
        register(DemoOptions(order="given"), "first_n")
    assert registry["first_n"].__name__ == "FirstNSampler"


def test_without_the_query_it_refuses_and_says_how_to_give_it(tmp_path: Path) -> None:
    options = "order='given', select='first'"
    _write_task(tmp_path, "!function demos.ordered", options=options, task_class="")
    with pytest.raises(SparsortError, match=r"class: !function sparsort\.recipes\.adapters\.lm_eval\.QueryTask"):
        _prompts(tmp_path)


def test_the_query_is_known_where_the_documents_are_the_test_split(tmp_path: Path) -> None:
    options = "order='given', select='first'"
    _write_task(tmp_path, "!function demos.ordered", options=options, task_class="", split="test", shots=1)
    assert _prompts(tmp_path) == [_prompt([TEST[1]], TEST[0]), _prompt([TEST[0]], TEST[1])]


def test_no_shots_ask_for_nothing(tmp_path: Path) -> None:
    _write_task(tmp_path, "!function demos.ordered", options="order='given'", task_class="", shots=0)
    assert _prompts(tmp_path) == [_prompt([], row) for row in TEST]


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    _write_task(tmp_path, "!function demos.ordered", options="order='given'", shots=5)
    with pytest.raises(SparsortError, match="5 demonstrations were asked for, but only 4 of the pool's 5"):
        _prompts(tmp_path)


def test_the_harnesss_seed_draws_the_same_for_every_query_and_other_documents_replace_the_first() -> None:
    ours = sampler(DemoOptions(order="given", select="random", allow_leaks=True))(TRAIN, rnd=None)
    drawn = [[row["question"] for row in ours.set_rnd(seed).sample(3)] for seed in (1, 1, 2, 3, 4, 5)]
    assert drawn[0] == drawn[1]
    assert len({tuple(rows) for rows in drawn}) > 1
    assert ours.sample(3) == ours.sample(3, eval_doc=TEST[0])
    assert [row["question"] for row in ours.sample(2, df=TEST)] != [row["question"] for row in TRAIN[:2]]
    assert all(row in TEST for row in ours.sample(2))


def test_indices_of_few_shot_documents_are_kept_to() -> None:
    options = DemoOptions(order="easy_to_hard", select="first", score_column="hard")
    ours = sampler(options)(TRAIN, fewshot_indices=[3, 0, 4])
    assert ours.sample(3, eval_doc=TEST[0]) == [TRAIN[0], TRAIN[4], TRAIN[3]]
    assert ours.sample(3, eval_doc=TEST[0]) == [TRAIN[0], TRAIN[4], TRAIN[3]]


def test_a_task_with_a_sampler_of_the_harness_is_left_alone(tmp_path: Path) -> None:
    _write_task(tmp_path, "first_n", shots=2)
    task = _task(tmp_path)
    assert isinstance(task, QueryTask)
    assert task.fewshot_context(TEST[0], 2) == _prompt(TRAIN[:2], TEST[0])


@pytest.mark.parametrize(
    ("renamed", "options", "error", "says"),
    [
        ({"question": "q", "answer": "a"}, "", SparsortError, "share no text field"),
        ({"question": "q", "answer": "a"}, ", allow_leaks=True", UndefinedError, "'question' is undefined"),
        ({"answer": "a"}, "", UndefinedError, "'answer' is undefined"),
    ],
)
def test_documents_without_the_templates_fields_do_not_vanish(
    renamed: dict[str, str], options: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    """The harness renders templates strictly, so a document without a field is an error, not an empty demonstration."""
    shots = [{renamed.get(name, name): value for name, value in row.items()} for row in TRAIN]
    _write_task(tmp_path, "!function demos.ordered", options=f"order='given', select='first'{options}", shots=2)
    text = (tmp_path / "local.yaml").read_text(encoding="utf-8").replace("fewshot_split: train\n", "")
    text = text.replace("fewshot_config:\n", f"fewshot_config:\n  samples: {json.dumps(shots)}\n")
    (tmp_path / "local.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=says):
        _prompts(tmp_path)
