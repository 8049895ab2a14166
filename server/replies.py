"""What arrives from clients: a reply's record or its problem, and what messages weigh. A client's word is cut and checked here.

Everything in a reply was written by somebody else: text is cut and escaped before it is looked at, an error type is taken
only from the table of those that a client's work can raise, and nothing but a FedtuneError leaves this file.
"""

from __future__ import annotations

import copy

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto

from fedtune import errors
from fedtune.errors import FedtuneError, MalformedMessageError, RunError
from fedtune.foreign import for_file
from fedtune.records import PAYLOAD, content_with, is_large, payload_in, record_in
from fedtune.traffic import Traffic

LONGEST_SAID = 2000  # characters of a client's own words


def answers(reply: Message) -> str:
    """The id of the message that `reply` answers."""
    return str(reply.metadata.reply_to_message_id)


def content_of(reply: Message) -> ConfigRecord:
    """The record of a reply that says no problem.

    Raises:
        FedtuneError: the client's own problem, of the type that it names. RunError: the client crashed.
        MalformedMessageError: there is no record, or its problem is no text.
    """
    if reply.has_error():
        reason = for_file(str(reply.error.reason), LONGEST_SAID)
        code = reply.error.code
        raise RunError(f"the client failed (Flower code {code}): {reason}", code=code)
    record = record_in(reply)
    if record is None:
        raise MalformedMessageError("The reply has no fedtune record.")
    if "problem" in record:
        raise _problem(record["problem"], record.get("text", ""))
    return record


def _problem(name: object, text: object) -> FedtuneError:
    if not isinstance(name, str) or not isinstance(text, str):
        return MalformedMessageError("The reply speaks of a problem, but not in words.")
    return errors.reported(name)(for_file(text, LONGEST_SAID) or "the client gives no reason")


def payload_of(reply: Message) -> bytes:
    """The payload of a reply that says no problem. Raises MalformedMessageError."""
    payload = payload_in(reply)
    if payload is None:
        raise MalformedMessageError("The reply carries no payload of bytes.")
    return payload


def looks_usable(reply: Message) -> bool:
    """Whether a reply carries an update, sound or not; errors and problems do not."""
    record = record_in(reply)
    return record is not None and "problem" not in record and payload_in(reply) is not None


def is_behind(reply: Message) -> bool:
    """Whether the client answered that it lacks pools which the instruction builds upon."""
    record = record_in(reply)
    return record is not None and record.get("problem") == errors.StaleReplicaError.__name__


# ---------------------------------------------------------------------------------------------------- weight


_SHORT, _LONG = 1 << 14, 1 << 21  # payloads whose lengths, and those of what is around them, are numbers of 3 and 4 bytes
_NEAR = 1 << 12  # bytes that what is around a payload has at most


def sent_down(message: Message) -> Traffic:
    """What an instruction weighs."""
    payload, serialised = _weight(message)
    return Traffic(payload_down=payload, serialised_down=serialised, messages_down=1)


def sent_up(reply: Message) -> Traffic:
    """What a client's answer weighs; only one with a payload counts as a message of a round."""
    payload, serialised = _weight(reply)
    return Traffic(payload_up=payload, serialised_up=serialised, messages_up=1 if payload else 0)


def _weight(message: Message) -> tuple[int, int]:
    """Bytes of the payload, and of the message as Flower serialises it; a large payload is not copied to learn that."""
    payload = payload_in(message)
    size = len(payload or b"")
    if not is_large(message) or len(_varint(size)) != len(_varint(size + _NEAR)):
        return size, _serialised(message)
    short, long = (_serialised(_with_payload(message, bytes(length))) for length in (_SHORT, _LONG))
    lengths = long - short - (_LONG - _SHORT)  # that grow by a byte from 3 to 4: those of what is around the payload, and it
    return size, long + size - _LONG + lengths * (len(_varint(size)) - len(_varint(_LONG)))


def _serialised(message: Message) -> int:
    return int(message_to_proto(message).ByteSize())


def _with_payload(message: Message, payload: bytes) -> Message:
    """The same message with another payload in the array."""
    other = copy.copy(message)
    changed = content_with(payload, large=True)
    other.__dict__["_content"] = RecordDict({**message.content, PAYLOAD: changed[PAYLOAD]})
    return other


def _varint(number: int) -> bytes:
    """A length as protobuf writes it, 7 bits a byte."""
    return bytes(-(-number.bit_length() // 7))
