"""What a resumed run may change: one table, every setting in it, and each rule followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config import RunConfig
from fedtune.errors import ForeignLedgerError
from fedtune.resume import POLICY, Rule, held_against, stored_settings
from fedtune.run_folder import RunFolder

BEFORE = RunConfig(algorithm="ferret", rounds=5, clients=4, lr=1e-3)
OTHER: dict[str, object] = {
    "algorithm": "fedkseed-pro", "optimizer": "adamw", "anneal": "linear", "blocks": "one", "allocation": "norm",
    "reconstruction": "shrunken", "family": "gaussian", "sampling": "examples", "weighting": "equal", "scalar_bits": 32,
    "dtype": "bfloat16", "template": "plain", "partition": "quantity", "short_round": "repeat", "client_fraction": 0.25,
    "holdout": 0.2, "clients_per_round": 3, "clients": 9, "trust_remote_code": True, "holdout_category": "x",
    "min_replies": 2, "min_clients": 2, "device": "cpu", "device_map": "auto", "update_rounding": "master",
    "dirichlet_alpha": 0.1, "coefficient_bits": 9,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {}, BEFORE)


def other(key: str, base: RunConfig = BEFORE) -> RunConfig:
    """`base` with another value of `key`, unchecked: some settings belong to other algorithms or families."""
    value = getattr(base, key)
    changed = OTHER.get(key, f"{value}x" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1)
    assert changed != value
    return base.model_copy(update={key: changed})


def test_the_table_covers_every_setting() -> None:
    assert list(POLICY) != []
    assert set(POLICY) == set(RunConfig.model_fields)
    assert {rule for rule in POLICY.values()} == set(Rule)


@pytest.mark.parametrize("key", [key for key, rule in POLICY.items() if rule is Rule.MUST_MATCH])
def test_what_makes_a_state_must_match(key: str, folder: RunFolder) -> None:
    with pytest.raises(
        ForeignLedgerError, match=rf"was made with {key} = .* \(now .*\): resume it with the same values"
    ) as found:
        held_against(folder, BEFORE, other(key))
    assert found.value.facts["settings"] == (key,)


@pytest.mark.parametrize("key", [key for key, rule in POLICY.items() if rule is Rule.LEDGER_WINS])
def test_what_makes_losses_comparable_stays(key: str, folder: RunFolder) -> None:
    found = held_against(folder, BEFORE, other(key))
    assert (getattr(found.config, key), found.changed, found.news) == (getattr(BEFORE, key), {}, ())
    (sentence,) = found.unused
    assert sentence.startswith(f"{key} stays {getattr(BEFORE, key)!r} as in the rounds before: ")


@pytest.mark.parametrize("key", [key for key, rule in POLICY.items() if rule is Rule.NEW_WINS and key not in ("out", "resume")])
def test_what_says_where_and_how_may_change(key: str, folder: RunFolder) -> None:
    before = RunConfig(algorithm="fedkseed", rounds=5, clients=4) if key == "offload" else BEFORE  # ferret cannot offload
    asked = other(key, before)
    found = held_against(folder, before, asked)
    assert found.changed == {key: getattr(asked, key)}
    assert getattr(found.config, key) == getattr(asked, key)
    assert found.news == (f"{key} = {getattr(asked, key)!r} from here on; it was {getattr(before, key)!r}.",)
    assert found.unused == ()


def test_the_folder_is_where_it_is_now(folder: RunFolder) -> None:
    found = held_against(folder, BEFORE.replace(out="/then"), BEFORE.replace(resume="x"))
    assert (found.config.out, found.config.resume, found.changed, found.news) == (str(folder.path), "", {}, ())


def test_the_number_of_rounds_must_match_where_it_makes_the_schedule(folder: RunFolder) -> None:
    annealed = BEFORE.replace(anneal="cosine")
    with pytest.raises(ForeignLedgerError, match=r"rounds = 5 \(now 6\)"):
        held_against(folder, annealed, annealed.replace(rounds=6))


def test_without_a_ledger_the_settings_are_those_of_the_folder(folder: RunFolder) -> None:
    assert stored_settings(folder) == BEFORE
