"""`python -m client.generate`: the Python code of worker.proto, written anew (needs grpcio-tools)."""

from __future__ import annotations

import sys
from importlib import import_module, resources
from pathlib import Path

from fedtune.errors import FedtuneError

GENERATED = ("worker_pb2.py", "worker_pb2.pyi", "worker_pb2_grpc.py")


def generate(out: Path) -> None:
    """Write the generated files of worker.proto to the folder `client` of `out`.

    Raises:
        FedtuneError: grpcio-tools is missing, or the compiler refused the file and has said why.
    """
    try:
        protoc = import_module("grpc_tools.protoc")
    except ImportError:
        raise FedtuneError("The compiler is not installed: pip install -e '.[dev]' brings grpcio-tools.") from None
    root = Path(__file__).parents[1]
    well_known = str(resources.files("grpc_tools") / "_proto")
    arguments = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main(["protoc", f"-I{root}", f"-I{well_known}", *arguments, str(root / "client" / "worker.proto")]):
        raise FedtuneError("protoc refused client/worker.proto; what is wrong with it stands above.")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
