"""The tables of the documentation equal the tables of entries in the source."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from sparsort.errors import SparsortError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_tables", ROOT / "docs" / "generate_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_page_is_out_of_date(script: ModuleType) -> None:
    stale = [
        str(path.relative_to(ROOT)) for path in script.pages() if script.fill(path.read_text()) != path.read_text()
    ]
    assert not stale, "run make tables"


def test_every_table_is_on_a_page(script: ModuleType) -> None:
    text = "".join(path.read_text() for path in script.pages())
    assert [name for name in script.TABLES if f"<!-- table: {name} -->" not in text] == []
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_a_table_has_a_row_for_each_entry(script: ModuleType) -> None:
    for name, (registry, columns) in script.TABLES.items():
        head, rule, *rows = script.markdown(name).splitlines()
        assert [cell.strip() for cell in head.strip("|").split("|")] == list(columns)
        assert rule == "| " + " | ".join(["---"] * len(columns)) + " |"
        assert [row.split("`")[1] for row in rows] == list(registry)
        assert {row.replace("\\|", "").count("|") for row in rows} == {len(columns) + 1}


def test_a_table_is_replaced_and_the_text_around_it_stays(script: ModuleType) -> None:
    page = "before\n\n<!-- table: metrics -->\n| an old row |\n<!-- end -->\n\nafter\n"
    filled = script.fill(page)
    assert filled.startswith("before\n\n<!-- table: metrics -->\n\n| name |")
    assert filled.endswith("|\n\n<!-- end -->\n\nafter\n")
    assert "old row" not in filled
    assert script.fill(filled) == filled
    with pytest.raises(SparsortError, match=r"unknown table 'metricks'\. Did you mean 'metrics'"):
        script.fill(page.replace("metrics", "metricks"))
