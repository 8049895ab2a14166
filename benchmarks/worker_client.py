"""What a SuperNode's process for one message does, with a message from a file: `python -m benchmarks.worker_client FOLDER`.

It imports what Flower's own program imports, and fedtune's ClientApp, and hands over the message. Prints the seconds since
the process began at which the imports were done and the reply was there, and the length of the reply.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict


def main() -> None:
    """Answer the message of the folder that the command line names."""
    folder = Path(sys.argv[1])
    importlib.import_module("flwr.supernode.runtime.run_clientapp")
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    from client.app import app

    imported = _age()
    identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
    payload, config = (folder / "instruction.bin").read_bytes(), json.loads((folder / "config.json").read_text())
    node = {"client-id": "a", "worker": "auto", "data": str(folder / "rows.jsonl")}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=config)
    content = RecordDict({"fedtune": ConfigRecord({"payload": payload})})
    reply = app(Message(content, dst_node_id=1, message_type="train", ttl=600.0), context)
    record = reply.content.config_records["fedtune"]
    if "problem" in record:
        sys.exit(f"{record['problem']}: {record['text']}")
    assert "torch" not in sys.modules
    print(imported, _age(), len(record["payload"]), file=sys.stdout)  # type: ignore[arg-type]


def _age() -> float:
    """Seconds since this process was started (Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
