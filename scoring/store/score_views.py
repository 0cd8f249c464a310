"""Scores as a table for people and for other libraries: summaries, a picture, a join with the scored data, a dataset card.

Contract: nothing here changes a score. pandas, polars and matplotlib are imported only in the functions that need them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparsort.errors import SparsortError
from sparsort.extras import need
from sparsort.scoring.data.rows import open_rows

if TYPE_CHECKING:
    from sparsort.scoring.store.scores import Scores

_HEAD_ROWS = 5
_BINS = 30
_LINE = 100  # characters of a model or a prompt in a summary
_SCORED = "ok"


def summary(scores: Scores) -> str:
    """A few lines: rows, rows without a score by status, model and prompt, and the difficulty's range."""
    lines = [f"Scores: {len(scores):,} rows, {_kind(scores)}"]
    if left := unscored(scores):
        lines.append(f"  {left.removesuffix('.')}")
    lines += [f"  {name}: {_one_line(text)}" for name, text in _model_and_prompt(scores.provenance).items() if text]
    values = scores.difficulty[np.isfinite(scores.difficulty)]
    if len(values):
        low, middle, high = np.quantile(values, [0.0, 0.5, 1.0])
        lines.append(f"  difficulty: {low:.4g} to {high:.4g}, median {middle:.4g}")
    return "\n".join(lines)


def unscored(scores: Scores) -> str:
    """A sentence that counts the rows without a score by status; "" if there are none."""
    left = {status: count for status, count in scores.counts("status").items() if status != _SCORED}
    listed = ", ".join(f"{count:,} {status}" for status, count in sorted(left.items()))
    return f"{sum(left.values()):,} of {len(scores):,} rows have no score: {listed}." if left else ""


def as_html(scores: Scores) -> str:
    """The summary, a histogram of the difficulty as SVG, and the hardest rows, for a notebook."""
    names = ["id", "difficulty", *scores.metrics[:3], "status"]
    head = scores.table.select(names).take(pa.array(scores.order(descending=True)[:_HEAD_ROWS])).to_pylist()
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(row[name])}</td>" for name in names) + "</tr>" for row in head)
    return (
        f"<pre>{html.escape(summary(scores))}</pre>{_histogram_svg(scores)}"
        f"<table><caption>The hardest rows</caption><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>"
    )


def plot(scores: Scores, axes: Any = None) -> Any:
    """A histogram of the difficulty with matplotlib.

    Args:
        scores: the scores.
        axes: the axes to draw in; None for new ones.

    Returns:
        The axes.

    Raises:
        SparsortError: matplotlib is not installed.
    """
    need("matplotlib", "plots", "a picture of scores")
    from matplotlib.figure import Figure

    if axes is None:
        # A figure of its own, without pyplot, leaves the caller's current figure and backend alone.
        axes = Figure(figsize=(6, 3.5), layout="constrained").add_subplot()
    axes.hist(scores.difficulty[np.isfinite(scores.difficulty)], bins=_BINS)
    axes.set_xlabel(f"difficulty ({scores.provenance.get('metric', scores.kind)})")
    axes.set_ylabel("rows")
    return axes


def join(scores: Scores, data: Any) -> Any:
    """The scored data with the columns of the scores next to its own.

    Args:
        scores: the scores.
        data: the rows that were scored, or some of them, in any form that `open_rows` reads.

    Returns:
        A table of the same kind as `data`: a frame of pandas or polars, a `datasets.Dataset`, otherwise a `pyarrow.Table`. It has
        the rows of `data` in their order. A column of the scores whose name `data` has too gets the prefix "score_".

    Raises:
        SparsortError: a row was not scored, an id now has another content, or a column has values of several types.
    """
    source = open_rows(data, id_column=scores.provenance.get("id_column"))
    rows = [dict(row.fields) for row in source.rows()]
    places = scores.places_of(rows)
    own = scores.table.drop_columns(["position", "digest"]).take(pa.array(places))
    # A column may be absent from the first rows.
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise SparsortError(
            f"{source.name} cannot be joined as a table: {error}. Give each column values of one type."
        ) from error
    for name in own.column_names:
        if name == "id" and scores.provenance.get("id_column") in table.column_names:
            continue
        table = table.append_column(name if name not in table.column_names else f"score_{name}", own.column(name))
    return _as_kind_of(data, table)


def card(scores: Scores) -> str:
    """The text of a dataset card: what the columns are, and how every number came to be, as JSON."""
    provenance = json.dumps(scores.provenance, indent=2, ensure_ascii=False, sort_keys=True)
    return (
        "---\ntags:\n- sparsort\n---\n\n# Scores made with sparsort\n\n"
        f"```\n{summary(scores)}\n```\n\n"
        "`difficulty` is higher for rows that the scorer considers harder. It is NaN if `status` is not `ok`, and `reason` "
        f"says why. The measured metrics are: {', '.join(scores.metrics)}.\n\n"
        f"## Provenance\n\n```json\n{provenance}\n```\n"
    )


def push(scores: Scores, repo_id: str, *, private: bool, token: str | None, folder: Path) -> str:
    """Upload the scores as a dataset of the hub, with its card, and return the address.

    Args:
        scores: the scores.
        repo_id: "owner/name".
        private: whether only the owner sees it.
        token: the hub's token; None for the one of `hf auth login`.
        folder: an empty folder for the files before they are uploaded.

    Raises:
        SparsortError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    (folder / "data").mkdir()
    scores.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(card(scores), encoding="utf-8")
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Add scores")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SparsortError(
            f"cannot upload to {repo_id!r}: {error} Check the name (owner/name), the token (hf auth login) and the network. "
            "save_to_disk writes the same table to a folder."
        ) from error
    return str(address)


def _kind(scores: Scores) -> str:
    metric = scores.provenance.get("metric")
    return f"{scores.kind} ({metric})" if metric else scores.kind


def _model_and_prompt(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The model and the prompt with its answer, in one line each; "" for what a scorer does not read."""
    prompt = provenance.get("prompt")
    if not isinstance(prompt, Mapping):
        prompt = {}
    turns = [text if role == "text" else f"[{role}] {text}" for role, text in prompt.get("turns", [])]
    answer = f"[answer] {prompt['answer']}" if prompt.get("answer") else ""
    return {
        "model": str(provenance.get("environment", {}).get("model") or ""),
        "prompt": " ".join([*turns, answer]).strip(),
    }


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LINE else f"{text[: _LINE - 1]}…"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value)[:80])


def _histogram_svg(scores: Scores) -> str:
    values = scores.difficulty[np.isfinite(scores.difficulty)]
    if not len(values):
        return ""
    counts, edges = np.histogram(values, bins=_BINS)
    width, height = 300, 60
    step = width / _BINS
    bars = "".join(
        f'<rect x="{at * step:.1f}" y="{height - height * count / counts.max():.1f}" width="{step - 1:.1f}" '
        f'height="{height * count / counts.max():.1f}" fill="currentColor"/>'
        for at, count in enumerate(counts)
    )
    label = f"Histogram of the difficulty from {edges[0]:.4g} to {edges[-1]:.4g}"
    return f'<svg role="img" aria-label="{label}" width="{width}" height="{height}" opacity="0.6">{bars}</svg>'


def _as_kind_of(data: Any, table: pa.Table) -> Any:
    kind = (type(data).__module__.partition(".")[0], type(data).__name__)
    if kind == ("pandas", "DataFrame"):
        return table.to_pandas().set_axis(data.index, axis="index")
    if kind in (("polars", "DataFrame"), ("polars", "LazyFrame")):
        import polars

        return polars.from_arrow(table)
    if kind == ("datasets", "Dataset"):
        from datasets import Dataset

        return Dataset(table)
    return table
