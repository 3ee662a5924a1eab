"""Embeddings of the stream "text, then image grid" that both priors share (DALL-E, section 2.2), and the image head.

A text position is token + position, an image position token + row + column; padding has an id of its own at each text
position (`TokenLayout`).

    B rows    T text    N image tokens    D width    V image vocabulary    C width of the tokenizer's codebook
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.distributed.per_device import contract
from dalle_jax.models.dense import rows_product
from dalle_jax.models.transformer import TransformerOptions
from dalle_jax.token_layout import TokenLayout


class StreamEmbedding(nn.Module):
    """Token and position embeddings of both parts.

    Attributes:
      trunk: of the transformer that reads them.
      layout: of the stream.
      scale: standard deviation at initialisation.
      head_scale: that of heads that are tables of their own.
      tied: the image head is the image embedding, transposed.
    """

    trunk: TransformerOptions
    layout: TokenLayout
    scale: float
    head_scale: float
    tied: bool

    def setup(self):
        lay = self.layout
        self.text_table = self.table("text", lay.text_ids)
        self.image_table = self.table("image", lay.image_vocab)
        if not self.tied:
            self.image_head = self.table("image_head_kernel", lay.image_vocab, scale=self.head_scale)
        if self.trunk.positions == "learned":
            self.text_positions = self.table("text_positions", lay.text_length, "positions")
            self.rows = self.table("rows", lay.height, "positions")
            self.columns = self.table("columns", lay.width, "positions")
        self.drop = nn.Dropout(self.trunk.dropout)

    def table(self, name: str, rows: int, axis: str = "vocab", scale: float | None = None) -> jax.Array:
        """A parameter, float32 [rows, D]."""
        init = nn.initializers.normal(self.scale if scale is None else scale)
        return self.param(name, nn.with_logical_partitioning(init, (axis, "embed")), (rows, self.trunk.width))

    def cast(self, x: jax.Array, train: bool) -> jax.Array:
        return self.drop(x, deterministic=not train).astype(self.trunk.dtype)

    def text(self, text: jax.Array, train: bool = False) -> jax.Array:
        """int32 [B, T] to [B, T, D]."""
        x = self.text_table[text]
        if self.trunk.positions == "learned":
            x = x + self.text_positions[None]
        return self.cast(x, train)

    def image_tokens(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, N] to float32 [B, N, D], without positions."""
        return self.image_table[tokens]

    def image(self, tokens: jax.Array, train: bool = False, cells: jax.Array | None = None) -> jax.Array:
        """int32 [B, N] to [B, N, D]; `cells`, int32 [B, N], says which stands where (None: raster order)."""
        x = self.image_tokens(tokens)
        if self.trunk.positions == "learned" and cells is None:
            x = x + (self.rows[:, None] + self.columns[None]).reshape(1, self.layout.image_length, -1)
        elif self.trunk.positions == "learned":
            x = x + self.rows[cells // self.layout.width] + self.columns[cells % self.layout.width]
        return self.cast(x, train)

    def image_at(self, tokens: jax.Array, cells: jax.Array) -> jax.Array:
        """int32 [B] at one cell each, int32 [B], to [B, D]."""
        return self.image(tokens[:, None], cells=cells[:, None])[:, 0]

    def image_logits(self, x: jax.Array, *, decode_step: bool = False) -> jax.Array:
        """[..., D] to float32 [..., V]; `decode_step` as in `project`."""
        return project(x, self.image_table if self.tied else self.image_head, decode_step=decode_step)


def project(x: jax.Array, table: jax.Array, *, decode_step: bool = False) -> jax.Array:
    """Computes the logits of states: [..., D] and [V, D] to float32 [..., V].

    With `decode_step`, x is [B, D], one position per row; see `rows_product`.
    """
    table = table.astype(x.dtype)
    if decode_step:
        return rows_product(x, table, preferred_element_type=jnp.float32)
    return contract(_logits, x, table, ("vocab", "embed"), (1,))


def _logits(x: jax.Array, table: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def start_from_codebook(params, codebook: jax.Array, key: jax.Array):
    """Initial parameters in which tokens that decode to alike pixels are alike from the start.

    The image embedding and, where it is not tied, the image head become the codebook's vectors, centred, turned by a
    random rotation into the prior's width, and scaled to the entries they replace. Not in the papers, whose priors see
    enough pictures to find out.

    Args:
      params: of a model whose `embedding` is a `StreamEmbedding`, boxed.
      codebook: float [V, C], see `ImageTokenizer.codebook`.

    Returns:
      The parameters with those two replaced.
    """
    tables = dict(params["embedding"])
    inner = codebook.shape[1]
    width = tables["image"].unbox().shape[1]
    vectors = codebook.astype(jnp.float32) - codebook.mean(0, keepdims=True)
    side = max(inner, width)
    vectors = vectors @ jnp.linalg.qr(jax.random.normal(key, (side, side)))[0][:inner, :width]
    vectors = vectors / jnp.maximum(vectors.std(), 1e-6)
    for name in ("image", "image_head_kernel"):
        if name in tables:
            table = tables[name].unbox()
            tables[name] = tables[name].replace_boxed(vectors * table.std())
    return {**params, "embedding": tables}
