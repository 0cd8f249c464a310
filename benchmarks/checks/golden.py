"""Compare what two versions of sparsort compute on this machine, value by value, through the command line.

    python benchmarks/checks/golden.py --against COMMIT          # run COMMIT and this tree here, and print what differs
    python benchmarks/checks/golden.py --record golden.json      # run this tree only, and keep its values

Every case in `golden_cases.py` is a command as a user types it, so the comparison survives any change of internal
names. A case's record holds its exit code, the JSON it prints, and the values of every file it writes: arrays and
table columns as digests, JSON files leaf by leaf. Times, paths and versions are removed. Differences in sentences
are listed separately from differences in values, because a change of wording changes no result.

Values are compared for equality, bit for bit, and both versions run on one machine: floating-point results differ
between processors, so a record from another machine proves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from golden_cases import CASES, Case, prepare

ROOT = Path(__file__).resolve().parents[2]
# Names of JSON fields that hold times, memory, paths or versions; they differ between two runs of the same version.
_VOLATILE = re.compile(
    r"(^|_)(seconds?|s|ms|time|times|date|created|started|finished|wall|cpu|memory|machine|host|pid|path|paths|folder|"
    r"file|files|version|versions|packages|threads|commit|command|elapsed|speed|per_second|rate|seal|digest|bytes)$"
)
# Options with their older names: a version that does not know the one is called with the other.
_OLDER_NAMES = {"--max-queries": "--queries", "--criterion": "--by"}
Record = dict[str, str]


def main() -> None:
    """Record this tree, or compare it with a commit; exit with 1 when a value differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="commit to compare with; it is run in a git worktree")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the record of this tree")
    parser.add_argument("--only", metavar="TEXT", help="run only the cases whose name contains TEXT")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(*arguments.worker, only=arguments.only)
        return
    if not arguments.against and not arguments.record:
        parser.error("give --against COMMIT, --record FILE, or both")
    with tempfile.TemporaryDirectory(prefix="sparsort-golden-") as folder:
        inputs = Path(folder, "inputs")
        prepare(inputs, ROOT / "examples")
        new = _run_tree(ROOT, inputs, Path(folder, "new"), arguments.only)
        if arguments.record:
            arguments.record.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
        if not arguments.against:
            print(f"{len(new)} cases, {sum(map(len, new.values()))} values")
            return
        with _worktree(arguments.against, Path(folder, "tree")) as tree:
            old = _run_tree(tree, inputs, Path(folder, "old"), arguments.only)
    sys.exit(_report(old, new, as_json=arguments.json))


@contextlib.contextmanager
def _worktree(commit: str, folder: Path) -> Iterator[Path]:
    # A worktree leaves the files of this tree, and its uncommitted changes, alone.
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", folder, commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def _run_tree(tree: Path, inputs: Path, work: Path, only: str | None) -> dict[str, Record]:
    """Run every case with the code in `tree`, in one process, and return the records by case name."""
    work.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree / 'src'}:{Path(__file__).parent}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # With a shared cache one version would read the values of the other, and would be compared with itself.
        "SPARSORT_CACHE_ROWS_GB": "0",
        "COLUMNS": "120",
    }
    command = [sys.executable, "-P", __file__, "--worker", inputs, work, *(["--only", only] if only else [])]
    subprocess.run(command, env=environment, check=True)
    records: dict[str, Record] = json.loads((work / "records.json").read_text())
    return records


def _work(inputs: Path, work: Path, *, only: str | None) -> None:
    """Run the cases in this process, so that torch is imported once."""
    records = {}
    for case in CASES:
        if only and only not in case.name and case.name not in _needed(only):
            continue
        print(f"golden: {case.name}", file=sys.stderr, flush=True)
        records[case.name] = _run(case, inputs, work)
    (work / "records.json").write_text(json.dumps(records))


def _needed(only: str) -> set[str]:
    """The cases whose output folders the selected ones read."""
    names = {case.name for case in CASES}
    arguments = " ".join(part for case in CASES if only in case.name for part in case.arguments)
    return {name for name in names if f"{{work}}/{name}" in arguments}


def _run(case: Case, inputs: Path, work: Path) -> Record:
    places = {"inputs": str(inputs), "work": str(work), "out": str(work / case.name)}
    arguments = [re.sub(r"\{(inputs|work|out)\}", lambda match: places[match[1]], part) for part in case.arguments]
    code, text, errors = _call(arguments)
    while (unknown := re.search(r"No such option: (--[a-z-]+)", errors)) and unknown[1] in _OLDER_NAMES:
        arguments = [_OLDER_NAMES[unknown[1]] if part == unknown[1] else part for part in arguments]
        code, text, errors = _call(arguments)
    record = {"exit": repr(code or 0)}
    if code:
        record["stderr"] = errors
    hide = {str(work): "<work>", str(inputs): "<inputs>"}
    try:
        _flatten("stdout", json.loads(text), record, hide)
    except ValueError:
        record["stdout"] = _hidden(text, hide)
    out = Path(places["out"])
    for path in [out] if out.is_file() else sorted(out.rglob("*")):
        if path.is_file():
            # The blocks of an ablation's store carry the random name of the process that wrote them, and a digest of their bytes.
            name = re.sub(r"-[0-9a-f]{8}-[0-9a-f]{16}\.", "-<run>.", str(path.relative_to(work)))
            _read_file(path, name, record, hide)
    return record


def _call(arguments: list[str]) -> tuple[object, str, str]:
    """The exit code, the output and the messages of `python -m sparsort`, in this process, in which torch is imported already."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    argv, sys.argv = sys.argv, ["sparsort", *arguments]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_module("sparsort", run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return code, stdout.getvalue(), stderr.getvalue()


def _read_file(path: Path, name: str, record: Record, hide: Mapping[str, str]) -> None:
    """Add the values in a file to `record`. Pages and figures hold only wording and drawing, and are skipped."""
    match path.suffix:
        case ".json":
            _flatten(name, json.loads(path.read_text()), record, hide)
        case ".jsonl" | ".txt" | ".toml":
            record[name] = _hidden(path.read_text(), hide)
        case ".npy":
            import numpy as np

            array = np.load(path, allow_pickle=False)
            record[name] = f"{array.dtype} {array.shape} {_digest(np.ascontiguousarray(array).tobytes())}"
        case ".parquet":
            import pyarrow.parquet as parquet

            for column in (table := parquet.read_table(path)).column_names:
                values = table[column].to_pylist()
                # `repr` of a float is exact, so equal digests mean equal values.
                record[f"{name}:{column}"] = _digest(repr(values).encode())
        case ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  not a dict: it cannot be iterated
                    tensor = tensors.get_tensor(key)
                    record[f"{name}:{key}"] = f"{tensor.dtype} {tuple(tensor.shape)} {_digest(_bytes(tensor))}"


def _bytes(tensor: Any) -> bytes:
    import torch

    raw: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:24]


def _flatten(name: str, value: Any, record: Record, hide: Mapping[str, str]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            # The whole subtree of a volatile key is skipped.
            if not _VOLATILE.search(str(key)):
                _flatten(f"{name}.{key}", item, record, hide)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, item in enumerate(value):
            _flatten(f"{name}[{number}]", item, record, hide)
    else:
        record[name] = _hidden(json.dumps(value, ensure_ascii=False), hide)


def _hidden(text: str, hide: Mapping[str, str]) -> str:
    for place, name in hide.items():
        text = text.replace(place, name)
    return text


def _report(old: Mapping[str, Record], new: Mapping[str, Record], *, as_json: bool) -> int:
    """Print the differences; 1 when a value differs, 0 when at most the wording does."""
    values, wording = [], []
    for case in sorted({*old, *new}):
        before, after = old.get(case, {}), new.get(case, {})
        for name in sorted({*before, *after}):
            one, two = before.get(name, "<absent>"), after.get(name, "<absent>")
            if one != two:
                # Three or more spaces in a JSON string, or in the first string of a list, make it a
                # sentence.
                is_sentence = all(text.startswith(('"', '["')) and text.count(" ") >= 3 for text in (one, two))
                where = f"{case} {name}"
                (wording if is_sentence or name == "stderr" else values).append((where, one, two))
    compared = sum(map(len, old.values()))
    if as_json:
        print(json.dumps({"cases": len(old), "compared": compared, "values": values, "wording": wording}, indent=1))
    else:
        for title, rows in (("differs", values), ("differs in wording", wording)):
            for where, one, two in rows:
                print(f"{where} {title}:\n  old {one[:300]}\n  new {two[:300]}")
        print(f"{len(old)} cases, {compared} values: {len(values)} differ, {len(wording)} differ in wording only")
    return 1 if values else 0


if __name__ == "__main__":
    main()
