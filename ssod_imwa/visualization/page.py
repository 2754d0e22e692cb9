"""One self-contained HTML page: tables that sort, figures as SVG, pictures, light and dark.

Nothing is loaded from anywhere. Figures are drawn in the page's own text color, so they read in
both modes; each has a text for those who do not see it, and tables have real headers.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image

PICTURE_QUALITY = 85  # of JPEG

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --weak: #666; --card: #8881; }
@media (prefers-color-scheme: dark) { :root { --weak: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0; }
figcaption, caption { color: var(--weak); text-align: left; }
nav a { margin-right: 1rem; } a { color: LinkText; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; } figure svg text { fill: currentColor; }
figure img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td { font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid Highlight; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; }
"""

# Sorts by number where both cells begin with one, else by text; a dash comes last.
_SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
  const key = row => row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const x = parseFloat(key(a).replaceAll(",", "")), y = parseFloat(key(b).replaceAll(",", ""));
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    const order = isNaN(x) ? key(a).localeCompare(key(b)) : x - y;
    return up ? order : -order;
  };
  [...body.rows].sort(compare).forEach(row => body.append(row));
  head.parentElement.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
}));
"""


class Page:
    """Collects what is shown, from top to bottom.

    Args:
        title: of the page.

    Example:
        >>> page = Page("Two runs")
        >>> page.section("Results")
        >>> page.table(["run", "AP"], [["a", "54.1"]], caption="Final figures.")
        >>> "<td>54.1</td>" in page.render()
        True
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._sections: list[tuple[str, str]] = []
        self._parts: list[str] = []
        self._figures = 0

    def section(self, title: str) -> None:
        """Begin a section, which the page's list of contents names."""
        anchor = f"section-{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')

    def heading(self, text: str) -> None:
        """Name what follows inside a section."""
        self._parts.append(f"<h3>{html.escape(text)}</h3>")

    def text(self, words: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(words)}</p>")

    def code(self, lines: str) -> None:
        """Lines to copy."""
        self._parts.append(f'<pre tabindex="0"><code>{html.escape(lines)}</code></pre>')

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = ""
    ) -> None:
        """A table whose columns sort when their heads are pressed.

        Args:
            header: names of the columns.
            rows: a cell for each; those that are no numbers are set to the left.
            caption: what it shows.
        """
        columns = zip(*rows, strict=True) if rows else [()] * len(header)
        heads = "".join(
            f'<th scope="col"{_kind(cells)}><button type="button">{html.escape(name)}</button></th>'
            for name, cells in zip(header, columns, strict=True)
        )
        lines = "".join(
            f"<tr>{''.join(f'<td{_kind([x])}>{html.escape(x)}</td>' for x in row)}</tr>"
            for row in rows
        )
        self._parts.append(
            f'<div class="scroll" tabindex="0"><table><caption>{html.escape(caption)}</caption>'
            f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
        )

    def figure(self, figure: Figure, *, words: str) -> None:
        """A matplotlib figure as SVG.

        Args:
            figure: drawn on white with black text, which become the page's own colors.
            words: what is seen, for its caption and for who does not see it.
        """
        self._figures += 1
        picture = _svg(figure, f"f{self._figures}")
        text = html.escape(words)
        picture = picture.replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)
        self._parts.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")

    def picture(self, image: torch.Tensor, *, words: str) -> None:
        """A uint8 (3, H, W) RGB image as JPEG, with what is seen on it."""
        buffer = io.BytesIO()
        pixels = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        pixels.save(buffer, format="JPEG", quality=PICTURE_QUALITY)
        data = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(words)
        self._parts.append(
            f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    def render(self) -> str:
        """The whole page."""
        title = html.escape(self._title)
        links = "".join(
            f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name in self._sections
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head><body>"
            f'<header><h1>{title}</h1><nav aria-label="sections">{links}</nav></header><main>'
            f"{''.join(self._parts)}</main><script>{_SCRIPT}</script></body></html>\n"
        )


def _kind(cells: Sequence[str]) -> str:
    """The attribute of a cell, or of the head above several: words are set to the left."""
    are_numbers = all(re.match(r"^[+\-−–]?\d|^[–-]?$", text) for text in cells)
    return "" if are_numbers else ' class="text"'


def _svg(figure: Figure, prefix: str) -> str:
    """A figure as an svg element in the page's colors, with ids that no other figure has."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = text.replace("#000000", "currentColor")
    # Of shapes, whose style begins with it: text that is white stands on something dark.
    text = re.sub(r'style="fill: (#ffffff|white)(?=[;"])', 'style="fill: none', text)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
