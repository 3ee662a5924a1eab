"""The authors' VQGAN with random weights, and the golden file that it gives.

    PYTHONPATH=DIR python tests/taming_originals.py      # writes tests/golden/vqgan.npz

DIR holds the package: pip install --no-deps --target DIR taming-transformers-rom1504==0.0.6. It needs torch and einops.
The golden file holds, for each of `CASES`, names and shapes of the state dict, and what the network computes. Weights
are drawn from a seed by `RandomState`, whose numbers are the same in every version of NumPy.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "vqgan.npz"
AVAILABLE = all(importlib.util.find_spec(name) for name in ("torch", "einops", "taming"))
REASON = (
    "needs torch, einops and taming-transformers-rom1504==0.0.6 (pip install --no-deps --target DIR, PYTHONPATH=DIR)"
)

# name → options of `VQGANOptions`, and the height and width of the images. The authors always have 32 groups.
CASES = {
    "nearest": (
        {"image_size": 16, "vocab_size": 40, "code_dim": 6, "latent": 8, "hidden": 32, "multipliers": (1, 2),
         "blocks": 1, "attention_levels": (1,)},
        (16, 24),
    ),
    "gumbel": (
        {"image_size": 32, "vocab_size": 50, "code_dim": 8, "latent": 8, "hidden": 32, "multipliers": (1, 1, 2),
         "blocks": 2, "attention_levels": (1, 2), "quantizer": "gumbel"},
        (32, 16),
    ),
}  # fmt: skip


def random_arrays(shapes, seed=0):
    """Returns a state dict with random weights, with which activations stay near 1.

    Args:
      shapes: shape by name, in the order of the state dict.
      seed: of the numbers.
    """
    random, arrays = np.random.RandomState(seed), {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape)
        if name.startswith("quantize.embed"):
            values *= 0.5
        elif "norm" in name:
            values = values * 0.1 + name.endswith("weight")
        elif name.endswith("bias"):
            values *= 0.1
        else:
            values *= 2 / np.prod(shape[1:]) ** 0.5
        arrays[name] = values.astype(np.float32)
    return arrays


def images_of(height, width, rows=2):
    return np.random.RandomState(1).randint(0, 256, (rows, height, width, 3)).astype(np.uint8)


def original(options):
    """Returns the authors' modules under the names of their checkpoints. `options` as in `CASES`."""
    import torch
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

    sizes = {
        "ch": options["hidden"], "out_ch": 3, "ch_mult": options["multipliers"], "num_res_blocks": options["blocks"],
        "attn_resolutions": [options["image_size"] >> level for level in options["attention_levels"]],
        "in_channels": 3, "resolution": options["image_size"], "z_channels": options["latent"], "double_z": False,
    }  # fmt: skip
    codes, width, latent = options["vocab_size"], options["code_dim"], options["latent"]
    module = torch.nn.Module()
    module.encoder, module.decoder = Encoder(**sizes), Decoder(**sizes)
    if options.get("quantizer") == "gumbel":
        module.quantize = GumbelQuantize(latent, width, codes)
    else:
        module.quantize = VectorQuantizer2(codes, width, beta=0.25)
    module.quant_conv = torch.nn.Conv2d(latent, width, 1)
    module.post_quant_conv = torch.nn.Conv2d(width, latent, 1)
    return module.eval()


def shapes_of(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def outputs(module, arrays, images):
    """Returns what the authors' modules compute: features, logits (GumbelVQ), tokens, and decoded pixels."""
    import torch

    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    last = lambda tensor: tensor.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        features = module.quant_conv(module.encoder(torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1))
        rows, width, h, w = features.shape
        found = {"features": last(features)}
        if hasattr(module.quantize, "proj"):
            logits = module.quantize.proj(features)
            found["logits"], tokens = last(logits), logits.argmax(1).flatten()
        else:
            tokens = module.quantize(features)[2][2]
        vectors = module.quantize.get_codebook_entry(tokens, (rows, h, w, width))
        pixels = module.decoder(module.post_quant_conv(vectors))
    return {**found, "tokens": tokens.numpy().reshape(rows, h, w).astype(np.int32), "pixels": last(pixels)}


def golden(name):
    """Returns (options, arrays, images, outputs) of a case from the golden file."""
    options, sides = CASES[name]
    with np.load(GOLDEN) as stored:
        shapes = json.loads(str(stored[f"{name}/shapes"]))
        found = {key.split("/")[1]: stored[key] for key in stored.files if key.startswith(f"{name}/")}
    del found["shapes"]
    return options, random_arrays(shapes), images_of(*sides), found


def main():
    content = {}
    for name, (options, sides) in CASES.items():
        module = original(options)
        shapes = shapes_of(module)
        content[f"{name}/shapes"] = np.array(json.dumps(shapes))
        found = outputs(module, random_arrays(shapes), images_of(*sides))
        content |= {f"{name}/{key}": value for key, value in found.items()}
        for key, value in found.items():
            print(f"{name} {key}: {value.shape}, deviation {np.std(value):.3f}")
        print(f"{name}: {len(np.unique(found['tokens']))} different tokens")
    np.savez_compressed(GOLDEN, **content)


if __name__ == "__main__":
    sys.exit(main())
