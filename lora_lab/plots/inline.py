"""A figure as a part of an HTML page: SVG that follows the page's colours and tells its values."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

from matplotlib import rcParams
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from lora_lab.plots import style as plot_style
from lora_lab.plots.hover import Spot

_PAGE = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#e5e5e5": "var(--grid)",
    "#333333": "var(--ink-soft)",
    "#555555": "var(--muted)",
    "#999999": "var(--muted)",
    "#cccccc": "var(--muted)",
}
"""Colours of a figure's frame, text and grid → those of the page, which may be dark."""
_FILLED = "on-colours"
"""The id of what lies on filled cells, whose colours are the same on any page."""
_SCALE = 1.5
"""Pixels of a point, on pages that have room."""
_RADIUS = 4.5  # points around a value where it is shown


def rendered(figure: Figure) -> bytes:
    """The figure as an SVG file, of the same bytes for what looks the same."""
    buffer = io.BytesIO()
    with plot_style.styled(), _marked(figure):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def embedded(drawing: bytes, values: Sequence[Spot], prefix: str, about: str) -> str:
    """What `rendered` gave as an <svg> element for HTML, without namespaces.

    All its ids begin with `prefix`, so that several fit on one page. Colours of the style become --series-1, -2 … of
    the page; each of `values` (see hover.py) has a <title>, which browsers show where it is pointed at. `about` is its
    name for readers that do not see it.
    """
    root = ElementTree.fromstring(drawing)  # noqa: S314 (of matplotlib, with every text escaped)
    for element in list(root):
        name = _name(element.tag)
        if name == "metadata" or (name == "defs" and all(_name(part.tag) == "style" for part in element)):
            root.remove(element)  # a style sheet in SVG is one of the whole page
    with plot_style.styled():
        cycle = rcParams["axes.prop_cycle"].by_key().get("color", [])
    series = {to_hex(colour): f"var(--series-{i + 1}, {to_hex(colour)})" for i, colour in enumerate(cycle)}
    _for_page(root, prefix, {**series, **_PAGE})
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": f"{_SCALE * width:.0f}",
        "height": f"{_SCALE * height:.0f}",
        "role": "img",
        "aria-label": about,
    }
    root.append(_hover(values))
    return ElementTree.tostring(root, encoding="unicode")


class _marked:  # noqa: N801  (a context)
    """What lies on images and filled contours has an id, and the figure none, for as long as the context lasts."""

    def __init__(self, figure: Figure) -> None:
        self.artists = [artist for ax in figure.axes for artist in _on_colours(ax)]
        self.figure = figure

    def __enter__(self) -> None:
        self.before = [artist.get_gid() for artist in self.artists]
        for artist in self.artists:
            artist.set_gid(_FILLED)
        self.identity = self.figure.get_gid()  # which tells views apart that look the same
        self.figure.set_gid(None)

    def __exit__(self, *_: object) -> None:
        for artist, gid in zip(self.artists, self.before, strict=True):
            artist.set_gid(gid)
        self.figure.set_gid(self.identity)


def _on_colours(ax: Any) -> Iterator[Any]:
    if ax.images or any(isinstance(each, ContourSet) and each.filled for each in ax.collections):
        yield from (*ax.texts, *ax.lines, *ax.collections)


def _name(tag: str) -> str:
    return tag.rpartition("}")[2]


def _for_page(root: Any, prefix: str, colours: dict[str, str]) -> None:
    """Take namespaces away, prefix all ids, and let the page choose colours where nothing is filled below."""
    filled = {id(part) for group in root.iter() if group.get("id") == _FILLED for part in group.iter()}
    shown = re.compile("|".join(colours))
    for element in root.iter():
        element.tag = _name(element.tag)
        element.attrib = {_name(key): value for key, value in element.attrib.items()}
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{prefix}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', value)}"
            if key == "href" and value.startswith("#"):
                value = f"#{prefix}-{value[1:]}"
            if "url(#" in value:
                value = value.replace("url(#", f"url(#{prefix}-")
            if key in ("style", "fill", "stroke") and id(element) not in filled:
                value = shown.sub(lambda found: colours[found[0]], value)
            element.attrib[key] = value
        if element.get("id") == f"{prefix}-{_FILLED}":
            del element.attrib["id"]
            element.set("class", _FILLED)


def _hover(values: Sequence[Spot]) -> Any:
    """Boxes and circles that are not seen, each with what it says."""
    group = ElementTree.Element("g", {"class": "values"})
    for spot in values:
        if spot.width < 0.05 and spot.height < 0.05:
            place = {"cx": f"{spot.x:.1f}", "cy": f"{spot.y:.1f}", "r": f"{_RADIUS:g}"}
            element = ElementTree.SubElement(group, "circle", place)
        else:
            box = {"x": spot.x, "y": spot.y, "width": spot.width, "height": spot.height}
            element = ElementTree.SubElement(group, "rect", {key: f"{value:.1f}" for key, value in box.items()})
        ElementTree.SubElement(element, "title").text = spot.text
    return group
