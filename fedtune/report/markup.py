"""HTML and SVG that cannot be broken by what stands in them: text is escaped unless it was made here.

>>> tag("p", "1 < 2 ", tag("b", "really"), class_="note")
'<p class="note">1 &lt; 2 <b>really</b></p>'
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from fedtune.foreign import for_reading

_VOID = {"meta", "br", "line", "rect", "path", "circle", "use"}


class Html(str):
    """Finished markup. Every other str is text from outside and is escaped when it becomes a part of one."""

    __slots__ = ()


Content = str | int | float | None


def tag(name: str, /, *content: Content, **attributes: Content) -> Html:
    """An element. `class_` is class, `stroke_width` stroke-width; an attribute that is None is left out."""
    written = "".join(f' {_name(key)}="{escape(value)}"' for key, value in attributes.items() if value is not None)
    if name in _VOID and not content:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(content)}</{name}>")


def join(parts: Iterable[Content]) -> Html:
    """Parts one after another; None is nothing."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts if part is not None))


def escape(text: Content) -> str:
    """`text` so that a browser shows it and does nothing else: no markup, no control character, no mark that reverses text."""
    text = str(text)
    return html.escape(for_reading(text, len(text)), quote=True)


def cut(text: str, most: int) -> str:
    """At most so many characters, with "..." where something is left out."""
    return text if len(text) <= most else f"{text[:most]}..."


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-") if key != "viewBox" else key
