"""The sparse-attention study: the reach of a stack of windows, the words that have a loss, and reproducible runs."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsort import attach_index_branch
from sparsort.errors import SparsortError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "studies" / "sparse"


@pytest.fixture(scope="module")
def study() -> Any:
    """The script's module. Its folder is on the path while it is imported, as it does for a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("sparse_study")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("layers", "blocks"), [(1, 2), (2, 2), (2, 3)])
def test_words_beyond_the_reach_do_not_change_the_output_of_windows(study: Any, layers: int, blocks: int) -> None:
    recipe = replace(study.read_study(study.RECIPE), layers=layers, blocks=blocks, length=128, hidden=16, head_dim=8)
    model = study.make_model(recipe, 40, 0)
    attach_index_branch(model, selector="window", block_size=recipe.block_size, blocks=blocks)
    model.double().eval()
    ids = torch.randint(0, 40, (1, 128), generator=torch.Generator().manual_seed(1))
    last = 127
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits[0, last]
        moved = []
        for place in range(128):
            other = ids.clone()
            other[0, place] = (other[0, place] + 1) % 40
            moved.append(bool((model(input_ids=other, use_cache=False).logits[0, last] != before).any()))
    farthest = last - moved.index(True)
    assert farthest < recipe.reach <= farthest + recipe.block_size


def test_answers_have_a_loss_and_unpredictable_words_do_not(study: Any) -> None:
    parts = sys.modules["sparse_study_model"]
    recipe = study.read_study(study.RECIPE)
    rows = study.recall_rows(40, 0)
    tokenizer = parts.make_tokenizer(rows)
    batch = parts.collator(recipe, tokenizer)(rows)
    for number, row in enumerate(rows):
        words = row["text"].split(" ")
        assert tokenizer.convert_ids_to_tokens(batch.ids[number].tolist()) == words
        far = [a for a, f in zip(row["answers"], row["facts"], strict=True) if a - 1 - f >= recipe.reach]
        assert batch.is_answer[number].nonzero().flatten().tolist() == sorted(row["answers"])
        assert batch.is_far[number].nonzero().flatten().tolist() == sorted(far)
        bears = (batch.labels[number] != parts.IGNORED).nonzero().flatten().tolist()
        names = {word.split("-")[0] for word in words if "-" in word}
        plain = [place for place, word in enumerate(words) if word.split("-")[0] not in names]
        assert bears == sorted([*plain, *row["answers"]])
    assert batch.is_far.any()
    assert (batch.is_answer & ~batch.is_far).any()


def test_a_repeated_run_gives_the_same_result(study: Any, tmp_path: Path) -> None:
    sizes = {"length": 240, "rows": 24, "held_out": 10, "steps": 4, "evaluate_every": 2, "full_steps": 2, "stages": 2}
    recipe = replace(
        study.read_study(study.RECIPE), seeds=2, reference_steps=2, hidden=16, head_dim=8, index_dim=8, **sizes
    )
    recipe = replace(recipe, batch_size=2, orders=("plain", "sparsity"), attentions=("dense", "index_branch"))
    data = study.recall_rows(24, 0, length=240), study.recall_rows(10, 0, length=240, split="held_out")
    difficulty = np.arange(24.0)
    unit = ("index_branch", "sparsity", 1)
    found = []
    threads = torch.get_num_threads()
    try:
        for _ in range(2):
            study._work(recipe, data, tmp_path, unit, difficulty)
            found.append(study._path(tmp_path, unit).read_text())
            study._path(tmp_path, unit).unlink()
    finally:
        torch.set_num_threads(threads)
    first, second = ({k: v for k, v in json.loads(text).items() if k not in ("seconds", "digest")} for text in found)
    assert first == second
    assert first["steps"] == [0, 2, 4]


def test_a_recipe_without_its_baselines_is_refused(study: Any, tmp_path: Path) -> None:
    text = study.RECIPE.read_text(encoding="utf-8")
    path = tmp_path / "recipe.toml"
    for old, new, message in (
        ('attentions = ["dense", ', 'attentions = ["dence", ', "dense"),
        ('attentions = ["dense", ', "attentions = [", "name them first"),
        ("\nblocks = ", "\nblock = ", "blocks"),
        ("evaluate_every = 100", "evaluate_every = 70", "evaluate_every"),
    ):
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(SparsortError, match=message):
            study.read_study(path)
