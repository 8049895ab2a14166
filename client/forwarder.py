"""What the ClientApp of a SuperNode calls: the two calls of a worker, done by the long-lived process of the node.

A request is sent again once if the worker dies under it; training starts from the round's model each time, so the answer
is the same. The step that the worker is in when the deadline passes is its last.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc

from client import worker_pb2 as pb
from client.address import Address
from client.connection import Connection, Deadline, connected
from client.identity import Identity, Introduction
from client.messages import IDLE_SECONDS, LARGEST_MESSAGE, error_of, settings_digest, settings_of
from client.version import code_version
from fedtune.config import RunConfig
from fedtune.errors import DeadlineError, FedtuneError, Interrupted, WorkerAccessError, WorkerError, WorkerStartError
from fedtune.progress import ClientStep, Note, check_stop, emit

T = TypeVar("T")


class Forwarder:
    """The worker of a node, reached from another process.

    Args:
        address: of the worker; None: of this user's own for the device of `config`, started when absent.
        config: of the run, with absolute paths.
        run: Flower's id of the run.
        seconds: until the deadline of the message.
        idle: seconds after which a worker that is started here ends.
    """

    def __init__(
        self, address: Address | None, config: RunConfig, run: str, seconds: float, idle: float = IDLE_SECONDS
    ) -> None:
        self.config, self.run = config, run
        self.deadline = Deadline(seconds)
        self._address = address or Address.own(config.device)
        self._idle = idle if address is None else None

    def introduce(self, identity: Identity) -> Introduction:
        """As `Worker.introduce`. Raises its errors, and those of `connected`."""
        return self._with_worker(lambda worker: self._introduce(worker, identity))

    def train(
        self, identity: Identity, message: bytes, held: Sequence[bytes], seconds: float = math.inf
    ) -> tuple[bytes, list[bytes]]:
        """As `Worker.train`, with the worker's steps emitted here. Raises its errors, and those of `connected`.

        `seconds` end before the deadline of the message does, so that the steps done become an update and not an error.
        """
        end = time.monotonic() + seconds
        size = len(message) + sum(map(len, held))
        if size > LARGEST_MESSAGE:
            raise WorkerError(f"A message of {size:,} bytes is too long for the worker, which takes {LARGEST_MESSAGE:,}.")
        return self._with_worker(lambda worker: self._train(worker, identity, message, held, end))

    # ------------------------------------------------------------------ the calls

    def _introduce(self, worker: Connection, who: Identity) -> Introduction:
        request = pb.IntroduceRequest()
        self._address_to(request, who)
        said = worker.calls.Introduce(request, timeout=self.deadline.left(), metadata=worker.metadata)
        if said.WhichOneof("outcome") != "introduction":
            raise error_of(said.problem)
        found = said.introduction
        return Introduction(who.client, found.examples, found.fingerprint, found.layout, found.selftest)

    def _train(
        self, worker: Connection, who: Identity, message: bytes, held: Sequence[bytes], end: float
    ) -> tuple[bytes, list[bytes]]:
        request = pb.TrainRequest(instruction=message, held=held, seconds=end - time.monotonic())
        self._address_to(request, who)
        call = worker.calls.Train(request, timeout=self.deadline.left(), metadata=worker.metadata)
        try:
            for event in call:
                if (update := self._take(event, who.client)) is not None:
                    return update.payload, list(update.keep)
        except Interrupted:
            worker.calls.Cancel(pb.CancelRequest(request=request.request), timeout=5.0, metadata=worker.metadata)
            raise
        finally:
            call.cancel()
        raise WorkerError("The worker ended its answer without an update: look into its log.")

    def _address_to(self, request: pb.IntroduceRequest | pb.TrainRequest, who: Identity) -> None:
        """Fill in what every request says: its name, whose it is, and with which settings and sources."""
        request.request, request.version, request.run = secrets.token_hex(8), code_version(), self.run
        request.settings.extend(settings_of(self.config))
        request.settings_digest = settings_digest(self.config)
        request.client.CopyFrom(pb.Client(id=who.client, partition=who.partition, data=who.data))

    def _take(self, event: pb.TrainEvent, client: str) -> pb.Update | None:
        """Pass on what the worker says; the update, once it is there."""
        match event.WhichOneof("event"):
            case "step":
                emit(ClientStep(client, event.step.step, event.step.steps, event.step.loss))
                check_stop()
            case "note":
                emit(Note(event.note.text, event.note.warning))
            case "problem":
                raise error_of(event.problem)
            case "update":
                return event.update
        return None

    # ------------------------------------------------------------------ a worker that answers

    def _with_worker(self, call: Callable[[Connection], T]) -> T:
        """What `call` returns, with another worker if the first one dies under it."""
        for last in (False, True):
            try:
                with connected(self._address, self.config.device, self.deadline, self._idle) as worker:
                    return call(worker)
            except grpc.RpcError as error:
                if last or error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise self._meaning(error) from None
                emit(Note(f"The worker ended during its work and is started again ({error.details()}).", warning=True))
        raise AssertionError("the second attempt returns or raises")

    def _meaning(self, error: grpc.RpcError) -> FedtuneError:
        """The error for a call that ended with a status instead of an answer."""
        status, details = error.code(), error.details()
        match status:
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return _deadline_error(self.deadline)
            case grpc.StatusCode.UNAUTHENTICATED:
                return WorkerAccessError(f"The worker at {self._address} refused the token: stop it, and remove the file.")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return WorkerError(f"A message is longer than the worker takes: {details}")
            case grpc.StatusCode.UNAVAILABLE:
                return WorkerStartError(
                    f"The worker ended twice during its work (not enough memory?): see '{self._address.log}'. {details}"
                )
        return WorkerError(f"The worker failed ({status.name}: {details}): see '{self._address.log}'.")


def _deadline_error(deadline: Deadline) -> FedtuneError:
    try:
        deadline.left()
    except DeadlineError as error:
        return error
    return WorkerError("The worker gave up before the deadline had passed.")
