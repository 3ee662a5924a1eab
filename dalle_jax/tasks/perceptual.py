"""The perceptual losses of a VQGAN's training: LPIPS, whose weights are the users' files, or their own CLIP.

B images    H, W image
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.checkpoints import frozen
from dalle_jax.clip import distance as clip_distance
from dalle_jax.clip import stored
from dalle_jax.clip.flops import image_tower
from dalle_jax.errors import CheckpointError, ConfigError
from dalle_jax.models import lpips
from dalle_jax.models.clip import CLIPOptions
from dalle_jax.pytree import PyTree
from dalle_jax.tasks.task import zeros_like
from dalle_jax.tasks.vqgan_losses import VQGANObjectiveOptions

LPIPS_DESCRIPTION = {"kind": "lpips"}  # options.json of the folder
_LPIPS, _CLIP = "config.objective.lpips", "config.objective.clip"
_OFF = "Or train without this loss: --config.objective.perceptual_weight=0."


class Perceptual(Protocol):
    """A distance of images by the features of a trained network.

    Attributes:
      name: of its metric.
      smallest_side: of the images that it can compare, pixels.
    """

    name: ClassVar[str]
    smallest_side: ClassVar[int]

    def distance(
        self, params: PyTree, first: Float[ArrayLike, "B H W 3"], second: Float[ArrayLike, "B H W 3"]
    ) -> Float[Array, " B"]:
        """Compares pixels in [-1, 1], float32 [B, H, W, 3], one by one: float32 [B]."""

    def flops(self, image_size: int) -> float:
        """Counts the forward pass of one image."""


@dataclasses.dataclass(frozen=True)
class LPIPSDistance:
    """See `models/lpips.py`."""

    name: ClassVar[str] = "lpips"
    smallest_side: ClassVar[int] = lpips.SMALLEST_SIDE

    def distance(
        self, params: PyTree, first: Float[ArrayLike, "B H W 3"], second: Float[ArrayLike, "B H W 3"]
    ) -> Float[Array, " B"]:
        """See `Perceptual`."""
        return lpips.distance(params, first, second)

    def flops(self, image_size: int) -> float:
        """See `Perceptual`."""
        return lpips.flops(image_size)


@dataclasses.dataclass(frozen=True)
class ClipDistance:
    """See `clip/distance.py`.

    Attributes:
      options: of the CLIP.
    """

    options: CLIPOptions
    name: ClassVar[str] = "clip_distance"
    smallest_side: ClassVar[int] = 1

    def distance(
        self, params: PyTree, first: Float[ArrayLike, "B H W 3"], second: Float[ArrayLike, "B H W 3"]
    ) -> Float[Array, " B"]:
        """See `Perceptual`."""
        return clip_distance.distance(self.options, params, first, second)

    def flops(self, image_size: int) -> float:
        """See `Perceptual`."""
        del image_size  # images are resized
        return image_tower(self.options)


def check(objective: VQGANObjectiveOptions) -> None:
    """Checks that a folder holds the weights of LPIPS, if they are needed. `abstract` checks a CLIP.

    Raises:
      ConfigError: no folder is set, or it holds no such weights.
    """
    if objective.perceptual_weight and objective.clip is None:
        _check_lpips(objective.lpips)


def load(objective: VQGANObjectiveOptions) -> tuple[Perceptual, PyTree] | None:
    """Loads the perceptual loss and its parameters; None if its weight is 0.

    Raises:
      ConfigError: no folder is set, or it holds another model.
      DamagedError: a file is damaged.
      CheckpointError, DataError: a CLIP that cannot be loaded.
    """
    if not objective.perceptual_weight:
        return None
    if objective.clip is not None:
        found = _load_clip(objective.clip)
        return ClipDistance(found.clip.options), found.params["image"]
    _check_lpips(objective.lpips)
    options, params = frozen.load(objective.lpips, "Import the weights again (python -m dalle_jax.pretrained lpips).")
    if options != LPIPS_DESCRIPTION:
        raise ConfigError(f"{_LPIPS}={objective.lpips!r} holds {options.get('kind', options)!r}, not LPIPS's weights.")
    return LPIPSDistance(), params


def abstract(objective: VQGANObjectiveOptions) -> tuple[Perceptual, PyTree] | None:
    """Returns what `load` does, with parameters of value 0 and without the files of LPIPS.

    Raises:
      CheckpointError, DamagedError, DataError: a CLIP that cannot be loaded.
    """
    if not objective.perceptual_weight:
        return None
    if objective.clip is not None:
        return load(objective)
    blank = jnp.zeros((1, lpips.SMALLEST_SIDE, lpips.SMALLEST_SIDE, 3))
    init = lambda key: lpips.LPIPS().init(key, blank, blank)["params"]
    return LPIPSDistance(), zeros_like(init, jax.random.key(0))


def _load_clip(folder: str) -> stored.StoredClip:
    try:
        return stored.load(folder)
    except CheckpointError as error:
        raise type(error)(f"{_CLIP}={folder!r}: {error}") from error


def _check_lpips(folder: str | None) -> None:
    """Checks that a folder holds the weights of LPIPS, without reading them; raises ConfigError."""
    if folder is None or not frozen.exists(folder):
        given = f"{_LPIPS} is not set" if folder is None else f"{_LPIPS}={folder!r} holds no weights of LPIPS"
        raise ConfigError(
            f"{given}. Import them from your files: `python -m dalle_jax.pretrained lpips "
            f"--weights=vgg16-397923af.pth --weights=vgg.pth --output=runs/lpips`, then give --{_LPIPS}=runs/lpips. Or "
            f"give a CLIP that was trained on your images: --{_CLIP}=runs/clip-small. {_OFF}"
        )
