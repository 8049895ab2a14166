"""The loops of the official codes, written again to be measured: the same torch calls in the same order.

Sources: zhenqincn/FedKSeed, optimizers/mezo_optimizer.py; allen4747/Ferret, optimizers/ferret_optimizer.py. Weight decay
is left out (its shipped value is 0), as is what neither time nor memory depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CLIP_NORM = 10.0  # of one basis vector times its coordinate, in Ferret's code


def perturb(weights: Sequence[Tensor], seed: int, factor: float, eps: float) -> None:
    """FedKSeed: w + factor * eps * z, out of place, one draw a tensor."""
    torch.manual_seed(seed)
    for weight in weights:
        weight.data = weight.data + factor * eps * _normal(weight)


def update(weights: Sequence[Tensor], seed: int, gradient: float, lr: float) -> None:
    """FedKSeed: w - lr * (g * z), out of place: the local update, and the server's for one seed of the rebuild."""
    torch.manual_seed(seed)
    for weight in weights:
        weight.data = weight.data - lr * (gradient * _normal(weight))


def step(weights: Sequence[Tensor], loss: Callable[[], Tensor], seed: int, eps: float, lr: float) -> float:
    """FedKSeed's local step: three perturbations around two losses, then the update. Returns the scalar gradient."""
    perturb(weights, seed, 1.0, eps)
    plus = loss()
    perturb(weights, seed, -2.0, eps)
    minus = loss()
    perturb(weights, seed, 1.0, eps)
    gradient = float((plus - minus) / (2 * eps))
    update(weights, seed, gradient, lr)
    return gradient


def base(seed: int, like: Tensor, size: int) -> Tensor:
    """Ferret's basis vector of a seed and a group of `size` parameters."""
    bound = size**-0.5
    torch.manual_seed(seed)
    empty = torch.empty(size, device=like.device, dtype=like.dtype)
    return torch.nn.init.trunc_normal_(empty, mean=0.0, std=1.0, a=-bound, b=bound)


def project(deltas: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
    """Ferret: coordinates [groups, seeds] of the groups' updates (1-D), before the scale."""
    sums = [torch.stack([torch.sum(delta * base(seed, delta, delta.numel())) for seed in seeds]) for delta in deltas]
    return torch.stack(sums)


def rebuild(weights: Sequence[Tensor], seeds: Sequence[int], coordinates: Tensor, server_lr: float) -> None:
    """Ferret's server: every seed and group in turn, each piece clipped; a group is one tensor here."""
    for number, seed in enumerate(seeds):
        for group, weight in enumerate(weights):
            piece = base(seed, weight, weight.numel())
            piece.mul_(coordinates[group, number])
            if torch.isfinite(piece).all():
                norm = torch.linalg.norm(piece)
                if torch.isfinite(norm):
                    factor = CLIP_NORM / (norm + 1e-8)
                    if factor < 1:
                        piece.mul_(factor)
                    weight.data.sub_(server_lr * piece.reshape(weight.shape))


def _normal(like: Tensor) -> Tensor:
    return torch.normal(mean=0.0, std=1.0, size=like.data.size(), device=like.data.device, dtype=like.data.dtype)
