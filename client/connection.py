"""The forwarder's side of the worker: find it, start it when absent, restart it when dead, and refuse a wrong one.

Everything here ends by a deadline. A worker at an address of this user's own (`worker = "auto"`) is started and replaced
as needed; one at an address that the node's operator chose is theirs to start, and is only waited for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from client import worker_pb2 as pb
from client import worker_pb2_grpc as rpc
from client.address import Address, locked, private_folder
from client.messages import TOKEN, limits
from client.version import ROOT, code_version
from fedtune.errors import DeadlineError, WorkerAccessError, WorkerError, WorkerStartError, WorkerVersionError

START_SECONDS = 60.0  # until a new process answers; under a second on an idle machine
GREETING_SECONDS = 10.0  # for an answer of one that is there
HUNG_SECONDS = 20.0  # without an answer from a living process, after which it is killed
LARGEST_LOG = 1 << 20  # bytes, after which a log is begun anew and the one before is kept
_POLL_SECONDS = 0.05
_BUSY_POLL_SECONDS = 0.5


class Deadline:
    """A moment by which something must be done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then. Raises DeadlineError if it has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineError(
                f"The round's deadline of {self.seconds:.0f} s passed: its work was stopped. Raise round_timeout, or lower "
                "local_steps.",
                seconds=self.seconds,
            )
        return left


@dataclass(frozen=True)
class Connection:
    """An open channel to a worker that answered.

    Attributes:
        calls: the stub of worker.proto.
        metadata: to send with each call.
        worker: what it said of itself.
    """

    calls: rpc.WorkerStub
    metadata: tuple[tuple[str, str], ...]
    worker: pb.Description


@contextmanager
def connected(address: Address, device: str, deadline: Deadline, idle: float | None) -> Iterator[Connection]:
    """A connection to the worker of `device` at `address`.

    Args:
        address: where it is or should be.
        device: the setting of the run.
        deadline: for finding or starting it.
        idle: seconds after which a worker that is started here ends; None: it is not ours to start.

    Raises:
        WorkerStartError: it does not start, or is not there. `facts["tail"]` has the end of its log.
        WorkerAccessError: folder, socket or token are not of this user alone.
        WorkerVersionError: it runs other sources and is not ours to replace, or works until the deadline.
        DeadlineError: the deadline passed.
    """
    if idle is None:
        _wait_for(address, deadline)
    elif not _fits(greet(address, deadline.left())):
        private_folder(address.path.parent)
        with locked(address.start, deadline.left()):
            _ensure(address, device, deadline, idle)
    with _channel(address) as opened:
        if opened is None:
            raise WorkerStartError(f"The worker at {address} ended as soon as it had started: see '{address.log}'.")
        calls, metadata = opened
        yield Connection(calls, metadata, _describe(calls, metadata, deadline.left()))


def greet(address: Address, seconds: float = GREETING_SECONDS) -> pb.Description | None:
    """What the worker at `address` says of itself, or None if none answers. Raises WorkerAccessError."""
    with _channel(address) as opened:
        if opened is None:
            return None
        try:
            return _describe(*opened, seconds)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return None
            raise _refusal(address, error) from None


def stop(address: Address, seconds: float) -> bool:
    """End the worker at `address`, its step in hand first; whether there was one.

    Raises:
        WorkerError: it is still there after `seconds`.
    """
    pid = address.pid()
    if not pid:
        return False
    os.kill(pid, signal.SIGTERM)  # it holds the lock of its life, so the id is not another process's
    end = time.monotonic() + seconds
    while address.pid() == pid:
        if time.monotonic() > end:
            raise WorkerError(f"The worker {pid} at {address} has not ended after {seconds:.0f} s: kill -9 {pid}.", pid=pid)
        time.sleep(_POLL_SECONDS)
    return True


# ---------------------------------------------------------------------------------------------------- start, replace


def _ensure(address: Address, device: str, deadline: Deadline, idle: float) -> None:
    """Have a worker of these sources at `address`; the lock of starting is held."""
    silent_since = time.monotonic()
    while not _fits(found := greet(address, min(deadline.left(), GREETING_SECONDS))):
        if found is not None:
            _replace(address, found, deadline)
        elif address.pid() is None:
            _start(address, device, deadline, idle)
        elif time.monotonic() - silent_since > HUNG_SECONDS:
            _kill(address, deadline)
        silent_since = time.monotonic() if found is not None else silent_since
        time.sleep(_POLL_SECONDS)


def _fits(found: pb.Description | None) -> bool:
    return found is not None and found.version == code_version()


def _replace(address: Address, found: pb.Description, deadline: Deadline) -> None:
    """End a worker of other sources as soon as it has no work."""
    if not found.busy:
        stop(address, deadline.left())
    elif deadline.left() < 2.0:
        raise WorkerVersionError(
            f"The worker {found.pid} of fedtune {found.version} works for another run, and this node's app is "
            f"{code_version()}: let the node run one version, or stop the worker (`fedtune worker --stop`).",
            pid=found.pid,
        )
    else:
        time.sleep(_BUSY_POLL_SECONDS)


def _kill(address: Address, deadline: Deadline) -> None:
    """End a process that does not answer, and wait until the system has taken it away."""
    if pid := address.pid():
        os.kill(pid, signal.SIGKILL)
    while address.pid() is not None:
        time.sleep(min(_POLL_SECONDS, deadline.left()))


def _start(address: Address, device: str, deadline: Deadline, idle: float) -> None:
    """Start the process, and wait until it answers."""
    command = [sys.executable, "-P", "-m", "client.service", "--address", str(address), "--device", device, "--idle", str(idle)]
    with _opened_log(address) as log:
        process = subprocess.Popen(
            command,
            cwd=address.path.parent,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it lives longer than this process, and Ctrl-C is not for it
        )
    threading.Thread(target=process.wait, daemon=True).start()  # if it ends before this process, it is taken away
    give_up = time.monotonic() + min(START_SECONDS, deadline.left())
    while greet(address, 1.0) is None:
        ended = process.poll() is not None
        if ended and address.pid() is None:
            raise WorkerStartError(
                f"The worker ended with code {process.returncode} as it started: {_last_line(address)}", tail=_tail(address)
            )
        if time.monotonic() > give_up:
            raise WorkerStartError(f"The worker did not answer within {START_SECONDS:.0f} s.", tail=_tail(address))
        time.sleep(_POLL_SECONDS)


def _environment() -> dict[str, str]:
    """This process's environment, with the same fedtune importable."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(os.path.abspath, paths))), "PYTHONUNBUFFERED": "1"}


@contextmanager
def _opened_log(address: Address) -> Iterator[int]:
    """The log to append to, of its owner alone; a long one is put aside."""
    path = address.log
    if path.exists() and path.stat().st_size > LARGEST_LOG:
        path.replace(path.with_suffix(".log.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _tail(address: Address, lines: int = 20) -> tuple[str, ...]:
    return tuple(address.log.read_text(errors="replace").splitlines()[-lines:]) if address.log.exists() else ()


def _last_line(address: Address) -> str:
    return next(iter(_tail(address, 1)), "it said nothing.")


def _wait_for(address: Address, deadline: Deadline) -> None:
    """Wait for a worker that is somebody else's to start, for as long as a supervisor may need to restart it."""
    end = time.monotonic() + min(START_SECONDS, deadline.left())
    while (found := greet(address, min(deadline.left(), GREETING_SECONDS))) is None:
        if time.monotonic() > end:
            raise WorkerStartError(f"No worker answers at {address}: start it there (`fedtune worker --address {address}`).")
        time.sleep(_POLL_SECONDS)
    if not _fits(found):
        raise WorkerVersionError(
            f"The worker at {address} runs fedtune {found.version}, this node's app is {code_version()}: stop it and start "
            "it from the same sources."
        )


# ---------------------------------------------------------------------------------------------------- channels


@contextmanager
def _channel(address: Address) -> Iterator[tuple[rpc.WorkerStub, tuple[tuple[str, str], ...]] | None]:
    """Calls and metadata for the worker at `address`, or None if there is nothing to connect to."""
    target = address.target()
    if target is None:
        yield None
        return
    name, token = target
    options = [*limits(), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(name, options=options) as channel:
        yield rpc.WorkerStub(channel), ((TOKEN, token),) if token else ()


def _describe(calls: rpc.WorkerStub, metadata: tuple[tuple[str, str], ...], seconds: float) -> pb.Description:
    said: pb.Description = calls.Describe(pb.DescribeRequest(), timeout=min(seconds, GREETING_SECONDS), metadata=metadata)
    return said


def _refusal(address: Address, error: grpc.RpcError) -> WorkerError:
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return WorkerAccessError(f"The worker at {address} has another token than its file says: stop it, and remove the file.")
    return WorkerError(f"What listens at {address} is no worker: {error.code().name}: {error.details()}")
