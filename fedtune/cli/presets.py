"""Presets: where they are, what they are called, and how one becomes a checked config with `--set` applied."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedtune.cli.screen import Screen
from fedtune.config import RunConfig, Scalar, read_setting
from fedtune.errors import ConfigError
from fedtune.foreign import for_screen

PresetArgument = Annotated[
    str, typer.Argument(metavar="PRESET", help="A TOML file, or a name from [bold]fedtune presets[/bold].", show_default=False)
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change a setting; may be given again. [bold]fedtune settings[/bold] lists them.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Preset:
    """A preset that ships with fedtune: `title` is its first comment line; one in a folder is called `folder/name`."""

    name: str
    path: Path
    title: str


@dataclass(frozen=True)
class Chosen:
    """A preset with its overrides applied; `label` names its run folders."""

    label: str
    config: RunConfig


def shipped() -> list[Preset]:
    """The presets of the installed package `simulations`, by name; its code is not run."""
    spec = importlib.util.find_spec("simulations")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for pattern in ("*.toml", "*/*.toml")
        for path in Path(folder).glob(pattern)
    }
    return [Preset(name, found[name], _title(found[name])) for name in sorted(found, key=lambda name: ("/" in name, name))]


def choose(preset: str, settings: Sequence[str] = (), more: Mapping[str, Scalar] | None = None) -> Chosen:
    """The config of `preset` (a file or a name) with `settings` ("key=value") applied, and then `more`.

    Raises:
        typer.BadParameter: a setting without "=".
        ConfigError: no such preset, or a value that cannot be used.
    """
    overrides = {**dict(parse_setting(text) for text in settings), **(more or {})}
    path = find(preset)
    return Chosen(path.stem, RunConfig.load(path, overrides))


def parse_setting(text: str) -> tuple[str, Scalar]:
    """`fedtune.config.read_setting` for the command line. Raises typer.BadParameter."""
    try:
        return read_setting(text)
    except ConfigError:
        raise typer.BadParameter(f"--set takes KEY=VALUE, not '{text}'") from None


def presets() -> None:
    """List the presets that ship with fedtune."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for preset in shipped():
        table.add_row(preset.name, preset.title)
    screen = Screen()
    screen.print(table)
    screen.print()
    screen.say("Run one with `fedtune simulate NAME`, change it with `--set key=value`, or copy the file and edit it.")


def find(preset: str) -> Path:
    """The file of `preset`. A name never hides a file: `./demo.toml` is a file, `demo` a name unless such a file exists."""
    path = Path(preset).expanduser()
    known = {found.name: found.path for found in shipped()}
    if os.path.isfile(path) or (preset not in known and os.path.exists(path)):  # unlike Path's, these take any path
        return path
    if preset in known:
        return known[preset]
    shown = for_screen(preset, 200)
    folders = {found.rpartition("/")[0] for found in known}
    if path.suffix == ".toml" or (len(path.parts) > 1 and path.parts[0] not in folders):
        raise ConfigError(f"There is no preset file '{shown}': give an existing TOML file or a name from `fedtune presets`.")
    near = difflib.get_close_matches(preset[:200], known, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'?" if near else "Give a name from `fedtune presets` or a TOML file."
    raise ConfigError(f"There is no preset '{shown}'. {hint}", preset=preset, nearest=near)


def _title(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""
