"""The command line: reads the flags, builds the configuration and runs its job.

    python -m dalle_jax.main --config=prior[:variant] [--workdir=DIR] [--config.key=value ...]
    python -m dalle_jax.main --help                   # the configs
    python -m dalle_jax.main --config=prior --help    # its variants and keys; all keys: --help=all

`--config=configs/prior.py:variant` and the path of any other config file work too.

| exit status | meaning                                  |
|-------------|------------------------------------------|
| 0           | done, or saved and stopped by a signal   |
| 1           | an error                                 |
| 2           | a wrong flag or configuration            |
| 130         | a second Ctrl-C                          |
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pathlib
import sys
import traceback

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from dalle_jax import compilation_cache
from dalle_jax.checkpoints.ownership import owned
from dalle_jax.configuration import command_help, config_files, shipped
from dalle_jax.configuration.flag_errors import explain_flag_error
from dalle_jax.configuration.sections import check_minutes
from dalle_jax.distributed.joining import check_devices, define_flags
from dalle_jax.distributed.turns import is_first, joined
from dalle_jax.distributed.watchdog import end_process
from dalle_jax.errors import ConfigError, UserError
from dalle_jax.storage.files import disable_listings_cache, expanded

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="The job: NAME[:variant] or a file.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run (default: config.workdir).")
_start_hosts = define_flags()

# config.job → the module whose run(config, workdir) runs it. Imported by name, so that start-up stays fast.
JOBS = {
    "train": "dalle_jax.jobs.train",
    "generate": "dalle_jax.jobs.generate",
    "evaluate": "dalle_jax.jobs.evaluate",
    "evaluate_classes": "dalle_jax.jobs.evaluate_classes",
    "quickstart": "dalle_jax.jobs.quickstart",
    "compile": "dalle_jax.jobs.compile",
    "data": "dalle_jax.jobs.data",
    "encode": "dalle_jax.jobs.encode",
}
_PACKAGE = pathlib.Path(__file__).parent


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags.

    Returns:
      The command line without the flags.

    Raises:
      ConfigError: a wrong flag, config file or key; the message is one line.
    """
    try:
        wanted, argv = command_help.split(argv)
        found = shipped.with_located(argv)
        with config_files.importable(config_files.given(found)):
            rest = flags.FLAGS(found)
        if wanted and _CONFIG.value is None:
            print(command_help.overview())
            sys.exit(0)
        if len(rest) > 1:
            raise ConfigError(f"Unexpected argument {rest[1]!r}: write options as --name=value.")
        if _CONFIG.value is None:
            raise ConfigError("No --config given; start with --config=quickstart (--help lists all).")
        given = config_flags.get_override_values(flags.FLAGS["config"])
        if fixed := [key for key in given if key.rpartition(".")[2] in ("job", "variant")]:
            raise ConfigError(f"--config.{fixed[0]} cannot be set: --config=FILE:VARIANT decides it.")
        if _CONFIG.value.job not in JOBS:
            raise ConfigError(
                f"{_CONFIG.value.job!r} is the job of this config file; expected one of {', '.join(JOBS)}."
            )
        check_minutes(_CONFIG.value, given)
        if wanted:
            print(command_help.describe(config_files.given(argv), _CONFIG.value, everything=wanted == "all"))
            sys.exit(0)
        return rest
    except (flags.Error, LookupError, AttributeError, ValueError, TypeError, OSError, SyntaxError) as error:
        raise explain_flag_error(error, argv) from None


def configure_logging() -> None:
    """Prints the messages of this package and the warnings of libraries, without prefixes."""
    handler = absl_logging.get_absl_handler()
    handler.addFilter(_is_worth_reading)
    handler.setFormatter(None)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Returns whether to print a log record.

    The first host prints the messages of this package. Every host prints warnings of this package and of libraries.
    """
    return record.levelno >= logging.WARNING or (is_first() and pathlib.Path(record.pathname).is_relative_to(_PACKAGE))


def _run(_: list[str]) -> None:
    configure_logging()
    disable_listings_cache()
    config = _CONFIG.value
    _start_hosts(config.job)
    check_devices()
    compilation_cache.enable()
    workdir = _WORKDIR.value or config.workdir
    with owned(workdir):
        importlib.import_module(JOBS[config.job]).run(config, str(expanded(workdir)))


def main() -> None:
    """Runs the command line of this process, then ends the process."""
    try:
        app.run(_run, flags_parser=_parse)
    except UserError as error:
        if not error.unwinds or joined():
            end_process(str(error), error.exit_code)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        end_process("interrupted", 130)  # Python's usual exit would wait for data that may never come
    except Exception as error:
        if not joined():
            raise
        # Python's usual exit would wait for the other hosts, which wait for this one, and then abort.
        with contextlib.suppress(OSError):
            traceback.print_exc()
        end_process(f"{type(error).__name__}: {error}", 1)


if __name__ == "__main__":
    main()
