"""Directions: the vectors over all trainable parameters that the seeds of a pool name. See base.py for the contract."""

from fedtune.directions.base import Family, Pool, make_family
from fedtune.directions.engine import Combination, Directions

__all__ = ["Combination", "Directions", "Family", "Pool", "make_family"]
