"""Scorers without a forward pass."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsort
from sparsort.errors import SparsortError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "apples apples apples apples", "level": 3},
    {"id": "b", "text": "", "level": "1"},
    {"id": "c", "text": "Paris", "level": None},
]


def test_length_in_characters_and_tokens(make_tiny_model: Callable[..., Path]) -> None:
    assert sparsort.LengthScorer("characters").score(ROWS, "{text}!").difficulty.tolist()[::2] == [28, 6]
    folder = str(make_tiny_model("llama"))
    from sparsort.scoring.loading.demo_model import load_tokenizer

    counted = sparsort.LengthScorer("tokens", model=folder).score(ROWS, "{text}!")
    assert counted.difficulty[2] == len(load_tokenizer(folder)("Paris!")["input_ids"])
    assert list(counted.column("status")) == ["ok", "empty", "ok"]


def test_compression_is_zlibs_ratio() -> None:
    scores = sparsort.CompressionScorer().score(ROWS, "{text}")
    raw = ROWS[0]["text"].encode()
    assert scores.difficulty[0] == len(zlib.compress(raw, 9)) / len(raw)
    assert scores.difficulty[0] < scores.difficulty[2]


def test_random_depends_on_seed_and_id_only() -> None:
    forward = sparsort.RandomScorer(1).score(ROWS)
    backward = sparsort.RandomScorer(1).score(ROWS[::-1])
    assert dict(zip(forward.ids, forward.difficulty, strict=True)) == dict(
        zip(backward.ids, backward.difficulty, strict=True)
    )
    assert (sparsort.RandomScorer(2).score(ROWS).difficulty != forward.difficulty).all()
    many = sparsort.RandomScorer(0).score([{"n": n} for n in range(4000)]).difficulty
    assert abs(many.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 4000)


def test_column_takes_numbers_and_says_where_there_are_none() -> None:
    scores = sparsort.ColumnScorer("level").score(ROWS)
    assert scores.difficulty.tolist()[:2] == [3, 1]
    assert list(scores.column("status")) == ["ok", "ok", "missing"]
    assert sparsort.ColumnScorer("level", descending=True).score(ROWS).difficulty[0] == -3
    with pytest.raises(SparsortError, match="Did you mean 'level'"):
        sparsort.ColumnScorer("levle").score(ROWS)
    with pytest.raises(SparsortError, match=r"row 0 .*expected a number"):
        sparsort.ColumnScorer("text").score(ROWS)


def test_text_scorers_ask_for_a_prompt() -> None:
    with pytest.raises(SparsortError, match="id, text, level"):
        sparsort.CompressionScorer().score(ROWS)
    with pytest.raises(SparsortError, match="unknown unit"):
        sparsort.LengthScorer("words")  # type: ignore[arg-type]
