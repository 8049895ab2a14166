"""The algorithms by name: one file each, server and client halves together."""

from fedtune.algorithms.base import Algorithm, LocalWork, State
from fedtune.algorithms.fedkseed import FEDKSEED, FEDKSEED_PRO
from fedtune.algorithms.ferret import FERRET

ALGORITHMS: dict[str, Algorithm] = {record.name: record for record in (FEDKSEED, FEDKSEED_PRO, FERRET)}

__all__ = ["ALGORITHMS", "Algorithm", "LocalWork", "State"]
