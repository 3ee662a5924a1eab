"""Settings of every test: eight simulated CPU devices, exact float32, no silent rank promotion.

JAX reads these when it is imported, so they are set here, before any test module is collected.  Compiled programs are
kept for the session, because many tests train the same small model; set JAX_COMPILATION_CACHE_DIR to keep them between
sessions too.  Each worker process has a folder of its own there: JAX does not write its entries atomically.
"""

import atexit
import os
import shutil
import tempfile

import quick_xla

os.environ["JAX_PLATFORMS"] = os.environ.get("DALLE_JAX_TEST_PLATFORMS", "cpu")
# Programs here are compiled far more often than run: optimising them less takes less than half the time.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {quick_xla.flags()}")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dalle_jax_tests_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
elif worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], worker)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import type_checks  # noqa: E402  (imports jaxtyping, and thereby JAX, which has read its settings from above)

type_checks.install()
