"""Options are made from the fields of dataclasses: every command that needs a group of options has all of it, and each acts."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub.constants
import pytest
import transformers.dynamic_module_utils
import typer.main
from command_line import run
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaModel

import sparsort
from sparsort.attention.config import SparseAttentionConfig, SparseAttentionOptions
from sparsort.curriculum.ablation.recipe.ablation import Ablation, AblationOptions
from sparsort.curriculum.ablation.recipe.tasks import Task, TaskOptions
from sparsort.curriculum.loading.plan.settings import CurriculumOptions, CurriculumSettings
from sparsort.errors import SparsortError
from sparsort.options import escape, option, parameters_of, same_option, shares, unescape
from sparsort.recipes.ablate import _naming as named_fields
from sparsort.recipes.cli.app import app
from sparsort.recipes.cli.options import NOT_IN_FEW_SHOT, Fields, Retired, generated, replace_retired, retired_flags
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.train.config import TrainConfig, TrainOptions
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.spec import DataSpec, PromptOptions, PromptSpec
from sparsort.scoring.store.scores import Scores

GROUP: Any = typer.main.get_command(app)
LOADS_MODEL = ("score", "order", "choose", "calibrate", "ablate")
FEW_SHOT = ("choose", "ablate")
RENDERS = ("score", "order", "calibrate", *FEW_SHOT)
READS_ROWS = (*RENDERS, "plan", "train")
# Trainer places the model by itself, and its batches are of examples.
NOT_IN_TRAIN = {"device", "token_budget"}
PROMPT = r"Review: {text}\nKind:"


def _options(command: str) -> dict[str, tuple[Any, ...]]:
    """Everything that a user sees of an option, by name."""
    return {
        one.name: (
            tuple(one.opts),
            tuple(one.secondary_opts),
            one.help,
            repr(one.type_descriptor.annotation),
            one.default,
            one.is_flag,
        )
        for one in GROUP.commands[command].params
        if one.param_type_name == "option"
    }


@pytest.mark.parametrize(
    ("kind", "commands"), [(ModelSpec, LOADS_MODEL), (PromptSpec, RENDERS), (DataSpec, READS_ROWS)]
)
def test_every_command_has_every_option_of_what_it_uses(kind: type, commands: tuple[str, ...]) -> None:
    for name in parameters_of(kind):
        having = [one for one in commands if not (one in FEW_SHOT and name in NOT_IN_FEW_SHOT)]
        assert len({_options(one)[name] for one in having}) == 1, name


def test_train_has_the_options_of_a_model_that_trainer_does_not_decide() -> None:
    train, score = _options("train"), _options("score")
    wanted = set(parameters_of(ModelSpec)) - NOT_IN_TRAIN
    assert wanted <= train.keys()
    # The presets are names of models, too, and training computes in fewer dtypes.
    assert all(train[name] == score[name] for name in wanted - {"model", "dtype"})
    assert all(train[name][0] == score[name][0] for name in wanted)


def test_a_flag_of_the_model_or_the_prompt_has_no_other_meaning() -> None:
    score = _options("score")
    shared = {
        flag: score[name] for name in parameters_of(ModelSpec) + parameters_of(PromptSpec) for flag in score[name][0]
    }
    own = {("train", "--model"), ("train", "-m"), ("train", "--dtype"), ("train", "--messages")}
    for command in GROUP.commands:
        for values in _options(command).values():
            for flag in values[0]:
                assert (command, flag) in own or shared.get(flag, values) == values, (command, flag)


@pytest.mark.parametrize(
    ("keywords", "kind", "positional"),
    [
        (ModelOptions, ModelSpec, {"name"}),
        (PromptOptions, PromptSpec, {"template"}),
        (CurriculumOptions, CurriculumSettings, set()),
        (TrainOptions, TrainConfig, set()),
        (AblationOptions, Ablation, {"model"}),
        (SparseAttentionOptions, SparseAttentionConfig, set()),
        (TaskOptions, Task, {"name", "prompt", "answer", "label", "labels", "judge"}),
    ],
)
def test_keywords_are_the_fields(keywords: Any, kind: Any, positional: set[str]) -> None:
    assert set(keywords.__annotations__) == {field.name for field in dataclasses.fields(kind)} - positional


# The generator


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = option(3, "Size.", short="-z")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    text: str = option("a\n", "Text.", flag="--words", read=unescape, retired=("--old-words",))
    hidden: int = 7
    flagged: bool = option(False, "A flag.")


def _call(arguments: list[str], *, given: bool = False) -> Any:
    taken = []
    hint: Any = Annotated[dict[str, Any], Fields(of=Outer, given=True)] if given else Outer

    def command(place: str, outer: Any, plain: int = 1) -> None:
        taken.append((place, outer, plain))

    command.__annotations__ = {"place": Annotated[str, typer.Option()], "outer": hint, "plain": int}
    small = typer.Typer()
    made = generated(command)
    small.command()(made)
    found = typer.main.get_command(small)
    found.main(replace_retired(retired_flags(made), found.params, arguments), standalone_mode=False)
    return taken[0]


@dataclasses.dataclass(frozen=True)
class Copy:
    size: int = same_option(Inner, "size", default=5, help="Another size.")


def test_an_option_of_another_dataclass_is_declared_once() -> None:
    (copied,), (first,) = dataclasses.fields(Copy), dataclasses.fields(Inner)
    assert Copy().size == 5
    assert copied.metadata["option"] == dataclasses.replace(first.metadata["option"], help="Another size.")


def test_values_come_back_as_the_dataclass() -> None:
    assert _call(["--place", "p"]) == ("p", Outer(), 1)
    asked = ["--place", "p", "-z", "9", "--words", r"x\ty", "--flagged", "--plain", "2"]
    assert _call(asked) == ("p", Outer(inner=Inner(size=9), text="x\ty", flagged=True), 2)
    assert _call(["--place", "p"], given=True)[1] == {"inner": {}}
    assert _call(["--place", "p", "--words", "a"], given=True)[1] == {"inner": {}, "text": "a"}


def test_a_retired_flag_is_read_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(["--place", "p", "--old-words", "x"])[1].text == "x"
    told = capsys.readouterr().err
    assert told == "warning: --old-words is now called --words; the old name works until the next release.\n"
    assert _call(["--old-words=x=y", "--place", "p"])[1].text == "x=y"
    assert "--words" in capsys.readouterr().err
    # Where it is the value of an option, it is no flag.
    assert _call(["--place", "--old-words", "--words", "--old-words"])[:2] == ("--old-words", Outer(text="--old-words"))
    assert capsys.readouterr().err == ""
    assert replace_retired({"--old": Retired("--new")}, [], ["--", "--old"]) == ["--", "--old"]


def test_the_earlier_options_of_choose_are_read_with_a_warning(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = GROUP.commands["choose"]

    def parsed(*arguments: str) -> tuple[dict[str, Any], list[str]]:
        params = command.make_context("choose", [str(rows), *arguments]).params
        return {name: params[name] for name in ("by", "queries", "max_queries")}, capsys.readouterr().err.splitlines()

    earlier = parsed("--by", "density", "--on", "q.jsonl", "--queries", "8")
    assert earlier[0] == {"by": "density", "queries": Path("q.jsonl"), "max_queries": 8}
    assert earlier[1] == [
        "warning: --by is now called --criterion; the old name works until the next release.",
        "warning: --on is now called --queries; the old name works until the next release.",
        "warning: --queries 8 is now --max-queries 8; the old form works until the next release.",
    ]
    assert parsed("--queries=8")[0]["max_queries"] == 8
    # A file whose name is a number is still a file with its folder.
    present = parsed("--criterion", "density", "--queries", "./8", "--max-queries", "9")
    assert present == ({"by": "density", "queries": Path("8"), "max_queries": 9}, [])


def test_texts_are_escaped_for_the_shell() -> None:
    for text in ("", "a\n\n\tb", r"a\n", "\\\n\\\\n", "ü{x}"):
        assert unescape(escape(text)) == text
    assert shares("--quota")(["web=0.25", "a=b=1"]) == {"web": 0.25, "a=b": 1.0}
    for wrong, why in ((["web"], "is not NAME=NUMBER"), (["a=1", "a=2"], "gives 'a' twice"), (["=1"], "NAME=NUMBER")):
        with pytest.raises(SparsortError, match=why):
            shares("--quota")(wrong)


# What each option does


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    words = ["bright", "late", "cold", "loud", "slow"]
    lines = [{"text": f"the {words[n % 5]} film number {n * n}", "label": n % 2} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _calls(rows: Path, out: Path) -> dict[str, list[Any]]:
    """A small call of every command that loads a model."""
    text = ["--prompt", PROMPT]
    few = ["--label", "label", "-k", "2"]
    small = [
        "--sets",
        "1",
        "--random-orders",
        "2",
        "--test-rows",
        "4",
        "--dev-rows",
        "2",
        "--orderers",
        "length_ascending",
    ]
    return {
        "score": ["score", rows, *text, "--scorer", "entropy"],
        "order": ["order", rows, *text, "-a", " {label}", "-q", "a late film", "-k", "3", "--no-cache"],
        "choose": ["choose", rows, *text, *few, "--orders", "2", "--max-queries", "8", "--criterion", "density"],
        "ablate": [
            "ablate",
            rows,
            *text,
            *few,
            *small,
            "--choosers",
            "best_on_dev",
            "--no-report",
            "--out",
            out / "ablate",
        ],
        "calibrate": ["calibrate", rows, *text, "-a", " {label}", "--draws", "100", "--out", out / "c.json"],
        "train": ["train", rows, "--text", "{text}", "--schedule", "shuffle", "--max-steps", "1", "--out", out / "run"],
    }


def _numbers(command: str, printed: dict[str, Any]) -> Any:
    """What a command computes with the model, of all that it prints."""
    return {
        "score": lambda: printed["difficulty_quantiles"],
        "order": lambda: [demo["difficulty"] for demo in printed["demonstrations"]],
        "choose": lambda: printed["scores"],
        "ablate": lambda: printed["cells"],
        "calibrate": lambda: printed["reference loss"],
        "train": lambda: printed["loss"],
    }[command]()


@pytest.fixture
def two_revisions(
    make_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """The hub's cache with a model "org/tiny" at the revisions "main" and "v2": their folders."""
    cache = tmp_path / "hub"
    model = cache / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    found = {}
    for revision, digit, width in (("main", "a", 128), ("v2", "b", 160)):
        found[revision] = model / "snapshots" / (digit * 40)
        shutil.copytree(make_tiny_model("llama", intermediate_size=width), found[revision])
        (model / "refs" / revision).write_text(digit * 40, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return found


@pytest.mark.parametrize("command", [*LOADS_MODEL, "train"])
def test_the_revision_says_which_weights_are_read(
    command: str, two_revisions: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    def numbers(out: str, *model: Any) -> Any:
        return _numbers(command, json.loads(run(*_calls(rows, tmp_path / out)[command], *model, "--json").stdout))

    second = numbers("named", "-m", "org/tiny", "--revision", "v2")
    assert second == numbers("folder", "-m", two_revisions["v2"])
    assert second != numbers("first", "-m", "org/tiny")
    missing = run(*_calls(rows, tmp_path / "none")[command], "-m", "org/tiny", "--revision", "v3", code=2)
    assert "org/tiny" in missing.stderr


@pytest.fixture
def with_code(make_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose classes are in a file of its own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "with_code"
    shutil.copytree(make_tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own_llama", "architectures": ["OwnLlamaForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own_llama"\n\n\n'
        "class OwnLlamaForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    return folder


@pytest.mark.parametrize("command", [*LOADS_MODEL, "train"])
def test_code_of_a_model_runs_if_it_is_trusted(
    command: str, with_code: Path, make_tiny_model: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    refused = run(*_calls(rows, tmp_path / "refused")[command], "-m", with_code, code=2)
    assert "--trust-remote-code" in refused.stderr
    calls = _calls(rows, tmp_path / "trusted")
    trusted = json.loads(run(*calls[command], "-m", with_code, "--trust-remote-code", "--json").stdout)
    plain = json.loads(run(*_calls(rows, tmp_path / "plain")[command], "-m", make_tiny_model("llama"), "--json").stdout)
    assert _numbers(command, trusted) == _numbers(command, plain)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The token ids of every forward pass of a Llama."""
    found: list[Tensor] = []
    forward = LlamaModel.forward

    def noted(self: LlamaModel, input_ids: Any = None, **options: Any) -> Any:
        if input_ids is not None:
            found.append(input_ids.detach().clone())
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", noted)
    return found


@pytest.mark.parametrize("command", LOADS_MODEL)
def test_the_token_budget_bounds_a_batch(
    command: str, make_tiny_model: Callable[..., Path], rows: Path, tmp_path: Path, read: list[Tensor]
) -> None:
    model = ["-m", make_tiny_model("llama"), "--dtype", "float32", "--device", "cpu"]
    passes = []
    for budget in ("16", "100000"):
        read.clear()
        run(*_calls(rows, tmp_path / budget)[command], *model, "--token-budget", budget, "--json")
        passes.append(len(read))
    assert passes[0] > passes[1] > 0
    refused = run(*_calls(rows, tmp_path / "zero")[command], *model, "--token-budget", "0", code=2)
    assert "token_budget is 0" in refused.stderr


def test_ordering_reads_as_much_of_a_text_as_scoring(
    make_tiny_model: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    limits = ["--max-length", "12", "--truncation", "left", "-m", make_tiny_model("llama")]
    run("score", rows, "--prompt", PROMPT, *limits, "--out", tmp_path / "scores")
    difficulty = dict(
        zip(Scores.load(tmp_path / "scores").ids, Scores.load(tmp_path / "scores").difficulty.tolist(), strict=True)
    )
    order = [*_calls(rows, tmp_path)["order"], "--json"]
    found = json.loads(run(*order, *limits).stdout)["demonstrations"]
    assert {demo["id"]: demo["difficulty"] for demo in found} == {demo["id"]: difficulty[demo["id"]] for demo in found}
    refused = run(*order, *limits[:2], *limits[4:], code=2)
    assert "3 of 3 have NaN" in refused.stderr


@pytest.mark.parametrize("command", RENDERS)
def test_the_system_turn_is_read(
    command: str, make_tiny_model: Callable[..., Path], rows: Path, tmp_path: Path, read: list[Tensor]
) -> None:
    folder = make_tiny_model("llama")
    tokenizer = ModelSpec(str(folder)).load_tokenizer()
    chat = ["-m", folder, "--chat", "--system", r"Be\nbrief", "--json"]
    run(*_calls(rows, tmp_path / "out")[command], *chat)
    texts = [tokenizer.decode(ids) for batch in read for ids in batch]
    assert any("[system] Be\nbrief" in text for text in texts)


def test_starting_needs_neither_torch_nor_numpy() -> None:
    script = (
        "import sys, typer.main\nfrom sparsort.recipes.cli.app import app\ntyper.main.get_command(app)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'scipy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_keyword_is_named_without_a_class_that_the_caller_never_used() -> None:
    named = r"^unexpected keyword argument 'ordes'; the options of a model are "
    with pytest.raises(TypeError, match=named) as error:
        sparsort.choose_order([{"text": "a", "label": "x"}] * 2, prompt="{text}", ordes=3)  # type: ignore[call-arg]
    assert "ModelSpec" not in str(error.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'metrik'"):
        sparsort.SparsityScorer(metrik="l1")  # type: ignore[call-arg]


def test_the_tokenizer_of_a_model_in_memory_reaches_the_scorer(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model("llama")
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = ScorerConfig(model=ModelSpec(model, tokenizer=tokenizer)).load()
    rows = [{"text": "one two three"}, {"text": "four"}]
    assert given.score(rows, "{text}").difficulty.tolist() == pytest.approx(
        ScorerConfig(model=ModelSpec(str(folder), dtype="float32")).load().score(rows, "{text}").difficulty.tolist()
    )


def test_an_ablation_names_a_model_by_its_folder_and_not_by_an_object() -> None:
    assert named_fields(ModelSpec(Path("folder"), dtype="float32")) == {"model": "folder", "dtype": "float32"}
    assert named_fields(ModelSpec(object(), token_budget=9)) == {"token_budget": 9}
    assert named_fields("folder") == {"model": "folder"}
