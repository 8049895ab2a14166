"""Addresses: one by user and device, closed to others, and locks that die with their holder."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from client.address import LONGEST_SOCKET, Address, locked, private_folder, runtime_folder
from client.connection import LARGEST_LOG, _opened_log
from fedtune.errors import ConfigError, WorkerAccessError, WorkerError

HOLD = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, b"%d" % os.getpid())
print("held", flush=True)
sys.stdin.read()
"""


def test_devices_and_what_the_process_sees_of_them_have_addresses_of_their_own(
    workers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = {str(Address.own(device)) for device in ("auto", "cpu", "cuda:0", "cuda:1")}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found.add(str(Address.own("auto")))
    assert len(found) == 5
    assert all(text.startswith(f"unix:{workers}/") and Address.parse(text) for text in found)


def test_a_folder_too_deep_for_a_socket_has_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_WORKERS", "/" + "d" * LONGEST_SOCKET)
    assert Address.own("cpu").kind == "tcp"


def test_the_usual_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDTUNE_WORKERS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_folder() == tmp_path / "fedtune"
    for useless in ("", "/nowhere"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", useless)
        assert runtime_folder().name == f"fedtune-{os.getuid()}"


@pytest.mark.parametrize(
    "text", ["", "unix", "unix:", "unix:relative", "http://x", "/tmp/x.sock", "unix:/tmp/x.log", "tcp:1234"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a worker: write unix:/absolute/path or tcp:/absolute/path"):
        Address.parse(text)


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(ConfigError, match="The path of a socket has at most 100 characters"):
        Address.parse("unix:/" + "x" * 101)


def test_a_folder_is_made_for_its_owner_and_an_open_one_is_refused(tmp_path: Path) -> None:
    private_folder(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    (tmp_path / "new").chmod(0o750)
    with pytest.raises(WorkerAccessError, match="chmod 700"):
        private_folder(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(WorkerAccessError, match="should be a folder and is something else"):
        private_folder(tmp_path / "link")


def test_a_long_log_is_put_aside_and_one_before_is_kept(workers: Path) -> None:
    address = Address("unix", workers / "x.sock")
    for letter in b"abc":
        with _opened_log(address) as descriptor:
            os.write(descriptor, bytes([letter]) * (LARGEST_LOG + 1))
    kept = {path.name: path.read_bytes()[:1] for path in workers.iterdir()}
    assert kept == {"x.log": b"c", "x.log.1": b"b"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in workers.iterdir()} == {0o600}


def test_a_lock_dies_with_its_holder(workers: Path) -> None:
    address = Address("unix", workers / "x.sock")
    assert address.pid() is None
    with subprocess.Popen([sys.executable, "-c", HOLD, str(address.life)], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert address.pid() == holder.pid
        with pytest.raises(WorkerError, match="Another process holds"), locked(address.life, 0.1):
            pass
        holder.kill()
        holder.communicate()
    assert address.pid() is None
    with locked(address.life, 0.0, write="7\n"):
        assert address.life.read_text() == "7\n"
