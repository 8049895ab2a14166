"""Every error that fedtune raises on purpose, so that a caller can catch a kind and a reader knows what to do.

FedtuneError                     anything below; the command line prints it as one sentence and exits with 1
  ConfigError                    a setting that cannot be used
    UnknownSettingError          a key that does not exist (names the nearest one)
    ContradictionError           two settings that exclude each other
  ModelError                     the base model cannot be loaded or is not what fedtune trains
  DataError                      the training or evaluation data cannot be used
    EmptyClientError             a client (or the held-out set) is left without a usable sample
  DirectionsError                a family, pool, dtype, device or layout that has no kernel
  WireError                      a message that must not be used; nothing was changed
    MalformedMessageError        wrong length, magic, version or field
    MismatchError                a valid message for another round, pool, model or state
    NonFiniteError               a number that is not finite where the state would be touched
  StaleReplicaError              a client lacks coefficients that a message builds upon
  DeployError                    the files of a deployment cannot be written or used
  RunError                       the run as a whole
    RunFolderError               the run folder exists, is missing or is not a run folder
    DivergedError                no client produced a finite update for several rounds
    EngineError                  a Flower process failed; carries its last lines
    Interrupted                  stopped by the user after a step in hand; what is stored stays valid

An error says what was expected, what came, and what to do next; facts are attributes, not only text.
"""

from __future__ import annotations


class FedtuneError(Exception):
    """Base of every error raised on purpose. `facts` holds the values that the message mentions."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class ConfigError(FedtuneError):
    """A setting that cannot be used."""


class UnknownSettingError(ConfigError):
    """A key that does not exist."""


class ContradictionError(ConfigError):
    """Two settings that exclude each other."""


class ModelError(FedtuneError):
    """The base model cannot be loaded or is not what fedtune trains."""


class DataError(FedtuneError):
    """The training or evaluation data cannot be used."""


class EmptyClientError(DataError):
    """A client, or the held-out set, is left without a usable sample."""


class DirectionsError(FedtuneError):
    """A family, pool, dtype, device or layout that has no kernel."""


class WireError(FedtuneError):
    """A message that must not be used; nothing was changed."""


class MalformedMessageError(WireError):
    """Wrong length, magic, version or field."""


class MismatchError(WireError):
    """A valid message for another round, pool, model or state."""


class NonFiniteError(WireError):
    """A number that is not finite where the state would be touched."""


class StaleReplicaError(FedtuneError):
    """A client lacks coefficients that a message builds upon; the server sends everything again."""


class DeployError(FedtuneError):
    """The files of a deployment cannot be written or used."""


class RunError(FedtuneError):
    """The run as a whole."""


class RunFolderError(RunError):
    """The run folder exists, is missing or is not a run folder."""


class DivergedError(RunError):
    """No client produced a finite update for several rounds."""


class EngineError(RunError):
    """A Flower process failed; `facts["tail"]` has its last lines."""


class Interrupted(RunError):  # noqa: N818 - it is not a fault
    """Stopped by the user after the step in hand; what is stored stays valid."""
