"""HTML as a tree: text and attributes are escaped when it is written, so that nobody has to think of it.

html(tag("p", "2 < 3", class_="note"))    ->    <p class="note">2 &lt; 3</p>
"""

from collections.abc import Iterable
from typing import Any
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: Any) -> Element:
    """An element; ``class_`` is the attribute class, ``stroke_width`` is stroke-width, None leaves one out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    element = Element(name, {key: _number(value) for key, value in given.items()})
    for child in children:
        _append(element, child)
    return element


def _append(parent: Element, child: Child) -> None:
    if child is None:
        return
    if isinstance(child, Element):
        parent.append(child)
    elif isinstance(child, str):
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + child
        else:
            parent.text = (parent.text or "") + child
    else:
        for one in child:
            _append(parent, one)


def _number(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def html(element: Element) -> str:
    """The element and all in it. Style sheets are written as they are: nothing of a user's belongs there."""
    return tostring(element, encoding="unicode", method="html")
