"""Build an SVG from shapes with the CSS classes of style.css. ElementTree escapes every string."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from repro.store.text import escape_control_characters

NUM_GROUP_COLOURS, NUM_PLACE_COLOURS = 6, 4
"""Number of colours for groups (classes g0 to g5 in style.css), and for places at which ranks wait (n0 to n3)."""

_STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


class Svg:
    """One picture, for a file of its own or for a page. Lengths are in pixels.

    key: a prefix that makes the ids in this picture (pattern, arrow heads) unique, because a page has several pictures
    """

    def __init__(self, key: str, title: str) -> None:
        self._key = key
        self._root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
        self._root.set("aria-label", escape_control_characters(title))
        self._add("title", {}).text = escape_control_characters(title)
        self._add("style", {}).text = _STYLE
        self._shapes = ET.Element("g")
        self._define()

    def rect(
        self, css: str, x: float, y: float, width: float, height: float, *, rounded: float = 0, opacity: float = 1
    ) -> ET.Element:
        attributes = {"class": css, "x": _px(x), "y": _px(y), "width": _px(width), "height": _px(height)}
        if rounded:
            attributes["rx"] = _px(rounded)
        return self._shape("rect", attributes, opacity)

    def hatched(self, x: float, y: float, width: float, height: float, *, opacity: float = 1) -> None:
        """Draw a rectangle with a hatched pattern and a red border, for a call that never returns."""
        pattern = self._shape("rect", {"x": _px(x), "y": _px(y), "width": _px(width), "height": _px(height)}, opacity)
        pattern.set("fill", f"url(#{self._key}-hatch)")
        self.rect("stall", x, y, width, height)

    def line(self, css: str, x1: float, y1: float, x2: float, y2: float, *, width: float = 1) -> ET.Element:
        ends = {"x1": _px(x1), "y1": _px(y1), "x2": _px(x2), "y2": _px(y2)}
        return self._shape("line", {"class": css, **ends, "stroke-width": _px(width)})

    def circle(self, css: str, x: float, y: float, radius: float) -> None:
        self._shape("circle", {"class": css, "cx": _px(x), "cy": _px(y), "r": _px(radius)})

    def path(self, css: str, commands: str) -> ET.Element:
        return self._shape("path", {"class": css, "d": commands})

    def arrow(self, colour: int, commands: str) -> None:
        """Draw a path with an arrow head.

        colour     number of the colour, from 0; each collective or lock in which ranks wait has a colour
        commands   the path in the syntax of SVG: "M5,5 h10"
        """
        self.path(f"n{colour} arrow", commands).set("marker-end", f"url(#{self._key}-head{colour})")

    def text(
        self, css: str, x: float, y: float, words: str, *, anchor: str = "start", most_characters: int = 400
    ) -> None:
        element = self._shape("text", {"class": css, "x": _px(x), "y": _px(y)})
        if anchor != "start":
            element.set("text-anchor", anchor)
        element.text = escape_control_characters(words, most_characters)

    def markup(self, width: float, height: float, *, paper: bool = True) -> str:
        """Return the SVG document. paper: whether to draw a background, as a picture in a file of its own needs."""
        self._root.attrib |= {"viewBox": f"0 0 {_px(width)} {_px(height)}", "width": _px(width), "height": _px(height)}
        self._root.append(self._shapes)
        if paper:
            background = ET.Element("rect", {"class": "paper", "width": _px(width), "height": _px(height)})
            self._shapes.insert(0, background)
        return ET.tostring(self._root, encoding="unicode") + "\n"

    def _add(self, tag: str, attributes: dict[str, str]) -> ET.Element:
        return ET.SubElement(self._root, tag, attributes)

    def _shape(self, tag: str, attributes: dict[str, str], opacity: float = 1) -> ET.Element:
        if opacity < 1:
            attributes["opacity"] = f"{opacity:g}"
        return ET.SubElement(self._shapes, tag, attributes)

    def _define(self) -> None:
        definitions = self._add("defs", {})
        pattern = ET.SubElement(
            definitions, "pattern", id=f"{self._key}-hatch", width="7", height="7", patternUnits="userSpaceOnUse",
            patternTransform="rotate(45)",
        )  # fmt: skip
        stripe = {"class": "hatch", "x1": "0", "y1": "0", "x2": "0", "y2": "7", "stroke-width": "2.6", "opacity": ".75"}
        ET.SubElement(pattern, "line", stripe)
        for colour in range(NUM_PLACE_COLOURS):
            marker = ET.SubElement(
                definitions, "marker", id=f"{self._key}-head{colour}", viewBox="0 0 8 8", refX="7", refY="4",
                markerWidth="5.5", markerHeight="5.5", orient="auto",
            )  # fmt: skip
            ET.SubElement(marker, "path", {"class": f"n{colour}", "d": "M0,0 8,4 0,8z"})


def add_tooltip(shape: ET.Element, words: str) -> None:
    """Show a text while the mouse is over a shape."""
    ET.SubElement(shape, "title").text = escape_control_characters(words, 120)


def _px(length: float) -> str:
    return f"{length:.1f}".removesuffix(".0")
