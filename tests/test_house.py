"""The floors of the house: what may import what, what is never used, and how the package is put together.

The package's real folders are at the top level, and one of them shares its name with Hugging Face's distribution
`kernels`, which transformers imports while loading a model: several tests hold that neither gets in the other's way.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import house
import house_words
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = house.FOLDERS
BELOW = {
    "kernels": {"kernels"},
    "attention": {"attention", "kernels"},
    "scoring": {"scoring", "kernels"},
    "curriculum": {"curriculum", "scoring", "kernels"},
    "recipes": set(FOLDERS),
}
KERNELS_MAY_USE = {"numpy", "torch", "triton", "sparsort"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MACHINE = re.compile(r"/(?:work|opt|root|home|Users)/|index-url|find-links|trusted-host|pythonhosted", re.IGNORECASE)


def _files() -> list[Path]:
    return [ROOT / path for path in house.files()]


def _sources(*folders: str) -> list[Path]:
    return [ROOT / path for path in house.sources(*folders)]


def _run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def _where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


# What may import what


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_folders_below_it(folder: str) -> None:
    wrong = []
    for path in _sources(folder):
        for module, node in house.imports(ast.parse(path.read_text(encoding="utf-8"))):
            parts = module.split(".")
            if parts[0] in FOLDERS or module.startswith("."):
                wrong.append(f"{_where(path, node)} imports {module}: write sparsort.…")
            elif parts[0] == "sparsort" and len(parts) > 1 and parts[1] in FOLDERS and parts[1] not in BELOW[folder]:
                wrong.append(f"{_where(path, node)} imports {module}")
    assert wrong == []


def test_no_module_imports_one_that_imports_it() -> None:
    assert [str(hit) for hit in house.import_cycles()] == []


def test_a_cycle_of_imports_is_found_with_all_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [house.module_of(path) for path in house.sources("kernels")[:5]]
    a, b, c, d, e = modules
    graph = {a: {b}, b: {c}, c: {a, d}, d: {e}, e: set()}
    monkeypatch.setattr(house, "import_graph", lambda: graph)
    (hit,) = house.import_cycles()
    assert hit.text.split(" ↔ ") == sorted([a, b, c])


def test_the_ground_imports_no_folder_but_for_type_checkers() -> None:
    wrong = []
    for path in _sources("src"):
        if path.name == "__main__.py":
            continue
        for module, node in house.imports(ast.parse(path.read_text(encoding="utf-8")), for_types=False):
            parts = module.split(".")
            if parts[0] in FOLDERS or (parts[0] == "sparsort" and len(parts) > 1 and parts[1] in FOLDERS):
                wrong.append(f"{_where(path, node)} imports {module}")
    assert wrong == []


def test_kernels_need_torch_and_triton_only() -> None:
    wrong = [
        f"{_where(path, node)} imports {module}"
        for path in _sources("kernels")
        for module, node in house.imports(ast.parse(path.read_text(encoding="utf-8")))
        if module.split(".")[0] not in KERNELS_MAY_USE | sys.stdlib_module_names
    ]
    assert wrong == []


def test_choosing_and_ordering_demonstrations_imports_no_torch() -> None:
    modules = [
        ".".join(("sparsort", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in _sources("curriculum")
        if "demos" in path.parts
    ]
    assert "sparsort.curriculum.demos.order" in modules
    script = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n" + _NO_TORCH
    _run("-c", script)


_NO_TORCH = "heavy = {'torch', 'transformers', 'datasets', 'triton'} & set(sys.modules)\nassert not heavy, heavy\n"


@pytest.mark.parametrize(
    "start",
    [
        "import sparsort; dir(sparsort)",
        "from sparsort.__main__ import main\n"
        "sys.argv = ['sparsort', '--help']\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code",
    ],
    ids=["import sparsort", "sparsort --help"],
)
def test_starting_imports_no_torch(start: str) -> None:
    _run("-c", f"import sys\n{start}\n{_NO_TORCH}")


# What is never used


def test_nothing_runs_code_out_of_data() -> None:
    wrong = []
    for path in _sources(*FOLDERS, "src", "examples", "benchmarks"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [
            f"{_where(path, node)} imports {name}"
            for name, node in house.imports(tree)
            if name.split(".")[0] in PICKLES
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "torch.load", "builtins.eval", "builtins.exec"}:
                wrong.append(f"{_where(path, node)} calls {called}")
            wrong += [
                f"{_where(path, node)} passes {keyword.arg}=True"
                for keyword in node.keywords
                if keyword.arg in {"trust_remote_code", "allow_pickle", "shell"}
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
            ]
    assert wrong == []


def test_no_file_is_longer_than_500_lines() -> None:
    assert [str(hit) for hit in house.long_files()] == []


def test_the_word_list_finds_words_across_lines_and_not_in_idioms() -> None:
    text = "It goes\n    # on, as it stands in for the rest; behind it lies nothing."
    found = sorted(text[begin:].split()[0] for _, begin in house_words.find("scoring/a.py", text))
    assert found == ["behind", "goes", "lies"]


@pytest.mark.slow
def test_the_table_of_the_house_is_printed_with_every_row() -> None:
    table = json.loads(_run(str(ROOT / "tests/support/house.py"), "--json").stdout)
    assert list(table) == [
        *("entries", "lines", "comments", "classes", "cycles", "importers", "words", "functions", "files", "symbols"),
    ]
    assert all(row["holds"] for row in table.values() if row["what"].startswith(("groups of", "files over")))
    listed = _run(str(ROOT / "tests/support/house.py"), "--list", "functions").stdout.splitlines()
    assert len(listed) == table["functions"]["value"]
    assert all(re.fullmatch(r"[\w/]+\.py:\d+: \w+ has \d+ lines", line) for line in listed)


@pytest.mark.slow
def test_every_exception_of_the_word_list_is_needed() -> None:
    assert {reason for _, _, reason in house_words.RIGHT} == house.reasons_used()


def test_no_file_names_a_machine() -> None:
    wrong = []
    for path in _files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if found := MACHINE.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {found.group()}")
    assert wrong == []


# The public names


def test_every_public_name_is_there_and_says_what_it_does() -> None:
    import sparsort

    silent = [name for name in sparsort.__all__ if name != "__version__" and not getattr(sparsort, name).__doc__]
    assert silent == []
    assert set(sparsort.__all__) <= set(dir(sparsort))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import sparsort

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sparsort.no_such_name


# How the package is put together


def test_kernels_and_tests_are_no_packages() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_import_root_links_to_the_real_folders(folder: str) -> None:
    link = ROOT / "src" / "sparsort" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{folder}"


def test_importing_transformers_at_the_root_does_not_import_our_folder() -> None:
    _run("-c", "import sys, transformers\nassert 'kernels' not in sys.modules, sys.modules['kernels']")


_LOAD_A_MODEL = """
import sys
import transformers.integrations.hub_kernels
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
LlamaForCausalLM(LlamaConfig(**size))
import sparsort.kernels.backend
assert not is_kernels_available()
"""


@pytest.mark.slow
def test_loading_a_model_at_the_root_takes_our_folder_for_absent() -> None:
    # With the root itself on the path, as `python -c` has it, transformers imports the bare folder to find its version.
    # No code of ours runs: it is a namespace without contents, which transformers knows and leaves alone.
    names = "(vars(sys.modules['kernels']) if 'kernels' in sys.modules else ())"
    _run("-c", f"{_LOAD_A_MODEL}assert all(name[0] == '_' for name in {names})")


@pytest.mark.slow
def test_loading_a_model_under_pytest_does_not_import_our_folder(tmp_path: Path) -> None:
    body = "".join(f"    {line}\n" for line in (_LOAD_A_MODEL + "assert 'kernels' not in sys.modules").splitlines())
    (tmp_path / "test_it.py").write_text(f"def test_it():\n{body}")
    options = ("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
    _run("-P", "-m", "pytest", *options, str(tmp_path / "test_it.py"))


def test_an_installed_distribution_called_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.10.0'\n")
    (tmp_path / "kernels-0.10.0.dist-info").mkdir()
    (tmp_path / "kernels-0.10.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.10.0\n"
    )
    script = (
        "import kernels, sparsort.kernels.sparsity.metrics as ours\n"
        f"assert kernels.__file__.startswith({str(tmp_path)!r}), kernels.__file__\n"
        "assert ours.METRICS\n"
    )
    _run("-c", script, PYTHONPATH=str(tmp_path))


@pytest.mark.slow
def test_the_wheel_built_from_the_sdist_holds_and_imports_every_module(tmp_path: Path) -> None:
    _run("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(tmp_path / "site")
    expected = {f"sparsort/{path.relative_to(ROOT).as_posix()}" for path in _sources(*FOLDERS)}
    expected |= {path.relative_to(ROOT / "src").as_posix() for path in _sources("src")}
    assert held == expected
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in held if "__main__" not in name
    )
    script = (
        f"import importlib\nfor name in {modules}: importlib.import_module(name)\n"
        "import sparsort, sparsort.scoring, sparsort.kernels\n"
        f"assert sparsort.__file__.startswith({str(tmp_path)!r}), sparsort.__file__\n"
        f"assert all(path.startswith({str(tmp_path)!r}) for path in sparsort.kernels.__path__)\n"
    )
    _run("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_no_benchmark_test_or_document_names_an_environment_variable_that_the_source_lacks() -> None:
    def names(*paths: Path) -> set[str]:
        return {name for path in paths for name in re.findall(r"SPARSORT_[A-Z_]*[A-Z]", path.read_text())}

    source = names(*(path for folder in (*FOLDERS, "src/sparsort") for path in (ROOT / folder).rglob("*.py")))
    others = [path for folder in ("benchmarks", "tests", "docs") for path in (ROOT / folder).rglob("*.[pm][yd]")]
    assert names(*others, ROOT / "README.md") <= source


def test_the_version_is_written_once() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    current = importlib.import_module("sparsort").__version__
    assert importlib.metadata.version("sparsort") == current
    assert f"\nversion: {current}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
