"""XLA flags for programs that are compiled more often than run, as in tests and short runs."""

from __future__ import annotations

from importlib.metadata import version


def flags() -> str:
    """Returns flags for as little optimisation as possible.

    Compilation on a CPU becomes several times faster, and numbers differ only by rounding. Without the newer one of its
    two code generators for fusions, XLA takes half of that time again. Later versions have no such flag, and XLA ends
    the process at an unknown flag.
    """
    level = "--xla_backend_optimization_level=0"
    return f"{level} --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else level
