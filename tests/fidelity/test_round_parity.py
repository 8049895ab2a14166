"""Rounds: our server, fed with what the recorded clients sent, has the recorded models.

Tolerances, from float32 rounding (u = 2^-24) of the rebuild w = w0 + sum_k C_k z_k with up to n = 977 seeds. The recorded
model has d = 260,032 parameters, norm 91, a gradient of norm 17 (up to 37 for one sample), and changes by 0.7 to 1.7 a round.

- Ours rounds each C_k to the grid of 24-bit messages: its step is 1.5e-8 at sum |C| = 0.2, the error of one C_k s = 4e-9.
- The official code adds seed by seed to the weights and rounds each time: 0.4 u 91 sqrt(n) = 7e-5, in a random direction.

EVALUATION  The first moves the loss by s sqrt(n) times a slope of 17 to 37, 2e-6 to 5e-6, the second by 7e-5 * 17 / sqrt(d)
            = 2e-6. Four times the larger: 2e-5.
STEP_NORM   The errors of two rounds along the change itself are sqrt(2) s sqrt(d) = 3e-6, relative to the smallest change
            4e-6. Four times that, and the recorded norms' own float32: 2e-5.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.fedkseed import DRAW_SCALE, draw_weights, probabilities
from fedtune.algorithms.ferret import OFFICIAL_PIECE_NORM
from fedtune.layout import Layout
from tests.fidelity import traces
from tests.fidelity.replay import (
    Replay,
    change,
    fedkseed_config,
    fedkseed_states,
    ferret_config,
    ferret_states,
    norm,
    use_recorded_choice,
    use_recorded_seeds,
)

EVALUATION = 2e-5
STEP_NORM = 2e-5

pytestmark = pytest.mark.timeout(600)
rejection_sampling = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch before 2.13 draws trunc_normal_ differently from the recorded run"
)


@pytest.fixture
def zeroth(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    recording = traces.fedkseed(shared)
    use_recorded_seeds(monkeypatch, recording)
    return Replay(recording, fedkseed_config(shared, recording))


@pytest.fixture
def first(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    recording = traces.ferret(shared)
    use_recorded_choice(monkeypatch, recording)
    return Replay(recording, ferret_config(shared, recording))


# ------------------------------------------------------------------ FedKSeed


def test_fedkseed_models_of_some_rounds(zeroth: Replay) -> None:
    """Rounds 0, 1, 2, 8 and 16; up to 977 of the 1,024 seeds."""
    _check_rounds(zeroth, list(fedkseed_states(zeroth, 16)), [0, 1, 2, 8, 16])


@pytest.mark.long
def test_fedkseed_models_of_all_rounds(zeroth: Replay) -> None:
    _check_rounds(zeroth, list(fedkseed_states(zeroth, 16)), list(range(17)))


def _check_rounds(replay: Replay, states: list, rounds: list[int]) -> None:  # type: ignore[type-arg]
    """Held-out loss after each of `rounds`, and the norm of the model's change where the round before is among them."""
    recording, before = replay.recording, {}
    for round in rounds:
        weights = replay.become(states[round])
        assert replay.heldout_loss() == pytest.approx(recording.evaluations[round], abs=EVALUATION)
        if round - 1 in before:
            moved = norm(change(before[round - 1], weights))
            assert moved == pytest.approx(recording.step_norms[round - 1], rel=STEP_NORM)
        before = {round: weights}


def test_equal_weights_lead_elsewhere(zeroth: Replay, shared: Path) -> None:
    """The recorded run weighs clients by their samples; the check of round 1 tells the two apart."""
    equal = Replay(zeroth.recording, fedkseed_config(shared, zeroth.recording, weighting="equal"))
    *_, state = fedkseed_states(equal, 1)
    equal.become(state)
    assert abs(equal.heldout_loss() - zeroth.recording.evaluations[1]) > 50 * EVALUATION


def official_probabilities(history: list[list[float]]) -> npt.NDArray[np.float64]:
    """FedKSeed-Pro's official code (zhenqincn/FedKSeed, server.py, calculate_probabilities), restated."""
    mean = np.array([np.mean(np.abs(np.clip(one, -1000.0, 1000.0))) for one in history])
    scaled = (mean - np.min(mean)) / (np.max(mean) + 1e-10 - np.min(mean))
    weights = np.exp(scaled - np.max(scaled))
    return np.asarray(weights / np.sum(weights))


def test_pro_probabilities_are_the_official_formula_on_recorded_scalars(zeroth: Replay) -> None:
    """After every round; the draw weights that clients get are those probabilities to half a part in 65,535."""
    recording = zeroth.recording
    pro = Replay(recording, zeroth.config.replace(algorithm="fedkseed-pro"))
    history = [[0.0] for _ in recording.candidates]  # grad_initial
    for round, state in enumerate(fedkseed_states(pro, 16)):
        for client in recording.schedule[round - 1] if round else ():
            for step in recording.steps[round, client]:
                history[recording.numbers[step.seed]].append(step.scalar)
        expected = official_probabilities(history)
        got = probabilities(state.statistics["magnitude"], state.statistics["count"])
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        np.testing.assert_allclose(draw_weights(state) / DRAW_SCALE, expected / expected.max(), atol=0.5 / DRAW_SCALE + 1e-9)
    assert expected.max() / expected.min() == pytest.approx(np.e, rel=1e-6)


# ------------------------------------------------------------------ Ferret


def test_ferret_groups_are_the_official_ones(first: Replay) -> None:
    recording = first.recording
    assert isinstance(recording, traces.FerretRecording)
    layout = Layout.of(first.lm.model, "grouped")
    names = [tuple(entry.name for entry in layout.entries if entry.block == block) for block in range(layout.blocks)]
    assert tuple(names) == recording.group_names
    assert layout.block_sizes == recording.group_sizes
    assert ALGORITHMS["ferret"].block_rule(first.config) == "grouped"


@rejection_sampling
def test_ferret_models_of_the_first_rounds(first: Replay) -> None:
    """No piece comes near the norm at which it would be clipped, so that how its norm is taken is not in question."""
    states = list(ferret_states(first, 2))
    _check_rounds(first, states, [0, 1, 2])
    sizes = np.sqrt(np.array(first.layout.block_sizes))[:, None]
    assert max(np.abs(state.statistics["velocity"] * sizes).max() for state in states) < OFFICIAL_PIECE_NORM / 100


def test_the_official_scale_is_a_third_of_the_papers(first: Replay, shared: Path) -> None:
    """So server_lr = 3 of the recorded run is our reconstruction = unbiased with server_lr = 1."""
    paper = Replay(first.recording, ferret_config(shared, first.recording, reconstruction="unbiased", server_lr=1.0))
    for ours, official in zip(ferret_states(paper, 2), ferret_states(first, 2), strict=True):
        np.testing.assert_allclose(ours.values, official.values, rtol=1e-12)


# ------------------------------------------------------------------ what the documentation says


def test_the_documented_settings_are_the_ones_tested_here(zeroth: Replay, first: Replay) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text(encoding="utf-8")
    documented = [tomllib.loads(block.split("```")[0]) for block in page.split("```toml\n")[1:]]
    assert len(documented) == 2
    for settings, replay in zip(documented, (zeroth, first), strict=True):
        tested = replay.config.as_mapping()
        assert settings == {key: tested[key] for key in settings}
