"""Whether a client that introduces itself can take part: the same base, layout, pool, directions and version as the server."""

from __future__ import annotations

from flwr.app import ConfigRecord

from fedtune import selftest
from fedtune.errors import DirectionsError, FedtuneError, MismatchError, ModelError
from fedtune.selftest import SelfTest

Reason = tuple[type[FedtuneError], str]


def check_fit(record: ConfigRecord, fingerprint: bytes, layout: bytes, ours: SelfTest) -> None:
    """Refuse a client whose work would be lost, with every reason and what to do.

    Args:
        record: its introduction.
        fingerprint, layout, ours: of the server.

    Raises:
        ModelError: another base model or layout. MismatchError: another pool or version, or no self-test.
        DirectionsError: the same pool, but other directions. WireError: a self-test that cannot be read.
    """
    reasons: list[Reason] = []
    if record.get("fingerprint") != fingerprint:
        reasons.append((ModelError, "it holds another base model than the server (give both the same files and dtype)"))
    elif record.get("layout") != layout:
        what = "it divides the parameters into other blocks (give both the same algorithm, blocks and fedtune)"
        reasons.append((ModelError, what))
    reasons += _of_test(record.get("selftest"), ours)
    if reasons:
        raise reasons[0][0](f"{'; '.join(text for _, text in reasons)}.")


def _of_test(data: object, ours: SelfTest) -> list[Reason]:
    """What is wrong with a client's self-test."""
    if not isinstance(data, bytes):
        return [(MismatchError, "it sent no self-test (install the server's version of fedtune there)")]
    theirs = selftest.decode(data)
    reasons: list[Reason] = []
    if theirs.program != ours.program:
        text = f"it runs fedtune {theirs.program} and the server {ours.program} (install the same version on both sides)"
        reasons.append((MismatchError, text))
    if theirs.pool != ours.pool:
        text = "its pool of directions is another one (give both the same seed, family, K and rank)"
        reasons.append((MismatchError, text))
    elif parts := selftest.differences(ours, theirs):
        text = (
            f"it computes other directions than the server ({', '.join(parts)}): "
            "update fedtune, numba, Triton and torch there, or set device = cpu in its node config"
        )
        reasons.append((DirectionsError, text))
    return reasons
