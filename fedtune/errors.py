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
  DeltaError                     a file of kilobytes that cannot be used; nothing was written
    MalformedDeltaError          damaged, or not such a file
    DeltaMismatchError           a sound one for another base model, dtype or program
  DeadlineError                  the deadline of a round passed; the local work was stopped after a step
  WorkerError                    the node-side worker cannot do what was asked
    WorkerStartError             it did not start, or died again after a restart; carries its last lines
    WorkerAccessError            its folder, socket or token is not of this user alone
    WorkerVersionError           it runs other sources, or owns another device
  DeployError                    the files of a deployment cannot be written or used
  ReportError                    a report, table or figure cannot be made of what is there
    TableError                   a file that is not the table of an experiment, or a damaged one
  SweepError                     a sweep over settings that cannot be made, or slopes that cannot be measured
  MissingPackageError            an optional package is not installed; says what installs it
  RunError                       the run as a whole
    RunFolderError               the run folder exists, is missing or is not a run folder
      ControlError               a command to a run that does not exist, or that the run cannot follow
    LedgerError                  the ledger of a run cannot be used
      DamagedLedgerError         what it holds is not what was written; names the first bad row
      ForeignLedgerError         not a ledger, one of a newer format, or of another model, data or settings
      LockedLedgerError          another process writes it
      FullLedgerError            no room on the disk for the next row; what is committed stays
    DivergedError                too few clients returned a usable update for several rounds
    UnchangedError               the model of the run is still the base model: no update has moved it
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


class DeltaError(FedtuneError):
    """A file of kilobytes that cannot be used; nothing was written."""


class MalformedDeltaError(DeltaError):
    """Damaged, or not such a file."""


class DeltaMismatchError(DeltaError):
    """A sound one for another base model, dtype or program."""


class DeadlineError(FedtuneError):
    """The deadline of a round passed; the local work was stopped after a step."""


class WorkerError(FedtuneError):
    """The node-side worker cannot do what was asked."""


class WorkerStartError(WorkerError):
    """The worker did not start, or died again after a restart; `facts["tail"]` has its last lines."""


class WorkerAccessError(WorkerError):
    """The worker's folder, socket or token is not of this user alone; nothing was sent."""


class WorkerVersionError(WorkerError):
    """The worker runs other sources of fedtune, or owns another device."""


class DeployError(FedtuneError):
    """The files of a deployment cannot be written or used."""


class ReportError(FedtuneError):
    """A report, table or figure cannot be made of what is there."""


class TableError(ReportError):
    """A file that is not the table of an experiment, or a damaged one."""


class SweepError(FedtuneError):
    """A sweep over settings that cannot be made, or slopes that cannot be measured."""


class MissingPackageError(FedtuneError):
    """An optional package is not installed; says what installs it."""

    @classmethod
    def of(cls, package: str, purpose: str, extra: str = "") -> MissingPackageError:
        """Of `package`, needed for `purpose` ("Parquet tables"), which comes with fedtune's optional `extra`, if with any."""
        install = f"fedtune[{extra}]" if extra else package
        return cls(
            f"{purpose[0].upper()}{purpose[1:]} need the package '{package}', which is not installed: pip install '{install}'.",
            package=package,
            extra=extra,
        )


class RunError(FedtuneError):
    """The run as a whole."""


class RunFolderError(RunError):
    """The run folder exists, is missing or is not a run folder."""


class ControlError(RunFolderError):
    """A command to a run that does not exist, or that the run cannot follow."""


class LedgerError(RunError):
    """The ledger of a run cannot be used."""


class DamagedLedgerError(LedgerError):
    """What the ledger holds is not what was written; `facts["row"]` names the first bad row."""


class ForeignLedgerError(LedgerError):
    """Not a ledger, one of a newer format, or one of another model, data or settings."""


class LockedLedgerError(LedgerError):
    """Another process writes the ledger."""


class FullLedgerError(LedgerError):
    """No room on the disk for the next row; what is committed stays and the run can be resumed."""


class DivergedError(RunError):
    """Too few clients returned a usable update, several rounds in a row."""


class UnchangedError(RunError):
    """The model of a run is still the base model: no update has moved it."""


class EngineError(RunError):
    """A Flower process failed; `facts["tail"]` has its last lines."""


class Interrupted(RunError):  # noqa: N818 - it is not a fault
    """Stopped by the user after the step in hand; what is stored stays valid."""


KINDS: dict[str, type[FedtuneError]] = {
    name: kind for name, kind in list(vars().items()) if isinstance(kind, type) and issubclass(kind, FedtuneError)
}
"""Every error by its name: what one process of fedtune says to another of the same user."""


def named(name: str) -> type[FedtuneError]:
    """The error called `name`; FedtuneError if there is none."""
    return KINDS.get(name, FedtuneError)


def reported(name: str) -> type[FedtuneError]:
    """The error that a client reports as `name`.

    What steers or ends a run (RunError and what is below it) is not a client's to raise, so that is a FedtuneError.
    """
    kind = named(name)
    return FedtuneError if issubclass(kind, RunError) else kind
