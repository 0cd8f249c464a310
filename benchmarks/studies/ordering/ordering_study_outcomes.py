"""The model's answers in the ordering study as one file, from which the page can be generated and the study continued.

Contract: `unpack` restores the store that was passed to `pack`, except for the features of test queries, which no arm and no
chooser reads (only `orderer_search.py` does). Log-probabilities and the features that choosers read are exact.

One Parquet file, a row group for each group of the store: group, prefix, query, log_p, n_tokens, features (null for test
queries). Its metadata has the store's identity, the features' names and the groups' notes. It is sealed with a digest of the
whole file. The file in `results/` was packed before seals existed, so only Git's hash protects it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.store.outcomes import Outcomes
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.errors import SparsortError
from sparsort.storage.files import write_atomically
from sparsort.storage.parquet_seal import add_seal, read_seal

NOTES = ("orders", "tokens", "probes", "spent")
_KEY = b"sparsort.study"
_SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("prefix", pa.string()),
        ("query", pa.string()),
        ("log_p", pa.list_(pa.float32())),
        ("n_tokens", pa.list_(pa.int32())),
        ("features", pa.list_(pa.float32())),
    ]
)


def pack(store: OutcomeStore, recipe: Ablation, path: Path) -> None:
    """Write a study's store as one file.

    Args:
        store: the store.
        recipe: the study with its data, which determines the test queries.
        path: the file.

    Raises:
        SparsortError: the study's answers are generated texts or in chat.
    """
    if any(task.is_generation or task.chat for task in recipe.load_tasks()):
        raise SparsortError(
            "only studies of labels in plain prompts are packed; this one generates answers, or is in chat."
        )
    unread = _test_queries(recipe)
    groups = store.groups()
    notes = {group: {name: note for name in NOTES if (note := store.get_note(group, name))} for group in groups}
    about = {"identity": store.identity, "feature_names": store.feature_names, "notes": notes}
    schema = _SCHEMA.with_metadata({_KEY: json.dumps(about)})
    with write_atomically(path) as temporary:
        with pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            compression_level=19,
            # Names repeat, and floats compress better with their bytes in separate streams. The file is a
            # part of the repository.
            use_dictionary=["group", "prefix", "query", "n_tokens.list.element"],
            use_byte_stream_split=["log_p.list.element", "features.list.element"],
        ) as writer:
            for group in groups:
                writer.write_table(_table(group, store.read(group), unread, schema))
        add_seal(temporary, {"groups": groups})


def unpack(path: Path, folder: Path) -> OutcomeStore:
    """Create the store of a packed study in a new folder.

    Raises:
        SparsortError: the file is damaged or not a packed study, or the folder has another store.
    """
    try:
        read_seal(path)
        file = pq.ParquetFile(path)
        about = json.loads(file.schema_arrow.metadata[_KEY])
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise SparsortError(f"{path} is not a packed ordering study ({error}). Run the study with --fresh.") from error
    if folder.exists():
        # The store of another model is refused, and an existing one is not filled again.
        return OutcomeStore(folder, about["identity"], feature_names=about["feature_names"])
    # The store is filled under another name and then renamed, so the folder is complete or absent.
    part = folder.with_name(f".{folder.name}.{os.getpid()}.unpacking")
    store = OutcomeStore(part, about["identity"], feature_names=about["feature_names"])
    for number in range(file.num_row_groups):
        for group, outcomes in _outcomes(file.read_row_group(number), len(store.feature_names)):
            store.write(group, outcomes)
    for group, held in about["notes"].items():
        for name, note in held.items():
            store.put_note(group, name, note)
    try:
        part.rename(folder)
    except OSError:
        # Another process created the folder first.
        shutil.rmtree(part)
    return OutcomeStore.existing(folder)


def _test_queries(recipe: Ablation) -> set[str]:
    """Digests of the test queries of all tasks."""
    found = set()
    for task in recipe.load_tasks():
        # Plain prompts of labels need no tokenizer. A query may be stored under either of its names.
        data, texts = TaskData(task, recipe), Texts(task, None)
        found |= {name for text in data.test_texts for name in texts.query_digests(texts.query([], text))}
    return found


def _table(group: str, held: Outcomes, unread: set[str], schema: pa.Schema) -> pa.Table:
    bare = group.endswith("/none")
    features = [
        # Features of test queries are the largest part of the file, and only those without demonstrations are
        # read.
        None if query in unread and not bare else row
        for query, row in zip(held.query.tolist(), held.features.tolist(), strict=True)
    ]
    columns: Mapping[str, Any] = {
        "group": [group] * len(held),
        "prefix": held.prefix.tolist(),
        "query": held.query.tolist(),
        "log_p": held.log_p.tolist(),
        "n_tokens": held.n_tokens.tolist(),
        "features": features,
    }
    return pa.table({name: pa.array(column, schema.field(name).type) for name, column in columns.items()}, schema)


def _outcomes(table: pa.Table, n_features: int) -> Iterator[tuple[str, Outcomes]]:
    """The groups of a table with their outcomes; all outcomes of a group have the same number of labels."""
    columns = table.to_pydict()
    names = np.array(columns["group"])
    for group in dict.fromkeys(columns["group"]):
        rows = np.flatnonzero(names == group).tolist()
        missing = [float("nan")] * n_features
        yield (
            group,
            Outcomes(
                prefix=np.array([columns["prefix"][row] for row in rows]),
                query=np.array([columns["query"][row] for row in rows]),
                log_p=np.array([columns["log_p"][row] for row in rows], dtype=np.float32),
                n_tokens=np.array([columns["n_tokens"][row] for row in rows], dtype=np.int32),
                features=np.array([columns["features"][row] or missing for row in rows], dtype=np.float32),
            ),
        )
