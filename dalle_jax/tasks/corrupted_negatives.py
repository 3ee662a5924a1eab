"""Corrupted images: additional negatives for a contrastive loss.

Images of other captions teach CLIP to tell captions apart. They do not teach it to see damage: an image with a few
squares of another image in it stays the nearest to its caption. Priors generate such images, because they draw token by
token. A CLIP that cannot see the damage selects them when it reranks many candidates.

Therefore some squares of an image are replaced by the squares of another image of the batch at the same places. The
squares are cut as in CutMix (arXiv 1905.04899). Negatives from a corrupted positive follow arXiv 2110.14189.

The result is a pure function of the batch and a key, and the same on any mesh.

    B batch    H, W image    g squares per side    n corrupted copies of each image
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError

# A replacement is visible if this share of the square's pixels differs by more than this step (of 255) in any channel.
_VISIBLE_SHARE, _VISIBLE_STEP = 0.25, 64


@dataclasses.dataclass(frozen=True)
class NegativeOptions:
    """The corrupted images that are added to those of the batch.

    Attributes:
      spoiled: n, the number of corrupted copies of each image; 0 for the plain loss.
      grid: g, the number of squares per side; a divisor of the image size.
      squares: maximum number of replaced squares in an image. The number is uniform between 1 and this maximum.
        Squares may come from any row of the global batch, so devices exchange images.
    """

    spoiled: int = 0
    grid: int = 8
    squares: int = 12

    def __post_init__(self):
        check(
            self, "negatives", at_least_0=["spoiled"], positive=["squares", "grid"], most={"spoiled": 64, "grid": 2**12}
        )
        if self.grid < 2:
            raise ConfigError(f"config.negatives.grid is {self.grid}; expected at least 2 squares a side.")
        if self.squares >= self.grid**2:
            squares = f"an image has {self.grid**2}"
            raise ConfigError(f"config.negatives.squares is {self.squares}; expected fewer, because {squares}.")

    def check(self, image_size: int, batch_size: int) -> None:
        """Checks that images can be cut into squares and that a batch holds another image.

        Args:
          image_size: side of the images in pixels.
          batch_size: B.

        Raises:
          ConfigError: the grid does not divide the image size, or the batch has one row.
        """
        if not self.spoiled:
            return
        if image_size % self.grid:
            raise ConfigError(
                f"negatives.grid={self.grid} does not divide the image size of {image_size} pixels; expected a divisor."
            )
        if batch_size < 2:
            raise ConfigError(
                "negatives.spoiled copies squares from another image of the batch, but batch_size is 1; expected 2 or "
                "more."
            )


def spoil(images: jax.Array, key: jax.Array, options: NegativeOptions) -> tuple[jax.Array, jax.Array]:
    """Creates n corrupted copies of each image.

    Args:
      images: uint8 [B, H, W, 3], B at least 2.
      key: key of this batch.
      options: number of copies and squares.

    Returns:
      Copies, uint8 [B, n, H, W, 3], with 1 to `options.squares` visibly different squares each. Which of them count,
      bool [B, n]. A copy does not count if no replacement would have been visible; it then equals its image.
    """
    one = lambda i: _spoil(images, jax.random.fold_in(key, i), options)
    copies, valid = zip(*[one(i) for i in range(options.spoiled)])
    return jnp.stack(copies, axis=1), jnp.stack(valid, axis=1)


def _spoil(images: jax.Array, key: jax.Array, options: NegativeOptions) -> tuple[jax.Array, jax.Array]:
    """Creates one corrupted copy of each image: uint8 [B, H, W, 3], and which of them count, bool [B]."""
    b, height, width, _ = images.shape
    g = options.grid
    for_shift, for_number, for_places = jax.random.split(key, 3)
    # Every image copies from the image a common number of rows further.
    others = jnp.take(images, (jnp.arange(b) + jax.random.randint(for_shift, (), 1, b)) % b, axis=0)
    differs = jnp.abs(others.astype(jnp.int16) - images.astype(jnp.int16)).max(-1) > _VISIBLE_STEP
    share = differs.reshape(b, g, height // g, g, width // g).mean((2, 4), dtype=jnp.float32).reshape(b, g * g)
    visible = share >= _VISIBLE_SHARE
    number = jax.random.randint(for_number, (b, 1), 1, options.squares + 1)
    order = jnp.argsort(jnp.where(visible, jax.random.uniform(for_places, visible.shape), 2.0), axis=1)
    rank = jnp.argsort(order, axis=1)
    chosen = (visible & (rank < number)).reshape(b, g, g)
    pixels = chosen.repeat(height // g, 1).repeat(width // g, 2)[..., None]
    return jnp.where(pixels, others, images), chosen.any((1, 2))
