"""The command line of the benchmarks: runs what is named, prints a table, writes the rows as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import limits
from benchmarks.directions import add, combine, project
from benchmarks.dtype import dtype
from benchmarks.first_order import first_order
from benchmarks.measure import Options, Row
from benchmarks.memory import memory
from benchmarks.models import SIZES
from benchmarks.step import step
from benchmarks.whole import whole

BENCHMARKS: dict[str, Callable[[Options], Iterable[Row]]] = {
    "add": add,
    "combine": combine,
    "project": project,
    "step": step,
    "first-order": first_order,
    "memory": memory,
    "whole": whole,
    "dtype": dtype,
}
QUICK: dict[str, Any] = {"elements": 1 << 18, "pool": 64, "repeats": 1, "quick": True}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ours, the official loops, the machine.")
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--elements", type=int, default=defaults.elements, help="parameters of add, combine and project")
    parser.add_argument("--K", type=int, default=defaults.pool, dest="pool", help="seeds in the pool")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="local steps of dtype")
    parser.add_argument("--repeats", type=int, default=defaults.repeats, help="medians are over this many runs of each")
    sizes = f"models of step, first-order and whole, of {', '.join(SIZES)}; by default the largest for whole only"
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=defaults.sizes, help=sizes)
    only = "measure the rows of first-order and whole with this in their name, such as lora-bfloat16"
    parser.add_argument("--only", default=defaults.only, help=only)
    cpu_time = "measure the processor's time of step and first-order, of all threads: other work on the machine counts less"
    parser.add_argument("--cpu-time", action="store_true", help=cpu_time)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(cuda), help="cpu or cuda; cuda if it is there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat: shows that it runs, not how fast")
    asked = vars(parser.parse_args(arguments))
    name, file = asked.pop("name"), asked.pop("json")
    rows = run(list(BENCHMARKS) if name == "all" else [name], Options(**(asked | QUICK if asked["quick"] else asked)))
    if file:
        file.write_text(json.dumps([row.as_mapping() for row in rows], indent=1) + "\n", encoding="utf-8")


def run(names: Sequence[str], options: Options) -> list[Row]:
    """The machine's limits and the named benchmarks; each line is printed as soon as it is known."""
    torch.set_num_threads(options.threads)
    load = f", load average {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    clock = ", steps in CPU time" if options.cpu_time else ""
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, {options.device}{load}; medians{clock}.")
    print("\n| benchmark | ours | official | limit | unit | official / ours | ours / limit | target | met | conditions |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    for benchmark in [limits.rows, *(BENCHMARKS[name] for name in names)]:
        for found in benchmark(options):
            # targets are for the full sizes
            row = replace(found, at_most_of_limit=None, at_least_below_baseline=None) if options.quick else found
            print(line(row), flush=True)
            rows.append(row)
    return rows


def line(row: Row) -> str:
    """The row as a line of a Markdown table."""
    targets = []
    if row.at_least_below_baseline is not None:
        targets.append(f"≥ {_figure(row.at_least_below_baseline)} x below official")
    if row.at_most_of_limit is not None:
        targets.append(f"≤ {row.at_most_of_limit:g} x limit")
    met = {None: "", True: "yes", False: "no"}[row.met]
    figures = [_figure(value) for value in (row.ours, row.baseline, row.limit)]
    ratios = [_figure(value) for value in (row.ratio_to_baseline, row.ratio_to_limit)]
    return "| " + " | ".join([row.name, *figures, row.unit, *ratios, ", ".join(targets), met, row.conditions]) + " |"


def _figure(value: float | None) -> str:
    """Three digits, or none where there is no figure."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
