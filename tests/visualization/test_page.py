import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure

from ssod_imwa.visualization.page import Page


class Outline(HTMLParser):
    """Tags that are open, texts by tag, and every attribute."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.attributes, self.ids = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def figure():
    made = Figure(figsize=(3, 2))
    axis = made.subplots()
    axis.plot([1, 2, 3], marker="o", label="line")
    axis.legend()
    return made


def sample():
    page = Page("A <report>")
    page.section("First & last")
    page.table(
        ["name", "AP"],
        [["b", "9.5"], ["a", "1,000,000"], ["c", "–"], ["d", "2,000"]],
        caption="Some figures.",
    )
    page.figure(figure(), words='a line that "rises"')
    page.figure(figure(), words="the same again")
    page.picture(torch.zeros(3, 8, 8, dtype=torch.uint8), words="black")
    page.code("python x <y>")
    return page.render()


def test_a_page_is_well_formed_and_loads_nothing():
    outline = Outline(sample())
    loaded = [value for _, name, value in outline.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in loaded)
    assert "url(http" not in sample()
    assert "@import" not in sample()


def test_texts_are_escaped():
    page = sample()
    assert "A &lt;report&gt;" in page
    assert "First &amp; last" in page
    assert "python x &lt;y&gt;" in page
    assert "a line that &quot;rises&quot;" in page


def test_everything_seen_has_words():
    outline = Outline(sample())
    assert [value for _, name, value in outline.attributes if name == "aria-label"][1:] == [
        'a line that "rises"',
        "the same again",
    ]
    assert ("img", "alt", "black") in outline.attributes
    assert ("html", "lang", "en") in outline.attributes
    assert outline.attributes.count(("th", "scope", "col")) == 2


def test_equal_figures_share_no_id_and_point_at_their_own():
    outline = Outline(sample())
    assert len(outline.ids) == len(set(outline.ids))
    targets = re.findall(r'(?:url\(|href=")#([\w-]+)', sample())
    assert set(targets) <= set(outline.ids)


def test_figures_take_the_colors_of_the_page():
    page = sample()
    assert "#000000" not in page
    assert "currentColor" in page
    assert not re.search(r"fill: (#ffffff|white)", page)


def test_text_on_dark_keeps_its_white():
    made = figure()
    made.axes[0].text(2, 2, "on dark", color="white")
    page = Page("x")
    page.figure(made, words="white text")
    (style,) = re.findall(r'<text style="([^"]*)"[^>]*>on dark', page.render())
    assert "fill: #ffffff" in style


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
@pytest.mark.parametrize(
    ("presses", "expected"),
    [(1, ["9.5", "2,000", "1,000,000", "–"]), (2, ["1,000,000", "2,000", "9.5", "–"])],
)
def test_a_press_on_a_head_sorts_by_number_in_a_browser(tmp_path, presses, expected):
    press = 'document.querySelectorAll("th button")[1].click();' * presses
    page = sample().replace("</body>", f"<script>{press}</script></body>")
    (tmp_path / "page.html").write_text(page)
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", done.stdout)
    assert cells[1::2] == expected
    direction = "ascending" if presses == 1 else "descending"
    assert f'aria-sort="{direction}"' in done.stdout
