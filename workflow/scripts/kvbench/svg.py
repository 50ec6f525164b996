"""An SVG file made fit to stand inside an HTML page, beside others."""

import re
from pathlib import Path
from xml.etree import ElementTree

from kvbench.errors import UserError

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
DROPPED = {"metadata", "script", "style", "foreignObject"}

_REFERENCE = re.compile(r"url\(\s*['\"]?#([^'\")]+)['\"]?\s*\)")
_ELSEWHERE = re.compile(r"url\(\s*['\"]?(?!#)|@import", re.IGNORECASE)


def inline(path: str | Path, scope: str, inks: dict[str, str]) -> str:
    """The file's drawing as one ``<svg>`` element that names nothing outside itself.

    ``scope`` is put before each id, so that drawings on one page share none; ``inks`` maps a colour of the
    file (``#1f2328``) to the CSS value that replaces it in styles.

    Raises
    ------
    UserError : the file is missing or no SVG.
    """
    try:
        root = ElementTree.fromstring(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing", "Run the plots again") from error
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is no SVG: {error}", "Delete it and run again") from error
    _prune(root)
    for element in root.iter():
        _scope(element, scope, inks)
    # matplotlib sets these two in a style sheet, which would reach the whole page.
    root.attrib.update({"stroke-linejoin": "round", "stroke-linecap": "butt", "role": "img"})
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _prune(root: ElementTree.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child) in DROPPED or child.get("id") == "paper":
                parent.remove(child)


def _scope(element: ElementTree.Element, scope: str, inks: dict[str, str]) -> None:
    for name, value in list(element.attrib.items()):
        if name in (XLINK, "href"):
            del element.attrib[name]
            if value.startswith("#"):
                element.set("href", f"#{scope}-{value[1:]}")
        elif name.startswith("on") or _ELSEWHERE.search(value):
            del element.attrib[name]
        elif name == "id":
            element.set("id", f"{scope}-{value}")
        else:
            scoped = _REFERENCE.sub(rf"url(#{scope}-\1)", value)
            for colour, ink in inks.items() if name == "style" else ():
                scoped = scoped.replace(colour, ink)
            element.set(name, scoped)
