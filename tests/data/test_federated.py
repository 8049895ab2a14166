"""The whole way from a file to the federation's data, and the report of what was kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.config import RunConfig
from fedtune.data.federated import FederatedData, Lengths, describe, load_federated, load_local
from fedtune.errors import DataError, EmptyClientError
from fedtune.models import LanguageModel, load_model


def config(data: Path, **changes: object) -> RunConfig:
    return RunConfig.from_mapping({"data": str(data), "clients": 4, "template": "plain", "max_length": 64, **changes})


def rows_of(data: FederatedData) -> list[int]:
    return sorted(sample.row for own in data.clients for sample in own)


def test_rows_are_divided_into_clients_and_heldout(tiny_lm: LanguageModel, instructions: Path) -> None:
    data = load_federated(config(instructions), tiny_lm.tokenizer)
    assert sorted(rows_of(data) + [sample.row for sample in data.heldout]) == list(range(80))
    assert data.partition.clients == tuple(tuple(sample.row for sample in own) for own in data.clients)
    assert data.partition.heldout == tuple(sample.row for sample in data.heldout)
    for sample, text in zip(data.heldout, data.heldout_samples, strict=True):
        assert tiny_lm.tokenizer.decode(sample.input_ids[sample.prompt_length :]) == text.output + "</s>"


def test_the_report_counts_what_is_there(tiny_lm: LanguageModel, instructions: Path) -> None:
    data = load_federated(config(instructions, partition="column", holdout=0.25), tiny_lm.tokenizer)
    report = data.report
    assert (report.source, report.rows, report.dropped, report.truncated) == (str(instructions), 80, {}, 0)
    assert [list(histogram) for histogram in report.clients] == [["colours"], ["numbers"], ["shapes"], ["sizes"]]
    assert sum(report.heldout.values()) == 20
    lengths = sorted(len(sample.input_ids) for own in data.clients for sample in own)
    assert report.lengths == Lengths(lengths[0], (lengths[29] + lengths[30]) / 2, lengths[-1])
    assert json.loads(json.dumps(report.as_json()))["rows"] == 80


def test_the_example_shows_which_text_is_trained_on(tiny_lm: LanguageModel, instructions: Path) -> None:
    data = load_federated(config(instructions, partition="column", holdout_category="sizes", clients=3), tiny_lm.tokenizer)
    assert data.report.example == (("<s>Name colours number 0.\nlist 0\n", False), ("col 0</s>", True))
    assert describe(data.clients[1][0], tiny_lm.tokenizer)[1] == ("num 7</s>", True)


def test_unusable_rows_are_counted_and_not_divided(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    rows = [{"instruction": "q" * (90 if row < 7 else 5), "output": "" if row in (20, 21) else "yes"} for row in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data = load_federated(config(tmp_path / "a.json"), tiny_lm.tokenizer)
    assert data.report.dropped == {"empty response": 2, "prompt fills max_length": 7}
    assert len(rows_of(data)) + len(data.heldout) == 51
    assert not set(rows_of(data)) & {*range(7), 20, 21}
    assert [note.split(" in ")[0] for note in data.report.notes] == ["data: no column 'input'", "data: no column 'category'"]


def test_a_heldout_file_leaves_all_rows_for_training(tiny_lm: LanguageModel, instructions: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"evaluate {row}", "output": "ok" if row else ""} for row in range(6)]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    settings = {"holdout_file": str(tmp_path / "eval.json"), "partition": "dirichlet"}
    data = load_federated(config(instructions, **settings), tiny_lm.tokenizer)
    assert rows_of(data) == list(range(80))
    assert [text.instruction for text in data.heldout_samples] == [f"evaluate {row}" for row in range(1, 6)]
    assert data.report.heldout_dropped == {"empty response": 1}
    assert data.partition.heldout_source == str(tmp_path / "eval.json")


def test_eval_samples_takes_a_fixed_subset_of_the_heldout_rows(tiny_lm: LanguageModel, instructions: Path) -> None:
    whole, few = (load_federated(config(instructions, holdout=0.5, eval_samples=n), tiny_lm.tokenizer) for n in (0, 7))
    assert len(few.heldout) == 7
    assert set(few.partition.heldout) < set(whole.partition.heldout)
    assert few.clients == whole.clients


def test_a_file_without_a_usable_row_is_refused_with_the_reasons(tiny_lm: LanguageModel, instructions: Path) -> None:
    with pytest.raises(
        EmptyClientError, match=r"None of the 80 rows of .* can be used \(80 prompt fills max_length\): raise max_length"
    ):
        load_federated(config(instructions, max_length=8), tiny_lm.tokenizer)


def test_categories_are_needed_only_where_they_are_used(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    rows = [{"instruction": f"{row}", "output": "yes"} for row in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    load_federated(config(tmp_path / "a.json", partition="quantity"), tiny_lm.tokenizer)
    for settings in ({"partition": "dirichlet"}, {"partition": "column"}, {"holdout_category": "x"}):
        with pytest.raises(DataError, match=r"no column 'category' \(category_column\)"):
            load_federated(config(tmp_path / "a.json", **settings), tiny_lm.tokenizer)


def test_a_node_reads_its_own_file(tiny_lm: LanguageModel, instructions: Path) -> None:
    own = load_local(config(instructions), tiny_lm.tokenizer, str(instructions))
    assert [sample.row for sample in own] == list(range(80))
    with pytest.raises(
        EmptyClientError, match=r"has 80 usable samples of 80, fewer than min_samples = 81: give this node more data"
    ):
        load_local(config(instructions, min_samples=81), tiny_lm.tokenizer, str(instructions))


def test_the_papers_heldout_category_gives_the_recorded_rows(shared: Path) -> None:
    reference = json.loads((shared / "reference" / "fedkseed_official.json").read_text())
    settings = {
        "model": str(shared / "models" / "stories260K"),
        "data": str(shared / "data" / "dolly_parity.jsonl"),
        "template": "fedkseed",
        "partition": "dirichlet",
        "holdout_category": "open_qa",
        "device": "cpu",
    }
    settled = RunConfig.from_mapping(settings)
    data = load_federated(settled, load_model(settled).tokenizer)
    assert list(data.partition.heldout) == sorted(reference["partition"]["eval"])
    assert data.report.dropped == {}
    assert sum(map(len, data.clients)) == 1200
