"""The needs of a model that is not there: the same numbers as from its weights, and the papers' models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune import needs as needs_module
from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.base import pool_number
from fedtune.architecture import SHIPPED, architecture_folder, needs_of_architecture
from fedtune.cli import main
from fedtune.coefficients import Coefficients, PoolCoefficients, quantise
from fedtune.config import RunConfig
from fedtune.data.batches import Batch
from fedtune.embedded import shipped_path
from fedtune.errors import ModelError
from fedtune.layout import Layout
from fedtune.models import LanguageModel
from fedtune.needs import needs
from fedtune.perturb import Perturbation
from fedtune.replica import Replica

PAPERS = {
    "datajuicer/LLaMA-1B-dj-refine-150B": 1_345_443_840,
    "openlm-research/open_llama_3b": 3_426_473_600,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
}
METHODS = {
    "fedkseed": {"algorithm": "fedkseed"},
    "ferret": {"algorithm": "ferret", "K": 100, "pool_every": 1},
    "subspace": {"algorithm": "subspace", "K": 100},
}


@pytest.fixture
def no_weights(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model's config.json and nothing else."""
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_folder / "config.json", tmp_path / "bare")
    return tmp_path / "bare"


@pytest.mark.parametrize("method", METHODS)
def test_a_config_gives_the_numbers_of_the_weights(method: str, no_weights: Path, tiny_lm: LanguageModel) -> None:
    config = RunConfig.from_mapping({"model": str(no_weights), "max_length": 64, "batch_size": 2, **METHODS[method]})
    found = needs_of_architecture(config)
    layout = Layout.of(tiny_lm.model, "one" if method == "fedkseed" else "grouped")
    ids = torch.zeros(2, 64, dtype=torch.int64)
    real = needs(config, tiny_lm.model, layout, Perturbation(tiny_lm.model, layout), Batch(ids, torch.ones_like(ids), ids))
    for key in ("parameters", "up", "down", "client_rounds", "pools_down", "fedavg", "payload", "cache"):
        assert getattr(found, key) == getattr(real, key)
    for key in ("weights", "scratch", "logits", "gradients", "optimizer", "difference", "zeroth_order"):
        assert getattr(found.memory, key) == getattr(real.memory, key)
    assert 1.0 <= found.memory.saved / real.memory.saved < 1.3  # the traced pass writes the causal mask out


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"algorithm": "subspace", "rounds": 1}, False),
        ({"algorithm": "subspace", "rounds": 2}, True),
        ({"algorithm": "subspace", "rounds": 4, "pool_every": 4}, False),
        ({"algorithm": "ferret", "rounds": 9, "pool_every": 1}, False),
        ({"algorithm": "ferret", "rounds": 10, "pool_every": 1}, True),
        ({"algorithm": "ferret", "rounds": 2, "pool_every": 1, "family": "gaussian"}, True),
        ({"algorithm": "fedkseed", "rounds": 1000}, False),
    ],
)
def test_the_file_beside_the_base_is_counted_where_a_replica_makes_one(
    settings: dict[str, object], kept: bool, no_weights: Path, tiny_lm: LanguageModel, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Held against a replica that is brought to the model before the last round, and moved if the algorithm moves."""
    monkeypatch.setattr(needs_module, "IN_MEMORY", 0)
    config = RunConfig.from_mapping({"model": str(no_weights), "K": 16, "max_length": 64, **settings})
    algorithm, layout = ALGORITHMS[config.algorithm], Layout.of(tiny_lm.model, "grouped")
    replica = Replica(tiny_lm.model, layout, in_memory=0)
    pools = [algorithm.pool(config, layout, number) for number in range(pool_number(config, config.rounds) + 1)]
    used = [quantise(pool, np.full((layout.blocks, pool.size), 1e-4), 8) for pool in pools[:-1]]
    replica.become(Coefficients((*used, PoolCoefficients.zero(pools[-1], layout.blocks))))
    if config.algorithm == "subspace":
        replica.move(np.zeros((layout.blocks, pools[-1].size)))
    assert (replica._anchor is not None) == kept
    assert needs_of_architecture(config).cache == (4 * layout.numel if kept else 0)


def test_sixteen_bits_take_half(no_weights: Path) -> None:
    single, half = (needs_of_architecture(RunConfig(model=str(no_weights), dtype=dtype)) for dtype in ("float32", "float16"))
    assert half.memory.weights * 2 == single.memory.weights
    assert half.memory.difference == single.memory.difference


def test_fresh_pools_are_counted_for_clients_that_missed_them(no_weights: Path) -> None:
    settings = {"model": str(no_weights), "algorithm": "ferret", "K": 64, "rounds": 5, "clients": 4, "clients_per_round": 2}
    for every, pools in ((0, 5), (1, 1 + 2 + 3 + 4 + 5), (2, 1 + 1 + 2 + 2 + 3)):
        found = needs_of_architecture(RunConfig.from_mapping({**settings, "pool_every": every}))
        assert found.pools_down == 2 * pools
        assert found.payload == 10 * found.up + 2 * pools * found.down


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_models_have_their_sizes(name: str) -> None:
    config = RunConfig(model=name, dtype="float16", max_length=1024)
    assert architecture_folder(config) == shipped_path(f"{SHIPPED}/{name}")
    found = needs_of_architecture(config)
    assert found.parameters == PAPERS[name]
    assert found.memory.weights == 2 * PAPERS[name]


def test_the_small_model_has_the_blocks_of_the_paper() -> None:
    name = f"{SHIPPED}/datajuicer/LLaMA-1B-dj-refine-150B/config.json"
    path = shipped_path(name)
    assert path is not None
    shapes = _llama_shapes(json.loads(path.read_text()))
    assert Layout.from_shapes(shapes, "grouped").blocks == 194  # L in Ferret's Figure 5


def _llama_shapes(config: dict[str, int]) -> Sequence[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama without shared keys, in the order of `named_parameters`."""
    wide, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layer = [(wide, wide)] * 4 + [(inner, wide)] * 2 + [(wide, inner), (wide,), (wide,)]
    every = [(words, wide), *layer * config["num_hidden_layers"], (wide,), (words, wide)]
    return [(str(number), shape) for number, shape in enumerate(every)]


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no config\.json of '.*', neither in a folder of that name nor on the hub"):
        needs_of_architecture(RunConfig(model=str(tmp_path)))


def test_a_config_that_does_not_fit_is_refused(no_weights: Path) -> None:
    with pytest.raises(ModelError, match=r"max_length = 600, but '.*' has 512 positions"):
        needs_of_architecture(RunConfig(model=str(no_weights), max_length=600))
    (no_weights / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(ModelError, match=r"is a T5ForConditionalGeneration, not a causal language model"):
        needs_of_architecture(RunConfig(model=str(no_weights)))


def test_estimate_meta_says_that_time_is_unknown(
    no_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "bare.toml").write_text(f'model = "{no_weights}"\ndata = "nowhere.jsonl"\n')
    arguments = ["estimate", str(tmp_path / "bare.toml"), "--meta"]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    text = capsys.readouterr().out
    assert f"from {no_weights}/config.json, for samples of 256 tokens" in text
    assert "unknown  it is measured on real weights and data: run without --meta" in text
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["parameters"] == needs_of_architecture(RunConfig(model=str(no_weights))).parameters
    assert "seconds" not in numbers
    assert numbers["payload"] == numbers["up"] * 40 + numbers["down"] * 40
