"""Relative positions on the image grid: a learned bias of attention for each head and displacement.

BEiT (arXiv 2106.08254, section 2.1 and appendix) has one table for all layers in pre-training, and so has this module.
Its reference fine-tunes with a copy of the table for each layer, which is not done here.

    S = P + N stream    P prefix    h, w grid    H heads
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle_jax.token_layout import TokenLayout


def relative_index(layout: TokenLayout) -> Int[np.ndarray, "S S"]:
    """Returns the row of the table for each query and key.

    The first (2h - 1)(2w - 1) rows are the displacements on the grid. The last three are prefix to image, image to
    prefix, and prefix to prefix, wherever in the prefix (BEiT: its class token).
    """
    t, rows, columns = layout.prefix_length, *np.divmod(np.arange(layout.image_length), layout.width)
    down, right = rows[:, None] - rows[None] + layout.height - 1, columns[:, None] - columns[None] + layout.width - 1
    cells = (2 * layout.height - 1) * (2 * layout.width - 1)
    index = np.full((layout.length, layout.length), cells + 2, np.int32)
    index[t:, t:] = down * (2 * layout.width - 1) + right
    index[:t, t:], index[t:, :t] = cells, cells + 1
    return index


class RelativePositions(nn.Module):
    """The table of biases, which starts at zero.

    Attributes:
      heads: H.
      layout: layout of the stream.
    """

    heads: int
    layout: TokenLayout

    @nn.compact
    def __call__(self) -> Float[Array, "H S S"]:
        """Returns the bias of each head for each query and key, float32 [H, S, S]."""
        index = relative_index(self.layout)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("positions", "heads"))
        table = self.param("bias", zeros, (int(index.max()) + 1, self.heads))
        return jnp.moveaxis(table[jnp.asarray(index)], -1, 0)
