"""The records of Flower's messages that fedtune writes: their names, and where a payload stands in them.

A message has one ConfigRecord, RECORD. A payload is its entry "payload"; one of LARGE bytes or more is the data of an array
in an ArrayRecord, PAYLOAD, instead: Flower cuts arrays into pieces of 5 MB on their way, and nothing else. Its dtype and shape
say nothing more, and are not looked at when it is read.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

RECORD = "fedtune"
PAYLOAD = "fedtune.payload"
LARGE = 1 << 20
"""Bytes: far above what a method of few numbers sends. Below it a message is one object of Flower's."""


def content_with(payload: bytes, *, large: bool | None = None, **others: str | int | float) -> RecordDict:
    """The content of a message with a payload and other entries; `large` says how it is written, whatever its length."""
    if not (len(payload) >= LARGE if large is None else large):
        return RecordDict({RECORD: ConfigRecord({"payload": payload, **others})})
    array = Array(dtype="uint8", shape=(len(payload),), stype="fedtune.bytes", data=payload)
    return RecordDict({RECORD: ConfigRecord({**others}), PAYLOAD: ArrayRecord({"payload": array})})


def record_in(message: Message) -> ConfigRecord | None:
    """The ConfigRecord of a message, if it has one.

    Not by `config_records`: each look at that is a view that holds all records until Python looks for cycles.
    """
    found = None if message.has_error() else message.content.get(RECORD)
    return found if isinstance(found, ConfigRecord) else None


def payload_in(message: Message) -> bytes | None:
    """The payload of a message; None if it has none, or something else in its place."""
    record, arrays = record_in(message), _arrays_in(message)
    if record is not None and "payload" in record:
        found: object = record["payload"]
    else:
        found = arrays["payload"].data if arrays is not None and "payload" in arrays else None
    return found if isinstance(found, bytes) else None


def is_large(message: Message) -> bool:
    """Whether the payload of a message stands in an array."""
    return _arrays_in(message) is not None


def _arrays_in(message: Message) -> ArrayRecord | None:
    found = None if message.has_error() else message.content.get(PAYLOAD)
    return found if isinstance(found, ArrayRecord) else None
