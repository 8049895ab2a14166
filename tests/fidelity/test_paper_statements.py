"""What the papers state about FedKSeed and Ferret, measured on our code: one test a statement.

F is FedKSeed (Qin et al., arXiv 2312.06353; its statements as in its abstract and its official code), R is Ferret (Shu et
al., arXiv 2409.06277). Where a bound is statistical it is stated in standard errors, derived in the docstring; seeds are
fixed, so a test that passes once passes always. Statements that another file checks already:

F: C_k = -lr sum_i c_i a_k(i), c_i = n_i / sum n
    tests/algorithms/test_fedkseed.py::test_the_state_is_the_weighted_mean_of_the_clients_sums
F: the seeds of local steps are drawn uniformly, with replacement
    tests/algorithms/test_fedkseed.py::test_all_seeds_of_the_pool_are_used
F, Pro: p = softmax of the min-max scaled mean sizes of scalar gradients
    tests/algorithms/test_fedkseed.py::test_pro_probabilities_follow_the_published_formula
F, Pro: two chances differ by a factor of e at most
    tests/algorithms/test_fedkseed.py::test_pro_probabilities_differ_by_a_factor_of_e_at_most
R: the server adds the mean of the clients' reconstructions
    tests/algorithms/test_ferret.py::test_aggregation_is_the_weighted_sum_of_scaled_coordinates
F and R: directions with E[z z^T] = I
    tests/directions/test_families.py::test_directions_have_mean_zero_and_unit_covariance_over_pool_seeds
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtune import wire
from fedtune.algorithms import ALGORITHMS, LocalWork
from fedtune.algorithms.coordinates import allocate, pool_size
from fedtune.algorithms.fedkseed import draw_weights, drawn_seeds, probabilities
from fedtune.algorithms.ferret import local_update, project
from fedtune.algorithms.zeroth_order import two_point
from fedtune.coefficients import Coefficients, PoolCoefficients, quantise
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, client_batches
from fedtune.data.encode import Encoded
from fedtune.directions import Directions, Pool
from fedtune.directions.base import F64
from fedtune.directions.oracle import dense
from fedtune.evaluation import response_loss
from fedtune.layout import Layout
from fedtune.models import LanguageModel
from fedtune.perturb import Perturbation
from fedtune.replica import Replica
from fedtune.seeds import Stream
from fedtune.wire import Instruction, Kind, Status, Update
from server.sampling import sample_clients
from tests.fidelity.changes import Made

FAMILIES = ("hadamard", "rademacher", "gaussian", "torch")
NO_WEIGHTS = np.zeros(0, dtype=np.uint16)
TEXT = tuple(Encoded(tuple(3 + (7 * row + i * i) % 250 for i in range(14 + row)), 6, row) for row in range(6))


def flat(tensors: list[Tensor]) -> F64:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double().numpy()


def instruction(directions: Directions, round: int = 1) -> Instruction:
    """An instruction of `round` that starts from the base model."""
    pool, layout = directions.pool, directions.layout
    start = quantise(pool, np.zeros((layout.blocks, pool.size)), 24)
    return Instruction(round, b"f" * 16, layout.digest, b"d" * 16, 0, (start,), NO_WEIGHTS)


def work(directions: Directions, model: nn.Module, batches: Iterator[Batch], client: str = "0") -> LocalWork:
    weights = list(model.parameters())
    perturbation = Perturbation(model, directions.layout)
    return LocalWork(model, weights, response_loss, batches, directions, perturbation, client, len(TEXT))


def text_batches(batch_size: int = 1) -> Iterator[Batch]:
    return client_batches(TEXT, batch_size, Stream(1, "batches"), 0)


# ---------------------------------------------------------------------------------------------------- FedKSeed: estimate


class Quadratic(nn.Module):
    """L(w) = w^T A w / 2 + b^T w over one vector of 16 and one matrix of 4 x 2: two-point differences of it are exact."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.vector = nn.Parameter(torch.randn(16, generator=generator))
        self.matrix = nn.Parameter(torch.randn(4, 2, generator=generator))
        root = torch.randn(24, 24, generator=generator) / 5
        self.a, self.b = root @ root.T, torch.randn(24, generator=generator)

    def forward(self) -> Tensor:
        w = torch.cat([self.vector, self.matrix.reshape(-1)])
        return w @ self.a @ w / 2 + self.b @ w


def of_quadratic(model: nn.Module, batch: object) -> Tensor:
    value: Tensor = model()
    return value


def gradient_of(loss: Tensor, model: nn.Module) -> F64:
    return flat(list(torch.autograd.grad(loss, list(model.parameters()))))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_point_estimate_is_unbiased_over_pools(family: str) -> None:
    """F, update rule: E[g z] is the gradient, g = (L(w + eps z) - L(w - eps z)) / (2 eps).

    Mean of g z over N = 1500 pools, one seed each, on a quadratic with d = 24. For g = <grad, z> the variance along the
    gradient is at most 2 ||grad||^2, and over all directions (d + 1) ||grad||^2, so the slope <mean, grad> / ||grad||^2 has a
    standard error of at most sqrt(2 / N) = 0.037 (bound: 4 of them) and the error of the mean is near
    sqrt((d + 1) / N) = 0.13 (bound: 1.5 times). Half the estimate (a missing 2 in 2 eps, or one-sided steps of 2 eps) gives
    slope 2 or 1/2, a z that differs between the two evaluations a slope near 0. hadamard's first position is common to a
    pool's seeds, not to pools, so it needs no exception here.
    """
    model, count = Quadratic(), 1500
    layout = Layout.of(model)
    gradient = gradient_of(model(), model)
    total = np.zeros(layout.numel)
    perturbation = Perturbation(model, layout)
    for seed in range(count):
        directions = Directions(layout, Pool(family, seed, 4))
        one = LocalWork(model, [], of_quadratic, iter([None]), directions, perturbation, "0", 1)
        z = [torch.zeros(entry.shape) for entry in layout.entries]
        directions.add(z, seed % 4, 1.0)
        total += two_point(one, [seed % 4], 0.0625)[0][0] * flat(z)
    mean = total / count
    slope = float(mean @ gradient / (gradient @ gradient))
    assert slope == pytest.approx(1.0, abs=4 * math.sqrt(2 / count))
    error = float(np.linalg.norm(mean - gradient) / np.linalg.norm(gradient))
    assert error < 1.5 * math.sqrt((layout.numel + 1) / count)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scalar_gradient_is_the_slope_along_its_direction(family: str, tiny_lm: LanguageModel) -> None:
    """F, update rule: on a Llama, g is <grad L, z> up to O(eps^2); autograd gives the gradient.

    eps = 1e-3 with float32 losses near 5.5 (rounding 5e-7): g carries a rounding error of about 3e-4 and a curvature error
    of eps^2 times a third derivative. Bound: 1 % of ||grad|| for each of 24 pools, where <grad, z> itself has standard
    deviation ||grad||. Any family that gave client code other directions than `add` (which the replay uses) would fail.
    Over the pools the slope of g z on the gradient is then 1 within 4 sqrt(2 / 24).
    """
    model, layout = tiny_lm.model, Layout.of(tiny_lm.model)
    batch = next(text_batches(3))
    gradient = gradient_of(response_loss(model, batch), model)
    size, slopes = float(np.linalg.norm(gradient)), []
    perturbation = Perturbation(model, layout)
    for seed in range(24):
        directions = Directions(layout, Pool(family, seed, 8))
        one = LocalWork(model, [], response_loss, iter([batch]), directions, perturbation, "0", 1)
        z = [torch.zeros(entry.shape) for entry in layout.entries]
        directions.add(z, seed % 8, 1.0)
        along = float(gradient @ flat(z))
        measured = two_point(one, [seed % 8], 1e-3)[0][0]
        assert measured == pytest.approx(along, abs=0.01 * size)
        slopes.append(measured * along / size**2)
    assert np.mean(slopes) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 24))


# ---------------------------------------------------------------------------------------------------- FedKSeed: replay


@pytest.mark.parametrize("family", ["hadamard", "rademacher"])
def test_replay_is_the_weighted_mean_of_the_clients_models(family: str) -> None:
    """F, server: w0 - lr sum_k A_k z_k equals sum_i c_i w_i, exactly.

    The base is zero, lr is a power of two, scalar gradients are small whole numbers and the shares are 1/4 and 3/4, so
    every number on both sides is exact in float32 and the two must agree to the last bit. A sum instead of a mean, another
    order of seeds, or weights from anything but n_i fails by far.
    """
    layout = Layout.from_shapes([("a", (5000,)), ("b", (33, 7))])
    config = RunConfig(algorithm="fedkseed", K=64, lr=2.0**-7, local_steps=40, family=family, coefficient_bits=24)
    algorithm = ALGORITHMS["fedkseed"]
    state = algorithm.start(config, layout)
    directions = Directions(layout, state.pool)
    updates, mean = {}, np.zeros(layout.numel)
    for client, (examples, share) in {"0": (10, 0.25), "1": (30, 0.75)}.items():
        scalars = (Stream(5, client).below(15, 40) - 7).astype(np.float32)
        updates[client] = Update(1, b"d" * 16, Status.FINISHED, 40, examples, 1.0, scalars, np.zeros(0, np.int64))
        model = [torch.zeros(entry.shape) for entry in layout.entries]
        for k, g in zip(drawn_seeds(config, 1, client, 64, NO_WEIGHTS).tolist(), scalars.tolist(), strict=True):
            directions.add(model, k, -config.lr * g)
        mean += share * flat(model)
    pool = algorithm.aggregate(state, updates, config, layout).published(24).pools[0]
    replayed = [torch.zeros(entry.shape) for entry in layout.entries]
    directions.combine(replayed, replayed, pool.values)
    assert np.array_equal(flat(replayed), mean)
    assert np.abs(mean).max() > 0


@pytest.mark.parametrize(("bits", "bound"), [(24, 1e-5), (8, 0.02)])
def test_replay_on_a_real_model_differs_by_rounding_only(bits: int, bound: float, tiny_lm: LanguageModel) -> None:
    """F, server, measured: three clients, 30 steps each, gaussian directions, unequal shares, float32 weights.

    Each of a client's 30 additions rounds a weight near 0.02 by 5e-10 (rms) while the update of a weight is near 1e-3: a
    relative gap of about 1e-6; the grid of 24 bits adds less. At 8 bits the grid's step is up to 1/64 of the largest
    coefficient: uniform rounding (step / sqrt(12)) against coefficients of rms near half the largest gives 1 %. Measured:
    1.1e-6 and 1.0e-2. What the official order of operations does instead is in test_defects_of_others.py.
    """
    layout = Layout.of(tiny_lm.model)
    config = RunConfig(algorithm="fedkseed", K=32, lr=1e-3, local_steps=30, family="gaussian", scalar_bits=32)
    algorithm = ALGORITHMS["fedkseed"]
    state = algorithm.start(config, layout)
    replica = Replica(tiny_lm.model, layout)
    directions, base = replica.directions(state.pool), flat(replica.weights)
    updates, mean = {}, np.zeros(layout.numel)
    for client, examples in {"0": 10, "1": 20, "2": 70}.items():
        replica.touch()
        replica.become(Coefficients(()))
        one = work(directions, tiny_lm.model, text_batches(2), client)
        update = algorithm.local_update(one, config, instruction(directions))
        updates[client] = replace(update, examples=examples)
        mean += examples / 100 * (flat(replica.weights) - base)
    replica.touch()
    replica.become(algorithm.aggregate(state, updates, config, layout).published(bits))
    gap = np.linalg.norm(flat(replica.weights) - base - mean) / np.linalg.norm(mean)
    assert 0 < gap < bound


def test_rounds_with_fresh_pools_add_up() -> None:
    """R Algorithm 1 (a new seed each round), here for both algorithms: w = w0 + the sum over all rounds' pools.

    Three rounds with pool_every = 1 against float64 sums over dense directions of every pool. float32 sums of three terms
    of size 1e-2 on weights near 1 round by about 2^-24 each: bound 5e-7 absolute. A pool that was forgotten, folded twice
    or regenerated from the wrong number is off by 1e-2.
    """
    model = nn.ParameterList([nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(7, 9))])
    for name in ("fedkseed", "ferret"):
        layout = Layout.of(model, "one" if name == "fedkseed" else "tensor")
        config = RunConfig(algorithm=name, K=16, local_steps=8, lr=1e-2, pool_every=1, rounds=3)
        algorithm = ALGORITHMS[name]
        replica, state = Replica(model, layout), algorithm.start(config, layout)
        expected = flat(replica.weights)
        for round in (1, 2, 3):
            state = algorithm.begin_round(state, config, layout)
            counts = np.zeros(0, np.int64) if name == "fedkseed" else np.array([5, 3])
            scalars = Stream(round, "scalars").normal(8).astype(np.float32)
            update = Update(round, b"d" * 16, Status.FINISHED, 8, 10, 1.0, scalars, counts)
            state = algorithm.aggregate(state, {"0": update}, config, layout)
        published = state.published(config.coefficient_bits)
        assert len({pool.pool.seed for pool in published.pools}) == 3
        for pool in published.pools:
            expected += moved_by(pool, layout)
        replica.become(published)
        np.testing.assert_allclose(flat(replica.weights), expected, rtol=0, atol=5e-7)
        assert np.abs(expected - 1.0).max() > 1e-3
        replica.become(Coefficients(()))


def moved_by(pool: PoolCoefficients, layout: Layout) -> F64:
    """float64 [d]: sum_k C[block, k] z_k from the dense directions."""
    block_of = np.concatenate([np.full(entry.numel, entry.block) for entry in layout.entries])
    return np.asarray((pool.values.astype(np.float64)[block_of].T * dense(pool.pool, layout)).sum(axis=0))


# ---------------------------------------------------------------------------------------------------- FedKSeed: the rest


@given(st.lists(st.tuples(st.floats(0, 1e9), st.integers(0, 500)), min_size=2, max_size=64))
def test_pro_draws_by_the_published_probabilities_after_the_wire(histories: list[tuple[float, int]]) -> None:
    """F, Pro: chances p on the wire are whole numbers; their ratio stays within e, each within 1 in 65,535 of p."""
    magnitude = np.array([total if count else 0.0 for total, count in histories])
    count = np.array([float(count) for _, count in histories])
    p = probabilities(magnitude, count)
    layout = Layout.from_shapes([("a", (4,))])
    state = ALGORITHMS["fedkseed-pro"].start(RunConfig(algorithm="fedkseed-pro", K=len(p)), layout)
    weights = draw_weights(replace(state, statistics={"magnitude": magnitude, "count": count})).astype(np.float64)
    assert weights.min() > 0
    assert weights.max() / weights.min() <= math.e * (1 + 1e-4)
    np.testing.assert_allclose(weights / weights.max(), p / p.max(), atol=1 / 65535)


@pytest.mark.parametrize(
    ("clients", "fraction", "asked"), [(738, 0.05, 36), (200, 0.05, 10), (8, 0.5, 4), (20, 0.05, 1), (3, 0.05, 1)]
)
def test_a_round_asks_a_fraction_of_the_clients(clients: int, fraction: float, asked: int) -> None:
    """F and R, experiments: int(m N) clients, without replacement (36 of 738, 10 of 200); at least one here."""
    config = RunConfig(clients=clients, client_fraction=fraction)
    chosen = sample_clients(config, 1, {str(client): 10 for client in range(clients)})
    assert (len(chosen), len(set(chosen))) == (asked, asked)


# ---------------------------------------------------------------------------------------------------- Ferret: rebuilding


def ferret(family: str, K: int, **changes: object) -> RunConfig:
    """A budget of K coordinates, messages as fine as the wire allows."""
    fine = {"algorithm": "ferret", "K": K, "pool_size": K, "family": family, "coefficient_bits": 24, "scalar_bits": 32}
    return RunConfig.from_mapping({**fine, "pool_every": 1, "rounds": 1000, **changes})


def rebuilt(deltas: list[Tensor], config: RunConfig, layout: Layout, round: int, client: str = "0") -> F64:
    """The server's step for one client's update: project, encode, decode, aggregate, round to the grid, combine."""
    algorithm = ALGORITHMS["ferret"]
    pool = algorithm.pool(config, layout, round - 1)
    directions = Directions(layout, pool)
    model = nn.Module()
    one = LocalWork(model, [], response_loss, iter([]), directions, None, client, 10)  # type: ignore[arg-type]
    counts, coordinates = project(one, Made(deltas), config, instruction(directions, round))  # type: ignore[arg-type, misc]
    sent = Update(round, b"d" * 16, Status.FINISHED, 50, 10, 1.0, coordinates.astype(np.float32), counts)
    update = wire.decode_update(
        wire.encode_update(sent, config.scalar_bits, client="c"), kind=Kind.COORDINATES, round=round, digest=b"d" * 16,
        client="c", max_steps=50, blocks=layout.blocks, max_count=pool.size, bits=config.scalar_bits,
    )  # fmt: skip
    state = replace(algorithm.start(config, layout), round=round - 1, pool=pool)
    step = algorithm.aggregate(state, {client: update}, config, layout).published(config.coefficient_bits).pools[-1]
    out = [torch.zeros(entry.shape) for entry in layout.entries]
    directions.combine(out, out, step.values)
    return flat(out)


def an_update(layout: Layout, seed: int = 0) -> list[Tensor]:
    """A local update, spread evenly over the model, of the size that real ones have."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(entry.shape, generator=generator) * 1e-3 for entry in layout.entries]


def rebuild_errors(family: str, K: int, layout: Layout, pools: int, **changes: object) -> tuple[F64, F64, F64]:
    """Over `pools` fresh pools: slope on the update, squared relative error, cosine; each float64 [pools]."""
    config, deltas = ferret(family, K, **changes), an_update(layout)
    true = flat(deltas)
    norm = np.linalg.norm(true)
    results = [rebuilt(deltas, config, layout, round) for round in range(1, pools + 1)]
    slope = [r @ true / norm**2 for r in results]
    error = [np.sum((r - true) ** 2) / norm**2 for r in results]
    cosine = [r @ true / (norm * np.linalg.norm(r)) for r in results]
    return np.array(slope), np.array(error), np.array(cosine)


TILE = Layout.from_shapes([("a", (64, 64))])  # d = 4096: one full tile of hadamard
SHORT = Layout.from_shapes([("a", (40, 30)), ("b", (700,)), ("c", (50, 20)), ("d", (1196,))])  # d = 4096 in four tensors


def squared_error(family: str, K: int, layout: Layout) -> float:
    """E ||rebuilt - delta||^2 / ||delta||^2 of the unbiased scale, for an update that is spread evenly.

    (1/K) V V^T has diagonal 1 and off-diagonal variance 1/K for independent entries, and for normal ones also a diagonal
    variance of 2/K: (d - 1)/K and (d + 1)/K. Two positions of one hadamard tile of n = 4096 share a Walsh function that is
    balanced over the n columns, and K of them are drawn without replacement: variance (n - K)/(n - 1)/K instead of 1/K.
    """
    d, n = layout.numel, 4096
    if family == "hadamard":
        inside = sum(e.numel * (e.numel - 1) for e in layout.entries) / d * (n - K) / (n - 1)
        return (inside + sum(e.numel * (d - e.numel) for e in layout.entries) / d) / K
    return (d - 1 if family == "rademacher" else d + 1) / K


@pytest.mark.parametrize("layout", [TILE, SHORT], ids=["one-tensor", "four-tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reconstruction_is_unbiased(family: str, layout: Layout) -> None:
    """R Theorem 1: E[rebuilt] = delta. Measured as the slope <rebuilt, delta> / ||delta||^2 = (1/K) sum_k <z_k, u>^2.

    u is a unit vector, so <z_k, u>^2 has mean 1 and variance 2 at most (normal): over M pools of K seeds the standard error
    is at most sqrt(2 / (K M)) = 0.0126 for K = 256, M = 50; bound: 4 of them. One third, which the official code's scale
    gives, is 53 of them away. (torch, which is slow, has M = 10: 0.028.)
    """
    pools = 10 if family == "torch" else 50
    slope, _, _ = rebuild_errors(family, 256, layout, pools)
    assert slope.mean() == pytest.approx(1.0, abs=4 * math.sqrt(2 / (256 * pools)))


def test_the_official_scale_returns_a_third() -> None:
    """R Algorithm 1 against its official code: bases are normal, cut at +-1/sqrt(d), of variance near 1/(3 d).

    The paper's scale 1/(rho K), rho = 1/(3 d), is unbiased; the code's d/K has the slope d rho = 1/3. 4,000 bases of
    d = 100: standard error near sqrt(0.8 / 4000) of the mean, 0.014 relative; bound 4 of them. Our setting
    `reconstruction = "official"` has that slope on purpose: 16 pools of K = 64, 4 standard errors of a third.
    """
    d, count = 100, 4000
    bases = torch.empty(count, d)
    limit = 1 / math.sqrt(d)
    torch.nn.init.trunc_normal_(bases, 0.0, 1.0, -limit, limit, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(d, generator=torch.Generator().manual_seed(1)).double()
    coordinates = bases.double() @ delta
    slope = float(coordinates @ coordinates / count / (delta @ delta))
    assert d * slope == pytest.approx(1 / 3, rel=0.06)
    assert 3 * d * slope == pytest.approx(1.0, rel=0.06)
    for family in ("hadamard", "torch-truncated"):
        ours, _, _ = rebuild_errors(family, 64, SHORT, 16, reconstruction="official")
        assert ours.mean() == pytest.approx(1 / 3, rel=4 * math.sqrt(2 / (64 * 16)))


@pytest.mark.parametrize(("K", "pools"), [(256, 24), (2048, 6)])
@pytest.mark.parametrize("layout", [TILE, SHORT], ids=["one-tensor", "four-tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_relative_error_and_cosine_of_a_reconstruction(family: str, layout: Layout, K: int, pools: int) -> None:
    """R Theorem 2 and Figure 7: for one update the relative error is sqrt(d/K), the cosine sqrt(K / (K + d)).

    Exact values by family in `squared_error`, cosine 1/sqrt(1 + error^2). ||rebuilt||^2 = (d/K^2) sum_k <z_k, delta>^2 up to
    cross terms, so its relative standard error over M pools is about sqrt(2 / (K M)): 1.8 % and 1.3 %; bound: 4 of them.
    hadamard is never worse, and at K = d/2 in a full tile better by a factor of two. The official scale's error
    would be a ninth of it plus (2/3)^2.
    """
    _, error, cosine = rebuild_errors(family, K, layout, pools)
    expected, tolerance = squared_error(family, K, layout), 4 * math.sqrt(2 / (K * pools))
    assert error.mean() == pytest.approx(expected, rel=tolerance)
    assert cosine.mean() == pytest.approx(1 / math.sqrt(1 + expected), rel=tolerance)
    assert expected < (layout.numel / K) * (1 + 1 / K) + 1 / K
    if family != "hadamard":
        assert math.sqrt(expected) == pytest.approx(math.sqrt(layout.numel / K), rel=1e-3)
        assert 1 / math.sqrt(1 + expected) == pytest.approx(math.sqrt(K / (K + layout.numel)), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shrunken_scale_keeps_the_error_below_one_and_least(family: str) -> None:
    """Follows from R Theorem 2: of a r, r unbiased with squared error e^2, the error is 1 - 2a + a^2 (1 + e^2), least at
    a = 1/(1 + e^2) = K/(K + d), which is `reconstruction = "shrunken"`.

    Measured with K = 1024, d = 4096 in four tensors: error e^2/(1 + e^2) = 0.80 within 2 %, below 1 and below that of 0.8
    and 1.25 times the scale; the unbiased scale's is 4. (For hadamard in full tiles with K near d a little less shrinking
    is better still: the directions are orthogonal there, and e^2 is smaller than d/K.)
    """
    config, deltas = ferret(family, 1024, reconstruction="shrunken"), an_update(SHORT)
    true = flat(deltas)
    results = [rebuilt(deltas, config, SHORT, round) for round in range(1, 9)]
    errors = {a: np.mean([np.sum((a * r - true) ** 2) for r in results]) / (true @ true) for a in (0.8, 1.0, 1.25)}
    e2 = squared_error(family, 1024, SHORT)
    a = 1024 / (1024 + 4096)
    assert errors[1.0] == pytest.approx(1 - 2 * a + a * a * (1 + e2), rel=0.02)
    assert errors[1.0] < 0.82
    assert errors[1.0] < min(errors[0.8], errors[1.25])


def test_the_error_does_not_grow_with_local_steps(tiny_lm: LanguageModel) -> None:
    """R Theorem 2: the error of a reconstruction is independent of the number T of local steps.

    Real local updates of T = 1, 5 and 25 steps on a Llama, each projected in 12 rounds with K = 512: the relative error is
    sqrt(d/K) for each, within 4 standard errors (4 sqrt(2 / (K 12)) = 7 %), while the update itself grows. Summing
    per-step projections instead (as zeroth-order methods do) would let it grow with sqrt(T).
    """
    layout = Layout.of(tiny_lm.model)
    replica = Replica(tiny_lm.model, layout)
    sizes = []
    for steps in (1, 5, 25):
        config = ferret("hadamard", 512, local_steps=steps, lr=1e-2)
        directions = replica.directions(ALGORITHMS["ferret"].pool(config, layout, 0))
        replica.touch()
        replica.become(Coefficients(()))
        before = [weight.detach().clone() for weight in replica.weights]
        update = local_update(work(directions, tiny_lm.model, text_batches()), config, instruction(directions))
        assert (update.status, update.steps) == (Status.FINISHED, steps)
        deltas = [weight.detach() - start for weight, start in zip(replica.weights, before, strict=True)]
        true = flat(deltas)
        errors = [np.sum((rebuilt(deltas, config, layout, round) - true) ** 2) for round in range(1, 13)]
        assert np.mean(errors) / (true @ true) == pytest.approx(layout.numel / 512, rel=4 * math.sqrt(2 / (512 * 12)))
        sizes.append(float(np.linalg.norm(true)))
    assert sizes[2] > 3 * sizes[0]


def test_clients_with_seeds_of_their_own_average_the_error_down_to_the_pools() -> None:
    """R Algorithm 1 (a new seed for each client): the mean of n clients' reconstructions has a squared error of d / (n K).

    That needs as many bases as there are clients and seeds. Ours come from one pool of P seeds, so that the way down stays
    small, and clients' choices overlap: (d - 1) (1/(n K) + (1 - 1/n)/P) for rademacher. One update, n = 10, K = 256:
    1.60 + 0.90 with P = 4096, within 10 %. Clients that share their seeds (the official code's fixed list of K) would stay at
    (d - 1)/K = 16, and a P that is ignored would leave 1.60.
    """
    config, deltas = ferret("rademacher", 256, pool_size=4096), an_update(TILE)
    true = flat(deltas)
    errors = []
    for round in range(1, 5):
        mean = np.mean([rebuilt(deltas, config, TILE, round, str(client)) for client in range(10)], axis=0)
        errors.append(np.sum((mean - true) ** 2) / (true @ true))
    assert np.mean(errors) == pytest.approx(4095 * (1 / 2560 + 0.9 / 4096), rel=0.1)


# ---------------------------------------------------------------------------------------------------- Ferret: allocation


def expected_error(norms: F64, sizes: F64, counts: F64) -> float:
    return float((norms**2 * sizes / counts).sum())


def test_the_best_allocation_by_brute_force() -> None:
    """R Proposition 2 asks for the K_l of least error under sum K_l = K; the least of sum norm^2 d/K_l is at norm sqrt(d).

    Every division of K = 40 over four blocks, tried out: ours is within 2 % of the best (whole numbers); the rule of the
    paper's experiments (K_l in proportion to the norm) and equal shares cost at least 10 % more.
    """
    norms, sizes, total = np.array([4.0, 0.4, 2.0, 0.4]), np.array([900, 8000, 100, 2500]), 40
    divisions = [c for c in product(range(1, total), repeat=3) if sum(c) < total]
    best = min(expected_error(norms, sizes, np.array([*c, total - sum(c)])) for c in divisions)
    error = {
        rule: expected_error(norms, sizes, allocate(norms, sizes, total, 4096, rule))
        for rule in ("norm-sqrt-size", "norm", "uniform")
    }
    assert best <= error["norm-sqrt-size"] < 1.02 * best
    assert error["norm"] > 1.1 * best
    assert error["uniform"] > 1.1 * best


def test_the_allocation_by_measured_error() -> None:
    """R Figure 4 (allocation matters), measured by rebuilding: ten pools of normal directions for each rule.

    Squared errors follow sum_l ||delta_l||^2 (d_l + 1) / K_l within 10 % (standard error of a block near
    sqrt(2 / (10 K_l)), largest for small K_l), and norm sqrt(d) beats norm, which beats equal shares.
    """
    layout = Layout.from_shapes([("a", (900,)), ("b", (8000,)), ("c", (100,)), ("d", (2500,))], "tensor")
    scale = np.array([4.0, 0.4, 2.0, 0.4])
    deltas = [d * s / d.norm() for d, s in zip(an_update(layout), scale.tolist(), strict=True)]
    true, sizes = flat(deltas), np.array(layout.block_sizes)
    measured = {}
    for rule in ("norm-sqrt-size", "norm", "uniform"):
        config = ferret("gaussian", 200, allocation=rule)
        measured[rule] = np.mean([np.sum((rebuilt(deltas, config, layout, r) - true) ** 2) for r in range(1, 11)])
        counts = allocate(scale, sizes, 200, 200, rule)
        assert measured[rule] == pytest.approx(expected_error(scale, sizes + 1, counts), rel=0.1)
    assert 1.1 * measured["norm-sqrt-size"] < measured["norm"]
    assert 1.1 * measured["norm"] < measured["uniform"]


# ---------------------------------------------------------------------------------------------------- bytes


def message_lengths(name: str, config: RunConfig, layout: Layout, filled: float = 1.0) -> tuple[int, int]:
    """(down, up): real encoded messages once every coefficient is in use."""
    algorithm = ALGORITHMS[name]
    state = algorithm.start(config, layout)
    q = Stream(0, "q").below(254, layout.blocks * state.pool.size).reshape(layout.blocks, -1).astype(np.int32) - 127
    full = PoolCoefficients(state.pool, q, np.full(layout.blocks, -20, np.int32))
    weights = algorithm.draw_weights(state)
    down = Instruction(1, b"f" * 16, layout.digest, b"d" * 16, 0, (full,), weights)
    counts = np.zeros(0, np.int64)
    if algorithm.kind == Kind.COORDINATES:
        counts = allocate(np.ones(layout.blocks), np.array(layout.block_sizes), config.K, state.pool.size, "norm-sqrt-size")
    length = int(counts.sum()) or config.local_steps
    up = Update(1, b"d" * 16, Status.FINISHED, config.local_steps, 10, 1.0, np.ones(length, np.float32), counts)
    return len(wire.encode_instruction(down, config.coefficient_bits)), len(
        wire.encode_update(up, config.scalar_bits, client="c")
    )


@pytest.mark.parametrize(
    ("name", "K", "paper", "down", "up"),
    [
        ("fedkseed", 4096, 17_988, 4_167, 437),
        ("fedkseed-pro", 1024, 9_796, 3_143, 437),
        ("fedkseed-pro", 2048, 17_988, 6_215, 437),
    ],
)
def test_bytes_of_a_fedkseed_round(name: str, K: int, paper: int, down: int, up: int) -> None:
    """F title and experiments, tau = 200: 4 + 4 K (+ 4 K chances for Pro) + 8 tau bytes a client and round; ours are fewer.

    Ours are lengths of real messages, head and digests included: the step's seeds are derived and not sent, coefficients
    take 8 bits, scalars 16, Pro's chances 16. They do not depend on the size of the model.
    """
    assert 4 + 4 * K * (2 if name == "fedkseed-pro" else 1) + 8 * 200 == paper
    config = RunConfig(algorithm=name, K=K, local_steps=200)
    assert {message_lengths(name, config, layout) for layout in (TILE, SHORT)} == {(down, up)}
    assert down + up < paper < 18_000


def test_bytes_of_a_ferret_round() -> None:
    """R Table 4: 7.8e3 values of 16 bits = 3.9e3 coordinates in both directions, 15,600 bytes.

    Up, ours is 2 bytes a coordinate, 2 a block and 37. Down, the paper counts the mean of the clients' coordinates as if all
    clients used the same ones; a pool that clients draw from is a table of blocks x pool size, and ours is counted in full:
    194 blocks x 128 coefficients of 8 bits. So the whole round is 33 kB where the paper counts 15.6; without that table, or
    with its length hidden, this test would show less.
    """
    layout = Layout.from_shapes([(f"block {i}", (1000, 20)) for i in range(194)], "tensor")
    config = RunConfig(algorithm="ferret", K=3900)
    down, up = message_lengths("ferret", config, layout)
    pool = pool_size(config, layout)
    assert 2 * 3900 * 2 == 15_600
    assert up == 2 * 3900 + 2 * 194 + 37 == 8_225
    assert (pool, down) == (128, 70 + 194 + 194 * 128)
