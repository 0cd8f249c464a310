"""The sampler in lm-evaluation-harness's own command, `lm_eval run … --include_path`, with a tiny local model.

The command parses its arguments, builds the tasks, prompts the model and writes its samples, which the tests read. All runs share
one process, because the harness takes seconds to import. `test_docs.py` runs the command of the documentation in its own process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forks import ForkServer

pytest.importorskip("lm_eval")

# Ten rows. The second query nearly equals row 1, so it must never get that row.
POOL = [
    {"question": "Does the ferry to the island run in winter?", "label": 1, "hard": 4.0},
    {"question": "Can a whale breathe under water?", "label": 0, "hard": 9.0},
    {"question": "Is the old bridge made of iron?", "label": 1, "hard": 1.0},
    {"question": "Do the shops close at noon on Sundays?", "label": 1, "hard": 7.0},
    {"question": "Was the telegraph invented before the railway?", "label": 0, "hard": 8.0},
    {"question": "Will bread rise without yeast or soda?", "label": 0, "hard": 3.0},
    {"question": "Are tomatoes botanically a fruit?", "label": 1, "hard": 6.0},
    {"question": "Has the tower more than ninety steps?", "label": 1, "hard": 2.0},
    {"question": "Did the comet return last century?", "label": 0, "hard": 5.0},
    {"question": "Must every guest sign the book?", "label": 0, "hard": 0.0},
]
QUERIES = [
    {"question": "Should paint dry before the second coat?", "label": 1, "hard": 0.0},
    {"question": "can a whale breathe under water", "label": 0, "hard": 0.0},
]
WORDS = ["no", "yes"]
_TASK = """
task: {name}
class: !function sparsort.recipes.adapters.lm_eval.QueryTask
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
  cache_dir: {folder}/cache
fewshot_split: train
test_split: test
fewshot_config: {{sampler: !function {file}.demos}}
doc_to_text: "Q: {{{{question}}}}\\nA:"
"""
_OUTPUTS = {
    "generate_until": """
output_type: generate_until
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 4}
doc_to_target: "{{['no', 'yes'][label]}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "multiple_choice": """
output_type: multiple_choice
doc_to_choice: ["no", "yes"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
# Every line of the input is the arguments of one run. The tasks that the harness brings are not indexed, which takes seconds.
_PROGRAM = """
import contextlib, functools, json, logging, sys
import lm_eval.tasks, lm_eval.utils
from lm_eval.__main__ import cli_evaluate

lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["lm_eval", "run", *arguments]
    # The harness sets up its log once, and would keep the file of the first run.
    logging.getLogger("lm_eval").handlers.clear()
    lm_eval.utils._LOGGING_CONFIGURED = False
    with open(f"{name}.log", "w") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        cli_evaluate()
"""


@dataclass(frozen=True)
class Logged:
    """What one run sent to the model: its prompts, and the model's answers, by task and query."""

    prompts: dict[str, list[str]]
    answers: dict[str, list[Any]]
    log: str

    @property
    def cached(self) -> list[tuple[int, int]]:
        """The harness's own report on its cache for each kind of request: (found, not found)."""
        return [(int(a), int(b)) for a, b in re.findall(r"Cached requests: (\d+), Requests remaining: (\d+)", self.log)]


def _read(folder: Path, log: Path) -> Logged:
    prompts, answers = {}, {}
    for file in folder.glob("*/samples_*.jsonl"):
        samples = sorted(map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda one: one["doc_id"])
        task = re.sub(r"^samples_|_\d{4}-.*$", "", file.stem)
        # A multiple choice has one request per label, and all of them have the same context.
        contexts = [{request["arg_0"] for request in sample["arguments"].values()} for sample in samples]
        prompts[task] = [context for [context] in contexts]
        answers[task] = [sample["resps"] for sample in samples]
    return Logged(prompts, answers, log.read_text(encoding="utf-8"))


def _write_tasks(folder: Path, **options: str) -> None:
    """Tasks with these `DemoOptions`, each with written answers and, as NAME_choice, with labels to choose from."""
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", POOL), ("test", QUERIES)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, arguments in options.items():
        (folder / f"{name}.py").write_text(
            "from sparsort.recipes.adapters.lm_eval import DemoOptions, sampler\n"
            f"demos = sampler(DemoOptions({arguments}))\n",
            encoding="utf-8",
        )
        for suffix, output in (("", "generate_until"), ("_choice", "multiple_choice")):
            text = _TASK.format(name=f"{name}{suffix}", folder=folder, file=name) + _OUTPUTS[output]
            (folder / f"{name}{suffix}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Path], forks: ForkServer
) -> dict[str, Logged]:
    """All runs of this file, by name."""
    root = tmp_path_factory.mktemp("lm_eval")
    by_score = "select='first', score_column='hard'"
    drawn = "select='random', order='random'"
    _write_tasks(root / "tasks", hardest=f"order='hard_to_easy', {by_score}", drawn=drawn)
    # The same name, in another folder and with another order.
    _write_tasks(root / "other", hardest=f"order='easy_to_hard', {by_score}")
    model = f"pretrained={make_tiny_model('llama')},dtype=float32"

    def arguments(name: str, *tasks: str, folder: str = "tasks", shots: int = 4, options: tuple[str, ...] = ()) -> Any:
        parts = ["--model", "hf", "--model_args", model, "--device", "cpu", "--include_path", str(root / folder)]
        parts += ["--tasks", ",".join(tasks), "--num_fewshot", str(shots)]
        return [*parts, "--log_samples", "--output_path", str(root / "out" / name), *options]

    both, one = ("hardest", "hardest_choice"), ("hardest",)
    cache, other, built = ("--use_cache", str(root / "answers")), {"folder": "other"}, ("--cache_requests", "true")
    calls = {f"shots_{shots}": arguments(f"shots_{shots}", *both, shots=shots) for shots in (0, 4, 8)}
    calls["shots_4"] += cache
    calls |= {
        "chat": arguments("chat", *both, options=("--apply_chat_template", "--fewshot_as_multiturn", "true")),
        "one_turn": arguments("one_turn", *one, options=("--apply_chat_template", "--fewshot_as_multiturn", "false")),
        **{
            f"seed_{name}": arguments(f"seed_{name}", "drawn", options=("--seed", name[0])) for name in ("1", "1b", "2")
        },
        "cache_again": arguments("cache_again", *both, options=cache),
        "cache_other": arguments("cache_other", *both, options=cache, **other),
        "no_cache_other": arguments("no_cache_other", *both, **other),
        "built_first": arguments("built_first", *one, options=built),
        "built_other": arguments("built_other", *one, options=built, **other),
    }
    environment = {"LM_HARNESS_CACHE_PATH": str(root / "built"), "LMEVAL_LOG_LEVEL": "INFO"}
    program = f"import os; os.chdir({str(root)!r})\n{_PROGRAM}"
    codes = forks.run(root / "all", (program, [json.dumps(calls)], environment))
    assert codes == [0], (root / "all-0.err").read_text(encoding="utf-8")[-3000:]
    return {name: _read(root / "out" / name, root / f"{name}.log") for name in calls}


def _demos(query: int, shots: int, *, hardest_first: bool = True) -> list[dict[str, Any]]:
    """The first rows of the pool, without the one that nearly equals the second query, by difficulty."""
    rows = [row for place, row in enumerate(POOL) if (query, place) != (1, 1)][:shots]
    return sorted(rows, key=lambda row: row["hard"], reverse=hardest_first)


def _prompt(demos: list[dict[str, Any]], query: int) -> str:
    shots = "".join(f"Q: {row['question']}\nA: {WORDS[row['label']]}\n\n" for row in demos)
    return f"{shots}Q: {QUERIES[query]['question']}\nA:"


@pytest.mark.parametrize("task", ["hardest", "hardest_choice"])
@pytest.mark.parametrize("shots", [0, 4, 8])
def test_prompts_have_the_demonstrations_in_our_order_and_never_the_query(
    runs: dict[str, Logged], shots: int, task: str
) -> None:
    assert runs[f"shots_{shots}"].prompts[task] == [_prompt(_demos(query, shots), query) for query in (0, 1)]


def test_without_shots_the_sampler_complains_about_nothing(runs: dict[str, Logged]) -> None:
    warnings = [line for line in runs["shots_0"].log.splitlines() if "WARNING" in line or "sparsort" in line]
    # The harness itself reports that --num_fewshot replaces the number in the task.
    assert all("Overwriting default num_fewshot" in line for line in warnings)


@pytest.mark.parametrize("task", ["hardest", "hardest_choice"])
def test_in_chat_each_demonstration_is_a_turn(runs: dict[str, Logged], task: str) -> None:
    for query, prompt in enumerate(runs["chat"].prompts[task]):
        turns = re.findall(r"\[(user|assistant)\] ?(.*?)\n(?=\[|$)", prompt, re.DOTALL)
        expected = [
            turn
            for row in _demos(query, 4)
            for turn in (("user", f"Q: {row['question']}\nA:"), ("assistant", WORDS[row["label"]]))
        ]
        assert turns == [*expected, ("user", f"Q: {QUERIES[query]['question']}\nA:")]


def test_in_one_turn_the_order_is_the_same(runs: dict[str, Logged]) -> None:
    for query, prompt in enumerate(runs["one_turn"].prompts["hardest"]):
        assert prompt.count("[user]") == 1
        assert f"[user] {_prompt(_demos(query, 4), query)}" in prompt


def test_a_seed_repeats_the_draw_and_another_seed_changes_it(runs: dict[str, Logged]) -> None:
    first, again, other = (runs[f"seed_{name}"].prompts["drawn"] for name in ("1", "1b", "2"))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert all(prompt.lower().count("can a whale breathe under water") == 1 for prompt in (first[1], other[1]))


def test_the_cache_of_answers_is_used_and_keeps_orders_apart(runs: dict[str, Logged]) -> None:
    # Two written answers, and two labels of each of two queries.
    assert sorted(runs["shots_4"].cached) == [(0, 2), (0, 4)]
    assert sorted(runs["cache_again"].cached) == [(2, 0), (4, 0)]
    assert runs["cache_again"].answers == runs["shots_4"].answers
    assert sorted(runs["cache_other"].cached) == [(0, 2), (0, 4)]
    assert runs["cache_other"].answers == runs["no_cache_other"].answers
    assert runs["cache_other"].answers != runs["shots_4"].answers


def test_the_cache_of_built_prompts_is_not_used_because_it_does_not_know_the_order(runs: dict[str, Logged]) -> None:
    expected = [_prompt(_demos(query, 4, hardest_first=False), query) for query in (0, 1)]
    assert runs["built_other"].prompts["hardest"] == expected
    assert "hardest: the prompts are built again despite cache_requests" in runs["built_other"].log
