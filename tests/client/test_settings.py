"""Which settings a node takes from its server: none that names a file, runs code or reads the node's environment."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
from client.settings import FILES, WHO, Who, for_node, settings_of
from fedtune.config import RunConfig
from fedtune.data.files import read_rows
from fedtune.data.sources.named import read_source
from fedtune.deploy.weights import weights_fingerprint
from fedtune.embedded import embedded_path
from fedtune.errors import ConfigError, DataError, FedtuneError, ModelError
from fedtune.foreign import LONGEST_TEXT
from fedtune.models import load_model
from fedtune.regular import open_regular
from fedtune.stamps import source_digest
from simulations.engines.local_grid import LocalGrid

Node = dict[str, bool | int | float | str]
OWN: Node = {"model": "/node/model", "data": "/node/rows.jsonl"}
HOSTILE: Node = {  # for every setting something else than its default
    "algorithm": "ferret", "seed": 5, "rounds": 3, "clients": 9, "client_fraction": 0.3, "clients_per_round": 2,
    "local_steps": 7, "batch_size": 3, "lr": 0.1, "sampling": "examples", "weighting": "equal", "K": 99, "eps": 0.1,
    "directions_per_step": 1, "server_lr": 0.5, "anneal": "linear", "momentum": 0.5, "optimizer": "momentum",
    "local_momentum": 0.5, "accumulate": 2, "clip_norm": 1.0, "pool_size": 50, "blocks": "one", "allocation": "norm",
    "reconstruction": "shrunken", "coordinates": "own", "lora_rank": 8, "lora_alpha": 16.0, "lora_targets": "auto",
    "only_client": "", "family": "gaussian", "rank": 1, "pool_every": 0, "coefficient_bits": 7, "scalar_bits": 32,
    "model": "/server/model", "revision": "main", "trust_remote_code": True, "dtype": "bfloat16",
    "update_rounding": "stochastic", "device": "cuda:3", "device_map": "auto", "offload": True, "threads": 10**9,
    "data": "/dev/zero", "instruction_column": "q", "input_column": "i", "output_column": "a", "category_column": "c",
    "template": "plain", "max_length": 99, "partition": "quantity", "dirichlet_alpha": 0.7, "min_samples": 3,
    "holdout": 0.2, "holdout_category": "", "holdout_file": "/dev/zero", "eval_every": 3, "eval_samples": 3,
    "eval_batch_size": 3, "generate_samples": 3, "choices": "a|b", "max_new_tokens": 3, "out": "/etc/x", "resume": "/etc/y",
    "over_selection": 1.0, "min_replies": 2, "short_round": "repeat", "round_timeout": 3.0, "wait_timeout": 3.0,
    "min_clients": 2, "grace": 1.0, "max_examples": 5, "keep_updates": False,
}  # fmt: skip


@pytest.fixture
def on_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/venv/bin/flwr-clientapp"])


def test_every_setting_has_somebody_who_decides_it() -> None:
    assert set(WHO) == set(RunConfig.model_fields) == set(HOSTILE)
    assert {key for key in RunConfig.model_fields if key.endswith("_file") or key in ("model", "data")} == set(FILES)
    assert {WHO[key] for key in FILES} == {Who.NODE}


@pytest.mark.parametrize("key", WHO)
def test_a_node_uses_what_its_decider_says(key: str, on_node: None) -> None:
    """A server that sets everything, a node with files of its own and nothing else."""
    used = for_node(HOSTILE, OWN)
    if WHO[key] is Who.SERVER:
        assert used[key] == HOSTILE[key]
    else:
        assert used.get(key) == (OWN[key] if key == "model" else None)


def test_a_nodes_own_config_has_the_rest(on_node: None) -> None:
    node = {**OWN, "trust-remote-code": True, "device": "cpu", "threads": 2, "revision": "v1", "device-map": "none"}
    used = settings_of({"trust_remote_code": False, "device": "cuda", "threads": 9, "revision": "v2", "offload": True}, node)
    assert (used.trust_remote_code, used.device, used.threads, used.revision) == (True, "cpu", 2, "v1")
    assert settings_of({"algorithm": "fedkseed"}, {**OWN, "offload": True}).offload
    with pytest.raises(ConfigError, match="trust_remote_code"):
        settings_of({}, {**OWN, "trust-remote-code": "perhaps"})


def test_a_simulation_uses_all_settings_as_ever() -> None:
    config = RunConfig(model="x/y", data="rows.jsonl", trust_remote_code=True, threads=3, out="z", eval_samples=5)
    assert settings_of(config.as_mapping(), {"partition-id": 0}) == config
    assert settings_of(config.as_mapping(), {"model": "m", "device": "cpu"}) == config.replace(model="m", device="cpu")


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("named", ["/dev/zero", "rows.jsonl", "hub:x/y", "${HOME}", "natural-instructions:/x"])
def test_a_node_without_files_of_its_own_opens_none_of_the_servers(key: str, named: str, on_node: None) -> None:
    node = {own: value for own, value in OWN.items() if (own == "model") is not (key == "model")}
    with pytest.raises(ConfigError, match="does not open what a server names") as raised:
        settings_of({key: named}, node)
    assert named not in str(raised.value)
    assert settings_of({"model": "embedded", "data": "embedded"}, {}) == RunConfig()


def test_a_machine_of_the_servers_own_operator_takes_its_paths_and_expands_nothing(on_node: None) -> None:
    asked: Node = {"model": "/server/model", "data": "/server/rows.jsonl", "threads": 2}
    used = settings_of(asked, {"server-decides": True})
    assert (used.model, used.data, used.threads) == ("/server/model", "/server/rows.jsonl", 2)
    for key in FILES:
        for text in ("${HOME}/x", "~/x", "hub:${HOME}"):
            with pytest.raises(ConfigError, match="which a node does not expand"):
                settings_of({**asked, key: text}, {"server-decides": True})
    for untrue in ("true", 1, False, ""):
        with pytest.raises(ConfigError, match="does not open"):
            settings_of(asked, {"server-decides": untrue})


@pytest.mark.parametrize(
    ("key", "most"), [("batch_size", 1 << 16), ("accumulate", 1 << 16), ("local_steps", 1_000_000), ("max_length", 1 << 20)]
)
def test_a_node_does_a_bounded_amount_of_work(key: str, most: int, on_node: None) -> None:
    method: Node = {"algorithm": "ferret"}
    assert getattr(settings_of({**method, key: most}, {}), key) == most
    with pytest.raises(ConfigError, match=rf"'{key}' = {most + 1}: Input should be less than or equal to {most}"):
        settings_of({**method, key: most + 1}, {})


def test_directions_of_all_steps_are_bounded_together(on_node: None) -> None:
    with pytest.raises(ConfigError, match=r"local_steps \* directions_per_step = 6,553,600"):
        settings_of({"local_steps": 100, "directions_per_step": 65536}, {})


def test_an_unknown_setting_is_still_refused(on_node: None) -> None:
    with pytest.raises(ConfigError, match="There is no setting 'colour'"):
        settings_of({"colour": "red"}, {})
    assert for_node({"colour": "red"}, {})["colour"] == "red"


# ---------------------------------------------------------------------------------------------------- what goes back


def asked(run_config: Node, node: Node) -> tuple[str, str]:
    """Type and text of the problem that a node answers an introduction with."""
    LocalGrid(lambda message, context: message, 1, {})  # Flower's messages want an identity of the running task
    message = Message(RecordDict({"fedtune": ConfigRecord({})}), dst_node_id=5, message_type="query")
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(run_id=7, node_id=5, node_config=node, state=RecordDict(), run_config=run_config)
    record = client.app.app(message, context).content.config_records["fedtune"]
    return str(record["problem"]), str(record["text"])


@pytest.mark.parametrize("key", ["model", "data", "holdout_file"])
def test_the_nodes_environment_is_not_told(key: str, on_node: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for node in ({"worker": "off"}, {"worker": "off", "server-decides": True}):
        kind, text = asked({key: "${SECRET}"}, node)
        assert kind == "ConfigError"
        assert "hunter2" not in text


def test_a_text_that_goes_back_is_short_and_has_no_secrets(on_node: None) -> None:
    kind, text = asked({"algorithm": "x" * 1_000_000 + "\x1b[2J"}, {"worker": "off"})
    assert kind == "ConfigError"
    assert len(text) < LONGEST_TEXT + 100
    assert text.isprintable()
    assert "hf_" not in asked({"algorithm": "hf_" + "a" * 34}, {"worker": "off"})[1]


# ---------------------------------------------------------------------------------------------------- regular files


@pytest.fixture(params=["pipe", "socket", "folder", "device", "huge"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A name with the ending of a data file, at which something else is."""
    path = tmp_path / "rows.jsonl"
    with socket.socket(socket.AF_UNIX) as listener:
        match request.param:
            case "pipe":
                os.mkfifo(path)
            case "socket":
                listener.bind(os.path.relpath(path))
            case "folder":
                path.mkdir()
            case "device":
                path.symlink_to("/dev/zero")
            case "huge":
                with path.open("wb") as file:
                    file.truncate(9 << 30)
        yield path


def test_only_regular_files_are_read_as_data(odd: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"not a file|and 8,589,934,592 are the most|No such device"):
        open_regular(odd)
    with pytest.raises(DataError, match=r"not a file|and 8,589,934,592 are the most|No such device"):
        read_rows(str(odd))
    with pytest.raises(DataError):
        read_source(f"code-alpaca:{odd}", RunConfig())
    if odd.is_dir():
        assert len(source_digest(str(odd))) == 32
    else:
        assert source_digest(str(odd)) == b""
    (tmp_path / "splits/default").mkdir(parents=True)
    odd.rename(tmp_path / "splits/default/train_tasks.txt")
    with pytest.raises(DataError):
        read_source(f"natural-instructions:{tmp_path}", RunConfig())
    assert time.monotonic() - begun < 5.0


def test_a_model_folder_is_one_of_regular_files(odd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in embedded_path("model").iterdir():
        (folder / path.name).symlink_to(path)  # as in the cache of the hub
    (folder / "nothing").symlink_to(tmp_path / "missing")
    config = RunConfig(model=str(folder), device="cpu")
    assert load_model(config).source == str(folder)
    if odd.is_dir():
        return
    for name in ("vocab.json", "added_tokens.json"):
        odd.rename(folder / name)
        with pytest.raises(ModelError, match=rf"'{name}' in the model folder .* cannot be used: it (is a|has)"):
            load_model(config)
        (folder / name).rename(odd)
    if stat.S_ISREG(odd.stat().st_mode):
        return
    odd.rename(folder / "x.safetensors")
    with pytest.raises(ModelError):
        weights_fingerprint(folder)


@pytest.mark.parametrize("name", ["a\0b.jsonl", "x" * 300 + ".jsonl"])
def test_a_name_that_no_file_can_have_is_a_data_error(name: str) -> None:
    with pytest.raises(FedtuneError):
        read_rows(name)
    assert source_digest(name) == b""


def test_a_node_never_looks_at_what_the_server_names(on_node: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data and model of its own, a whole introduction opens neither path of the server."""
    opened: list[str] = []
    real = os.open

    def watching(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, *arguments, **more)

    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(embedded_path("tasks.jsonl").read_bytes())
    trap = tmp_path / "trap.jsonl"
    trap.write_text("{")
    monkeypatch.setattr(os, "open", watching)
    node: Node = {"worker": "off", "data": str(rows), "model": str(embedded_path("model")), "device": "cpu", "client-id": "a"}
    run: Node = {"data": str(trap), "holdout_file": str(trap), "model": "/server/model", "trust_remote_code": True}
    LocalGrid(lambda message, context: message, 1, {})
    message = Message(RecordDict({"fedtune": ConfigRecord({})}), dst_node_id=5, message_type="query")
    context = Context(run_id=7, node_id=5, node_config=node, state=RecordDict(), run_config=run)
    record = client.app.app(message, context).content.config_records["fedtune"]
    assert record["client"] == "a"
    assert str(rows) in opened
    assert str(trap) not in opened
