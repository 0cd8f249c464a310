"""The command `sparsort status`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from sparsort.recipes.cli.options import JsonOption
from sparsort.terminal.printing import show, show_json
from sparsort.terminal.tables import Table, number, text

EXAMPLE = "Example: `sparsort status scores/`"


def status(
    folder: Annotated[Path, typer.Argument(help="Folder of 'sparsort score --out', finished or not.")],
    as_json: JsonOption = False,
) -> None:
    """Show which shards of a score FOLDER are done, by which processes, and what is claimed by processes that run or died."""
    from sparsort.scoring.store.status import read_status

    found = read_status(folder.expanduser())
    if as_json:
        show_json(asdict(found))
        return
    total = "an unknown number of" if found.total is None else f"{found.total:,}"
    end = "The run is complete." if found.complete else "The run is not complete."
    show(f"{found.done:,} of {total} shards are done. {end}")
    if found.unscored:
        show(f"Rows without a score: {', '.join(f'{count:,} {status}' for status, count in found.unscored.items())}.")
    if found.workers:
        table = Table(
            text("process"),
            text("state"),
            number("shards"),
            number("rows"),
            text("since"),
            text("last shard"),
            title="",
        )
        for worker in found.workers:
            owner = worker.owner
            counts = f"{worker.shards:,}", f"{worker.rows:,}"
            # A process that has scored its shards has ended, which is no failure.
            state = "ended" if worker.state == "dead" else worker.state
            table.add_row(f"{owner.host} {owner.pid}", state, *counts, _time(owner.since), _time(worker.last))
        show()
        table.show()
    if found.claims:
        table = Table(text("claimed"), text("process"), text("state"), text("last sign"), title="")
        for claim in found.claims:
            name = f"shard {int(claim.name)}" if claim.name.isdecimal() else claim.name
            by = f"{claim.owner.host} {claim.owner.pid}" if claim.owner is not None else "unknown"
            table.add_row(name, by, claim.state, _time(claim.changed))
        show()
        table.show()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
