"""Chooses the implementation of attention by device, dtype and pattern, and calls it.

docs/speed.md, section "Attention", has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float

from dalle_jax.distributed.sharding import on_tpu
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention import cudnn, splash, windows, xla
from dalle_jax.models.attention.patterns import ATTENDED, Pattern
from dalle_jax.token_layout import TokenLayout

KERNELS = ("auto", "xla", "splash", "cudnn")

Stream = Float[ArrayLike, "B S H K"]
Image = Float[ArrayLike, "B N H K"]
Text = Float[ArrayLike, "C T H K"]


def check_cudnn(kernel: str, dtype: DTypeLike, head_dim: int, section: str) -> None:
    """Checks that `attention_kernel="cudnn"` fits the heads. The device is checked when the model is traced.

    Args:
      kernel: the option `attention_kernel`.
      dtype: dtype of queries, keys and values.
      head_dim: K.
      section: section of the configuration with the option, "model.trunk" for example.

    Raises:
      ConfigError: no device has the kernel for this dtype and head size.
    """
    _check(kernel, cudnn.unfit(dtype, head_dim), section)


def chosen(kernel: str, dtype: DTypeLike, head_dim: int, section: str) -> str:
    """Returns "xla", "splash" or "cudnn" for the device of the current trace.

    Args:
      kernel: the option `attention_kernel`.
      dtype: dtype of queries, keys and values.
      head_dim: K.
      section: section of the configuration with the option.

    Raises:
      ConfigError: "cudnn" was asked for, and cannot run.
    """
    if kernel == "auto" and on_tpu():
        return "splash"
    if kernel in ("auto", "cudnn"):
        missing = cudnn.obstacle(dtype, head_dim)
        _check(kernel, missing, section)
        return "xla" if missing else "cudnn"
    return kernel


def on_any_device(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `model` section of a stored configuration for another device than that of its training.

    "cudnn" becomes "auto", in the section and in its trunk, so that a training on a GPU can be used on a CPU.
    """
    changed = {key: on_any_device(value) if key == "trunk" else value for key, value in dict(model).items()}
    return changed | ({"attention_kernel": "auto"} if changed.get("attention_kernel") == "cudnn" else {})


def _check(kernel: str, missing: str | None, section: str) -> None:
    if kernel == "cudnn" and missing:
        raise ConfigError(
            f"config.{section}.attention_kernel is 'cudnn', but {missing}. Set "
            f"--config.{section}.attention_kernel=auto, which chooses by device, dtype and head size."
        )


def attend(
    kernel: str,
    q: Stream,
    k: Stream,
    v: Stream,
    pattern: Pattern,
    layout: TokenLayout,
    drop: xla.Drop = xla.kept,
    bias: Float[ArrayLike, "H S S"] | None = None,
    visible: Bool[ArrayLike, "B S"] | None = None,
) -> Float[Array, "B S H K"]:
    """Computes attention of the whole stream in raster order.

    Args:
      kernel: from `chosen`. A pattern without windows (`windows.windows_of`) runs in XLA instead of cuDNN.
      q: queries, [B, S, H, K].
      k: keys, [B, S, H, K].
      v: values, [B, S, H, K].
      pattern: the attention pattern.
      layout: layout of the token stream.
      drop: dropout of the probabilities, which only "xla" has.
      bias: added to the scores, float32 [H, S, S], which only "xla" has; None for none. Attention is then dense.
      visible: whether the queries of a row may attend to a key at all, bool [B, S], which only "xla" has; None for all
        keys. Attention is then dense.

    Returns:
      [B, S, H, K] in the dtype of v.
    """
    if bias is not None or visible is not None:
        return checkpoint_name(xla.attend_reference(q, k, v, pattern.mask(layout), drop, bias, visible), ATTENDED)
    if kernel == "splash":
        return splash.attend_raster(q, k, v, pattern, layout)
    if kernel == "cudnn" and windows.windows_of(pattern, layout):
        return windows.attend(q, k, v, pattern, layout, cudnn.KERNEL)
    return xla.attend(q, k, v, pattern, layout, drop)


def attend_image(
    kernel: str, q: Image, k: Image, v: Image, text_k: Text, text_v: Text, pattern: Pattern, layout: TokenLayout
) -> Float[Array, "B N H K"]:
    """Computes attention of the image positions to each other and to the text, in raster order.

    Args:
      kernel: "xla" or "cudnn", as in `attend`.
      q: queries of the image, [C·n, N, H, K]; the n candidates of a caption are adjacent rows.
      k: keys of the image, [C·n, N, H, K].
      v: values of the image, [C·n, N, H, K].
      text_k: keys of the captions, [C, T, H, K].
      text_v: values of the captions, [C, T, H, K].
      pattern: the attention pattern.
      layout: layout of the token stream.

    Returns:
      [C·n, N, H, K] in the dtype of v.
    """
    if kernel == "cudnn" and windows.windows_of(pattern, layout):
        return windows.attend_image(q, k, v, text_k, text_v, pattern, layout, cudnn.KERNEL)
    return xla.attend_image(q, k, v, text_k, text_v, pattern, layout)


def attend_sequence(kernel: str, q: Stream, k: Stream, v: Stream, causal: bool) -> Float[Array, "B S H K"]:
    """Computes dense attention of a sequence, [B, S, H, K], to itself, with or without a causal mask."""
    if kernel == "cudnn":
        return windows.attend_sequence(q, k, v, causal, cudnn.KERNEL)
    mask = np.ones((q.shape[1],) * 2, bool)
    return xla.attend_reference(q, k, v, np.tril(mask) if causal else mask)
