"""Errors for users: everything that a user can cause and repair, such as a wrong config key or a missing folder.

`main.py` prints the message of a `UserError` without a traceback and exits with its `exit_code`. Any other exception is
a bug and keeps its traceback. A message says what was given, what was expected and what to do.
"""


class UserError(Exception):
    """Base class of errors caused by the user's input or machine.

    Attributes:
      exit_code: exit status of the process.
      unwinds: whether the process can exit normally. False if a thread or host would block the exit forever.
    """

    exit_code = 1
    unwinds = True


class ConfigError(UserError, ValueError):
    """A configuration key, value or variant is invalid."""

    exit_code = 2


class DataError(UserError, ValueError):
    """Training or evaluation data is missing or unreadable."""


class StuckDataError(DataError):
    """A data source does not answer, and a thread still waits for it."""

    unwinds = False


class LostHostError(UserError, RuntimeError):
    """Another host no longer answers."""

    unwinds = False


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written or read."""


class DamagedError(CheckpointError):
    """A stored file changed since it was written."""


class WorkdirInUse(CheckpointError):
    """Another process works in the workdir."""


class ConfigMismatch(CheckpointError):
    """The configuration stored in a checkpoint describes a different model than the current one."""

    exit_code = 2


class DataChanged(CheckpointError):
    """The data set is no longer the one that a checkpoint's place in the data counts."""


class MeshError(UserError, ValueError):
    """A device mesh does not fit the devices or the arrays on it."""

    exit_code = 2


class DoesNotFit(UserError, RuntimeError):
    """A program needs more memory than its device has."""


class NonFiniteError(UserError, ArithmeticError):
    """Training stopped because loss or gradients stayed infinite or NaN."""


class PretrainedError(UserError, RuntimeError):
    """Pretrained weights are missing, damaged or of a different architecture."""


class HubError(UserError, RuntimeError):
    """A repository on a hub cannot be reached, or does not hold what was asked for."""


class Preempted(SystemExit):
    """Training was stopped by SIGTERM or Ctrl-C and has saved its state. Ends the process with status 0.

    Derives from `SystemExit`, so that a caller does not start the next training after a stop signal.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message
