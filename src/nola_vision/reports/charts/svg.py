"""A matplotlib figure as inline SVG for an HTML page: real text, and colours that follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_NAMESPACE = re.compile(r"\{[^}]*\}")
_REFERENCE = re.compile(r"#([\w.-]+)")
_ROOT = ("width", "height", "version")  # the page sets the size


def inline_svg(figure: Figure, prefix: str, title: str, description: str, colours: Mapping[str, str]) -> str:
    """The figure as one `<svg>` element for an HTML page.

    It does not contain `style` attributes or elements (a Content-Security-Policy may forbid them) or fonts, and its ids
    are unique on the page.

    Args:
        figure: drawn with `svg.fonttype: none`; its text must be printable, since XML excludes some characters.
        prefix: of every id, unique on the page; letters, digits and hyphens.
        title: accessible name, shown as a tooltip.
        description: text alternative.
        colours: CSS variable by the colour that it replaces: `#0072b2` becomes `var(--c0, #0072b2)`.
    """
    content = io.StringIO()
    FigureCanvasSVG(figure).print_svg(content)  # type: ignore[no-untyped-call]
    root = ElementTree.fromstring(content.getvalue())
    _remove(root, ("metadata", "style"))
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        attributes = {_NAMESPACE.sub("", name): value for name, value in element.attrib.items()}
        for declaration in attributes.pop("style", "").split(";"):
            name, _, value = (part.strip() for part in declaration.partition(":"))
            if name and name != "font-family":
                attributes[name] = value
        for name in ("fill", "stroke"):
            if variable := colours.get(attributes.get(name, "")):
                attributes[name] = f"var({variable}, {attributes[name]})"
        element.attrib = attributes
    _rename_ids(root, prefix)
    size = {name: value for name, value in root.attrib.items() if name not in _ROOT}
    names = {"title": title, "desc": description}
    root.attrib = {
        **size,
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-labelledby": " ".join(f"{prefix}-{name}" for name in names),
        "stroke-linejoin": "round",
    }
    for place, (name, text) in enumerate(names.items()):
        child = ElementTree.Element(name, {"id": f"{prefix}-{name}"})
        child.text = text
        root.insert(place, child)
    return ElementTree.tostring(root, encoding="unicode")


def _remove(element: ElementTree.Element, names: tuple[str, ...]) -> None:
    for child in list(element):
        if _NAMESPACE.sub("", child.tag) in names:
            element.remove(child)
        else:
            _remove(child, names)


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Renumbers the ids that are referred to, and removes the others."""
    new: dict[str, str] = {}

    def renamed(found: re.Match[str]) -> str:
        return f"#{new.setdefault(found[1], f'{prefix}-{len(new)}')}"

    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href" or value.startswith("url("):
                element.attrib[name] = _REFERENCE.sub(renamed, value)
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in new:
            element.attrib["id"] = new[str(own)]
