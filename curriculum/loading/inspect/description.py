"""A plan as text: what its batches contain, stage by stage. One source for `sparsort plan` and `CurriculumPlan.describe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsort.curriculum.loading.inspect.summary import PlanSummary, summarise
from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.terminal.printing import one_line
from sparsort.terminal.tables import Table, number, prose

_MOST_OF_NAME = 40


def describe_plan(plan: CurriculumPlan, **options: Any) -> str:
    """A plan as text; the options are those of `summarise`."""
    return describe(summarise(plan, **options))


def describe(summary: PlanSummary, *, width: int = 100) -> str:
    """A summary as text: the lines that `sparsort plan` prints.

    Args:
        summary: the summary.
        width: the width of the table of stages, in characters.
    """
    lines = [f"{summary.what}; {_size(summary)}"]
    about = "" if summary.exact else "≈"
    lines.append(
        f"{summary.rows:,} rows in {summary.batches:,} batches, "
        f"{about}{sum(part.examples for part in summary.parts) / summary.batches:,.1f} examples each"
        + (f"; epoch {summary.epoch}" if summary.epoch else "")
    )
    if summary.scores:
        # A plan of sparsort 0.1.0 does not say how its scores were combined.
        how = f", {summary.combination or 'a combination'} of their percentiles" if len(summary.scores) > 1 else ""
        named = [
            scorer if len(summary.scores) == 1 else f"{name} ({scorer})" for name, scorer in summary.scores.items()
        ]
        lines.append(f"difficulty: {', '.join(named)}{how}")
    lines += [*_table(summary).lines(width), ""]
    if summary.group_names:
        in_data = _shares(summary.group_names, summary.group_shares, most=10).replace("\xa0", " ")
        lines.append(f"groups in the data: {in_data}")
    place = {"last": " (they come last)", "first": " (they come first)"}.get(summary.settings["unscored"], "")
    lines.append(f"rows without a score: {summary.unscored:,}{place if summary.unscored else ''}")
    if summary.cut is not None:
        lines.append(f"rows cut: {summary.cut:,}")
    lines.append(f"scores without a row: {summary.unused_scores:,}")
    lines.append(_seen(summary))
    if summary.below_batch:
        lines.append(
            f"the pacing allows fewer examples than a batch needs in {summary.below_batch:,} batches, which are drawn from just "
            "enough examples"
        )
    if not summary.exact:
        looked = sum(part.looked_at for part in summary.parts)
        lines.append(f"≈ estimated from {looked:,} of {summary.batches:,} batches, evenly spaced over each part")
    lines.append(f"fingerprint: {summary.fingerprint}")
    return "\n".join(lines)


def _size(summary: PlanSummary) -> str:
    size, budget = summary.settings["batch_size"], summary.settings["token_budget"]
    if summary.settings["packing"] != "none":
        return f"batches of {size} packed sequences"
    return f"batches of {budget} tokens" if size is None else f"batch size {size}"


def _seen(summary: PlanSummary) -> str:
    seen = summary.coverage
    if summary.settings["mode"] == "one_pass":
        return "every example is seen once per epoch"
    never = f"{100 * seen.never:.2f} % of the examples are never seen in an epoch"
    how = "counted" if seen.exact else "expected value"
    most = "" if seen.most is None else f", at most {seen.most:,} times"
    return f"{never} ({how}); an example is seen {seen.mean:.2f} times on average{most}"


def _table(summary: PlanSummary) -> Table:
    parts, about = summary.parts, "" if summary.exact else "≈"
    whole = len(parts) > 1 and parts[-1].stages[1] > 0
    columns: dict[str, list[str]] = {
        "stage" if whole else "part": [
            _span(*part.stages) if whole else str(place) for place, part in enumerate(parts, 1)
        ],
        "batches": [_span(*part.batches) for part in parts],
        "examples": [f"{part.examples:,}" for part in parts],
        "available": [_percents(part.share) for part in parts],
        "difficulty": [f"{about}{part.difficulty.mean:.4g}" if part.difficulty else "–" for part in parts],
        "from … to": [
            f"{part.difficulty.lowest:.4g} … {part.difficulty.highest:.4g}" if part.difficulty else "–"
            for part in parts
        ],
    }
    if any(part.unscored for part in parts):
        columns["no score"] = [f"{100 * part.unscored:.0f} %" for part in parts]
    if any(part.length for part in parts):
        columns["tokens"] = [f"{about}{part.length.mean:,.1f}" if part.length else "–" for part in parts]
        columns["padding"] = ["–" if part.padding is None else f"{100 * part.padding:.0f} %" for part in parts]
    if len(summary.group_names) > 1:
        columns["groups"] = [_shares(summary.group_names, part.groups or [], most=5) for part in parts]
    table = Table(*(prose(name) if name == "groups" else number(name) for name in columns))
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    return table


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def _percents(pair: tuple[float, float]) -> str:
    first, last = (f"{100 * share:.3g}" for share in pair)
    return f"{first} %" if first == last else f"{first}–{last} %"


def _shares(names: Sequence[str], shares: Sequence[float], most: int) -> str:
    """The largest shares with their names, the largest first."""
    ranked = sorted(zip(shares, names, strict=False), key=lambda pair: -pair[0])
    # No-break spaces keep a name and its share on one line.
    listed = [f"{one_line(name, _MOST_OF_NAME)}\xa0{100 * share:.0f}\xa0%" for share, name in ranked[:most]]
    return ", ".join(listed) + (f", {len(ranked) - most} more" if len(ranked) > most else "")
