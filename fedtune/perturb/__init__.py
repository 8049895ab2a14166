"""Forward passes at w + c z without ever writing w, and the weights that local steps write.

passes.py     one point at a time: modules are pointed at a scratch that holds w + c z
together.py   several points in one pass over a batch of copies
owners.py     which module owns which parameter
guard.py      finds weights that are read where they cannot be perturbed
live.py       the weights, how steps are rounded to their dtype, and steps that wait for the next pass over memory
parts.py      cuts tensors into parts that stay in cache
rounding.py   stochastic rounding to 16 bits
"""

from fedtune.perturb.live import RULES, LiveWeights
from fedtune.perturb.parts import Where, cuts
from fedtune.perturb.passes import WHOLE_LIMIT, Perturbation

__all__ = ["RULES", "WHOLE_LIMIT", "LiveWeights", "Perturbation", "Where", "cuts"]
