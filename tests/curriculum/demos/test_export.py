"""export_demonstrations: each file is opened by the library that it is for, and shows what `assemble` shows."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsort
from sparsort import assemble, export_demonstrations
from sparsort.curriculum.demos.export import EXPORTS
from sparsort.errors import SparsortError

# Characters that mean something in Jinja, in LangChain's templates or in YAML.
DEMOS = [
    {"id": "b", "text": "braces {x} {{ y }} {% z %} {# no #}", "label": "1", "n": 2.5, "meta": {"n": [7]}},
    {"id": "a", "text": "two\nlines: 'quoted' \"twice\" é 😀\u2028", "label": "0", "n": 0.125, "meta": {"n": [8]}},
    {"id": "c", "text": "!function os.system", "label": "1", "n": 3.0, "meta": {"n": [9]}},
]
QUERY = {"text": "is {this} {{literal}}?", "label": "0", "n": 4.0, "meta": {"n": [1]}}
PLAIN: dict[str, Any] = {"prompt": "{{%}} {{{{q}}}}\r\nText: {text}\nLabel:", "answer": " {label}"}
CHAT: dict[str, Any] = {"prompt": "Text: {text}\nLabel:", "answer": " {label}", "system": "Be {brief}.", "chat": True}
HOW = {"seed": 3, "model": "demo", "criterion": "pdo", "tokens_read": 1234}


class Template:
    """A tokenizer that has a chat template, for `assemble`; only the turns are compared."""

    chat_template = "template"

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        return json.dumps(messages)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * len(text)


@pytest.fixture(autouse=True)
def _the_libraries_may_draw() -> Iterator[None]:
    """Put `random` back: the harness and DSPy draw names from it."""
    state = random.getstate()
    yield
    random.setstate(state)


def turns_of(demos: Any, query: Any, **form: Any) -> list[dict[str, str]]:
    return assemble(demos, query, tokenizer=Template(), **form).messages or []


def lm_eval_manager(folder: Path) -> Any:
    """The harness's table of tasks: demos.yaml, and a task of the user's own that includes it and names the test data."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    (folder / "query.jsonl").write_text(json.dumps(QUERY) + "\n")
    files = {"data_files": {"test": str(folder / "query.jsonl")}, "cache_dir": str(folder / "cache")}
    (folder / "own.yaml").write_text(f"include: demos.yaml\ntask: own\ndataset_kwargs: {json.dumps(files)}\n")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert set(manager.all_tasks) == {"demos", "own"}
    return manager


def lm_eval_task(folder: Path) -> Any:
    """The user's own task."""
    return lm_eval_manager(folder).load("own")["tasks"]["own"]


def langchain_prompt(path: Path) -> Any:
    pytest.importorskip("langchain_core")
    from langchain_core.load import load

    with warnings.catch_warnings():
        # The function is in beta, and its default for the classes that it may load will change.
        warnings.simplefilter("ignore")
        return load(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "form",
    [
        PLAIN,
        {**PLAIN, "separator": "\n---\n", "system": "An {instruction}."},
        {"prompt": "{text} {meta.n[0]} {n:.2f} {label!r}", "answer": "{text}: <{label}>"},
    ],
)
def test_lm_eval_shows_the_same_plain_prompt(form: dict[str, Any], tmp_path: Path) -> None:
    export_demonstrations(DEMOS, tmp_path / "demos.yaml", provenance=HOW, **form)
    task = lm_eval_task(tmp_path)
    assert task.fewshot_context(QUERY, len(DEMOS)) == assemble(DEMOS, QUERY, **form).text
    assert task.config.num_fewshot == len(DEMOS)
    about = task.config.metadata["sparsort"]
    assert {name: about[name] for name in HOW} == HOW
    assert about["demonstrations"] == ["b", "a", "c"]
    assert about["version"] == sparsort.__version__


def test_lm_eval_shows_the_same_chat_turns(tmp_path: Path) -> None:
    export_demonstrations(DEMOS, tmp_path / "demos.yaml", **CHAT)

    def as_json(turns: list[dict[str, str]], **_: Any) -> str:
        return json.dumps(turns)

    text = lm_eval_task(tmp_path).fewshot_context(
        QUERY, len(DEMOS), apply_chat_template=True, fewshot_as_multiturn=True, chat_template=as_json
    )
    assert json.loads(text) == turns_of(DEMOS, QUERY, **CHAT)


def test_lm_eval_scores_labels_in_the_words_of_the_prompt(tmp_path: Path) -> None:
    words = {"0": "bad", "1": "5"}
    export_demonstrations(DEMOS, tmp_path / "demos.yaml", label="label", labels=words, **PLAIN)
    task = lm_eval_task(tmp_path)
    renamed = [{**demo, "label": words[str(demo["label"])]} for demo in DEMOS]
    context = task.fewshot_context(QUERY, len(DEMOS))
    assert context == assemble(renamed, QUERY, **PLAIN).text
    requests = task.construct_requests(QUERY, context, metadata=("own", 0, 1))
    assert [request.args[1] for request in requests] == [" bad", " 5"]
    assert task.doc_to_target(QUERY) == 0


def test_lm_eval_runs_the_task(tmp_path: Path) -> None:
    export_demonstrations(DEMOS, tmp_path / "demos.yaml", **PLAIN)
    manager = lm_eval_manager(tmp_path)
    from lm_eval import simple_evaluate

    # Without these the harness would set the global generators.
    seeds = {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None}
    results = simple_evaluate(model="dummy", tasks=["own"], task_manager=manager, bootstrap_iters=0, **seeds)
    assert results["n-shot"] == {"own": 3}
    assert results["samples"]["own"][0]["arguments"][0][0] == assemble(DEMOS, QUERY, **PLAIN).text


def test_dspy_loads_the_demonstrations_in_their_order(tmp_path: Path) -> None:
    dspy = pytest.importorskip("dspy")
    export_demonstrations(DEMOS, tmp_path / "demos.dspy.json", provenance=HOW, **PLAIN)
    saved = json.loads((tmp_path / "demos.dspy.json").read_text(encoding="utf-8"))
    assert saved["metadata"]["sparsort"].items() >= HOW.items()
    program = dspy.Predict(saved["metadata"]["sparsort"]["signature"])
    before = program.signature
    program.load(tmp_path / "demos.dspy.json")
    assert program.demos == [{"text": demo["text"], "label": demo["label"]} for demo in DEMOS]
    assert program.signature.dump_state() == before.dump_state()
    turns = dspy.ChatAdapter().format(program.signature, program.demos, {"text": "x"})
    shown = [turn["content"] for turn in turns if turn["role"] == "user"][:-1]
    assert [str(demo["text"]).split()[0] in text for demo, text in zip(DEMOS, shown, strict=True)] == [True] * 3


def test_dspy_takes_the_system_turn_as_instructions(tmp_path: Path) -> None:
    dspy = pytest.importorskip("dspy")
    export_demonstrations(DEMOS, tmp_path / "demos.dspy.json", **CHAT)
    program = dspy.Predict("text -> label")
    program.load(tmp_path / "demos.dspy.json")
    assert program.signature.instructions == "Be {brief}."


@pytest.mark.parametrize("form", [PLAIN, {**PLAIN, "prompt": "{text!r} {n:.2f}", "system": "An {instruction}."}])
def test_langchain_shows_the_same_plain_prompt(form: dict[str, Any], tmp_path: Path) -> None:
    export_demonstrations(DEMOS, tmp_path / "demos.langchain.json", provenance=HOW, **form)
    template = langchain_prompt(tmp_path / "demos.langchain.json")
    query = {name: QUERY[name] for name in template.input_variables}
    assert template.format(**query) == assemble(DEMOS, QUERY, **form).text
    assert template.metadata["sparsort"].items() >= HOW.items()


def test_langchain_shows_the_same_chat_turns(tmp_path: Path) -> None:
    export_demonstrations(DEMOS, tmp_path / "demos.langchain.json", **CHAT)
    template = langchain_prompt(tmp_path / "demos.langchain.json")
    names = {"system": "system", "human": "user", "ai": "assistant"}
    shown = [
        {"role": names[turn.type], "content": turn.content} for turn in template.format_messages(text=QUERY["text"])
    ]
    assert shown == turns_of(DEMOS, QUERY, **CHAT)


def test_openai_messages_are_the_turns_before_the_query(tmp_path: Path) -> None:
    export_demonstrations(DEMOS, tmp_path / "demos.openai.json", provenance=HOW, **CHAT)
    saved = json.loads((tmp_path / "demos.openai.json").read_text(encoding="utf-8"))
    assert saved["messages"] == turns_of(DEMOS, QUERY, **CHAT)[:-1]
    assert saved["sparsort"].items() >= HOW.items()


def test_whole_conversations(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    demos = [
        {"talk": [system, {"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(2)
    ]
    turns = turns_of(demos, "x", messages="talk")
    export_demonstrations(demos, tmp_path / "demos.openai.json", messages="talk")
    assert json.loads((tmp_path / "demos.openai.json").read_text())["messages"] == turns[:-1]
    export_demonstrations(demos, tmp_path / "demos.langchain.json", messages="talk")
    template = langchain_prompt(tmp_path / "demos.langchain.json")
    shown = template.format_messages(messages=[("human", "x")])
    assert [turn.content for turn in shown] == [turn["content"] for turn in turns]
    for name in ("lm-eval", "dspy"):
        with pytest.raises(SparsortError, match="templates instead of conversations"):
            export_demonstrations(demos, tmp_path / "demos", messages="talk", format=name)
    other = [*demos, {"talk": [{"role": "system", "content": "Be long."}, *demos[0]["talk"][1:]]}]
    with pytest.raises(SparsortError, match="different system turns"):
        export_demonstrations(other, tmp_path / "demos.openai.json", messages="talk")


def test_every_format_has_a_name_of_its_own() -> None:
    endings = [entry.suffix for entry in EXPORTS.values()]
    assert not any(one != other and one.endswith(other) for one in endings for other in endings)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("demos.json", PLAIN, "does not say in which format"),
        ("demos.openai.json", PLAIN, r"chat=True \(--chat\)"),
        ("demos.yaml", {**PLAIN, "answer": "[{label}]"}, "reads an answer in brackets as a list"),
        ("demos.dspy.json", {**PLAIN, "prompt": "{meta.n[0]}"}, "named|variables"),
        ("demos.langchain.json", {**PLAIN, "prompt": "{meta.n[0]}"}, "is a path"),
        ("demos.yaml", {**PLAIN, "prompt": "{nothing}"}, "no field 'nothing'"),
        ("demos.yaml", {**PLAIN, "label": "label", "labels": {"0": "bad"}}, "the labels are '0'"),
        ("demos.yaml", {"prompt": "{text}"}, "needs prompt= and answer="),
        *(
            (
                f"demos{ending}",
                {**PLAIN, "prompt": lambda row: row["text"]},
                "needs a template, and the prompt is a function",
            )
            for ending in (".yaml", ".dspy.json", ".langchain.json", ".openai.json")
        ),
    ],
)
def test_mistakes(name: str, form: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=message):
        export_demonstrations(DEMOS, tmp_path / name, **form)
    assert not list(tmp_path.iterdir())


def test_a_column_that_is_no_name_in_jinja_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match="Rename it"):
        export_demonstrations([{"a b": "x", "label": "1"}], tmp_path / "d.yaml", prompt="{a b}", answer="{label}")
    with pytest.raises(SparsortError, match="Did you mean 'dspy'"):
        export_demonstrations(DEMOS, tmp_path / "d", format="dspi", **PLAIN)
