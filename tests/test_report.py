from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steelyard.report import Report

NASTY = '<script>alert(1)</script> "x" \'y\' & $\\frac{$ id="a" url(#b) \x00 \ud800 \ufffe 名前 ]]> --> %s {0}'
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, ids, references and text; fails if a tag is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.references.append(value or "")
            if name == "clip-path":
                self.references += re.findall(r"url\((.*?)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def full() -> Report:
    report = Report("A title")
    report.heading("Section")
    report.text("A paragraph.")
    report.table(["name", "value"], [["a", 1.0], ["b", None]], "A table")
    report.lines("Loss", {"train": ([0, 1, 2], [3.0, 2.0, 1.5]), "test": ([0, 2], [3.1, 1.9])}, "step", "nats")
    report.lines("Norm", {"norm": ([0, 1, 2], [3.0, 0.2, 0.01])}, "step", "norm", log_y=True)
    report.bars("Accuracy", {"base": 0.1, "tuned": 0.9})
    report.matrix("Confusions", ["cat", "dog"], [[9, 1], [0, 10]])
    return report


def test_the_page_is_whole_and_stands_alone() -> None:
    source = full().html()
    page = Page(source)
    assert page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    assert page.references
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert not {"script", "img", "image", "link", "iframe", "object"} & set(page.tags)
    assert "http://" not in source.replace("http-equiv", "")
    assert "https://" not in source
    for word in (
        "A title",
        "Section",
        "A paragraph.",
        "A table",
        "Loss",
        "step",
        "nats",
        "train",
        "base",
        "0.9",
        "dog",
    ):
        assert word in page.text


def test_colours_are_the_pages_own() -> None:
    """In light and dark: no colour is left in a plot that the style sheet does not set."""
    plots = "".join(re.findall(r"<svg.*?</svg>", full().html(), re.DOTALL))
    assert not re.search("#[0-9a-f]{6}", plots)
    used = set(re.findall(r"var\(--([\w-]+)\)", plots))
    assert {"ink", "faint", "series-0", "series-1"} <= used
    assert all(full().html().count(f"--{name}: #") == 2 for name in used)


def test_whatever_is_written_is_text() -> None:
    report = Report(NASTY)
    report.heading(NASTY)
    report.text(NASTY)
    report.table([NASTY], [[NASTY], [None]], NASTY)
    report.lines(NASTY, {NASTY: ([0, 1], [1, 2]), "other": ([0], [1])}, NASTY, NASTY)
    report.bars(NASTY, {NASTY: 1.0}, NASTY)
    report.matrix(NASTY, [NASTY, "b"], [[1, 0], [2, 3]])
    page = Page(report.html())
    report.html().encode()
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "$\\frac{$" in page.text
    assert len(page.ids) == len(set(page.ids))


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=20), st.lists(st.floats(), min_size=1, max_size=8), st.booleans())
@example("", [1.7976931348623157e308, -9.9792015476736e291], False)
def test_any_words_and_numbers_give_a_page(words: str, numbers: list[float], log_y: bool) -> None:
    report = Report(words)
    report.table([words], [[number] for number in numbers], words)
    report.lines(words, {words: (list(range(len(numbers))), numbers)}, words, words, log_y=log_y)
    report.bars(words, {f"{place}{words}": number for place, number in enumerate(numbers)})
    Page(report.html())


def test_tables_write_numbers_for_readers() -> None:
    report = Report("t")
    report.table(["name", "figure"], [["a", 0.873412], ["b", 1234567], ["c", None], ["d", 23456.7], ["e", 1.2e-7]])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", report.html())
    assert cells[1::2] == ["0.8734", "1,234,567", "–", "23,457", "1.2e-07"]
    assert report.html().count('<td class="number">') == 5
    with pytest.raises(AssertionError):
        report.table(["one"], [["a", "b"]])


def test_a_matrix_names_each_count() -> None:
    report = Report("t")
    labels = [f"label_{place}" for place in range(30)]
    report.matrix("m", labels, [[5 if a == b else 1 if b == a + 1 else 0 for b in range(30)] for a in range(30)])
    page = Page(report.html())
    assert "true label_3, predicted label_3: 5 (83%)" in page.text
    assert "true label_3, predicted label_4: 1 (17%)" in page.text
    assert report.html().count("true label_") == 30 + 29


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, -1.0]])
@pytest.mark.parametrize("log_y", [False, True])
def test_plots_of_nothing(values: list[float], log_y: bool) -> None:
    report = Report("t")
    report.lines("empty", {"a": (list(range(len(values))), values)}, "x", "y", log_y=log_y)
    report.lines("none", {}, "x", "y", log_y=log_y)
    report.bars("none", {})
    report.matrix("none", [], [])
    Page(report.html())


def test_the_same_content_is_the_same_page_from_any_thread() -> None:
    settings = dict(matplotlib.rcParams)
    with ThreadPoolExecutor(4) as pool:
        assert len({*pool.map(lambda _: full().html(), range(4))}) == 1
    assert dict(matplotlib.rcParams) == settings


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    report = Report("first")
    report.write(path)
    assert path.read_text() == report.html()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Report("second").write(path)
    assert path.read_text() == report.html()
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
