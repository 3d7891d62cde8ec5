"""One self-contained HTML page: no script, nothing fetched, everything that comes from outside escaped.

    html = page("RepVGG demo", [("The block", svg(figure, "Three branches, one convolution.")), ("Speed", table(rows, header))])

`page` takes pieces of HTML made by the functions below it; each of those takes plain text and escapes it.
"""

import io
import re
import secrets
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --muted: #5c6675; --rule: #dde2e8 }
:root { --page: #f7f8fa; --accent: #2f6cab; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --muted: #9aa5b4; --rule: #323a46; --page: #14181e; --accent: #85b6ea; --card: #141414 }
  .card svg { filter: invert(.92) hue-rotate(180deg) } /* white becomes --card, every hue stays */
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--page); color: var(--ink) }
body { font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 78rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem) 5rem }
h1, h2, p, figcaption { overflow-wrap: break-word }
h1 { margin: 0 0 .5rem; font-size: clamp(1.9rem, 5vw, 2.75rem); line-height: 1.15; letter-spacing: -.02em; text-wrap: balance }
h3 { margin: 1.5rem 0 .5rem; font-size: 1.0625rem; line-height: 1.4 }
h2 { margin: 0 0 .75rem; font-size: 1.4rem; line-height: 1.25; letter-spacing: -.01em }
p { margin: 0 0 1rem; max-width: 44rem; text-wrap: pretty }
.lead { font-size: 1.2rem; color: var(--muted) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1.5rem; font-size: .95rem }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: .2em }
section { margin-top: 3.5rem; scroll-margin-top: 1rem }
figure { margin: 0 0 1.5rem }
figcaption { margin-top: .6rem; max-width: 44rem; font-size: .9rem; line-height: 1.45; color: var(--muted) }
.card { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; padding: .75rem }
.card svg { display: block; width: 100%; height: auto; margin: 0 auto }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; margin-bottom: 1.5rem }
.charts figure { margin: 0; min-width: 0 }
img { display: block; max-width: 100%; height: auto; border-radius: .4rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 1.25rem 1rem; margin-bottom: 1.5rem }
.grid figure { margin: 0 }
.grid img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--card); border: 1px solid var(--rule) }
.grid figcaption { margin-top: .35rem; font-size: .82rem }
.pixels { image-rendering: pixelated }
.table { width: fit-content; max-width: 100%; overflow-x: auto; margin-bottom: 1.5rem }
.table { padding: .25rem 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: .75rem }
tr:last-child td { border-bottom: 0 }
th:last-child, td:last-child { padding-right: 0 }
table { border-collapse: collapse; font-size: .95rem; line-height: 1.4; font-variant-numeric: tabular-nums }
th, td { padding: .5rem clamp(.8rem, 2vw, 1.5rem) .5rem 0; text-align: left; vertical-align: baseline }
td, thead th { border-bottom: 1px solid var(--rule) }
th { font-weight: 600; color: var(--muted); vertical-align: bottom }
@media (max-width: 40rem) {
  table { font-size: .85rem }
  th, td { padding-right: .6rem }
  .table { padding: .25rem .7rem }
}
.number { text-align: right }
td.number, td:first-child { white-space: nowrap }
summary { margin-bottom: .75rem; color: var(--accent); cursor: pointer }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser too holds the page to it

BY_URL, BY_HREF = re.compile(r"(?<=url\(#)[^)]+"), re.compile(r"(?<=^#).+")  # how one part of an SVG names another

NUMBER = re.compile(r"[-+\u2212\u00b1]?\.?\d|[-\u2013]?$")  # also a minus sign, a plus-or-minus; a dash or nothing for none

MACHINE = {  # what this_machine records, in words
    "processor": "processor",
    "cores": "cores",
    "threads": "threads that compute",
    "memory_gib": "memory",
    "gpu": "GPU",
    "system": "system",
    "python": "Python",
    "commit": "commit of repvgg",
    "date": "date",
}

Section = tuple[str, str]


def page(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """Return a whole document.

    sections: (heading, body), the body being HTML made of the pieces below; `title`, `lead` and headings are plain text.
    """
    headings = [escape(heading) for heading, _ in sections]
    links = "".join(f'<a href="#section-{i}">{heading}</a>' for i, heading in enumerate(headings, 1))
    bodies = "\n".join(
        f'<section id="section-{i}">\n<h2>{heading}</h2>\n{body}\n</section>'
        for i, (heading, (_, body)) in enumerate(zip(headings, sections, strict=True), 1)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{f'<p class="lead">{escape(lead)}</p>' if lead else ""}
{f"<nav>{links}</nav>" if len(sections) > 3 else ""}
</header>
{bodies}
</main>
</body>
</html>
"""


def paragraph(text: str) -> str:
    """Plain text; what stands in `backticks` is code."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
    return f"<p>{text}</p>"


def heading(text: str) -> str:
    """Return the title of a part of a section."""
    return f"<h3>{escape(text)}</h3>"


def folded(summary: str, content: str) -> str:
    """`content` (HTML) behind a line of plain text that opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Return a table of `str(cell)`s, None as an empty one. A column whose every cell begins as a number does is set to the right.

    Raises `ValueError` for a row that is not as long as the header.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)} columns: {row}")
    numeric = [bool(cells) and all(NUMBER.match(cell) for cell in column) for column in zip(*cells, strict=True)]
    kinds = [' class="number"' if right else "" for right in numeric] or [""] * len(header)
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, header, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>" for row in cells
    )
    head = f"<thead><tr>{head}</tr></thead>\n" if any(header) else ""
    return f'<div class="table"><table>\n{head}<tbody>\n{body}\n</tbody>\n</table></div>'


def charts(pieces: Iterable[str]) -> str:
    """Return charts side by side where there is room, below each other on a telephone."""
    return '<div class="charts">\n' + "\n".join(pieces) + "\n</div>"


def machine(about: Mapping[str, Any]) -> str:
    """Return a table of what was measured on which machine, as `this_machine` records it."""
    rows = [(words, about[name]) for name, words in MACHINE.items() if about.get(name) is not None]
    rows = [(words, f"{value:g} GiB" if words == "memory" else value) for words, value in rows]
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    return table([*rows, ("versions", versions)], ("", ""))


def grid(pieces: Iterable[str]) -> str:
    """Pieces side by side, as many in a row as fit: small images with captions."""
    return '<div class="grid">\n' + "\n".join(pieces) + "\n</div>"


def png(image: Image.Image | np.ndarray[Any, Any], alt: str, caption: str = "") -> str:
    """Return an image inside the page, losslessly; small ones are enlarged pixel by pixel. `alt` says what a blind reader should
    know.

    image: PIL, or a uint8 array [H, W] or [H, W, 3 or 4]; anything else raises `ValueError`.
    """
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(f"an image is a uint8 array [H, W] or [H, W, 3 or 4], not {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    if image.mode not in ("1", "L", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    data = b64encode(file.getvalue()).decode()
    kind = ' class="pixels"' if max(image.size) <= 64 else ""
    return _figure(
        f'<img{kind} src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" alt="{escape(alt)}">', caption
    )


def svg(figure: "Figure", caption: str = "") -> str:
    """Return a matplotlib figure as inline SVG on a card, its letters as outlines: the same in every browser; dark on a dark page.

    Its ids are new at every call, so that any number of figures can share a page.
    """
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.fonttype": "path"}):
        figure.savefig(file, format="svg")
    return drawing(file.getvalue(), caption)


def drawing(text: bytes, caption: str = "") -> str:
    """Return an SVG file of matplotlib's as `svg` does."""
    root = ElementTree.fromstring(text)  # noqa: S314 (written by matplotlib here)
    width = round(float(root.attrib["width"].removesuffix("pt")) * 96 / 72)  # CSS pixels
    box = root.attrib["viewBox"]
    _tidy(root)
    root.attrib = {
        "viewBox": box,
        "role": "img",
        "aria-label": caption or "drawing",
        "style": f"max-width:{1.25 * width:.0f}px;min-width:{0.74 * width:.0f}px",  # on a telephone the card of a wide one scrolls
        "stroke-linejoin": "round",
    }
    return _figure(f'<div class="card">{ElementTree.tostring(root, encoding="unicode")}</div>', caption)


def _tidy(root: ElementTree.Element) -> None:
    """Return what HTML needs of matplotlib's SVG: no metadata, no style that would reach the whole page, no namespaces, ids of its
    own."""
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
    token, ids = secrets.token_hex(4), dict[str, str]()
    for element in root.iter():
        for key, value in element.attrib.items():
            reference = BY_HREF if key == "href" else BY_URL
            element.attrib[key] = reference.sub(lambda name: ids.setdefault(name[0], f"f{token}-{len(ids)}"), value)
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in ids:
            element.set("id", ids[name])


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"
