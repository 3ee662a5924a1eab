"""Pictures spoiled in a few places: wrong ones that a contrastive loss sets beside the right one.

Whole pictures of other captions teach a CLIP to tell captions apart, not to see damage: a picture with a few squares
of another one in it remains the nearest to its caption. Priors make just such pictures, token by token, and among many
candidates a judge that is blind to it finds them. So some squares of a picture are exchanged for the squares of another
picture of the batch at the same places (cut as in CutMix, arXiv 1905.04899; negatives made by spoiling the right
picture: arXiv 2110.14189). A pure function of the batch and a key, the same on any mesh.

    B batch    H, W picture    g squares a side    n spoiled ones of each picture
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError

# A square shows the exchange where so much of it differs by so much, of 255, in some channel.
_VISIBLE_SHARE, _VISIBLE_STEP = 0.25, 64


@dataclasses.dataclass(frozen=True)
class NegativeOptions:
    """Which wrong pictures join those of the batch.

    Attributes:
      spoiled: n, how many spoiled ones of each picture; 0: none, the plain loss.
      grid: g, into how many squares a side pictures are cut; a divisor of their size.
      squares: the most squares exchanged in one picture; each number from 1 on is as likely. They come from any row of
        the global batch, which devices exchange for it.
    """

    spoiled: int = 0
    grid: int = 8
    squares: int = 12

    def __post_init__(self):
        check(self, "negatives", at_least_0=["spoiled"], positive=["squares"])
        if self.grid < 2:
            raise ConfigError(f"config.negatives.grid is {self.grid}; expected at least 2 squares a side.")
        if self.squares >= self.grid**2:
            squares = f"an image has {self.grid**2}"
            raise ConfigError(f"config.negatives.squares is {self.squares}; expected fewer, because {squares}.")

    def check(self, image_size: int, batch_size: int) -> None:
        """Refuses pictures that cannot be cut so, and a batch without another picture.

        Raises:
          ConfigError: either.
        """
        if not self.spoiled:
            return
        if image_size % self.grid:
            raise ConfigError(
                f"negatives.grid={self.grid}: pictures of {image_size} pixels cannot be cut into so many squares a "
                "side; give a divisor."
            )
        if batch_size < 2:
            raise ConfigError("negatives.spoiled takes squares from another picture of the batch: batch_size is 1.")


def spoil(images: jax.Array, key: jax.Array, options: NegativeOptions) -> tuple[jax.Array, jax.Array]:
    """Spoils each picture n times.

    Args:
      images: uint8 [B, H, W, 3], two or more.
      key: of this batch.
      options: how.

    Returns:
      uint8 [B, n, H, W, 3], each its picture but for 1 to `options.squares` squares, in which the difference can be
      seen; and bool [B, n], false where no square of the other picture would have shown: that one is its picture.
    """
    one = lambda i: _spoil(images, jax.random.fold_in(key, i), options)
    pictures, valid = zip(*[one(i) for i in range(options.spoiled)])
    return jnp.stack(pictures, axis=1), jnp.stack(valid, axis=1)


def _spoil(images: jax.Array, key: jax.Array, options: NegativeOptions) -> tuple[jax.Array, jax.Array]:
    b, height, width, _ = images.shape
    g = options.grid
    for_shift, for_number, for_places = jax.random.split(key, 3)
    # All pictures take theirs from as many rows on.
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
