"""Where a payload stands in a message: it comes back, whatever its length, and what it weighs is what Flower serialises."""

from __future__ import annotations

import gc
import weakref

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_to_proto

from fedtune.records import LARGE, PAYLOAD, RECORD, content_with, is_large, payload_in, record_in
from server.replies import looks_usable, sent_down, sent_up
from simulations.engines import flower_internals as internals


def message(content: RecordDict) -> Message:
    internals.adopt_identity(1)
    return internals.give_id(Message(content, dst_node_id=7, message_type="train", ttl=30.0, group_id="3"), "m1")


@pytest.mark.parametrize("size", [0, 1, LARGE - 1, LARGE, (1 << 21) - 5000, (1 << 21) - 100, 1 << 21, 20_000_001, 1 << 28])
def test_a_payload_comes_back_and_its_weight_is_exact(size: int) -> None:
    """Also around a length at which a length takes a byte more, from 3 to 4; the next is 1 << 28."""
    payload = bytes(size)
    sent = message(content_with(payload, seconds=3.5))
    assert payload_in(sent) == payload
    assert is_large(sent) == (size >= LARGE)
    assert sent.content.config_records[RECORD]["seconds"] == 3.5
    assert looks_usable(sent)
    weight = sent_down(sent)
    assert (weight.payload_down, weight.serialised_down) == (size, message_to_proto(sent).ByteSize())
    assert sent_up(sent).serialised_up == weight.serialised_down


def test_a_large_payload_survives_flowers_own_bytes() -> None:
    payload = bytes(range(256)) * (LARGE // 256 + 1)
    arrived = internals.through_bytes(message(content_with(payload)))
    assert payload_in(arrived) == payload


def test_what_is_no_payload_is_none() -> None:
    """Whatever stands in its place; what an array says of itself is not looked at."""
    array = Array(dtype="float99", shape=(-5,), stype="x", data=b"abc")
    assert payload_in(message(RecordDict({PAYLOAD: ArrayRecord({"payload": array})}))) == b"abc"
    for content in (
        RecordDict({}),
        RecordDict({RECORD: ConfigRecord({"payload": "text"})}),
        RecordDict({RECORD: ConfigRecord({"payload": 5}), PAYLOAD: ArrayRecord({"payload": array})}),
        RecordDict({PAYLOAD: ArrayRecord({"other": array})}),
        RecordDict({PAYLOAD: ConfigRecord({"payload": b"abc"})}),
    ):
        assert payload_in(message(content)) is None
    assert payload_in(Message(Error(code=3, reason="x"), reply_to=message(RecordDict({})))) is None


def test_what_was_looked_at_is_freed_with_its_message() -> None:
    """Flower's own views of a message's records hold them in a cycle: a payload as large as the model would stay."""
    gc.collect()
    gc.disable()
    try:
        sent = message(content_with(bytes(LARGE), seconds=1.0))
        held = weakref.ref(sent.content[PAYLOAD]["payload"])  # type: ignore[index, arg-type]
        assert looks_usable(sent)
        assert len(payload_in(sent) or b"") == LARGE
        assert sent_up(sent).payload_up == LARGE
        assert record_in(sent) is not None
        del sent
        assert held() is None
    finally:
        gc.enable()
