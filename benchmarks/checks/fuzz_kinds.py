"""The files that the fuzzer reads: data in every format, recipes, task files, a model folder, and sparsort's own kinds of files.

The last are the kinds of `bit_flips_kinds`. The others are created here; they are small and use every part of their format.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bit_flips_kinds import KINDS, Kind, Values

from sparsort.curriculum.ablation.recipe.ablation import Ablation
from sparsort.curriculum.ablation.recipe.tasks import load_task
from sparsort.recipes.train.recipe import read_recipe
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.loading.load import load_model
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.scorers.baselines import ColumnScorer

ROWS = [
    {
        "id": f"q{n}",
        "text": f"{n} and „ü“",
        "level": n * 1.5,
        "label": ["no", "yes"][n % 2],
        "meta": {"tags": [n, None]},
    }
    for n in range(6)
]
FLAT = [{name: str(value) for name, value in row.items() if name != "meta"} for row in ROWS]
_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
_CSV = "\n".join(",".join(row.values()) for row in FLAT)
_HEADER = ",".join(FLAT[0])


def read_data(path: Path, columns: Sequence[str] | None = None) -> Values:
    """Do with the rows what the commands do: check, count, render, score by a column, sample, and start late."""
    source = open_rows(path, columns=columns)
    prompt = Prompt.of("{text}", answer=" {label}")
    source.require(prompt.fields, prompt)
    scores = ColumnScorer("level").score(source)
    sizes = {"rows": source.count(), "late": len(list(source.rows(2))), "sample": len(source.sample(2))}
    return sizes | {"difficulty": repr(scores.difficulty.tolist())}


def _data(name: str, content: Callable[[], bytes], columns: Sequence[str] | None = None) -> Kind:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content())

    return Kind(name=f"data {name}", make=make, read=lambda folder: read_data(folder / name, columns))


def _table() -> pa.Table:
    """A table with column types that the other formats lack."""
    n = len(ROWS)
    return pa.table(
        {
            "id": pa.array([row["id"] for row in ROWS]).dictionary_encode(),
            "text": pa.array([row["text"] for row in ROWS], pa.large_string()),
            "level": pa.array([row["level"] for row in ROWS]).cast(pa.decimal128(10, 2)),
            "label": [row["label"] for row in ROWS],
            "nothing": pa.nulls(n),
            "day": pa.array(range(n), pa.date32()),
            "time": pa.array(range(n), pa.timestamp("us", "UTC")),
            "span": pa.array(range(n), pa.duration("ms")),
            "nested": [row["meta"] for row in ROWS],
            "map": pa.array([[("a", k)] for k in range(n)], pa.map_(pa.string(), pa.int64())),
            "bytes": [b"\xff"] * n,
        }
    )


def _bytes_of(write: Callable[[Any, pa.Table], None]) -> Callable[[], bytes]:
    def content() -> bytes:
        sink = pa.BufferOutputStream()
        write(sink, _table())
        return bytes(sink.getvalue())

    return content


def _write_parquet(sink: Any, table: pa.Table) -> None:
    # Several row groups, so that readers meet their borders.
    pq.write_table(table, sink, row_group_size=4)


def _write_stream(sink: Any, table: pa.Table) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def _write_file(sink: Any, table: pa.Table) -> None:
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def _save_dataset(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))


def _make_shards(folder: Path) -> None:
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist(ROWS[part * 3 : part * 3 + 3]), folder / f"train-{part:05d}-of-00002.parquet"
        )


_TASK = """
name = "signs"
prompt = "Text: {text}\\nLabel:"
answer = " {label}"
label = "label"
train = "rows.jsonl"
separator = "\\n\\n"
labels = { no = "negative", yes = "positive" }
content_free = ["N/A", ""]
"""
_ABLATION = """
tasks = ["task.toml"]
data = "."
model = "demo"
shots = [2, 4]
sets = 3
selectors = ["random"]
orderers = ["length_ascending"]
random_orders = 4
test_rows = 2
calibrated = [false]
"""
_RECIPE = """
[train]
learning_rate = 1e-3
epochs = 2
save_steps = 10
[curriculum]
schedule = "curriculum"
stages = 4
pacing = "linear:start=0.2"
[attention]
selector = "index_branch"
freeze_base = true
"""


def _write(**files: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, text in files.items():
            # A keyword argument cannot contain a dot, so "rows__jsonl" is the file rows.jsonl.
            (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")

    return make


def _read_task(folder: Path) -> Values:
    task = load_task(folder / "task.toml")
    return {"digest": task.digest, "prompt": task.query_text(ROWS[0])}


def _read_ablation(folder: Path) -> Values:
    ablation = Ablation.from_toml(folder / "ablation.toml")
    return {"table": repr(ablation.to_table()), "tasks": [task.digest for task in ablation.load_tasks()]}


def _read_chats(folder: Path) -> Values:
    source = open_rows(folder / "chats.jsonl")
    prompt = Prompt.given(None, messages="messages")
    assert prompt is not None
    source.require(prompt.fields, prompt)
    return {"digests": [row.digest for row in source.rows()]}


def _make_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    # The weights come from the global generator, whose state is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=32, **size)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def _read_model(folder: Path) -> Values:
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    return {"weights": loaded.weights, "tokenizer": loaded.tokenizer_hash}


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Turn off the progress bars of `datasets`, which would be drawn for thousands of files."""
    import datasets

    was_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()


_CHATS = "".join(
    json.dumps({"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]})
    + "\n"
    for row in ROWS
)
_COLUMNS = json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}, indent=1)
_FRAME = json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]})
DATA: tuple[Kind, ...] = (
    _data("rows.jsonl", _LINES.encode),
    _data("rows.jsonl.gz", lambda: gzip.compress(_LINES.encode(), mtime=0)),
    _data("utf16.jsonl", lambda: _LINES.encode("utf-16")),
    _data("array.json", json.dumps(ROWS, indent=1).encode),
    _data("columns.json", _COLUMNS.encode),
    _data("frame.json", _FRAME.encode),
    _data("rows.csv", f"{_HEADER}\n{_CSV}".encode),
    _data("semicolons.csv", f"{_HEADER}\n{_CSV}".replace(",", ";").encode),
    _data("utf32.csv", lambda: f"{_HEADER}\n{_CSV}".encode("utf-32")),
    _data("headless.csv", _CSV.encode, tuple(FLAT[0])),
    _data("rows.tsv.gz", lambda: gzip.compress(f"{_HEADER}\n{_CSV}".replace(",", "\t").encode(), mtime=0)),
    _data("rows.parquet", _bytes_of(_write_parquet)),
    _data("stream.arrow", _bytes_of(_write_stream)),
    _data("file.arrow", _bytes_of(_write_file)),
    Kind(name="data folder of Parquet", make=_make_shards, read=read_data),
    Kind(name="data saved dataset", make=_save_dataset, read=lambda folder: read_data(folder / "saved")),
    Kind(name="data chats.jsonl", make=_write(chats__jsonl=_CHATS), read=_read_chats),
    Kind(name="task file", make=_write(task__toml=_TASK), read=_read_task),
    Kind(name="ablation recipe", make=_write(ablation__toml=_ABLATION, task__toml=_TASK), read=_read_ablation),
    Kind(
        name="training recipe",
        make=_write(recipe__toml=_RECIPE),
        read=lambda f: {"r": repr(read_recipe(f / "recipe.toml"))},
    ),
    Kind(name="model folder", make=_make_model, read=_read_model, share=0.5),
)
ALL: tuple[Kind, ...] = (*DATA, *KINDS)
