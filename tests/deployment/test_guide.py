"""docs/deployment.md, typed as it stands, by a program: two machines, a clone on each, a run over the network between them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from guide import ROOT, Shell, blocks, end_what_works_in, stand_ins, two_namespaces

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


@dataclass
class Machines:
    """The shells of machines A and B."""

    a: Shell
    b: Shell


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Two machines with nothing but the packages of the guide's first commands."""
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("no nginx: apt install nginx-light")
    with ExitStack() as stack:
        try:
            network = stack.enter_context(two_namespaces())
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no network namespaces: that needs root and ip (apt install iproute2)")
        homes = [tmp_path / "a", tmp_path / "b"]
        shells = []
        for home, prefix in zip(homes, network.prefixes, strict=True):
            home.mkdir()
            environment = {
                "PATH": f"{stand_ins(home / 'stand-ins')}:/usr/local/bin:/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "OTHER_HOME": str(homes[1]),
                "PYTHON_OF_TESTS": sys.executable,
                "MAKES_ENVIRONMENT": str(Path(__file__).with_name("guide.py")),
                "SERVER_IS": network.server,
            }
            shells.append(Shell(home, prefix, environment))
        try:
            yield Machines(*shells)
        finally:
            for shell in shells:
                shell.close()
            end_what_works_in(tmp_path)


def own(settings: str) -> str:
    """The guide's first block, with this test's repository and server in place of the examples."""
    text, count = re.subn(r"(?m)^(export REPOSITORY)=\S+", rf"\1={ROOT}", settings)
    text, other = re.subn(r"(?m)^(export SERVER)=\S+", r'\1="$SERVER_IS"', text)
    assert (count, other) == (1, 1)
    return text


def test_the_guide_typed_as_it_stands_leads_to_a_tuned_model(machines: Machines, tmp_path: Path) -> None:
    settings, install = blocks("1. Both machines: install")
    (deployment,) = blocks("2. Machine A: write the deployment")
    server, firewall = blocks("3. Machine A: the server")
    copies, node, remove = blocks("4. Both machines: the nodes")
    (run,) = blocks("5. Machine A: a run")
    (stop_and_start,) = blocks("To stop and to start")
    (died,) = blocks("When the server died")
    (renew,) = blocks("Change it")
    a, b = machines.a, machines.b

    for machine in (a, b):
        machine.type(own(settings))
        machine.type(install)
    for block in (deployment, server, firewall, copies):
        a.type(block)
    for machine in (a, b):
        machine.type(node)
    a.type(remove)
    a.type(run)
    assert "finished:completed" in a.said()
    summary = json.loads((a.home / "runs/first/summary.json").read_text())
    rows = [json.loads(line) for line in (a.home / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert summary["updates_refused"] == 0
    assert [row["clients"] for row in rows[1:]] == [["site-a", "site-b"]] * 3
    assert (a.home / "tuned/model.safetensors").exists()
    a.type(died)
    assert a.said().count("finished:completed") == 2
    a.type(renew)
    b.type(stop_and_start)
    for folder in (a.home / "fedtune-server", a.home / "fedtune-node"):
        a.type(f"kill $(cat {folder}/start.pid)")
    b.type("kill $(cat ~/fedtune-node/start.pid)")
