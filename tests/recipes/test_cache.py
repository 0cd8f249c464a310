"""`order` with its cache, and `sparsort cache`: the same result with, without and from the cache; listed, bounded, cleared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.order.order import order_file
from sparsort.recipes.score.config import ScorerConfig
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.spec import ModelSpec
from sparsort.storage import cache as user_cache

ROWS = [{"id": f"q{n}", "question": f"How many apples are left of {n}?", "answer": str(n)} for n in range(12)]
QUERY = "How many pears are left of 7?"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSORT_CACHE_ROWS_GB", "1")
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> str:
    return str(make_tiny_model("llama"))


def _order(*arguments: Any, query: str = QUERY) -> dict[str, Any]:
    return dict(json.loads(run("order", *arguments, "-q", query, "--json").stdout))


SELECTIONS = {
    "knn": ["--select", "knn", "-k", "4"],
    "spread": ["--select", "spread", "-k", "3", "--scorer", "entropy"],
    "difficulty_matched": [
        "--select",
        "difficulty_matched",
        "-k",
        "3",
        "--outliers",
        "drop:3",
        "--pooling",
        "mean_metric",
    ],
    "similarity": ["--order", "similarity_ascending"],
    "chat": ["--select", "mmr", "-k", "4", "--chat"],
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_an_order_is_the_same_with_without_and_from_the_cache(
    name: str, file: Path, model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [file, "--model", model, *SELECTIONS[name]]
    without = _order(*given, "--no-cache")
    assert without["cache"] is None
    assert not (cache / "rows").exists()
    first = _order(*given)
    assert first["cache"]["read"] > 0
    walked: list[int] = []
    monkeypatch.setattr(Backbone, "walk", lambda *arguments: walked.append(1))
    second = _order(*given)
    assert not walked
    assert second["cache"]["read"] == 0
    assert second["cache"]["from_cache"] >= first["cache"]["read"]
    for result in (without, first, second):
        del result["cache"]
        if result["provenance"] is not None:
            del result["provenance"]["environment"]
    assert without == first == second


def test_a_new_query_is_all_that_is_read(file: Path, model: str, cache: Path) -> None:
    given = [file, "--model", model, "--select", "knn", "-k", "4", "--order", "given"]
    assert _order(*given)["cache"] == {"from_cache": 0, "read": 13}
    assert _order(*given, query="What is left of 3 apples?")["cache"] == {"from_cache": 12, "read": 1}
    errors = run("order", *given, "-q", "Another?").stderr
    assert "12 of 13 readings of rows came from the cache. --no-cache repeats them." in errors
    errors = run("order", *given, "-q", "Another?", "--no-cache").stderr
    assert "cache" not in errors


def test_a_limit_of_nothing_is_no_cache(file: Path, model: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSORT_CACHE_ROWS_GB", "0")
    assert _order(file, "--model", model)["cache"] is None
    assert not (cache / "rows").exists()
    for bad in ("much", "-1", "inf", "nan"):
        monkeypatch.setenv("SPARSORT_CACHE_ROWS_GB", bad)
        assert "expected a number of gigabytes" in run("order", file, "-q", "x", "--model", model, code=2).stderr


def test_python_writes_nothing_unless_asked(file: Path, model: str, cache: Path) -> None:
    result = order_file(file, query=QUERY, config=OrderConfig(), scorer=ScorerConfig(model=ModelSpec(model)))
    assert result.cache is None
    assert not cache.exists()


def test_a_model_with_code_of_its_own_is_read_every_time_and_a_note_says_why(
    file: Path, model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsort.scoring.store.row_cache.obstacle", lambda backbone: "it runs code of its own")
    found = _order(file, "--model", model)
    assert found["cache"] is None
    assert "nothing was kept in the cache: it runs code of its own." in found["notes"]
    assert not (cache / "rows").exists()


def test_the_cache_is_listed_and_cleared_and_nothing_else_is_touched(file: Path, model: str, cache: Path) -> None:
    _order(file, "--model", model, "--select", "knn", "-k", "3")
    # What a user may have in a folder that SPARSORT_CACHE names.
    others = [cache / "models" / "mine" / "model.safetensors", cache / "rows" / "notes" / "x.rows", cache / "file.txt"]
    converted = cache / "models" / "tiny-float32-0123" / user_cache.MODEL_MARKS[0]
    for path in (*others, converted):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1234")
    found = json.loads(run("cache", "--json").stdout)
    assert found["folder"] == str(cache)
    assert found["models"] == {"entries": 1, "bytes": 4, "limit": 20_000_000_000}
    assert found["rows"]["entries"] == 3
    assert found["rows"]["bytes"] == sum(path.stat().st_size for path in cache.glob("rows/*/*.rows")) - 4
    assert found["removed"] == {"entries": 0, "bytes": 0}
    shown = run("cache").stdout
    assert "models: 1 entry, 0.00 MB of at most 20.00 GB\n" in shown
    assert "limited by SPARSORT_CACHE_MODELS_GB\n" in shown
    assert "rows: 3 entries" in shown
    assert "Removed 4 entries" in run("cache", "--clear").stdout
    assert sorted(path for path in cache.rglob("*") if path.is_file()) == sorted(others)
    assert json.loads(run("cache", "--clear", "--json").stdout)["removed"]["entries"] == 0
    assert _order(file, "--model", model, "--select", "knn", "-k", "3")["cache"]["from_cache"] == 0


def test_models_beyond_the_limit_go_the_least_recently_used_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from sparsort.scoring.loading import conversions

    monkeypatch.setenv("SPARSORT_CACHE_MODELS_GB", "0.000003")
    for number, name in enumerate(["a", "b", "c"]):
        folder = conversions.models_folder() / name
        conversions.install(folder, lambda temporary: (temporary / "weights").write_bytes(bytes(800)))
        os.utime(folder, (number, number))
    assert {entry.path.name for entry in user_cache.entries("models")} == {"a", "b", "c"}
    user_cache.mark_used(conversions.models_folder() / "a")
    conversions.install(
        conversions.models_folder() / "d", lambda temporary: (temporary / "weights").write_bytes(bytes(800))
    )
    assert {entry.path.name for entry in user_cache.entries("models")} == {"a", "c", "d"}
    assert sum(entry.bytes for entry in user_cache.entries("models")) <= 3000


def test_env_shows_what_the_cache_holds(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("sparsort.scoring.loading.demo_model.demo_folder", lambda: cache)
    found = json.loads(run("env", "--json").stdout)
    assert found["cache"] == str(cache)
    assert found["cache_holds"]["rows"] == {"entries": 0, "bytes": 0, "limit": 10**9}
    assert "rows: 0 entries, 0.00 MB of at most 1.00 GB" in run("env").stdout
