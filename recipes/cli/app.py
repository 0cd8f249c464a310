"""The command line: `sparsort score`, `order`, `choose`, `calibrate`, `ablate`, `report`, `plan`, `train`, `env` and
`cache`.

Contract: results on stdout, progress and warnings on stderr, all printable (see `terminal.printing`); `--json` prints one object
and nothing else. Exit codes: 0 done;
1 stdout cannot be written;
2 a mistake in the call or the input, or a full disk, in one message; 3 done, but rows have no score and `--strict` was given;
130, 143 and 129: stopped by SIGINT, SIGTERM or SIGHUP, with finished work kept where there is a folder for it.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sparsort.errors import SparsortError
from sparsort.recipes.cli.command import CheckedCommand, PrintableUsage
from sparsort.recipes.cli.commands.ablate import ablate
from sparsort.recipes.cli.commands.cache import cache, cache_lines
from sparsort.recipes.cli.commands.calibrate import calibrate
from sparsort.recipes.cli.commands.choose import EXAMPLE as CHOOSE_EXAMPLE
from sparsort.recipes.cli.commands.choose import choose
from sparsort.recipes.cli.commands.order import EXAMPLE as ORDER_EXAMPLE
from sparsort.recipes.cli.commands.order import order
from sparsort.recipes.cli.commands.plan import EXAMPLE as PLAN_EXAMPLE
from sparsort.recipes.cli.commands.plan import plan
from sparsort.recipes.cli.commands.report import report
from sparsort.recipes.cli.commands.score import EXAMPLE as SCORE_EXAMPLE
from sparsort.recipes.cli.commands.score import score
from sparsort.recipes.cli.commands.train import EXAMPLE as TRAIN_EXAMPLE
from sparsort.recipes.cli.commands.train import train
from sparsort.recipes.cli.options import JsonOption
from sparsort.terminal.interrupts import exit_code
from sparsort.terminal.printing import discard, note, printable_messages, show, show_json
from sparsort.terminal.tables import Table, prose, text


class _Commands(PrintableUsage, TyperGroup):
    """Turns an interrupt, and every error that a user can fix, into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with printable_messages():
                return super().invoke(ctx)
        except SparsortError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as stop:
            _fail("interrupted. Run the same command again.", exit_code(stop))
        except BrokenPipeError:
            # The reader of our output went away (`| head`); nothing is left to say to it.
            discard(sys.stdout)
            sys.exit(0)


app = typer.Typer(
    name="sparsort",
    cls=_Commands,
    help="Rank examples by how sparsely a language model represents them, and order prompts and data by that rank.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import sparsort

        show(f"sparsort {sparsort.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rank examples by how sparsely a language model represents them, and order prompts and data by that rank."""


app.command(cls=CheckedCommand, epilog=SCORE_EXAMPLE)(score)
app.command(cls=CheckedCommand, epilog=ORDER_EXAMPLE)(order)
app.command(cls=CheckedCommand, epilog=CHOOSE_EXAMPLE)(choose)
app.command(
    cls=CheckedCommand,
    epilog=r"Example: `sparsort ablate reviews.jsonl -p 'Review: {text}\nSentiment:' --label label -k 4 --out my-ablation`",
)(ablate)
app.command(cls=CheckedCommand, epilog="Example: `sparsort report my-ablation --figures figures`")(report)
app.command(cls=CheckedCommand, epilog=PLAN_EXAMPLE)(plan)
app.command(cls=CheckedCommand, epilog=TRAIN_EXAMPLE)(train)
app.command(
    cls=CheckedCommand,
    epilog=r"Example: `sparsort calibrate data.jsonl -p 'Question: {question}\nAnswer:' -a ' {answer}' --out calibration.json`",
)(calibrate)


@app.command(cls=CheckedCommand, epilog="Example: `sparsort env --json`")
def env(as_json: JsonOption = False) -> None:
    """Show versions, the chosen implementations with their reasons, and the embedded model's folder."""
    from sparsort.recipes.environment import describe_environment

    found = describe_environment()
    if as_json:
        show_json(found)
        return
    table = Table(text(""), prose("value"), prose("why"))
    table.add_row("sparsort", found["version"], "")
    for name, choice in found["choices"].items():
        table.add_row(name, choice["value"], choice["reason"])
    for name, version in found["versions"].items():
        if name != "sparsort":
            table.add_row(name, version, "")
    table.add_row("threads", str(found["threads"]), "")
    table.show()
    # Not in the table, which would break a path over several lines.
    show(f"cache       {found['cache']}\n            set SPARSORT_CACHE to move it")
    for line in cache_lines(found["cache_holds"]):
        show(f"            {line}")
    show(f"demo_model  {found['demo_model'] or 'none'}\n            {found['demo_model_note']}")


app.command(cls=CheckedCommand, epilog="Example: `sparsort cache --clear`")(cache)


def _fail(message: str, code: int) -> NoReturn:
    note(f"sparsort: {message}")
    sys.exit(code)
