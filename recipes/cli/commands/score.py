"""The command `sparsort score`, and the table of the easiest and hardest rows that it prints."""

from __future__ import annotations

import contextlib
import heapq
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from sparsort.errors import SparsortError
from sparsort.options import option, parts
from sparsort.paths import spell
from sparsort.recipes.cli.options import JsonOption, RowsArgument, generated, report_to_option
from sparsort.recipes.score.config import ScorerConfig
from sparsort.scoring.prompts.spec import DataSpec, PromptSpec
from sparsort.terminal.printing import note, one_line, show, show_json
from sparsort.terminal.tables import Table, natural_key, number, text

if TYPE_CHECKING:
    from sparsort.recipes.score.score import ScoreReport
    from sparsort.scoring.prompts.prompt import Prompt
    from sparsort.scoring.scorers.run_shards import Coverage

EXAMPLE = r"Example: `sparsort score questions.jsonl --prompt 'Question: {question}\nAnswer:' --out scores/`"
# The number of rows shown at either end of the ranking, and the most characters of a text.
_ROWS_AT_END = 5
_MOST_OF_TEXT = 400
# A beginning that all texts share is shown as an ellipsis if it has at least this many characters.
_SHORTEST_SHARED = 24


PROCESSES_PANEL = "Several processes"
_PART = re.compile(r"(\d{1,9})/(\d{1,9})")
# The exit code if other parts are missing.
_INCOMPLETE = 4


def _read_workers(text: str | None) -> int | Literal["auto"] | None:
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise SparsortError(f"--workers is {text!r}; expected a number from 1 on, or auto.")
    return int(text)


def _read_devices(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = parts(text)
    if not names:
        raise SparsortError(f"--devices is {text!r}; expected names such as 0,1 or cuda:0,cuda:1.")
    return tuple(f"cuda:{name}" if name.isdecimal() else name for name in names)


def _read_part(text: str) -> tuple[int, int]:
    """The part that a user gave; where it comes from the environment, a note says from which variables."""
    if text == "env":
        from sparsort.recipes.score.job import part_from_environment

        (k, n), variables = part_from_environment(os.environ)
        note(f"part {k}/{n}, from {variables}")
        return k, n
    match = _PART.fullmatch(text)
    if match is None or not int(match[1]) < int(match[2]):
        raise SparsortError(f"--part is {text!r}; expected K/N with K from 0 to N − 1, such as 0/4, or env.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The options of `sparsort score` besides those of the prompt, the data and the scorer."""

    out: Path | None = option(
        None, "Folder for the scores; run the same command again to resume after a stop.", short="-o"
    )
    shard_rows: int = option(2048, "Rows of one shard, which is kept or scored again as a whole.")
    strict: bool = option(False, "Exit with 3 if a row has no score.")
    part: str | None = option(
        None,
        "Score only part K of N (K from 0), such as 0/4; 'env': as Slurm or torchrun numbers this process. Exits with 4 while "
        "others are missing.",
        panel=PROCESSES_PANEL,
    )
    workers: int | Literal["auto"] | None = option(
        None,
        "Processes that share the work: a number, or 'auto' [default: 1].",
        panel=PROCESSES_PANEL,
        kind=str | None,
        read=_read_workers,
    )
    devices: Sequence[str] | None = option(
        None,
        "Comma-separated devices of the workers, such as 0,1 (two GPUs) or cpu.",
        panel=PROCESSES_PANEL,
        kind=str | None,
        read=_read_devices,
    )
    report_to: str = report_to_option()


@generated
def score(
    file: RowsArgument,
    prompt: PromptSpec,
    data: DataSpec,
    scorer: ScorerConfig,
    options: ScoreOptions,
    as_json: JsonOption = False,
) -> None:
    """Score every row of FILE: how hard it is for the model, by the sparsity of its last hidden state."""
    from sparsort.recipes.score.score import score_file

    common: dict[str, Any] = {"scorer": scorer, "prompt": prompt, "data": data, "out": options.out}
    common |= {"shard_rows": options.shard_rows, "workers": options.workers or 1, "devices": options.devices or ()}
    common["report_to"] = options.report_to
    if options.part is not None:
        _show_coverage(score_file(file, **common, part=_read_part(options.part)), as_json=as_json)
        return
    report = score_file(file, **common)
    summary = report.summary()
    unscored = summary["rows"] - summary["status"].get("ok", 0)
    if as_json:
        show_json(summary)
    else:
        show_scores(report)
    if unscored:
        reasons = ", ".join(f"{count} {status}" for status, count in summary["status"].items() if status != "ok")
        note(
            f"{unscored} of {summary['rows']} rows have no score: {reasons}. The column 'reason' says why for each of them."
        )
        if options.strict:
            raise typer.Exit(3)


def _show_coverage(coverage: Coverage, *, as_json: bool) -> None:
    """Print what is done of a folder, and exit with its own code if it is not complete."""
    counts = {name: getattr(coverage, name) for name in ("done", "total", "scored", "kept", "complete")}
    if as_json:
        show_json({"out": str(coverage.folder), **counts})
    else:
        show(f"{coverage.scored} shards scored, {coverage.kept} were done before.")
        show(f"{coverage.done} of {coverage.total} shards are done in {coverage.folder}.")
    if not coverage.complete:
        raise typer.Exit(_INCOMPLETE)


def show_scores(report: ScoreReport) -> None:
    """Print a report to stdout, and a note to stderr if all scores are equal."""
    import numpy as np

    summary = report.summary()
    difficulty, ids = report.scores.difficulty, report.scores.column("id")
    places = ends(difficulty, ids)
    texts = dict(zip(sorted(places), _texts(report, sorted(places)), strict=True))
    # Scorers that run no model count no tokens.
    counts = report.scores.column("n_tokens") if summary["tokens"] else None
    columns = [number("rank"), text("id"), number("difficulty"), *([number("tokens")] if counts is not None else [])]
    table = Table(*columns, text("text"), title="easiest and hardest by this score")
    ordered = np.sort(difficulty[np.isfinite(difficulty)])
    for place in places:
        rank = int(np.searchsorted(ordered, difficulty[place])) + 1
        tokens = [str(counts[place])] if counts is not None else []
        table.add_row(str(rank), str(ids[place]), f"{difficulty[place]:.4f}", *tokens, texts[place])
    table.show()
    show(_time(report, summary))
    if summary["out"]:
        show(f"Scores: {summary['out']}")
    if len(ordered) > 1 and ordered[0] == ordered[-1]:
        note(
            f"note: all {len(ordered):,} scores are {ordered[0]:.4g}, so they rank nothing; the rows are listed by id."
        )


def ends(difficulty: Any, ids: Any) -> list[int]:
    """Positions of the easiest rows and then of the hardest, or of all rows if they are few.

    Rows with equal scores are ordered by id, with "q2" before "q10".

    Args:
        difficulty: (N,) scores; rows without a score have NaN.
        ids: (N,) ids.
    """
    import numpy as np

    known = np.flatnonzero(np.isfinite(difficulty))

    def key(place: Any) -> Any:
        return difficulty[place], natural_key(ids[place])

    if len(known) <= 2 * _ROWS_AT_END:
        return [int(place) for place in sorted(known, key=key)]
    ordered = np.sort(difficulty[known])
    # Only rows up to the fifth score can be among the first five, so only these need the slow key with the id.
    easy = known[difficulty[known] <= ordered[_ROWS_AT_END - 1]]
    hard = known[difficulty[known] >= ordered[-_ROWS_AT_END]]
    first = heapq.nsmallest(_ROWS_AT_END, easy, key=key)
    last = heapq.nlargest(_ROWS_AT_END, hard, key=key)[::-1]
    return [int(place) for place in (*first, *last)]


def _time(report: ScoreReport, summary: Mapping[str, Any]) -> str:
    scored = f"{summary['status'].get('ok', 0)} of {summary['rows']} rows scored"
    # If some shards are from an earlier call, the tokens were not all read in this time.
    rate = f" ({summary['tokens'] / report.scoring_seconds:,.0f} tokens/s)" if summary["tokens"] else ""
    took = f"{report.scoring_seconds:.1f} s{'' if report.resumed else rate}"
    return f"{scored} in {took}, after {report.loading_seconds:.1f} s of loading."


def _texts(report: ScoreReport, places: Sequence[int]) -> list[str]:
    """The rendered texts of some rows, shortened, without a long beginning that all of them share."""
    positions = report.scores.column("position")
    rows = report.source.take([int(positions[place]) for place in places])
    texts = [" ".join(text_of(report.prompt, row.fields)[: 20 * _MOST_OF_TEXT].split()) for row in rows]
    shared = _shared_length(texts)
    if shared >= _SHORTEST_SHARED:
        texts = [f"… {shortened[shared:]}" for shortened in texts]
    return [one_line(shortened, _MOST_OF_TEXT) for shortened in texts]


def _shared_length(texts: Sequence[str]) -> int:
    """The number of characters in the whole words that all texts begin with; 0 if all texts are equal."""
    # All texts share the beginning that the first and the last text in alphabetical order share.
    first, last = min(texts, default=""), max(texts, default="")
    differing = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), 0)
    return first.rfind(" ", 0, differing) + 1


def text_of(prompt: Prompt | None, fields: Mapping[str, Any]) -> str:
    """The text of a row that the model reads, without chat markers and the system turn.

    Without a prompt, it is the text of all fields except the id.
    """
    # These modules import NumPy, which the help of the commands does without.
    from sparsort.scoring.prompts.conversations import turns_of
    from sparsort.templates import render
    from sparsort.values import as_text, has_text, is_missing

    if prompt is None:
        return " ".join(
            as_text(value, field=spell([name]), where="a row")
            for name, value in fields.items()
            if name != "id" and not is_missing(value) and has_text(value)
        )
    # A row that cannot be rendered has no score either, or had other content when it was scored.
    with contextlib.suppress(SparsortError):
        if prompt.messages is not None:
            return "\n".join(turn["content"] for turn in turns_of(fields, prompt.messages, where="a row"))
        templates = [template for role, template in prompt.turns if role != "system"]
        return "\n".join(render(template, fields, where="a row") for template in templates) + (
            render(prompt.answer, fields, where="a row") if prompt.answer else ""
        )
    return ""
