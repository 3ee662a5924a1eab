"""The authors' ru-DALL-E with random weights, and the golden file that it gives.

    PYTHONPATH=DIR python tests/rudalle_originals.py      # writes tests/golden/rudalle.npz

DIR holds the package: pip install --no-deps --target DIR rudalle==1.1.3. It needs torch and einops. The golden file
holds, for each of `CASES`, the logits of all positions, and the tokens that the original's cached decoding draws.
Weights are drawn from a seed by `RandomState`, whose numbers are the same in every version of NumPy.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np

from dalle_jax.pretrained.rudalle import Sizes

GOLDEN = Path(__file__).parent / "golden" / "rudalle.npz"
AVAILABLE = all(name in sys.modules or importlib.util.find_spec(name) for name in ("torch", "einops", "rudalle"))
REASON = "needs torch, einops and rudalle==1.1.3 (pip install --no-deps --target DIR, PYTHONPATH=DIR)"

# version → sizes and number of heads. The grids are wider than the window of 11 cells.
CASES = {
    "v3": (Sizes(4, 32, text_ids=20 + 6, text_length=6, image_vocab=11, side=13), 2),
    "v2": (Sizes(3, 24, text_ids=16 + 5, text_length=5, image_vocab=9, side=12), 3),
}
_DRAWN = 40  # tokens of the cached decoding


def random_arrays(sizes, seed=0):
    """Returns a state dict with random weights, with which activations stay near 1."""
    random, arrays = np.random.RandomState(seed), {}
    for name, shape in sizes.shapes().items():
        values = random.standard_normal(shape)
        if len(shape) == 1:
            is_gain = name.endswith("weight")
            values = 0.2 * values + is_gain
        elif "embeddings" not in name:
            values *= 1.5 / shape[1] ** 0.5
        arrays[name] = values.astype(np.float32)
    return arrays


def inputs_of(sizes, rows=3, seed=1):
    """Returns captions without padding, whose first id is that of begin, and image tokens, int [rows, N]."""
    random, t = np.random.RandomState(seed), sizes.text_length
    captions = [[2, *random.randint(3, sizes.text_ids - t, length)] for length in (1, t - 2, t - 1)[:rows]]
    return captions, random.randint(0, sizes.image_vocab, (rows, sizes.side**2))


def modules():
    """Returns the module of the original's model. The package itself imports much that this needs not."""
    if "rudalle" not in sys.modules:
        folder = Path(importlib.util.find_spec("rudalle").origin).parent
        for name, path in (("rudalle", folder), ("rudalle.dalle", folder / "dalle")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return importlib.import_module("rudalle.dalle.model")


def model_of(version, arrays):
    """Returns the original with the given weights."""
    import torch

    sizes, heads = CASES[version]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = modules().DalleModel(
            "cpu", sizes.depth, sizes.text_ids, sizes.width, heads, 0.1, 0.1, 0.1, sizes.text_length, sizes.side,
            sizes.image_vocab, cogview_sandwich_layernorm=True, cogview_pb_relax=True, hf_version=version,
        ).eval()  # fmt: skip
    missing, extra = model.load_state_dict({name: torch.tensor(x) for name, x in arrays.items()}, strict=False)
    assert not extra and {name.rpartition("_")[2] for name in missing} == {"mask"}
    return model


def outputs(version):
    """Returns logits, float32 [rows, S, W + V], the loss, and the first tokens that greedy cached decoding draws."""
    import torch

    sizes, _ = CASES[version]
    model = model_of(version, random_arrays(sizes))
    captions, tokens = inputs_of(sizes)
    padded = np.zeros((len(captions), sizes.text_length), np.int64)
    for row, ids in zip(padded, captions):
        row[: len(ids)] = ids
    length = sizes.text_length + sizes.side**2
    mask = torch.tril(torch.ones(len(captions), 1, length, length))
    text = torch.tensor(padded)
    given = torch.cat([text, torch.tensor(tokens)], dim=1)
    drawn, cache = text, None
    with torch.no_grad():
        logits, _ = model(given, mask)
        loss, _ = model(given, mask, return_loss=True)
        for _ in range(_DRAWN):
            last, cache = model(drawn, mask, use_cache=True, cache=cache)
            drawn = torch.cat([drawn, last[:, -1, sizes.text_ids :].argmax(-1, keepdim=True)], dim=1)
    return {"logits": logits.numpy(), "loss": loss.numpy(), "drawn": drawn[:, sizes.text_length :].numpy()}


def golden():
    """Returns the stored outputs by version."""
    names = ("logits", "loss", "drawn")
    with np.load(GOLDEN) as stored:
        return {version: {name: stored[f"{version}/{name}"] for name in names} for version in CASES}


if __name__ == "__main__":
    found = {version: outputs(version) for version in CASES}
    np.savez_compressed(
        GOLDEN, **{f"{version}/{name}": x for version, outs in found.items() for name, x in outs.items()}
    )
