"""Every reason why an introduction does not fit, alone and together; without a model and without messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flwr.app import ConfigRecord

from fedtune.errors import DirectionsError, FedtuneError, MalformedMessageError, MismatchError, ModelError
from fedtune.selftest import PARTS, SelfTest, encode
from server.admission import check_fit

OURS = SelfTest("1.0", b"p" * 8, tuple(bytes([part]) * 8 for part in range(len(PARTS))), ())
OTHER = (*OURS.digests[:-1], b"?" * 8)
BASE, LAYOUT, TEST = "another base model", "divides the parameters into other blocks", "sent no self-test"
VERSION, POOL, DIRECTIONS = "runs fedtune 2.0 and the server 1.0", "pool of directions is another one", "on bfloat16): update"
ALL = (BASE, LAYOUT, TEST, VERSION, POOL, DIRECTIONS)


def introduction(test: object = OURS, **changes: object) -> ConfigRecord:
    sent = encode(test) if isinstance(test, SelfTest) else test
    record = {"fingerprint": b"f" * 16, "layout": b"l" * 16, "selftest": sent} | changes
    return ConfigRecord({key: value for key, value in record.items() if value is not None})  # type: ignore[misc]


def check(record: ConfigRecord) -> None:
    check_fit(record, b"f" * 16, b"l" * 16, OURS)


def test_a_client_that_is_like_the_server_fits() -> None:
    check(introduction())


@pytest.mark.parametrize(
    ("record", "kind", "reasons"),
    [
        (introduction(fingerprint=b"?" * 16), ModelError, {BASE}),
        (introduction(layout=b"?" * 16), ModelError, {LAYOUT}),
        (introduction(fingerprint=b"?" * 16, layout=b"?" * 16), ModelError, {BASE}),  # another base has other blocks
        (introduction(fingerprint=None, layout=None, test=None), ModelError, {BASE, TEST}),
        (introduction(test="text"), MismatchError, {TEST}),
        (introduction(replace(OURS, program="2.0")), MismatchError, {VERSION}),
        (introduction(replace(OURS, pool=b"?" * 8)), MismatchError, {POOL}),
        (introduction(replace(OURS, pool=b"?" * 8, digests=OTHER)), MismatchError, {POOL}),  # of another pool, so no wonder
        (introduction(replace(OURS, digests=OTHER)), DirectionsError, {DIRECTIONS}),
        (introduction(replace(OURS, program="2.0", digests=OTHER)), MismatchError, {VERSION, DIRECTIONS}),
        (introduction(replace(OURS, digests=OTHER), layout=b""), ModelError, {LAYOUT, DIRECTIONS}),
    ],
)
def test_what_does_not_fit_is_refused_with_all_its_reasons(
    record: ConfigRecord, kind: type[FedtuneError], reasons: set[str]
) -> None:
    with pytest.raises(FedtuneError) as caught:
        check(record)
    assert type(caught.value) is kind
    assert {reason for reason in ALL if reason in str(caught.value)} == reasons
    assert str(caught.value).count("; it") == len(reasons) - 1


def test_a_self_test_that_cannot_be_read_is_no_self_test() -> None:
    with pytest.raises(MalformedMessageError, match="self-test"):
        check(introduction(test=b"abc"))
