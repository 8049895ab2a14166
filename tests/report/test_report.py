"""What the page of a run says, for whole runs and for those that are cut, damaged, strange or hostile."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_lines import line, write_lines

from fedtune.cli import main
from fedtune.errors import ReportError, RunFolderError
from fedtune.report.answers import spread
from fedtune.report.markup import Html, cut, escape, join, tag
from fedtune.report.page import MOST_RUNS, distinct, page, report
from fedtune.report.run import Client, read_run
from fedtune.report.sections import settings
from fedtune.run_folder import RunFolder


class Reader(HTMLParser):
    """Elements, attributes and the visible text of a page; fails where elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(name)
        self.attributes += attrs
        self._open.append(name)

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(name)
        self.attributes += attrs

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self._open else ""


def read(*paths: Path) -> Reader:
    return Reader(page([read_run(path) for path in paths]))


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b>", tag("b", 1), None, title='"&') == '<p title="&quot;&amp;"><b>1</b></p>'.replace(
        "><b>", ">&lt;b&gt;<b>"
    )
    assert isinstance(join(["<", Html("<br>")]), Html)
    assert escape("a\x00\x1b\ud800\u202e\uffffb\n") == r"a\x00\x1b\ud800\u202e\uffffb" + "\n"
    assert cut("abc", 2) == "ab..."


def test_a_whole_run_is_shown(run: RunFolder) -> None:
    shown = read(run.path)
    for text in (
        "finished, 4 of 4 rounds", "2.0000 \u2192 0.4000", "28.0 kB", "8.00 kB up, 20.0 kB down", "12.5 s", "What?", "That.",
        "answer 0", "answer 4", "after round 4", "Configuration", "algorithm", "python", f"{4:032x}", "evaluate",
    ):  # fmt: skip
        assert text in shown.text, text
    assert not {"script", "link", "img", "iframe", "object"} & set(shown.names)
    assert not [value for name, value in shown.attributes if name.startswith("on") or name in ("src", "href", "style")]


SCORED = {"samples": 3, "eval_loss": 1.25, "accuracy": 0.5}


def test_accuracy_and_categories_are_shown_before_and_after(run: RunFolder) -> None:
    def scored(number: int) -> dict[str, Any]:
        categories = {"moods": {**SCORED, "accuracy": 0.25 * number}, "": {**SCORED, "eval_loss": None}}
        return line(number, accuracy=0.3 + 0.1 * number, categories=categories)

    run.write_metrics([scored(number) for number in range(4)])
    shown = read(run.path)
    for text in ("0.3000 \u2192 0.6000", "Scores by round", "Categories of the held-out samples", "moods", "(none)", "0.7500"):
        assert text in shown.text, text
    run.write_metrics([line(number, categories={"moods": {**SCORED, "accuracy": None}}) for number in range(2)])
    assert "accuracy before" not in read(run.path).text
    run.write_metrics([line(number, categories=odd) for number, odd in enumerate([5, {"moods": 3}])])
    assert "Categories of" not in read(run.path).text


def test_answers_have_their_category_and_those_that_are_right_are_marked(run: RunFolder) -> None:
    for number, text in ((0, "This."), (4, " That.\n")):
        told = {"texts": [text], "prompts": ["What?"], "references": ["That."], "categories": ["moods"]}
        run.write_json(f"generated_round_{number}.json", told)
    shown = read(run.path).text
    assert "held-out sample 1, moods" in shown
    assert "after round 4 \u2713" in shown
    assert "the base model \u2713" not in shown


def test_answers_of_several_runs_stand_below_the_same_prompts(run: RunFolder, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    RunFolder(other).write_json(
        "generated_round_4.json", {"texts": ["another answer"], "prompts": ["What?"], "references": ["That."]}
    )
    both = page([read_run(run.path), read_run(other)])
    for text in ("Responses to held-out prompts", "What?", "That.", "answer 0", "answer 4", "another answer", "the base model"):
        assert text in both, text
    texts = {"texts": ["another answer"], "prompts": ["Who?"], "references": ["That."]}
    RunFolder(other).write_json("generated_round_4.json", texts)
    assert "Responses to held-out prompts" not in page([read_run(run.path), read_run(other)])


def test_a_few_of_many_answers_are_from_all_over() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(0, 4) == []


def test_named_nodes_do_not_stand_beside_clients_that_are_only_numbers(run: RunFolder) -> None:
    """partition.json divides the server's file, of which nodes with data of their own have no share."""
    run.write_metrics([line(0), line(1, clients=("anna", "ben"))])
    assert [(client.id, client.samples) for client in read_run(run.path).clients] == [("anna", None), ("ben", None)]


def test_clients_are_counted(run: RunFolder) -> None:
    write_lines(run, [line(0), line(1, refused={"1": "late"}), line(2, clients=("1", "10", "site-a"), refused={"1": "late"})])
    assert read_run(run.path).clients == [
        Client("0", 2, 1, 1, {}, None, None),
        Client("1", 1, 2, 0, {"late": 2}, None, None),
        Client("2", 1, 0, 0, {}, None, None),
        Client("10", None, 1, 1, {}, None, None),
        Client("site-a", None, 1, 1, {}, None, None),
    ]
    assert "late (2)" in read(run.path).text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"doing": "stopped"}, "stopped before its end"),
        ({"doing": "running"}, "its process died before its end"),
        ({"doing": "failed", "error": "no room"}, "no room"),
        ({"doing": "dancing"}, "state unknown"),
    ],
)
def test_a_run_that_is_not_whole_says_so(run: RunFolder, status: dict[str, str], words: str) -> None:
    run.discard("summary.json")
    run.write_json("status.json", status)
    write_lines(run, [line(0), line(1), '{"round": 2, "eval'])
    (run.path / "metrics.jsonl").write_bytes((run.path / "metrics.jsonl").read_bytes()[:-1])
    shown = read(run.path)
    assert words in shown.text
    assert "1 of 4 rounds" in shown.text


def test_the_error_that_ended_a_run_is_shown(run: RunFolder) -> None:
    run.write_json("error.json", {"type": "DivergedError", "message": "too few"})
    assert "DivergedError: too few" in read(run.path).text


STRANGE: dict[str, Callable[[RunFolder], Any]] = {
    "no line yet": lambda run: run.discard("metrics.jsonl"),
    "the base model only": lambda run: write_lines(run, [line(0)]),
    "one round": lambda run: write_lines(run, [line(0), line(1)]),
    "nulls": lambda run: write_lines(run, [dict.fromkeys(line(0)), dict.fromkeys(line(1)), line(2)]),
    "no finite loss": lambda run: write_lines(run, [{**line(0), "eval_loss": None}, {**line(1), "eval_loss": None}]),
    "NaN as Python writes it": lambda run: write_lines(run, ['{"round": 1, "eval_loss": NaN, "bytes_up": Infinity}']),
    "huge and tiny": lambda run: write_lines(run, [line(0, loss=1e300), line(1, loss=1e-300), line(2, loss=-5.0)]),
    "equal": lambda run: write_lines(run, [line(number, loss=0.0) for number in range(3)]),
    "other keys": lambda run: write_lines(run, [{"round": 0}, {"round": 1, "seconds": {"a": "b"}, "serialised_up": 3}]),
    "other types": lambda run: write_lines(
        run, [[1], {"round": "x", "clients": 7, "refused": [], "seconds": [], "bytes_up": "9"}]
    ),
    "no bytes": lambda run: write_lines(run, [{**line(n), "bytes_up": 0, "bytes_down": 0} for n in range(3)]),
    "many rounds": lambda run: write_lines(run, [line(number) for number in range(1500)]),
    "a damaged line": lambda run: write_lines(run, ["{", line(1)]),
    "damaged files": lambda run: [
        (run.path / name).write_bytes(b"\xff{") for name in ("summary.json", "status.json", "partition.json", "versions.json")
    ],
    "lists for objects": lambda run: [
        (run.path / name).write_text("[1]") for name in ("config.json", "summary.json", "status.json", "generated_round_0.json")
    ],
    "no ledger but a file": lambda run: (run.path / "ledger.sqlite").write_bytes(b"no database"),
    "nothing else": lambda run: [file.unlink() for file in run.path.iterdir() if file.name != "config.json"],
}


@pytest.mark.parametrize("poison", STRANGE.values(), ids=STRANGE)
def test_strange_runs_have_a_page_alone_and_compared(
    run: RunFolder, poison: Callable[[RunFolder], Any], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    RunFolder.create(other, {}, run.config()).write_metrics([line(0), line(1)])
    poison(run)
    for paths in ((run.path,), (other, run.path)):
        shown = read(*paths)
        assert "nan" not in re.sub("[a-z]*nan[a-z]+", "", " ".join(str(value) for _, value in shown.attributes))


def test_a_damaged_file_is_named(run: RunFolder) -> None:
    write_lines(run, ["{", line(1)])
    assert "Line 1 of" in read(run.path).text


def test_runs_are_compared(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path / "other", {}, run.config().replace(lr=0.5))
    other.write_metrics([line(0), line(1, bytes_up=9_000_000)])
    shown = read(run.path, other.path)
    for text in (
        "2 runs compared",
        "Held-out loss by payload so far",
        "0.4000",
        "1.0000",
        "0.5",
        str(run.config().lr),
        "other",
    ):
        assert text in shown.text, text
    assert "algorithm is the same" not in shown.text
    assert "The runs have the same settings." in read(run.path, run.path).text


def test_a_default_of_the_method_is_no_setting_that_was_changed(run: RunFolder, tmp_path: Path) -> None:
    """lr and the bits of a message are filled in by method: as they are then, they do not stand out."""
    config = run.config()
    for name, changes, stands in (("usual", {}, False), ("other", {"lr": 0.5, "coefficient_bits": 5}, True)):
        folder = RunFolder.create(tmp_path / name, {}, config.replace(algorithm="fedkseed", lr=0.0).replace(**changes))
        shown = str(settings(read_run(folder.path)))
        assert [f'<div class="given"><dt>{key}</dt>' in shown for key in ("lr", "coefficient_bits")] == [stands, stands]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("x/run", "y/run", "z"))
    assert distinct([a, b, c]) == ["x/run", "y/run", f"{tmp_path.name}/z"]
    assert distinct([c, c]) == ["z (1)", "z (2)"]


def test_a_report_replaces_a_report_and_nothing_else(run: RunFolder, tmp_path: Path) -> None:
    made = report([run.path])
    assert made == run.path / "report.html"
    assert report([run.path]) == made
    (tmp_path / "mine.html").write_text("<!doctype html>mine")
    with pytest.raises(ReportError, match=r"is not a report: give another file with --out"):
        report([run.path], tmp_path / "mine.html")
    with pytest.raises(RunFolderError, match="not a run folder"):
        report([tmp_path])
    with pytest.raises(ReportError, match="1 to 60 runs"):
        report([run.path] * (MOST_RUNS + 1))


def test_the_command_says_where_the_page_is(run: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run.path), str(run.path), "--out", str(tmp_path / "two.html")])
    assert stop.value.code == 0
    assert re.fullmatch(rf"'{tmp_path}/two\.html': [\d.]+ kB\n", capsys.readouterr().out)


def test_what_the_ledger_adds_is_shown(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    from fedtune.config import RunConfig
    from simulations.engines.in_process import run_in_process

    small = RunConfig.from_mapping({
        "model": str(tiny_folder), "data": str(instructions), "clients": 4, "clients_per_round": 2, "rounds": 2,
        "local_steps": 2, "K": 64, "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1, "device": "cpu",
        "holdout": 0.2,
        "eval_samples": 4, "generate_samples": 2, "max_new_tokens": 2, "out": str(tmp_path / "run"),
    })  # fmt: skip
    run_in_process(small)
    found = read_run(tmp_path / "run")
    assert found.problems == []
    assert sum(client.share or 0.0 for client in found.clients) == pytest.approx(1.0)
    assert sum(client.bytes_up or 0 for client in found.clients) > 0
    assert len(found.digests["base model"]) == 32
    assert found.answers[0].prompt
    assert found.answers[0].expected
    stored = json.loads((tmp_path / "run" / "generated_round_2.json").read_text())
    assert found.answers[0].after == stored["texts"][0]
    assert "share of the updates" in read(tmp_path / "run").text
