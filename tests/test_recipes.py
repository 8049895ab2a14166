"""The presets of the papers' experiments have the papers' numbers, run on Flower too, and need neither model nor data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from fedtune.architecture import SHIPPED
from fedtune.cli.presets import choose, shipped
from fedtune.config import RunConfig
from fedtune.data.federated import load_federated
from fedtune.embedded import shipped_path
from fedtune.models import LanguageModel

MODELS = {
    "1b": "datajuicer/LLaMA-1B-dj-refine-150B",
    "3b": "openlm-research/open_llama_3b",
    "7b": "meta-llama/Llama-2-7b-hf",
    "13b": "meta-llama/Llama-2-13b-hf",
}
# algorithm, data, model: rounds, K, lr, official server lr (Ferret). FedKSeed's README and Ferret's section 2.4 and C.2.
TABLE = {
    ("fedkseed", "ni", "1b"): (40, 4096, 3e-7, None),
    ("fedkseed", "ni", "3b"): (40, 4096, 3e-7, None),
    ("fedkseed_pro", "ni", "1b"): (40, 1024, 3e-7, None),
    ("fedkseed_pro", "ni", "3b"): (40, 2048, 3e-7, None),
    ("ferret", "ni", "1b"): (12, 3900, 1e-4, 10.0),
    ("ferret", "ni", "3b"): (12, 3900, 1e-4, 10.0),
    ("fedkseed", "dolly", "1b"): (60, 4096, 3e-7, None),
    ("fedkseed", "dolly", "3b"): (60, 4096, 3e-7, None),
    ("fedkseed_pro", "dolly", "1b"): (60, 1024, 3e-7, None),
    ("fedkseed_pro", "dolly", "3b"): (60, 2048, 3e-7, None),
    ("ferret", "dolly", "1b"): (20, 3900, 1e-4, 3.0),
    ("ferret", "dolly", "3b"): (20, 3900, 1e-4, 3.0),
    ("fedkseed", "code", "7b"): (20, 4096, 3e-7, None),
    ("fedkseed", "code", "13b"): (20, 4096, 3e-7, None),
    ("ferret", "code", "7b"): (20, 3200, 3e-4, 5.0),
    ("ferret", "code", "13b"): (20, 3800, 5e-4, 10.0),
    ("fedkseed", "gsm8k", "7b"): (20, 4096, 3e-7, None),
    ("fedkseed", "gsm8k", "13b"): (20, 4096, 3e-7, None),
    ("ferret", "gsm8k", "7b"): (20, 3200, 3e-4, 5.0),
    ("ferret", "gsm8k", "13b"): (20, 3800, 5e-4, 10.0),
}
# data: clients, asked a round, partition, template of FedKSeed, template of Ferret
DIVISION = {
    "ni": (738, 36, "column", "alpaca", "alpaca"),
    "dolly": (200, 10, "dirichlet", "fedkseed", "alpaca"),
    "code": (9, 9, "column", "alpaca", "alpaca"),
    "gsm8k": (3, 3, "iid", "alpaca", "alpaca"),
}
NAMES = {key: f"papers/{'_'.join(key)}" for key in TABLE}
DOLLY = ("brainstorming", "classification", "closed_qa", "creative_writing", "general_qa", "information_extraction", "open_qa")
OFFICIAL = ("allocation=official", "K=200", "pool_size=0", "reconstruction=official", "pool_every=0")


def recipe(key: tuple[str, str, str]) -> RunConfig:
    return choose(NAMES[key]).config


def text(key: tuple[str, str, str]) -> str:
    return {preset.name: preset.path for preset in shipped()}[NAMES[key]].read_text(encoding="utf-8")


def test_the_folder_holds_these_recipes_and_no_other() -> None:
    assert {preset.name for preset in shipped() if preset.name.startswith("papers/")} == set(NAMES.values())


@pytest.mark.parametrize("key", TABLE, ids=NAMES.get)
def test_a_recipe_has_the_numbers_of_the_papers(key: tuple[str, str, str]) -> None:
    algorithm, data, model = key
    config = recipe(key)
    rounds, K, lr, official = TABLE[key]
    clients, asked, partition, *templates = DIVISION[data]
    assert (config.algorithm, config.model, config.dtype) == (algorithm.replace("_", "-"), MODELS[model], "float16")
    assert (config.rounds, config.K, config.lr) == (rounds, K, lr)
    assert (config.clients, config.asked_per_round, config.partition) == (clients, asked, partition)
    assert (config.template, config.max_length) == (templates[algorithm == "ferret"], 1024)
    assert (config.max_new_tokens, config.batch_size) == (128, 1)
    assert config.generate_samples >= 1_000_000
    if official is None:
        assert (config.local_steps, config.eps, config.weighting) == (200, 5e-4, "examples")
    else:
        assert (config.local_steps, config.accumulate, config.weighting) == (10, 4, "equal")
        assert config.server_lr == pytest.approx(official / 3)  # the official scale returns a third of the update
        assert (config.allocation, config.reconstruction, config.pool_every) == ("norm", "unbiased", 1)


@pytest.mark.parametrize("key", [key for key in TABLE if key[0] == "ferret"], ids=NAMES.get)
def test_ferrets_recipes_name_the_way_to_the_official_code(key: tuple[str, str, str]) -> None:
    official = [*OFFICIAL, f"server_lr={TABLE[key][3]:g}"]
    (line,) = [line for line in text(key).splitlines() if line.startswith("# --set ")]
    assert set(line.removeprefix("# --set ").split(" --set ")) == set(official)
    config = choose(NAMES[key], official).config
    assert (config.K, config.server_lr, config.pool_every) == (200, TABLE[key][3], 0)


@pytest.mark.parametrize("key", TABLE, ids=NAMES.get)
def test_flower_takes_a_recipe_and_its_model_has_a_shipped_architecture(key: tuple[str, str, str]) -> None:
    path = next(preset.path for preset in shipped() if preset.name == NAMES[key])
    assert RunConfig.from_mapping(parse_config_args([str(path)])) == recipe(key)
    assert shipped_path(f"{SHIPPED}/{MODELS[key[2]]}/config.json") is not None


@pytest.mark.parametrize("key", TABLE, ids=NAMES.get)
def test_every_number_says_where_it_is_from(key: tuple[str, str, str]) -> None:
    own = ("data", "holdout_file", "input_column", "output_column", "instruction_column", "category_column", "eval_batch_size")
    names = ("algorithm", *own)
    for line in text(key).splitlines():
        if line and not line.startswith("#") and line.split(" = ")[0] not in names:
            assert "  # " in line, line
    assert "Not run here." in text(key)


def test_dolly_also_divides_by_the_papers_other_alpha() -> None:
    assert recipe(("fedkseed", "dolly", "1b")).dirichlet_alpha == 0.5
    assert choose("papers/fedkseed_dolly_1b", ["dirichlet_alpha=5.0"]).config.dirichlet_alpha == 5.0


# ---------------------------------------------------------------------------------------------------- on copies of the data


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small copy of each data set under the name that the recipes expect; FEDTUNE_DATA names it."""
    monkeypatch.setenv("FEDTUNE_DATA", str(tmp_path))
    folder = tmp_path / "natural-instructions-2.8"
    for split, count in (("train", 738), ("test", 2)):
        names = [f"{split}_task{number}" for number in range(count)]
        _write(folder / "splits" / "default" / f"{split}_tasks.txt", "\n".join(names))
        for name in names:
            rows = [{"id": str(row), "input": f"{row}", "output": [f"{row}"]} for row in range(20)]
            _write(folder / "tasks" / f"{name}.json", json.dumps({"Definition": [f"Repeat for {name}."], "Instances": rows}))
    kinds = [*DOLLY, "summarization"] * 1000
    rows = [{"instruction": f"{row}", "context": "", "response": "a", "category": kind} for row, kind in enumerate(kinds)]
    _write(tmp_path / "databricks-dolly-15k.jsonl", _lines(rows))
    languages = ["C", "C#", "C++", "Go", "Java", "PHP", "Pascal", "Python", "Scala", "X86-64 Assembly"] * 20
    code = [{"instruction": f"{row}", "input": name, "output": "code"} for row, name in enumerate(languages)]
    _write(tmp_path / "rosetta_alpaca.json", json.dumps(code))
    for split, count in (("train", 60), ("test", 10)):
        rows = [{"question": f"{row}", "answer": "#### 1"} for row in range(count)]
        _write(tmp_path / "gsm8k" / f"{split}.jsonl", _lines(rows))
    return tmp_path


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("name", "clients", "heldout"),
    [("fedkseed_ni_1b", 738, 40), ("fedkseed_dolly_1b", 200, 1000), ("ferret_code_7b", 9, 18), ("ferret_gsm8k_7b", 3, 10)],
)
def test_the_data_settings_fit_the_files_on_disk(
    name: str, clients: int, heldout: int, copies: Path, tiny_lm: LanguageModel
) -> None:
    data = load_federated(choose(f"papers/{name}").config, tiny_lm.tokenizer)
    assert (len(data.clients), len(data.heldout), data.report.dropped) == (clients, heldout, {})
    if "_ni_" in name:
        assert {len(own) for own in data.clients} == {4}
    if "_code_" in name:
        assert all(len(counts) == 1 for counts in data.report.clients)
