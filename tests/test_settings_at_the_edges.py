"""Settings at their edges: whatever is given becomes a config or a ConfigError, and text survives every writer and reader."""

from __future__ import annotations

import json
import math
import os
import string
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as often
from hypothesis import strategies as st

from client.messages import config_of, settings_digest, settings_of
from fedtune import methods, toml
from fedtune.cli.presets import choose
from fedtune.config import RunConfig, read_setting
from fedtune.errors import ConfigError, ContradictionError, FedtuneError, UnknownSettingError
from fedtune.experiments import arms
from fedtune.experiments.cells import as_toml
from fedtune.values import as_written, kind_of
from simulations.engines.flower_app import config_lines
from simulations.engines.in_process import run_in_process

TEXTS = st.text(st.characters(), max_size=300)
SCALARS = st.one_of(
    st.booleans(), st.integers(), st.integers(-(10**30), 10**400), st.floats(), TEXTS, st.none(), st.binary(max_size=5),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.just(10**6000),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from(sorted(RunConfig.model_fields)), TEXTS)
MAPPINGS = st.dictionaries(KEYS, SCALARS, max_size=4)
SOME = st.fixed_dictionaries(
    {},
    optional={
        "algorithm": st.sampled_from(methods.ZEROTH_ORDER + methods.FIRST_ORDER),
        "K": st.sampled_from([1024, 64]),
        "family": st.sampled_from(["hadamard", "lowrank"]),
        "rank": st.sampled_from([1, 2]),
        "pool_every": st.sampled_from([0, 1, 5]),
        "scalar_bits": st.sampled_from([0, 16, 32]),
        "coefficient_bits": st.sampled_from([0, 8, 24]),
        "momentum": st.sampled_from([0.0, -0.0]),
    },
)


def outcome(make: Any) -> RunConfig | str:
    """The config, or the text of the ConfigError, which is short and one line."""
    try:
        found = make()
    except ConfigError as error:
        refused = str(error)
    else:
        assert isinstance(found, RunConfig)
        return found
    assert len(refused) < 1000
    assert "\n" not in refused
    return refused


# ---------------------------------------------------------------------------------------------------- whatever is given


@given(MAPPINGS)
def test_any_mapping_is_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    """By every way to construct one; what is accepted is stored, sent and written without loss."""
    found = outcome(lambda: RunConfig.from_mapping(values))
    assert outcome(lambda: RunConfig(**values)) == found
    assert outcome(lambda: RunConfig.model_validate(values)) == found
    assert outcome(lambda: RunConfig().replace(**values)) == found
    if isinstance(found, RunConfig):
        assert RunConfig.from_mapping(json.loads(json.dumps(found.as_mapping()))) == found
        assert config_of(settings_of(found), settings_digest(found)) == found
        assert RunConfig.from_mapping(toml.parse("\n".join(config_lines(found)))) == found
        kept = {key: value for key, value in found.as_mapping().items() if key not in ("out", "resume")}
        assert toml.parse(as_toml(found, "a title\nlr = 7")) == kept


@given(st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
@often(max_examples=50)
def test_any_bytes_of_a_preset_are_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("preset") / "p.toml"
    path.write_bytes(content)
    outcome(lambda: RunConfig.load(path))


@given(st.sampled_from(sorted(RunConfig.model_fields)) | TEXTS, TEXTS)
def test_any_setting_of_the_command_line_is_a_config_or_a_config_error(key: str, value: str) -> None:
    outcome(lambda: RunConfig.from_mapping(dict([read_setting(f"{key}={value}")])))


@given(SOME, SOME)
def test_replace_gives_what_constructing_afresh_gives(before: dict[str, Any], changes: dict[str, Any]) -> None:
    if isinstance(first := outcome(lambda: RunConfig(**before)), RunConfig):
        replaced = outcome(lambda: first.replace(**changes))
        assert replaced == outcome(lambda: RunConfig(**{**before, **changes}))
        if isinstance(replaced, RunConfig):
            assert replaced.replace().as_mapping() == replaced.as_mapping()


def test_what_an_algorithm_fixed_is_not_kept_by_the_next() -> None:
    assert RunConfig(algorithm="decomfl").replace(algorithm="fedkseed") == RunConfig()
    assert RunConfig(algorithm="fedavg").replace(algorithm="ferret", K=2200).coefficient_bits == 8
    assert RunConfig(coefficient_bits=8).replace(algorithm="fedavg").coefficient_bits == 8  # it was asked for
    with pytest.raises(ContradictionError, match="K = 2200 says nothing in fedavg"):
        RunConfig(algorithm="ferret", K=2200).replace(algorithm="fedavg")
    flower = {key: field.default for key, field in RunConfig.model_fields.items()}  # Flower's run config names every setting
    assert RunConfig.from_mapping({**flower, "algorithm": "decomfl"}) == RunConfig(algorithm="decomfl")
    recorded = RunConfig(algorithm="decomfl").as_mapping()
    assert RunConfig.from_mapping(recorded).as_mapping() == recorded


def test_a_shared_preset_gives_each_arm_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('K = 64\nfamily = "lowrank"\nrank = 2\npool_every = 1\n[arms.fedavg]\n[arms.fedkseed]\n')
    found = {arm.name: arms.config_of(arms.load(path), arm, {"pool_every": 2}) for arm in arms.load(path).arms}
    assert found["fedavg"] == RunConfig(algorithm="fedavg")
    assert (found["fedkseed"].K, found["fedkseed"].rank, found["fedkseed"].pool_every) == (64, 2, 2)
    with pytest.raises(ContradictionError, match="Arm 'fedavg': K = 9 says nothing"):
        arms.config_of(arms.load(path), arms.Arm("fedavg", "fedavg", "FedAvg", {"K": 9}), {})


# ---------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("rounds", True, "'rounds' = True: a whole number was expected."),
        ("K", "1024", "'K' = '1024': a whole number was expected, without quotes."),
        ("seed", 1.0, r"'seed' = 1.0: a whole number was expected \(write 1\)."),
        ("seed", 1.5, "'seed' = 1.5: a whole number was expected."),
        ("seed", 10**6000, "'seed' = a whole number of 19932 bits: a number of at most 64 bits was expected."),
        ("lr", 10**400, "'lr' = a whole number of 1329 bits"),
        ("lr", float("nan"), "'lr' = nan: "),
        ("lr", float("inf"), "'lr' = inf: "),
        ("lr", False, "'lr' = False: a number was expected."),
        ("offload", "yes", "'offload' = 'yes': true or false was expected, without quotes."),
        ("offload", 1, "'offload' = 1: true or false was expected."),
        ("scalar_bits", False, "'scalar_bits' = False: a whole number was expected."),
        ("scalar_bits", 7, "'scalar_bits' = 7: "),
        ("model", 7, "'model' = 7: text was expected."),
        ("model", {"a": {}}, "'model' = a table: text was expected."),
        ("model", None, "'model' = a value of type NoneType: text"),
        ("model", "", "'model' = ''"),
        ("data", "a\0b", r"'data' = 'a\\x00b': text without NUL"),
        ("data", "\udcff.jsonl", r"'data' = '\\udcff.jsonl': text without NUL and half characters was expected"),
        ("out", "x" * 5000, "at most 4096 characters"),
        ("out", "runs/" + "ä" * 200, "A name in setting 'out' has more than 255 bytes"),
        ("threads", 10**9, "'threads' = 1000000000"),
        ("batch_size", 10**12, "'batch_size' = 1000000000000"),
        ("round_timeout", 1e300, "'round_timeout' = 1e"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else type(value).__name__,
)
def test_a_value_of_another_type_or_that_cannot_be_kept_is_refused(key: str, value: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as refused:
        RunConfig(**{key: value})
    assert type(refused.value) is ConfigError


def test_whole_numbers_stand_for_themselves_and_minus_zero_is_zero() -> None:
    assert RunConfig(lr=1) == RunConfig(lr=1.0)
    assert isinstance(RunConfig(lr=1).lr, float)
    assert math.copysign(1.0, RunConfig(over_selection=-0.0).over_selection) == 1.0


def test_an_unknown_name_of_any_length_is_refused_at_once() -> None:
    with pytest.raises(UnknownSettingError, match=r"There is no setting 'xxxx.* \(\d+ more characters\)'"):
        RunConfig.from_mapping({"x" * 10**6: 1})
    with pytest.raises(UnknownSettingError, match="There is no setting '3'"):
        RunConfig.from_mapping({3: 1, "lr": 1})  # type: ignore[dict-item]


def test_every_kind_of_setting_is_known() -> None:
    assert {kind_of(field) for field in RunConfig.model_fields.values()} == {bool, int, float, str}


@given(st.integers(1, 9999), st.integers(1, 1000))
def test_a_share_is_what_is_written(share: int, clients: int) -> None:
    assert as_written(share / 10000) == Fraction(share, 10000)
    asked = RunConfig(clients=clients, client_fraction=share / 10000, over_selection=share / 10000)
    exact = max(1, share * clients // 10000)
    assert asked.asked_per_round == exact
    assert asked.invited_per_round == min(clients, -(-exact * (10000 + share) // 10000))


# ---------------------------------------------------------------------------------------------------- text and files


@pytest.mark.parametrize(
    "value", ["it's", '"', "a\\b", "a\tb\nc", "\x7f\x1f", "Grüße \u2028", "#x", "[a", "1e5", "true", "'q'", "${X}"]
)
def test_text_comes_back_from_every_writer_as_it_went_in(value: str, tmp_path: Path) -> None:
    config = RunConfig(model=value, holdout_category=value, algorithm="local")
    (tmp_path / "p.toml").write_text(as_toml(config, value), encoding="utf-8")
    assert RunConfig.load(tmp_path / "p.toml") == config
    assert choose(str(tmp_path / "p.toml"), (), {"model": value}).config == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model=it's", "it's"), ("model='it''s'", "'it''s'"), ("revision=123", "123"), ("only_client=7", "7"),
        ("revision=1e5", "1e5"), ("lr=1e-5", 1e-5), ("lr=1e999", math.inf), ("offload=true", True),
        ("model=" + "[" * 50_000, "[" * 50_000), ("seed=" + "1" * 6000, "1" * 6000),
    ],
)  # fmt: skip
def test_the_value_of_a_setting_on_the_command_line(text: str, value: object) -> None:
    assert read_setting(text)[1] == value
    outcome(lambda: RunConfig.from_mapping(dict([read_setting(text)])))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"model = " + b"[" * 5000, "is not valid TOML: brackets are nested too deeply"),
        (b"a = {" * 3000, "is not valid TOML"),
        (b"seed = " + b"1" * 6000, "is not valid TOML: Exceeds the limit"),
        (b"# " + b"x" * (64 << 10), "and 65,536 are the most that it may have"),
        ("lr = 1".encode("utf-16"), "is not UTF-8"),
        (b"lr = nan", "'lr' = nan"),
        (b"lr = 2026-11-28", "'lr' = a date: a number was expected"),
        (b"lr.x = 1", "'lr' = a table: a number was expected"),
        (b"model = " + b"[" * 300 + b"]" * 300, "'model' = a list"),
    ],
)
def test_a_preset_that_cannot_be_used_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(content)
    for reader in (RunConfig.load, lambda path: [arms.config_of(found := arms.load(path), arms._arm("local", {}), {}), found]):
        with pytest.raises(ConfigError, match=text):
            reader(tmp_path / "p.toml")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"\xef\xbb\xbflr = 0.5\n")
    assert RunConfig.load(tmp_path / "p.toml").lr == 0.5


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Neither a pipe, which would be waited for, nor a device without end, nor a folder."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    for path in (tmp_path / "pipe.toml", tmp_path / "folder.toml", Path("/dev/zero")):
        for reader in (RunConfig.load, arms.load, lambda place: choose(str(place))):
            with pytest.raises(ConfigError, match=r"not a file\. Give a TOML file|no preset file|No such device"):
                reader(path)


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "a\0b", "\udcff"])
def test_a_path_that_no_file_system_takes_is_refused(path: str) -> None:
    for reader in (RunConfig.load, choose):
        with pytest.raises(ConfigError):
            reader(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "${LONG}"}, {"model": "{}/rows.jsonl"}, {"model": "{}/pipe.jsonl"}, {"model": "{}"}, {"model": "a//b"},
        {"model": "ü/ü"}, {"model": "~nobody/x"}, {"model": "../" * 1300 + "x"}, {"data": ""}, {"data": "${LONG}"},
        {"data": "{}"}, {"data": "{}/pipe.jsonl"}, {"data": "{}/folder.jsonl"}, {"data": "/dev/zero"}, {"data": "ni:x"},
        {"data": "natural-instructions:{}?share=nan"}, {"data": "code-alpaca:${LONG}"}, {"holdout_file": "{}/pipe.jsonl"},
        {"instruction_column": ""}, {"output_column": "\n"}, {"device": "cuda:99999999999999999999"}, {"device": "cpu:-1"},
        {"device": "CPU"}, {"device": "meta"}, {"device": "cuda:\u0661"}, {"device": "cpu "}, {"out": "{}/rows.jsonl"},
        {"out": "{}/rows.jsonl/x"}, {"out": "{}/pipe.jsonl"}, {"out": "/proc/nothing"}, {"out": "${LONG}"}, {"resume": "{}"},
        {"resume": "{}/pipe.jsonl"}, {"resume": "nowhere"}, {"holdout": 0.0}, {"holdout": 0.999999}, {"clients": 10**6},
        {"partition": "column", "category_column": ""}, {"algorithm": "lora", "lora_targets": ","},
        {"algorithm": "local", "only_client": "nobody"}, {"max_length": 8}, {"max_length": 2**20},
    ],
    ids=lambda changes: " ".join(f"{key}={str(value)[:25]!r}" for key, value in changes.items()),
)  # fmt: skip
@pytest.mark.timeout(60)
def test_a_run_with_a_mean_setting_ends_with_an_error_of_ours(
    changes: dict[str, Any], tmp_path: Path, tiny_folder: Path, instructions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first round; nothing is waited for, and nothing is read without end."""
    monkeypatch.setenv("LONG", "x" * 300)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    usual = {
        "model": str(tiny_folder), "data": str(instructions), "out": str(tmp_path / "run"), "device": "cpu", "threads": 1,
        "clients": 2, "rounds": 1, "local_steps": 1, "min_samples": 2, "max_length": 64, "template": "plain",
    }  # fmt: skip
    named = {key: value.replace("{}", str(tmp_path)) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(FedtuneError):
        run_in_process(RunConfig.from_mapping({**usual, **named}).with_absolute_paths())
