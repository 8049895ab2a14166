"""Between fedtune's values and the messages of worker.proto: settings, problems, and the limits of both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from client import worker_pb2 as pb
from fedtune import errors
from fedtune.config import RunConfig, Scalar
from fedtune.errors import FedtuneError, MalformedMessageError
from fedtune.foreign import for_file

LARGEST_MESSAGE = (1 << 31) - (1 << 20)
"""Bytes, somewhat below gRPC's own limit: an update of 500 million weights in float32.

Both sides read a message's length first and refuse a longer one before they make room for it.
"""

IDLE_SECONDS = 1800.0
"""After so long without work a worker in the background ends, if its starter did not say otherwise."""

LONGEST_NAME = 128  # characters of a request's, run's or client's name

SERVICE = "fedtune.worker.v1.Worker"
TOKEN = "fedtune-token"  # key of gRPC's metadata


def limits(largest: int = LARGEST_MESSAGE) -> list[tuple[str, int]]:
    """gRPC's options that both sides share; a peer that hangs is found by a ping in half a minute."""
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", largest),
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 15_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def settings_of(config: RunConfig) -> list[pb.Setting]:
    """`config` as messages."""
    return [_setting(key, value) for key, value in config.as_mapping().items()]


def config_of(settings: Iterable[pb.Setting], digest: bytes) -> RunConfig:
    """The config that the messages hold.

    Raises:
        MalformedMessageError: a setting without a value, or settings that mean something else here than to the sender.
        ConfigError: a setting that cannot be used.
    """
    values: dict[str, Scalar] = {}
    for setting in settings:
        which = setting.WhichOneof("value")
        if which is None:
            raise MalformedMessageError(f"Setting '{setting.key}' came without a value.")
        values[setting.key] = getattr(setting, which)
    config = RunConfig.from_mapping(values)
    if settings_digest(config) != digest:
        raise MalformedMessageError("The settings mean something else to the worker than to the sender, or were damaged.")
    return config


def settings_digest(config: RunConfig) -> bytes:
    """Names all settings of `config`."""
    return hashlib.sha256(json.dumps(config.as_mapping(), sort_keys=True).encode()).digest()


def problem_of(error: FedtuneError) -> pb.Problem:
    """`error` as a message, which goes on to the server: without the node's secrets."""
    return pb.Problem(kind=type(error).__name__, text=for_file(str(error)))


def error_of(problem: pb.Problem) -> FedtuneError:
    """The error that `problem` names, of the same type if fedtune has it."""
    return errors.named(problem.kind)(problem.text)


def _setting(key: str, value: Scalar) -> pb.Setting:
    match value:
        case bool():
            return pb.Setting(key=key, truth=value)
        case int():
            return pb.Setting(key=key, whole=value)
        case float():
            return pb.Setting(key=key, real=value)
        case _:
            return pb.Setting(key=key, text=value)
