"""Every option of every command has its conditions, and one that was given where it has no effect is refused at once."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from typer.testing import CliRunner

from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import CheckedCommand, app
from sparsort.recipes.cli.option_conditions import COMMANDS, check

# What every command needs, whatever else is given. No file of these is there: options are checked before any is read.
BASE = {
    "score": ["rows.jsonl"],
    "status": ["scores"],
    "order": ["rows.jsonl", "-q", "What?"],
    "choose": ["rows.jsonl"],
    "classify": ["rows.jsonl"],
    "calibrate": ["rows.jsonl"],
    "ablate": ["rows.jsonl"],
    "report": ["results"],
    "plan": ["scores"],
    "train": ["rows.jsonl", "--text", "{t}", "--out", "run"],
    "env": [],
    "cache": [],
}

# Command → the option, what else is given, and why the option has no effect.
CASES: dict[str, list[tuple[str, str, str]]] = {
    "score": [
        *(
            (f"--{name}", "--scorer compression", "sparsity reads it")
            for name in (
                "site mlp",
                "pooling last",
                "metric gini",
                "outliers rms",
                "l0-threshold 2.0",
                "calibration c.json",
            )
        ),
        ("--metric gini", "--scorer length", "and this is --scorer length"),
        ("--site mlp", "--scorer entropy", "sparsity reads it"),
        ("--column hard", "", "column reads it, and this is --scorer sparsity"),
        ("--descending", "--scorer random", "column reads it"),
        ("--seed 0", "", "random reads it"),
        ("--system x", "--messages m", "--messages m holds whole conversations"),
        ("--chat", "--messages m", "--messages m holds whole conversations"),
        *(
            (f"--{name}", "--scorer length", "sparsity, answer_loss, prompt_loss, entropy read it")
            for name in ("dtype float32", "device cpu", "token-budget 64", "truncation left", "max-length 9")
        ),
        *(
            (f"--{name}", "--scorer compression", "length read it")
            for name in ("model demo", "revision main", "trust-remote-code", "chat")
        ),
        ("--answer x", "--scorer prompt_loss", "and this is --scorer prompt_loss"),
        ("--answer x", "--scorer column --column hard", "and this is --scorer column"),
        ("--system x", "", "a plain prompt has no system turn"),
        ("--system x", "--scorer random", "read it, and this is --scorer random"),
        ("--devices 0,1", "--scorer length", "sparsity, answer_loss, prompt_loss, entropy read it"),
        ("--device cpu", "--devices 0,1", "--devices 0,1 names the devices"),
        ("--strict", "--part 0/2", "--part 0/2 reports the shards that are done"),
    ],
    "status": [],
    "order": [
        *(
            (f"--{name}", "--order random", "no score is read here")
            for name in (
                "scores s",
                "scorer length",
                "site mlp",
                "pooling last",
                "metric gini",
                "outliers rms",
                "calibration c.json",
                "column hard",
                "l0-threshold 1.0",
                "descending",
                "truncation left",
                "max-length 9",
            )
        ),
        *(
            (f"--{name}", "--scores s", "--scores s has the scores")
            for name in (
                "scorer length",
                "site mlp",
                "pooling last",
                "metric gini",
                "outliers rms",
                "calibration c.json",
                "column hard",
                "l0-threshold 1.0",
                "descending",
                "truncation left",
                "max-length 9",
            )
        ),
        *(
            (f"--{name}", "--scorer length", "sparsity reads it")
            for name in (
                "site mlp",
                "pooling last",
                "metric gini",
                "outliers rms",
                "l0-threshold 1.0",
                "calibration c.json",
            )
        ),
        ("--column hard", "", "column reads it"),
        ("--descending", "", "column reads it"),
        ("--select random", "", "every row is shown unless"),
        ("--select knn", "--ids a,b", "--ids a,b names the demonstrations"),
        ("--label kind", "--select knn -k 2", "balanced reads it"),
        ("--drop longest", "", "nothing is dropped without --max-tokens"),
        ("--allow-zero-shot", "", "nothing is dropped without --max-tokens"),
        ("--separator x", "--chat", "--chat makes a turn of every block"),
        ("--separator x", "--messages m", "--messages m makes turns of every conversation"),
        ("--missing drop", "--order length_ascending", "needs no number that could be missing"),
        ("--embedder e", "", "nothing here reads embeddings"),
        ("--separator x", "--messages m", "--messages m makes turns of every conversation"),
        ("--system x", "--messages m", "--messages m holds whole conversations"),
        ("--chat", "--messages m", "--messages m holds whole conversations"),
        ("--seed 1", "", "nothing here is drawn at random"),
        ("--seed 1", "-k 2 --select knn --order reverse:given", "nothing here is drawn at random"),
        ("--system x", "", "a plain prompt has no system turn"),
        ("--system x", "--calibration c.json", "--calibration c.json has its own prompt"),
        ("--chat", "--calibration c.json", "--calibration c.json has its own prompt"),
        *(
            (f"--{name}", "--scorer compression", "nothing here reads a model")
            for name in ("model demo", "revision main", "trust-remote-code")
        ),
        *(
            (f"--{name}", "--scorer length", "nothing here runs a model")
            for name in ("dtype float32", "device cpu", "no-cache", "token-budget 64")
        ),
        *(
            (f"--{name}", "--scorer length", "sparsity, answer_loss, prompt_loss, entropy read it")
            for name in ("truncation left", "max-length 9")
        ),
        ("--no-cache", "--order random -k 2 --select bm25", "nothing here runs a model"),
        ("--dtype float32", "--order given --max-tokens 9", "nothing here runs a model"),
        ("--export-format dspy", "", "nothing is exported"),
    ],
    "choose": [
        ("--export-format dspy", "", "nothing is exported"),
        *(
            (f"--{name}", "--criterion globale", "the criterion reads no queries, and this is --criterion globale")
            for name in ("queries q.jsonl", "max-queries 8", "allow-leaks")
        ),
        ("--system x", "", "a plain prompt has no system turn"),
        ("--separator x", "--chat", "--chat makes a turn"),
        (
            "--prior uniform",
            "--criterion density",
            "the criterion compares the predictions with no prior, and this is --criterion density",
        ),
    ],
    "calibrate": [
        ("--answer x", "--no-loss --poolings last,mean_state", "nothing reads it"),
        ("--no-loss", "--level steps", "there is none"),
        ("--system x", "", "a plain prompt has no system turn"),
        ("--top 5", "--json", "--json prints every candidate"),
        ("--system x", "--messages m", "--messages m holds whole conversations"),
        ("--chat", "--messages m", "--messages m holds whole conversations"),
    ],
    "ablate": [
        *(
            (f"--{name}", "study.toml", "study.toml has its own prompt, labels, files and judge")
            for name in (
                "prompt x",
                "answer x",
                "label x",
                "labels a,b",
                "judge exact",
                "chat",
                "system x",
                "id-column key",
                "test t.jsonl",
                "stop x",
                "max-new-tokens 3",
                "columns a,b",
            )
        ),
        ("--label x", "mr,trec", "mr,trec has its own prompt"),
        ("--system x", "", "a plain prompt has no system turn"),
        ("--labels a,b", "--judge exact", "--judge exact reads written answers"),
        ("--stop x", "", "labels are scored, and nothing is written"),
        ("--max-new-tokens 3", "--judge labels", "labels are scored"),
        ("--data f", "", "and rows.jsonl is a data file"),
        ("--label-score mean", "--judge number", "--judge number reads written answers"),
        ("--contextual on", "--judge math", "--judge math reads written answers"),
        ("--no-run", "--dry-run", "--dry-run neither runs anything"),
    ],
    "classify": [
        ("--system x", "", "a plain prompt has no system turn"),
        ("--separator x", "--chat", "--chat makes a turn"),
    ],
    "report": [],
    "env": [],
    "cache": [],
    "plan": [
        *(
            (f"--{name}", "--mode pool", "pool mode draws every batch by itself")
            for name in (
                "schedule folded",
                "warm-up 0.3",
                "later-epochs shuffle",
                "packing next_fit",
                "group-by-length",
            )
        ),
        ("--columns a,b", "", "it names the columns of the data"),
        ("--direction random", "--schedule shuffle", "--schedule shuffle has no easy and hard end"),
        ("--direction easy_to_hard", "--schedule as_given", "has no easy and hard end"),
        *(
            (f"--{name}", "--schedule folded", "--schedule folded has its own order")
            for name in ("pacing linear", "stages 3", "group-by-length")
        ),
        ("--folds 4", "", "folded and interleaved read it, and this is --schedule sorted"),
        ("--warm-up 0.3", "--schedule shuffle", "has no easy and hard end"),
        ("--later-epochs repeat", "--schedule as_given", "has no easy and hard end"),
        ("--group-by-length", "--warm-up 0.3", "after --warm-up 0.3 there are no stages"),
        ("--unscored last", "--schedule shuffle", "does not look at scores"),
        ("--unscored first", "--direction random", "does not look at scores"),
        ("--steps 9", "", "one pass shows each example once"),
        ("--quota web=1", "", "one pass shows each example once"),
        ("--seed 3", "--schedule folded", "nothing in this plan is drawn at random"),
        ("--groups kind", "", "it names a field of the data"),
        ("--groups kind", "--data d.jsonl --schedule shuffle", "does not take the easiest of each group"),
        ("--show-groups kind", "", "it names a field of the data"),
        ("--id-column key", "", "it names a field of the data"),
        ("--lengths n", "", "it names a field of the data"),
        ("--columns a,b", "", "it names the columns of the data"),
        ("--combination lexicographic", "", "several scores are combined, and there is one"),
        ("--weight a=1", "", "weights weigh several scores"),
        ("--weight a=1", "other --combination intersection", "rank_average reads it"),
        ("--compare p", "", "plans are drawn next to each other in a figure"),
    ],
    "train": [
        *(
            (f"--{name}", "--plan p", "--plan p has its own settings")
            for name in (
                "schedule sorted",
                "mode pool",
                "direction random",
                "pacing linear",
                "stages 2",
                "folds 2",
                "warm-up 0.2",
                "later-epochs shuffle",
                "batch-size 4",
                "batch-tokens 4",
                "packing next_fit",
                "pack-length 9",
                "group-by-length",
                "unscored first",
                "groups kind",
            )
        ),
        *(
            (f"--{name}", "--mode pool", "pool mode draws every batch by itself")
            for name in (
                "schedule folded",
                "warm-up 0.3",
                "later-epochs shuffle",
                "packing next_fit",
                "group-by-length",
            )
        ),
        ("--direction random", "--schedule shuffle", "has no easy and hard end"),
        *(
            (f"--{name}", "--schedule folded", "has its own order")
            for name in ("pacing linear", "stages 3", "group-by-length")
        ),
        ("--folds 4", "--recipe sparse", "folded and interleaved read it"),
        ("--warm-up 0.3", "--schedule shuffle", "has no easy and hard end"),
        ("--later-epochs repeat", "--schedule as_given", "has no easy and hard end"),
        ("--group-by-length", "--warm-up 0.3", "there are no stages"),
        ("--unscored last", "--schedule shuffle", "does not look at scores"),
        ("--groups kind", "--schedule shuffle", "does not take the easiest of each group"),
        ("--online-metric hoyer", "", "the difficulty is not learned in training"),
        ("--revision main", "", "--model tiny starts from random weights"),
        ("--trust-remote-code", "--model small", "--model small starts from random weights"),
        ("--epochs 1", "--max-steps 5", "--max-steps 5 sets the length of the run"),
        ("--eval-steps 5", "--eval-share 0", "no rows are held out"),
        ("--eval-steps 5", "--plan p", "no rows are held out"),
        ("--fingerprint v1", "", "it concerns a plan that was made before"),
        ("--no-verify", "--scores s", "it concerns a plan that was made before"),
    ],
}
REFUSED = [(command, *case) for command, cases in CASES.items() for case in cases]

# Combinations that look alike and have an effect.
ACCEPTED = [
    (
        "score",
        "--metric gini --site mlp --pooling last --outliers rms --l0-threshold 2 --seed 1 --scorer sparsity",
        "seed",
    ),
    ("score", "--scorer length --model m --revision r --chat --system s", None),
    ("score", "--scorer answer_loss --answer x --truncation left --max-length 9 --dtype float32", None),
    ("score", "--scorer column --column hard --descending --prompt {q}", None),
    ("score", "--calibration c.json --metric gini", None),
    ("order", "--scores s --select difficulty_matched -k 2 --metric gini --dtype float32", None),
    ("order", "--order given --select spread -k 2 --metric gini --seed 3", None),
    ("order", "--order random --seed 3", None),
    ("order", "--scorer random --seed 3", None),
    ("order", "--order similarity_ascending --embedder e --missing drop", None),
    ("order", "--order given --max-tokens 9 --drop longest --model m --revision r", None),
    ("order", "--order given --select knn -k 2 --dtype float32 --device cpu", None),
    ("order", "--order given --chat --system s --model m", None),
    ("order", "--ids a,b --select ids -k 2", None),
    ("order", "--scorer length --model m --order hard_to_easy", None),
    ("choose", "--criterion locale_unlabelled --queries q.jsonl --max-queries 8 --allow-leaks", None),
    ("choose", "--queries q.jsonl --max-queries 8", None),
    ("choose", "--separator x --prior pool", None),
    ("choose", "--criterion pdo_prior+density --prior s.json", None),
    ("calibrate", "--answer x --no-loss --poolings last,answer", None),
    ("calibrate", "--answer x --no-loss --level steps", None),
    ("calibrate", "--messages m --no-loss --level steps", None),
    ("score", "--messages m --scorer length", None),
    ("order", "--messages m --max-tokens 9 --drop longest", None),
    ("order", "--messages m --order given --model m", None),
    ("ablate", "--prompt x --judge number --stop x --max-new-tokens 9", None),
    ("ablate", "--prompt x --labels a,b --label-score mean --contextual on", None),
    ("ablate", "--dry-run --out o --dtype float32 --device cpu --compile --no-report --json", None),
    ("ablate", "--no-run --out o --dtype float32 --device cpu --compile --no-report --json", None),
    ("score", "--messages m --scorer answer_loss", None),
    ("choose", "--criterion pdo+density --prior pool", None),
    ("train", "--plan p --fingerprint f", None),
    ("train", "--plan p --model some/model --revision r --trust-remote-code", None),
    ("order", "--order given --select knn -k 2 --token-budget 64", None),
    ("order", "--scorer entropy --max-length 9 --truncation left", None),
    ("ablate", "study.toml --revision r --trust-remote-code --token-budget 64 --model m", None),
    ("ablate", "--prompt x --chat --system s", None),
    ("plan", "--mode pool --pacing linear --steps 9 --stages 3 --seed 2 --quota a=1 --data d --groups kind", None),
    ("plan", "--schedule interleaved --folds 4 --warm-up 0.2 --seed 1", None),
    ("plan", "--schedule shuffle --unscored error --seed 1", None),
    ("plan", "other --weight a=1 --weight other=2 --combination rank_average", None),
    ("train", "--plan p --eval-data e.jsonl --eval-steps 5", None),
    ("train", "--plan p --fingerprint v1 --messages m", None),
    ("train", "--plan p --no-verify", None),
    ("train", "--epochs 2 --online --online-metric gini --eval-steps 5 --stages 3", None),
    ("train", "--recipe sparse --schedule folded --folds 4", None),
]


GROUP: Any = typer.main.get_command(app)


def _context(command: str, arguments: str) -> click.Context:
    found: click.Context = GROUP.commands[command].make_context(command, _arguments(command, arguments))
    return found


def _arguments(command: str, arguments: str) -> list[str]:
    given = shlex.split(arguments)
    base = BASE[command]
    # A positional argument in front replaces the first of the base, or, of a list of scores, is one more.
    if given and not given[0].startswith("-"):
        return [*given[:1], *base[1:], *given[1:]] if command != "plan" else [*base, *given]
    return [*base, *given]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"t": "a", "label": 1}\n', encoding="utf-8")


def _parameters(command: str) -> set[str]:
    return {str(parameter.name) for parameter in _context(command, "").command.params} - {"context", "help"}


def test_every_command_with_conditions_has_a_table() -> None:
    assert set(CASES) == set(GROUP.commands)
    assert set(COMMANDS) == {command for command, cases in CASES.items() if cases}
    assert all(isinstance(command, CheckedCommand) for command in GROUP.commands.values())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_its_conditions_or_is_always_read(command: str) -> None:
    assert set(COMMANDS[command].table) == _parameters(command), (
        f"give the options of `sparsort {command}` their conditions in recipes/cli/option_conditions.py"
    )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_condition_has_a_case(command: str) -> None:
    tested: dict[str, set[str]] = {}
    for of_command, option, rest, why in REFUSED:
        if of_command == command:
            (name,) = _given(_context(command, f"{rest} {option}")) - _given(_context(command, rest))
            tested.setdefault(name, set()).add(why)
    conditions = {name: len(own) for name, own in COMMANDS[command].table.items() if own}
    assert [name for name, count in conditions.items() if len(tested.get(name, ())) < count] == []


def _given(context: click.Context) -> set[str]:
    return {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]


@pytest.mark.parametrize(("command", "option", "rest", "why"), REFUSED)
def test_an_option_without_an_effect_is_refused_with_a_way_out(command: str, option: str, rest: str, why: str) -> None:
    message = _refusal(command, f"{rest} {option}")
    assert message.startswith(f"{option} has no effect: ")
    assert why in message
    assert not _refusal(command, rest).startswith(option)
    # What the message suggests takes this reason away; another may be left.
    if suggestion := re.search(r"Omit it, or pass (.*)\.$", message):
        assert why not in _refusal(command, f"{rest} {option} {suggestion[1]}")


def _refusal(command: str, arguments: str) -> str:
    """What the check says; nothing where all is well."""
    try:
        check(_context(command, arguments))
    except SparsortError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("command", [command for command in sorted(CASES) if CASES[command]])
def test_every_command_checks_before_it_does_anything(command: str) -> None:
    option, rest, why = CASES[command][0]
    result = CliRunner().invoke(app, [command, *_arguments(command, f"{rest} {option}")])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"sparsort: {option} has no effect: ")
    assert why in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("command", "arguments", "refused"), ACCEPTED)
def test_options_with_an_effect_are_accepted(command: str, arguments: str, refused: str | None) -> None:
    if refused is None:
        check(_context(command, arguments))
        return
    with pytest.raises(SparsortError, match=f"^--{refused} "):
        check(_context(command, arguments))


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("score", "--scorer lenght --metric gini --seed 1 --column c"),
        ("order", "--order randon --seed 1 --missing drop --metric gini"),
        ("order", "--select nkn -k 2 --label kind --embedder e --seed 1"),
        ("choose", "--criterion globla --queries q.jsonl --prior pool"),
        ("plan", "--schedule fold --folds 3 --stages 2"),
        ("plan", "--combination mean"),
        ("ablate", "--judge numbr --label-score mean --stop x"),
    ],
)
def test_a_misspelt_choice_is_reported_as_such_and_not_as_a_useless_option(command: str, arguments: str) -> None:
    check(_context(command, arguments))


def test_a_mistake_in_the_recipe_is_the_one_reported() -> None:
    with pytest.raises(SparsortError, match="Did you mean 'sparse_moba'"):
        check(_context("train", "--recipe sparse_mobba --folds 3"))
