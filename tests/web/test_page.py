import base64
import io
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from repvgg.web import page

NASTY = """</p><script>alert("1" & '2')</script><img src=x onerror='y'>"""
VOID = {"meta", "img"}


class Document(HTMLParser):
    """Tags that match, and what is in them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


def plot(label: str = "x") -> Figure:
    """With markers, text and clipped lines: all that matplotlib refers to by id."""
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.plot([0, 1, 2], [1, 3, 2], marker="o", label=label)
    axes.imshow(np.eye(3), extent=(0, 1, 0, 1))
    axes.set_xlabel(label)
    axes.legend()
    return figure


def sample() -> str:
    pieces = page.png(np.arange(64, dtype=np.uint8).reshape(8, 8), NASTY, NASTY)
    return page.page(
        NASTY,
        [
            (NASTY, page.paragraph(NASTY)),
            ("Table", page.table([[NASTY, 1], ["b", None]], [NASTY, "n"])),
            ("Drawings", page.svg(plot(NASTY), NASTY) + page.svg(plot())),
            ("Images", page.grid([pieces, pieces])),
        ],
        lead=NASTY,
    )


def test_everything_from_outside_is_escaped() -> None:
    document = Document(sample())
    assert document.tags["script"] == 0
    assert document.tags["img"] == 2
    assert not document.values("onerror")
    seen = ["title", "h1", "lead", "link", "h2", "paragraph", "th", "td", "caption of the drawing", *["caption of an image"] * 2]
    assert "".join(document.text).count(NASTY) == len(seen)
    assert document.values("alt") == [NASTY, NASTY]


def test_nothing_is_fetched() -> None:
    html = sample()
    document = Document(html)
    assert "//" not in re.sub(r'"data:[^"]*"', "", html)
    assert "@import" not in html
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in document.values("src") + document.values("href"))
    assert all(name.startswith("#") for name in re.findall(r"url\(([^)]*)\)", html))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in document.values("content")


def test_figures_share_a_page_without_sharing_ids() -> None:
    html = sample()
    document = Document(html)
    ids = document.values("id")
    assert max(Counter(ids).values()) == 1
    referred = {value[1:] for value in document.values("href") if value.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert referred == set(ids)
    assert len(ids) > 30
    assert document.tags["style"] == 1  # matplotlib's own would reach every other drawing
    same = plot()
    first, second = (set(Document(page.svg(same)).values("id")) for _ in range(2))
    assert not first & second


def test_a_figure_keeps_its_proportions_and_matplotlib_its_settings() -> None:
    before = dict(rcParams)
    document = Document(page.svg(plot(), "caption"))
    assert dict(rcParams) == before
    assert document.values("viewbox") == ["0 0 288 216"]
    assert document.tags["text"] == 0  # letters are outlines
    assert document.tags["metadata"] == 0
    assert "caption" in document.text


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "LA"])
def test_images_are_carried_losslessly(mode: str) -> None:
    image = Image.effect_noise((9, 7), 60).convert("L")
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert("RGB").convert(mode)
    (source,) = Document(page.png(image, "noise")).values("src")
    shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (5, 6, 4)])
def test_arrays_are_images(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (source,) = Document(page.png(array, "noise")).values("src")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))), array)


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((3, 4, 5), np.uint8), np.zeros(4, np.uint8)])
def test_other_arrays_are_refused(array: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=r"^an image is a uint8 array"):
        page.png(array, "no image")


def test_columns_of_numbers_are_set_to_the_right() -> None:
    html = page.table(
        [["a", 1, "1.5x", "-", "3 of 4"], ["7", -2.5, "\u2212.3", None, "four"]], ["name", "n", "ratio", "none", "words"]
    )
    assert re.findall(r"<th( class=\"number\")?>(\w+)", html) == [
        ("", "name"),
        (' class="number"', "n"),
        (' class="number"', "ratio"),
        (' class="number"', "none"),
        ("", "words"),
    ]
    assert html.count('<td class="number">') == 6
    Document(html)


def test_tables_without_rows_and_with_ragged_ones() -> None:
    assert Document(page.table([], ["a", "b"])).tags["th"] == 2
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        page.table([[1]], ["a", "b"])


@given(st.text(), st.text())
def test_any_text_comes_back_as_it_was(title: str, cell: str) -> None:
    document = Document(page.page(title, [("h", page.table([[cell]], ["c"]))]))
    assert cell in document.text or not cell.strip()
    assert title in document.text or not title.strip()
    assert document.tags["td"] == 1
