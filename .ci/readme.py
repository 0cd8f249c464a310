"""Run the blocks of README.md marked `bash` or `python`, in order. Skip those marked `… no-ci`, and stop at the first failure.

Every command and every Python block runs in its own process. It is forked from one that has imported torch, transformers and the
classes of the embedded model, because importing them takes 9 s of CPU time, more than most of the commands. Usage:
`python -P .ci/readme.py README.md`, in the folder that the commands may write to.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from forks import ForkServer

_SPARSORT = "import sys; from sparsort.__main__ import main; sys.argv[0] = 'sparsort'; main()"
_EMBEDDED_MODEL = ("transformers.models.gemma3.modeling_gemma3", "transformers.models.gemma.tokenization_gemma")


def jobs(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (text to show, code to run, arguments) for each command and each Python block of a README."""
    for language, body in re.findall(r"^```(bash|python)[ \t]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            yield body, body, []
            continue
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] != "sparsort":
                sys.exit(f"README.md runs {words[0]!r}, but only sparsort can run here. Mark the block `bash no-ci`.")
            if words:
                yield line, _SPARSORT, words[1:]


def main() -> None:
    with ForkServer(*_EMBEDDED_MODEL) as server, tempfile.TemporaryDirectory() as folder:
        for number, (shown, code, arguments) in enumerate(jobs(Path(sys.argv[1]).read_text(encoding="utf-8"))):
            print(f"+ {shown}", flush=True)  # noqa: T201
            log = Path(folder, str(number))
            [returned] = server.run(log, (code, arguments, {}))
            for stream in ("out", "err"):
                print(Path(f"{log}-0.{stream}").read_text(encoding="utf-8"), end="", flush=True)  # noqa: T201
            if returned:
                sys.exit(f"The command ended with exit code {returned}.")


if __name__ == "__main__":
    main()
