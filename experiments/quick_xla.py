"""XLA flags for programs that are compiled far more often than run: those of the tests and the short runs."""

from __future__ import annotations

from importlib.metadata import version


def flags() -> str:
    """Optimise as little as possible: several times less time to compile on a CPU, numbers the same but for rounding.

    Without the newer of its two code generators for fusions XLA takes half the time still. That flag is gone in
    later versions, and XLA ends the process where it meets one that it does not know.
    """
    level = "--xla_backend_optimization_level=0"
    return f"{level} --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else level
