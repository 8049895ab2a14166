"""Comparisons: the plan, the tidy table from run folders, the results, and what holding against an earlier table says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedtune import models
from fedtune.cli import compare as compare_command
from fedtune.cli.main import main
from fedtune.data import samples
from fedtune.experiments.arms import Comparison, choose
from fedtune.experiments.cells import Outcome
from fedtune.experiments.compare import held_against, plan, results, table
from fedtune.experiments.sources import check_sources
from fedtune.report.table import Row, read
from fedtune.run_folder import RunFolder

COMMON: Mapping[str, object] = {"rounds": 2, "clients": 4, "clients_per_round": 2, "local_steps": 10}


def comparison() -> Comparison:
    return Comparison("made-up", dict(COMMON), ())


def test_the_plan_has_a_run_for_each_arm_and_seed_and_for_local_one_for_each_client(tmp_path: Path) -> None:
    planned = plan(comparison(), choose(comparison(), "fedkseed,local"), {}, range(2), tmp_path)
    assert [(one.arm.name, one.seed, len(one.cells)) for one in planned] == [
        ("fedkseed", 0, 1), ("local", 0, 4), ("fedkseed", 1, 1), ("local", 1, 4),
    ]  # fmt: skip
    folders = [cell.settings.out for one in planned for cell in one.cells]
    assert len(set(folders)) == len(folders)
    assert {cell.settings.only_client for cell in planned[1].cells} == {"0", "1", "2", "3"}
    assert {cell.settings.local_steps for cell in planned[1].cells} == {5}  # half the clients are asked: half the steps
    assert {cell.settings.seed for cell in planned[2].cells} == {1}


def _finished(folder: Path, losses: list[float], bytes_up: int) -> dict[str, object]:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"used": {}}))
    rows = [
        {
            "round": number, "eval_loss": loss, "bytes_up": bytes_up * (number > 0), "bytes_down": 0, "serialised_up": 5,
            "serialised_down": 6, "seconds": {"clients": 1.0}, "cpu_seconds": {"clients": 0.5},
        }
        for number, loss in enumerate(losses)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert RunFolder.open(folder).read_metrics() == rows
    return {"peak_memory_bytes": 1000}


def test_results_are_means_over_seeds_and_local_is_the_mean_over_clients(tmp_path: Path) -> None:
    planned = plan(comparison(), choose(comparison(), "fedkseed,local"), {}, range(2), tmp_path)
    outcomes = []
    for one in planned:
        for number, cell in enumerate(one.cells):
            losses = [3.0, 2.0, 1.0 + one.seed + number]
            outcomes.append(Outcome(cell, _finished(Path(cell.settings.out), losses, 100 if one.arm.name == "fedkseed" else 0)))
    rows = table(planned, outcomes, "made-up", None)
    assert len(rows) == 4 * 3
    last = [row for row in rows if row.label == "local only" and row.round == 2]
    assert [row.eval_loss for row in last] == [2.5, 3.5]
    fedkseed, local = results(rows, planned)
    assert (fedkseed.loss, fedkseed.seeds, fedkseed.total, fedkseed.up) == (1.5, 2, 200.0, 50.0)
    assert fedkseed.spread == pytest.approx(math.sqrt(0.5))
    assert fedkseed.cpu_seconds == 1.5
    assert (local.loss, local.total) == (3.0, 0.0)
    unfinished = [outcome for outcome in outcomes if "client 3, seed 1" not in outcome.cell.name]
    assert len(table(planned, unfinished, "made-up", None)) == 3 * 3


def _rows(label: str, losses: list[float]) -> list[Row]:
    return [Row("p", label, label, seed, 1, eval_loss=loss) for seed, loss in enumerate(losses)]


def test_results_agree_within_their_spread() -> None:
    before = [*_rows("a", [1.0, 1.2]), *_rows("b", [1.0]), *_rows("gone", [1.0])]
    (a, b) = held_against([*_rows("a", [1.3, 1.5]), *_rows("b", [1.01])], before)
    assert (a.agrees, round(a.before, 4), round(a.now, 4), round(a.allowed, 4)) == (True, 1.1, 1.4, 0.3)
    assert not b.agrees
    assert held_against(_rows("b", [1.001]), before)[0].agrees
    (first,) = held_against(_rows("a", [1.1]), before)  # one seed in common
    assert (first.before, first.now, round(first.allowed, 4)) == (1.0, 1.1, 0.4243)


@pytest.mark.slow
def test_the_command_writes_a_table_and_figures_and_repeats_nothing(
    tiny_folder: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_here = tmp_path / "rows.jsonl"
    shutil.copy(instructions, rows_here)
    (tmp_path / "both.toml").write_text(
        f'model = "{tiny_folder}"\ndata = "{rows_here}"\nrounds = 1\nclients = 2\nclients_per_round = 2\nlocal_steps = 2\n'
        'K = 64\nmin_samples = 1\ntemplate = "plain"\nmax_length = 64\nthreads = 1\ndevice = "cpu"\nholdout = 0.2\n'
        "[arms.fedkseed]\n[arms.fedavg]\nlr = 1e-2\n"
    )
    command = ["compare", str(tmp_path / "both.toml"), "--seeds", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = capsys.readouterr().out
    assert ended.value.code in (0, None), said
    assert "FedAvg" in said
    rows = read(tmp_path / "out" / "table.csv")
    assert [(row.algorithm, row.round) for row in rows] == [("fedkseed", 0), ("fedkseed", 1), ("fedavg", 0), ("fedavg", 1)]
    assert rows[3].bytes_up > 1000 * rows[1].bytes_up > 0
    assert None not in (rows[1].cpu_seconds, rows[1].serialised_bytes, rows[1].peak_memory_bytes)
    assert any(path.suffix == ".svg" for path in (tmp_path / "out" / "figures").iterdir())
    rows_here.unlink()  # what is finished needs no data
    with pytest.raises(SystemExit) as ended:
        main([*command, "--against", str(tmp_path / "out" / "table.csv"), "--target-loss", "1000", "--budget", "1kB"])
    said = capsys.readouterr().out
    assert ended.value.code in (0, None), said
    assert said.count("(was there)") == 2
    assert said.count("(agrees;") == 2
    for written in (said, (tmp_path / "out" / "results.md").read_text(encoding="utf-8")):
        assert written.index("To a held-out loss of 1000") < written.index("With 1.00 kB")
    arms = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))["results"]
    assert [(arm["targets"][0]["rounds"]["mean"], arm["budgets"][0]["rounds"]["mean"] > 0) for arm in arms][1] == (0, False)


EARLIER = str(Path(__file__).parents[2] / "simulations" / "results" / "embedded.csv")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--set", "seed=abc"], "Setting 'seed' = 'abc'"),
        (["--against", "nothing.csv"], "'nothing.csv' cannot be read"),
        (["--link", "5g"], "'5g' is no link"),
        (["--budget", "much"], "'much' is no number of bytes"),
        (["--target-loss", "nan"], "--target-loss nan is no loss to reach"),
        (["--seeds", "1", "--set", "seed=99", "--against", EARLIER], "has no run of these arms and seeds"),
    ],
)
def test_what_cannot_be_compared_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], text: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", "comparisons/embedded", "--out", str(tmp_path / "out"), *more])
    assert ended.value.code == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


MODEL_GONE = "There is no model folder '{}/model': correct the path, or give a hub name such as org/name."
DATA_GONE = "There is no data file '{}/rows.jsonl': correct the path, or give hub:NAME for a data set of the hub."
HELD_OUT_GONE = DATA_GONE.replace("rows", "held_out")
COLUMN = "'{}/there.jsonl' has no column 'answer'"


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"model": "{}/model"}, [MODEL_GONE]),
        ({"model": "{}"}, ["'{}' has no config.json"]),
        ({"data": "{}/rows.jsonl"}, [DATA_GONE]),
        ({"data": "{}/rows.jsonl", "holdout_file": "{}/held_out.jsonl", "holdout_category": ""}, [DATA_GONE, HELD_OUT_GONE]),
        ({"model": "{}/model", "data": "{}/rows.jsonl"}, [MODEL_GONE, DATA_GONE]),
        ({"data": "{}/there.jsonl", "output_column": "answer"}, [COLUMN]),
    ],
)
def test_a_source_that_is_missing_is_said_once_before_anything_is_started(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    instructions: Path,
    changes: dict[str, str],
    texts: list[str],
) -> None:
    monkeypatch.setattr(compare_command, "run_cells", lambda *rest, **more: pytest.fail("runs were started"))
    shutil.copy(instructions, tmp_path / "there.jsonl")
    settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value.format(tmp_path)}")]
    with pytest.raises(SystemExit) as ended:
        main(["compare", "comparisons/embedded", "--out", str(tmp_path / "out"), *settings])
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    for text in texts:
        assert said.count(text.format(tmp_path)) == 1, said
    assert said.endswith("No run was started.")
    assert not (tmp_path / "out").exists()


def test_each_source_is_looked_at_once_and_none_for_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: Path
) -> None:
    """Two arms and three seeds have one model and one data file; an arm with a model of its own has one more."""
    seen: list[str] = []
    monkeypatch.setattr(models, "model_folder", lambda config: seen.append(config.model))
    monkeypatch.setattr(samples, "load_samples", lambda source, *rest: seen.append(source))
    common = {**COMMON, "data": str(instructions)}
    arms = choose(Comparison("made-up", common, ()), "fedkseed,fedavg,fedkseed:model=org/other")
    cells = [cell for one in plan(Comparison("made-up", common, ()), arms, {}, range(3), tmp_path) for cell in one.cells]
    check_sources(cells)
    assert sorted(seen) == sorted(["embedded", "org/other", str(instructions)])
    seen.clear()
    for cell in cells:
        if cell.settings.model != "org/other":
            _finished(Path(cell.settings.out), [3.0, 2.0, 1.0], 10)
            (Path(cell.settings.out) / "summary.json").write_text(json.dumps({"rounds": cell.settings.rounds}))
    check_sources(cells)
    assert sorted(seen) == sorted(["org/other", str(instructions)])


def test_a_folder_in_the_way_is_said_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking at the sources does not fail on what stands where a run is to be."""
    (tmp_path / "out" / "runs" / "fedavg").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "fedavg" / "seed-0").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        main(["compare", "demo_ferret", "--algorithms", "fedavg", "--seeds", "1", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "It is in the way of 'fedavg, seed 0'" in " ".join(capsys.readouterr().err.split())
