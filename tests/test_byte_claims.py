"""The byte claims of docs/bytes.md: the longest messages that a preset can send, and those of real short runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.architecture import needs_of_architecture
from fedtune.cli.presets import choose
from fedtune.config import RunConfig
from fedtune.run_folder import RunFolder
from fedtune.traffic import from_lists
from simulations.engines.in_process import run_in_process

HEADLINE, DEFAULT, FERRET = 2_500, 5_000, 5_000  # payload bytes of a client and round, up and down together
SHORT = ["rounds=2", "clients=2", "clients_per_round=2", "max_length=128", "eval_samples=4", "eval_every=0"]


def longest(config: RunConfig) -> int:
    """Bytes up and down of a client and round with every coefficient in use, one pool, and no update cut short."""
    needs = needs_of_architecture(config)
    return needs.up + needs.down


def test_the_headline_at_most() -> None:
    config = choose("headline", ["model=embedded"]).config  # with one block the model does not matter
    assert (config.K, config.local_steps, config.coefficient_bits, config.scalar_bits) == (4096, 200, 4, 8)
    assert longest(config) == 2_356 <= HEADLINE


def test_the_default_bits_at_most() -> None:
    assert longest(RunConfig(K=4096, local_steps=200)) == 4_604 <= DEFAULT


def test_the_model_does_not_matter_to_fedkseed(shared: Path) -> None:
    assert longest(choose("headline").config) == longest(choose("headline", ["model=embedded"]).config)


def test_the_headline_of_ferret_at_most(shared: Path) -> None:
    config = choose("headline_ferret").config
    assert (config.K, config.pool_every, config.clients) == (4096, 1, config.invited_per_round)  # nobody misses a pool
    assert longest(config) == 4_490 <= FERRET


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "more", "up", "most"),
    [
        ("headline", [], 237, HEADLINE),
        ("headline", ["coefficient_bits=8", "scalar_bits=16"], 437, DEFAULT),
        ("headline_ferret", [], 0, FERRET),
    ],
)
def test_real_runs_stay_below(shared: Path, tmp_path: Path, preset: str, more: list[str], up: int, most: int) -> None:
    """Counted where messages are made and read. A length does not depend on what was learned, so two rounds say enough."""
    run_in_process(choose(preset, [*SHORT, *more, f"out={tmp_path / 'run'}"]).config)
    rows = [row for row in RunFolder.open(tmp_path / "run").read_metrics() if row["round"]]
    sent = [traffic for row in rows for traffic in from_lists(row["traffic"]).values()]
    assert len(sent) == 4
    for traffic in sent:
        assert traffic.payload_up == up or not up
        assert traffic.payload_up + traffic.payload_down <= most
        assert traffic.serialised_up + traffic.serialised_down <= most + 900  # Flower's metadata: 231 and 186 bytes
