"""The service over a real socket, in this process: what it refuses, by which error, and that it goes on afterwards."""

from __future__ import annotations

import json
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from flwr.app import Message
from grpc._server import _Server
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import forwarder as forwarding
from client import worker_pb2 as pb
from client import worker_pb2_grpc as rpc
from client.address import Address, locked
from client.connection import greet
from client.forwarder import Forwarder
from client.identity import Identity
from client.messages import SERVICE, settings_digest, settings_of
from client.pools import KeptPools
from client.service import Service
from client.version import code_version
from client.worker import Worker
from fedtune.config import RunConfig
from fedtune.errors import DataError, FedtuneError, Interrupted, WorkerAccessError, WorkerError, WorkerVersionError
from tests.client.conftest import MakeInstruction, MakeService, wait_until
from tests.client.federation import rounds

WHO = Identity("0", 0)


@contextmanager
def stub(service: Service) -> Iterator[rpc.WorkerStub]:
    with grpc.insecure_channel(f"unix:{service.address.path}") as channel:
        yield rpc.WorkerStub(channel)


def request_of(config: RunConfig, message: bytes = b"", **changes: object) -> pb.TrainRequest:
    """A sound request, but for `changes`."""
    fields: dict[str, object] = {
        "request": "a",
        "version": code_version(),
        "run": "1",
        "settings": settings_of(config),
        "settings_digest": settings_digest(config),
        "client": pb.Client(id="0"),
        "instruction": message,
    }
    return pb.TrainRequest(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_same_bytes_as_in_process(service: MakeService, settings: RunConfig, instruction: MakeInstruction) -> None:
    for kind in ("unix", "tcp"):
        forwarder = Forwarder(service(kind).address, settings, "1", 60.0)
        assert forwarder.introduce(WHO) == Worker(settings).introduce(WHO)
        message = instruction(settings)
        assert forwarder.train(WHO, message, []) == Worker(settings).train(WHO, message, [])


def test_without_time_left_one_step_is_the_update(
    service: MakeService, settings: RunConfig, instruction: MakeInstruction
) -> None:
    message = instruction(settings)
    found = Forwarder(service().address, settings, "1", 60.0).train(WHO, message, [], 0.0)
    assert found == Worker(settings).train(WHO, message, [], 0.0)
    assert found != Worker(settings).train(WHO, message, [])


def test_an_own_problem_keeps_its_type_and_the_worker_goes_on(service: MakeService, settings: RunConfig) -> None:
    forwarder = Forwarder(service().address, settings, "1", 60.0)
    with pytest.raises(DataError, match=r"no data file '/nowhere/x\.jsonl'"):
        forwarder.introduce(replace(WHO, data="/nowhere/x.jsonl"))
    with pytest.raises(FedtuneError) as refused:
        forwarder.train(WHO, b"garbage", [])
    assert type(refused.value).__name__ == "MalformedMessageError"
    assert forwarder.introduce(WHO).examples > 0


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"version": "0.0.1+x"}, "WorkerVersionError", "the request is of 0.0.1+x: stop the worker"),
        ({"version": ""}, "WorkerVersionError", "the request is of no version"),
        ({"settings_digest": b"?" * 32}, "MalformedMessageError", "mean something else to the worker than to the sender"),
        ({"settings": [pb.Setting(key="K")]}, "MalformedMessageError", "Setting 'K' came without a value"),
        ({"settings": [pb.Setting(key="K", text="many")]}, "ConfigError", "Setting 'K' = 'many'"),
        ({"settings": [pb.Setting(key="Kk", whole=3)]}, "UnknownSettingError", "no setting 'Kk'"),
        ({"request": ""}, "MalformedMessageError", "The name of the request has 0 characters"),
        ({"run": "r" * 129}, "MalformedMessageError", "The name of the run has 129 characters"),
        ({"client": pb.Client()}, "MalformedMessageError", "The name of the client has 0 characters"),
        ({"client": pb.Client(id="0", partition=-1)}, "MalformedMessageError", "partition is -1"),
        ({"instruction": b"x" * 100}, "MalformedMessageError", "This is not a fedtune message."),
    ],
)
def test_unsound_requests_are_refused_by_name(
    service: MakeService, settings: RunConfig, changes: dict[str, object], kind: str, text: str
) -> None:
    with stub(service()) as calls:
        events = list(calls.Train(request_of(settings, **changes), timeout=30))
    assert [event.WhichOneof("event") for event in events] == ["problem"]
    assert events[0].problem.kind == kind
    assert text in events[0].problem.text


def test_another_device_is_refused(service: MakeService, settings: RunConfig) -> None:
    with pytest.raises(
        WorkerVersionError, match=r"owns device 'cpu', the request is for 'cuda:1': give each device an address"
    ):
        Forwarder(service().address, settings.replace(device="cuda:1"), "1", 60.0).introduce(WHO)


def test_another_version_at_a_given_address_is_refused(
    service: MakeService, settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = service().address
    monkeypatch.setattr("client.connection.code_version", lambda: "9.9+other")
    with pytest.raises(WorkerVersionError, match=r"this node's app is 9\.9\+other: stop it and start it from the same sources"):
        Forwarder(address, settings, "1", 60.0).introduce(WHO)


def test_a_long_message_is_refused_on_both_sides(
    service: MakeService, settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = service(largest=10_000)
    forwarder = Forwarder(small.address, settings, "1", 60.0)
    with pytest.raises(WorkerError, match="A message is longer than the worker takes"):
        forwarder.train(WHO, bytes(20_000), [])
    assert small.servicer.jobs.finished == 0
    monkeypatch.setattr(forwarding, "LARGEST_MESSAGE", 1_000)
    with pytest.raises(WorkerError, match="A message of 1,500 bytes is too long for the worker, which takes 1,000"):
        forwarder.train(WHO, bytes(1_000), [bytes(500)])
    assert forwarder.introduce(WHO).examples > 0


def test_garbage_in_place_of_a_message_is_refused(service: MakeService) -> None:
    one = service()
    with grpc.insecure_channel(f"unix:{one.address.path}") as channel:
        for method in ("Introduce", "Cancel"):
            call = channel.unary_unary(f"/{SERVICE}/{method}")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"\xff" * 100, timeout=10)
            assert refused.value.code() == grpc.StatusCode.INTERNAL
    assert greet(one.address).requests == 0


def test_the_token_opens_a_port_and_nothing_else_does(service: MakeService, settings: RunConfig) -> None:
    one = service("tcp")
    path = one.address.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    held = json.loads(path.read_text())
    assert len(held["token"]) > 40
    for token in ("", "x", held["token"][:-1]):
        metadata = [("fedtune-token", token)] if token else []
        with grpc.insecure_channel(f"127.0.0.1:{held['port']}") as channel, pytest.raises(grpc.RpcError) as refused:
            list(rpc.WorkerStub(channel).Train(request_of(settings), timeout=10, metadata=metadata))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    path.write_text(json.dumps({**held, "token": "wrong"}))
    with pytest.raises(WorkerAccessError, match="has another token than its file says"):
        Forwarder(one.address, settings, "1", 5.0).introduce(WHO)
    path.write_text("{}")
    with pytest.raises(WorkerAccessError, match="does not hold the port and token of a worker"):
        Forwarder(one.address, settings, "1", 5.0).introduce(WHO)


def open_to_others(path: Path) -> None:
    path.chmod(0o666)


def open_folder(path: Path) -> None:
    path.parent.chmod(0o755)


def not_a_socket(path: Path) -> None:
    path.unlink()
    path.write_text("")


def a_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (open_to_others, r"is open to other users \(mode 666\): chmod 600"),
        (open_folder, r"is open to other users \(mode 755\): chmod 700"),
        (not_a_socket, "should be a socket and is something else: remove it"),
        (a_link, "should be a socket and is something else: remove it"),
    ],
)
def test_nothing_is_sent_where_others_may_listen(
    service: MakeService, settings: RunConfig, change: Callable[[Path], None], text: str
) -> None:
    one = service()
    change(one.address.path)
    with pytest.raises(WorkerAccessError, match=text):
        Forwarder(one.address, settings, "1", 5.0).introduce(WHO)
    assert one.servicer.jobs.finished == 0


def test_a_socket_is_its_owners_from_its_first_moment(service: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forwarder may look as soon as it is there, and refuses one that others can open."""
    found, bind = [], _Server.add_insecure_port

    def bound(server: grpc.Server, place: str) -> int:
        port: int = bind(server, place)
        found.append(stat.S_IMODE(Path(place.removeprefix("unix:")).stat().st_mode))
        return port

    monkeypatch.setattr(_Server, "add_insecure_port", bound)
    service()
    assert found == [0o600]


def test_another_users_socket_is_refused(service: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    address = service().address
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(WorkerAccessError, match=r"belongs to user \d+, not to user 12345: remove it, run the SuperNode as"):
        greet(address)


def test_a_port_that_nobody_holds_any_more_never_gets_the_token(service: MakeService, workers: Path) -> None:
    """The file of a dead worker stays; its port may be another program's, here that of a live service."""
    left = Address("tcp", workers / "left.port")
    left.path.write_bytes(service("tcp").address.path.read_bytes())
    left.path.chmod(0o600)
    assert left.target() is None
    assert greet(left) is None
    with locked(left.life, 1.0):
        assert greet(left) is not None


def test_health_is_told(service: MakeService) -> None:
    one = service()
    with grpc.insecure_channel(f"unix:{one.address.path}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", SERVICE):
            answer = check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_cancel_by_name(service: MakeService, settings: RunConfig, instruction: MakeInstruction) -> None:
    one = service()
    long = settings.replace(local_steps=1_000_000)
    message = instruction(long)
    outcome: list[pb.TrainEvent] = []
    with stub(one) as calls:
        assert not calls.Cancel(pb.CancelRequest(request="nobody"), timeout=10).found
        working = threading.Thread(target=lambda: outcome.extend(calls.Train(request_of(long, message), timeout=60)))
        working.start()
        wait_until(lambda: greet(one.address).busy == 1)
        second = list(calls.Train(request_of(long, message), timeout=60))
        assert "There is a request 'a' already" in second[0].problem.text
        assert calls.Cancel(pb.CancelRequest(request="a"), timeout=10).found
        working.join()
    assert (outcome[-1].problem.kind, one.servicer.jobs.busy) == (Interrupted.__name__, 0)
    assert "stopped after the step in hand" in outcome[-1].problem.text or "before its work began" in outcome[-1].problem.text


def test_an_error_that_nobody_expected_ends_the_worker_after_its_answer(
    service: MakeService, settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = service()
    monkeypatch.setattr("client.keeper.Keeper.introduce", lambda *_: 1 / 0)
    with pytest.raises(WorkerError, match=r"The worker failed \(INTERNAL: ZeroDivisionError: division by zero\): see '.*log'"):
        Forwarder(one.address, settings, "1", 60.0).introduce(WHO)
    assert one.run()
    assert greet(one.address) is None


def test_changed_files_are_noticed(service: MakeService, settings: RunConfig, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(settings.data).read_text().splitlines()]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    forwarder = Forwarder(service().address, settings, "1", 60.0)
    me = replace(WHO, data=str(own))
    before = forwarder.introduce(me).examples
    own.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    after = forwarder.introduce(me).examples
    assert before - after == 10


def test_another_or_a_changed_model_is_loaded_anew(
    service: MakeService, settings: RunConfig, tiny_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    one = service()
    first = Forwarder(one.address, settings, "1", 60.0).introduce(WHO)
    other = Forwarder(one.address, settings.replace(model=str(copy)), "1", 60.0)
    assert other.introduce(WHO) == first
    assert greet(one.address).loads == 2
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert other.introduce(WHO).examples == first.examples
    assert (greet(one.address).loads, greet(one.address).model) == (3, str(copy))


def test_pools_that_lead_elsewhere_are_dropped_and_asked_for_again(
    service: MakeService, settings: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings.replace(algorithm="ferret", K=200, pool_every=1, rounds=4, local_steps=2, lr=1e-2, eps=5e-4)
    one = service()
    right = rounds(config, forget_state=False, worker="off")

    def spoil(message: Message) -> None:
        """In round 4, which builds upon two pools, every client's pools are in the wrong order."""
        if message.metadata.group_id == "4":
            monkeypatch.setattr(KeptPools, "of", lambda self, run, client: list(reversed(of(self, run, client))))

    of = KeptPools.of
    outcome = rounds(config, forget_state=True, worker=str(one.address), before=spoil)
    assert outcome.digest == right.digest
    assert outcome.problems == ["StaleReplicaError"] * 4


def test_the_address_of_a_worker_that_is_gone_answers_nobody(workers: Path) -> None:
    assert greet(Address("unix", workers / "none.sock")) is None


@pytest.mark.parametrize("end", ["idle", "gone"])
def test_it_ends_when_idle_and_when_nobody_can_reach_it(service: MakeService, end: str) -> None:
    """The same of processes: tests/client/test_worker_process.py."""
    begun = time.monotonic()
    one = service(idle=1.0 if end == "idle" else 0.0)
    ended: list[tuple[bool, float]] = []
    thread = threading.Thread(target=lambda: ended.append((one.run(), time.monotonic() - begun)))
    thread.start()
    assert greet(one.address) is not None
    if end == "gone":
        one.address.path.unlink()
    thread.join(30.0)
    assert [done for done, _ in ended] == [True]
    assert end == "gone" or ended[0][1] >= 1.0
    assert greet(one.address) is None
    assert not one.address.path.exists()
