"""Small stores of outcomes, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparsort.curriculum.ablation.store.outcomes import Outcomes
from sparsort.curriculum.ablation.store.store import OutcomeStore

IDENTITY: dict[str, Any] = {"weights": "ab12", "tokenizer": "cd34", "dtype": "float32", "engine": 1}
FEATURES = ("hoyer", "norm", "entropy")
GROUP = "trec-3f2a/random/k8/seed3"


def make(folder: Path, **changes: Any) -> OutcomeStore:
    return OutcomeStore(folder, {**IDENTITY, **changes}, feature_names=FEATURES)


def outcomes(pairs: list[tuple[str, str]], labels: int = 2, seed: int = 0, text: list[str] | None = None) -> Outcomes:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(pairs), len(FEATURES))).astype(np.float32)
    features[::2, 1] = np.nan
    return Outcomes(
        prefix=np.array([prefix for prefix, _ in pairs], np.str_),
        query=np.array([query for _, query in pairs], np.str_),
        log_p=-rng.exponential(size=(len(pairs), labels)).astype(np.float32),
        n_tokens=rng.integers(1, 9, size=(len(pairs), labels)).astype(np.int32),
        features=features,
        text=text,
    )


def grid(prefix: str, n: int) -> list[tuple[str, str]]:
    return [(prefix, f"q{i}") for i in range(n)]


def rows(found: Outcomes) -> dict[tuple[str, str], tuple[bytes, bytes, bytes, str | None]]:
    """Every outcome by its pair, bit for bit."""
    texts = found.text if found.text is not None else [None] * len(found)
    made = {
        pair: (found.log_p[i].tobytes(), found.n_tokens[i].tobytes(), found.features[i].tobytes(), texts[i])
        for i, pair in enumerate(found.pairs())
    }
    assert len(made) == len(found)
    return made


def blocks(store: OutcomeStore, ending: str = "parquet") -> list[Path]:
    return sorted(store.folder.glob(f"groups/*/block-*.{ending}"))
