"""Imports the weights of FID's Inception-v3 as parameters of `models/inception.py`.

Users download the file themselves: `pt_inception-2015-12-05-6726825d.pth` of the project pytorch-fid (release
"fid_weights"). `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity holds the same weights. Any file with
arrays of these names is accepted, as safetensors, npz, or from `torch.save` (torch is not needed):

    Mixed_5b.branch5x5_1.conv.weight                                       [out, in, height, width]
    Mixed_5b.branch5x5_1.bn.{weight,bias,running_mean,running_var}         [out]
    fc.{weight,bias}                                                       [1008, 2048], [1008]

Evaluations read that file themselves. The command checks it before, and stores the converted parameters:

    python -m dalle_jax.pretrained inception --weights=pt_inception-2015-12-05-6726825d.pth --output=runs/inception
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dalle_jax.checkpoints import frozen
from dalle_jax.errors import PretrainedError
from dalle_jax.models.inception import SIZE, Inception
from dalle_jax.pretrained import state_dict
from dalle_jax.pretrained.importer import Importer
from dalle_jax.pytree import PyTree

FILE = "pt_inception-2015-12-05-6726825d.pth"
_DESCRIPTION = {"kind": "inception"}  # options.json of the folder that the command writes
_EPSILON = 1e-3  # of batch normalisation


def load(path: str | os.PathLike | None) -> PyTree:
    """Loads the parameters of `Inception` from a file.

    Args:
      path: the file, or the folder that the command wrote. None if the user has given none.

    Returns:
      Parameters of `Inception`, float32.

    Raises:
      PretrainedError: the file is missing, cannot be read, or is of another network.
    """
    if path is None or not os.path.exists(path):
        given = "config.metrics.inception is not set" if path is None else f"There is no file {os.fspath(path)!r}"
        raise PretrainedError(
            f"{given}: FID and the Inception score need the weights of Inception-v3. Download {FILE} of the "
            "project pytorch-fid (github.com/mseitzer/pytorch-fid, release 'fid_weights') and set "
            "--config.metrics.inception=PATH."
        )
    if os.path.isdir(path):
        options, params = frozen.load(path, "Import it again (python -m dalle_jax.pretrained inception).")
        if options != _DESCRIPTION:
            raise PretrainedError(f"config.metrics.inception={os.fspath(path)!r} holds no Inception-v3: {options}.")
        return params
    try:
        return jax.tree.map(jnp.asarray, convert(state_dict.read(path)))
    except PretrainedError as error:
        raise PretrainedError(
            f"config.metrics.inception={os.fspath(path)!r} is not FID's Inception-v3: {error} Expected {FILE}."
        ) from error


def convert(arrays: Mapping[str, np.ndarray]) -> PyTree:
    """Transposes the original arrays and folds each batch normalisation into the convolution before it.

    Args:
      arrays: arrays by their original names. Batch counters (`….num_batches_tracked`) are ignored.

    Returns:
      Parameters of `Inception`, float32 numpy arrays.

    Raises:
      PretrainedError: an array is missing, unexpected, damaged, or has another shape.
    """
    left = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}

    def take(name: str, *shape: int) -> np.ndarray:
        array = left.pop(name, None)
        if array is None:
            raise PretrainedError(f"array {name!r} is missing.")
        if array.shape != shape:
            raise PretrainedError(f"array {name!r} has shape {array.shape}, expected {shape}.")
        return state_dict.as_float32(name, array).astype(np.float64)

    params = {}
    for name, (*window, inputs, outputs) in _kernels().items():
        if window:
            kernel = take(f"{name}.conv.weight", outputs, inputs, *window).transpose(2, 3, 1, 0)
            gain, shift, mean, variance = (
                take(f"{name}.bn.{kind}", outputs) for kind in ("weight", "bias", "running_mean", "running_var")
            )
            if variance.min() < 0:
                raise PretrainedError(f"array '{name}.bn.running_var' holds negative variances: it is damaged.")
            gain = gain / np.sqrt(variance + _EPSILON)
            kernel, bias = kernel * gain, shift - mean * gain
        else:
            kernel, bias = take(f"{name}.weight", outputs, inputs).T, take(f"{name}.bias", outputs)
        params[f"{name}.kernel"], params[f"{name}.bias"] = kernel.astype(np.float32), bias.astype(np.float32)
    if left:
        raise PretrainedError(f"array {min(left)!r} is unexpected.")
    return traverse_util.unflatten_dict(params, sep=".")


@functools.cache
def _kernels() -> dict[str, tuple[int, ...]]:
    """Returns the shape of the kernel of each layer, such as "Mixed_5b.branch1x1"."""
    variables = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    flat = traverse_util.flatten_dict(variables["params"], sep=".")
    return {name.removesuffix(".kernel"): leaf.shape for name, leaf in flat.items() if name.endswith(".kernel")}


def _run(files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Converts the file; see `Importer.run`."""
    del settings
    try:
        params = convert(state_dict.read(files[0]))
    except PretrainedError as error:
        raise PretrainedError(f"{files[0]} is not FID's Inception-v3: {error} Expected {FILE}.") from error
    frozen.save(output, _DESCRIPTION, params)
    return "Inception-v3 of FID"


IMPORTER = Importer(
    name="inception",
    title="Inception-v3 that FID and the Inception score are defined by",
    parameters=23_833_744,
    licence="Apache-2.0",
    source="github.com/mseitzer/pytorch-fid, release fid_weights",
    files=(FILE,),
    use="--config.metrics.inception",
    run=_run,
    claims=lambda arrays: "Mixed_5b.branch1x1.conv.weight" in arrays,
)
