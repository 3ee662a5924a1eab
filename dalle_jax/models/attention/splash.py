"""Attention patterns on splash attention, JAX's block-sparse flash attention kernel for TPUs.

The kernel computes a mask block by block and skips empty blocks. Scores never leave the chip's on-chip memory. The
pattern's mask is prepared in three ways:

* If it saves blocks, image positions are sorted by the groups of the pattern. A column is then contiguous, so that a
  column layer is as sparse as a row layer. In raster order none of its blocks would be empty. A layer sorts its states
  before it computes queries, keys and values, because the states are one array with long rows. A layer of a scan that
  has several patterns sorts its queries, keys and values.
* The stream is padded to whole blocks. Padding keys are masked out. Padding queries copy the last query's mask row, so
  they never see an empty row and need no additional block.
* On a mesh, each device computes its rows and heads, as the sharding rules assign them.

The backward pass needs the kernel's output. In the kernel's own shape, rows of K = 64 take twice their memory on a TPU,
because rows are padded to 128 there. The output is therefore kept as [B, P, H·K], without the padding of the stream.

On other devices the kernel is interpreted, for tests: slow, with the same numbers.

    B batch    S = T + N sequence    T text    N = h·w image tokens    D width    H heads    K head size
    P positions, S or N
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import MultiHeadMask, NumpyMask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SplashAttentionKernel,
    _splash_attention_bwd,
    _splash_attention_fwd,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask, process_mask_dkv
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dalle_jax.distributed.per_device import on_each_device
from dalle_jax.distributed.sharding import on_tpu
from dalle_jax.models.attention.patterns import ATTENDED, Pattern
from dalle_jax.token_layout import TokenLayout


def ordered(x: Float[ArrayLike, "B P D"], pattern: Pattern, layout: TokenLayout) -> Float[ArrayLike, "B P D"]:
    """Sorts a stream, [B, S, D], or its image part, [B, N, D], into the order of the kernel."""
    return _image(x, pattern, layout, pattern.group_queries)


def restored(x: Float[ArrayLike, "B P D"], pattern: Pattern, layout: TokenLayout) -> Float[ArrayLike, "B P D"]:
    """Sorts a stream back into raster order; the inverse of `ordered`."""
    groups = pattern.groups(layout)[0].shape
    ungroup = lambda grid: pattern.ungroup(grid.reshape(-1, *groups, *grid.shape[3:]), layout)
    return _image(x, pattern, layout, ungroup)


def _image(
    x: Float[ArrayLike, "B P D"], pattern: Pattern, layout: TokenLayout, change: Callable[[Array], Array]
) -> Float[ArrayLike, "B P D"]:
    """Applies `change` to the image part as [B, h, w, D, 1], unless the kernel uses raster order."""
    if (np.diff(order(pattern, layout)) == 1).all():
        return x
    text, image = jnp.split(x, [x.shape[1] - layout.image_length], axis=1)
    grid = image.reshape(x.shape[0], layout.height, layout.width, -1, 1)
    return jnp.concatenate([text, change(grid).reshape(image.shape)], axis=1)


def attend(
    q: Float[ArrayLike, "B P H K"],
    k: Float[ArrayLike, "B S H K"],
    v: Float[ArrayLike, "B S H K"],
    pattern: Pattern,
    layout: TokenLayout,
) -> Float[Array, "B P H K"]:
    """Computes attention under a pattern, of the whole stream or of the image's queries. See `ordered` for the order.

    Args:
      q: queries in the order of the kernel, [B, S, H, K] or [B, N, H, K].
      k: keys in the order of the kernel, [B, S, H, K].
      v: values in the order of the kernel, [B, S, H, K].
      pattern: the attention pattern.
      layout: layout of the token stream.

    Returns:
      Array of the shape and dtype of q.
    """
    kernel = _kernel(pattern, layout, q.shape[1], not on_tpu())
    local = lambda q, k, v: _heads_attention(kernel, q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v)
    return on_each_device(local, ("batch", "length", "heads", "kv"), q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads_attention(
    kernel: SplashAttentionKernel, q: Float[Array, "B P H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"]
) -> Float[Array, "B P H K"]:
    """Runs the kernel on one device. Only what the gradients keep differs from calling it; see the module's text."""
    return _positions(kernel(*(_rows(x, kernel) for x in (q, k, v))), q)


def _forward(kernel, q, k, v):
    tables = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    rows = (_rows(x, kernel) for x in (q, k, v))
    out, saved = _splash_attention_fwd(*tables, *rows, None, None, **kernel.kwargs)  # no segments, no sinks
    *_, logsumexp, _, _ = saved
    out = _positions(out, q).reshape(*q.shape[:2], -1)
    out, logsumexp = checkpoint_name((out, logsumexp), ATTENDED)
    return out.reshape(q.shape), (q, k, v, out, logsumexp)


def _backward(kernel, saved, gradient):
    q, k, v, out, logsumexp = saved
    qs, ks, vs, outs, gradients = (_rows(x, kernel) for x in (q, k, v, out.reshape(q.shape), gradient))
    saved = qs, ks, vs, None, None, outs, logsumexp, kernel.dq_mask_info, kernel.dkv_mask_info
    found = _splash_attention_bwd(**kernel.kwargs, res=saved, do=gradients)[3:6]  # after those of the three tables
    return tuple(_positions(x, like).astype(like.dtype) for x, like in zip(found, (q, k, v)))


_heads_attention.defvjp(_forward, _backward)


def _rows(x: Float[Array, "B P H K"], kernel: SplashAttentionKernel) -> Float[Array, "_ _ K"]:
    """Pads the positions to whole blocks, as [B·H, P', K]. All heads have one mask, so they can share an axis."""
    b, p, h, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -p % kernel.kwargs["block_sizes"].block_q), (0, 0), (0, 0)))
    return x.swapaxes(1, 2).reshape(b * h, -1, size)


def _positions(rows: Float[Array, "_ _ K"], like: Float[Array, "B P H K"]) -> Float[Array, "B P H K"]:
    """Undoes `_rows`."""
    b, p, h, size = like.shape
    return rows[:, :p].reshape(b, h, p, size).swapaxes(1, 2)


def attend_raster(
    q: Float[ArrayLike, "B S H K"],
    k: Float[ArrayLike, "B S H K"],
    v: Float[ArrayLike, "B S H K"],
    pattern: Pattern,
    layout: TokenLayout,
) -> Float[Array, "B S H K"]:
    """Computes attention of the whole stream in raster order, with the arguments and results of `xla.attend`."""
    flat = lambda change, x: change(x.reshape(*x.shape[:2], -1), pattern, layout).reshape(x.shape)
    return flat(restored, attend(*(flat(ordered, x) for x in (q, k, v)), pattern, layout))


# -- order and blocks ---------------------------------------------------------------------------------------------

KERNEL_KINDS = ("fwd", "dq", "dkv")  # forward; gradients of the queries; gradients of keys and values

# Cycles that the compiler schedules for bfloat16 and K = 64, from experiments/benchmarks/attention_tpu.py. K = 128
# differs by a few percent. The first number is the cycles for any block of the grid. The others are the additional
# cycles for a row of blocks, and for a block that is not empty. Small blocks skip more of the mask, but the same area
# costs up to two and a half times as much. At the paper's size, four blocks of 640, one of them empty, cost less than
# 25 blocks of 256, half of them empty.
SCHEDULES = {
    "v5p": {
        128: {"fwd": (162, 188, 243), "dq": (172, 60, 248), "dkv": (289, 109, 237)},
        256: {"fwd": (162, 366, 514), "dq": (181, 109, 525), "dkv": (289, 206, 718)},
        512: {"fwd": (162, 712, 1174), "dq": (182, 206, 1495), "dkv": (282, 398, 1878)},
        640: {"fwd": (163, 884, 2024), "dq": (185, 254, 2398), "dkv": (346, 494, 2877)},
    },
    "v5e": {
        128: {"fwd": (65, 181, 244), "dq": (71, 60, 252), "dkv": (86, 109, 248)},
        256: {"fwd": (65, 362, 525), "dq": (71, 109, 525), "dkv": (88, 206, 719)},
        512: {"fwd": (65, 707, 1218), "dq": (65, 206, 1483), "dkv": (87, 398, 1863)},
        640: {"fwd": (66, 877, 2009), "dq": (70, 254, 2343), "dkv": (89, 494, 2996)},
    },
    "v6e": {
        128: {"fwd": (81, 89, 234), "dq": (79, 37, 201), "dkv": (99, 61, 233)},
        256: {"fwd": (81, 176, 567), "dq": (79, 61, 463), "dkv": (101, 109, 659)},
        512: {"fwd": (81, 358, 937), "dq": (78, 109, 1052), "dkv": (100, 205, 1272)},
        640: {"fwd": (82, 455, 1811), "dq": (78, 133, 1732), "dkv": (102, 253, 1880)},
    },
}


def _kernel_cycles(filled: np.ndarray, kind: str, block: int, chip: str) -> int:
    """Returns the cycles of one head in one kernel, given `filled_blocks`. The grid is as wide as its longest row."""
    step, row, body = SCHEDULES[chip][block][kind]
    rows = filled.sum(0 if kind == "dkv" else 1)
    return len(rows) * (int(rows.max()) * step + row) + int(rows.sum()) * body


@functools.lru_cache(maxsize=64)
def kernel_cycles(kind: str, pattern: Pattern, layout: TokenLayout, queries: int, chip: str) -> int:
    """Returns the cycles of one head in one kernel.

    Args:
      kind: one of `KERNEL_KINDS`.
      pattern: the attention pattern.
      layout: layout of the token stream.
      queries: number of queries; see `kernel_mask`.
      chip: a key of `SCHEDULES`.
    """
    mask = kernel_mask(pattern, layout, queries)
    block = block_size(mask)
    return _kernel_cycles(filled_blocks(mask, block), kind, block, chip)


@functools.lru_cache(maxsize=64)
def order(pattern: Pattern, layout: TokenLayout) -> Int[np.ndarray, " S"]:
    """Returns the order in which the kernel reads the stream: the position at each place, int [S].

    This is raster order, or the order of the pattern's groups if its blocks cost less.
    """
    text, mask = layout.prefix_length, pattern.mask(layout)
    grouped = np.concatenate([np.arange(text), text + pattern.groups(layout)[0].reshape(-1)])
    orders = np.arange(layout.length), grouped
    return min(
        orders, key=lambda places: min(cycles(mask[np.ix_(places, places)], block) for block in SCHEDULES["v5p"])
    )


def kernel_mask(pattern: Pattern, layout: TokenLayout, queries: int) -> Bool[np.ndarray, "P S"]:
    """Returns the pattern's mask in the order of the kernel: bool [queries, S].

    Args:
      pattern: the attention pattern.
      layout: layout of the token stream.
      queries: S for the whole stream, or N for the queries of the image.
    """
    places = order(pattern, layout)
    return pattern.mask(layout)[np.ix_(places, places)][layout.length - queries :]


def whole_blocks(mask: Bool[np.ndarray, "P S"], block: int) -> Bool[np.ndarray, "_ _"]:
    """Pads a mask to whole blocks. Padding keys are masked out; padding queries copy the last query's row."""
    mask = np.pad(mask, ((0, -mask.shape[0] % block), (0, 0)), mode="edge")
    return np.pad(mask, ((0, 0), (0, -mask.shape[1] % block)))


def filled_blocks(mask: Bool[np.ndarray, "P S"], block: int) -> Bool[np.ndarray, "_ _"]:
    """Returns which blocks of a mask are not empty: bool [rows of blocks, columns of blocks]."""
    mask = whole_blocks(mask, block)
    rows, columns = (size // block for size in mask.shape)
    return mask.reshape(rows, block, columns, block).any(axis=(1, 3))


def cycles(mask: Bool[np.ndarray, "P S"], block: int) -> int:
    """Returns the cycles of one head, forward and backward, on a v5p, which select block size and order."""
    filled = filled_blocks(mask, block)
    return sum(_kernel_cycles(filled, kind, block, "v5p") for kind in KERNEL_KINDS)


def block_size(mask: Bool[np.ndarray, "P S"]) -> int:
    """Returns the side of the blocks with which a mask costs the fewest cycles."""
    return min(SCHEDULES["v5p"], key=functools.partial(cycles, mask))


@functools.lru_cache(maxsize=64)
def _kernel(pattern: Pattern, layout: TokenLayout, queries: int, interpret: bool) -> SplashAttentionKernel:
    """Builds the kernel of a pattern, for any number of heads.

    Its tables are numpy arrays, so that every trace can use the cached kernel.
    """
    mask = kernel_mask(pattern, layout, queries)
    block = block_size(mask)
    masks = MultiHeadMask([NumpyMask(whole_blocks(mask, block))])
    sizes = BlockSizes(
        block_q=block, block_kv=block, block_q_dq=block, block_kv_dq=block, block_q_dkv=block, block_kv_dkv=block
    )
    return SplashAttentionKernel(
        *(table(masks, (block, block))[0] for table in (process_mask, process_mask, process_mask_dkv)),
        block_sizes=sizes, is_mqa=False, save_residuals=False, mask_value=DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
        residual_checkpoint_name=None, mask_function=None, interpret=interpret,
    )  # fmt: skip
