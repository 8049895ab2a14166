"""The algorithms by name: one file each, server and client halves together."""

from fedtune.algorithms.base import Algorithm, LocalWork, State
from fedtune.algorithms.bounds import CENTRAL, LOCAL
from fedtune.algorithms.decomfl import DECOMFL
from fedtune.algorithms.fedavg import FEDAVG
from fedtune.algorithms.fedkseed import FEDKSEED, FEDKSEED_PRO
from fedtune.algorithms.fedzo import FEDZO
from fedtune.algorithms.ferret import FERRET
from fedtune.algorithms.lora import LORA
from fedtune.algorithms.subspace import SUBSPACE

_RECORDS = (FEDKSEED, FEDKSEED_PRO, FERRET, SUBSPACE, FEDAVG, LORA, FEDZO, DECOMFL, LOCAL, CENTRAL)
ALGORITHMS: dict[str, Algorithm] = {record.name: record for record in _RECORDS}

__all__ = ["ALGORITHMS", "Algorithm", "LocalWork", "State"]
