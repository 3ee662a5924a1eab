"""Errors meant for the person at the keyboard.

Everything a user can cause and repair (a wrong config key, a missing folder, a mesh that does not fit) is raised as
a `UserError`.  `main.py` prints its message alone, without a traceback, and exits with its `exit_code`; any other
exception is a bug and keeps its traceback.

Messages follow one pattern: what was given, what is expected, what to do.
"""


class UserError(Exception):
    """Base of every error caused by the user's input or machine; carries the exit status of the process."""

    exit_code = 1
    unwinds = True  # false: something waits for ever, and would hold up the end of the process


class ConfigError(UserError, ValueError):
    """A configuration key, value or variant that cannot be used."""

    exit_code = 2


class DataError(UserError, ValueError):
    """Training or evaluation data that is missing or unreadable."""


class StuckDataError(DataError):
    """A data source that does not deliver; a thread is left waiting for it."""

    unwinds = False


class LostHostError(UserError, RuntimeError):
    """Another host does not answer any more."""

    unwinds = False


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class ConfigMismatch(CheckpointError):
    """A checkpoint whose stored configuration describes another model than the one asked for."""

    exit_code = 2


class MeshError(UserError, ValueError):
    """A device mesh that does not fit the devices or the arrays laid out on it."""

    exit_code = 2


class DoesNotFit(UserError, RuntimeError):
    """A program that needs more memory than its device has."""


class NonFiniteError(UserError, ArithmeticError):
    """Training stopped because loss or gradients stayed infinite or not-a-number."""


class PretrainedError(UserError, RuntimeError):
    """Pretrained weights that are missing, damaged or of another architecture."""


class Preempted(SystemExit):
    """Training was asked to stop (SIGTERM, Ctrl-C), has saved its state, and ends the process with status 0.

    Derives from `SystemExit` so that a caller which runs several trainings in turn stops with the first one
    instead of starting the next.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message
