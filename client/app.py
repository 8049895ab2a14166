"""The Flower ClientApp: it unpacks a message, has the worker do the work, and packs the answer. No mathematics here.

A problem that fedtune knows (its own error types) goes back as an answer with the type and the text, so that the server
can name it; anything else is a crash of the ClientApp and reaches the server as Flower's error.
"""

from __future__ import annotations

import math

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.worker import Identity, worker
from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, Interrupted

RECORD = "fedtune"  # name of the one ConfigRecord in every message, and of the client's state in Flower's context

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Tell the server the stable client id, the number of samples and the base model."""
    try:
        me = identity(context)
        said = worker(_config(context)).introduce(me)
    except Interrupted:
        raise
    except FedtuneError as error:
        return _problem(message, error)
    record = ConfigRecord(
        {"client": said.client, "examples": said.examples, "fingerprint": said.fingerprint, "layout": said.layout}
    )
    return Message(RecordDict({RECORD: record}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do the local steps of one round."""
    kept = context.state.config_records.get(RECORD, ConfigRecord({"pools": []}))
    try:
        payload, seconds = _payload(message), _seconds(message)
        update, pools = worker(_config(context)).train(identity(context), payload, _list_of_bytes(kept["pools"]), seconds)
    except Interrupted:
        raise
    except FedtuneError as error:
        return _problem(message, error)
    context.state[RECORD] = ConfigRecord({"pools": pools})
    return Message(RecordDict({RECORD: ConfigRecord({"payload": update})}), reply_to=message)


def identity(context: Context) -> Identity:
    """Who this node is, from its node config: client-id and data (a deployment), or partition-id (a simulation)."""
    node = context.node_config
    partition = int(node.get("partition-id", 0))
    return Identity(str(node.get("client-id", partition)), partition, str(node.get("data", "")))


def _config(context: Context) -> RunConfig:
    settings = dict(context.run_config)
    if "model" in context.node_config:
        settings["model"] = context.node_config["model"]
    if "device" in context.node_config:
        settings["device"] = context.node_config["device"]
    return RunConfig.from_mapping(settings)


def _payload(message: Message) -> bytes:
    payload = message.content.config_records[RECORD]["payload"]
    if not isinstance(payload, bytes):
        raise TypeError(f"payload is {type(payload).__name__}, not bytes")
    return payload


def _seconds(message: Message) -> float:
    """What the server gives the local steps, from now on."""
    seconds = message.content.config_records[RECORD].get("seconds", math.inf)
    return float(seconds) if isinstance(seconds, int | float) else math.inf


def _list_of_bytes(value: object) -> list[bytes]:
    return [item for item in value if isinstance(item, bytes)] if isinstance(value, list) else []


def _problem(message: Message, error: FedtuneError) -> Message:
    record = ConfigRecord({"problem": type(error).__name__, "text": str(error)})
    return Message(RecordDict({RECORD: record}), reply_to=message)
