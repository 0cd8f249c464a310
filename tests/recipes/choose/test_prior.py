"""The prior of PDO in `choose_order` and `sparsort choose`: the choice of a prior, and the rows that each reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import sparsort
from sparsort.curriculum.demos.criteria.label_bias import fit_bias, shares_by_em
from sparsort.errors import SparsortError
from sparsort.recipes.choose.choose import ChosenOrder
from sparsort.recipes.choose.prior import LABELLED_ROWS, reads_prior, with_prior
from sparsort.recipes.cli.app import app
from sparsort.scoring.answers.reader import AnswerReader
from sparsort.scoring.loading.load import LoadedModel, load_model

WORDS = ("film", "train", "phone", "meal", "book", "song", "city", "shoe", "lamp", "road")
PROMPT = "Review: {text}\nLabel:"
DEMOS = [
    {"text": "the screen is bright", "label": "1"},
    {"text": "the train was late and cold", "label": "0"},
    {"text": "apples of five kinds", "label": "1"},
]
QUERIES = [{"text": f"what to say of the {word}?"} for word in WORDS]
# Of 40 rows 10 have the label 1.
POOL = [{"text": f"{word} number {n}", "label": str(int(n == 3))} for n in range(4) for word in WORDS]
ASKED: dict[str, Any] = {"prompt": PROMPT, "labels": "0=negative,1=positive"}


@pytest.fixture(scope="module")
def loaded(make_tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(make_tiny_model("gemma3")), dtype="float32", device="cpu")


def chosen(loaded: LoadedModel, **options: Any) -> ChosenOrder:
    return sparsort.choose_order(DEMOS, QUERIES, model=loaded, **{**ASKED, **options})


def prior_of(found: ChosenOrder) -> tuple[str, dict[str, float]]:
    assert found.prior is not None
    return found.prior["source"], found.prior["shares"]


def test_each_prior_and_its_shares(loaded: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "shares.json"
    file.write_text('{"1": 1, "0": 3}', encoding="utf-8")
    by_name = {name: chosen(loaded, prior=name, pool=POOL) for name in ("uniform", "pool", "estimated")}
    uniform, pool = by_name["uniform"], by_name["pool"]
    assert prior_of(uniform) == ("uniform", {"0": 0.5, "1": 0.5})
    assert prior_of(pool) == ("pool", {"0": 0.75, "1": 0.25})
    assert uniform.scores != pool.scores
    for same in (
        chosen(loaded, by="pdo_prior", pool=POOL),
        chosen(loaded, prior={"1": 0.2, "0": 0.6}),
        chosen(loaded, prior=file),
        chosen(loaded, prior=str(file)),
        chosen(loaded, by="pdo_prior", prior={1: 5, 0: 15}),
    ):
        assert same.order == pool.order
        assert same.scores == pytest.approx(pool.scores)
        assert prior_of(same)[1] == prior_of(pool)[1]
    assert "Prior of PDO: pool (0 0.75, 1 0.25)." in pool.notes
    assert by_name["estimated"].tokens_read > pool.tokens_read == uniform.tokens_read


def test_labels_at_a_path_and_rows_without_one(loaded: LoadedModel, tmp_path: Path) -> None:
    def nested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"text": row["text"], "meta": {"label": row["label"]}} for row in rows]

    unlabelled = [{"text": "a"}, {"text": "b", "meta": None}, {"text": "c", "meta": {"label": float("nan")}}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in nested(POOL)), encoding="utf-8")
    # Without label words, the labels are those of the demonstrations and the pool.
    asked = {"prompt": PROMPT, "label": "meta.label", "separator": "\n", "model": loaded}
    plain = sparsort.choose_order(
        DEMOS, QUERIES, prompt=PROMPT, pool=POOL, prior="estimated", separator="\n", model=loaded
    )
    pool = [*nested(POOL), *unlabelled]
    found = sparsort.choose_order(nested(DEMOS), QUERIES, pool=pool, prior="estimated", **asked)
    assert found.prior == plain.prior
    assert found.scores == pytest.approx(plain.scores)
    for prior in ("pool", file):
        counted = sparsort.choose_order(nested(DEMOS), QUERIES, pool=pool, prior=prior, **asked)
        assert prior_of(counted)[1] == {"0": 0.75, "1": 0.25}


def test_scores_are_minus_the_divergence_from_the_prior(loaded: LoadedModel) -> None:
    found = chosen(loaded, prior={"0": 0.9, "1": 0.1})
    mean = mean_prediction(loaded, found.candidates[0])
    expected = -(mean * np.log(mean / [0.9, 0.1])).sum()
    assert found.scores[0] == pytest.approx(expected, abs=1e-5)


def asked(loaded: LoadedModel, order: list[int], texts: list[str]) -> np.ndarray[Any, Any]:
    words = {"0": " negative", "1": " positive"}
    demos = [f"Review: {DEMOS[place]['text']}\nLabel:{words[DEMOS[place]['label']]}\n\n" for place in order]
    prompts = [f"Review: {text}\nLabel:" for text in texts]
    return AnswerReader(loaded).answers(demos, prompts, [" negative", " positive"]).log_p


def mean_prediction(loaded: LoadedModel, order: list[int]) -> np.ndarray[Any, Any]:
    log_p = asked(loaded, order, [row["text"] for row in QUERIES])
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    mean: np.ndarray[Any, Any] = (p / p.sum(axis=1, keepdims=True)).mean(axis=0)
    return mean


def test_the_estimate_reads_labelled_rows_under_one_order(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Labels that the model can tell apart: whether its log-odds are above the median.
    odds = np.diff(asked(loaded, [0, 1, 2], [row["text"] for row in POOL]))[:, 0]
    pool = [row | {"label": str(int(own > np.median(odds)))} for row, own in zip(POOL, odds, strict=True)]
    calls: list[tuple[list[str], list[str]]] = []
    real = AnswerReader.answers

    def answers(self: AnswerReader, prefix: Any, queries: Any, labels: Any) -> Any:
        calls.append((list(prefix), list(queries)))
        return real(self, prefix, queries, labels)

    monkeypatch.setattr(AnswerReader, "answers", answers)
    found = chosen(loaded, pool=pool)
    monkeypatch.undo()
    assert prior_of(found)[0] == "estimated"
    assert len(calls) == 7
    prefix, labelled = calls[-1]
    assert len(labelled) == len(set(labelled)) == found.prior["labelled_rows"] == 40  # type: ignore[index]
    assert prefix in [before for before, _ in calls[:6]]
    # The same from plain calls.
    order = next(order for order in found.candidates if asked_prefix(order) == prefix)
    gold = {PROMPT.format(**row): int(row["label"]) for row in pool}
    reader = AnswerReader(loaded)
    words = [" negative", " positive"]
    bias = fit_bias(reader.answers(prefix, labelled, words).log_p, [gold[text] for text in labelled])
    assert bias.informative
    shares = shares_by_em(asked(loaded, order, [row["text"] for row in QUERIES]), bias)
    assert list(prior_of(found)[1].values()) == pytest.approx(shares.tolist(), abs=1e-3)
    assert shares[0] != pytest.approx(0.5, abs=0.02)


def asked_prefix(order: list[int]) -> list[str]:
    words = {"0": " negative", "1": " positive"}
    return [f"Review: {DEMOS[place]['text']}\nLabel:{words[DEMOS[place]['label']]}\n\n" for place in order]


def test_the_default_estimates_only_where_it_can(loaded: LoadedModel) -> None:
    assert prior_of(chosen(loaded, pool=POOL))[0] == "estimated"
    for options, note in (
        ({}, "No labelled rows of the pool were given"),
        ({"pool": POOL[:15]}, "15 labelled rows remain"),
        ({"pool": [row | {"label": None} for row in POOL]}, "0 labelled rows remain"),
        ({"pool": [row | {"label": float("nan")} for row in POOL]}, "0 labelled rows remain"),
        ({"pool": [row | {"label": "7"} for row in POOL]}, "0 labelled rows remain"),
        ({"pool": DEMOS * 20}, "0 labelled rows remain"),
    ):
        found = chosen(loaded, **options)
        assert prior_of(found)[0] == "uniform", options
        assert note in " ".join(found.notes)


def test_queries_that_are_rows_of_the_pool_show_no_shares_of_others(loaded: LoadedModel) -> None:
    found = chosen(loaded, pool=[*POOL, *QUERIES])
    # The mean of uniform and the pool's 3 to 1.
    assert prior_of(found) == ("mixed", {"0": 0.625, "1": 0.375})
    assert prior_of(chosen(loaded, pool=POOL, prior="mixed")) == prior_of(found)
    assert any("The queries are rows of the pool" in note for note in found.notes)
    # A pool without labels has no shares.
    assert prior_of(chosen(loaded, pool=QUERIES))[0] == "uniform"
    rare = [row | {"label": "0"} for row in POOL]
    assert prior_of(chosen(loaded, pool=rare, prior="mixed"))[1] == {"0": 0.75, "1": 0.25}


def test_labelled_rows_are_few_and_even_by_label(loaded: LoadedModel) -> None:
    many = [
        {"text": f"{word} {other} {n}", "label": str(int(n == 9))}
        for n in range(10)
        for word in WORDS
        for other in WORDS
    ]
    found = chosen(loaded, pool=many, prior="estimated")
    assert found.prior is not None
    assert found.prior["labelled_rows"] == LABELLED_ROWS
    again = chosen(loaded, pool=many, prior="estimated")
    assert found.summary() == again.summary()


def test_an_impossible_estimate_is_reported(loaded: LoadedModel) -> None:
    found = chosen(loaded, prior="estimated", pool=POOL[:12])
    assert any("12 labelled rows" in note for note in found.notes)
    # All of these rows have one label, which no prediction can tell apart.
    assert prior_of(found) == ("estimated", {"0": 0.5, "1": 0.5})
    assert any("do not tell the labels" in note for note in found.notes)


def test_criteria_that_are_joined() -> None:
    assert [reads_prior(by) for by in ("pdo", "density + pdo", "pdo_prior", "pdo_null", "density")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert with_prior("density + pdo") == "density+pdo_prior"
    assert with_prior("pdo+pdo_prior") == "pdo+pdo_prior"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"by": "density", "prior": "uniform"},
            "prior='uniform' has no effect: the criterion .* no prior.*by='pdo'",
        ),
        ({"by": "locale_unlabelled", "pool": POOL}, "pool= has no effect"),
        ({"prior": "mixed"}, "no rows of it with a label were given"),
        ({"prior": ""}, "the prior is ''; expected one of uniform"),
        ({"prior": float("nan")}, "the prior is nan; expected one of uniform"),
        ({"prior": [0.5, 0.5]}, r"the prior is \[0.5, 0.5\]; .* a mapping from label value to share"),
        ({"by": "pdo_prior", "prior": "uniform"}, "'pdo_prior' is 'pdo' with the prior 'pool'"),
        ({"by": "pdo_prior"}, "no rows of it with a label were given"),
        ({"prior": "pool"}, "no rows of it with a label were given"),
        ({"prior": "pool", "pool": [row | {"label": "0"} for row in POOL]}, "has no row with 1"),
        ({"prior": "estimated"}, "no row with a label remains.*-k.*'uniform'"),
        ({"prior": "estimated", "pool": DEMOS}, "no row with a label remains"),
        ({"prior": "estimated", "by": "pdo+locale"}, "probes sampled from the model"),
        ({"prior": "estimatd"}, "Did you mean 'estimated'"),
        ({"prior": "none/shares.json"}, "is not a file that exists"),
        ({"prior": {"0": 1.0}}, "Give one number each"),
        ({"prior": {"0": 0.0, "1": 1.0}}, "a number above 0"),
        ({"prior": {"0": "a", "1": "b"}}, "a number above 0"),
        ({"prior": {"0": float("nan"), "1": 1.0}}, "a number above 0"),
    ],
)
def test_impossible_priors_are_refused_before_a_model_is_loaded(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        sparsort.choose_order(DEMOS, QUERIES, model="/no/such/model", **{**ASKED, **changes})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"0": 0.2, "1": 0.8}', [0.2, 0.8]),
        ("a.csv", "label,share\n1,0.8\n0,0.2\n", [0.2, 0.8]),
        ("b.csv", "label,count\n0,1\n1,4\n", [0.2, 0.8]),
        ("c.csv", "text,label\na,1\nb,0\nc,1\nd,1\n", [0.25, 0.75]),
        ("a.jsonl", '{"label": 1}\n{"label": 0}\n{"label": 1}\n{"label": 1}\n{"label": null}\n', [0.25, 0.75]),
        ("b.json", '[{"label": 1}, {"label": 0}]', [0.5, 0.5]),
        ("d.csv", "label,share\n1,0.8\n1,0.2\n", "names a label twice"),
        ("e.csv", "label,share\n1,much\n0,1\n", "not a number"),
        ("f.csv", "label,share\n1,1\n", "Give one number each"),
        ("g.csv", "word,share\n1,1\n", "has no column 'label'; it has: word, share"),
        ("h.csv", "text,label\na,1\n", "h.csv, which has no row with 0"),
        ("c.json", "{", "cannot be read as JSON"),
        ("d.json", '{"0": true, "1": "x"}', "a number above 0"),
    ],
)
def test_files_of_shares(
    loaded: LoadedModel, tmp_path: Path, name: str, text: str, expected: list[float] | str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    if isinstance(expected, str):
        with pytest.raises(SparsortError, match=expected):
            chosen(loaded, prior=tmp_path / name)
    else:
        found = chosen(loaded, prior=tmp_path / name)
        assert prior_of(found) == (name, dict(zip(("0", "1"), expected, strict=True)))


def run(*call: str) -> Any:
    result = CliRunner().invoke(app, ["choose", *call])
    return result, " ".join(result.output.split())


def test_a_label_inside_a_value(loaded: LoadedModel, tmp_path: Path) -> None:
    def inside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"text": row["text"], "meta": {"label": row["label"]}} for row in rows]

    pool = [
        *inside(POOL),
        {"text": "a", "meta": None},
        {"text": "b", "meta": {}},
        {"text": "c", "meta": float("nan")},
        {"text": "d"},
    ]
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pool[:-1]), encoding="utf-8")
    shares = [{"meta": {"label": value}, "count": count} for value, count in (("0", 30), ("1", 10))]
    table.write_text("".join(json.dumps(row) + "\n" for row in shares), encoding="utf-8")
    for labels in (ASKED["labels"], None):
        for prior in ("pool", rows, table):
            found = sparsort.choose_order(
                inside(DEMOS),
                QUERIES,
                prompt=PROMPT,
                label="meta.label",
                labels=labels,
                pool=pool,
                prior=prior,
                model=loaded,
            )
            assert prior_of(found)[1] == {"0": 0.75, "1": 0.25}
    found = sparsort.choose_order(inside(DEMOS), QUERIES, prompt=PROMPT, label="meta.label", pool=pool, model=loaded)
    assert found.prior is not None
    assert found.prior["source"] == "estimated"
    assert found.prior["labelled_rows"] == 40


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT])
def test_a_missing_label_of_the_pool_counts_as_none(loaded: LoadedModel, value: Any) -> None:
    pool = [*POOL, *({"text": f"no label {n}", "label": value} for n in range(3))]
    found = sparsort.choose_order(DEMOS, QUERIES, prompt=PROMPT, pool=pool, prior="pool", model=loaded)
    assert prior_of(found) == ("pool", {"0": 0.75, "1": 0.25})


def test_the_command(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    pool, queries, shares = (tmp_path / name for name in ("pool.jsonl", "queries.jsonl", "shares.json"))
    for path, rows in ((pool, POOL), (queries, QUERIES)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shares.write_text('{"0": 0.4, "1": 0.6}', encoding="utf-8")
    base = [str(pool), "-p", r"Review: {text}\nLabel:", "--model", str(make_tiny_model("llama")), "--orders", "3"]

    def prior(*options: str) -> dict[str, Any]:
        result, output = run(*base, *options, "--json")
        assert result.exit_code == 0, output
        found: dict[str, Any] = json.loads(result.stdout)["prior"]
        return found

    on = ("--queries", str(queries))
    assert prior("-k", "3", *on)["source"] == "estimated"
    assert prior("-k", "3", *on)["labelled_rows"] == 37
    # Without queries of the user's own there is nothing to estimate the shares of.
    assert prior("-k", "3") == {"source": "mixed", "shares": {"0": 0.625, "1": 0.375}, "labelled_rows": 0}
    assert prior("-k", "3", "--prior", "pool") == {
        "source": "pool",
        "shares": {"0": 0.75, "1": 0.25},
        "labelled_rows": 0,
    }
    assert prior("-k", "3", *on, "--criterion", "pdo_prior")["source"] == "pool"
    assert prior("-k", "3", *on, "--prior", str(shares))["shares"] == {"0": 0.4, "1": 0.6}
    assert prior("-k", "3", *on, "--criterion", "locale_unlabelled") is None
    result, output = run(*base, "-k", "3", *on, "--criterion", "density", "--prior", "pool")
    assert result.exit_code == 2
    assert (
        "--prior pool has no effect: the criterion compares the predictions with no prior, and this is --criterion density"
        in output
    )
    result, output = run(*base, "-k", "3", "--prior", "pool")
    assert "Prior of PDO: pool (0 0.75, 1 0.25)." in output


def test_python_and_the_command_choose_alike(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    pool, queries = tmp_path / "pool.jsonl", tmp_path / "queries.jsonl"
    rows = [row | {"id": f"p{n}"} for n, row in enumerate(POOL)]
    for path, given in ((pool, rows), (queries, QUERIES)):
        path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    model = str(make_tiny_model("llama"))
    result, output = run(
        str(pool), "-p", r"Review: {text}\nLabel:", "--model", model, "-k", "3", "--queries", str(queries), "--json"
    )
    assert result.exit_code == 0, output
    of_command = json.loads(result.stdout)
    before = [of_command["demos"][of_command["order"].index(place)] for place in range(3)]
    of_python = sparsort.choose_order(
        before, [row | {"id": str(n)} for n, row in enumerate(QUERIES)], pool=rows, prompt=PROMPT, model=model
    )
    assert of_python.order == of_command["order"]
    assert of_python.prior == of_command["prior"]
