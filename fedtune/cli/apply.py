"""`fedtune apply`: the base model and a file of kilobytes make the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.numbers import in_bytes
from fedtune.cli.screen import Screen
from fedtune.cli.watch import saying_notes
from fedtune.run_folder import check_new


def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub name of the base model.", show_default=False)],
    file: Annotated[str, typer.Argument(metavar="FILE", help="The delta.", show_default=False)],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The new folder.", show_default=False)],
    revision: Annotated[str, typer.Option("--revision", help="Revision of a hub model.", show_default=False)] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a hub model.")
    ] = False,
) -> None:
    """Rebuild a tuned model from its base and a delta, bit by bit, as a Hugging Face folder.

    [bold]fedtune apply ./my-model tuned.safetensors --out tuned[/bold]

    The base must be the very one of the run: its fingerprint and the digest of the result are checked before anything is
    written. `fedtune delta show FILE` says which base a delta needs.
    """
    check_new(out)
    screen = Screen()
    from fedtune.apply import apply_delta

    with saying_notes(screen):
        done = apply_delta(base, Path(file), Path(out), revision, trust_remote_code)
    for line in (
        f"'{done.path}': {done.what}, {in_bytes(done.bytes)}, digest {done.digest} (verified)",
        f'AutoModelForCausalLM.from_pretrained("{done.path}") loads it.',
    ):
        screen.say(line)
