"""Prompts that a function writes: the same text as a template, a stable hash, and refusals that name the reason."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sparsort
from sparsort import CompressionScorer, LengthScorer, SparsityScorer, SparsortError
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.recipes.adapters.demonstrations import DemoChooser, DemoOptions
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.order.order import order_file
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.score import score_file
from sparsort.scoring.prompts.functions import PromptFunction, is_description
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import PromptSpec

TEXTS = ("a fine film, and funny", "a dull film for nobody", "great acting all along", "a bad, sad plot")
ROWS = [{"id": f"r{n}", "text": text, "label": "no" if n % 2 else "yes"} for n, text in enumerate(TEXTS)]
TEMPLATE = "Is this review kind?\n{text}\nAnswer:"
BULK = "These words are the same in every prompt, and there are more of them than of any review. " * 4
WORDS = re.compile(r"\w+")


def written(row: dict[str, Any]) -> str:
    return f"Is this review kind?\n{row['text']}\nAnswer:"


def bulky(row: dict[str, Any]) -> str:
    return f"{BULK}\n{row['text']}\nAnswer:"


def turns(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["text"]}]


def test_a_function_gives_the_scores_of_its_template() -> None:
    by_template, by_function = (
        CompressionScorer().score(ROWS, prompt, answer=" {label}") for prompt in (TEMPLATE, written)
    )
    assert by_function.difficulty.tolist() == by_template.difficulty.tolist()
    assert by_function.difficulty_of([ROWS[2]]) == by_template.difficulty[2]


def test_turns_of_a_function_are_chat(make_tiny_model: Callable[..., Path]) -> None:
    scorer = SparsityScorer(str(make_tiny_model("llama")))
    static = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{text}"}]
    expected = scorer.score(ROWS, static).difficulty.tolist()
    assert scorer.score(ROWS, turns).difficulty.tolist() == expected
    assert scorer.score(ROWS, lambda row: row["text"], chat=True, system="Be brief.").difficulty.tolist() == expected
    with pytest.raises(
        SparsortError, match=r"row 1: the prompt function .* returned chat turns here, and text for the first row"
    ):
        LengthScorer(unit="characters").score(ROWS, lambda row: row["text"] if row["id"] == "r0" else turns(row))
    with pytest.raises(SparsortError, match="a system turn was given with a plain prompt"):
        scorer.score(ROWS, written, system="Be brief.")


def test_rows_without_a_prompt_have_no_score() -> None:
    results = {"r0": "text", "r1": None, "r2": " ", "r3": float("nan")}
    with pytest.warns(UserWarning, match="3 of 4 rows have no score"):
        scores = LengthScorer(unit="characters").score(ROWS, lambda row: results[row["id"]])
    assert scores.column("status").tolist() == ["ok", "empty", "empty", "empty"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda row: row["txt"],
            r"row 0 \(id 'r0'\): the prompt function .* raised KeyError: 'txt'. The row has the fields id",
        ),
        (lambda row: len(row["text"]), "returned a number; expected text, or chat turns"),
        (lambda row: [{"role": "poet", "content": "x"}], "unknown role 'poet'"),
        (lambda row: [("user", "x")], "turn 0 .* is a list; expected a dictionary"),
    ],
)
def test_a_mistake_names_the_row_and_the_function(function: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        CompressionScorer().score(ROWS, function)


def test_a_function_cannot_change_a_row() -> None:
    def popping(row: dict[str, Any]) -> str:
        return str(row.pop("text"))

    assert CompressionScorer().score(ROWS, popping).difficulty_of(ROWS).tolist() == [
        row["difficulty"] for row in CompressionScorer().score(ROWS, "{text}")
    ]


def test_a_resumed_run_refuses_a_changed_function(tmp_path: Path) -> None:
    def prompt_with(word: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{word} {row['text']}"

    first = CompressionScorer().score(ROWS, prompt_with("Judge:"), out=tmp_path / "out")
    again = CompressionScorer().score(ROWS, prompt_with("Judge:"), out=tmp_path / "out")
    assert again.difficulty.tolist() == first.difficulty.tolist()
    with pytest.raises(SparsortError, match=r"other settings:\n  prompt.turns"):
        CompressionScorer().score(ROWS, prompt_with("Grade:"), out=tmp_path / "out")


def test_a_function_without_a_hash_runs_in_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __call__(self, row: dict[str, Any]) -> str:
            return written(row)

    scores = CompressionScorer().score(ROWS, Writer())
    assert scores.provenance["prompt"]["turns"][0][1].endswith("Writer [source unknown]")
    spec = PromptSpec(Writer())
    # A model that cannot be loaded: the refusal comes before.
    monkeypatch.setattr(ScorerConfig, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for refused in (
        lambda: CompressionScorer().score(ROWS, Writer(), out=tmp_path / "out"),
        lambda: CompressionScorer().score(ROWS, Writer(), like=scores),
        lambda: score_file(ROWS, scorer=ScorerConfig(), prompt=spec, out=tmp_path / "out"),
        lambda: sparsort.calibrate(ROWS, Writer(), answer=" {label}", out=tmp_path / "calibration.json"),
    ):
        with pytest.raises(SparsortError, match=r"the prompt is the function .*Writer, and it uses .* no stable hash"):
            refused()
    assert not list(tmp_path.iterdir())


def _module(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_SOURCE = """
import textwrap
SIZE = 3
def clean(text):
    return text.strip() * SIZE
def unused(text):
    return text
def prompt(row, end="!"):
    return textwrap.dedent(clean(row["text"])) + end
"""


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("SIZE = 3", "SIZE = 4", True),
        ("text.strip()", "text.lower()", True),
        ('end="!"', 'end="?"', True),
        ("def unused(text):", "def another(text):", False),
        ("import textwrap", "import textwrap, json\n\n", False),
    ],
)
def test_the_hash_covers_all_that_the_function_reads(tmp_path: Path, old: str, new: str, *, changes: bool) -> None:
    before = PromptFunction(_module(tmp_path / "before.py", _SOURCE).prompt).description
    after = PromptFunction(_module(tmp_path / "after.py", _SOURCE.replace(old, new)).prompt).description
    assert is_description(before)
    assert (before != after) == changes


def test_the_hash_is_the_same_in_another_process(tmp_path: Path) -> None:
    source = (
        f"{_SOURCE}\nSEEN = {{'a', 'b', 'c'}}\ndef second(row):\n    return str(sorted(SEEN)) + clean(row['text'])\n"
    )
    module = _module(tmp_path / "prompts.py", source)
    code = (
        "import prompts; from sparsort.scoring.prompts.functions import PromptFunction as P; print(P(prompts.second))"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(sparsort.__file__).parents[1]}", "PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == PromptFunction(module.second).description


def test_lambdas_of_one_line_have_hashes_of_their_own() -> None:
    pair = (lambda row: row["text"] if row else "", lambda row: row["label"] if row else "")  # fmt: skip
    same = (lambda row: row["text"] if row else "", 1)
    first, second, third = (PromptFunction(each).description for each in (*pair, same[0]))
    assert first == third
    assert first != second


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (functools.partial(lambda row, end: row["text"] + end, end="."), ""),
        (lambda row: " ".join(WORDS.findall(row["text"])), ""),
        (str, ""),
        (eval("lambda row: row['text']"), "its source cannot be read"),  # noqa: S307
        (lambda row, cache=object(): row["text"], "it uses .* of the type object, whose value has no stable hash"),
        (TEMPLATE.format_map, "'str.format_map' is a builtin_function_or_method"),
    ],
)
def test_which_functions_have_a_hash(function: Any, reason: str) -> None:
    prompt = PromptFunction(function)
    if not reason:
        prompt.need_hash("a run")
        return
    with pytest.raises(SparsortError, match=reason):
        prompt.need_hash("a run")


def test_the_columns_that_a_function_reads() -> None:
    def read(function: Any) -> list[str]:
        return PromptFunction(function).fields_read(ROWS[0], where="row 0")

    assert read(written) == ["text"]
    assert read(lambda row: row.get("label", "") + row.pop("id")) == ["id", "label"]
    assert read(lambda row: "{text}".format(**row)) == ["id", "text", "label"]
    assert read(lambda row: str(dict(row))) == read(lambda row: str(list(row.items()))) == ["id", "text", "label"]


@pytest.mark.parametrize("prompt", [written, bulky])
def test_demonstrations_are_compared_by_what_the_function_reads(prompt: Any) -> None:
    by_template = sparsort.select_demos(ROWS, "acting in a fine film", 3, method="bm25", prompt="{text}")
    by_function = sparsort.select_demos(ROWS, "acting in a fine film", 3, method="bm25", prompt=prompt)
    assert [row["id"] for row in by_function.demos] == [row["id"] for row in by_template.demos]
    chooser = DemoChooser(ROWS, DemoOptions(order="given", select="bm25", prompt=prompt), held_out=[ROWS[1]])
    assert 1 not in chooser.choose({"text": "a dull film"}, 3)
    with pytest.raises(SparsortError, match="the query is among its own demonstrations"):
        sparsort.build_prompt(ROWS, {"text": TEXTS[1]}, prompt=prompt, answer=" {label}")


def test_a_prompt_with_demonstrations_has_the_text_of_the_function() -> None:
    by_template, by_function = (
        sparsort.build_prompt(ROWS[:2], "a new film", prompt=prompt, answer=" {label}")
        for prompt in (TEMPLATE, written)
    )
    assert by_function == by_template
    config = OrderConfig(prompt=PromptSpec(written, answer=" {label}"), k=2, select="first", order="given")
    ordered = order_file(
        ROWS, query="a new film", config=config, scorer=ScorerConfig(scorer="length", unit="characters")
    )
    assert ordered.prompt == by_template


def test_turns_of_a_function_become_the_turns_of_a_prompt(make_tiny_model: Callable[..., Path]) -> None:
    assembled = sparsort.assemble(
        ROWS[:1], {"text": "a new film"}, prompt=turns, answer=" {label}", tokenizer=str(make_tiny_model("llama"))
    )
    assert [(turn["role"], turn["content"]) for turn in assembled.messages or []] == [
        ("system", "Be brief."), ("user", TEXTS[0]), ("assistant", "yes"), ("user", "a new film"),
    ]  # fmt: skip
    assert not assembled.add_special_tokens


def test_other_recipes_take_a_function() -> None:
    queries = [{"text": "a nice evening"}, {"text": "an ugly affair"}]
    chosen = [sparsort.choose_order(ROWS, queries, prompt=prompt, orders=3) for prompt in (TEMPLATE, written)]
    assert chosen[1].order == chosen[0].order
    assert chosen[1].scores == chosen[0].scores
    assert chosen[1].demos == chosen[0].demos
    assert is_description(chosen[1].provenance["prompt"])
    with pytest.raises(SparsortError, match="returned chat turns, and a demonstration here is one question"):
        sparsort.choose_order(ROWS, queries, prompt=turns, orders=3)
    with pytest.raises(SparsortError, match="a task is stored as data, so its prompt is a format string"):
        Task(name="t", prompt=written, answer=" {label}", labels={"a": "a", "b": "b"})  # type: ignore[arg-type]


def test_a_calibration_of_a_function_asks_for_it(tmp_path: Path, make_tiny_model: Callable[..., Path]) -> None:
    rows = [{"text": f"{'word ' * (1 + n % 9)}{n}", "level": n % 9} for n in range(60)]
    options: dict[str, Any] = {"sites": ["pre_norm"], "poolings": ["last"], "outliers": ["none"]}
    file = tmp_path / "calibration.json"
    sparsort.calibrate(
        rows, written, level="level", model=str(make_tiny_model("llama")), n_boot=100, n_perm=39, out=file, **options
    )
    scorer = sparsort.CalibratedScorer(file)
    assert len(scorer.score(rows, written)) == 60
    with pytest.raises(SparsortError, match="Pass this function as prompt= in Python"):
        scorer.score(rows)
    with pytest.raises(SparsortError, match="this calibration is for the prompt"):
        scorer.score(rows, bulky)


def test_a_prompt_function_is_what_it_wraps() -> None:
    assert Prompt.of(written) == Prompt.of(PromptFunction(written))
    assert Prompt.of(written) != Prompt.of(bulky)
    assert {PromptFunction(written), PromptFunction(written)} == {PromptFunction(written)}
