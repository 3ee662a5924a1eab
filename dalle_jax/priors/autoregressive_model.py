"""The model of the autoregressive prior: embeddings, trunk and heads (DALL-E, section 2.2).

B rows    C captions    T text    N image tokens    D width    V image vocabulary    W text classes
S = T + N stream, or 1 + T + 1 + N with start tokens    P predicted text tokens: T - 1, or T with a start-of-text token
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention.patterns import CausalPattern, full_layers, sparse_layers
from dalle_jax.models.cross_attention import Memory
from dalle_jax.models.self_attention import ImageCache
from dalle_jax.models.transformer import CaptionCache
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import Trunk
from dalle_jax.priors import encoder, orders
from dalle_jax.priors.embedding import AutoregressiveEmbedding
from dalle_jax.token_layout import TokenLayout

ATTENTION = ("sparse", "full")
ORDERS = ("raster", "random", "diagonal")


@dataclasses.dataclass(frozen=True)
class AutoregressiveOptions:
    """Hyper-parameters of the prior.

    Attributes:
      trunk: options of the transformer.
      attention: "sparse" (the paper's row, column, row, row, …, convolutional) or "full" (dense causal).
      kernel: side of the convolutional layer's window.
      wrap: whether the convolutional window continues across row ends.
      torus: whether it continues on the opposite side of the grid instead (ru-DALL-E v2).
      shifted: whether the stream is start-of-text, T text tokens and the first N - 1 image tokens (ru-DALL-E v2). Each
        position then has the attention pattern of the token that it predicts. The last text token has that of the first
        image token, and so not every image token sees it.
      start_tokens: whether a start-of-text token precedes the text and a start-of-image token the image (section 2.2,
        figure 10). Then all text tokens are predicted. Otherwise the first text token is given.
      tied_embeddings: whether the heads are the transposed embeddings.
      head_bias: whether the heads have a bias for each class.
      padding_classes: whether each padding id is a class of the text head (ru-DALL-E). Otherwise all share one.
      embedding_scale: standard deviation of the embeddings at initialisation.
      head_scale: standard deviation of untied heads at initialisation.
      codebook_init: whether image embedding and head start as the tokenizer's codebook; see `start_from_codebook`.
      text_weight: weight of the text in the loss, 1/8 in the paper.
      caption_drop: share of captions that training replaces by the empty caption, for guidance.
      order: "raster", "random" or "diagonal". The last two need "full" attention and learned positions. Diagonal order
        visits anti-diagonals, as neighbouring autoregressive models do (NAR, arXiv 2503.10696). The cells of each one
        are in random order, so that they can be drawn together. Left and upper neighbours are known as in raster order,
        so it is learned as fast. A model of this order cannot edit images.
      raster_steps: number of first updates in raster order although `order` is "random"; 0 for none. A fixed order is
        learned in far fewer updates, and the random orders then start from it.
      anneal_start: update at which the share of random orders begins to fall from 1.
      anneal_end: update at which the share reaches 0; 0 keeps it at 1.
      neighbour_kernel: side of the square around the cell that is predicted next. Its known tokens are added to the
        position that predicts, so that the model need not learn which cells are near; 0 for none. It needs the order
        "random" or "diagonal".
      encoder_depth: number of layers of an encoder of the condition (`encoder.py`); 0: the condition is the beginning
        of the stream, and captions are predicted as well.
      encoder_padding: number of first positions of the condition whose padding is read; None for all.
    """

    trunk: TransformerOptions = TransformerOptions()
    attention: str = "sparse"
    kernel: int = 11
    wrap: bool = True
    torus: bool = False
    shifted: bool = False
    start_tokens: bool = False
    tied_embeddings: bool = False
    head_bias: bool = False
    padding_classes: bool = False
    embedding_scale: float = 0.02
    head_scale: float = 0.02
    codebook_init: bool = False
    text_weight: float = 1 / 8
    caption_drop: float = 0.1
    order: str = "raster"
    raster_steps: int = 0
    anneal_start: int = 0
    anneal_end: int = 0
    neighbour_kernel: int = 0
    encoder_depth: int = 0
    encoder_padding: int | None = None

    def __post_init__(self):
        choices = {"attention": ATTENTION, "order": ORDERS}
        shares = ["text_weight", "caption_drop"]
        check(
            self, "model", positive=["kernel"], odd=["kernel", "neighbour_kernel"], share=shares,
            choices=choices,
            at_least_0=[
                "embedding_scale", "head_scale", "raster_steps", "anneal_start", "anneal_end", "neighbour_kernel",
                "encoder_depth", "encoder_padding",
            ],
            most={
                "kernel": 255, "embedding_scale": 1000, "head_scale": 1000, "neighbour_kernel": 15,
                "encoder_depth": 1024,
            },
        )  # fmt: skip
        self.trunk.check_decoding()
        encoder.check(self)
        if self.encoder_depth and (self.start_tokens or self.shifted):
            raise ConfigError(
                f"config.model.encoder_depth is {self.encoder_depth} with start_tokens={self.start_tokens} and "
                f"shifted={self.shifted}; a stream with an encoder has its own start-of-image token. Set "
                "--config.model.start_tokens=false and --config.model.shifted=false, or encoder_depth=0."
            )
        if self.knows_next and (self.attention != "full" or self.trunk.positions == "rotary"):
            raise ConfigError(
                f"config.model.order is {self.order!r} with attention={self.attention!r} and trunk.positions="
                f"{self.trunk.positions!r}; other orders than raster need --config.model.attention=full and "
                "--config.model.trunk.positions=learned."
            )
        if self.shifted and (self.knows_next or self.start_tokens):
            raise ConfigError(
                f"config.model.shifted is true with order={self.order!r} and start_tokens={self.start_tokens}; a "
                "shifted stream is in raster order and has its own start-of-text token. Set "
                "--config.model.shifted=false, or order=raster and start_tokens=false."
            )
        if self.torus and (self.wrap or self.attention == "full"):
            raise ConfigError(
                f"config.model.torus is true with wrap={self.wrap} and attention={self.attention!r}. Set "
                "--config.model.wrap=false and --config.model.attention=sparse, or torus=false."
            )
        if self.raster_steps and self.order != "random":
            raise ConfigError(
                f"config.model.raster_steps is {self.raster_steps} with order={self.order!r}, which all updates have. "
                "Set --config.model.order=random, or raster_steps=0."
            )
        if self.neighbour_kernel and self.order == "raster":
            raise ConfigError(
                f"config.model.neighbour_kernel is {self.neighbour_kernel} with order='raster', in which no position "
                "knows its next cell. Set --config.model.order=diagonal, or --config.model.neighbour_kernel=0."
            )
        if self.anneal_end and self.raster_steps >= self.anneal_end:
            raise ConfigError(
                f"config.model.raster_steps is {self.raster_steps} and anneal_end {self.anneal_end}: no update would "
                "have random orders. Set --config.model.raster_steps=0, for example."
            )
        if self.anneal_start > self.anneal_end:
            raise ConfigError(
                f"config.model.anneal_start is {self.anneal_start} and anneal_end {self.anneal_end}; "
                "expected 0 ≤ start ≤ end."
            )

    @property
    def knows_next(self) -> bool:
        """Whether each position knows which cell it predicts next."""
        return self.order != "raster"

    @property
    def patterns(self) -> tuple[CausalPattern, ...]:
        """The attention pattern of each layer."""
        depth = self.trunk.depth
        if self.attention == "full":
            return full_layers(depth)
        return sparse_layers(depth, self.kernel, self.wrap, self.torus)

    def stream(self, layout: TokenLayout) -> TokenLayout:
        """Returns the layout of the positions that the trunk runs over, given the layout of the tokens."""
        return layout.with_start_tokens() if self.start_tokens else encoder.stream(self, layout)

    def predicted_text(self, layout: TokenLayout) -> int:
        """Returns P, the number of positions of the condition that are predicted: the last ones."""
        if not self.text_classes(layout):
            return 0
        return layout.condition.length - (not (self.start_tokens or self.shifted))

    def text_classes(self, layout: TokenLayout) -> int:
        """Returns W, the number of classes of the text head; 0 for a condition that is not predicted."""
        if self.encoder_depth:
            return 0
        return layout.condition.classes(with_padding=self.padding_classes)

    def text_targets(self, layout: TokenLayout, text: Int[ArrayLike, "B _"]) -> Int[ArrayLike, "B _"]:
        """Converts text ids to classes of the text head, int32 [B, _] in [0, W)."""
        return layout.condition.targets(text, with_padding=self.padding_classes)


class AutoregressiveModel(nn.Module):
    """Embeddings, trunk and heads.

    Attributes:
      options: options of the prior.
      layout: layout of the token stream.
    """

    options: AutoregressiveOptions
    layout: TokenLayout

    def setup(self):
        o, lay = self.options, self.layout
        self.embedding = AutoregressiveEmbedding(
            o.trunk, lay, o.embedding_scale, o.head_scale, o.tied_embeddings, o.head_bias, o.encoder_depth > 0,
            o.text_classes(lay), o.knows_next, o.start_tokens or o.shifted, o.start_tokens, o.neighbour_kernel,
        )  # fmt: skip
        self.stream = o.stream(lay)
        self.encoder = encoder.make(o, lay)
        self.trunk = Trunk(o.trunk, self.stream, o.patterns, self.encoder is not None)

    def read(
        self, text: Shaped[ArrayLike, "B ..."], train: bool = False
    ) -> tuple[Float[ArrayLike, "B _ D"], Memory | None]:
        """Reads conditions; see `encoder.read`."""
        return encoder.read(self.options, self.embedding, self.encoder, text, train)

    def embed(
        self,
        text: Shaped[ArrayLike, "B ..."],
        tokens: Int[ArrayLike, "B N"],
        train: bool = False,
        cells: Int[ArrayLike, "B N"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Embeds the stream.

        Args:
          text: conditions, such as padded captions, int32 [B, T].
          tokens: image tokens in the order of `cells`, int32 [B, N].
          train: whether dropout applies.
          cells: order of the image tokens, int32 [B, N]; None for raster order.

        Returns:
          [B, S, D] in the dtype of the residual stream.
        """
        return self._embed(self.read(text, train)[0], tokens, train, cells)

    def _embed(self, prefix, tokens, train, cells):
        """Implements `embed`, given the embeddings of the positions before the image."""
        x = [prefix, self.embedding.image(tokens, train, cells)]
        x = jnp.concatenate(x, axis=1)[:, : self.stream.length]  # a shifted stream lacks the last image token
        if cells is not None:
            places, seen = jnp.argsort(cells, axis=1), jnp.arange(self.layout.image_length)[None]
            around = orders.neighbours(tokens, places, cells, seen, self.options.neighbour_kernel, self.layout)
            ahead = self.embedding.next_cell(cells, around)
            x = x + jnp.pad(ahead, ((0, 0), (self.stream.prefix_length - 1, 1), (0, 0)))
        return constrain(x, "batch", "length", "embed_act")

    def logits(
        self, x: Float[ArrayLike, "B S D"], train: bool = False, memory: Memory | None = None
    ) -> tuple[Float[Array, "B P W"] | None, Float[Array, "B N V"]]:
        """Computes text logits, float32 [B, P, W], and image logits, float32 [B, N, V], from embeddings.

        Each position predicts the next token. With start tokens, the last text position predicts nothing. The text
        logits of a condition that is not predicted are None. `memory` are the states of the encoder, if there is one.
        """
        x = self.trunk(x, train, memory)
        text = x[:, : self.options.predicted_text(self.layout)]
        t = self.stream.prefix_length
        image = x[:, t:] if self.options.shifted else x[:, t - 1 : -1]
        predicted = self.options.text_classes(self.layout)
        return self.embedding.text_logits(text) if predicted else None, self.embedding.image_logits(image)

    def __call__(
        self,
        text: Shaped[ArrayLike, "B ..."],
        tokens: Int[ArrayLike, "B N"],
        train: bool = False,
        cells: Int[ArrayLike, "B N"] | None = None,
    ) -> tuple[Float[Array, "B P W"] | None, Float[Array, "B N V"]]:
        """Computes the text and image logits of a stream. Arguments as in `embed`, results as in `logits`."""
        prefix, memory = self.read(text, train)
        return self.logits(self._embed(prefix, tokens, train, cells), train, memory)

    def prefill(
        self, text: Shaped[ArrayLike, "C ..."], first: Int[ArrayLike, " C"] | None = None
    ) -> tuple[Float[Array, "C V"], list[CaptionCache]]:
        """Runs the model over captions.

        Args:
          text: conditions, such as padded captions, int32 [C, T].
          first: the first cell of each row, int32 [C]; None in raster order.

        Returns:
          Logits of the first image token, float32 [C, V], and the keys and values of the text in each layer.
        """
        x, memory = self.read(text)
        if first is not None:
            x = x.at[:, -1].add(self.embedding.next_cell(first))
        x, cache = self.trunk.prefill(x, memory)
        return self.embedding.image_logits(x[:, -1], decode_step=True), cache

    def init_cache(self, rows: int) -> list[ImageCache]:
        """See `Trunk.init_cache`."""
        return self.trunk.init_cache(rows)

    def start(
        self, text: Shaped[ArrayLike, "C ..."], rows: int, first: Int[ArrayLike, " C"] | None = None
    ) -> tuple[Float[Array, "B V"], list[CaptionCache], list[ImageCache]]:
        """Runs the model over captions, up to the first image token.

        Args:
          text: conditions, such as padded captions, int32 [C, T].
          rows: B, a multiple of C.
          first: see `prefill`.

        Returns:
          Logits of the first image token, float32 [B, V], the keys and values of the text, and the caches for `step`.
        """
        candidates = rows // len(text)
        if not self.options.shifted:
            logits, kv = self.prefill(text, first)
            return jnp.repeat(logits, candidates, axis=0), kv, self.init_cache(rows)
        x = self.embedding.text(text)
        _, kv = self.trunk.prefill(x[:, :-1])
        x, caches = self.trunk.step(jnp.repeat(x[:, -1], candidates, axis=0), kv, self.init_cache(rows), jnp.int32(0))
        return self.embedding.image_logits(x, decode_step=True), kv, caches

    def step(
        self,
        tokens: Int[ArrayLike, " B"],
        index: Int[ArrayLike, ""],
        cells: Int[ArrayLike, " B"],
        following: Int[ArrayLike, " B"],
        text: list[CaptionCache],
        caches: list[ImageCache],
        around: Int[ArrayLike, "B _"] | None = None,
    ) -> tuple[Float[Array, "B V"], list[ImageCache]]:
        """Runs the model over one image token per row.

        Args:
          tokens: the tokens, int32 [B].
          index: place of the tokens in their order, int32 scalar.
          cells: cells of the tokens, int32 [B].
          following: cells of the next tokens, int32 [B].
          text: keys and values of the text, from `start`.
          caches: keys and values of the image tokens before these.
          around: known tokens around the cells `following`, int32 [B, _], from `orders.neighbours`.

        Returns:
          Logits of the next tokens, float32 [B, V], and the caches with these tokens.
        """
        x = self.embedding.image_at(tokens, cells)
        if self.options.knows_next:
            x = x + self.embedding.next_cell(following, around)
        x, caches = self.trunk.step(x, text, caches, index + self.options.shifted)
        return self.embedding.image_logits(x, decode_step=True), caches

    def begin(self, text: Int[ArrayLike, "C _"]) -> tuple[Float[Array, "C D"], list[CaptionCache]]:
        """Runs the model over all positions before the image but the last one, which is place 0 of `extend`.

        Args:
          text: conditions, such as padded captions, int32 [C, T].

        Returns:
          The embedding of the last of these positions without its next cell, [C, D], and the keys and values of the
          others.
        """
        x, memory = self.read(text)
        _, cache = self.trunk.prefill(x, memory)  # the text is causal: no other position depends on the last one
        without_last = lambda each: tuple(y[:, :, :-1] for y in each)
        return x[:, -1], [each._replace(prefix=without_last(each.prefix)) for each in cache]

    def init_slots(self, rows: int, slots: int) -> list[ImageCache]:
        """See `Trunk.init_slots`."""
        return self.trunk.init_slots(rows, slots)

    def extend(
        self,
        places: Int[ArrayLike, "B P"],
        tokens: Int[ArrayLike, "B P"],
        cells: Int[ArrayLike, "B P"],
        following: Int[ArrayLike, "B P"],
        last: Float[ArrayLike, "B D"],
        text: list[CaptionCache],
        caches: list[ImageCache],
        start: Int[ArrayLike, " B"],
        visible: Bool[ArrayLike, "B P L"],
        around: Int[ArrayLike, "B P _"] | None,
        stored: int,
    ) -> tuple[Float[Array, "B _ V"], list[ImageCache]]:
        """Runs over several places of each row's order, of a prior whose positions know the next cell.

        Place 0 is the last text position. Place p is the p-th image token of the order, counted from 1.

        Args:
          places: the places, int32 [B, P].
          tokens: the image tokens there, int32 [B, P]; arbitrary at place 0.
          cells: the cells of these tokens, int32 [B, P].
          following: the cells that the places predict, int32 [B, P].
          last: embedding of the last text position, [B, D], from `begin`.
          text: keys and values of the text, from `begin`.
          caches, start, visible, stored: see `Attention.extend`.
          around: known tokens around the cells `following`, int32 [B, P, _], from `orders.neighbours`.

        Returns:
          Logits of the tokens at `following`, float32 [B, P - stored + 1, V], for the last stored place and those that
          are not stored. The caches with the stored places.
        """
        x = jnp.where((places == 0)[..., None], last[:, None], self.embedding.image(tokens, cells=cells))
        x = x + self.embedding.next_cell(following, around)
        x, caches = self.trunk.extend(x, text, caches, start, visible, stored)
        x = x[:, stored - 1 :]
        logits = self.embedding.image_logits(x.reshape(-1, x.shape[-1]), decode_step=True)
        return logits.reshape(*x.shape[:2], -1), caches
