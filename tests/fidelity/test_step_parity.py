"""Local steps: our clients on the recorded rows and seeds measure what the official codes recorded.

Both codes round to float32 (u = 2^-24) in orders of their own, so equality is up to what rounding can do. With recorded
values: loss L = 5, mean |g| = 12.5, eps = 5e-4, lr = 3e-5, 50 steps.

LOSS_ROUNDING  e = 10 u L = 3e-6: the error of one loss. Against float64 on 200 recorded rows: 5.7e-7 rms, 3.0e-6 at most.

FedKSeed, g = (L+ - L-) / (2 eps):
  SCALAR  Four losses (two codes) off by e: 4 e / (2 eps) = 2 e / eps = 0.012 from the same weights. The official code
          perturbs in place (+eps z, -2 eps z, +eps z), which moves its weights by 5.6e-6 (norm) a step that is in no
          message; ours are never written. That drift, and the updates below, leave w a little elsewhere at each step of
          a round: as much again. 4 e / eps = 0.024, of a mean size of 12.5. Drift does not pass from round to round:
          both codes rebuild the model from scalars.
  LOSS    A step that differs by dg moves the loss by lr |g| dg; 50 steps with dg = 0.012, all of one sign, and e twice:
          50 * 3e-5 * 12.5 * 0.012 + 2 e = 2.3e-4.
  MEAN    The mean of 50 losses, between no drift and all of it: half of that.

Ferret, gradient steps from weights that nothing perturbs:
  FERRET_LOSS         2 e: nothing amplifies an error.
  NORM, COORDINATE    If every rounding of 20 updates came out differently in the two codes, deltas would differ by 1e-3 of
                      their norm (0.4 u |w| in each element and step, against norms of 0.001 to 0.05). Both add the same
                      steps in the same order, so hardly any does: a tenth of it, relative to a client's largest
                      coordinate. Norms feel it in second order: half of that again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.algorithms import State
from tests.fidelity import traces
from tests.fidelity.replay import (
    Replay,
    change,
    chosen,
    fedkseed_config,
    fedkseed_states,
    ferret_config,
    ferret_states,
    official_coordinates,
    use_recorded_choice,
    use_recorded_seeds,
)

LOSS_ROUNDING = 10 * 2**-24 * 5.0
SCALAR = 4 * LOSS_ROUNDING / 5e-4
LOSS = 50 * 3e-5 * 12.5 * 0.012 + 2 * LOSS_ROUNDING
MEAN = LOSS / 2
FERRET_LOSS = 2 * LOSS_ROUNDING
COORDINATE = 1e-4
NORM = 5e-5

pytestmark = pytest.mark.timeout(600)
rejection_sampling = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch before 2.13 draws trunc_normal_ differently from the recorded run"
)


@pytest.fixture(scope="module")
def zeroth(shared: Path) -> tuple[Replay, list[State]]:
    """The recorded FedKSeed run and its 17 states."""
    recording = traces.fedkseed(shared)
    replay = Replay(recording, fedkseed_config(shared, recording))
    with pytest.MonkeyPatch.context() as patch:
        use_recorded_seeds(patch, recording)
        return replay, list(fedkseed_states(replay, recording.rounds))


@pytest.fixture(scope="module")
def first(shared: Path) -> tuple[Replay, list[State]]:
    """The recorded Ferret run and its first three states."""
    recording = traces.ferret(shared)
    replay = Replay(recording, ferret_config(shared, recording))
    with pytest.MonkeyPatch.context() as patch:
        use_recorded_choice(patch, recording)
        return replay, list(ferret_states(replay, 2))


# ------------------------------------------------------------------ FedKSeed


@pytest.mark.parametrize("round", [1, 2])
def test_fedkseed_steps_of_one_client(zeroth: tuple[Replay, list[State]], round: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 of the 3,200 steps: the first client of rounds 1 and 2."""
    _check_fedkseed(*zeroth, round, 1, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("round", range(1, 17))
def test_fedkseed_steps_of_all_clients(zeroth: tuple[Replay, list[State]], round: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 3,200 steps."""
    _check_fedkseed(*zeroth, round, 4, monkeypatch)


def _check_fedkseed(replay: Replay, states: list[State], round: int, clients: int, patch: pytest.MonkeyPatch) -> None:
    recording, eps = replay.recording, replay.config.eps
    use_recorded_seeds(patch, recording)
    asked = recording.schedule[round - 1]
    for client, train_loss in list(zip(asked, recording.train_losses[round - 1], strict=True))[:clients]:
        replay.become(states[round - 1])
        update, middles = replay.train(states[round - 1], round, client)
        steps = recording.steps[round, client]
        scalars = np.array([step.scalar for step in steps])
        assert len(steps) == update.steps == 50
        assert np.abs(scalars).mean() > 200 * SCALAR  # so a wrong direction, sign or factor cannot pass
        assert np.abs(update.scalars - scalars).max() < SCALAR
        plus = np.array(middles) + eps * update.scalars.astype(np.float64)  # the official code logs L(w + eps z)
        assert np.abs(plus - [step.loss for step in steps]).max() < LOSS
        assert plus.mean() == pytest.approx(train_loss, abs=MEAN)
        assert update.train_loss == pytest.approx(np.mean(middles))


# ------------------------------------------------------------------ Ferret


@rejection_sampling
@pytest.mark.parametrize("round", [1, 2])
def test_ferret_steps_and_projection_of_one_client(
    first: tuple[Replay, list[State]], round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_ferret(*first, round, slice(0, 1), monkeypatch)


@pytest.mark.long
@rejection_sampling
@pytest.mark.parametrize("round", [1, 2])
def test_ferret_steps_and_projection_of_the_other_clients(
    first: tuple[Replay, list[State]], round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_ferret(*first, round, slice(1, 4), monkeypatch)


def _check_ferret(replay: Replay, states: list[State], round: int, which: slice, patch: pytest.MonkeyPatch) -> None:
    """Also that our allocation gives every block the number of coordinates that was recorded (`use_recorded_choice`)."""
    recording, layout = replay.recording, replay.layout
    assert isinstance(recording, traces.FerretRecording)
    use_recorded_choice(patch, recording)
    asked = recording.schedule[round - 1]
    for client, train_loss in list(zip(asked, recording.train_losses[round - 1], strict=True))[which]:
        start = replay.become(states[round - 1])
        update, losses = replay.train(states[round - 1], round, client)
        recorded = [step.loss for step in recording.steps[round, client]]
        assert len(recorded) == update.steps == 20
        assert np.abs(np.array(losses) - recorded).max() < FERRET_LOSS
        assert update.train_loss == pytest.approx(train_loss, abs=FERRET_LOSS)

        squares = np.zeros(layout.blocks)
        for entry, delta in zip(layout.entries, change(start, list(replay.replica.weights)), strict=True):
            squares[entry.block] += float(delta.square().sum())
        np.testing.assert_allclose(np.sqrt(squares), recording.delta_norms[round, client], rtol=NORM)

        wanted = chosen(recording, round, client)
        ours = np.zeros(wanted.shape)
        ours[wanted] = update.scalars
        theirs = recording.coordinates[round, client].T
        measured = official_coordinates(ours, update.counts, layout.block_sizes)
        assert np.abs(measured - theirs).max() < COORDINATE * np.abs(theirs).max()
