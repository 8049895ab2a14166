"""`fedtune deploy init` and `fedtune deploy check`: the files of a federation on real machines, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.screen import Screen, plain, print_json

if TYPE_CHECKING:
    from fedtune.deploy.check import Finding
    from fedtune.deploy.plan import Plan

deploy_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="A federation on real machines: write its files, check them."
)

COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@deploy_app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the deployment.", show_default=False)],
    server: Annotated[
        list[str],
        typer.Option(
            "--server", metavar="HOST", help="Name or address of the server; nodes use the first.", show_default=False
        ),
    ] = [],  # noqa: B006 (typer reads the defaults and never changes them)
    nodes: Annotated[
        str, typer.Option("--nodes", metavar="A,B,...", help="Names of the nodes: the clients' ids.", show_default=False)
    ] = "",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where the proxy listens.")] = 8443,
    superlink_port: Annotated[
        int, typer.Option("--superlink-port", min=1, max=65535, help="Where the SuperLink listens, on loopback.")
    ] = 8000,
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="FOLDER", help="Base model on the server; its fingerprint goes to the nodes.", show_default=False
        ),
    ] = "",
    add_node: Annotated[
        list[str],
        typer.Option(
            "--add-node", metavar="NAME", help="Add a node to an existing deployment; may be given again.", show_default=False
        ),
    ] = [],  # noqa: B006
    renew: Annotated[bool, typer.Option("--renew", help="Replace the server's certificate and key, and nothing else.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing deployment, with new keys.")] = False,
) -> None:
    """Write CA, certificates, keys, settings and start scripts: one folder for the server, one for each node.

    [bold]fedtune deploy init federation --server fl.example.org --nodes site-a,site-b --model /srv/models/llama[/bold]

    [bold]fedtune deploy init federation --add-node site-c[/bold]

    Nothing that exists is overwritten without --force. docs/deployment.md leads from here to a running federation.
    """
    names = [name.strip() for name in nodes.split(",") if name.strip()]
    _check_together(bool(add_node), renew, bool(server or names or model or force))
    from fedtune.deploy import init as writing

    if renew:
        _say(f"renewed {_listed(writing.renew(folder))}: copy both to the server, and run ./proxy.sh -s reload there.")
    elif add_node:
        writing.add_nodes(folder, add_node)
        keys = _listed([folder / "server" / "nodes" / f"{name}.pub" for name in add_node])
        _say(f"wrote {_listed([folder / 'nodes' / name for name in add_node])}.")
        _say(f"Copy {keys} to nodes/ in the server's folder and run ./register.sh there.")
    else:
        written = writing.create(folder, _plan(server, names, port, superlink_port, model), force)
        _say(f"wrote {len(written)} files to '{folder}'; the next steps are in {folder / 'README.md'}.")


def _check_together(adds: bool, renews: bool, others: bool) -> None:
    if adds + renews + others > 1:
        raise typer.BadParameter("--add-node and --renew change an existing deployment and go with no other option")


def _plan(hosts: Sequence[str], names: Sequence[str], port: int, superlink_port: int, model: str) -> Plan:
    from fedtune.deploy.plan import Plan
    from fedtune.deploy.weights import weights_fingerprint
    from fedtune.models import resolve_model

    place = str(Path(resolve_model(model)).resolve()) if model else ""
    weights = weights_fingerprint(Path(place)) if place else ""
    return Plan(tuple(hosts), tuple(names), port, superlink_port, place, weights)


@deploy_app.command("check")
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="server/, nodes/NAME/ or the whole deployment.", show_default=False)
    ],
    role: Annotated[
        str, typer.Option("--role", metavar="ROLE", help="'server' or a node, of a whole deployment.", show_default=False)
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is wrong on this machine, each with its fix; exits with 1 if anything is.

    [bold]fedtune deploy check .[/bold]   on the server or a node, in its folder

    Packages and programs, disk, device, keys, certificates, model, data, ports, the way to the server, its clock, and
    whether Flower's control API is out of reach.
    """
    from fedtune.deploy.check import State, check_deployment

    findings = check_deployment(folder, role)
    problems = sum(finding.state is State.problem for finding in findings)
    if as_json:
        print_json({"problems": problems, "findings": [asdict(finding) for finding in findings]}, indent=2)
    else:
        _print(findings, problems)
    if problems:
        raise typer.Exit(1)


def _print(findings: Sequence[Finding], problems: int) -> None:
    screen = Screen()
    role = ""
    for finding in findings:
        if finding.role != role:
            role = finding.role
            screen.say(role, "bold")
        state = finding.state.value
        screen.print(plain("  ", (f"{state:8}", COLOURS[state]), f"{finding.check}: {finding.text}"), soft_wrap=True)
        if finding.fix:
            screen.say(f"          {finding.fix}")
    warnings = sum(finding.state.value == "warning" for finding in findings)
    screen.say(f"{len(findings)} checks, {problems} problems, {warnings} warnings")


def _say(line: str) -> None:
    Screen().say(line)


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(f"'{path}'" for path in paths)
