"""What a run weighs at three levels: payload, serialised, and on the wire between real SuperNodes and a real SuperLink.

    python -m simulations.wire headline --set rounds=2 --set clients=2 --set clients_per_round=2
    python -m simulations.wire my.toml --tls --json

starts a SuperLink and one SuperNode a client on this machine, each behind a proxy that counts, lets them idle for a while, runs
the preset to its end and prints bytes by client and round, and what a run costs once. Ctrl-C ends everything.
docs/bytes.md says how each number is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.cli.presets import choose
from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, Interrupted
from fedtune.models import resolve_model
from fedtune.numbers import in_bytes
from fedtune.progress import check_stop
from fedtune.run_folder import COEFFICIENTS, RunFolder, check_new
from fedtune.traffic import Traffic, from_lists
from simulations.attribution import Bytes, Parts, Times, attribute, round_starts
from simulations.engines.deployed import Deployed
from simulations.engines.flower_internals import bundle_size
from simulations.engines.processes import ending_on_signals
from simulations.proxy import Exchange

IDLE_SECONDS = 30.0
LAST_SECONDS = 1.0  # after the end of the run, for a node's last request
PARTS = ("connect", "app bundle", "introduction", "all polling", "everything")
LEVELS = ("payload", "serialised", "wire")


@dataclass(frozen=True)
class Measured:
    """A run and what it weighed.

    Attributes:
        rounds: by round and client, what the server counted (`traffic` in metrics.jsonl).
        wire: by client, what its proxy counted.
        bundle: bytes of the app bundle. base: of the base model's files; None if they are not in a folder here.
        catch_up: payload of the message to a client that joins after the last round.
    """

    preset: str
    tls: bool
    idle_seconds: float
    rounds: dict[int, dict[str, Traffic]]
    wire: dict[str, Parts]
    bundle: int
    base: int | None
    catch_up: int


def measure(preset: str, config: RunConfig, *, tls: bool, idle: float, say: Callable[[str], None]) -> Measured:
    """Run `config`, whose `out` does not exist yet, and measure it.

    Raises:
        EngineError: a process of Flower failed, or the run did. Nothing keeps running, whatever ends this function.
    """
    check_new(config.out)
    out = Path(config.out)
    with ending_on_signals():
        say(f"starting a SuperLink and {config.clients} SuperNodes")
        deployed = Deployed(config.clients, tls=tls)
        try:
            bundle = bundle_size(deployed.app)
            begun = time.time()
            say(f"{idle:g} s without work, for what polling weighs")
            _rest(idle)
            submitted = time.time()
            run = deployed.submit(config)
            deployed.follow(run, _Progress(out, config.rounds, say))
            time.sleep(LAST_SECONDS)
            exchanges = {client: list(proxy.counts.exchanges) for client, proxy in deployed.proxies.items()}
        finally:
            say("ending all processes")
            deployed.close()
    times = Times(begun, submitted, round_starts(out / "log.jsonl"))
    return _measured(preset, config, tls, times, exchanges, bundle)


def _measured(
    preset: str, config: RunConfig, tls: bool, times: Times, exchanges: dict[str, list[Exchange]], bundle: int
) -> Measured:
    folder = RunFolder.open(config.out)
    rows = {int(row["round"]): from_lists(row["traffic"]) for row in folder.read_metrics() if row["round"]}
    wire = {client: attribute(seen, times, bundle) for client, seen in exchanges.items()}
    base, catch_up = model_bytes(config), len(folder.mapped(COEFFICIENTS))
    return Measured(preset, tls, times.submitted - times.idle, rows, wire, bundle, base, catch_up)


def model_bytes(config: RunConfig) -> int | None:
    """Bytes of the base model's files, which every node must have before; None for a name on the hub."""
    folder = Path(resolve_model(config.model))
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model", ".txt"))


def _rest(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        check_stop()
        time.sleep(min(0.2, seconds))


class _Progress:
    """Says each round as soon as it is in the run folder."""

    def __init__(self, out: Path, rounds: int, say: Callable[[str], None]) -> None:
        self._out, self._rounds, self._say = out, rounds, say
        self._said = -1

    def __call__(self) -> None:
        if not (self._out / "metrics.jsonl").is_file():
            return
        for row in RunFolder(self._out).read_metrics()[self._said + 1 :]:
            self._said = int(row["round"])
            self._say(f"round {self._said} of {self._rounds}" if self._said else "the base model is evaluated")


# ---------------------------------------------------------------------------------------------------- what is printed


def levels(traffic: Traffic, wire: Bytes) -> dict[str, tuple[int, int]]:
    """By level: bytes up and down of one client and round."""
    return {
        "payload": (traffic.payload_up, traffic.payload_down),
        "serialised": (traffic.serialised_up, traffic.serialised_down),
        "wire": (wire.up, wire.down),
    }


def lines(found: Measured) -> Iterator[str]:
    """The measurement as text."""
    link = "TLS" if found.tls else "plain HTTP"
    yield f"{found.preset}, {link}: bytes of one client in one round, without polling"
    yield ""
    yield f"{'round':>5} {'client':>8}" + "".join(f"{level + ' ' + way:>17}" for way in ("up", "down") for level in LEVELS)
    for number, clients in found.rounds.items():
        for client, traffic in clients.items():
            both = levels(traffic, found.wire[client].rounds.get(number, Bytes()))
            cells = "".join(f"{both[level][way]:>17,}" for way in (0, 1) for level in LEVELS)
            yield f"{number:>5} {client:>8}{cells}"
    yield ""
    yield f"{'client':>8}" + "".join(f"{name:>24}" for name in PARTS)
    for client, parts in found.wire.items():
        shown = (parts.connect, parts.bundle, parts.introduction, parts.polling, parts.total)
        yield f"{client:>8}" + "".join(f"{f'{part.up:,} / {part.down:,}':>24}" for part in shown)
    yield "(up / down, on the wire)"
    yield ""
    yield from _once(found)


def _once(found: Measured) -> Iterator[str]:
    idle = [parts.idle_minute for parts in found.wire.values()]
    up, down = (round(sum(part[way] for part in idle) / len(idle)) for way in (0, 1))
    base = in_bytes(found.base) if found.base is not None else "fetched from the hub, not counted here"
    yield f"idle, a client and minute     {up:,} up, {down:,} down (of {found.idle_seconds:.0f} s)"
    yield f"app bundle, once a run        {found.bundle:,}"
    yield f"base model's files, once      {base}"
    yield f"catching up, payload          {found.catch_up:,} for a client that was never there, after the last round"


def as_json(found: Measured) -> dict[str, Any]:
    """The measurement for programs; every pair is up, down."""
    clients = {
        client: {
            "connect": parts.connect,
            "bundle": parts.bundle,
            "introduction": parts.introduction,
            "polling": parts.polling,
            "total": parts.total,
            "idle_minute": parts.idle_minute,
        }
        for client, parts in found.wire.items()
    }
    rounds = {
        number: {client: levels(sent, found.wire[client].rounds.get(number, Bytes())) for client, sent in traffic.items()}
        for number, traffic in found.rounds.items()
    }
    once = {"bundle": found.bundle, "base_model": found.base, "catch_up_payload": found.catch_up}
    head = {"preset": found.preset, "tls": found.tls, "idle_seconds": round(found.idle_seconds, 1)}
    return {**head, "rounds": rounds, "clients": clients, "once": once}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 for an error and 130 for Ctrl-C."""
    asked = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fedtune-wire-") as folder:
        try:
            chosen = choose(asked.preset, asked.settings)
            out = asked.out or chosen.config.out or str(Path(folder) / "run")
            config = chosen.config.replace(out=out).with_absolute_paths()
            found = measure(chosen.label, config, tls=asked.tls, idle=asked.idle, say=_say)
        except (KeyboardInterrupt, Interrupted):
            _say("Stopped; every process was ended.")
            return 130
        except FedtuneError as error:
            _say("\n".join([*_tail(error), f"Error: {error}"]))
            return 1
        if asked.out:
            (Path(config.out) / "wire.json").write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(as_json(found)) if asked.json else "\n".join(lines(found)))
    return 0


def _tail(error: FedtuneError) -> list[str]:
    """The last lines of a process that failed, if `error` has them."""
    tail = error.facts.get("tail")
    return [str(line) for line in tail] if isinstance(tail, list | tuple) else []


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.wire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", metavar="PRESET", help="a TOML file, or a name from `fedtune presets`")
    parser.add_argument(
        "--set", "-s", dest="settings", metavar="KEY=VALUE", action="append", default=[], help="change a setting"
    )
    secure = parser.add_mutually_exclusive_group()
    secure.add_argument("--tls", action="store_true", help="with certificates of a CA made for this")
    secure.add_argument("--insecure", dest="tls", action="store_false", help="plain HTTP (default)")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, metavar="SECONDS", help="without work, before the run")
    parser.add_argument("--out", default="", metavar="DIR", help="keep the run folder, and the figures in wire.json there")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
