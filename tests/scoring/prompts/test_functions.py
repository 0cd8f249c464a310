"""Prompts that a function writes: the same text as a template, a stable hash, and refusals that name the reason."""

from __future__ import annotations

import copy
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
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.recipes.adapters.demonstrations import DemoChooser, DemoOptions
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.order.order import order_file
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.score import score_file
from sparsort.scoring.prompts.functions import PROMPT_COLUMN, PromptFunction, is_description
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
    nested = {"tags": ["a", "b"], "meta": {"names": ("x", [["y", "z"]])}}
    before = copy.deepcopy(nested)
    prompt = PromptFunction(lambda row: row["tags"].pop() + row["meta"]["names"][1][0].pop())
    assert [prompt.write(nested, where="row 0") for _ in range(2)] == ["bz", "bz"]
    assert prompt.columns_read(nested, where="row 0") == {"tags", "meta"}
    assert nested == before


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


def test_the_hash_covers_the_attributes_of_the_function() -> None:
    def prompt(row: dict[str, Any]) -> str:
        return str(prompt.template.format(**row))  # type: ignore[attr-defined]

    hashes = []
    for prompt.template in ("Judge: {text}", "Grade: {text}", "Judge: {text}"):  # type: ignore[attr-defined]
        hashes.append(PromptFunction(prompt).description)
    assert hashes[0] == hashes[2] != hashes[1]


def test_the_hash_covers_the_loaded_modules_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "words_of_prompts"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    source = "import words_of_prompts.sub\ndef prompt(row):\n    return words_of_prompts.sub.WORD + row['text']\n"
    hashes = []
    for word in ("Judge", "Grade", "Judge"):
        (folder / "sub.py").write_text(f"WORD = '{word}'")
        hashes.append(PromptFunction(_module(tmp_path / "prompts.py", source).prompt).description)
    for name in ("words_of_prompts", "words_of_prompts.sub"):
        monkeypatch.delitem(sys.modules, name)
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("from my_words import WORD", "my_words"),
        ("from .json import WORD", ".json"),
        ("from . import WORD", "."),
        ("WORD = (lambda: __import__('json').dumps(1))()", ""),
        ("import json, numpy.linalg; WORD = json.dumps(1)", ""),
    ],
)
def test_a_module_that_is_imported_in_the_function_must_be_installed(tmp_path: Path, line: str, refused: str) -> None:
    source = (
        f"def prompt(row):\n    def inner():\n        {line}\n        return WORD\n    return inner() + row['text']\n"
    )
    prompt = PromptFunction(_module(tmp_path / "prompts.py", source).prompt)
    if not refused:
        prompt.need_hash("a run")
        return
    with pytest.raises(SparsortError, match=f"'prompt' imports '{re.escape(refused)}' when it is called"):
        prompt.need_hash("a run")


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
    def read(function: Any) -> set[str] | None:
        return PromptFunction(function).columns_read(ROWS[0], where="row 0")

    assert read(written) == {"text"}
    assert read(lambda row: row.get("none", "") + row.pop("id")) == {"id", "none"}
    assert read(lambda row: "{text}".format(**row)) is None
    assert read(lambda row: str(dict(row))) is read(lambda row: str(list(row.items()))) is None


@pytest.mark.parametrize("prompt", [written, bulky])
def test_demonstrations_are_compared_by_what_the_function_reads(prompt: Any) -> None:
    by_template = sparsort.select_demos(ROWS, "acting in a fine film", 3, method="bm25", prompt="{text}")
    by_function = sparsort.select_demos(ROWS, "acting in a fine film", 3, method="bm25", prompt=prompt)
    assert [row["id"] for row in by_function.demos] == [row["id"] for row in by_template.demos]
    chooser = DemoChooser(ROWS, DemoOptions(order="given", select="bm25", prompt=prompt), held_out=[ROWS[1]])
    assert 1 not in chooser.choose({"text": "a dull film"}, 3)
    with pytest.raises(SparsortError, match="the query is among its own demonstrations"):
        sparsort.build_prompt(ROWS, {"text": TEXTS[1]}, prompt=prompt, answer=" {label}")


TALKS = [
    {"talk": [{"role": "user", "content": text}], "label": label}
    for text, label in (("What is the capital of France?", "Paris"), ("Who wrote the play about Faust?", "Goethe"))
]


@pytest.mark.parametrize("prompt", [lambda row: row["talk"][0]["content"], lambda row: row["talk"]])
def test_a_query_among_its_demonstrations_is_found_without_a_column_of_text(prompt: Any) -> None:
    for at in range(2):
        with pytest.raises(SparsortError, match=rf"its answer is given away: demonstration {at} \(the same text\)"):
            sparsort.assemble(TALKS, {"talk": TALKS[at]["talk"]}, prompt=prompt, answer=" {label}")
        selected = sparsort.select_demos(TALKS, {"talk": TALKS[at]["talk"]}, 1, method="first", prompt=prompt)
        assert selected.demos == [TALKS[1 - at]]


LANGUAGES = [
    {"lang": "de", "a": "Der Film war lang und auch laut", "b": "nothing", "label": "no"},
    {"lang": "en", "a": "nichts", "b": "The plot is thin, the acting is not", "label": "yes"},
]


def by_language(row: dict[str, Any]) -> str:
    return str(row["a"] if row["lang"] == "de" else row["b"])


@pytest.mark.parametrize("demos", [LANGUAGES, LANGUAGES[::-1], LANGUAGES[1:]])
def test_whether_a_query_is_found_does_not_depend_on_the_first_row(demos: list[dict[str, Any]]) -> None:
    query = {"lang": "en", "a": "something else", "b": LANGUAGES[1]["b"]}
    with pytest.raises(SparsortError, match="the query is among its own demonstrations"):
        sparsort.assemble(demos, query, prompt=by_language, answer=" {label}")
    with pytest.raises(SparsortError, match="is the query itself"):
        sparsort.select_demos(demos, query, len(demos), method="first", prompt=by_language)
    if len(demos) > 1:
        with pytest.raises(SparsortError, match=r"query '0' is, or nearly is, demonstration"):
            sparsort.choose_order(demos, [query], prompt=by_language, labels="no=bad,yes=good")
    pool = DemoPool(demos, prompt=by_language)
    # A query of the other language is compared by the text that the function writes for it.
    other = {"lang": "de", "a": LANGUAGES[1]["b"], "b": "something"}
    assert [pool.rows[leak.demo]["lang"] for leak in pool.leaks(pool.input_of(other))] == ["en"]
    assert pool.leaks(pool.input_of({"lang": "en", "a": LANGUAGES[1]["a"], "b": "A new film"})) == []
    shown = [pool.shown_text(at) for at in range(len(demos))]
    assert all(by_language(row) in text and row["label"] in text for row, text in zip(demos, shown, strict=True))


@pytest.mark.parametrize("rows", [LANGUAGES * 2, LANGUAGES[::-1] * 2])
def test_a_classifier_compares_prompts_if_rows_read_different_columns(rows: list[dict[str, Any]]) -> None:
    labels = [row["label"] for row in rows]
    rows = [{name: row[name] for name in ("lang", "a", "b")} for row in rows]
    model = sparsort.FewShotClassifier(k=2, prompt=by_language, calibration="none").fit(rows, labels)
    assert model.compared_fields_ == [PROMPT_COLUMN]


def test_a_function_that_iterates_over_rows_is_compared_by_their_common_columns() -> None:
    prompt = (BULK + "{text}").format
    rows = [{**row, "source": "paper"} for row in ROWS]
    text = sparsort.build_prompt(rows, {"text": "a new film"}, prompt=lambda row: prompt(**row), answer=" {label}")
    assert text.endswith("a new film")
    with pytest.raises(SparsortError, match="the query is among its own demonstrations"):
        sparsort.build_prompt(rows, {"text": TEXTS[0]}, prompt=lambda row: prompt(**row), answer=" {label}")


def test_a_list_that_a_template_shows_is_compared_as_it_is_shown() -> None:
    rows = [{"tags": ["red", word], "q": f"what {word}?", "label": "yes"} for word in ("stone", "house", "river")]
    prompt: Any = "{tags!r} {q}"
    text = sparsort.build_prompt(rows, {"tags": ["blue"], "q": "who?"}, prompt=prompt, answer=" {label}")
    assert text.endswith("['blue'] who?")
    query = {"tags": ["red", "house"], "q": "what house?"}
    with pytest.raises(SparsortError, match="its answer is given away: demonstration 1 "):
        sparsort.build_prompt(rows, query, prompt=prompt, answer=" {label}")
    assert sparsort.select_demos(rows, query, 2, method="first", prompt=prompt).demos == [rows[0], rows[2]]
    assert len(sparsort.select_demos(rows, {**query, "tags": []}, 3, method="bm25", prompt=prompt).demos) == 3
    with pytest.raises(SparsortError, match=r"a list in the field 'tags'.*Name the part that you want"):
        sparsort.select_demos(rows, query, 2, method="first", prompt="{tags} {q}")
    shown = [{name: row[name] for name in ("tags", "q")} for row in rows]
    with pytest.warns(UserWarning, match="estimated from 1 rows outside the prompt"):
        model = sparsort.FewShotClassifier(k=2, prompt=prompt).fit(shown, ["a", "b", "b"])
    assert model.compared_fields_ == ["tags!r", "q"]


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
