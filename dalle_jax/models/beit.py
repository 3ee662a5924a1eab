"""BEiT: image patches, some of them masked, through the bidirectional trunk (arXiv 2106.08254).

One network serves four targets. "tokens" is BEiT's: the tokens of an image tokenizer at the masked patches. "pixels"
is SimMIM's (arXiv 2111.09886): the pixels there, by their absolute error. "normalized_pixels" is MAE's target (arXiv
2111.06377, section 4.1): each patch minus its mean, divided by its deviation, by their squared error. "labels" is
fine-tuning: the class of the whole image, from the mean over the patches.

MAE's encoder leaves out the masked patches, and a second transformer decodes. This network sees them as masked, as BEiT
and SimMIM do. A class token stands in the single position before the image, as in BEiT.

    B batch    H, W image    P side of a patch    N = h·w patches    S = 1 + N    D width    V targets of a position
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Key, UInt8

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.resampling import space_to_depth
from dalle_jax.image_tokenizers.signed_pixels import to_signed
from dalle_jax.models.attention.patterns import Bidirectional
from dalle_jax.models.dense import Dense
from dalle_jax.models.patch_masks import MASKS
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import Trunk
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import PaddedIds, TokenLayout

TOKENS, PIXELS, NORMALIZED_PIXELS, LABELS = TARGETS = ("tokens", "pixels", "normalized_pixels", "labels")
_HEAD_SCALE = 0.02  # standard deviation of the mask, the class token, the positions and the heads at the start


@dataclasses.dataclass(frozen=True)
class BEiTOptions:
    """Hyper-parameters of the model and of its targets.

    Attributes:
      trunk: options of the transformer.
      patch: P, side of a patch in pixels.
      target: "tokens", "pixels", "normalized_pixels" or "labels".
      masks: "blocks" (BEiT's) or "random"; see `patch_masks.py`.
      masked_share: share of masked patches: 75 of 196 in BEiT, 0.6 in SimMIM, 0.75 in MAE.
      smallest_block: the smallest area of a block, in patches.
      label_smoothing: share of a label that is spread over all classes.
    """

    trunk: TransformerOptions = TransformerOptions(positions="relative")
    patch: int = 16
    target: str = TOKENS
    masks: str = "blocks"
    masked_share: float = 75 / 196
    smallest_block: int = 16
    label_smoothing: float = 0.0

    def __post_init__(self):
        check(
            self, "model", positive=["patch", "smallest_block"], share=["masked_share", "label_smoothing"],
            most={"patch": 2**13, "smallest_block": 2**15}, choices={"target": TARGETS, "masks": MASKS},
        )  # fmt: skip
        if not self.masked_share:
            raise ConfigError("config.model.masked_share is 0, so nothing is predicted; expected a share such as 0.4.")

    def side(self, image_size: int) -> int:
        """Returns h = w, the number of patches along a side of the image.

        Raises:
          ConfigError: the image is no whole number of patches wide.
        """
        if image_size % self.patch:
            raise ConfigError(
                f"config.model.patch is {self.patch}; expected a divisor of config.data.image_size={image_size}."
            )
        return image_size // self.patch

    def masked(self, patches: int) -> int:
        """Returns the number of masked patches of an image with N patches, at least 1."""
        return max(1, round(self.masked_share * patches))


class BEiTNetwork(nn.Module):
    """Embeddings, trunk and head.

    Attributes:
      options: options of the model.
      layout: layout of the stream: one position for the class token, then the grid of patches.
      outputs: V: number of tokens, of subpixels in a patch, or of classes.
    """

    options: BEiTOptions
    layout: TokenLayout
    outputs: int

    def setup(self):
        o, trunk = self.options, self.options.trunk
        subpixels = 3 * o.patch**2
        self.patches = Dense((subpixels,), (trunk.width,), (None, "embed"), trunk.dtype, (None,))
        self.class_token = self._table("class_token", 1)
        if o.target != LABELS:
            self.mask = self._table("mask", 1)
        if trunk.positions == "learned":
            self.rows, self.columns = self._table("rows", self.layout.height), self._table("columns", self.layout.width)
        if trunk.positions == "table":
            self.cells = self._table("cells", self.layout.image_length)
        self.drop = nn.Dropout(trunk.dropout)
        self.trunk = Trunk(trunk, self.layout, (Bidirectional(text_reads_image=True),) * trunk.depth)
        head = Dense((trunk.width,), (self.outputs,), ("embed", "vocab"), trunk.states_dtype, ("vocab",), 0.1)
        setattr(self, f"head_{o.target}", head)  # a name for each target: `start_from` then takes over the trunk alone

    def _table(self, name: str, rows: int) -> Float[Array, "rows D"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(_HEAD_SCALE), ("positions", "embed"))
        return self.param(name, init, (rows, self.options.trunk.width))

    def embed(
        self, images: UInt8[ArrayLike, "B H W 3"], masked: Bool[ArrayLike, "B N"] | None, train: bool
    ) -> Float[Array, "B S D"]:
        """Embeds the class token and the patches, in the dtype of the residual stream."""
        o = self.options
        patches = space_to_depth(to_signed(images), o.patch).reshape(len(images), self.layout.image_length, -1)
        x = self.patches(patches.astype(o.trunk.dtype)).astype(jnp.float32)
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask[0][None, None], x)
        if o.trunk.positions == "learned":
            x = x + (self.rows[:, None] + self.columns[None]).reshape(1, self.layout.image_length, -1)
        if o.trunk.positions == "table":
            x = x + self.cells[None]
        first = jnp.broadcast_to(self.class_token[None], (len(images), 1, x.shape[-1]))
        x = self.drop(jnp.concatenate([first, x], axis=1), deterministic=not train)
        return constrain(x.astype(o.trunk.stream_dtype), "batch", "length", "embed_act")

    def __call__(
        self, images: UInt8[ArrayLike, "B H W 3"], masked: Bool[ArrayLike, "B N"] | None = None, train: bool = False
    ) -> Float[Array, "B *N V"]:
        """Computes the outputs for each patch, or with the target "labels" for the whole image.

        Args:
          images: uint8 [B, H, W, 3].
          masked: which patches are masked, bool [B, N]; None for none.
          train: whether dropout applies.

        Returns:
          float32 [B, N, V], or [B, V] with the target "labels".
        """
        x = self.trunk(self.embed(images, masked, train), train)[:, 1:]
        if self.options.target == LABELS:
            x = x.mean(axis=1)
        return getattr(self, f"head_{self.options.target}")(x).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class BEiT:
    """The model with its sizes. All methods are pure functions of the parameters.

    Attributes:
      options: options of the model.
      image_size: H = W, in pixels.
      outputs: V.
    """

    options: BEiTOptions
    image_size: int
    outputs: int

    @property
    def layout(self) -> TokenLayout:
        """The layout of the stream: the class token, then the patches. Its vocabularies have no meaning."""
        side = self.options.side(self.image_size)
        return TokenLayout(PaddedIds(1, 1), 1, side, side)

    @property
    def network(self) -> BEiTNetwork:
        """The network."""
        return BEiTNetwork(self.options, self.layout, self.outputs)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Returns new parameters, boxed with their logical axis names."""
        masked = jnp.zeros((1, self.layout.image_length), bool) if self.options.target != LABELS else None
        images = jnp.zeros((1, self.image_size, self.image_size, 3), jnp.uint8)
        return self.network.init(key, images, masked)["params"]

    def __call__(
        self,
        params: PyTree,
        images: UInt8[ArrayLike, "B H W 3"],
        masked: Bool[ArrayLike, "B N"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B *N V"]:
        """See `BEiTNetwork.__call__`. Dropout applies if its key is given."""
        rngs = None if key is None else {"dropout": key}
        return self.network.apply({"params": params}, images, masked, key is not None, rngs=rngs)


def pixel_targets(images: UInt8[ArrayLike, "B H W 3"], patch: int, normalized: bool) -> Float[ArrayLike, "B N V"]:
    """Returns the subpixels of each patch in [-1, 1], or normalized by the mean and deviation of the patch.

    Args:
      images: uint8 [B, H, W, 3].
      patch: P.
      normalized: as in MAE.

    Returns:
      float32 [B, N, 3P²].
    """
    x = space_to_depth(to_signed(images), patch)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if not normalized:
        return x
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)
