"""The units of all logged metrics, in one place, and values as text with their unit.

The parts of a name that vary (percentages, group sizes, reasons) are matched by pattern.
"""

from __future__ import annotations

import re

# pattern of a metric's name: its unit. Names without a pattern are numbers without a unit.
UNITS = {
    r"psnr": "dB",
    r"image_nats|image_nats_masked_\d+_\d+": "nats per image token",
    r"text_nats": "nats per text token",
    r"kl_nats": "nats per grid position",
    r"reconstruction_nats|elbo|relaxation_gap": "nats per subpixel",
    r"codebook_perplexity": "codes",
    r"codebook_usage|.*accuracy|.*@\d+": "%",  # logged as a share in [0, 1]
    r"seconds_.*": "s",
}


def unit(name: str) -> str:
    """Returns the unit of a metric, or "".

    Args:
      name: the metric's name, with or without "train/" or "eval/" in front.
    """
    name = name.rpartition("/")[2]
    return next((found for pattern, found in UNITS.items() if re.fullmatch(pattern, name)), "")


def with_unit(name: str, value: float) -> str:
    """Formats a value of a metric with four digits and its unit: "21.63 dB", "41.2%", "0.0069"."""
    found = unit(name)
    if found == "%":
        return f"{100 * value:.3g}%"
    return f"{value:.4g} {found}".rstrip()
