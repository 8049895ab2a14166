"""What reaches a node's worker on its socket: requests as protobuf, from any process of the same user."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from client import worker_pb2 as pb
from client.identity import Identity
from client.messages import config_of, error_of, settings_digest, settings_of
from client.service import Servicer
from client.version import code_version
from fedtune.config import RunConfig
from fedtune.errors import FedtuneError
from tests.fuzz.harness import bounded, fuzz
from tests.fuzz.mutations import mutated, noise

CONFIG = RunConfig(device="cpu")


def request(**changes: object) -> bytes:
    """A sound request to train."""
    plain = {
        "request": "r", "version": code_version(), "run": "1", "settings": settings_of(CONFIG),
        "settings_digest": settings_digest(CONFIG), "client": pb.Client(id="a", partition=1), "instruction": b"FT" * 40,
        "held": [b"pool"], "seconds": 1.0,
    }  # fmt: skip
    return pb.TrainRequest(**{**plain, **changes}).SerializeToString()


def keeps_nothing(*_: object) -> tuple[bytes, list[bytes]]:
    """In the place of the work itself."""
    return b"", []


class Call:
    """gRPC's side of a call that nobody cancels."""

    def add_callback(self, _: object) -> bool:
        return True

    def abort(self, code: object, details: str) -> None:
        raise AssertionError(f"the call was aborted: {code}, {details}")


@pytest.fixture(scope="module")
def servicer() -> Iterator[Servicer]:
    """A worker of the CPU that does no work."""
    made = Servicer("cpu", 0.0)
    made._keeper.train = keeps_nothing  # type: ignore[method-assign]
    yield made
    made.jobs.close(1.0)


def outcome(servicer: Servicer, data: bytes) -> str | None:
    """How a call of Train ends: "update", or "problem"."""
    try:
        asked = pb.TrainRequest.FromString(data)
    except DecodeError:  # gRPC ends such a call before a servicer sees it
        return None
    events = list(servicer.Train(asked, Call()))  # type: ignore[arg-type]
    return events[-1].WhichOneof("event")


def test_the_request_to_begin_from_is_worked_on(servicer: Servicer) -> None:
    assert outcome(servicer, request()) == "update"
    assert outcome(servicer, request(run="")) == "problem"


@fuzz(mutated([request(), request(seconds=float("nan")), request(held=[b"p" * 40] * 50)]) | noise(request()[:20]), short=150)
def test_a_request_is_worked_on_or_refused(servicer: Servicer, data: bytes) -> None:
    found = bounded(data, lambda message: outcome(servicer, message), ())
    assert found in (None, "update", "problem")


VALUES = st.one_of(
    st.text(max_size=30).map(lambda text: {"text": text}),
    st.integers(-(2**63), 2**63 - 1).map(lambda whole: {"whole": whole}),
    st.floats().map(lambda real: {"real": real}),
    st.booleans().map(lambda truth: {"truth": truth}),
    st.just({}),
)
SETTINGS = st.lists(
    st.tuples(st.sampled_from(sorted(RunConfig.model_fields)) | st.text(max_size=8), VALUES).map(
        lambda pair: pb.Setting(key=pair[0], **pair[1])
    ),
    max_size=3,
)


@fuzz(SETTINGS)
def test_settings_are_read_or_refused(found: list[pb.Setting]) -> None:
    """Those of a sound request, some of them replaced by the last of the same name."""
    sent = [*settings_of(CONFIG), *found]
    bounded(b"", lambda _: config_of(sent, settings_digest(CONFIG)), FedtuneError, measured=False)


NAMES = st.text(max_size=20) | st.sampled_from(["FedtuneError", "RunError", "annotations", "__name__"])


@fuzz(st.tuples(NAMES, st.text()), short=80)
def test_a_problem_becomes_an_error_of_fedtune(found: tuple[str, str]) -> None:
    assert isinstance(error_of(pb.Problem(kind=found[0], text=found[1])), FedtuneError)


def test_an_identity_is_what_the_request_says(servicer: Servicer) -> None:
    assert servicer._read(pb.TrainRequest.FromString(request()))[1] == Identity("a", 1, "")
