"""The discrete variational autoencoder (dVAE): pictures to a grid of tokens and back.

DALL-E (arXiv 2102.12092), section 2.1 and appendix A, with the block structure of the published `openai/DALL-E` code:
residual blocks without normalisation, max-pooling down, nearest-neighbour upsampling, and a decoder that mirrors the
encoder. During training the decoder sees a relaxed one-hot code (Gumbel-softmax); tokens are the plain argmax of the
encoder's logits.

One addition, off by default: with `stem_factor` s > 1 the encoder starts from s x s blocks of pixels laid out as
channels, and the decoder ends with the inverse, so that no convolution runs at full resolution. Convolutions of few
channels on many pixels are what a CPU is worst at; the small configs train several times faster with it.

Convolutions of kernel 1 are written as dense layers: the same numbers, and a matrix product is what every backend
does best.

    B batch    H, W picture    C channels    h, w grid, H = downsample * h    V vocabulary    D width of a code's vector
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import logit_laplace
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class DVAEOptions:
    """Sizes of the dVAE; the defaults are the paper's.

    Attributes:
      image_size: side of the pictures it is trained on. The network is convolutional: any multiple of `downsample`
        can be encoded.
      vocab_size: V, number of codes.
      hidden: width of the first group of blocks; group i is 2**i times as wide.
      groups: number of groups of blocks; resolution halves between them.
      blocks_per_group: residual blocks in a group.
      codebook_dim: D, width of the vector that stands for a code at the decoder's input.
      in_kernel: side of the encoder's first convolution.
      stem_factor: s, side of the pixel blocks that become channels before anything else; 1: none (the paper).
      logit_scale: factor on the initial encoder's output layer; 1: the paper.
      codebook_scale: factor on the initial codebook; 1: the paper, which draws it from N(0, 1/√V).
      min_log_scale: floor under ln b; None: none (the paper). Drawings without noise have flat areas, whose
        likelihood grows without bound as b shrinks, until edges, where b is large, weigh nothing in the loss.
      dtype: of the activations inside the blocks; parameters, logits and pixel distributions are float32.
    """

    image_size: int = 256
    vocab_size: int = 8192
    hidden: int = 256
    groups: int = 4
    blocks_per_group: int = 2
    codebook_dim: int = 128
    in_kernel: int = 7
    stem_factor: int = 1
    logit_scale: float = 1.0
    codebook_scale: float = 1.0
    min_log_scale: float | None = None
    dtype: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("dtype", "min_log_scale") and value <= 0:
                raise ConfigError(f"dVAE: {field.name}={value}: expected a positive number.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dVAE: dtype={self.dtype!r}: expected 'float32' or 'bfloat16'.")
        if self.hidden % 4:
            raise ConfigError(f"dVAE: hidden={self.hidden}: expected a multiple of 4 (blocks narrow to a quarter).")
        if self.in_kernel % 2 == 0:
            raise ConfigError(f"dVAE: in_kernel={self.in_kernel}: expected an odd number.")
        self.grid(self.image_size)

    @property
    def downsample(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.stem_factor * 2 ** (self.groups - 1)

    @property
    def layers(self) -> int:
        """Number of residual blocks in the encoder, and in the decoder."""
        return self.groups * self.blocks_per_group

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of tokens of a square picture.

        Raises:
          ConfigError: the picture cannot be divided into whole tokens.
        """
        if image_size % self.downsample:
            raise ConfigError(
                f"A picture of {image_size} pixels cannot be cut into tokens of {self.downsample} x {self.downsample} "
                f"pixels: give an image size that is a multiple of {self.downsample}."
            )
        return image_size // self.downsample, image_size // self.downsample


# -- the relaxation (appendix A.2) --------------------------------------------------------------------------------


def gumbel_softmax(logits: jax.Array, key: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """A relaxed one-hot sample: softmax((logits + Gumbel noise) / τ). Soft, not straight-through.

    Args:
      logits: float32 [..., V].
      key: scalar key.
      temperature: τ; towards 0 the result tends to a one-hot sample of softmax(logits).

    Returns:
      float32 [..., V], non-negative, sums to 1.
    """
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.softmax((logits + noise) / temperature, axis=-1)


def kl_to_uniform(logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) ‖ uniform) in nats, [..., V] to [...]. At temperature 1, whatever the relaxation's."""
    log_q = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.exp(log_q) * log_q, axis=-1) + jnp.log(jnp.float32(logits.shape[-1]))


# -- modules ------------------------------------------------------------------------------------------------------


def space_to_depth(x: jax.Array, factor: int) -> jax.Array:
    """[B, H, W, C] to [B, H/s, W/s, s*s*C]: each s x s block of pixels becomes one position."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor * factor * c)


def depth_to_space(x: jax.Array, factor: int) -> jax.Array:
    """The inverse of `space_to_depth`: [B, h, w, s*s*C] to [B, h*s, w*s, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def max_pool(x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, H/2, W/2, C]."""
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, [B, H, W, C] to [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def convolution(
    features: int, kernel: int, dtype: str, name: str, *, scale: float = 1.0, out_axis: str = "conv_out"
) -> nn.Module:
    """A convolution of odd kernel that keeps the size; weights N(0, scale/√(inputs * kernel²)), bias 0."""
    normal = nn.initializers.variance_scaling(scale**2, "fan_in", "normal")
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (out_axis,))
    if kernel == 1:
        kernel_init = nn.with_logical_partitioning(normal, ("conv_in", out_axis))
        return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)
    kernel_init = nn.with_logical_partitioning(normal, (None, None, "conv_in", out_axis))
    return nn.Conv(features, (kernel, kernel), dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


class Block(nn.Module):
    """Residual block: four convolutions through a quarter of the width, scaled by 1/layers².

    Attributes:
      features: channels of the output.
      kernels: of the four convolutions: 3, 3, 3, 1 in the encoder, the mirror in the decoder.
      options: for the number of layers and the dtype.
    """

    features: int
    kernels: tuple[int, int, int, int]
    options: DVAEOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, H, W, features]."""
        dtype = self.options.dtype
        skip = x if x.shape[-1] == self.features else convolution(self.features, 1, dtype, "skip")(x)
        for i, kernel in enumerate(self.kernels, start=1):
            width = self.features if i == 4 else self.features // 4
            x = convolution(width, kernel, dtype, f"conv_{i}")(nn.relu(x))
        x = skip + x / self.options.layers**2
        return constrain(x, "batch", None, None, None)


class Encoder(nn.Module):
    """Mapped pixels to the logits of each grid position's code."""

    options: DVAEOptions

    def setup(self):
        o = self.options
        self.input = convolution(o.hidden, o.in_kernel, o.dtype, None)
        self.blocks = {
            name: Block(o.hidden * 2**group, (3, 3, 3, 1), o, name=name)
            for group in range(o.groups)
            for name in (f"group_{group + 1}_block_{block + 1}" for block in range(o.blocks_per_group))
        }
        self.output = convolution(o.vocab_size, 1, "float32", None, scale=o.logit_scale, out_axis="codebook")

    def features(self, x: jax.Array) -> jax.Array:
        """What the output layer reads: float32 [B, H, W, 3] to [B, h, w, F]."""
        o = self.options
        x = self.input(space_to_depth(x, o.stem_factor))
        # Without this, XLA's partitioner gives this layer a gradient that is wrong by 2% on a mesh of 2x2x2
        # (tests/distributed/test_factorisations.py).
        x = constrain(x, "batch", None, None, None)
        for group in range(o.groups):
            for block in range(o.blocks_per_group):
                x = self.blocks[f"group_{group + 1}_block_{block + 1}"](x)
            if group < o.groups - 1:
                x = max_pool(x)
        return nn.relu(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3] to float32 [B, h, w, V]."""
        return self.output(self.features(x))


class Codebook(nn.Module):
    """One vector per code: a 1x1 convolution of one-hot codes, which for true tokens is a look-up."""

    options: DVAEOptions

    def setup(self):
        o = self.options
        normal = nn.initializers.normal(o.codebook_scale / o.vocab_size**0.5)
        names = ("codebook", "conv_in")
        self.kernel = self.param("kernel", nn.with_logical_partitioning(normal, names), (o.vocab_size, o.codebook_dim))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_in",))
        self.bias = self.param("bias", zeros, (o.codebook_dim,))

    def __call__(self, codes: jax.Array) -> jax.Array:
        """float32 [B, h, w, V], each position sums to 1, to [B, h, w, D]."""
        return codes @ self.kernel + self.bias[None, None, None]

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, h, w] to [B, h, w, D]."""
        return jnp.take(self.kernel, tokens, axis=0) + self.bias[None, None, None]


class Decoder(nn.Module):
    """Vectors of codes to the parameters of each pixel's distribution."""

    options: DVAEOptions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, D] to float32 [B, H, W, 6]: μ of red, green, blue, then ln b of each."""
        o = self.options
        x = x.astype(o.dtype)
        for group in range(o.groups):
            for block in range(o.blocks_per_group):
                features = o.hidden * 2 ** (o.groups - 1 - group)
                x = Block(features, (1, 3, 3, 3), o, name=f"group_{group + 1}_block_{block + 1}")(x)
            if group < o.groups - 1:
                x = upsample(x)
        x = convolution(6 * o.stem_factor**2, 1, o.dtype, "output")(nn.relu(x))
        return depth_to_space(x.astype(jnp.float32), o.stem_factor)


class DVAE(nn.Module):
    """Encoder, codebook and decoder."""

    options: DVAEOptions

    def setup(self):
        self.encoder, self.codebook, self.decoder = Encoder(self.options), Codebook(self.options), Decoder(self.options)

    def encode_logits(self, images: jax.Array) -> jax.Array:
        """Pictures as `map_pixels` gives them, float32 [B, H, W, 3], to logits, float32 [B, h, w, V]."""
        return self.encoder(images)

    def encode_features(self, images: jax.Array) -> jax.Array:
        """The same up to the output layer's input, [B, h, w, F]."""
        return self.encoder.features(images)

    def decode_maps(self, codes: jax.Array) -> jax.Array:
        """One-hot or relaxed codes, float32 [B, h, w, V], to (μ, ln b), float32 [B, H, W, 6]."""
        return self.decoder(self.codebook(codes))

    def decode_tokens(self, tokens: jax.Array) -> jax.Array:
        """The same from tokens, int32 [B, h, w]."""
        return self.decoder(self.codebook.lookup(tokens))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Mapped pictures through the unsampled code; makes every parameter."""
        return self.decode_maps(jax.nn.softmax(self.encode_logits(images)))


# -- as an image tokenizer ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DVAETokenizer:
    """The dVAE as an `ImageTokenizer`. All methods are pure functions of the parameters.

    Tokenizers with equal options are equal, so that `jax.jit` with a static tokenizer compiles once for all of them.

    Attributes:
      options: sizes.
    """

    options: DVAEOptions
    kind = "dvae"

    @property
    def module(self) -> DVAE:
        """The network."""
        return DVAE(self.options)

    @property
    def vocab_size(self) -> int:
        """V, the number of codes."""
        return self.options.vocab_size

    @property
    def downsample(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.options.downsample

    @property
    def image_size(self) -> int:
        """Side of the images that the tokenizer was trained on."""
        return self.options.image_size

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of tokens of a square picture; ConfigError where they are not whole."""
        return self.options.grid(image_size)

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters, boxed with their logical names."""
        side = self.downsample
        return self.module.init(key, jnp.zeros((1, side, side, 3)))["params"]

    def encode_logits(self, params: PyTree, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] to logits, float32 [B, h, w, V].

        Raises:
          ConfigError: a picture that cannot be cut into whole tokens.
        """
        self.grid(images.shape[1])
        self.grid(images.shape[2])
        images = logit_laplace.map_pixels(images)
        return self.module.apply({"params": params}, images, method="encode_logits")

    def decode_maps(self, params: PyTree, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes to μ and ln b, each float32 [B, H, W, 3].

        Args:
          params: parameters.
          codes: tokens, int32 [B, h, w], or relaxed one-hot codes, float32 [B, h, w, V].
        """
        method = "decode_tokens" if jnp.issubdtype(codes.dtype, jnp.integer) else "decode_maps"
        mean, log_scale = jnp.split(self.module.apply({"params": params}, codes, method=method), 2, axis=-1)
        floor = self.options.min_log_scale
        return mean, log_scale if floor is None else jnp.maximum(log_scale, floor)

    def encode(self, params: PyTree, images: jax.Array) -> jax.Array:
        """Tokens: the most likely code at each position, without noise.

        Args:
          params: parameters.
          images: uint8 [B, H, W, 3].

        Returns:
          int32 [B, h, w].
        """
        return jnp.argmax(self.encode_logits(params, images), axis=-1).astype(jnp.int32)

    def decode(self, params: PyTree, tokens: jax.Array) -> jax.Array:
        """Tokens, int32 [B, h, w], to pictures, float32 [B, H, W, 3] in [0, 1]."""
        mean, _ = self.decode_maps(params, tokens)
        return logit_laplace.to_pixels(mean)

    def codebook(self, params: PyTree) -> jax.Array:
        """What the decoder reads for each token: float32 [V, codebook_dim]."""
        return params["codebook"]["kernel"]
