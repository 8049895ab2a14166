from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("version", "device", "pid", "model", "placed", "fingerprint", "loads", "requests", "busy", "idle_seconds", "uptime_seconds", "work_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    pid: int
    model: str
    placed: str
    fingerprint: bytes
    loads: int
    requests: int
    busy: int
    idle_seconds: float
    uptime_seconds: float
    work_seconds: float
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., model: _Optional[str] = ..., placed: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., loads: _Optional[int] = ..., requests: _Optional[int] = ..., busy: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., uptime_seconds: _Optional[float] = ..., work_seconds: _Optional[float] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("key", "truth", "whole", "real", "text")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TRUTH_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    key: str
    truth: bool
    whole: int
    real: float
    text: str
    def __init__(self, key: _Optional[str] = ..., truth: bool = ..., whole: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class Client(_message.Message):
    __slots__ = ("id", "partition", "data")
    ID_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: str
    partition: int
    data: str
    def __init__(self, id: _Optional[str] = ..., partition: _Optional[int] = ..., data: _Optional[str] = ...) -> None: ...

class IntroduceRequest(_message.Message):
    __slots__ = ("request", "version", "run", "settings", "settings_digest", "client")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    request: str
    version: str
    run: str
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    settings_digest: bytes
    client: Client
    def __init__(self, request: _Optional[str] = ..., version: _Optional[str] = ..., run: _Optional[str] = ..., settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., settings_digest: _Optional[bytes] = ..., client: _Optional[_Union[Client, _Mapping]] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("examples", "fingerprint", "layout", "selftest")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SELFTEST_FIELD_NUMBER: _ClassVar[int]
    examples: int
    fingerprint: bytes
    layout: bytes
    selftest: bytes
    def __init__(self, examples: _Optional[int] = ..., fingerprint: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., selftest: _Optional[bytes] = ...) -> None: ...

class IntroduceReply(_message.Message):
    __slots__ = ("introduction", "problem")
    INTRODUCTION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    introduction: Introduction
    problem: Problem
    def __init__(self, introduction: _Optional[_Union[Introduction, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("request", "version", "run", "settings", "settings_digest", "client", "instruction", "held", "seconds")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    request: str
    version: str
    run: str
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    settings_digest: bytes
    client: Client
    instruction: bytes
    held: _containers.RepeatedScalarFieldContainer[bytes]
    seconds: float
    def __init__(self, request: _Optional[str] = ..., version: _Optional[str] = ..., run: _Optional[str] = ..., settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., settings_digest: _Optional[bytes] = ..., client: _Optional[_Union[Client, _Mapping]] = ..., instruction: _Optional[bytes] = ..., held: _Optional[_Iterable[bytes]] = ..., seconds: _Optional[float] = ...) -> None: ...

class TrainEvent(_message.Message):
    __slots__ = ("note", "step", "update", "problem")
    NOTE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    note: Note
    step: Step
    update: Update
    problem: Problem
    def __init__(self, note: _Optional[_Union[Note, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class Note(_message.Message):
    __slots__ = ("text", "warning")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    text: str
    warning: bool
    def __init__(self, text: _Optional[str] = ..., warning: bool = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "steps", "loss")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    step: int
    steps: int
    loss: float
    def __init__(self, step: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("payload", "keep")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    keep: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, payload: _Optional[bytes] = ..., keep: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: str
    def __init__(self, request: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: bool = ...) -> None: ...
