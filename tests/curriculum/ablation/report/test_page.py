"""The report on disk: its page against hostile data, its Markdown, its figures against faults that a reader would see."""

from __future__ import annotations

import html.parser
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_results import simulate

from sparsort.curriculum.ablation.report.figures import forest, panels, pareto, sheets
from sparsort.curriculum.ablation.report.figures.style import PALETTE, plain, styled
from sparsort.curriculum.ablation.report.numbers.shape import Difference, Report
from sparsort.curriculum.ablation.report.numbers.summary import summarise
from sparsort.curriculum.ablation.report.page.html import arm_rows, render
from sparsort.curriculum.ablation.report.page.markdown import escaped, fenced, markdown
from sparsort.curriculum.ablation.report.write import svg, themed_svg, write_report
from sparsort.curriculum.ablation.results.cells import Arm
from sparsort.curriculum.ablation.results.results import Results
from sparsort.errors import SparsortError

EVIL = '</script><script>window.bad=1</script><img src=x onerror="window.bad=2">&\'`|*_$x$'
ARMS = ["sparse_to_dense", "similarity_ascending", "pdo", "density", "oracle_best"]


@pytest.fixture(scope="module")
def hostile() -> Results:
    """Every text that data can bring holds markup."""
    (group,) = simulate(["cb"], shots=(2,), sets=8, orders=3, items=12, arms=ARMS, calibrated=(False,)).cells
    labels = [f"{label} {EVIL}" for label in group.labels]
    evil = replace(
        group,
        task=f"task {EVIL}",
        selector=f"../selector {EVIL}",
        labels=labels,
        items=[f"{item} {EVIL}" for item in group.items],
        gold=[labels[group.labels.index(answer)] for answer in group.gold],
        sets=[
            replace(one, demo_ids=[f"{name} {EVIL}" for name in one.demo_ids], prompt=f"````\n{EVIL}\n</pre>")
            for one in group.sets
        ],
        arms=[replace(arm, name=f"{arm.name} {EVIL}") for arm in group.arms],
        demo_texts={f"{name} {EVIL}": EVIL for one in group.sets for name in one.demo_ids},
        item_texts=[EVIL] * len(group.items),
    )
    return Results(cells=[evil, replace(evil, selector="b")], provenance={"model": EVIL, "other": {EVIL: EVIL}})


@pytest.fixture(scope="module")
def small() -> Report:
    """Enough for every section and sheet."""
    return summarise(simulate(["mr", "trec"], shots=(2,), sets=7, orders=3, items=16, arms=ARMS, seed=3))


@pytest.fixture(scope="module")
def written(small: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(small, folder)
    return folder


# The page


class Page(html.parser.HTMLParser):
    """What a browser would see: elements with their attributes, the text of scripts, and the rest of the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)


def page_of(report: Report) -> str:
    with styled(panels.SIZE):
        drawn = [(panel, themed_svg(panel.picture, f"f{number}")) for number, panel in enumerate(panels.panels(report))]
    return render(report, drawn)


def test_the_page_runs_nothing_that_comes_from_data(hostile: Results) -> None:
    report = summarise(hostile)
    page = Page(page_of(report))
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0]) == report
    assert "window.bad" not in page.scripts[1]
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"img", "iframe", "object", "embed", "link", "base"})
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
    shown = " ".join(page.text)
    assert '<img src=x onerror="window.bad=2">' in shown


def test_the_page_loads_nothing_from_outside(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"url\((?!#|\"?#)|@import|@font-face", text)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_references_resolve(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, attributes in page.elements:
        for name in ("href", "xlink:href", "clip-path"):
            if target := re.search(r"#([^)]+)", attributes.get(name) or ""):
                assert target.group(1) in ids, (tag, attributes)


def test_figures_in_the_page_follow_its_theme(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    styles = [attributes["style"] or "" for _, attributes in page.elements if "style" in attributes]
    fixed = {light for light, _ in PALETTE.values()}
    assert len(styles) > 1000
    assert {colour for style in styles for colour in re.findall("#[0-9a-f]{6}", style)} & fixed == set()
    used = {name for style in styles for name in re.findall(r"var\(--([a-z0-9]+)\)", style)}
    assert used <= set(PALETTE)
    assert {"ink", "paper", "muted", "named", "chosen", "label0"} <= used


def test_every_section_and_arm_is_on_the_page(small: Report, written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"found", "forest", "spread", "cost", "calibration", "labels", "numbers", "prompts", "method", "data"} <= ids
    figures = [attributes for tag, attributes in page.elements if tag == "figure"]
    forests, costs = 2 + 4, 2 + 4
    assert len(figures) == forests + 4 + costs + 2 + 4
    arms = {attributes.get("data-arm") for _, attributes in page.elements}
    assert {arm["name"] for cell in small["cells"] for arm in cell["arms"]} <= arms
    table = [attributes for tag, attributes in page.elements if tag == "tr" and "data-arm" in attributes]
    assert len(table) == sum(1 + len(cell["arms"]) for cell in small["cells"]) == len(arm_rows(small))


# Markdown


def test_markdown_keeps_its_shape_under_hostile_data(hostile: Results) -> None:
    report = summarise(hostile)
    text = markdown(report, [("forest", f"caption {EVIL}")])
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside
    assert "window.bad" in outside
    for block in re.findall(r"(?:^\|.*\|\n)+", outside, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert fenced("a\n`````\nb").startswith("``````text\n")


@given(st.text(max_size=40))
def test_escaped_text_has_no_live_markup(text: str) -> None:
    found = escaped(text)
    assert "\n" not in found
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_|\[\]]", found)
    assert "<" not in found


# The figures


def test_the_written_files(written: Path) -> None:
    names = {"forest", "spread", "cost", "labels", "pooled"}
    names |= {f"{name}-calibrated" for name in names} | {"calibration"}
    assert {path.name for path in (written / "figures").iterdir()} == {
        f"{n}.{e}" for n in names for e in ("svg", "png")
    }
    assert json.loads((written / "report.json").read_text(encoding="utf-8"))["format"] == "sparsort report 1"
    text = (written / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(linked) == len(names)
    assert all((written / name).is_file() for name in linked)


def test_figures_for_a_paper_go_where_they_are_wanted(tmp_path: Path) -> None:
    results = simulate(["mr"], shots=(2,), sets=3, orders=2, items=8, arms=["pdo"], calibrated=(False,))
    write_report(summarise(results), tmp_path, figures=tmp_path / "paper")
    wanted = {f"{name}.{kind}" for name in ("forest", "spread", "cost", "labels") for kind in ("pdf", "png")}
    assert {path.name for path in (tmp_path / "paper").iterdir()} == wanted
    assert (tmp_path / "paper" / "forest.pdf").read_bytes().startswith(b"%PDF")


def test_equal_numbers_give_equal_figures(small: Report, written: Path) -> None:
    with styled(sheets.SIZE):
        for picture in sheets.sheets(small):
            if picture.name in ("forest", "cost"):
                assert svg(picture) == (written / "figures" / f"{picture.name}.svg").read_text(encoding="utf-8")


def drawn_texts(figure: Any) -> list[tuple[str, Any]]:
    """Every text that is drawn, with its box; ticks beyond an axis' end are not."""
    from matplotlib.text import Text

    with styled():
        figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
    renderer = figure.canvas.get_renderer()
    texts = [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in hidden
    ]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


def test_no_text_leaves_its_figure_and_no_name_covers_another(small: Report, hostile: Results) -> None:
    every = []
    for one in (small, summarise(hostile)):
        with styled(panels.SIZE):
            every += [panel.picture for panel in panels.panels(one)]
        with styled(sheets.SIZE):
            every += list(sheets.sheets(one))
    assert len(every) > 40
    for picture in every:
        frame = picture.figure.bbox.padded(2)
        boxes = drawn_texts(picture.figure)
        assert boxes
        for text, box in boxes:
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            assert inside, (picture.name, text, box)
        for place, (text, box) in enumerate(boxes):
            covered = [
                other for other, its in boxes[place + 1 :] if box.shrunk(0.7, 0.7).overlaps(its.shrunk(0.7, 0.7))
            ]
            assert not covered, (picture.name, text, covered)


def test_marks_have_tooltips(written: Path) -> None:
    root = ET.parse(written / "figures" / "forest.svg").getroot()
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    for name in ("sparse_to_dense", "similarity_ascending", "pdo", "density"):
        assert any(title.startswith(f"{name}: ") and "after Holm" in title for title in titles)
    assert not any("oracle" in title for title in titles)


def point(name: str, cost: float, value: float) -> pareto.Point:
    difference = Difference(
        value=value,
        low=None,
        high=None,
        adjusted_low=None,
        adjusted_high=None,
        p=None,
        p_adjusted=None,
        verdict=None,
        smallest_visible=None,
        sets_needed=None,
        items_needed=None,
    )
    return pareto.Point(name=name, kind="named", cost=cost, difference=difference)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-4, 4)), max_size=10))
@settings(deadline=None)
def test_the_frontier_has_the_arms_that_no_cheaper_arm_matches(drawn: list[tuple[int, int]]) -> None:
    listed = [point(str(place), cost, value) for place, (cost, value) in enumerate(drawn)]
    found = {(one.cost, one.difference["value"]) for one in pareto.frontier(listed)}
    expected = {
        (cost, value)
        for cost, value in drawn
        if value > 0 and not any((c <= cost and v > value) or (c < cost and v >= value) for c, v in drawn)
    }
    assert found == expected


def test_an_axis_of_differences_holds_every_value() -> None:
    listed = [point(str(n), 1, n / 100).difference for n in range(-9, 4)]
    assert forest.limit_of(listed) > 0.09
    assert forest.limit_of([]) == 0.01


def test_plain_text_is_one_line_without_control_characters() -> None:
    assert plain("a\nb\x00\u200b") == "a b"
    assert plain("x" * 50) == "x" * 33 + "…"


def test_generated_answers_have_no_labels(tmp_path: Path) -> None:
    (group,) = simulate(["mr"], shots=(2,), sets=3, orders=3, items=10, arms=["pdo"], calibrated=(False,)).cells

    def generated(arm: Arm) -> Arm:
        shape = arm.predicted.shape
        return replace(arm, log_p=np.zeros((*shape, 0)), predicted=np.full(shape, -1))

    free = replace(
        group,
        labels=[],
        gold=[str(number) for number in range(10)],
        random=[generated(arm) for arm in group.random],
        arms=[generated(arm) for arm in group.arms],
    )
    files = write_report(summarise(Results(cells=[free], provenance={})), tmp_path)
    assert "labels.svg" not in {path.name for path in files}
    assert 'id="labels"' not in files[0].read_text(encoding="utf-8")


def test_without_matplotlib_the_error_names_the_extra(
    small: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SparsortError, match=r"pip install 'sparsort\[plots\]'"):
        write_report(small, tmp_path)
    assert list(tmp_path.iterdir()) == []
