"""The command `sparsort ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsort.curriculum.ablation.recipe.options import DesignOptions
from sparsort.options import unescape
from sparsort.recipes.cli.options import FewShotPrompt, Fields, JsonOption, generated
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import DataSpec
from sparsort.terminal.printing import note, show, show_json
from sparsort.terminal.tables import Table, number, prose, text

_TASK = "Task"


@generated
def ablate(
    source: Annotated[
        str,
        typer.Argument(
            help="A data file (with --prompt), a recipe or task file (.toml), or ready tasks, comma-separated (with --data)."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the store, the results and the report; run again to go on.")
    ] = Path("ablation"),
    *,
    prompt: FewShotPrompt,
    rows: DataSpec,
    label: Annotated[
        str | None,
        typer.Option(
            help="Column of the label or answer [default: label]. Without --answer, it follows the prompt after a space.",
            rich_help_panel=_TASK,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="0=negative,1=positive [default: as they stand in the data].", rich_help_panel=_TASK),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="labels, exact, number or math [default: labels].", rich_help_panel=_TASK),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Written answers end before it; may be given several times "
            r"[default: \n; for number and math the next question].",
            rich_help_panel=_TASK,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Written answers end after as many [default: 32; number 256, math 512].", rich_help_panel=_TASK
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Test rows [default: half of the data file].", rich_help_panel=_TASK)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the ready tasks' files.", rich_help_panel=_TASK)] = None,
    # Options of the design and the model that were not given are those of a recipe.
    design: Annotated[dict[str, Any], Fields(of=DesignOptions, given=True)],
    model: Annotated[dict[str, Any], Fields(of=ModelSpec, given=True)],
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the model first: faster from some million tokens on; needs a C++ compiler."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it will cost.")] = False,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Ask the model nothing: take the store as it is, finished or not.")
    ] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Leave out the HTML report.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find out whether the order of demonstrations matters: orderers against random orders of the same sets."""
    from sparsort.recipes import ablate as recipes

    fields = recipes.find_source(
        source,
        data=data,
        test=test,
        prompt=prompt.template,  # type: ignore[arg-type]
        answer=prompt.answer,
        label=label,
        labels=labels,
        judge=judge,
        stop=tuple(str(unescape(text)) for text in stop) if stop else None,
        max_new_tokens=max_new_tokens,
        chat=prompt.chat or None,
        system=prompt.system,
        id_column=rows.id_column,
        columns=rows.columns,
    )
    changes = design | {"model" if name == "name" else name: value for name, value in model.items()}
    ablation = recipes.make_recipe(fields, changes)
    if dry_run:
        cost, notes = recipes.estimate_cost(ablation)
        _show_cost(cost, notes, as_json)
        return
    done = recipes.ablate(ablation, out=out, run=not no_run, report=not no_report, compile=compile)
    if as_json:
        show_json(done.summary())
    else:
        _show_results(done)


def _show_cost(cost: Any, notes: list[str], as_json: bool) -> None:
    if as_json:
        show_json(cost.to_dict() | {"notes": notes})
        return
    names = ("k", "sets", "pairs", "tokens", "longest prompt")
    table = Table(text("task"), text("selector"), *map(number, names))
    for row in cost.rows:
        cells = (row.k, row.sets, row.pairs, row.tokens, row.longest_prompt)
        table.add_row(row.task, row.selector, *(f"{cell:,}" for cell in cells))
    table.show()
    show(f"{cost.pairs:,} pairs of prefix and query, {cost.tokens:,} tokens at most; as full prompts it would be")
    show(f"{cost.plain_tokens:,}. What the store holds already is not asked again.")
    for sentence in notes:
        note(sentence)


def _show_results(done: Any) -> None:
    summary = done.summary()
    for warning in summary["warnings"]:
        show(f"Warning: {warning['text']}")
    plain = {(cell["task"], cell["selector"], cell["k"]) for cell in summary["cells"] if not cell["calibrated"]}
    for cell in summary["cells"]:
        if cell["calibrated"] and (cell["task"], cell["selector"], cell["k"]) in plain:
            continue
        spread = cell["random"]
        lows = [value for of_set in spread["accuracy_by_set"] for value in of_set]
        title = (
            f"{cell['task']}, k = {cell['k']}: random orders of {cell['sets']} sets {spread['accuracy']:.3f} on average, "
            f"{min(lows):.3f} to {max(lows):.3f}"
        )
        names = ("accuracy", "Δ random", "95 % interval", "p (Holm)", "tokens")
        table = Table(prose("order"), *map(number, names), title=title)
        for arm in sorted(cell["arms"], key=lambda arm: -arm["accuracy"]):
            one = arm["difference"]
            known = one["low"] is not None
            table.add_row(
                arm["name"].replace("_", " "),
                f"{arm['accuracy']:.3f}",
                f"{100 * one['value']:+.1f}",
                f"[{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]" if known else "none",
                "none" if one["p_adjusted"] is None else f"{one['p_adjusted']:.3f}",
                f"{arm['tokens_per_answer']:.0f}",
            )
        table.show()
    said = {(finding["task"], finding["selector"]) for finding in summary["findings"] if not finding["calibrated"]}
    shown = [f for f in summary["findings"] if not f["calibrated"] or (f["task"], f["selector"]) not in said]
    for finding in shown:
        if len(shown) > 1:
            show(f"{finding['title']}:")
        for sentence in finding["sentences"]:
            show(sentence)
    # The notes on the data were logged before the run, so that mistakes are seen early.
    for left_out in dict.fromkeys(done.results.provenance["incomplete"]):
        note(f"Left out: {left_out}.")
    rate = f", {done.tokens_read:,} tokens read in {done.seconds:.0f} s" if done.tokens_read else ""
    show(f"Results: {done.out}{rate}.")
    if done.report:
        show(f"Report: {done.report}")
