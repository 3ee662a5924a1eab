"""Layer norm and RMS norm, computed in float32."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float


class Norm(nn.Module):
    """Layer norm or RMS norm, computed in float32.

    Attributes:
      kind: one of `transformer_options.NORMS`.
      dtype: dtype of the output.
      epsilon: added to the variance; 0 for 1e-5 in layer norms and 1e-6 in RMS norms.
    """

    kind: str
    dtype: DTypeLike
    epsilon: float = 0.0

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*axes D"]) -> Float[Array, "*axes D"]:
        """Normalises over the last axis: [..., D] to [..., D]."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        if self.kind == "layernorm":
            norm = nn.LayerNorm(self.epsilon or 1e-5, dtype=jnp.float32, scale_init=ones, bias_init=zeros, name="norm")
        else:
            norm = nn.RMSNorm(self.epsilon or 1e-6, dtype=jnp.float32, scale_init=ones, name="norm")
        return norm(x).astype(self.dtype)
