"""Settings of every test: eight simulated CPU devices, exact float32, no silent rank promotion.

JAX reads these settings when it is imported. They are therefore set here, before any test module is collected.

All processes of a session share one compilation cache, because many tests train the same small model. Set
JAX_COMPILATION_CACHE_DIR to keep the compiled programs between sessions.
"""

import atexit
import gc
import itertools
import os
import shutil
import signal
import tempfile
import time

import compiled_programs
import deadline
import longest_first
import pytest
import quick_xla

os.environ["JAX_PLATFORMS"] = os.environ.get("DALLE_JAX_TEST_PLATFORMS", "cpu")
# Tests compile programs far more often than they run them. Less optimisation takes less than half the time.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {quick_xla.flags()}")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dalle_jax_tests_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

_tests = itertools.count()


def pytest_configure(config):
    """Prepares a process that runs tests. The controller of pytest-xdist only distributes them."""
    if not config.getoption("numprocesses", None):
        import type_checks  # imports jaxtyping and thereby JAX, which reads the settings from above

        type_checks.install()
        compiled_programs.share()


def pytest_collection_modifyitems(items):
    """Sorts the test files by time, longest first, so that no worker ends with a long file while the others wait."""
    rank = {name: i for i, name in enumerate(longest_first.FILES)}
    items.sort(key=lambda item: rank.get(str(item.path.relative_to(longest_first.FOLDER)), len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Skips tests that begin too late, before their fixtures train anything."""
    if deadline.is_over(os.environ, time.time()):
        pytest.skip(f"out of time ({deadline.VARIABLE})")


def pytest_runtest_teardown(item, nextitem):
    """Drops the compiled programs if there are many: after a file, and sometimes within a long one."""
    if nextitem is None or nextitem.path != item.path:
        compiled_programs.forget(limit=10_000)
    elif next(_tests) % 20 == 19:
        compiled_programs.forget(limit=35_000)


def pytest_collection_finish():
    """Makes garbage collection cheaper. The imported libraries are a million objects, and tracing creates many more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def default_signals():
    """Restores the default reaction to Ctrl-C and SIGTERM, which a shell may have turned off (`nohup`, `&`, CI).

    Processes that tests start inherit this reaction.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in defaults}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, defaults[number])
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
