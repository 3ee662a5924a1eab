"""The DALL-E mini of the package min-dalle with random weights, the golden file that it gives, and a small vocabulary.

    PYTHONPATH=DIR python tests/dalle_mini_originals.py      # writes tests/golden/dalle_mini.npz

DIR holds the package: pip install --no-deps --target DIR min-dalle==0.4.11. It needs torch and emoji. The golden file
holds, for each of `CASES`, states and logits for each caption and for the null text, and the tokens of greedy cached
decoding with guidance. Weights are drawn from a seed by `RandomState`, whose numbers are the same in every version of
NumPy.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

from dalle_jax.pretrained import dalle_mini_layout
from dalle_jax.pretrained.dalle_mini_layout import Sizes

GOLDEN = Path(__file__).parent / "golden" / "dalle_mini.npz"
AVAILABLE = all(name in sys.modules or importlib.util.find_spec(name) for name in ("torch", "min_dalle"))
REASON = "needs torch and min-dalle==0.4.11 (pip install --no-deps --target DIR, PYTHONPATH=DIR)"

BEGIN, PADDING, END, UNKNOWN = range(4)  # text ids
# name → sizes, whether the norms before products have gains, and the row that begins an image
CASES = {
    "gains": (Sizes(2, 32, 4, 40, text_ids=30, image_rows=21, codes=18, text_length=9, side=4), True, 18),
    "published": (Sizes(1, 48, 3, 50, text_ids=150, image_rows=14, codes=13, text_length=7, side=3), False, 13),
}
GUIDANCE = 4.0  # the original's factor of super-conditioning

SUBWORDS = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 127)), "\u0120"]
MERGES = [
    "\u0120 a", "c a", "ca t", "\u0120 cat", "t h", "\u0120 th", "\u0120th e", "f a", "c e", "fa ce", "_ face", "r e",
    "re d", "\u0120 red", "\u0120a r", "e e", "1 0", "\u0120 1", "\u0120 10", "cat s", "\u0120cat s", "a a",
]  # fmt: skip
VOCABULARY = {word: i for i, word in enumerate([*SUBWORDS, *("".join(pair.split()) for pair in MERGES)])}


def write_vocabulary(folder, ending=""):
    """Writes the two files of the text model, as they are published."""
    (folder / f"vocab{ending}.json").write_text(json.dumps(VOCABULARY), encoding="utf-8")
    (folder / f"merges{ending}.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")


def random_arrays(sizes, side, gains=True, seed=0):
    """Returns the state dict of "encoder" or "decoder" with random weights, with which activations stay near 1."""
    random, arrays = np.random.RandomState(seed + len(side) + ord(side[0])), {}
    for name, shape in sizes.shapes(side).items():
        values = random.standard_normal(shape)
        if len(shape) == 1:
            values = 0.2 * values + name.endswith("weight")
        elif "embed" not in name:
            values *= 1.5 / shape[1] ** 0.5
        if gains or not dalle_mini_layout.WITHOUT_GAIN.fullmatch(name):
            arrays[name] = values.astype(np.float32)
    return arrays


def inputs_of(sizes, seed=1):
    """Returns captions with begin and end, one of which is too long and cut, and image tokens, int [rows, N]."""
    random, t = np.random.RandomState(seed), sizes.text_length
    lengths = (0, 1, t - 3, t - 2, t + 2)
    captions = [[BEGIN, *random.randint(3, sizes.text_ids, length), END][:t] for length in lengths]
    return captions, random.randint(0, sizes.codes, (len(captions), sizes.side**2))


def modules():
    """Returns the original's modules of the models and of the text model.

    The package itself is not run, because its import changes settings of torch.
    """
    if "min_dalle" not in sys.modules:
        folder = str(Path(importlib.util.find_spec("min_dalle").origin).parent)
        sys.modules["min_dalle"] = types.ModuleType("min_dalle")
        sys.modules["min_dalle"].__path__ = [folder]
    return tuple(importlib.import_module(f"min_dalle.{name}") for name in ("models", "text_tokenizer"))


def models_of(sizes, arrays):
    """Returns the original's encoder and decoder with the given weights, by side."""
    import torch

    models, _ = modules()
    decoder_module = sys.modules["min_dalle.models.dalle_bart_decoder"]
    kept, decoder_module.IMAGE_TOKEN_COUNT = decoder_module.IMAGE_TOKEN_COUNT, sizes.side**2
    try:
        common = {
            "layer_count": sizes.depth, "embed_count": sizes.width, "attention_head_count": sizes.heads,
            "glu_embed_count": sizes.hidden, "device": "cpu",
        }  # fmt: skip
        made = {
            "encoder": models.DalleBartEncoder(
                text_vocab_count=sizes.text_ids, text_token_count=sizes.text_length, **common
            ),
            "decoder": models.DalleBartDecoder(image_vocab_count=sizes.image_rows - 1, **common),
        }
    finally:
        decoder_module.IMAGE_TOKEN_COUNT = kept
    for side, model in made.items():
        missing, extra = model.load_state_dict(
            {name: torch.tensor(x) for name, x in arrays[side].items()}, strict=False
        )
        assert not extra and all(dalle_mini_layout.WITHOUT_GAIN.fullmatch(name) for name in missing)
        model.eval()
    return made


def outputs(case):
    """Returns what the original computes, by name, with one row for each caption.

    "states": of the encoder for the null text and the caption, float32 [rows, 2, T, D]. "logits": of all rows of the
    head, for the null text and the caption, float32 [rows, 2, N, R]. "drawn": int64 [rows, N].
    """
    import torch

    sizes, gains, start = CASES[case]
    made = models_of(sizes, {side: random_arrays(sizes, side, gains) for side in dalle_mini_layout.SIDES})
    captions, tokens = inputs_of(sizes)
    count, found = sizes.side**2, {"states": [], "logits": [], "drawn": []}
    with torch.no_grad():
        for caption, row in zip(captions, torch.tensor(tokens)):
            text = torch.full((2, sizes.text_length), PADDING)
            text[0, :2] = torch.tensor([BEGIN, END])
            text[1, : len(caption)] = torch.tensor(caption)
            states = made["encoder"](text)
            given = {"attention_mask": text.not_equal(PADDING)[:, None, None, :], "encoder_state": states}
            cache = torch.zeros(sizes.depth, 4, count, sizes.width)
            previous = torch.cat([torch.tensor([start]), row[:-1]])[None]
            logits, _ = made["decoder"](
                attention_state=cache, prev_tokens=previous, token_index=torch.arange(count), **given
            )
            drawn = [start]
            for i in range(count):
                last, cache = made["decoder"](
                    attention_state=cache,
                    prev_tokens=torch.tensor([[drawn[-1]]]),
                    token_index=torch.tensor([i]),
                    **given,
                )
                null, conditional = last[:, -1, : sizes.codes]
                drawn.append(int((null * (1 - GUIDANCE) + conditional * GUIDANCE).argmax()))
            for name, value in (("states", states), ("logits", logits), ("drawn", torch.tensor(drawn[1:]))):
                found[name].append(value.numpy())
    return {name: np.stack(values) for name, values in found.items()}


def golden():
    """Returns the stored outputs by case."""
    with np.load(GOLDEN) as stored:
        return {case: {name: stored[f"{case}/{name}"] for name in ("states", "logits", "drawn")} for case in CASES}


if __name__ == "__main__":
    found = {case: outputs(case) for case in CASES}
    np.savez_compressed(GOLDEN, **{f"{case}/{name}": x for case, outs in found.items() for name, x in outs.items()})
