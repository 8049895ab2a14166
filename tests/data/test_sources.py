"""Named data sets: small copies in their publishers' formats are sampled as the official codes sample the whole ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import RunConfig
from fedtune.data.encode import Encoded
from fedtune.data.federated import FederatedData, load_federated
from fedtune.data.partition import Clients, partition
from fedtune.data.samples import load_samples
from fedtune.data.sources.named import NAMED, read_source
from fedtune.errors import DataError
from fedtune.models import LanguageModel, load_tokenizer
from fedtune.source_names import split_source

LONG = "x" * 1024


def task(name: str, short: int, long: int = 0) -> dict[str, Any]:
    """A task file of Natural Instructions v2.8 with `short` usable instances and `long` over-long ones, alternating."""
    texts = [f"{name} {number}" for number in range(short)]
    for number in range(long):
        texts.insert(2 * number, f"{number} {LONG}")
    return {
        "Contributors": ["Someone"],
        "Source": ["made up"],
        "Categories": ["Question Answering"],
        "Definition": [f"Do {name}.", "A second wording."],
        "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
        "Negative Examples": [],
        "Instances": [
            {"id": f"{name}-{number}", "input": text, "output": [text.upper()[-20:], "another reference"]}
            for number, text in enumerate(texts)
        ],
        "Instance License": ["MIT"],
    }


@pytest.fixture
def instructions_folder(tmp_path: Path) -> Path:
    """A clone of Natural Instructions with four train tasks (one too small), two test tasks, and a task in no split."""
    train = {"task1_a": (100, 0), "task2_b": (50, 7), "task3_few": (19, 5), "task4_c": (21, 0)}
    test = {"task5_d": (12, 1), "task6_e": (1500, 0)}
    for name, sizes in {**train, **test, "task7_none": (40, 0)}.items():
        path = tmp_path / "ni" / "tasks" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task(name, *sizes)), encoding="utf-8")
    splits = tmp_path / "ni" / "splits" / "default"
    splits.mkdir(parents=True)
    (splits / "train_tasks.txt").write_text("\n".join(train) + "\n")
    (splits / "test_tasks.txt").write_text("\n".join(test))
    return tmp_path / "ni"


def read(prefix: str, place: Path | str, **settings: Any) -> tuple[list[Any], str]:
    rows, notes = read_source(f"{prefix}:{place}", RunConfig(**settings))
    return rows, " ".join(notes)


# ---------------------------------------------------------------------------------------------------- natural instructions


def test_a_fifth_of_each_train_task_with_twenty_usable_instances(instructions_folder: Path) -> None:
    rows, note = read("natural-instructions", instructions_folder)
    assert Counter(row["category"] for row in rows) == {"task1_a": 20, "task2_b": 10, "task4_c": 4}
    for row in rows:
        assert row["instruction"] == f"Do {row['category']}."
        assert row["output"] == row["input"].upper()  # the first reference
        assert len(row["input"]) < 1024
    assert len({row["input"] for row in rows}) == len(rows)
    assert note == (
        "data: Natural Instructions, train split: 34 of 190 usable instances from 3 of 4 tasks; "
        "12 instances have an input of 1024 characters or more and are left out"
    )


def test_two_percent_of_each_test_task_or_twenty_or_all(instructions_folder: Path) -> None:
    rows, note = read("natural-instructions-test", instructions_folder)
    assert Counter(row["category"] for row in rows) == {"task5_d": 12, "task6_e": 30}
    assert "42 of 1,512 usable instances from 2 of 2 tasks; 1 instances" in note


def test_share_and_length_are_options(instructions_folder: Path) -> None:
    rows, _ = read("natural-instructions", f"{instructions_folder}?share=1&max_characters=0")
    assert Counter(row["category"] for row in rows) == {"task1_a": 100, "task2_b": 57, "task3_few": 24, "task4_c": 21}
    for query, message in (
        ("?shear=1", r"there is no option 'shear', only share, max_characters\."),
        ("?share=all", r"option 'share' must be a number, at least 0, not 'all'\."),
        ("?share=nan", r"option 'share' must be a number, at least 0, not 'nan'\."),
        ("?share=2", r"option 'share' is the part of each task to take, above 0 and at most 1\."),
    ):
        with pytest.raises(DataError, match=message):
            read("natural-instructions", f"{instructions_folder}{query}")


def test_the_draw_follows_the_run_seed(instructions_folder: Path) -> None:
    first, again, other = (read("natural-instructions", instructions_folder, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert {row["input"] for row in first} != {row["input"] for row in other}


def test_a_task_is_a_client_and_the_test_split_is_the_evaluation(tiny_lm: LanguageModel, instructions_folder: Path) -> None:
    settings = {
        "data": f"natural-instructions:{instructions_folder}",
        "holdout_file": f"natural-instructions-test:{instructions_folder}",
        "partition": "column",
        "clients": 3,
        "min_samples": 1,
        "max_length": 300,
    }
    data = load_federated(RunConfig.from_mapping(settings), tiny_lm.tokenizer)
    assert data.report.clients == ({"task1_a": 20}, {"task2_b": 10}, {"task4_c": 4})
    assert data.report.heldout == {"task5_d": 12, "task6_e": 30}
    assert [note.split(":")[0] for note in data.report.notes] == ["data", "data"]
    assert data.partition.heldout_source == settings["holdout_file"]


def test_a_copy_that_is_not_whole_is_refused(instructions_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no copy of Natural Instructions, since it lacks splits/default/train_tasks\.txt"):
        read("natural-instructions", tmp_path)
    path = instructions_folder / "tasks" / "task1_a.json"
    for content, message in (
        ('{"Definition": ', r"task1_a\.json' is not valid JSON"),
        ('{"Definition": ["a"]}', r"is not in the form of v2\.8 \(KeyError: 'Instances'\)"),
        ('{"Definition": "a text", "Instances": []}', r"\(TypeError: a list was expected, not str\)"),
        ('{"Definition": ["a"], "Instances": [{"input": "a", "output": "b c"}]}', r"\(TypeError: a list was expected, not str"),
        ('{"Definition": ["a"], "Instances": [{"input": "a", "output": []}]}', r"\(IndexError: list index out of range\)"),
        ('{"Definition": ["a"], "Instances": [{"input": 1, "output": ["b"]}]}', r"\(TypeError: a text was expected, not int\)"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read("natural-instructions", instructions_folder)
    path.unlink()
    with pytest.raises(
        DataError, match=r"Task 'task1_a' of the split has no file tasks/task1_a\.json in .*: complete the copy"
    ):
        read("natural-instructions", instructions_folder)
    (instructions_folder / "splits" / "default" / "train_tasks.txt").write_text("\n")
    with pytest.raises(DataError, match=r"train_tasks\.txt' names no task"):
        read("natural-instructions", instructions_folder)


# ---------------------------------------------------------------------------------------------------- code alpaca


def code_alpaca(path: Path, languages: list[str]) -> Path:
    rows = [{"instruction": f"task {row}", "input": name, "output": f"code {row}"} for row, name in enumerate(languages)]
    path.write_text(json.dumps(rows))
    return path


def test_a_row_belongs_to_the_language_that_its_input_names(tmp_path: Path) -> None:
    path = code_alpaca(tmp_path / "rosetta_alpaca.json", ["Python", "C++", "X86-64 Assembly", " Go ", "", "Python"])
    samples, notes = load_samples(f"code-alpaca:{path}", RunConfig(), needs_category=True)
    assert [(sample.instruction, sample.input, sample.category) for sample in samples] == [
        ("task 0", "Python", "Python"),
        ("task 1", "C++", "C++"),
        ("task 3", " Go ", "Go"),
        ("task 5", "Python", "Python"),
    ]
    assert notes == ("data: CodeAlpaca: 4 of 6 rows in 3 languages; 2 in X86-64 Assembly or without a language are left out",)


def test_the_other_file_of_code_alpaca_is_refused(tmp_path: Path) -> None:
    path = code_alpaca(tmp_path / "code_alpaca_20k.json", [f"array = {row}" for row in range(30)])
    with pytest.raises(
        DataError, match=r"has 30 different inputs, which are no programming languages: give rosetta_alpaca\.json"
    ):
        read("code-alpaca", path)


# ---------------------------------------------------------------------------------------------------- plain settings


def test_dolly_and_gsm8k_need_no_reader_only_columns(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    dolly = [
        {"instruction": f"do {row}", "context": "c" * (row % 2), "response": "yes", "category": kind}
        for row, kind in enumerate(["open_qa", "summarization", "brainstorming"] * 20)
    ]
    (tmp_path / "databricks-dolly-15k.jsonl").write_text("\n".join(json.dumps(row) for row in dolly))
    settings = {"input_column": "context", "output_column": "response", "holdout_category": "summarization"}
    config = RunConfig(data=str(tmp_path / "databricks-dolly-15k.jsonl"), clients=2, partition="dirichlet", **settings)
    data = load_federated(config.replace(max_length=250), tiny_lm.tokenizer)
    assert data.report.heldout == {"summarization": 20}
    assert {text.input for text in data.heldout_samples} == {"", "c"}
    for name, count in (("train", 40), ("test", 7)):
        lines = [json.dumps({"question": f"{row}?", "answer": f"so\n#### {row}"}) for row in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    config = RunConfig(
        data=str(tmp_path / "train.jsonl"),
        holdout_file=str(tmp_path / "test.jsonl"),
        instruction_column="question",
        output_column="answer",
        input_column="",
        category_column="",
        clients=3,
    )
    data = load_federated(config, tiny_lm.tokenizer)
    assert [len(own) for own in data.clients] == [14, 13, 13]
    assert (len(data.heldout), data.heldout_samples[3].output, data.report.notes) == (7, "so\n#### 3", ())


# ---------------------------------------------------------------------------------------------------- prefixes


def test_an_unknown_prefix_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        DataError, match=r"'dolly:x\.jsonl' begins with 'dolly:', which names no data set: use natural-ins"
    ) as seen:
        read_source("dolly:x.jsonl", RunConfig())
    assert all(f"{prefix}:" in str(seen.value) for prefix in [*NAMED, "hub"])


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("rows.jsonl", ("", "rows.jsonl")),
        ("hub:org/name:train", ("hub", "org/name:train")),
        (r"C:\data\rows.jsonl", ("", r"C:\data\rows.jsonl")),
        ("/data/a:b.jsonl", ("", "/data/a:b.jsonl")),
        ("natural-instructions:", ("", "natural-instructions:")),
    ],
)
def test_what_is_a_prefix(source: str, parts: tuple[str, str]) -> None:
    assert split_source(source) == parts


def test_a_prefix_stays_before_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FEDTUNE_TEST_DATA", "hub:org/rows")
    config = RunConfig(data="natural-instructions:ni?share=1", holdout_file="natural-instructions-test:~/ni")
    absolute = config.with_absolute_paths(tmp_path)
    assert absolute.data == f"natural-instructions:{tmp_path}/ni?share=1"
    assert absolute.holdout_file == "natural-instructions-test:/home/someone/ni"
    assert absolute.with_absolute_paths() == absolute
    hub = RunConfig(data="${FEDTUNE_TEST_DATA}", model="org/name").with_absolute_paths(tmp_path)
    assert (hub.data, hub.model) == ("hub:org/rows", "org/name")


# ---------------------------------------------------------------------------------------------------- the real Dolly


@pytest.mark.slow
def test_dolly_is_divided_over_two_hundred_clients(shared: Path) -> None:
    config = RunConfig(
        model=str(shared / "models" / "stories260K"),
        data=str(shared / "data" / "dolly15k.jsonl"),
        holdout_category="summarization",
        partition="dirichlet",
        dirichlet_alpha=0.5,
        clients=200,
        template="fedkseed",
        max_length=512,
    )
    data = load_federated(config, load_tokenizer(config))
    kept = sum(map(len, data.clients))
    assert kept + sum(data.report.heldout.values()) + sum(data.report.dropped.values()) == data.report.rows == 15011
    assert set(data.report.heldout) == {"summarization"}
    categories = {sample.row: kind for sample, kind in zip(*_rows_and_kinds(config, data), strict=True)}
    even = partition(categories, config.replace(dirichlet_alpha=5.0))
    assert partition(categories, config) == data.partition.clients
    for clients in (data.partition.clients, even):
        assert len(clients) == 200
        assert min(map(len, clients)) >= config.min_samples
        assert sorted(row for rows in clients for row in rows) == sorted(categories)
    # A client's most frequent category has half of its samples at alpha 0.5, a third at 5.0 (25 % of all rows are open_qa).
    assert 0.5 < _mean_largest_share(data.partition.clients, categories) < 0.8
    assert 0.25 < _mean_largest_share(even, categories) < 0.45


def _rows_and_kinds(config: RunConfig, data: FederatedData) -> tuple[list[Encoded], list[str]]:
    samples = load_samples(config.data, config)[0]
    rows = [sample for own in data.clients for sample in own]
    return rows, [samples[sample.row].category for sample in rows]


def _mean_largest_share(clients: Clients, categories: dict[int, str]) -> float:
    """The mean over clients of the share of the client's most frequent category."""
    largest = [Counter(categories[row] for row in rows).most_common(1)[0][1] / len(rows) for rows in clients]
    return sum(largest) / len(largest)
