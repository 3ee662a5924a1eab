"""The network of the MaskGIT prior and its hyper-parameters (arXiv 2202.04200, section 3); see `maskgit.py`.

B rows    C captions    T text    N image tokens    S = T + N    D width    V image vocabulary
P some image positions
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, Shaped

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention.patterns import Bidirectional, Pattern, full_layers
from dalle_jax.models.dense import Dense
from dalle_jax.models.norm import Norm
from dalle_jax.models.transformer import CaptionCache
from dalle_jax.models.transformer_options import ACTIVATIONS, TransformerOptions
from dalle_jax.models.trunk import Trunk
from dalle_jax.priors import encoder, masking
from dalle_jax.priors.embedding import MaskGITEmbedding
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import LONGEST_STREAM, TokenLayout

HEADS = ("mlm", "linear")
HEAD_ACTIVATIONS = ("gelu", "gelu_tanh")
LOSS_AVERAGES = ("tokens", "images")
_MOST = {
    "steps": LONGEST_STREAM,
    "neighbour_kernel": 255,
    "choice_temperature": 1e6,
    "embedding_scale": 1000,
    "head_scale": 1000,
    "init_scale": 1000,
    "encoder_depth": 1024,
}

# Keys and values of the text in each layer, or its embeddings, [C, T, D], if the text reads the image.
CaptionStates = list[CaptionCache] | Float[Array, "C T D"]


@dataclasses.dataclass(frozen=True)
class MaskGITOptions:
    """Hyper-parameters of the prior.

    Attributes:
      trunk: options of the transformer.
      head: "mlm" (the paper's) or "linear" (only the last product and the bias).
      head_activation: "gelu" (exact) or "gelu_tanh" (its approximation) in the head "mlm".
      text_reads_image: whether text positions attend to the image, as the class of the reference does. Each decoding
        step then runs over the text, too. The updates in raster order stay causal.
      tied_embeddings: whether the head's last product is with the transposed image embedding.
      embedding_scale: standard deviation of the embeddings at initialisation.
      head_scale: standard deviation of untied heads at initialisation.
      init_scale: 0: kernels start by their number of inputs, tables by the two scales above. Above 0: all of them start
        from a normal distribution of this standard deviation, cut at two of it. The reference has 0.02.
      codebook_init: whether image embedding and head start as the tokenizer's codebook; see `start_from_codebook`.
      neighbour_kernel: side of the square of neighbours that are mixed into each token's embedding; 0 for no mixing.
      raster_steps: number of first updates that predict each token from the tokens before it in raster order; 0 for
        none. The updates after them mask random tokens. It needs a `neighbour_kernel` of 3 or more.
      mask_schedule: γ, used in training and decoding; see `masking.masked_share`.
      label_smoothing: share of the target that is spread over the vocabulary.
      loss_average: over what the loss is a mean. "tokens": all masked tokens of the batch (the paper's equation 1).
        "images": the masked tokens of each image, then the images, as in the reference code. Images with few masked
        tokens then weigh as much as the others.
      unmasked_weight: weight of unmasked positions in the loss; masked positions have weight 1.
      caption_drop: share of captions that training replaces by the empty caption, for guidance.
      steps: default number of decoding steps; None for the paper's: 8 for up to 16 x 16 tokens, 12 for more (section
        4.2).
      order: order of unmasking; see `masking.unmasking_order`.
      choice_temperature: τ of the order "confidence".
      encoder_depth: number of layers of an encoder of the condition (`encoder.py`); 0: the condition is the beginning
        of the stream.
      encoder_padding: number of first positions of the condition whose padding is read; None for all.
    """

    trunk: TransformerOptions = TransformerOptions()
    head: str = "mlm"
    head_activation: str = "gelu"
    text_reads_image: bool = False
    tied_embeddings: bool = True
    embedding_scale: float = 0.02
    head_scale: float = 0.02
    init_scale: float = 0.0
    codebook_init: bool = False
    neighbour_kernel: int = 0
    raster_steps: int = 0
    mask_schedule: str = "cosine"
    label_smoothing: float = 0.1
    loss_average: str = "tokens"
    unmasked_weight: float = 0.0
    caption_drop: float = 0.1
    steps: int | None = 8
    order: str = "confidence"
    choice_temperature: float = 4.5
    encoder_depth: int = 0
    encoder_padding: int | None = None

    def __post_init__(self):
        choices = {"order": masking.ORDERS, "head": HEADS, "loss_average": LOSS_AVERAGES}
        choices |= {"head_activation": HEAD_ACTIVATIONS}
        shares = ["label_smoothing", "unmasked_weight", "caption_drop"]
        kernel = ["neighbour_kernel"]
        at_least_0 = [*kernel, "raster_steps", "choice_temperature", "embedding_scale", "head_scale", "init_scale"]
        at_least_0 += ["encoder_depth", "encoder_padding"]
        check(
            self, "model", positive=["steps"], at_least_0=at_least_0, odd=kernel, share=shares,
            most=_MOST, choices=choices,
        )  # fmt: skip
        self.trunk.check_decoding()
        encoder.check(self)
        if self.encoder_depth and self.text_reads_image:
            raise ConfigError(
                f"config.model.encoder_depth is {self.encoder_depth} with text_reads_image=true; an encoder reads the "
                "condition alone. Set --config.model.text_reads_image=false, or encoder_depth=0."
            )
        masking.check_schedule(self.mask_schedule)
        if self.raster_steps and self.neighbour_kernel < 3:
            raise ConfigError(
                f"config.model.raster_steps is {self.raster_steps} with neighbour_kernel={self.neighbour_kernel}; in "
                "raster order a position sees the tokens before it through its neighbours. Set "
                "--config.model.neighbour_kernel=3 or --config.model.raster_steps=0."
            )

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The attention pattern of each layer."""
        return (Bidirectional(self.text_reads_image),) * self.trunk.depth


class MaskGITModel(nn.Module):
    """Embeddings, trunk and the masked-token head.

    Attributes:
      options: options of the prior.
      layout: layout of the token stream.
      raster: whether each position sees the caption and the tokens before it in raster order, and neither itself nor
        later tokens. The parameters are the same.
    """

    options: MaskGITOptions
    layout: TokenLayout
    raster: bool = False

    def setup(self):
        o, trunk = self.options, self.options.trunk
        self.embedding = MaskGITEmbedding(
            trunk, self.layout, o.embedding_scale, o.head_scale, o.tied_embeddings, False, o.encoder_depth > 0,
            o.neighbour_kernel, self.raster,
        )  # fmt: skip
        self.stream = encoder.stream(o, self.layout)
        self.encoder = encoder.make(o, self.layout)
        patterns = full_layers(trunk.depth) if self.raster else o.patterns
        self.trunk = Trunk(trunk, self.stream, patterns, self.encoder is not None)
        if o.head == "mlm":
            self.head = Dense((trunk.width,), (trunk.width,), ("embed", None), trunk.dtype, (None,))
            self.head_norm = Norm(trunk.norm, trunk.states_dtype, trunk.norm_epsilon)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        self.image_bias = self.param("image_bias", zeros, (self.layout.image_vocab,))

    def logits(self, x: Float[ArrayLike, "B P D"]) -> Float[Array, "B P V"]:
        """Computes logits, float32 [B, P, V], from states of some image positions, [B, P, D]."""
        if self.options.head == "mlm":
            activation, _ = ACTIVATIONS[self.options.head_activation]
            x = self.head_norm(activation(self.head(x)))
        return self.embedding.image_logits(x) + self.image_bias[None, None]

    def __call__(
        self, text: Shaped[ArrayLike, "B ..."], ids: Int[ArrayLike, "B N"], train: bool = False
    ) -> Float[Array, "B N V"]:
        """Computes the image logits of a stream.

        Args:
          text: conditions, such as padded captions, int32 [B, T].
          ids: image tokens in raster order, `layout.mask_id` where masked, int32 [B, N].
          train: whether dropout applies.

        Returns:
          float32 [B, N, V].
        """
        prefix, memory = encoder.read(self.options, self.embedding, self.encoder, text, train)
        x = jnp.concatenate([prefix, self.embedding.image(ids, train)], axis=1)
        x = self.trunk(constrain(x, "batch", "length", "embed_act"), train, memory)
        return self.logits(x[:, self.stream.prefix_length :])

    def prefill(self, text: Shaped[ArrayLike, "C ..."]) -> CaptionStates:
        """Computes what of the conditions, such as captions, int32 [C, T], stays the same in all decoding steps."""
        x, memory = encoder.read(self.options, self.embedding, self.encoder, text)
        return x if self.options.text_reads_image else self.trunk.prefill(x, memory)[1]

    def states(self, ids: Int[ArrayLike, "B N"], text: CaptionStates) -> Float[Array, "B N D"]:
        """Computes the states that `logits` reads, given the captions of `prefill`: int32 [C·n, N] to [C·n, N, D]."""
        image = self.embedding.image(ids)
        if not self.options.text_reads_image:
            return self.trunk.refine(image, text)
        text = jnp.repeat(text, len(ids) // len(text), axis=0)
        return self.trunk(jnp.concatenate([text, image], axis=1), False)[:, text.shape[1] :]

    def refine(self, ids: Int[ArrayLike, "B N"], text: CaptionStates) -> Float[Array, "B N V"]:
        """Computes image logits given the captions of `prefill`: ids, int32 [C·n, N], to float32 [C·n, N, V]."""
        return self.logits(self.states(ids, text))


def truncated_start(params: PyTree, key: Key[Array, ""], scale: float) -> PyTree:
    """Draws new initial kernels and tables from a normal distribution that is cut at two standard deviations.

    Gains and biases stay as they are. The cut reduces the standard deviation of the values to 0.88 of `scale`, which
    the reference does not correct.

    Args:
      params: boxed parameters of the prior.
      key: scalar key.
      scale: standard deviation before the cut.

    Returns:
      Boxed parameters of the same structure.
    """
    leaves = jax.tree.leaves_with_path(nn.meta.unbox(params))

    def draw(number: int, path: tuple, leaf: Array) -> Array:
        if path[-1].key.endswith(("scale", "bias")):
            return leaf
        return scale * jax.random.truncated_normal(jax.random.fold_in(key, number), -2, 2, leaf.shape, leaf.dtype)

    drawn = [draw(number, path, leaf) for number, (path, leaf) in enumerate(leaves)]
    return nn.meta.replace_boxed(params, jax.tree.unflatten(jax.tree.structure(nn.meta.unbox(params)), drawn))
