"""Running a command of sparsort in the test's own process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from sparsort.recipes.cli.app import app


def run(*arguments: Any, code: int = 0) -> Any:
    """The result of `sparsort` with these arguments, which must end with `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result
