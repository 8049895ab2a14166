"""The node-side worker as a process: a gRPC service that owns a device, and ends when nobody needs it.

`fedtune worker` runs it in the foreground; a ClientApp starts `python -m client.service` in the background. The contract
is worker.proto; the process is up before it imports torch, so that a handshake never waits for a model.
"""

from __future__ import annotations

import argparse
import hmac
import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client import worker_pb2 as pb
from client import worker_pb2_grpc as rpc
from client.address import Address, locked
from client.identity import Identity
from client.jobs import Jobs, T, Ticket
from client.keeper import Keeper
from client.messages import IDLE_SECONDS, LARGEST_MESSAGE, LONGEST_NAME, SERVICE, TOKEN, config_of, limits, problem_of
from client.version import code_version
from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, Interrupted, MalformedMessageError, WorkerVersionError
from fedtune.logs import begin
from fedtune.progress import ClientStep, Event, Note

GRACE_SECONDS = 10.0  # for a local step to end, when the process ends
_THREADS = 64  # of the transport: more than requests that may wait, so that a handshake never does
_log = logging.getLogger("fedtune.worker")


class Servicer(rpc.WorkerServicer):
    """The calls of worker.proto over a keeper.

    Attributes:
        faulty: an error came that nobody expected. The process should end: device and caches may be in any state.
    """

    def __init__(self, device: str, idle: float) -> None:
        self.jobs, self.faulty = Jobs(), False
        self._device, self._idle = device, idle
        self._keeper = Keeper()
        self._started = time.monotonic()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        """Who is here."""
        loaded = self._keeper.loaded
        return pb.Description(
            version=code_version(),
            device=self._device,
            pid=os.getpid(),
            model=loaded.model,
            placed=loaded.device,
            fingerprint=loaded.fingerprint,
            loads=loaded.loads,
            requests=self.jobs.finished,
            busy=self.jobs.busy,
            idle_seconds=self._idle,
            uptime_seconds=time.monotonic() - self._started,
            work_seconds=self.jobs.seconds,
        )

    def Introduce(self, request: pb.IntroduceRequest, context: grpc.ServicerContext) -> pb.IntroduceReply:
        """Load, and say what the client has."""
        try:
            config, who = self._read(request)
            label = f"introduction of client {who.client!r}"
            ticket = self._submit(request.request, label, context, lambda: self._keeper.introduce(config, who))
            for _ in ticket.events():
                pass
            said = self._result(ticket, context)
        except FedtuneError as error:
            return pb.IntroduceReply(problem=problem_of(error))
        found = pb.Introduction(
            examples=said.examples, fingerprint=said.fingerprint, layout=said.layout, selftest=said.selftest
        )
        return pb.IntroduceReply(introduction=found)

    def Train(self, request: pb.TrainRequest, context: grpc.ServicerContext) -> Iterator[pb.TrainEvent]:
        """One round of one client."""
        try:
            config, who = self._read(request)
            held = list(request.held)
            end = time.monotonic() + (request.seconds if request.HasField("seconds") else math.inf)
            label = f"training of client {who.client!r} in run {request.run!r}"

            def work() -> tuple[bytes, list[bytes]]:
                return self._keeper.train(config, request.run, who, request.instruction, held, end)

            ticket = self._submit(request.request, label, context, work)
            yield from filter(None, map(_told, ticket.events()))
            payload, keep = self._result(ticket, context)
        except FedtuneError as error:
            yield pb.TrainEvent(problem=problem_of(error))
        else:
            yield pb.TrainEvent(update=pb.Update(payload=payload, keep=keep))

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelReply:
        """End a request by its name."""
        return pb.CancelReply(found=self.jobs.cancel(request.request))

    # ------------------------------------------------------------------ a request

    def _read(self, request: pb.IntroduceRequest | pb.TrainRequest) -> tuple[RunConfig, Identity]:
        """Config and client of a request. Raises FedtuneError if it is not for this worker, or is no sound request."""
        if request.version != code_version():
            raise WorkerVersionError(
                f"The worker runs fedtune {code_version()}, the request is of {request.version or 'no version'}: stop the "
                "worker (`fedtune worker --stop`) and start it from the same sources."
            )
        who = request.client
        for what, name in (("request", request.request), ("run", request.run), ("client", who.id)):
            if not 0 < len(name) <= LONGEST_NAME:
                raise MalformedMessageError(f"The name of the {what} has {len(name)} characters: 1 to {LONGEST_NAME} it takes.")
        if who.partition < 0:
            raise MalformedMessageError(f"partition is {who.partition}: it counts from 0.")
        config = config_of(request.settings, request.settings_digest)
        if config.device != self._device:
            raise WorkerVersionError(
                f"This worker owns device '{self._device}', the request is for '{config.device}': give each device an address "
                "of its own."
            )
        return config, Identity(who.id, who.partition, who.data)

    def _submit(self, name: str, label: str, context: grpc.ServicerContext, work: Callable[[], T]) -> Ticket[T]:
        """Queue `work`; when the call ends before it does (deadline, cancelled, the caller died), the work ends too."""
        if self.jobs.closed:
            context.abort(grpc.StatusCode.UNAVAILABLE, "The worker is about to end; another one can be started.")
        ticket = self.jobs.submit(name, work, label)
        if not context.add_callback(ticket.cancel):
            ticket.cancel()
        return ticket

    def _result(self, ticket: Ticket[T], context: grpc.ServicerContext) -> T:
        try:
            found = ticket.result()
        except FedtuneError as error:
            if isinstance(error, Interrupted) and self.jobs.closed:
                context.abort(grpc.StatusCode.UNAVAILABLE, "The worker was stopped; another one can be started.")
            _log.info("%s: %s: %s", ticket, type(error).__name__, error)
            raise
        except BaseException as error:
            _log.exception("%s failed; this worker ends after its answer", ticket)
            self.faulty = True
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
            raise
        _log.info("%s: done in %.2f s", ticket, ticket.seconds)
        return found


def _told(event: Event) -> pb.TrainEvent | None:
    match event:
        case ClientStep():
            return pb.TrainEvent(step=pb.Step(step=event.step, steps=event.steps, loss=event.loss))
        case Note():
            return pb.TrainEvent(note=pb.Note(text=event.text, warning=event.warning))
        case _:
            return None


class _Guard(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Lets calls in that carry the token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def intercept_service(self, go_on: Callable[..., object], call: grpc.HandlerCallDetails) -> object:
        """The call's handler, or one that refuses."""
        given = dict(call.invocation_metadata).get(TOKEN, "")
        if hmac.compare_digest(str(given).encode(), self._token):
            return go_on(call)
        return grpc.unary_unary_rpc_method_handler(_refuse)


def _refuse(request: bytes, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "The token is not that of this worker.")


class Service:
    """A server that listens at an address. The caller holds the lock of the address's life."""

    def __init__(self, address: Address, device: str, idle: float, largest: int = LARGEST_MESSAGE) -> None:
        address.prepare()
        self.address, self.servicer, self._idle = address, Servicer(device, idle), idle
        self._stop = threading.Event()
        token = secrets.token_urlsafe(32) if address.kind == "tcp" else ""
        options = [*limits(largest), ("grpc.so_reuseport", 0)]
        guards = [_Guard(token)] if token else []
        self._server = grpc.server(ThreadPoolExecutor(_THREADS), options=options, interceptors=guards)
        rpc.add_WorkerServicer_to_server(self.servicer, self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        with _files_of_this_user_alone():  # a forwarder may look at the socket as soon as it is there
            port = self._server.add_insecure_port(f"unix:{address.path}" if address.kind == "unix" else "127.0.0.1:0")
        if address.kind == "tcp":
            address.publish(port, token)
        self._mark = _mark(address.path)
        self._server.start()

    def stop(self) -> None:
        """Ask `run` to return."""
        self._stop.set()

    def run(self) -> bool:
        """Serve until `stop`, until nobody came for the idle time (0: for ever), until a fault, or until the address is
        gone and nobody can come. Whether all work has ended.
        """
        while not self._stop.wait(min(1.0, self._idle / 4 or 1.0)):
            if self.servicer.faulty or _mark(self.address.path) != self._mark:
                break
            if self._idle and self.servicer.jobs.idle_seconds() > self._idle:
                break
        return self._close()

    def _close(self) -> bool:
        self._health.enter_graceful_shutdown()
        ended = self._server.stop(GRACE_SECONDS)
        done = self.servicer.jobs.close(GRACE_SECONDS)
        ended.wait(GRACE_SECONDS)
        if _mark(self.address.path) == self._mark:
            self.address.path.unlink(missing_ok=True)
        return done


@contextmanager
def _files_of_this_user_alone() -> Iterator[None]:
    """Files and sockets that the process makes meanwhile have mode 600 from their first moment."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _mark(path: Path) -> tuple[int, int] | None:
    """Which file is at `path`."""
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return None
    return state.st_dev, state.st_ino


def serve(address: Address, device: str, idle: float) -> None:
    """Be the worker of `device` at `address` until it is not needed any more.

    Raises:
        WorkerError: there is one at this address already, or the folder is not private.
    """
    code_version()  # of the sources as they are now, before more of them are imported
    with locked(address.life, 1.0, write=f"{os.getpid()}\n"):
        service = Service(address, device, idle)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        _log.info("fedtune %s, process %d, device %s, at %s", code_version(), os.getpid(), device, address)
        done = service.run()
        _log.info("ended")
        if not done:  # a step or a load that takes longer than the grace; nothing of it is kept
            logging.shutdown()
            os._exit(0)


def main() -> None:
    """`python -m client.service`: what a ClientApp starts."""
    parser = argparse.ArgumentParser(prog="python -m client.service", description="The worker in the background.")
    parser.add_argument("--address", type=Address.parse, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS)
    asked = parser.parse_args()
    begin()
    try:
        serve(asked.address, asked.device, asked.idle)
    except FedtuneError as error:
        _log.error("%s: %s", type(error).__name__, error)
        sys.exit(1)


if __name__ == "__main__":
    main()
