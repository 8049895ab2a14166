"""The delta file: golden bytes, safetensors' own reader, and a growing list of hostile files that must be refused by name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.coefficients import Coefficients, PoolCoefficients
from fedtune.comparison import compare
from fedtune.delta import Delta, encode
from fedtune.delta_reader import MOST_HEADER, decode, read
from fedtune.directions.base import Pool
from fedtune.errors import DeltaError, DeltaMismatchError, MalformedDeltaError

FINGERPRINT = bytes(range(16))
Q = [[[3, -127, 0, 0], [0, 0, 0, 0]], [[0, 1, 0, 0], [0, 0, 0, -5]]]
EXPONENTS = [[-20, 0], [-3, 4]]


def tiny(scale: int = 1, seed: int = 7, **changes: Any) -> Delta:
    """Pools 0 and 2 of a run (pool 1 had no coefficients), two blocks, K = 4."""
    pools = tuple(
        PoolCoefficients(Pool("hadamard", seed + number, 4), np.array(q, np.int32) * scale, np.array(e, np.int32))
        for number, (q, e) in enumerate(zip(Q, EXPONENTS, strict=True))
    )
    plain = Delta(
        base="org/name",
        dtype="float32",
        fingerprint=FINGERPRINT,
        tensors=b"t" * 16,
        layout=b"l" * 16,
        block_rule="grouped",
        block_sizes=(10, 6),
        digest=Coefficients(pools).digest(FINGERPRINT),
        round=3,
        pool_every=1,
        family="hadamard",
        rank=1,
        size=4,
        numbers=(0, 2),
        pools=pools,
        program="0.1.0",
    )
    return replace(plain, **changes)


GOLDEN_HEADER = (
    '{"__metadata__":{"format":"fedtune-delta","version":"2","fedtune":"0.1.0","base":"org/name","dtype":"float32",'
    '"fingerprint":"000102030405060708090a0b0c0d0e0f","tensors":"74747474747474747474747474747474",'
    '"layout":"6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c","block_rule":"grouped","block_sizes":"10,6","family":"hadamard",'
    '"rank":"1","K":"4","bits":"8","pool_every":"1","pools":"0:7,2:8","round":"3","digest":"DIGEST"},'
    '"lengths":{"dtype":"U32","shape":[2,2],"data_offsets":[0,16]},'
    '"exponents":{"dtype":"I8","shape":[2,2],"data_offsets":[16,20]},'
    '"q":{"dtype":"U8","shape":[8],"data_offsets":[20,28]}}'
)


def test_golden_bytes() -> None:
    header = GOLDEN_HEADER.replace("DIGEST", "c1b4ab2fa470aee59e9564efa0a7741c")
    text = header.encode() + b" " * (-len(header) % 8)
    expected = (
        len(text).to_bytes(8, "little") + text + bytes.fromhex("02000000000000000200000004000000ec00fd04830180818080807b")
    )
    assert encode(tiny()) == expected


@pytest.mark.parametrize(("scale", "bits"), [(1, 8), (2, 9), (250, 16), (300, 17), (2**15, 23)])
def test_it_survives_in_the_fewest_bits(scale: int, bits: int) -> None:
    data = encode(tiny(scale))
    back = decode(data)
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["bits"] == str(bits)
    assert (back.base, back.numbers, back.block_sizes, back.round, back.pool_every) == ("org/name", (0, 2), (10, 6), 3, 1)
    assert [pool.identity for pool in back.pools] == [pool.identity for pool in tiny(scale).pools]
    assert encode(back) == data
    assert [back.rounds_of(number) for number in back.numbers] == [(1, 1), (3, 3)]


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(encode(tiny(2)))
    found = safetensors.numpy.load_file(path)
    assert sorted(found) == ["exponents", "lengths", "q"]
    assert found["lengths"].tolist() == [[2, 0], [2, 4]]
    assert found["exponents"].tolist() == EXPONENTS
    planes = np.unpackbits(found["q"], count=8 * 9, bitorder="little").reshape(8, 9).astype(int)
    assert (planes @ 2 ** np.arange(9) - 256).tolist() == [6, -254, 0, 2, 0, 0, 0, -10]
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["digest"] == tiny(2).digest.hex()
    assert read(path).digest == tiny(2).digest


def test_the_base_itself_has_no_pools() -> None:
    empty = tiny(numbers=(), pools=(), round=0, pool_every=0, digest=Coefficients(()).digest(FINGERPRINT))
    back = decode(encode(empty))
    assert (back.pools, back.numbers) == ((), ())
    assert compare(back, back).whole.cosine is None


def test_a_model_of_4096_coefficients_takes_kilobytes() -> None:
    pool = PoolCoefficients(Pool("hadamard", 2**64 - 1, 4096), np.full((1, 4096), 127, np.int32), np.full(1, -20, np.int32))
    one = tiny(block_sizes=(10**9,), size=4096, numbers=(0,), pools=(pool,), digest=Coefficients((pool,)).digest(FINGERPRINT))
    assert len(encode(one)) == 4749
    assert decode(encode(one)).coefficients.digest(FINGERPRINT) == one.digest


def test_pools_that_a_delta_cannot_name_are_refused() -> None:
    literal = Pool("torch", 7, 4, candidates=(1, 2, 3, 4))
    pool = PoolCoefficients(literal, np.array(Q[0], np.int32), np.array(EXPONENTS[0], np.int32))
    with pytest.raises(MalformedDeltaError, match="without literal seeds"):
        encode(tiny(family="torch", numbers=(0,), pools=(pool,)))


def test_what_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.delta.MOST_COEFFICIENTS", 15)
    with pytest.raises(MalformedDeltaError, match=r"2 pools of 2 blocks and 4 seeds .* \(--format hf\)"):
        encode(tiny())


# ---------------------------------------------------------------------------------------------------- hostile files


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def said(key: str, value: object) -> bytes:
    """A file whose metadata say something else."""
    header, body = parts(encode(tiny()))
    header["__metadata__"][key] = value
    return joined(header, body)


def without(key: str) -> bytes:
    header, body = parts(encode(tiny()))
    del header["__metadata__"][key]
    return joined(header, body)


def tensor(key: str, field: str, value: object) -> bytes:
    header, body = parts(encode(tiny()))
    header[key][field] = value
    return joined(header, body)


def reordered() -> bytes:
    header, body = parts(encode(tiny()))
    return joined(dict(reversed(header.items())), body)


def extra() -> bytes:
    header, body = parts(encode(tiny()))
    header["weights"] = {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}
    return joined(header, body + bytes(4))


def body_with(at: int, value: int) -> bytes:
    data = bytearray(encode(tiny()))
    data[len(data) - 28 + at] = value  # 16 bytes of lengths, 4 of exponents, 8 of coefficients
    return bytes(data)


def twins() -> bytes:
    header, body = parts(encode(tiny()))
    text = json.dumps(header, separators=(",", ":")).replace('"rank":"1"', '"rank":"1","rank":"1"')
    return joined(text.encode(), body)


def enormous_pool() -> bytes:
    header, body = parts(said("K", "65536"))
    header["q"] = {"dtype": "U8", "shape": [262144], "data_offsets": [20, 262164]}
    return joined(header, (65536).to_bytes(4, "little") * 4 + body[16:])


def most_of_it_zero() -> bytes:
    """2,000 pools of two blocks and 65,536 seeds, with one coefficient each."""
    header, _ = parts(said("K", "65536"))
    header["__metadata__"]["pools"] = ",".join(f"{number}:7" for number in range(2000))
    header["lengths"] = {"dtype": "U32", "shape": [2000, 2], "data_offsets": [0, 16000]}
    header["exponents"] = {"dtype": "I8", "shape": [2000, 2], "data_offsets": [16000, 20000]}
    header["q"] = {"dtype": "U8", "shape": [4000], "data_offsets": [20000, 24000]}
    return joined(header, (1).to_bytes(4, "little") * 4000 + bytes(4000) + b"\x81" * 4000)


def more_than_a_reader_counts() -> bytes:
    header, body = parts(said("K", str(2**40)))
    header["__metadata__"]["family"] = "axes"
    return joined(header, body + bytes(16))


def a_zero_written_out() -> bytes:
    header, body = parts(encode(tiny()))
    header["q"] = {"dtype": "U8", "shape": [9], "data_offsets": [20, 29]}
    return joined(header, b"\x03" + body[1:22] + b"\x80" + body[22:])


def plain_model() -> bytes:
    return safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, {"format": "pt"})


HOSTILE: dict[str, tuple[Callable[[], bytes], type[DeltaError], str]] = {
    "empty": (lambda: b"", MalformedDeltaError, "it has 0 bytes"),
    "seven bytes": (lambda: bytes(7), MalformedDeltaError, "it has 7 bytes"),
    "truncated in the header": (lambda: encode(tiny())[:100], MalformedDeltaError, "announces a header of"),
    "truncated in the tensors": (lambda: encode(tiny())[:-1], MalformedDeltaError, "11 bytes .* announces 12"),
    "a byte too many": (lambda: encode(tiny()) + b"\0", MalformedDeltaError, "13 bytes behind its lengths and announces 12"),
    "header longer than the file": (lambda: b"\xff" * 8 + bytes(100), MalformedDeltaError, "header of 18446744073709551615"),
    "header too long": (
        lambda: (MOST_HEADER + 8).to_bytes(8, "little") + bytes(MOST_HEADER + 8), MalformedDeltaError, "at most: it is",
    ),
    "no JSON": (lambda: joined(b"nonsense", b""), MalformedDeltaError, "header is not JSON"),
    "bottomless JSON": (lambda: joined(b"[" * 100_000, b""), MalformedDeltaError, "header is not JSON"),
    "not an object": (lambda: joined([], b""), MalformedDeltaError, "not an object"),
    "a key twice": (twins, MalformedDeltaError, "a key is there twice"),
    "a model": (plain_model, MalformedDeltaError, "not a delta of fedtune"),
    "format is a list": (lambda: said("format", []), MalformedDeltaError, "not a delta of fedtune"),
    "other version": (lambda: said("version", "1"), DeltaMismatchError, "has format '1', this program reads '2': export"),
    "extra tensor": (extra, MalformedDeltaError, r"tensors that a delta does not have \('weights'\)"),
    "extra field": (lambda: said("note", "hello"), MalformedDeltaError, r"a field too many or too few \('note'\)"),
    "missing field": (lambda: without("layout"), MalformedDeltaError, r"a field too many or too few \('layout'\)"),
    "a number, not text": (lambda: said("K", 4), MalformedDeltaError, "its K is 4, not a whole number"),
    "a negative number": (lambda: said("round", "-1"), MalformedDeltaError, "its round is '-1'"),
    "a long number": (lambda: said("round", "9" * 5000), MalformedDeltaError, "its round is"),
    "a number with a zero before": (lambda: said("K", "04"), MalformedDeltaError, "its K is '04'"),
    "pool too large": (lambda: said("K", "65537"), MalformedDeltaError, "its K is '65537', not a whole number of 1 to 65536"),
    "pool larger than the file": (enormous_pool, MalformedDeltaError, "12 bytes behind its lengths and announces 262148"),
    "mostly zeros": (most_of_it_zero, MalformedDeltaError, "would take more memory than 8000 bytes of them may"),
    "a pool of terabytes": (more_than_a_reader_counts, MalformedDeltaError, "more than 536,870,912 coefficients"),
    "more pools than lengths": (
        lambda: said("pools", ",".join(f"{n}:7" for n in range(9))), MalformedDeltaError, "too few for 9 pools of 2 blocks",
    ),
    "more coefficients than seeds": (lambda: body_with(0, 5), MalformedDeltaError, "a block has 5 coefficients and its pool 4"),
    "another length": (lambda: body_with(0, 1), MalformedDeltaError, r"tensor q is not U8 \[7\]"),
    "a zero written out": (a_zero_written_out, MalformedDeltaError, "not in the bytes that docs/delta.md prescribes"),
    "outside its grid": (lambda: body_with(20, 0), MalformedDeltaError, "outside its grid"),
    "more bits than needed": (lambda: said("bits", "9"), MalformedDeltaError, r"tensor q is not U8 \[9\]"),
    "bits of no number": (lambda: said("bits", "1"), MalformedDeltaError, "its bits is '1', not a whole number of 2 to 32"),
    "too many blocks": (lambda: said("block_sizes", "1," * 65536 + "1"), MalformedDeltaError, "a list of at most 65536"),
    "an empty block": (lambda: said("block_sizes", "10,0"), MalformedDeltaError, "its block_sizes is '0'"),
    "blocks as a list": (lambda: said("block_sizes", [10, 6]), MalformedDeltaError, "its block_sizes is not a list"),
    "pools out of order": (lambda: said("pools", "2:7,0:8"), MalformedDeltaError, "pools are not in order"),
    "a pool without a seed": (lambda: said("pools", "0:7,2"), MalformedDeltaError, "its pools is ''"),
    "a seed of 65 bits": (lambda: said("pools", f"0:7,2:{2**64}"), MalformedDeltaError, "its pools is"),
    "unknown family": (lambda: said("family", "sobol"), MalformedDeltaError, "its family is 'sobol', not one of hadamard"),
    "family as an object": (lambda: said("family", {}), MalformedDeltaError, "its family is {}"),
    "a rank without lowrank": (lambda: said("rank", "2"), MalformedDeltaError, "its rank is '2', not a whole number of 1 to 1"),
    "unknown dtype": (lambda: said("dtype", "int8"), MalformedDeltaError, "its dtype is 'int8', not one of float32"),
    "unknown rule": (lambda: said("block_rule", "auto"), MalformedDeltaError, "its block_rule is 'auto'"),
    "digest of 31 digits": (lambda: said("digest", "0" * 31), MalformedDeltaError, "digest is not 32 hexadecimal"),
    "capital digest": (lambda: said("tensors", "A" * 32), MalformedDeltaError, "tensors is not 32 hexadecimal"),
    "another digest": (lambda: said("digest", "0" * 32), MalformedDeltaError, "do not lead to its digest"),
    "another base": (lambda: said("fingerprint", "0" * 32), MalformedDeltaError, "do not lead to its digest"),
    "another seed": (lambda: said("pools", "0:7,2:9"), MalformedDeltaError, "do not lead to its digest"),
    "a name with escape codes": (lambda: said("base", "\x1b[2J"), MalformedDeltaError, "base is not a name"),
    "a name without end": (lambda: said("base", "n" * 201), MalformedDeltaError, "base is not a name"),
    "floats": (lambda: tensor("q", "dtype", "F32"), MalformedDeltaError, r"tensor q is not U8 \[8\]"),
    "another shape": (lambda: tensor("q", "shape", [2, 4, 2]), MalformedDeltaError, r"tensor q is not U8 \[8\]"),
    "overlapping tensors": (
        lambda: tensor("exponents", "data_offsets", [12, 16]), MalformedDeltaError, "tensor exponents is not I8",
    ),
    "a type as a list": (lambda: tensor("q", "dtype", []), MalformedDeltaError, r"tensor q is not U8 \[8\]"),
    "a shape of huge numbers": (
        lambda: joined(json.dumps(parts(encode(tiny()))[0]).replace("[8]", "[1" + "0" * 6000 + "]").encode(), b""),
        MalformedDeltaError, "a number in it has",
    ),
    "NaN": (
        lambda: joined(json.dumps(parts(encode(tiny()))[0]).replace("[8]", "[NaN]").encode(), b""),
        MalformedDeltaError, "NaN is not a number",
    ),
    "a tensor as a list": (
        lambda: joined({**parts(encode(tiny()))[0], "q": []}, parts(encode(tiny()))[1]), MalformedDeltaError, "tensor q is not",
    ),
    "exponent like NaN": (lambda: body_with(16, 0x7F), MalformedDeltaError, r"outside -120 \.\. 100"),
    "exponent like a denormal": (lambda: body_with(16, 0x80), MalformedDeltaError, r"outside -120 \.\. 100"),
    "exponent of nothing": (lambda: body_with(17, 1), MalformedDeltaError, "block without coefficients has an exponent"),
    "a flipped bit": (lambda: body_with(20, 0x82), MalformedDeltaError, "do not lead to its digest"),
    "other order": (reordered, MalformedDeltaError, "not in the bytes that docs/delta.md prescribes"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    make, kind, text = HOSTILE[name]
    path = tmp_path / "f.safetensors"
    path.write_bytes(make())
    with pytest.raises(DeltaError, match=text) as refused:
        read(path)
    assert type(refused.value) is kind


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("/dev/zero")]
)
def test_what_is_no_file_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "f.safetensors")
    with pytest.raises(MalformedDeltaError, match="cannot be read"):
        read(tmp_path / "f.safetensors")


def test_a_pool_of_zeros_and_one_beyond_exact_sums_are_refused() -> None:
    nothing = PoolCoefficients(Pool("hadamard", 7, 4), np.zeros((2, 4), np.int32), np.zeros(2, np.int32))
    with pytest.raises(MalformedDeltaError, match="a pool has no coefficient"):
        decode(encode(tiny(numbers=(0,), pools=(nothing,), digest=Coefficients((nothing,)).digest(FINGERPRINT))))
    heavy = PoolCoefficients(Pool("hadamard", 7, 4), np.full((2, 4), 2**23 - 1, np.int32), np.zeros(2, np.int32))
    with pytest.raises(MalformedDeltaError, match="too large for exact sums"):
        decode(encode(tiny(numbers=(0,), pools=(heavy,), digest=Coefficients((heavy,)).digest(FINGERPRINT))))


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(MalformedDeltaError, match="cannot be read"):
            read(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_changed_bytes_never_cause_anything_but_a_delta_error(at: int, noise: bytes) -> None:
    """Nor do they pass unseen where they change the model."""
    good = encode(tiny())
    at %= len(good)
    data = good[:at] + noise + good[at + len(noise) :]
    with contextlib.suppress(DeltaError):
        assert decode(data).digest == tiny().digest


# ---------------------------------------------------------------------------------------------------- comparison


def test_norms_and_cosines_by_hand() -> None:
    a, b = tiny(), tiny(2)
    found = compare(a, b)
    block = 10 * (3**2 + 127**2) * 2.0**-40
    first = found.pools[0]
    assert (first.number, first.rounds, first.shared) == (0, (1, 1), True)
    assert first.blocks[0].norm_a == pytest.approx(block**0.5)
    assert first.blocks[0].norm_b == pytest.approx(2 * block**0.5)
    assert first.blocks[0].distance == pytest.approx(block**0.5)
    assert first.blocks[0].cosine == pytest.approx(1.0)
    assert first.blocks[1].cosine is None
    assert found.pools[1].rounds == (3, 3)
    assert found.pools[1].whole.norm_a == pytest.approx((10 * 2.0**-6 + 6 * 25 * 2.0**8) ** 0.5)
    assert found.whole.norm_a == pytest.approx((block + 10 * 2.0**-6 + 6 * 25 * 2.0**8) ** 0.5)
    assert (found.bytes_a, found.bytes_b) == (len(encode(a)), len(encode(b)))


def test_pools_of_other_seeds_are_orthogonal() -> None:
    found = compare(tiny(), tiny(seed=70))
    assert [pool.shared for pool in found.pools] == [False, False]
    assert found.whole.cosine == 0.0
    assert found.whole.distance == pytest.approx(found.whole.norm_a * 2**0.5)


def test_a_pool_that_only_one_model_has_is_its_own() -> None:
    b = tiny()
    shorter = replace(b, numbers=b.numbers[:1], pools=b.pools[:1], round=1)
    found = compare(shorter, b)
    assert [(pool.shared, pool.whole.norm_a > 0) for pool in found.pools] == [(True, True), (False, False)]
    assert found.pools[1].rounds == (3, 3)


def test_models_of_other_bases_or_blocks_are_not_compared() -> None:
    with pytest.raises(DeltaMismatchError, match="only models over one base"):
        compare(tiny(), tiny(fingerprint=b"x" * 16))
    with pytest.raises(DeltaMismatchError, match="into other blocks"):
        compare(tiny(), tiny(layout=b"x" * 16))
