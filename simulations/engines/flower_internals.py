"""Everything that the engines need from Flower's private modules, so that a new Flower release breaks one file."""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path

from flwr.app import Error, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage  # type: ignore[import-untyped, unused-ignore]
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CLIENT_RAISED",
    "MESSAGE_UNAVAILABLE",
    "SUPERLINK",
    "NodeInfo",
    "Run",
    "adopt_identity",
    "bundle_size",
    "empty_run",
    "expired",
    "give_id",
    "restamp",
    "through_bytes",
]

SUPERLINK = 1  # node id of the SuperLink, and of the ServerApp
CLIENT_RAISED = 2  # flwr.common.constant.ErrorCode: the ClientApp raised
MESSAGE_UNAVAILABLE = 3  # flwr.common.constant.ErrorCode: the message expired or does not exist


def adopt_identity(run_id: int) -> None:
    """Let `Message(...)` be constructed in this process; Flower keeps the identity of a task in class attributes."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK


def empty_run(run_id: int) -> Run:
    """Run information without an app bundle."""
    return Run.create_empty(run_id)


def give_id(message: Message, message_id: str) -> Message:
    """Set the id that a SuperLink would assign; the attribute has no public setter."""
    message.metadata.__dict__["_message_id"] = message_id
    return message


def restamp(message: Message) -> Message:
    """The same content with a copy of the metadata that counts its time to live from now."""
    fresh, metadata = copy.copy(message), copy.copy(message.metadata)
    metadata.created_at = time.time()
    fresh.__dict__["_metadata"] = metadata
    return fresh


def through_bytes(message: Message) -> Message:
    """What arrives when `message` is sent: it is serialised to protobuf bytes and read back.

    Raises:
        Exception: whatever Flower raises for content that cannot be sent.
    """
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))


def expired(message: Message, reason: str) -> Message:
    """The SuperLink's reply to a message whose time to live is over."""
    reply = Message(Error(code=MESSAGE_UNAVAILABLE, reason=reason), reply_to=message)
    reply.metadata.__dict__.update(_src_node_id=SUPERLINK, _ttl=0.0)
    return reply


def bundle_size(app: Path) -> int:
    """Bytes of the bundle that `flwr run` makes of the app folder `app`."""
    from flwr.cli.build import build_fab_from_disk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower names its patterns in an old way
        return len(build_fab_from_disk(app))
