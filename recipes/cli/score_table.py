"""What `sparsort score` prints: the easiest and the hardest rows with their texts, and what scoring took."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsort.errors import SparsortError
from sparsort.paths import spell
from sparsort.scoring.prompts.conversations import turns_of
from sparsort.templates import render
from sparsort.terminal.printing import note, one_line, show
from sparsort.terminal.tables import Table, natural_key, number, text
from sparsort.values import as_text, has_text, is_missing

if TYPE_CHECKING:
    from sparsort.recipes.score.score import ScoreReport
    from sparsort.scoring.prompts.prompt import Prompt

# Rows shown at either end.
_ENDS = 5
_MOST_OF_TEXT = 400
# A beginning that all texts share is shown as an ellipsis if it has as many characters.
_SHARED = 24


def show_scores(report: ScoreReport) -> None:
    """Print a report, on stdout, and a note on stderr where the score ranks nothing."""
    summary = report.summary()
    difficulty, ids = report.scores.difficulty, report.scores.column("id")
    places = ends(difficulty, ids)
    texts = dict(zip(sorted(places), _texts(report, sorted(places)), strict=True))
    # The other scorers count none.
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
    """Places of the easiest rows and then the hardest, all of them where there are few; equal scores by id, q2 before q10."""
    known = np.flatnonzero(np.isfinite(difficulty))

    def key(place: Any) -> Any:
        return difficulty[place], natural_key(ids[place])

    if len(known) <= 2 * _ENDS:
        return [int(place) for place in sorted(known, key=key)]
    ordered = np.sort(difficulty[known])
    easy = known[difficulty[known] <= ordered[_ENDS - 1]]
    hard = known[difficulty[known] >= ordered[-_ENDS]]
    first = heapq.nsmallest(_ENDS, easy, key=key)
    last = heapq.nlargest(_ENDS, hard, key=key)[::-1]
    return [int(place) for place in (*first, *last)]


def _time(report: ScoreReport, summary: Mapping[str, Any]) -> str:
    scored = f"{summary['status'].get('ok', 0)} of {summary['rows']} rows scored"
    # With shards of an earlier call among them, the tokens are not those of this time.
    rate = f" ({summary['tokens'] / report.scoring_seconds:,.0f} tokens/s)" if summary["tokens"] else ""
    took = f"{report.scoring_seconds:.1f} s{'' if report.resumed else rate}"
    return f"{scored} in {took}, after {report.loading_seconds:.1f} s of loading."


def _texts(report: ScoreReport, places: Sequence[int]) -> list[str]:
    """The rendered texts of some rows, shortened, without a long beginning that all of them share."""
    positions = report.scores.column("position")
    rows = report.source.take([int(positions[place]) for place in places])
    texts = [" ".join(text_of(report.prompt, row.fields)[: 20 * _MOST_OF_TEXT].split()) for row in rows]
    shared = _shared(texts)
    if shared >= _SHARED:
        texts = [f"… {written[shared:]}" for written in texts]
    return [one_line(written, _MOST_OF_TEXT) for written in texts]


def _shared(texts: Sequence[str]) -> int:
    """Characters of the whole words that all texts begin with; 0 where the texts are the same."""
    first, last = min(texts, default=""), max(texts, default="")
    differing = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), 0)
    return first.rfind(" ", 0, differing) + 1


def text_of(prompt: Prompt | None, fields: Mapping[str, Any]) -> str:
    """What the model reads of a row, chat markers and the system turn apart; without a prompt, the fields that have a text."""
    if prompt is None:
        return " ".join(
            as_text(value, field=spell([name]), where="a row")
            for name, value in fields.items()
            if name != "id" and not is_missing(value) and has_text(value)
        )
    # A row that cannot be rendered has no score either, or had another content when it was scored.
    with contextlib.suppress(SparsortError):
        if prompt.messages is not None:
            return "\n".join(turn["content"] for turn in turns_of(fields, prompt.messages, where="a row"))
        templates = [template for role, template in prompt.turns if role != "system"]
        return "\n".join(render(template, fields, where="a row") for template in templates) + (
            render(prompt.answer, fields, where="a row") if prompt.answer else ""
        )
    return ""
