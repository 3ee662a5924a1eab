"""cuDNN's flash attention for NVIDIA GPUs, with the logarithms of its sums as an output and an input.

`jax.nn.dot_product_attention(implementation="cudnn")` runs the same programs of cuDNN. Two of its properties do not
serve `windows.py`. It rounds the log-sum-exp to the dtype of the values, which is an error of some percent in the
weights. It also has no gradient with respect to it. This module calls the programs with the arguments that JAX gives
them, which a test compares. The backward pass here accepts the output and the log-sum-exp of *all* keys of a query,
not only of the keys in the call, so that the parts of a softmax have exact gradients.

    B batch    P queries    L keys    H heads    K head size
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dalle_jax.distributed.sharding import platform

LARGEST_HEAD = 128  # from compute capability 9.0 on also 256
_OLDEST = (8, 0)  # compute capability

Queries = Float[Array, "B P H K"]
Keys = Float[Array, "B L H K"]
LogSums = Float[Array, "B P H"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attention to some of the keys, forward and backward. Queries and keys are as long as each other if it is causal.

    Attributes:
      forward: (q, k, v, causal, window) to the output, [B, P, H, K], and its log-sum-exp, float32 [B, P, H].
      backward: (q, k, v, out, lse, cotangent, causal, window) to the gradients of q, k and v.
    """

    forward: Callable[[Queries, Keys, Keys, bool, int | None], tuple[Queries, LogSums]]
    backward: Callable[[Queries, Keys, Keys, Queries, LogSums, Queries, bool, int | None], tuple[Queries, Keys, Keys]]


def obstacle(dtype: DTypeLike, head_dim: int) -> str | None:
    """Returns why the kernel cannot run in the current trace, or None if it can.

    Args:
      dtype: dtype of queries, keys and values.
      head_dim: K.
    """
    return unfit(dtype, head_dim) or _missing_device()


def unfit(dtype: DTypeLike, head_dim: int) -> str | None:
    """Returns why the kernel exists on no device for these heads, or None if it does."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"dtype is {jnp.dtype(dtype).name}, and cuDNN's attention needs bfloat16"
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        return f"the head size is {head_dim}, and cuDNN's attention needs a multiple of 8 up to {LARGEST_HEAD}"
    return None


def _missing_device() -> str | None:
    """Returns why the current trace has no NVIDIA GPU with this kernel, or None if it has one."""
    if platform() != "gpu":
        return f"cuDNN needs an NVIDIA GPU, and this computation is for a {platform()}"
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return None  # the mesh exists only for the compiler
    capability = str(getattr(device, "compute_capability", ""))
    found = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if found is None or tuple(map(int, found.groups())) < _OLDEST:
        return f"cuDNN's attention needs an NVIDIA GPU of compute capability 8.0, and {device.device_kind} has none"
    return None


def forward(q: Queries, k: Keys, v: Keys, causal: bool, window: int | None) -> tuple[Queries, LogSums]:
    """Computes attention without dropout; see `Kernel.forward`.

    Args:
      q: queries, bfloat16 [B, P, H, K].
      k: keys, bfloat16 [B, L, H, K].
      v: values, bfloat16 [B, L, H, K].
      causal: whether query i attends to the keys up to i only, instead of all keys.
      window: with `causal`, the number of keys up to i that it attends to; None for all of them.
    """
    b, p, h, size = q.shape
    results = [
        jax.ShapeDtypeStruct((b, h, p, size), q.dtype),
        jax.ShapeDtypeStruct((b, h, p), jnp.float32),
    ]
    out, lse = _call("__cudnn$fmhaSoftmax", _FORWARD, results, (q, k, v), causal, window)
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def backward(
    q: Queries, k: Keys, v: Keys, out: Queries, lse: LogSums, cotangent: Queries, causal: bool, window: int | None
) -> tuple[Queries, Keys, Keys]:
    """Computes the gradients of queries, keys and values; see `Kernel.backward`.

    The probability of a key is exp(score - lse), and the gradient of its score is that probability times (the product
    of value and cotangent, minus that of output and cotangent). Both hold for any part of the keys.

    Args:
      q: queries, bfloat16 [B, P, H, K].
      k: keys of the part, bfloat16 [B, L, H, K].
      v: values of the part, bfloat16 [B, L, H, K].
      out: output of all parts, bfloat16 [B, P, H, K].
      lse: log-sum-exp of all parts, float32 [B, P, H].
      cotangent: gradient of `out`, bfloat16 [B, P, H, K].
      causal: as in the forward pass.
      window: as in the forward pass.
    """
    results = [jax.ShapeDtypeStruct((*x.shape[:1], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in (q, k, v)]
    inputs = q, k, v, lse.swapaxes(1, 2), cotangent, out
    found = _call("__cudnn$fmhaSoftmaxBackward", _BACKWARD, results, inputs, causal, window)
    return tuple(x.swapaxes(1, 2) for x in found)


KERNEL = Kernel(forward, backward)


# -- the calls ----------------------------------------------------------------------------------------------------

# Contracted and batch dimensions of both sides of each product, in the order batch, position, head, size.
_FORWARD = {
    "bmm1": ((3, 3), (0, 2), (0, 2)),
    "bmm2": ((3, 1), (0, 1), (0, 2)),
}
_BACKWARD = {
    "bmm1_grad_gemm1": ((2, 1), (0, 1), (0, 2)),
    "bmm1_grad_gemm2": ((3, 1), (0, 1), (0, 2)),
    "bmm2_grad_gemm1": ((2, 1), (0, 1), (0, 2)),
    "bmm2_grad_gemm2": ((3, 3), (0, 2), (0, 2)),
}


def _call(
    target: str,
    products: dict[str, tuple],
    results: list[jax.ShapeDtypeStruct],
    inputs: tuple[Array, ...],
    causal: bool,
    window: int | None,
) -> list[Array]:
    """Calls a program of cuDNN. XLA finds it by its name and its configuration, and adds the workspace."""
    q, k = inputs[:2]
    config = _config(products, q.shape, k.shape[1], causal, window)
    grid = lambda x: (0, 2, 1, 3) if len(x.shape) == 4 else tuple(range(len(x.shape)))  # heads after positions
    workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)
    call = jax.ffi.ffi_call(
        target, [*results, workspace], output_layouts=[*map(grid, results), (0,)],
        custom_call_api_version=2, legacy_backend_config=json.dumps(config),
    )  # fmt: skip
    return call(*inputs)[:-1]


@functools.lru_cache(maxsize=256)
def _dimensions(name: str, contracted: tuple, left: tuple, right: tuple) -> tuple[str, dict]:
    text = lambda numbers: [str(number) for number in numbers]
    return f"{name}_dot_dimension_numbers", {
        "lhs_contracting_dimensions": text(contracted[:1]),
        "rhs_contracting_dimensions": text(contracted[1:]),
        "lhs_batch_dimensions": text(left),
        "rhs_batch_dimensions": text(right),
    }


def _config(products: dict[str, tuple], shape: tuple[int, ...], keys: int, causal: bool, window: int | None) -> dict:
    """Returns the configuration of a call, as `jax.nn.dot_product_attention` writes it."""
    b, p, h, size = shape
    call = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": 1 / math.sqrt(size),
        "intermediate_tensor_shape": {
            "element_type": "BF16",
            "dimensions": [str(x) for x in (b, h, p, keys)],
            "tuple_shapes": [],
            "layout": {
                "dim_level_types": [],
                "dim_unique": [],
                "dim_ordered": [],
                "minor_to_major": ["3", "2", "1", "0"],
                "tiles": [],
                "element_size_in_bits": "0",
                "memory_space": "0",
                "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "dynamic_shape_metadata_prefix_bytes": "0",
            },
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL" if causal else "NO_MASK",
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": window or 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    call |= dict(_dimensions(name, *numbers) for name, numbers in products.items())
    return {"operation_queue_id": "0", "cudnn_fmha_backend_config": call}
