"""The command `sparsort classify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsort.errors import SparsortError
from sparsort.recipes.classify.spec import ClassifySpec
from sparsort.recipes.cli.options import FewShotPrompt, JsonOption, generated
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import DataSpec
from sparsort.terminal.printing import note, one_line, show, show_json
from sparsort.terminal.tables import Table, number, prose, text

if TYPE_CHECKING:
    from sparsort.recipes.classify.classify import Classified

EXAMPLE = r"Example: `sparsort classify examples/reviews.jsonl -p 'Review: {text}\nSentiment:' -k 4 --out sentiment`"
_ERRORS_SHOWN = 5
_MOST_OF_TEXT, _MOST_OF_NAME = 60, 30


@generated
def classify(
    file: Annotated[Path, typer.Argument(help="Labelled rows, from which the demonstrations are drawn.")],
    prompt: FewShotPrompt,
    data: DataSpec,
    options: ClassifySpec,
    model: ModelSpec,
    test: Annotated[
        Path | None,
        typer.Option(help="Rows to classify, with or without labels [default: a fifth of FILE, at most 256 rows]."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for predictions.jsonl and results.json.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Classify rows with a few demonstrations in a prompt: label probabilities of the model, calibrated."""
    from sparsort.recipes.classify.classify import classify as classify_rows

    if out is not None and out.expanduser().is_file():
        raise SparsortError(f"{out} is a file; the results are a folder. Choose another name with --out.")
    result = classify_rows(file, test, model=model, prompt=prompt, settings=options, data=data)
    if out is not None:
        result.save(out)
    if as_json:
        show_json(result.to_json() | {"out": None if out is None else str(out)})
        return
    _show(result)
    if out is not None:
        show(f"Predictions and results: {out}")


def _show(result: Classified) -> None:
    measures = result.measures()
    if measures:
        low, high = measures["accuracy_interval"]
        show(
            f"accuracy {_percent(measures['accuracy'])} [{_percent(low)}, {_percent(high)}], balanced accuracy "
            f"{_percent(measures['balanced_accuracy'])}, log loss {measures['log_loss']:.3f}, Brier score "
            f"{measures['brier']:.3f}, on {measures['rows']} rows; always predicting the most frequent class gives "
            f"{_percent(measures['majority'])}"
        )
        _show_classes(result)
        _show_errors(result)
    else:
        _show_predicted(result)
    show("What each ingredient gained on rows of FILE outside the prompt:")
    show(result.gains_table)
    seconds = result.seconds
    show(f"{result.tokens:,} tokens read; fit {seconds['fit']:.1f} s, predict {seconds['predict']:.1f} s")
    for sentence in result.notes:
        note(sentence)


def _show_classes(result: Classified) -> None:
    table = Table(
        text("class"),
        number("rows"),
        number("predicted"),
        number("precision"),
        number("recall"),
        text("often taken for"),
    )
    for row in result.by_class():
        numbers = (str(row["rows"]), str(row["predicted"]), _percent(row["precision"]), _percent(row["recall"]))
        table.add_row(one_line(row["class"], _MOST_OF_NAME), *numbers, one_line(row["taken_for"] or "–", _MOST_OF_NAME))
    table.show()


def _show_errors(result: Classified) -> None:
    errors = result.worst_errors(_ERRORS_SHOWN)
    if not errors:
        return
    table = Table(text("id"), number("p"), text("right"), text("predicted"), prose("text"), title="Surest errors")
    for row in errors:
        names = (one_line(row["gold"], _MOST_OF_NAME), one_line(row["predicted"], _MOST_OF_NAME))
        table.add_row(row["id"], f"{row['probability']:.2f}", *names, one_line(row["text"], _MOST_OF_TEXT))
    table.show()


def _show_predicted(result: Classified) -> None:
    table = Table(text("class"), number("rows predicted"))
    for place, name in enumerate(result.classes):
        table.add_row(one_line(name, _MOST_OF_NAME), str(int((result.predicted == place).sum())))
    table.show()


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
