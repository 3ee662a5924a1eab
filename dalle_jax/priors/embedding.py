"""Embeddings of the stream "text, then image grid", and the heads, which are tables of the same width.

A text position is embedded as token + position, an image position as token + row + column (DALL-E, section 2.2) or as
token + cell. The autoregressive prior may have start-of-text and start-of-image tokens, each with its own embedding
(figure 10).

    B rows    T text    N image tokens    P positions    D width    V image vocabulary    W text classes
    E codebook width
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, Shaped

from dalle_jax.distributed.per_device import contract
from dalle_jax.models.dense import rows_product
from dalle_jax.models.norm import Norm
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout


class StreamEmbedding(nn.Module):
    """Embeds the tokens and positions of text and image.

    Attributes:
      trunk: options of the transformer that reads the embeddings.
      layout: layout of the token stream.
      scale: standard deviation of the embeddings at initialisation.
      head_scale: standard deviation of untied heads at initialisation.
      tied: whether the image head is the transposed image embedding.
      head_bias: whether logits have a bias for each class.
      encoded: whether an encoder reads the condition. The stream then begins with a start-of-image vector, and
        `embedding_norm` has other parameters for the condition than for the stream.
    """

    trunk: TransformerOptions
    layout: TokenLayout
    scale: float
    head_scale: float
    tied: bool
    head_bias: bool
    encoded: bool

    def setup(self):
        lay = self.layout
        self.condition = lay.condition.tables(self.table)
        self.image_table = self.table("image", lay.image_vocab)
        if not self.tied:
            self.image_head = self.table("image_head_kernel", lay.image_vocab, scale=self.head_scale)
        if self.head_bias:
            self.image_bias = self.bias("image_head_bias", lay.image_vocab)
        positions = self.trunk.positions
        if positions != "rotary":
            grid = self._condition_grid()
            own = lay.condition.length - (grid[0] * grid[1] if grid else 0)
            self.text_positions = self.table("text_positions", own, "positions")
        if positions == "learned":
            self.rows = self.table("rows", lay.height, "positions")
            self.columns = self.table("columns", lay.width, "positions")
        if positions == "table":
            self.cells = self.table("cells", lay.image_length, "positions")
        if self.trunk.embedding_norm:
            self.norm = Norm(self.trunk.norm, "float32", self.trunk.norm_epsilon)
            if self.encoded:
                self.text_norm = Norm(self.trunk.norm, "float32", self.trunk.norm_epsilon)
        if self.encoded:
            self.before_image = self.table("start_of_image", 1, "positions")
        self.drop = nn.Dropout(self.trunk.dropout)

    def table(
        self, name: str, rows: int, axis: str = "vocab", scale: float | None = None
    ) -> Float[ArrayLike, "rows D"]:
        """Creates a parameter, float32 [rows, D]."""
        init = nn.initializers.normal(self.scale if scale is None else scale)
        return self.param(name, nn.with_logical_partitioning(init, (axis, "embed")), (rows, self.trunk.width))

    def bias(self, name: str, classes: int) -> Float[ArrayLike, " classes"]:
        """Creates the bias of a head, float32 [classes]."""
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        return self.param(name, zeros, (classes,))

    def cast(self, x: Float[ArrayLike, "B S D"], train: bool, of_text: bool = False) -> Float[ArrayLike, "B S D"]:
        """Applies norm and dropout, and casts embeddings to the dtype of the residual stream."""
        if self.trunk.embedding_norm:
            x = self.text_norm(x) if of_text and self.encoded else self.norm(x)
        return self.drop(x, deterministic=not train).astype(self.trunk.stream_dtype)

    def text(self, text: Shaped[ArrayLike, "B ..."], train: bool = False) -> Float[ArrayLike, "B T D"]:
        """Embeds conditions, such as captions, int32 [B, T], to [B, T, D]."""
        x = self.layout.condition.embed(self.condition, text)
        if self.trunk.positions != "rotary":
            x = x + self._positions_of_condition()[None]
        return self.cast(x, train, of_text=True)

    def _condition_grid(self) -> tuple[int, int] | None:
        """Returns the grid of the condition's last positions, if the image's tables have positions for it."""
        return self.layout.condition.grid if self.trunk.positions == "learned" else None

    def _positions_of_condition(self) -> Float[ArrayLike, "T D"]:
        """Returns the position embeddings of the condition.

        A cell of a smaller image has the position of the cells that it covers, so that the image tokens find the tokens
        at their place from the start.
        """
        grid = self._condition_grid()
        if grid is None:
            return self.text_positions
        smaller = lambda table, count: jax.image.resize(table, (count, table.shape[1]), "linear")
        rows, columns = smaller(self.rows, grid[0]), smaller(self.columns, grid[1])
        return jnp.concatenate([self.text_positions, (rows[:, None] + columns[None]).reshape(-1, rows.shape[-1])])

    def start(self, table: Float[ArrayLike, "1 D"], rows: int, train: bool = False) -> Float[ArrayLike, "B 1 D"]:
        """Embeds a start token of some rows, given its table."""
        return self.cast(jnp.broadcast_to(table[None], (rows, 1, table.shape[1])), train)

    def start_of_image(self, rows: int, train: bool = False) -> Float[ArrayLike, "B 1 D"]:
        """Embeds the start-of-image token of some rows."""
        return self.start(self.before_image, rows, train)

    def image_tokens(self, tokens: Int[ArrayLike, "B N"]) -> Float[ArrayLike, "B N D"]:
        """Embeds image tokens without positions: int32 [B, N] to float32 [B, N, D]."""
        return self.image_table[tokens]

    def image(
        self, tokens: Int[ArrayLike, "B N"], train: bool = False, cells: Int[ArrayLike, "B N"] | None = None
    ) -> Float[ArrayLike, "B N D"]:
        """Embeds image tokens with their positions.

        Args:
          tokens: int32 [B, N].
          train: whether dropout applies.
          cells: the grid cell of each token, int32 [B, N]; None for raster order.

        Returns:
          [B, N, D] in the dtype of the residual stream.
        """
        x, positions = self.image_tokens(tokens), self.trunk.positions
        if positions == "learned" and cells is None:
            x = x + (self.rows[:, None] + self.columns[None]).reshape(1, self.layout.image_length, -1)
        elif positions == "learned":
            x = x + self.rows[cells // self.layout.width] + self.columns[cells % self.layout.width]
        elif positions == "table":
            x = x + (self.cells[None] if cells is None else self.cells[cells])
        return self.cast(x, train)

    def image_at(self, tokens: Int[ArrayLike, " B"], cells: Int[ArrayLike, " B"]) -> Float[ArrayLike, "B D"]:
        """Embeds one token per row at its grid cell: int32 [B] and [B] to [B, D]."""
        return self.image(tokens[:, None], cells=cells[:, None])[:, 0]

    def image_logits(self, x: Float[ArrayLike, "*axes D"], *, decode_step: bool = False) -> Float[Array, "*axes V"]:
        """Computes image logits, float32 [..., V], from states [..., D]; see `project`."""
        logits = self.project(x, self.image_table if self.tied else self.image_head, decode_step=decode_step)
        return _with_bias(logits, self.image_bias) if self.head_bias else logits

    def project(
        self, x: Float[ArrayLike, "*axes D"], table: Float[ArrayLike, "V D"], *, decode_step: bool = False
    ) -> Float[Array, "*axes V"]:
        """See `project`, with the precision of the trunk's options."""
        return project(x, table, decode_step=decode_step, exact=self.trunk.float32_logits)


class AutoregressiveEmbedding(StreamEmbedding):
    """Adds the text head, the start tokens, and the embedding of the cell that is predicted next.

    Attributes:
      text_classes: W, number of classes of the text head: the text vocabulary and one class for all padding, or one
        for each padding id. 0: the condition is not predicted.
      any_order: whether positions know which cell they predict.
      start_of_text: whether a start-of-text token precedes the text.
      start_tokens: whether a start-of-image token follows the text.
      neighbour_kernel: side of the square around the next cell, whose known tokens are added to a position; 0 for
        none.
    """

    text_classes: int
    any_order: bool
    start_of_text: bool
    start_tokens: bool
    neighbour_kernel: int

    def setup(self):
        super().setup()
        if self.text_classes and not self.tied:
            self.text_head = self.table("text_head_kernel", self.text_classes, scale=self.head_scale)
        if self.text_classes and self.head_bias:
            self.text_bias = self.bias("text_head_bias", self.text_classes)
        if self.any_order:
            self.next_rows = self.table("next_rows", self.layout.height, "positions")
            self.next_columns = self.table("next_columns", self.layout.width, "positions")
        if self.neighbour_kernel:
            # One vector for each neighbour. Their sum has variance 2, as in `MaskGITEmbedding`.
            init = nn.with_logical_partitioning(nn.initializers.normal(1.5 / self.neighbour_kernel), (None, "embed"))
            self.neighbours = self.param("neighbours", init, (self.neighbour_kernel**2 - 1, self.trunk.width))
        if self.start_of_text:
            self.before_text = self.table("start_of_text", 1, "positions")
        if self.start_tokens:
            self.before_image = self.table("start_of_image", 1, "positions")

    def text(self, text: Shaped[ArrayLike, "B ..."], train: bool = False) -> Float[ArrayLike, "B _ D"]:
        """Embeds conditions to [B, T, D], or to [B, T + start tokens, D] with start tokens around them."""
        x = super().text(text, train)
        before = [self.start(self.before_text, len(text), train)] if self.start_of_text else []
        after = [self.start_of_image(len(text), train)] if self.start_tokens else []
        return jnp.concatenate([*before, x, *after], axis=1) if before or after else x

    def next_cell(
        self, cells: Int[ArrayLike, "*axes"], around: Int[ArrayLike, "*axes K"] | None = None
    ) -> Float[ArrayLike, "*axes D"]:
        """Embeds the cells that are predicted next, with the known tokens around them.

        Args:
          cells: int32 [...].
          around: the tokens of `orders.neighbours`, int32 [..., K]; None if no token is known, or without
            `neighbour_kernel`.

        Returns:
          [..., D] in the dtype of the residual stream.
        """
        x = self.next_rows[cells // self.layout.width] + self.next_columns[cells % self.layout.width]
        if around is not None:
            vocab = self.layout.image_vocab
            for i in range(around.shape[-1]):  # not at once: K embeddings of each position would be in memory
                token = around[..., i]
                weight = self.neighbours[i].reshape(*[1] * token.ndim, -1)
                near = self.image_table[jnp.minimum(token, vocab - 1)] * weight
                x = x + jnp.where((token < vocab)[..., None], near, 0)
        return x.astype(self.trunk.stream_dtype)

    def text_logits(self, x: Float[ArrayLike, "B P D"]) -> Float[Array, "B P W"]:
        """Computes text logits, float32 [..., W], from states [..., D]."""
        table = self.condition[0] if self.tied else self.text_head
        if len(table) > self.text_classes:
            # Tied: the class of padding uses the mean padding embedding, so that its loss trains all of them.
            words, padding = jnp.split(table, [self.text_classes - 1])
            table = jnp.concatenate([words, padding.mean(0, keepdims=True)])
        logits = self.project(x, table)
        return _with_bias(logits, self.text_bias) if self.head_bias else logits


class MaskGITEmbedding(StreamEmbedding):
    """Adds the embedding of the mask, and a depthwise convolution over the grid of image embeddings.

    The convolution is added to the embeddings (a positional encoding generator, arXiv 2102.10882).

    Attributes:
      kernel: side of the convolution's window; 0 for no convolution.
      raster: whether each position sees only the tokens before it in raster order. It then looks as if it and all later
        tokens were masked. This needs a convolution, which is the only way in for the tokens.
    """

    kernel: int
    raster: bool = False

    def setup(self):
        super().setup()
        self.mask = self.table("mask", 1, "positions")
        if self.kernel:
            # The sum over the window has variance 2 for any kernel, so neighbours weigh about as much as the token.
            init = nn.with_logical_partitioning(nn.initializers.normal(1.5 / self.kernel), (None, None, "embed"))
            self.neighbours = self.param("neighbours_kernel", init, (self.kernel, self.kernel, self.trunk.width))

    def image_tokens(self, tokens: Int[ArrayLike, "B N"]) -> Float[ArrayLike, "B N D"]:
        """See `StreamEmbedding.image_tokens`. Neighbours outside of the grid are zero."""
        vocab = self.layout.image_vocab
        x = super().image_tokens(jnp.minimum(tokens, vocab - 1))
        x = jnp.where((tokens == vocab)[..., None], self.mask[0][None, None], x)
        if not self.kernel:
            return x
        height, width, half = self.layout.height, self.layout.width, self.kernel // 2
        grid = x.reshape(-1, height, width, x.shape[-1])
        around = ((0, 0), (half, half), (half, half), (0, 0))
        before = after = jnp.pad(grid, around)
        if self.raster:
            grid = jnp.broadcast_to(self.mask[0][None, None, None], grid.shape)
            after = jnp.pad(grid, around)
        # Shifted sums replace a convolution, because XLA's gradient of a depthwise one is slow, most of all on CPUs.
        for row in range(self.kernel):
            for column in range(self.kernel):
                tap = self.neighbours[row, column][None, None, None]
                padded = before if (row, column) < (half, half) else after
                grid = grid + padded[:, row : row + height, column : column + width] * tap
        return grid.reshape(x.shape)


def project(
    x: Float[ArrayLike, "*axes D"],
    table: Float[ArrayLike, "V D"],
    *,
    decode_step: bool = False,
    exact: bool = False,
) -> Float[Array, "*axes V"]:
    """Computes logits from states.

    Args:
      x: states, [..., D]; [B, D] in a decode step.
      table: the head, float32 [V, D].
      decode_step: whether x holds one position per row, which a faster product serves; see `rows_product`.
      exact: multiply float32 numbers. By default TPUs round the factors of a float32 product to bfloat16, and GPUs may
        round them, too. If false, the table is cast to the dtype of x.

    Returns:
      Logits, float32 [..., V].
    """
    table = table.astype(jnp.float32 if exact else x.dtype)
    how = dict(preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST if exact else None)
    if decode_step:
        return rows_product(x.astype(table.dtype), table, **how)
    return contract(functools.partial(_logits, **how), x.astype(table.dtype), table, ("vocab", "embed"), (1,))


def _with_bias(logits: Float[ArrayLike, "*axes V"], bias: Float[ArrayLike, " V"]) -> Float[Array, "*axes V"]:
    return logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)


def _logits(x: ArrayLike, table: ArrayLike, **how) -> Array:
    return jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())), **how)


def start_from_codebook(params: PyTree, codebook: Float[ArrayLike, "V E"], key: Key[Array, ""]) -> PyTree:
    """Initialises the image embedding and head from the tokenizer's codebook.

    Tokens that decode to similar pixels then start with similar embeddings. The vectors are centred, rotated at random
    into the prior's width, and scaled to the standard deviation of the entries that they replace. The papers do not do
    this; their priors see enough images to learn which tokens are similar.

    Args:
      params: boxed parameters of a model whose `embedding` is a `StreamEmbedding`.
      codebook: float [V, E]; see `ImageTokenizer.codebook`.
      key: scalar key of the rotation.

    Returns:
      The parameters with a new image embedding and, if it is untied, a new image head.
    """
    tables = dict(params["embedding"])
    for name in ("image", "image_head_kernel"):
        if name in tables:
            tables[name] = tables[name].replace_boxed(rotated(codebook, tables[name].unbox(), key))
    return {**params, "embedding": tables}


def rotated(
    codebook: Float[ArrayLike, "V E"], table: Float[ArrayLike, "_ D"], key: Key[Array, ""]
) -> Float[Array, "V D"]:
    """Centres a codebook, rotates it at random into D dimensions, and scales it to the standard deviation of a table.

    Args:
      codebook: float [V, E].
      table: the entries to replace, float32 [_, D].
      key: scalar key of the rotation.
    """
    (_, inner), (_, width) = codebook.shape, table.shape
    vectors = codebook.astype(jnp.float32) - codebook.mean(0, keepdims=True)
    side = max(inner, width)
    vectors = vectors @ jnp.linalg.qr(jax.random.normal(key, (side, side)))[0][:inner, :width]
    return vectors / jnp.maximum(vectors.std(), 1e-6) * table.std()
