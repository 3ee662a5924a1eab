"""The vector-quantised image tokenizer (`vq_network.py`) as an `ImageTokenizer`.

B batch    H, W image    h, w grid, H = downsample * h    V codes    D code width
"""

from __future__ import annotations

import dataclasses

from jaxtyping import ArrayLike, Float

from dalle_jax.image_tokenizers.flops import Flops, vq_flops
from dalle_jax.image_tokenizers.quantized_tokenizer import QuantizedTokenizer
from dalle_jax.image_tokenizers.vq_network import VQ, VQOptions
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class VQTokenizer(QuantizedTokenizer):
    """The vector-quantised tokenizer. All methods are pure functions of the parameters.

    Attributes:
      options: sizes.
    """

    options: VQOptions
    kind = "vq"
    network = VQ

    def codebook(self, params: PyTree) -> Float[ArrayLike, "V D"]:
        """Returns the codes, float32 [V, D]."""
        return params["codes"]["vectors"]

    def flops(self, image_size: int) -> Flops:
        """See `ImageTokenizer.flops`."""
        return vq_flops(self.options, image_size)
