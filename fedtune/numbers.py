"""How numbers read to people: bytes, durations, losses and counts, the same on the screen, in logs and in reports."""

from __future__ import annotations

import math


def in_bytes(count: float) -> str:
    """Bytes in powers of 1000 with three digits: 812 B, 1.21 kB, 47.3 MB."""
    for unit, power in (("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)):
        scaled = count / power
        if round(scaled, 1) < 1000 or unit == "TB":
            break
    if unit == "B":
        return f"{scaled:.0f} B"
    return f"{scaled:.{_decimals(scaled)}f} {unit}"


def _decimals(scaled: float) -> int:
    return 2 if round(scaled, 2) < 10 else 1 if round(scaled, 1) < 100 else 0


def in_time(seconds: float) -> str:
    """A duration: 0.34 s, 12.1 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def in_about(seconds: float) -> str:
    """A duration that is still changing or only estimated: 8 s, 4 min, 2 h 05 min."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def in_loss(value: float | None) -> str:
    """A loss or score with four digits after the point; "-" if there is none, "not finite" for NaN and infinity."""
    if value is None:
        return "-"
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def in_ratio(value: float) -> str:
    """How many times: 3.2x, 48x, 12,300x."""
    if value < 9.95:
        return f"{value:.1f}x"
    return f"{value:.0f}x" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}x"
