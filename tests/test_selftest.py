"""The self-test: the same everywhere, different where a kernel, a pool or a version is, and never fooled by its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedtune
from fedtune import selftest
from fedtune.directions import Pool
from fedtune.directions.families import FAMILIES, Hadamard, Rademacher
from fedtune.directions.lowrank import Lowrank
from fedtune.errors import MalformedMessageError
from fedtune.selftest import PARTS, SAMPLES, decode, differences, encode, self_test


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    self_test.cache_clear()
    yield
    self_test.cache_clear()


def again(pool: Pool) -> selftest.SelfTest:
    self_test.cache_clear()
    return self_test(pool)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_repeats_survives_and_differs_between_pools(family: str) -> None:
    pool = Pool(family, 7, 100)
    found = self_test(pool)
    assert differences(found, again(pool)) == []
    assert decode(encode(found)) == found
    assert differences(found, self_test(Pool(family, 8, 100)))[0] == "random words"
    same_directions = Pool(family, 7, 100).disjoint  # axes are not random
    assert len(differences(found, self_test(Pool(family, 8, 100)))) == (1 if same_directions else len(PARTS))
    assert found.program == fedtune.__version__
    assert len(encode(found)) == (57 if found.samples == () else 57 + 4 * 4 * SAMPLES)


def test_known_answers() -> None:
    """What every machine must find; these numbers never change for this format."""
    assert [digest.hex() for digest in self_test(Pool("hadamard", 7, 4096)).digests] == HADAMARD
    assert [digest.hex() for digest in self_test(Pool("rademacher", 7, 4096)).digests] == RADEMACHER
    samples = self_test(Pool("gaussian", 7, 4096)).samples
    assert samples[:3] == pytest.approx((-0.8438898921, -2.1713967323, 0.1430491805), abs=1e-5)


HADAMARD = ["6b722c147c84573b", "0b1c14931a5e6353", "b8b09cf961897ef1", "a124b86d1d9d49be", "aef8d89fda388782"]
RADEMACHER = ["6b722c147c84573b", "8f1a3028fda66e54", "1c7ddf0f8fb5bb6b", "32fa1abac688f915", "1bbfe3909091089d"]


def test_threads_change_nothing() -> None:
    pool = Pool("hadamard", 7, 4096)
    one = self_test(pool)
    torch.set_num_threads(2)
    try:
        assert again(pool) == one
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("family", [Hadamard, Rademacher])
def test_a_kernel_that_is_off_in_the_last_bit_is_found(family: type, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(family.name, 7, 64)
    right = self_test(pool)
    real = family.add

    def off(self: Hadamard, out: np.ndarray, base: np.ndarray, p0: int, k: int, c: float) -> None:
        real(self, out, base, p0, k, c)
        if out.dtype == np.float32:
            out[0] = np.nextafter(out[0], np.float32(9))

    with monkeypatch.context() as patch:
        patch.setattr(family, "add", off)
        assert differences(right, again(pool)) == ["add on float32"]
    real_combine = family.combine

    def reversed_signs(self: Hadamard, out: np.ndarray, base: np.ndarray, p0: int, coefficients: np.ndarray) -> None:
        real_combine(self, out, base, p0, -coefficients)

    monkeypatch.setattr(family, "combine", reversed_signs)
    assert differences(right, again(pool)) == ["combine on float32", "combine on bfloat16"]


def test_rounding_is_allowed_where_it_is_unavoidable_and_nothing_else() -> None:
    found = self_test(Pool("gaussian", 7, 64))
    samples = np.array(found.samples)
    near = np.concatenate([samples[: 2 * SAMPLES].copy(), samples[2 * SAMPLES :]])
    near[:SAMPLES] *= 1.0 + 3e-4
    near[SAMPLES : 2 * SAMPLES] *= 1.0 + 2.0**-7
    assert differences(found, replace(found, samples=tuple(near.tolist()))) == []
    far = samples.copy()
    far[3 * SAMPLES] += 0.1
    assert differences(found, replace(found, samples=tuple(far.tolist()))) == ["combine on bfloat16"]
    far[2 * SAMPLES + 1] = np.nan
    assert differences(found, replace(found, samples=tuple(far.tolist()))) == ["combine on float32", "combine on bfloat16"]
    assert differences(found, replace(found, samples=())) == ["the number of samples"]


@pytest.mark.parametrize("family", ["gaussian", "lowrank"])
def test_another_normal_direction_is_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(family, 7, 64)
    right = self_test(pool)
    owner = Lowrank if family == "lowrank" else FAMILIES["gaussian"]
    real = owner.add
    monkeypatch.setattr(owner, "add", lambda self, out, base, p0, k, c: real(self, out, base, p0, k, -c))
    assert differences(right, again(pool)) == ["add on float32", "add on bfloat16"]


def test_other_random_words_are_found_in_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("gaussian", 7, 64)
    right = self_test(pool)
    monkeypatch.setattr(selftest.Stream, "below", lambda self, bound, count: np.zeros(count, np.int64))
    assert "random words" in differences(right, again(pool))


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "has 0 bytes; its head alone has 12"),
    "a head alone": (lambda data: data[:12], "of 12 bytes was announced to have 57 or 313"),
    "a byte too few": (lambda data: data[:-1], "of 56 bytes was announced to have 57"),
    "a byte too many": (lambda data: data + b"\0", "of 58 bytes was announced to have 57"),
    "other magic": (lambda data: b"XX" + data[2:], "not a self-test of format 1"),
    "other format": (lambda data: b"FS\x02" + data[3:], "not a self-test of format 1"),
    "a long name": (lambda data: encode(replace(decode(data), program="9" * 65)), "a version of 65 bytes; 64"),
    "a name with escape codes": (lambda data: encode(replace(decode(data), program="0.1\x1b[2J")), "names no version"),
    "a name that is not ASCII": (lambda data: encode(replace(decode(data), program="0.1\u00e9")), "names no version"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    change, text = HOSTILE[name]
    with pytest.raises(MalformedMessageError, match=text):
        decode(change(encode(replace(self_test(Pool("hadamard", 7, 8)), program="0.1.0"))))
