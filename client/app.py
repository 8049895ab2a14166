"""The Flower ClientApp: it unpacks a message, has the worker do the work, and packs the answer. No mathematics here.

A SuperNode starts a process for every message, which forwards to the node's long-lived worker and never imports torch; in
a simulation the worker is in this process. The node config decides (`worker`, docs/worker.md).

A problem that fedtune knows (its own error types) goes back as an answer with the type and the text, so that the server
can name it; anything else is a crash of the ClientApp and reaches the server as Flower's error.
"""

from __future__ import annotations

import math
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.identity import Identity, Trainer
from client.settings import on_a_node, settings_of
from fedtune.config import RunConfig, Scalar
from fedtune.errors import ConfigError, FedtuneError, Interrupted, MalformedMessageError
from fedtune.foreign import client_id, for_file
from fedtune.records import RECORD, content_with, payload_in, record_in

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Tell the server the stable client id, the number of samples, the base model and what its directions are."""
    try:
        me = identity(context)
        said = trainer(message, context).introduce(me)
    except Interrupted:
        raise
    except FedtuneError as error:
        return _problem(message, error)
    record = ConfigRecord(
        {
            "client": said.client,
            "examples": said.examples,
            "fingerprint": said.fingerprint,
            "layout": said.layout,
            "selftest": said.selftest,
        }
    )
    return Message(RecordDict({RECORD: record}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do the local steps of one round."""
    kept = context.state.config_records.get(RECORD, ConfigRecord({"pools": []}))
    try:
        payload, seconds = _payload(message), _seconds(message)
        held = _list_of_bytes(kept["pools"])
        update, pools = trainer(message, context).train(identity(context), payload, held, seconds)
    except Interrupted:
        raise
    except FedtuneError as error:
        return _problem(message, error)
    context.state[RECORD] = ConfigRecord({"pools": pools})
    return Message(content_with(update), reply_to=message)


def identity(context: Context) -> Identity:
    """Who this node is, from its node config: client-id and data (a deployment), or partition-id (a simulation).

    Raises ConfigError for a client id that is none.
    """
    node = context.node_config
    partition = int(node.get("partition-id", 0))
    data = str(node.get("data", ""))
    data = str(_absolute({"data": data})["data"]) if data else ""
    return Identity(client_id(str(node.get("client-id", partition)), ConfigError), partition, data)


def trainer(message: Message, context: Context) -> Trainer:
    """What does the work: the worker of this process, or the way to the node's.

    Node config: `worker` is "off", "auto" or an address; unset it is "auto" in the process that a SuperNode starts for one
    message, and "off" in any other, so that no simulation starts a worker. `worker-idle` are the seconds without work after
    which a worker that is started here ends.
    """
    node, config = context.node_config, settings_of(context.run_config, context.node_config)
    choice = str(node.get("worker", "auto" if on_a_node() else "off"))
    if choice == "off":
        from client.worker import worker

        return worker(config)
    from client.address import Address
    from client.forwarder import Forwarder
    from client.messages import IDLE_SECONDS

    address = None if choice == "auto" else Address.parse(choice)
    idle = _idle(node.get("worker-idle", IDLE_SECONDS))
    paths = ("model",) if node.get("data") else ("model", "data", "holdout_file")
    settings = config.as_mapping()
    config = config.replace(**_absolute({key: settings[key] for key in paths}))
    return Forwarder(address, config, str(context.run_id), seconds_left(message), idle)


def seconds_left(message: Message) -> float:
    """Seconds until `message` is worth no answer.

    The server's clock stamped it. An age that cannot be, below zero or above the time to live, means that the clocks of the
    two machines differ; then the whole time counts from now.
    """
    ttl, age = message.metadata.ttl, time.time() - message.metadata.created_at
    return ttl - age if 0 <= age < ttl else ttl


def _absolute(paths: dict[str, Scalar]) -> dict[str, Scalar]:
    """The settings `paths`, absolute: the worker runs in another folder than this process."""
    found = RunConfig.from_mapping(paths).with_absolute_paths().as_mapping()
    return {key: found[key] for key in paths}


def _idle(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"worker-idle in the node config is {value!r}: a number of seconds above 0 was expected.")
    return float(value)


def _payload(message: Message) -> bytes:
    payload = payload_in(message)
    if payload is None:
        raise MalformedMessageError("The instruction carries no payload of bytes: server and clients need the same fedtune.")
    return payload


def _seconds(message: Message) -> float:
    """What the server gives the local steps, from now on."""
    record = record_in(message)
    seconds = record.get("seconds", math.inf) if record else math.inf
    return float(seconds) if isinstance(seconds, int | float) else math.inf


def _list_of_bytes(value: object) -> list[bytes]:
    return [item for item in value if isinstance(item, bytes)] if isinstance(value, list) else []


def _problem(message: Message, error: FedtuneError) -> Message:
    record = ConfigRecord({"problem": type(error).__name__, "text": for_file(str(error))})  # without this machine's secrets
    return Message(RecordDict({RECORD: record}), reply_to=message)
