"""Where compiled kernels are kept: a writable folder named after the kernels' text, or none at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest

from fedtune.directions.cpu import compiled

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    clear = compiled._cache_folder.cache_clear
    clear()
    yield
    clear()


def test_numbas_own_setting_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folder = Path(compiled._cache_folder() or "")
    assert folder.parent == tmp_path
    assert folder.name.startswith("kernels-")


def test_the_users_cache_comes_next_and_the_package_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "installed" / "compiled.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert Path(compiled._cache_folder() or "").parent == tmp_path / "user" / "fedtune"
    compiled._cache_folder.cache_clear()
    (tmp_path / "file").write_text("not a folder, so nothing can be made below it")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Path(compiled._cache_folder() or "").parent == tmp_path / "installed" / "__pycache__"


def test_without_a_writable_folder_kernels_are_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "file" / "compiled.py"))
    assert compiled._cache_folder() is None

    def double(x: int) -> int:
        return 2 * x

    assert compiled.kernel(double)(21) == 42


def test_a_changed_kernel_has_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    (tmp_path / "kernel.py").write_text("one")
    before = compiled._cache_folder()
    (tmp_path / "kernel.py").write_text("two")
    compiled._cache_folder.cache_clear()
    assert compiled._cache_folder() != before


def test_kernels_are_kept_in_the_folder_and_numbas_settings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_cache_folder", lambda: str(tmp_path))
    before = numba.config.CACHE_DIR

    @compiled.kernel
    def triple(x: int) -> int:
        return 3 * x

    assert before == numba.config.CACHE_DIR
    assert triple(2) == 6
    assert list(tmp_path.rglob("*.nbi"))


def test_another_copy_of_the_sources_uses_the_same_kernels(tmp_path: Path) -> None:
    """As Flower unpacks one for every version of the app: nothing is compiled again."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    code = (
        "import numpy as np; from fedtune.directions.cpu import philox; "
        "print(philox.random_words(np.empty(16, np.uint32), 0, 2, 1, 2, 3, 4).tolist())"
    )
    for name in ("one", "two"):
        shutil.copytree(ROOT / "fedtune", tmp_path / name / "fedtune", ignore=shutil.ignore_patterns("__pycache__"))
    said, kept = [], []
    for name in ("one", "two"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**environment, "PYTHONPATH": str(tmp_path / name)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        said.append(done.stdout)
        kept.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nbc")})
    assert said[0] == said[1]
    assert kept[0] == kept[1] != {}
