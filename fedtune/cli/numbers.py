"""How numbers read on the screen: `fedtune.numbers`, which reports and figures use too."""

from fedtune.numbers import in_about, in_bytes, in_loss, in_ratio, in_time

__all__ = ["in_about", "in_bytes", "in_loss", "in_ratio", "in_time"]
