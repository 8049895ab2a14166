"""How series are told apart, in pages and figures: by colour (Okabe and Ito), marker and dashes, so also in black and white.

The colours are those of M. Okabe and K. Ito, "Color universal design" (2002), without yellow, which paper does not show, and
in an order in which neighbours differ in lightness too.
"""

from __future__ import annotations

from dataclasses import dataclass

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # names of matplotlib; the page draws the same
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (7, 2, 2, 2), (10, 3), (1, 1.5))  # on, off, ... in points


@dataclass(frozen=True)
class Style:
    """How one series is drawn. `dashes` is () for a whole line."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


def style(number: int) -> Style:
    """The style of series `number`, from 0; the first 168 differ from one another."""
    return Style(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)])
