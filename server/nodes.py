"""The nodes that are connected now, as Flower knows them: what a client's word can be held against."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedtune.foreign import for_screen


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        id: Flower's.
        name: under which the operator registered its key (`register.sh`); "" without node authentication.
        key: 32 hexadecimal digits of its registered public key. A node that nobody registered makes itself a key at every
            start, which says nothing: "".
    """

    id: int
    name: str = ""
    key: str = ""

    @property
    def label(self) -> str:
        """What people call it."""
        return f"Node {for_screen(self.name, 64) or self.id}"


def connected_nodes(grid: Grid) -> dict[int, Node]:
    """By id. A Grid that knows ids alone gives nodes without name and key."""
    try:
        found = list(grid.get_nodes())
    except (AttributeError, RuntimeError):  # it has no such method, or one that is not made
        return {node: Node(node) for node in grid.get_node_ids()}
    return {node.node_id: _registered(node.node_id, node.name, node.public_key) for node in found}


def _registered(node: int, name: str, public_key: bytes) -> Node:
    return Node(node, name, hashlib.sha256(public_key).hexdigest()[:32]) if name and public_key else Node(node)
