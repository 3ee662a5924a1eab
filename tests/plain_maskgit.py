"""MaskGIT's image tokenizer as plain functions of arrays by their published names, without our network.

It is written from the published layout, so that tests can compare both.
"""

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-6  # of GroupNorm, with 32 groups


def shapes(codes, width, hidden, multipliers, blocks=2):
    """Returns the shape of each array by name, in the order of computation."""
    widths = [hidden * multiplier for multiplier in multipliers]
    found = {"quantizer/codebook": (codes, width), "encoder/Conv_0/kernel": (3, 3, 3, hidden)}

    def norm(name, channels):
        found.update({f"{name}/scale": (channels,), f"{name}/bias": (channels,)})

    def block(name, inputs, outputs):
        norm(f"{name}/GroupNorm_0", inputs)
        norm(f"{name}/GroupNorm_1", outputs)
        found[f"{name}/Conv_0/kernel"] = (3, 3, inputs, outputs)
        found[f"{name}/Conv_1/kernel"] = (3, 3, outputs, outputs)
        if inputs != outputs:
            found[f"{name}/Conv_2/kernel"] = (1, 1, outputs, outputs)

    def side(name, sizes, before):
        for number, size in enumerate(size for size in sizes for _ in range(blocks)):
            block(f"{name}/ResBlock_{number}", before, size)
            before = size
        norm(f"{name}/GroupNorm_0", before)

    side("encoder", [*widths, widths[-1]], hidden)
    found |= {"encoder/Conv_1/kernel": (1, 1, widths[-1], width), "encoder/Conv_1/bias": (width,)}
    side("decoder", [widths[-1], *widths[::-1]], widths[-1])
    ends = [(width, widths[-1]), *((size, size) for size in widths[:0:-1]), (hidden * multipliers[0], 3)]
    for number, (inputs, outputs) in enumerate(ends):
        found[f"decoder/Conv_{number}/kernel"] = (3, 3, inputs, outputs)
        found[f"decoder/Conv_{number}/bias"] = (outputs,)
    return found


def random_arrays(*sizes, seed=0):
    """Returns random arrays with which activations stay near 1; see `shapes`."""
    random, arrays = np.random.RandomState(seed), {}
    for name, shape in shapes(*sizes).items():
        values = random.standard_normal(shape)
        if "GroupNorm" in name:
            values = 0.1 * values + name.endswith("scale")
        elif name.endswith("kernel"):
            values *= 2 / np.prod(shape[:3]) ** 0.5
        else:
            values *= 0.5
        arrays[name] = values.astype(np.float32)
    return arrays


def conv(arrays, name, x):
    y = jax.lax.conv_general_dilated(
        x, arrays[f"{name}/kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    bias = arrays.get(f"{name}/bias")
    return y if bias is None else y + bias[None, None, None]


def norm(arrays, name, x):
    parts = x.reshape(*x.shape[:3], 32, -1)
    mean, variance = parts.mean((1, 2, 4), keepdims=True), parts.var((1, 2, 4), keepdims=True)
    normal = ((parts - mean) / jnp.sqrt(variance + EPSILON)).reshape(x.shape)
    return normal * arrays[f"{name}/scale"][None, None, None] + arrays[f"{name}/bias"][None, None, None]


def swish(x):
    return x / (1 + jnp.exp(-x))


def block(arrays, name, x):
    y = conv(arrays, f"{name}/Conv_0", swish(norm(arrays, f"{name}/GroupNorm_0", x)))
    y = conv(arrays, f"{name}/Conv_1", swish(norm(arrays, f"{name}/GroupNorm_1", y)))
    return y + (conv(arrays, f"{name}/Conv_2", y) if f"{name}/Conv_2/kernel" in arrays else x)


def run_blocks(arrays, side, numbers, x):
    for number in numbers:
        x = block(arrays, f"{side}/ResBlock_{number}", x)
    return x


@jax.jit
def features(arrays, pixels):
    """Computes the encoder's output of pixels in [0, 1], float [B, H, W, 3]."""
    levels = sum(name.startswith("decoder/Conv_") and name.endswith("bias") for name in arrays) - 1
    x = conv(arrays, "encoder/Conv_0", pixels)
    for level in range(levels):
        x = run_blocks(arrays, "encoder", (2 * level, 2 * level + 1), x)
        if level < levels - 1:
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    x = run_blocks(arrays, "encoder", (2 * levels, 2 * levels + 1), x)
    return conv(arrays, "encoder/Conv_1", swish(norm(arrays, "encoder/GroupNorm_0", x)))


@jax.jit
def decoded(arrays, tokens):
    """Computes the decoder's output of tokens, int [B, h, w]."""
    levels = sum(name.startswith("decoder/Conv_") and name.endswith("bias") for name in arrays) - 1
    x = conv(arrays, "decoder/Conv_0", arrays["quantizer/codebook"][tokens])
    x = run_blocks(arrays, "decoder", (0, 1), x)
    for number, level in enumerate(reversed(range(levels)), 1):
        x = run_blocks(arrays, "decoder", (2 * number, 2 * number + 1), x)
        if level:
            x = conv(arrays, f"decoder/Conv_{number}", x.repeat(2, 1).repeat(2, 2))
    return conv(arrays, f"decoder/Conv_{levels}", swish(norm(arrays, "decoder/GroupNorm_0", x)))


def outputs(arrays, pixels):
    """Returns features, tokens and decoded pixels."""
    found = np.asarray(features(arrays, pixels))
    distances = ((found[..., None, :] - arrays["quantizer/codebook"]) ** 2).sum(-1)
    tokens = distances.argmin(-1)
    return {"features": found, "tokens": tokens, "pixels": np.asarray(decoded(arrays, tokens))}
