"""What is too large for a row of the ledger: it comes back as it was written, or its file is named."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

import numpy as np
import pytest

import fedtune.beside
from fedtune import arrays
from fedtune.beside import FOLDER, MARK, Beside, is_reference, named, size_of
from fedtune.errors import DamagedLedgerError
from fedtune.pieces import all_finite, joined, mapping, pieces, together
from fedtune.scratch import room

VALUE = bytes(range(256)) * 40


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Beside:
    """With room for 1,000 bytes in a row."""
    monkeypatch.setattr(fedtune.beside, "LARGE", 1000)
    return Beside(tmp_path)


def test_a_small_value_stays_in_its_row(beside: Beside) -> None:
    for value in (b"", b"x", VALUE[:1000]):
        assert beside.store([value[:3], value[3:]]) == named([value]) == value
        assert beside.value(value) == value
        assert beside.keep(value) is value
    assert not beside.path.exists()


def test_a_large_value_is_a_file_of_its_digest_and_comes_back(beside: Beside) -> None:
    stored = beside.store([VALUE[:700], VALUE[700:701], VALUE[701:]])
    assert stored == named([VALUE]) == MARK + hashlib.sha256(VALUE).digest() + len(VALUE).to_bytes(8, "little")
    assert (is_reference(stored), size_of(stored), size_of(VALUE)) == (True, len(VALUE), len(VALUE))
    assert [path.name for path in beside.path.iterdir()] == [hashlib.sha256(VALUE).hexdigest()]
    found = beside.value(stored)
    assert isinstance(found, mmap.mmap)
    assert found[:] == VALUE
    assert beside.store([VALUE]) == stored  # again is fine
    kept = beside.keep(VALUE)
    assert isinstance(kept, mmap.mmap)
    assert beside.stored(VALUE) == stored
    (path,) = beside.path.iterdir()
    path.unlink()
    assert beside.stored(kept) == stored
    assert not path.exists()  # what was kept is not written a second time


def test_a_value_never_looks_like_what_names_a_file(beside: Beside) -> None:
    """A row of that length that begins with MARK is a name; no message and no array begins so."""
    assert not is_reference(MARK + bytes(41))
    assert not is_reference(b"FT" + bytes(53))
    assert not joined(arrays.written({"a": np.zeros((1, 2))})).startswith(MARK)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("flipped", "does not have the digest that is its name"),
        ("short", "bytes and not 10,240"),
        ("gone", "No such file"),
        ("link", "Too many levels|symbolic link"),
        ("folder", "a folder|Is a directory"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named(beside: Beside, harm: str, why: str, tmp_path: Path) -> None:
    stored = beside.store([VALUE])
    (path,) = beside.path.iterdir()
    if harm == "flipped":
        path.write_bytes(VALUE[:5000] + b"?" + VALUE[5001:])
        assert beside.value(stored, hashed=False)[:2] == VALUE[:2]
    elif harm == "short":
        path.write_bytes(VALUE[:-1])
    else:
        path.unlink()
    if harm == "link":
        (tmp_path / "elsewhere").write_bytes(VALUE)
        path.symlink_to(tmp_path / "elsewhere")
    elif harm == "folder":
        path.mkdir()
    with pytest.raises(DamagedLedgerError, match=why) as caught:
        beside.value(stored)
    assert path.name in str(caught.value)


def test_a_link_in_place_of_the_folder_leads_nothing_outside(beside: Beside, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_bytes(b"x")
    beside.path.symlink_to(elsewhere)
    with pytest.raises(DamagedLedgerError, match="symbolic link"):
        beside.store([VALUE])
    beside.sweep([])
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


def test_a_name_of_nothing_is_refused(beside: Beside) -> None:
    """Also of an empty file, and of 2^63 bytes that are not there."""
    beside.path.mkdir()
    for size in (0, 2**63):
        stored = MARK + hashlib.sha256(b"").digest() + size.to_bytes(8, "little")
        (beside.path / hashlib.sha256(b"").hexdigest()).write_bytes(b"")
        with pytest.raises(DamagedLedgerError, match="bytes and not"):
            beside.value(stored)


def test_what_no_row_names_is_removed_and_nothing_else(beside: Beside, tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"a row")
    first, second = beside.store([VALUE]), beside.store([VALUE[::-1]])
    (beside.path / ".123.new").write_bytes(b"of a process that died")
    held = beside.value(second)
    beside.sweep([first, b"a small value"])
    assert [path.name for path in beside.path.iterdir()] == [hashlib.sha256(VALUE).hexdigest()]
    assert held[:] == VALUE[::-1]  # who has it open still reads it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.sqlite", FOLDER]
    Beside(tmp_path / "nothing").sweep([])


# ---------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_arrays_come_back_and_share_the_bytes(kind: type[np.floating]) -> None:
    before = {"b": np.arange(12, dtype=kind).reshape(3, 4), "a": np.array([[np.inf, -0.0, 1e-30]], dtype=kind)}
    data = joined(arrays.written(before))
    after = arrays.read(data)
    assert list(after) == ["a", "b"]
    for name, array in before.items():
        assert after[name].dtype == kind
        assert after[name].tobytes() == array.tobytes()
        assert after[name].shape == array.shape
        assert not after[name].flags.owndata


def test_arrays_are_those_of_safetensors() -> None:
    from safetensors.numpy import load, save

    before = {"values": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert np.array_equal(load(joined(arrays.written(before)))["values"], before["values"])
    assert np.array_equal(arrays.read(save(before))["values"], before["values"])


def test_bytes_that_are_no_arrays_are_refused() -> None:
    whole = joined(arrays.written({"a": np.zeros((2, 3)), "b": np.zeros((1, 1), dtype=np.float32)}))
    for data in (b"", whole[:7], whole[:-1], whole + b"\x00", b"\xff" * 8 + whole[8:], whole.replace(b"F64", b"I64")):
        with pytest.raises(ValueError, match=r"its head|it ends|it goes on"):
            arrays.read(data)
    for old, new in (([2, 3], [3, 2.0]), ([2, 3], [-2, -3]), ([0, 48], [0, 49]), ([0, 48], [8, 56])):
        with pytest.raises(ValueError, match=r"shape|follow"):
            arrays.read(whole.replace(str(old).replace(" ", "").encode(), str(new).replace(" ", "").encode()))


# ---------------------------------------------------------------------------------------------------- pieces


def test_pieces_are_the_array_in_order() -> None:
    array = np.arange(10)
    assert [piece.tolist() for piece in pieces(array, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    found = [(where, [piece.tolist() for piece in parts]) for where, parts in together([array, array * 2], 6)]
    assert found == [(slice(0, 6), [[0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8, 10]]), (slice(6, 10), [[6, 7, 8, 9], [12, 14, 16, 18]])]
    assert list(pieces(array[:0])) == []
    for piece in pieces(array, 4):
        np.add(piece, 1, out=piece)  # views
    assert array.tolist() == list(range(1, 11))
    assert joined(iter([b"ab", memoryview(b"c"), b""])) == b"abc"
    assert all_finite(np.array([1.0], dtype=np.float32))
    assert not all_finite(np.array([1.0, np.nan], dtype=np.float32))


def test_room_for_much_is_a_file_that_keeps_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert mapping(room((4, 5), np.float32)) is None
    monkeypatch.setattr("fedtune.scratch.IN_MEMORY", 0)
    found = room((3, 50_000), np.int32)
    assert mapping(found[1:, 7:]) is not None
    assert not list((tmp_path / "fedtune").iterdir())  # it has no name
    for row in found:
        for where, (piece,) in together([row], 1 << 12):  # each time its pages are given back
            piece[:] = np.arange(where.start, where.stop)
    assert (found == np.arange(50_000)).all()
