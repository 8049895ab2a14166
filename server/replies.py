"""What arrives from clients: a reply's record or its problem, and what messages weigh. A client's word is cut and checked here.

Everything in a reply was written by somebody else: text is cut and escaped before it is looked at, an error type is taken
only from the table of those that a client's work can raise, and nothing but a FedtuneError leaves this file.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Message
from flwr.common.serde import message_to_proto

from fedtune import errors
from fedtune.errors import FedtuneError, MalformedMessageError, RunError
from fedtune.foreign import for_file
from fedtune.traffic import Traffic

RECORD = "fedtune"  # name of the one ConfigRecord in every message
LONGEST_SAID = 2000  # characters of a client's own words


def answers(reply: Message) -> str:
    """The id of the message that `reply` answers."""
    return str(reply.metadata.reply_to_message_id)


def record_of(reply: Message) -> ConfigRecord | None:
    """The record of a reply, if it has one."""
    return None if reply.has_error() else reply.content.config_records.get(RECORD)


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
    record = record_of(reply)
    if record is None:
        raise MalformedMessageError("The reply has no fedtune record.")
    if "problem" in record:
        raise _problem(record["problem"], record.get("text", ""))
    return record


def _problem(name: object, text: object) -> FedtuneError:
    if not isinstance(name, str) or not isinstance(text, str):
        return MalformedMessageError("The reply speaks of a problem, but not in words.")
    return errors.reported(name)(for_file(text, LONGEST_SAID) or "the client gives no reason")


def payload_of(record: ConfigRecord) -> bytes:
    """The payload in a record. Raises MalformedMessageError."""
    payload = record.get("payload")
    if not isinstance(payload, bytes):
        raise MalformedMessageError("The reply carries no payload of bytes.")
    return payload


def looks_usable(reply: Message) -> bool:
    """Whether a reply carries an update, sound or not; errors and problems do not."""
    record = record_of(reply)
    return record is not None and "problem" not in record and isinstance(record.get("payload"), bytes)


def is_behind(reply: Message) -> bool:
    """Whether the client answered that it lacks pools which the instruction builds upon."""
    record = record_of(reply)
    return record is not None and record.get("problem") == errors.StaleReplicaError.__name__


# ---------------------------------------------------------------------------------------------------- weight


def sent_down(message: Message) -> Traffic:
    """What an instruction weighs."""
    payload, serialised = _weight(message)
    return Traffic(payload_down=payload, serialised_down=serialised, messages_down=1)


def sent_up(reply: Message) -> Traffic:
    """What a client's answer weighs; only one with a payload counts as a message of a round."""
    payload, serialised = _weight(reply)
    return Traffic(payload_up=payload, serialised_up=serialised, messages_up=1 if payload else 0)


def _weight(message: Message) -> tuple[int, int]:
    """Bytes of the payload, and of the message as Flower serialises it."""
    record = record_of(message)
    payload = record.get("payload") if record else None
    return len(payload) if isinstance(payload, bytes) else 0, message_to_proto(message).ByteSize()
