"""The command `sparsort ablate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsort.curriculum.ablation.recipe.options import DesignOptions
from sparsort.options import option, unescape
from sparsort.recipes.cli.options import FewShotPrompt, Fields, JsonOption, generated, report_to_option
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import DataSpec
from sparsort.terminal.printing import note, show, show_json
from sparsort.terminal.tables import Table, number, prose, text

if TYPE_CHECKING:
    from sparsort.curriculum.ablation.run.cost import Cost
    from sparsort.recipes.ablate import AblationReport

EXAMPLE = (
    r"Example: `sparsort ablate reviews.jsonl -p 'Review: {text}\nSentiment:' --label label -k 4 --out my-ablation`"
)
_TASK = "Task"


def _unescape_all(texts: list[str] | None) -> tuple[str, ...] | None:
    return tuple(str(unescape(text)) for text in texts) if texts else None


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """The options of `sparsort ablate` that make a task of a data file; see `recipes.ablate.find_source`."""

    label: str | None = option(
        None,
        "Column of the label or answer [default: label]. Without --answer, it follows the prompt after a space.",
        panel=_TASK,
    )
    labels: str | None = option(
        None, "Values and words of the labels, as in 0=negative,1=positive [default: as in the data].", panel=_TASK
    )
    judge: str | None = option(
        None,
        "How an answer is judged: {names} [default: labels].",
        names="curriculum.ablation.recipe.tasks:Judge",
        panel=_TASK,
    )
    stop: tuple[str, ...] | None = option(
        None,
        r"Text that ends a written answer; may be given several times [default: \n; for number and math the next question].",
        panel=_TASK,
        kind=list[str] | None,
        read=_unescape_all,
    )
    max_new_tokens: int | None = option(
        None, "The most tokens of a written answer [default: 32; number 256, math 512].", panel=_TASK
    )
    test: Path | None = option(None, "Test rows [default: half of the data file].", panel=_TASK)
    data: Path | None = option(None, "Folder of the data files of ready tasks.", panel=_TASK)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The options of `sparsort ablate` that say what is run, and where the results go."""

    out: Path = option(
        Path("ablation"),
        "Folder of the store, the results and the report; run the same command again to resume.",
        short="-o",
    )
    compile: bool = option(False, "Compile the model first: faster from some million tokens on; needs a C++ compiler.")
    dry_run: bool = option(False, "Only estimate the cost.")
    no_run: bool = option(False, "Do not query the model; use the outcomes in the store, finished or not.")
    no_report: bool = option(False, "Do not write the HTML report.")
    report_to: str = report_to_option()


@generated
def ablate(
    source: Annotated[
        str,
        typer.Argument(
            help="A data file (with --prompt), a recipe or task file (.toml), or ready tasks, comma-separated (with --data)."
        ),
    ],
    prompt: FewShotPrompt,
    rows: DataSpec,
    task: TaskFlags,
    # Options of the design and the model that were not given are those of a recipe.
    design: Annotated[dict[str, Any], Fields(of=DesignOptions, given=True)],
    model: Annotated[dict[str, Any], Fields(of=ModelSpec, given=True)],
    flags: RunFlags,
    as_json: JsonOption = False,
) -> None:
    """Find out whether the order of demonstrations matters: orderers are compared with random orders of the same sets."""
    from sparsort.recipes import ablate as recipes

    fields = recipes.find_source(
        source,
        **vars(task),
        **vars(rows),
        prompt=prompt.template,  # type: ignore[arg-type]
        answer=prompt.answer,
        chat=prompt.chat or None,
        system=prompt.system,
    )
    changes = design | {"model" if name == "name" else name: value for name, value in model.items()}
    ablation = recipes.make_recipe(fields, changes)
    if flags.dry_run:
        _show_cost(*recipes.estimate_cost(ablation), as_json)
        return
    report = recipes.ablate(
        ablation,
        out=flags.out,
        run=not flags.no_run,
        report=not flags.no_report,
        compile=flags.compile,
        report_to=flags.report_to,
    )
    if as_json:
        show_json(report.summary())
    else:
        _show_results(report)


def _show_cost(cost: Cost, notes: list[str], as_json: bool) -> None:
    if as_json:
        show_json(cost.to_dict() | {"notes": notes})
        return
    names = ("k", "sets", "pairs", "tokens", "longest prompt")
    table = Table(text("task"), text("selector"), *map(number, names))
    for row in cost.rows:
        cells = (row.k, row.sets, row.pairs, row.tokens, row.longest_prompt)
        table.add_row(row.task, row.selector, *(f"{cell:,}" for cell in cells))
    table.show()
    show(f"{cost.pairs:,} pairs of prefix and query, at most {cost.tokens:,} tokens; as full prompts they would be")
    show(f"{cost.plain_tokens:,} tokens. Outcomes that are already in the store are not computed again.")
    for sentence in notes:
        note(sentence)


def _show_results(report: AblationReport) -> None:
    summary = report.summary()
    for warning in summary["warnings"]:
        show(f"Warning: {warning['text']}")
    # With contextual calibration both off and on, only the results without it are printed; the report has both.
    plain = {(cell["task"], cell["selector"], cell["k"]) for cell in summary["cells"] if not cell["calibrated"]}
    for cell in summary["cells"]:
        if not cell["calibrated"] or (cell["task"], cell["selector"], cell["k"]) not in plain:
            _show_cell(cell)
    plain_findings = {(one["task"], one["selector"]) for one in summary["findings"] if not one["calibrated"]}
    findings = [
        one
        for one in summary["findings"]
        if not one["calibrated"] or (one["task"], one["selector"]) not in plain_findings
    ]
    for finding in findings:
        if len(findings) > 1:
            show(f"{finding['title']}:")
        for sentence in finding["sentences"]:
            show(sentence)
    for missing in dict.fromkeys(report.results.provenance["incomplete"]):
        note(f"Not in the results: {missing}.")
    rate = f", {report.tokens_read:,} tokens read in {report.seconds:.0f} s" if report.tokens_read else ""
    show(f"Results: {report.out}{rate}.")
    if report.report:
        show(f"Report: {report.report}")


def _show_cell(cell: dict[str, Any]) -> None:
    random = cell["random"]
    accuracies = [value for of_set in random["accuracy_by_set"] for value in of_set]
    title = (
        f"{cell['task']}, k = {cell['k']}: random orders of {cell['sets']} sets {random['accuracy']:.3f} on average, "
        f"{min(accuracies):.3f} to {max(accuracies):.3f}"
    )
    names = ("accuracy", "Δ random", "95 % interval", "p (Holm)", "tokens")
    table = Table(prose("order"), *map(number, names), title=title)
    for arm in sorted(cell["arms"], key=lambda arm: -arm["accuracy"]):
        difference = arm["difference"]
        has_interval = difference["low"] is not None
        table.add_row(
            arm["name"].replace("_", " "),
            f"{arm['accuracy']:.3f}",
            f"{100 * difference['value']:+.1f}",
            f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]" if has_interval else "none",
            "none" if difference["p_adjusted"] is None else f"{difference['p_adjusted']:.3f}",
            f"{arm['tokens_per_answer']:.0f}",
        )
    table.show()
