"""Attention patterns as splash attention: JAX's block-sparse flash attention kernel for TPUs.

The kernel computes a mask block by block and passes over the blocks in which nobody reads anything; scores never leave
the chip's own memory. A pattern's mask is the truth here too:

  * where it saves blocks, the image positions stand in the order of the pattern's groups: a column is contiguous then,
    and a column layer as sparse as a row layer (in raster order each of its blocks holds something). The layer's
    states are put in that order before they become queries, keys and values: one array, with long rows (where a layer
    of a scan has several patterns, queries, keys and values are, by the pattern of the moment);
  * the stream is filled up to whole blocks. Nobody reads what was added; what was added reads what the last query
    reads, so that it has something to read and no block is computed for it alone;
  * on a mesh each device computes its rows and its heads, as the rules of `parallel.py` lay them out.

Anywhere but on a TPU the kernel is interpreted: slow, the same numbers, for tests.

    B batch    S = T + N sequence    T text    N = h·w image tokens    D width    H heads    K head size
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import MultiHeadMask, NumpyMask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask, process_mask_dkv

from dalle_jax.distributed.per_device import on_each_device
from dalle_jax.distributed.sharding import on_tpu
from dalle_jax.models.attention.patterns import ATTENDED, Pattern
from dalle_jax.token_layout import TokenLayout

KERNELS = ("auto", "xla", "splash")


def use_splash(kernel: str) -> bool:
    """Whether attention runs as this kernel here and now, by `TransformerOptions.attention_kernel`."""
    return kernel == "splash" or (kernel == "auto" and on_tpu())


def ordered(x: jax.Array, pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """Puts a stream in the kernel's order: [B, S, D], or [B, N, D] for its image part."""
    return _image(x, pattern, layout, pattern.group_queries)


def restored(x: jax.Array, pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """Undoes `ordered`."""
    groups = pattern.groups(layout)[0].shape
    ungroup = lambda grid: pattern.ungroup(grid.reshape(-1, *groups, *grid.shape[3:]), layout)
    return _image(x, pattern, layout, ungroup)


def _image(x: jax.Array, pattern: Pattern, layout: TokenLayout, change) -> jax.Array:
    """Changes the order of the image part, which `change` gets as [B, h, w, D, 1]; raster order stays as it is."""
    if (np.diff(order(pattern, layout)) == 1).all():
        return x
    text, image = jnp.split(x, [x.shape[1] - layout.image_length], axis=1)
    grid = image.reshape(x.shape[0], layout.height, layout.width, -1, 1)
    return jnp.concatenate([text, change(grid).reshape(image.shape)], axis=1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """Attention under a pattern: of the whole stream, or of its image's queries alone.

    Args:
      q: [B, S, H, K], or [B, N, H, K]; in the kernel's order, as all here (see `ordered`).
      k, v: [B, S, H, K].

    Returns:
      q's shape and dtype.
    """
    kernel = _kernel(pattern, layout, q.shape[1], not on_tpu())
    block = kernel.kwargs["block_sizes"].block_q

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        b, queries, h, size = q.shape
        rows = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)
        # One mask for all: the kernel needs not know which heads are of one example.
        q, k, v = (rows(x).reshape(b * h, -1, size) for x in (q * jnp.asarray(size**-0.5, q.dtype), k, v))
        return kernel(q, k, v)[:, :queries].reshape(b, h, queries, size).swapaxes(1, 2)

    return on_each_device(local, ("batch", "length", "heads", "kv"), q, k, v)


def attend_raster(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, layout: TokenLayout) -> jax.Array:
    """`attend` of the whole stream, [B, S, H, K] in raster order: what `attention.attend` gives."""
    flat = lambda change, x: change(x.reshape(*x.shape[:2], -1), pattern, layout).reshape(x.shape)
    return flat(restored, attend(*(flat(ordered, x) for x in (q, k, v)), pattern, layout))


# -- order and blocks ---------------------------------------------------------------------------------------------

KERNEL_KINDS = ("fwd", "dq", "dkv")  # forward; backward, the gradients of queries, and of keys and values

# Instructions that the compiler schedules (bfloat16, K = 64; K = 128 within a few percent;
# experiments/benchmarks/attention_tpu.py): for any block of the grid, for a row of blocks beside that, and for a block
# that is not empty beside that. Small blocks skip more, but cost up to two and a half times as much for the same area:
# at the paper's size, four blocks of 640 of which one is empty cost less than 25 of 256 of which half are.
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
    """What one head costs in one kernel, `filled` as from `filled_blocks`. The grid is as wide as its longest row."""
    step, row, body = SCHEDULES[chip][block][kind]
    rows = filled.sum(0 if kind == "dkv" else 1)
    return len(rows) * (int(rows.max()) * step + row) + int(rows.sum()) * body


@functools.lru_cache(maxsize=64)
def kernel_cycles(kind: str, pattern: Pattern, layout: TokenLayout, queries: int, chip: str) -> int:
    """Cycles of one head in one kernel.

    Args:
      kind: one of `KERNEL_KINDS`.
      pattern, layout, queries: see `kernel_mask`.
      chip: a key of `SCHEDULES`.
    """
    mask = kernel_mask(pattern, layout, queries)
    block = block_size(mask)
    return _kernel_cycles(filled_blocks(mask, block), kind, block, chip)


@functools.lru_cache(maxsize=64)
def order(pattern: Pattern, layout: TokenLayout) -> np.ndarray:
    """In which order the kernel takes the stream: the position that stands at each place, int [S].

    Raster order, or that of the pattern's groups where fewer blocks then cost less.
    """
    text, mask = layout.text_length, pattern.mask(layout)
    grouped = np.concatenate([np.arange(text), text + pattern.groups(layout)[0].reshape(-1)])
    orders = np.arange(layout.length), grouped
    return min(
        orders, key=lambda places: min(cycles(mask[np.ix_(places, places)], block) for block in SCHEDULES["v5p"])
    )


def kernel_mask(pattern: Pattern, layout: TokenLayout, queries: int) -> np.ndarray:
    """The pattern's mask in the kernel's order: bool [queries, S]; S queries, or N for those of the image alone."""
    places = order(pattern, layout)
    return pattern.mask(layout)[np.ix_(places, places)][layout.length - queries :]


def whole_blocks(mask: np.ndarray, block: int) -> np.ndarray:
    """A mask filled up to whole blocks: nobody reads what was added, which itself reads what the last query reads."""
    mask = np.pad(mask, ((0, -mask.shape[0] % block), (0, 0)), mode="edge")
    return np.pad(mask, ((0, 0), (0, -mask.shape[1] % block)))


def filled_blocks(mask: np.ndarray, block: int) -> np.ndarray:
    """In which blocks of a mask anybody reads anything: bool [rows of blocks, columns of blocks]."""
    mask = whole_blocks(mask, block)
    rows, columns = (size // block for size in mask.shape)
    return mask.reshape(rows, block, columns, block).any(axis=(1, 3))


def cycles(mask: np.ndarray, block: int) -> int:
    """What a mask costs one head, forward and backward, on a v5p: by which blocks and orders are chosen everywhere."""
    filled = filled_blocks(mask, block)
    return sum(_kernel_cycles(filled, kind, block, "v5p") for kind in KERNEL_KINDS)


def block_size(mask: np.ndarray) -> int:
    """The side of blocks with which a mask costs least."""
    return min(SCHEDULES["v5p"], key=functools.partial(cycles, mask))


@functools.lru_cache(maxsize=64)
def _kernel(pattern: Pattern, layout: TokenLayout, queries: int, interpret: bool) -> SplashAttentionKernel:
    """The kernel of a pattern, for any number of heads; its tables are numpy arrays, so that any trace may use them."""
    mask = kernel_mask(pattern, layout, queries)
    block = block_size(mask)
    masks = MultiHeadMask([NumpyMask(whole_blocks(mask, block))])
    sizes = BlockSizes(
        block_q=block, block_kv=block, block_q_dq=block, block_kv_dq=block, block_q_dkv=block, block_kv_dkv=block
    )
    return SplashAttentionKernel(
        *(table(masks, (block, block))[0] for table in (process_mask, process_mask, process_mask_dkv)),
        block_sizes=sizes, is_mqa=False, save_residuals=False, mask_value=DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENDED, mask_function=None, interpret=interpret,
    )  # fmt: skip
