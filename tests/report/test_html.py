"""The page: self-contained, escaped, its plots readable by a parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from shaper.report.distributions import distribution
from shaper.report.html import (
    Block,
    Plot,
    Section,
    checks,
    definitions,
    paragraph,
    render,
)

EVIL = "</script><img src=x onerror=alert(1)>"


class Collector(HTMLParser):
    """Collects start tags with their attributes, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def page() -> str:
    figure = distribution([EVIL], [np.array([1.0, 2.0, 4.0])], "x (ms)")
    return render(
        f"title {EVIL}",
        f"lead {EVIL}",
        [
            Section(
                f"section {EVIL}",
                (
                    Plot(f"plot {EVIL}", figure, f"caption {EVIL}"),
                    Plot("second", figure, wide=False),
                    definitions([(EVIL, EVIL)]),
                    checks([(True, EVIL), (False, "b"), (None, "c")]),
                    paragraph(EVIL),
                ),
            )
        ],
    )


def test_nothing_is_loaded_from_elsewhere() -> None:
    """No element names an address, and the style imports nothing."""
    text = page()
    collector = Collector()
    collector.feed(text)
    for _, attributes in collector.tags:
        assert not {"src", "href", "action", "data", "poster"} & set(attributes)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_library_is_in_it_once() -> None:
    """Two plots, one copy of plotly; none without plots."""
    text = page()
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert "plotly.js v" not in render("t", "l", [Section("s", (Block("<p>x</p>"),))])


def test_text_can_not_become_markup() -> None:
    """What comes from names and captions never ends up as an element or ends a script."""
    collector = Collector()
    collector.feed(page())
    assert not any(tag == "img" for tag, _ in collector.tags)
    assert len(collector.scripts) == 2
    assert collector.scripts[1].rstrip().endswith(");")


def test_every_plot_has_its_place() -> None:
    """Each drawing call names an element that exists."""
    text = page()
    collector = Collector()
    collector.feed(text)
    places = {a["id"] for _, a in collector.tags if a.get("class") == "plot"}
    drawn = set(re.findall(r"shaperPlot\('(\w+)',\{", collector.scripts[1]))
    assert places == drawn == {"plot0", "plot1"}


def test_it_suits_phones_and_dark_rooms() -> None:
    """The page adapts to narrow screens and to the reader's colour scheme."""
    text = page()
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text
    assert "max-width:760px" in text


@pytest.mark.parametrize("word", ["holds", "does not hold", "not judged"])
def test_checks_say_in_words_what_they_are(word: str) -> None:
    """A check is readable without its colour."""
    assert word in page()
