"""Run folders for the tests of reports, made without training; tests then damage, cut or poison them."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_lines import line

from fedtune.config import RunConfig
from fedtune.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run of four rounds without a ledger."""
    config = RunConfig.from_mapping({"algorithm": "ferret", "rounds": 4, "out": str(tmp_path / "run")})
    folder = RunFolder.create(tmp_path / "run", {"algorithm": "ferret"}, config)
    folder.write_metrics([line(number) for number in range(5)])
    folder.write_json("summary.json", {"parameters": 1000, "seconds": 12.5})
    folder.write_json("partition.json", {"clients": [[1, 2], [3], [4]], "heldout": [5]})
    folder.write_json("status.json", {"doing": "finished"})
    for number in (0, 4):
        texts = {"texts": [f"answer {number}"], "prompts": ["What?"], "references": ["That."]}
        folder.write_json(f"generated_round_{number}.json", texts)
    return folder
