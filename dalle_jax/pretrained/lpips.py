"""Imports the weights of LPIPS as parameters of `models/lpips.py`: VGG-16, and the weights of its five stages.

Users download both files themselves. Any files with arrays of these names are accepted, as safetensors, npz, or from
`torch.save` (torch is not needed):

    vgg16-397923af.pth of torchvision         features.{0,2,5,7,10,12,14,17,19,21,24,26,28}.{weight,bias}
    vgg.pth of the package lpips (weights/v0.1), or of taming transformers (vgg_lpips)
                                              lin{0,1,2,3,4}.model.1.weight              [1, C, 1, 1]

    python -m dalle_jax.pretrained lpips --weights=vgg16-397923af.pth --weights=vgg.pth --output=runs/lpips

A VGG-16 trained on ImageNet and the published stage weights give the published distance. Other weights give another.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.checkpoints import frozen
from dalle_jax.errors import PretrainedError
from dalle_jax.models.lpips import LPIPS, SMALLEST_SIDE, STAGES
from dalle_jax.pretrained import state_dict
from dalle_jax.pretrained.importer import Importer
from dalle_jax.pytree import PyTree
from dalle_jax.tasks.perceptual import LPIPS_DESCRIPTION

FILES = ("vgg16-397923af.pth", "vgg.pth")
_UNUSED = "classifier."  # the layers of VGG-16 after the last stage


@functools.cache
def _layout() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the name of the layer, and the shape, by original name."""
    names, place, inputs = {}, 0, 3
    for stage, widths in enumerate(STAGES):
        for i, width in enumerate(widths):
            layer = f"stage_{stage}_conv_{i}"
            names[f"features.{place}.weight"] = layer, (width, inputs, 3, 3)
            names[f"features.{place}.bias"] = layer, (width,)
            place, inputs = place + 2, width  # a ReLU follows
        names[f"lin{stage}.model.1.weight"] = f"weights_{stage}", (1, inputs, 1, 1)
        place += 1  # max pooling
    return names


def convert(arrays: Mapping[str, np.ndarray]) -> PyTree:
    """Converts the original arrays of both files.

    Args:
      arrays: arrays by their original names. Those of VGG's classifier are ignored.

    Returns:
      Parameters of `LPIPS`, float32 numpy arrays.

    Raises:
      PretrainedError: arrays are missing, unexpected, damaged, or have another shape.
    """
    given = {name: array for name, array in arrays.items() if not name.startswith(_UNUSED)}
    layout = _layout()
    state_dict.check_shapes(given, {name: shape for name, (_, shape) in layout.items()})
    params: dict[tuple[str, ...], np.ndarray] = {}
    for name, (layer, _) in layout.items():
        array = state_dict.as_float32(name, given[name])
        if layer.startswith("weights"):
            params[(layer,)] = array.reshape(-1)
        elif name.endswith("bias"):
            params[(layer, "bias")] = array
        else:
            params[(layer, "kernel")] = array.transpose(2, 3, 1, 0)
    blank = jnp.zeros((1, SMALLEST_SIDE, SMALLEST_SIDE, 3))
    return state_dict.as_parameters(params, lambda key: LPIPS().init(key, blank, blank)["params"], "LPIPS")


def _run(files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Converts the files; see `Importer.run`."""
    del settings
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        arrays |= state_dict.read(file)
    try:
        params = convert(arrays)
    except PretrainedError as error:
        names = " and ".join(str(file) for file in files)
        raise PretrainedError(
            f"{names} do not hold LPIPS: {error} Expected {FILES[0]} (torchvision) and {FILES[1]} (lpips)."
        ) from error
    frozen.save(output, LPIPS_DESCRIPTION, params)
    return f"LPIPS, {sum(array.size for array in jax.tree.leaves(params)):,} parameters"


IMPORTER = Importer(
    name="lpips",
    title="LPIPS with VGG-16, the perceptual loss of VQGAN trainings",
    parameters=14_716_160,
    licence="BSD-3-Clause (VGG-16 of torchvision), BSD-2-Clause (stage weights)",
    source="download.pytorch.org/models/vgg16-397923af.pth, and lpips/weights/v0.1/vgg.pth of the PyPI package lpips",
    files=FILES,
    use="--config.objective.lpips",
    run=_run,
    claims=lambda arrays: "features.0.weight" in arrays or "lin0.model.1.weight" in arrays,
)
