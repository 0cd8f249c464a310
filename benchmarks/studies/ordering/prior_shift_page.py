"""The section "Which prior" of the ordering study's page, written from the numbers of `prior_shift.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TITLE = "## Which prior"
_DEFAULT, _DEFAULT_WITHOUT = "estimated (EM)", "uniform and pool, averaged"
_LIMITS = """Limits. The demonstrations are those of the unshifted pool, so a shifted pool changes only the counted shares and the
labelled rows. The labelled rows are the 32 development rows and a third of the test rows, resampled, so they repeat if a
label is rare. Resampling by label satisfies exactly what the estimate assumes, that the rows of a label are alike in pool
and queries. One small model."""


def section(path: Path) -> str:
    """The section as Markdown.

    Args:
        path: benchmarks/results/prior-shift.json.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join([TITLE, _protocol(found), _with_queries(found), _without_queries(found), _LIMITS])


def _protocol(found: dict[str, Any]) -> str:
    protocol, tasks = found["protocol"], len(found["queries"][_DEFAULT]["by_task"])
    return f"""\
PDO compares the mean prediction under an order with a prior. This test shifts the label shares of the pool or of the
queries: one label has 80 % of the rows, and the others share 20 % in their original proportions. It calls no model: the
demonstration sets, orders and answers are those above, without contextual calibration. Made by
`{found["command"]}`, whose first lines state the protocol, on {found["machine"]["cpu"]} ({found["machine"]["cores"]} cores).
Each task and shift has {protocol["sets"] // tasks} demonstration sets with {protocol["resamples"]} resamples.

Gain: the accuracy of the chosen order minus the mean of the 16 random orders, in points. Loss: the gain of the better of
"uniform" and "pool" minus the gain of the prior in question; below 0, the prior is better than both. The better one is
found for each task and shift by its mean over sets, from the same numbers, so losses are slightly too high. Tasks count
alike, and so do the shifts of a task. Intervals are 95 %, by wild bootstrap over clusters; a cluster is one seed of a task."""


def _with_queries(found: dict[str, Any]) -> str:
    protocol, queries, error = found["protocol"], found["queries"], found["error_of_shares"]

    def loss(name: str) -> str:
        return _points(queries[name]["loss"])

    def unshifted(name: str) -> str:
        return _points(queries[name]["gain"]["none"])

    return f"""\
**With queries** ({protocol["queries"]}, without labels). The estimates read {protocol["labelled_rows"]} labelled rows of
the pool, their labels as even as the pool allows, under one order.

{_table(queries, _DEFAULT)}

"{_DEFAULT}" is the default of `choose` if there are queries and labelled rows. On shifted tasks it loses
{loss(_DEFAULT)} points against the better of the two; uniform loses {loss("uniform")},
and the shares of the pool {loss("pool")}. Without a shift the shares of the pool gain {unshifted("pool")},
the estimate {unshifted(_DEFAULT)}, and uniform {unshifted("uniform")}: `--prior pool` is for those who know that the
queries have the shares of the pool.

Settings of the estimators (pseudo-rows, widths of the Gaussian priors, the number and shares of labelled rows, one order
or several, EM or BBSE; about 40 variants) were compared on the sets of seeds below {protocol["seeds_for_tuning"]}.
The last column has the loss on the other sets alone; the test and development rows are the same in all sets. The variants
differ little, and a bias fitted for one order does as well as one fitted for several, so an estimate costs little.

Loss by task:

{_by_task(queries)}

Distance of the prior from the true shares of the queries (half the sum of absolute differences) without a shift, with a
shifted pool, and with shifted queries: estimated {_triple(error[_DEFAULT])}; BBSE {_triple(error["BBSE"])}; uniform
{_triple(error["uniform"])}; pool {_triple(error["pool"])}. The estimate is far from exact, and PDO with the true shares
shows what a better one could gain."""


def _without_queries(found: dict[str, Any]) -> str:
    rows = found["pool_rows"]
    loss = _points(rows[_DEFAULT_WITHOUT]["loss"])
    return f"""**Without queries**, `choose -k` reads unlabelled rows of the pool, which cannot show the shares of the queries.

{_table(rows, _DEFAULT_WITHOUT)}

There the default is `--prior mixed`, the mean of the uniform and the pool's shares: it loses {loss}
on shifted tasks, uniform {_points(rows["uniform"]["loss"])}. It was found in this very table. An estimate would be one of the
shares of the pool, which can be counted."""


def _table(rows: dict[str, Any], default: str) -> str:
    lines = [
        "| prior or criterion | no shift | pool shifted | queries shifted | loss when shifted | loss, later sets |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        label = f"**{name}**" if name == default else name
        gains = " | ".join(_points(row["gain"][kind]) for kind in ("none", "pool", "queries"))
        lines.append(f"| {label} | {gains} | {_points(row['loss'])} | {_points(row['loss_later_sets'])} |")
    return "\n".join(lines)


def _by_task(rows: dict[str, Any]) -> str:
    tasks = list(rows[_DEFAULT]["by_task"])
    lines = [f"| prior | {' | '.join(tasks)} |", f"| :--- |{' ---: |' * len(tasks)}"]
    for name in ("uniform", "pool", _DEFAULT, "BBSE"):
        lines.append(f"| {name} | {' | '.join(_points(rows[name]['by_task'][task]['loss']) for task in tasks)} |")
    return "\n".join(lines)


def _points(value: list[float | None]) -> str:
    middle, low, high = (None if one is None else _number(one) for one in value)
    return f"{middle} (no interval)" if low is None or high is None else f"{middle} [{low}, {high}]"


def _number(value: float) -> str:
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _triple(values: dict[str, float]) -> str:
    return ", ".join(f"{values[kind]:.2f}" for kind in ("none", "pool", "queries"))
