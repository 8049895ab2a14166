"""Run a federation with Flower's own simulation runtime: clients in parallel, in Ray's worker processes, on CPUs or GPUs.

The same ServerApp and ClientApp as everywhere, so the digest is that of the in-process engine. Starting costs 25 to 40
seconds, and every worker process loads the model once.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterable

from fedtune.config import RunConfig
from fedtune.errors import EngineError
from fedtune.progress import Note, check_stop, emit
from fedtune.run_folder import RunFolder, check_new, dated
from simulations.engines import relay
from simulations.engines.flower_app import write_app
from simulations.engines.processes import ending_on_signals
from simulations.engines.superlink import SuperLink

POLL_SECONDS = 0.1
TAIL_LINES = 20

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^(WARNING|ERROR)\s*:\s*(.+)")
_USUAL = ("Since flwr 1.32", "Server responded with an error")  # warnings of every run, about nothing


def run_flower(config: RunConfig, workers: int = 0) -> dict[str, object]:
    """Run `config` to its end and return the summary (summary.json of its run folder).

    Args:
        config: as for the other engine. Relative paths are relative to the working directory.
        workers: worker processes; 0: one a CPU core, or one a GPU, but no more than clients asked in a round.

    Raises:
        FedtuneError: what the server raised, with its type and facts.
        EngineError: a process of Flower failed; `facts["tail"]` has its last lines.
        Interrupted: a stop was requested. Nothing keeps running, whatever ends this function.
    """
    out = config.resume or config.out or dated(config.algorithm)
    config = config.replace(out=out).with_absolute_paths()
    if not config.resume:
        check_new(config.out)
    device = _Device.of(config)
    resources = device.resources(workers, config.asked_per_round)
    with ending_on_signals():
        link = SuperLink(device.environment)
        try:
            app = link.home / "app"
            write_app(app, config.replace(device=device.name))
            run = link.submit(app, {"num-supernodes": config.clients, **resources})
            said = _follow(link, run)
            status, details = link.status(run)
        finally:
            link.close()
    if status != "finished:completed":
        raise EngineError(
            f"Flower ended the run as '{status}': {said.first_error or details or 'no reason given'}", tail=said.tail
        )
    return RunFolder.open(config.out).summary()


class _Device:
    """What `device` means when Ray hands out the hardware.

    Attributes:
        name: the setting for the worker processes.
        environment: variables for all processes.
        gpus: how many GPUs there are to hand out, 0 for a run without.
    """

    def __init__(self, name: str, environment: dict[str, str], gpus: int) -> None:
        self.name, self.environment, self.gpus = name, environment, gpus

    @classmethod
    def of(cls, config: RunConfig) -> _Device:
        """Resolve `config.device`. Ray shows a worker only its own GPU, as number 0, so 'cuda:N' becomes the only one."""
        if config.device in ("cpu", "mps"):
            return cls(config.device, {}, 0)
        import torch

        from fedtune.models import choose_device

        chosen = choose_device(config.device)[0]
        if chosen.type != "cuda":
            return cls(str(chosen), {}, 0)
        if config.device in ("auto", "cuda"):
            return cls("cuda", {}, torch.cuda.device_count())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        number = visible.split(",")[chosen.index or 0] if visible else str(chosen.index or 0)
        return cls("cuda", {"CUDA_VISIBLE_DEVICES": number}, 1)

    def resources(self, workers: int, asked: int) -> dict[str, int | float]:
        """Flower's federation settings for `workers` processes that answer `asked` clients a round."""
        count = workers or max(1, min(self.gpus or os.cpu_count() or 1, asked))
        settings: dict[str, int | float] = {"client-resources-num-cpus": 1, "init-args-num-cpus": count}
        if self.gpus:
            share = self.gpus / count  # Ray takes whole GPUs or a part of one
            settings["client-resources-num-gpus"] = float(int(share)) if share >= 1 else share
            settings["init-args-num-gpus"] = self.gpus
        return settings


class _Log:
    """What Flower's log of a run said so far: `tail`, its last lines, and `first_error`, '' if there was none."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self.first_error = ""

    @property
    def tail(self) -> tuple[str, ...]:
        return tuple(self._lines)

    def take(self, lines: Iterable[str]) -> None:
        """Keep `lines`, emit warnings and errors among them as notes, and stop at a dead worker process.

        Flower puts a dead worker back in its pool, where it answers for one client after another with an error.
        """
        for line in lines:
            plain = _COLOUR.sub("", line).rstrip()
            if not plain:
                continue
            self._lines.append(plain)
            if "ActorDiedError" in plain:
                raise EngineError(
                    "A worker process died, perhaps for want of memory: use fewer workers or a smaller batch_size.",
                    tail=self.tail,
                )
            found = _LEVEL.match(plain)
            if found and not found[2].startswith(_USUAL):
                self.first_error = self.first_error or (found[2] if found[1] == "ERROR" else "")
                emit(Note(found[2], warning=True))


def _follow(link: SuperLink, run: str) -> _Log:
    """Pass on what the run says until it ends; returns its log.

    Raises:
        FedtuneError: the server's error, as soon as it is known.
    """
    said = _Log()
    reader = relay.Reader(link.relay)
    with link.log(run) as log:
        while True:
            check_stop()
            ended = log.ended
            for event in reader.read():
                emit(event)
            said.take(log.read())
            if reader.error is not None:
                reader.error.facts.setdefault("tail", said.tail)
                raise reader.error
            if ended:
                return said
            link.check()
            time.sleep(POLL_SECONDS)
