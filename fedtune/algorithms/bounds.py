"""What federation is compared with: every client for itself (`local`), and all data in one place (`central`).

Both take FedAvg's steps with one party. `local` is one client out of the partition, `only_client`; a client that trains alone
has the mean over clients of such runs. `central` is one party with the training samples of all clients, which does as many
steps in a round as the clients that a round would ask do together, so that the numbers of samples are equal. The optimiser
starts afresh every round, as everybody's does. No party sends anything to another, so payload bytes are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtune.algorithms.fedavg import FEDAVG
from fedtune.data.encode import Encoded


def pooled(shares: Sequence[Sequence[Encoded]], number: int) -> Sequence[Encoded]:
    """The samples of all clients, in the order of the clients."""
    return tuple(sample for share in shares for sample in share)


LOCAL = replace(FEDAVG, name="local")
CENTRAL = replace(FEDAVG, name="central", samples=pooled)
