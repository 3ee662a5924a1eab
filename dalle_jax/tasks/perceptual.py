"""The weights of LPIPS, which a training of a VQGAN reads from a folder: {"kind": "lpips"} and the parameters."""

from __future__ import annotations

from dalle_jax.checkpoints import frozen
from dalle_jax.errors import ConfigError
from dalle_jax.pytree import PyTree

DESCRIPTION = {"kind": "lpips"}  # options.json of the folder


def check_folder(folder: str | None, key: str) -> None:
    """Checks that a folder holds the weights, without reading them.

    Args:
      folder: which `python -m dalle_jax.pretrained lpips` wrote; None if none is given.
      key: the configuration's key that names it, for messages.

    Raises:
      ConfigError: it holds none.
    """
    if folder is None or not frozen.exists(folder):
        given = f"{key} is not set" if folder is None else f"{key}={folder!r} holds no weights of LPIPS"
        raise ConfigError(
            f"{given}. Import them from your files: `python -m dalle_jax.pretrained lpips "
            f"--weights=vgg16-397923af.pth --weights=vgg.pth --output=runs/lpips`, then give --{key}=runs/lpips. Or "
            "train without this loss: --config.objective.perceptual_weight=0."
        )


def load(folder: str | None, key: str) -> PyTree:
    """Loads the parameters of `LPIPS`. Arguments as in `check_folder`.

    Raises:
      ConfigError: the folder holds none, or another model.
      DamagedError: a file is damaged.
    """
    check_folder(folder, key)
    options, params = frozen.load(folder, "Import the weights again (python -m dalle_jax.pretrained lpips).")
    if options != DESCRIPTION:
        raise ConfigError(f"{key}={folder!r} holds {options.get('kind', options)!r}, not the weights of LPIPS.")
    return params
