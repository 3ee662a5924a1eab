"""Settings of every test: eight simulated CPU devices, exact float32, no silent rank promotion.

JAX reads these when it is imported, so they are set here, before any test module is collected.  Set
JAX_COMPILATION_CACHE_DIR to keep compiled programs between runs of the suite.
"""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("DALLE_JAX_TEST_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
