"""CLIP: embeds images and captions as unit vectors that are close if image and caption belong together.

Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020), sections 2.3 and 2.4. The
architecture is that of OpenAI's ViT models. The image tower is a vision transformer with a class token and norms before
and after its blocks. The text tower is a causal transformer, read at the end token. Both are projected without bias
into one space.

Two options deviate from this for short trainings: `image_positions` (scale of the initial positions) and
`image_readout` (from which states an image's vector is read).

A caption is read at its *first* `end_id`, for our text models and for OpenAI's byte pairs. The text tower is causal, so
the ids after it have no effect.

The factor on the similarities is stored as its logarithm. It is limited to 100 at its use (`CLIP.scale`), not in
storage; see `limited`.

    B batch    H, W image    S sequence    P patches    D width    T text positions    E embedding
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, Num
from ml_collections import ConfigDict

from dalle_jax.configuration.options import check, from_config
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.resampling import space_to_depth
from dalle_jax.models.attention import kernels
from dalle_jax.models.dense import Dense
from dalle_jax.models.norm import Norm
from dalle_jax.models.transformer_options import DTYPES
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import LARGEST_VOCABULARY, LONGEST_STREAM

# Mean and standard deviation of the pixels of OpenAI's training images, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
INITIAL_LOG_SCALE = math.log(1 / 0.07)
MAX_LOG_SCALE = math.log(100)
_MLP_RATIO = 4
READOUTS = ("class_token", "patches")
KERNELS = ("auto", "xla", "cudnn")
_MOST = {  # no device holds more
    **{f"{tower}_{size}": most for tower in ("image", "text") for size, most in (("width", 2**16), ("depth", 1024))},
    "image_mlp": 2**18,
    "image_size": 2**13,
    "image_positions": 1000,
    "embed_dim": 2**16,
    "text_length": LONGEST_STREAM,
    "text_vocab": LARGEST_VOCABULARY,
}
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPOptions:
    """Hyper-parameters of both towers; the defaults are those of ViT-B/32.

    Attributes:
      image_size: H = W of the images that the image tower reads.
      patch: side of a patch in pixels.
      image_width: D of the image tower.
      image_depth: number of blocks of the image tower.
      image_heads: number of attention heads of the image tower.
      image_mlp: width of the hidden layer of an MLP of the image tower; None: four times `image_width`. Published
        models have 4, or about 4.4 (ViT-g), 4.9 (bigG) or 8.6 times (e).
      image_positions: standard deviation of the image tower's initial positions, in units of OpenAI's D**-0.5. Patches
        of flat colour start about ten times as large as OpenAI's positions. The tower then needs hundreds of updates
        before it sees where an object is.
      image_readout: states from which an image's vector is projected. "class_token" is OpenAI's choice. "patches"
        projects all patches together, without a class token, so that places need not pass through one position.
      text_width: D of the text tower.
      text_depth: number of blocks of the text tower.
      text_heads: number of attention heads of the text tower.
      embed_dim: E.
      text_length: T, including the end token.
      text_vocab: number of text ids, including the end token.
      end_id: id of the end token.
      activation: "quick_gelu" (OpenAI's) or "gelu" (exact).
      dtype: dtype of the activations. Parameters, norms, softmax, embeddings and losses are always float32.
      attention_kernel: "xla", "cudnn" (NVIDIA GPUs, bfloat16), or "auto", which chooses by device, dtype and head size.
    """

    image_size: int = 224
    patch: int = 32
    image_width: int = 768
    image_depth: int = 12
    image_heads: int = 12
    image_mlp: int | None = None
    image_positions: float = 1.0
    image_readout: str = "class_token"
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    embed_dim: int = 512
    text_length: int = 77
    text_vocab: int = 49_408
    end_id: int = 49_407
    activation: str = "quick_gelu"
    dtype: str = "float32"
    attention_kernel: str = "auto"

    def __post_init__(self):
        sizes = [f"{tower}_{size}" for tower in ("image", "text") for size in ("width", "heads")]
        choices = {"activation": ACTIVATIONS, "image_readout": READOUTS, "dtype": DTYPES}
        choices |= {"attention_kernel": KERNELS}
        positive = [
            *sizes,
            "image_mlp",
            "patch",
            "embed_dim",
            "image_positions",
            "image_size",
            "text_length",
            "text_vocab",
        ]
        depths = ["image_depth", "text_depth"]
        check(self, "model", positive=positive, at_least_0=depths, most=_MOST, choices=choices)
        if self.image_size % self.patch:
            raise ConfigError(
                f"config.model.patch is {self.patch}; expected a divisor of the image size, {self.image_size}."
            )
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ConfigError(
                    f"config.model.{tower}_width is {width}; expected a multiple of {tower}_heads={heads}."
                )
            kernels.check_cudnn(self.attention_kernel, self.dtype, width // heads, "model")
        if not 0 <= self.end_id < self.text_vocab:
            raise ConfigError(f"The end token {self.end_id} lies outside the vocabulary of {self.text_vocab}.")

    @property
    def patches(self) -> int:
        """P, the number of patches of an image."""
        return (self.image_size // self.patch) ** 2


def options_of_training(config: Mapping[str, Any] | ConfigDict, text_vocab: int) -> CLIPOptions:
    """Reads the options of a CLIP configuration, for a text model without an end token.

    Args:
      config: configuration of a CLIP training, or the content of a workdir's config.json.
      text_vocab: number of ids of the text model; the end token is the first id after them.

    Raises:
      ConfigError: an unknown option, or sizes that do not fit each other.
    """
    sizes = {
        "image_size": config["data"]["image_size"],
        "text_length": config["text"]["length"] + 1,
        "text_vocab": text_vocab + 1,
        "end_id": text_vocab,
    }
    return from_config(CLIPOptions, {**dict(config["model"]), **sizes}, "model")


# -- input of the image tower -------------------------------------------------------------------------------------


def preprocess(images: Num[ArrayLike, "B H W 3"], size: int) -> Float[Array, "B {size} {size} 3"]:
    """Converts images of any size to the input of the image tower.

    The short side is resized to `size` (bicubic, antialiased), and the centre square is cropped. The pixels are
    normalised with OpenAI's mean and standard deviation.

    Args:
      images: uint8, or float in [0, 1], [B, H, W, 3].
      size: side of the result in pixels.

    Returns:
      float32 [B, size, size, 3].
    """
    x = jnp.asarray(images)
    x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
    height, width = x.shape[1:3]
    if (height, width) != (size, size):
        short = min(height, width)
        height, width = size * height // short, size * width // short
        x = jnp.clip(jax.image.resize(x, (x.shape[0], height, width, 3), "cubic", antialias=True), 0, 1)
        top, left = round((height - size) / 2), round((width - size) / 2)
        x = x[:, top : top + size, left : left + size]
    return (x - jnp.float32(MEAN)[None, None, None]) / jnp.float32(STD)[None, None, None]


# -- modules ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block with biases: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      width: D.
      heads: number of attention heads.
      hidden: width of the hidden layer of the MLP.
      depth: number of blocks of the tower, which scales the initial outputs of each block.
      activation: a key of `ACTIVATIONS`.
      causal: whether a position attends only to itself and earlier positions.
      dtype: dtype of the activations.
      attention_kernel: see `CLIPOptions`.
    """

    width: int
    heads: int
    hidden: int
    depth: int
    activation: str
    causal: bool
    dtype: str
    attention_kernel: str

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B S D"]) -> Float[Array, "B S D"]:
        """Maps states, [B, S, D], to [B, S, D]."""
        d, hidden, heads = self.width, self.hidden, (self.heads, self.width // self.heads)
        names = ("heads", "kv")
        norm = lambda name: Norm("layernorm", self.dtype, name=name)
        qkv = Dense((d,), (3, *heads), ("embed", None, *names), self.dtype, (None, *names), name="qkv")
        q, k, v = jnp.moveaxis(qkv(norm("attention_norm")(x)), -3, 0)
        kernel = kernels.chosen(self.attention_kernel, self.dtype, heads[1], "model")
        y = kernels.attend_sequence(kernel, q, k, v, self.causal)
        x = x + Dense(heads, (d,), (*names, "embed"), self.dtype, (None,), 0.5 / self.depth, name="out")(y)
        y = Dense((d,), (hidden,), ("embed", "mlp"), self.dtype, ("mlp",), 0.5, name="up")(norm("mlp_norm")(x))
        y = ACTIVATIONS[self.activation](y)
        x = x + Dense((hidden,), (d,), ("mlp", "embed"), self.dtype, (None,), 2.0 / self.depth, name="down")(y)
        return constrain(x, "batch", "length", "embed_act")


class ImageTower(nn.Module):
    """The vision transformer.

    Attributes:
      options: sizes.
    """

    options: CLIPOptions

    @nn.compact
    def __call__(self, images: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B E"]:
        """Embeds the images of `preprocess`, [B, H, W, 3], as float32 [B, E], not normalised."""
        o = self.options
        b, d = images.shape[0], o.image_width
        patches = space_to_depth(images, o.patch).reshape(b, o.patches, -1)
        x = Dense((patches.shape[-1],), (d,), (None, "embed"), o.dtype, name="patch")(patches)
        table = lambda name, names, shape, scale=1.0: self.param(
            name, nn.with_logical_partitioning(nn.initializers.normal(scale * d**-0.5), names), shape
        )
        if with_class := o.image_readout == "class_token":
            first = jnp.broadcast_to(table("class_token", ("embed",), (d,)).astype(x.dtype)[None, None], (b, 1, d))
            x = jnp.concatenate([first, x], axis=1)
        positions = table("positions", ("positions", "embed"), (with_class + o.patches, d), o.image_positions)
        x = x + positions.astype(x.dtype)[None]
        x = Norm("layernorm", o.dtype, name="norm_before")(x)
        hidden = o.image_mlp or _MLP_RATIO * d
        for i in range(o.image_depth):
            sizes = d, o.image_heads, hidden, o.image_depth
            x = Block(*sizes, o.activation, False, o.dtype, o.attention_kernel, name=f"block_{i}")(x)
        x = Norm("layernorm", "float32", name="norm_after")(x[:, :1] if with_class else x)
        x = x.reshape(b, -1)
        return Dense((x.shape[-1],), (o.embed_dim,), ("embed", None), "float32", name="projection")(x)


class TextTower(nn.Module):
    """The causal text transformer.

    Attributes:
      options: sizes.
    """

    options: CLIPOptions

    @nn.compact
    def __call__(self, text: Int[ArrayLike, "B T"]) -> Float[Array, "B E"]:
        """Embeds captions, int32 [B, T] with an end token in each, as float32 [B, E], not normalised."""
        o, d = self.options, self.options.text_width
        table = lambda name, scale, names, rows: self.param(
            name, nn.with_logical_partitioning(nn.initializers.normal(scale), names), (rows, d)
        )
        x = table("tokens", 0.02, ("text_vocab", "embed"), o.text_vocab)[text]
        x = (x + table("positions", 0.01, ("positions", "embed"), o.text_length)[None]).astype(o.dtype)
        for i in range(o.text_depth):
            sizes = d, o.text_heads, _MLP_RATIO * d, o.text_depth
            x = Block(*sizes, o.activation, True, o.dtype, o.attention_kernel, name=f"block_{i}")(x)
        end = jnp.argmax(text == o.end_id, axis=1)  # the first end token
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)  # [B, 1, D]
        x = Norm("layernorm", "float32", name="norm_after")(x)
        return Dense((d,), (o.embed_dim,), ("embed", None), "float32", name="projection")(x)[:, 0]


class TwoTowers(nn.Module):
    """Both towers and the factor on their similarities.

    Attributes:
      options: sizes.
    """

    options: CLIPOptions

    def setup(self):
        self.image, self.text = ImageTower(self.options), TextTower(self.options)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(INITIAL_LOG_SCALE), ())

    def encode_image(self, images: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B E"]:
        """Embeds the images of `preprocess`, float32 [B, H, W, 3], as unit vectors, float32 [B, E]."""
        return _unit(self.image(images))

    def encode_text(self, text: Int[ArrayLike, "B T"]) -> Float[Array, "B E"]:
        """Embeds captions, int32 [B, T], as unit vectors, float32 [B, E]."""
        return _unit(self.text(text))

    def __call__(
        self, images: Float[ArrayLike, "B H W 3"], text: Int[ArrayLike, "B T"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
        """Embeds images and captions, and so creates every parameter."""
        return self.encode_image(images), self.encode_text(text)


def _unit(x: Float[ArrayLike, "B E"]) -> Float[Array, "B E"]:
    """Scales vectors to length one."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


@jax.custom_vjp
def limited(log_scale: Float[ArrayLike, ""]) -> Float[Array, ""]:
    """Computes min(x, ln 100). Beyond the limit, only gradients that reduce x pass, so that x can return."""
    return jnp.minimum(log_scale, MAX_LOG_SCALE)


def _limited_backward(log_scale, gradient):
    return (jnp.where((log_scale > MAX_LOG_SCALE) & (gradient < 0), 0.0, gradient),)


limited.defvjp(lambda x: (limited(x), x), _limited_backward)


# -- pure functions -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CLIP:
    """Embeds images and captions as unit vectors. All methods are pure functions of the parameters.

    Models with equal options are equal, so that `jax.jit` with a static model compiles once for all of them.

    Attributes:
      options: sizes.
    """

    options: CLIPOptions

    @property
    def module(self) -> TwoTowers:
        """The network."""
        return TwoTowers(self.options)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Returns new parameters, boxed with their logical axis names."""
        o = self.options
        images, text = jnp.zeros((1, o.image_size, o.image_size, 3)), jnp.full((1, o.text_length), o.end_id, jnp.int32)
        return self.module.init(key, images, text)["params"]

    def encode_image(self, params: PyTree, images: Num[ArrayLike, "B H W 3"]) -> Float[Array, "B E"]:
        """Embeds images.

        Args:
          params: unboxed parameters.
          images: uint8, or float in [0, 1], [B, H, W, 3] of any size; see `preprocess`.

        Returns:
          Unit vectors, float32 [B, E].
        """
        images = preprocess(images, self.options.image_size)
        return self.module.apply({"params": params}, images, method="encode_image")

    def encode_text(self, params: PyTree, text: Int[ArrayLike, "B T"]) -> Float[Array, "B E"]:
        """Embeds captions.

        Args:
          params: unboxed parameters.
          text: int32 [B, T], with an `end_id` in each row.

        Returns:
          Unit vectors, float32 [B, E].
        """
        return self.module.apply({"params": params}, jnp.asarray(text), method="encode_text")

    def scale(self, params: PyTree) -> Float[Array, ""]:
        """Returns the factor on the similarities, float32 scalar, at most 100."""
        return jnp.exp(limited(params["logit_scale"]))
