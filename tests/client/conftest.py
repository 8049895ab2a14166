"""A private folder for workers, short enough for a socket, and instructions as a server would write them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from client.address import Address, locked
from client.service import Service
from fedtune import wire
from fedtune.config import RunConfig
from fedtune.resident import Resident
from fedtune.wire import Instruction

MakeInstruction = Callable[[RunConfig], bytes]
MakeService = Callable[..., Service]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of this test's workers, which are all ended with it."""
    folder = Path(tempfile.mkdtemp(prefix="fw-", dir="/tmp"))
    monkeypatch.setenv("FEDTUNE_WORKERS", str(folder))
    yield folder
    for life in folder.glob("*.life"):
        pid = Address("unix", life).pid()
        if pid and pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path) -> RunConfig:
    """A small FedKSeed client on the tiny model."""
    return RunConfig(
        model=str(tiny_folder), data=str(instructions), device="cpu", threads=1, clients=4, local_steps=4, K=64, lr=1e-3,
        eps=1e-3, min_samples=2, max_length=64, template="plain",
    )  # fmt: skip


@pytest.fixture
def instruction() -> MakeInstruction:
    """The encoded instruction of the first round of a config."""

    def make(config: RunConfig) -> bytes:
        here = Resident(config)
        replica, algorithm = here.replica, here.algorithm
        state = algorithm.begin_round(algorithm.start(config, replica.layout), config, replica.layout)
        model = state.published(config.coefficient_bits)
        digest = model.digest(replica.fingerprint)
        written = Instruction(
            1, replica.fingerprint, replica.layout.digest, digest, 0, model.pools, algorithm.draw_weights(state)
        )
        return wire.encode_instruction(written, config.coefficient_bits)

    return make


@pytest.fixture
def service(workers: Path) -> Iterator[MakeService]:
    """Services in this process, ended with the test."""
    made: list[Service] = []
    with ExitStack() as held:

        def make(kind: str = "unix", idle: float = 0.0, **options: object) -> Service:
            address = Address(kind, workers / f"own{len(made)}.{'sock' if kind == 'unix' else 'port'}")
            held.enter_context(locked(address.life, 1.0, write=f"{os.getpid()}\n"))
            made.append(Service(address, "cpu", idle, **options))  # type: ignore[arg-type]
            return made[-1]

        yield make
        for one in made:
            one.stop()
            one.run()


def wait_until(fact: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until `fact` is true."""
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
