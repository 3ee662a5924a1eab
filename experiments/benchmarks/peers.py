"""Times other implementations at the sizes of our benchmarks: plain PyTorch and OpenAI's package `DALL-E` 0.1.

Install `pip install torch` and `pip install --no-deps DALL-E==0.1 attrs requests`. `speed.py` compares their times with
ours. Plain PyTorch (`plain_torch.py`) has dense attention and a key-value cache, of which a step reads the filled part.
It computes the logits that are needed and no others.
"""

import sys

import _measure as m  # first: it limits the threads
import _prior
import torch
from dall_e.decoder import Decoder
from dall_e.encoder import Encoder
from plain_torch import Model
from torch.nn.functional import cross_entropy, one_hot

torch.set_num_threads(m.THREADS)


def transformer(smoke: bool):
    """Returns a model of the sizes of `_prior.build`, and its layout."""
    prior = _prior.build(smoke=smoke)
    layout, trunk = prior.layout, prior.options.trunk
    vocab = layout.condition.ids + layout.image_vocab
    return Model(trunk.width, trunk.depth, trunk.heads, layout.length, vocab, gated=True), layout


def sample(rows: int, default_runs: int, runs: int, smoke: bool) -> dict:
    """Draws all image tokens of captions, with top_k of half the vocabulary."""
    model, layout = transformer(smoke)
    first, last = layout.condition.ids, layout.condition.ids + layout.image_vocab
    text = torch.randint(0, layout.condition.vocab, (rows, layout.condition.length))
    caches, places = model.eval().caches(rows, layout.length), torch.arange(layout.length)

    @torch.inference_mode()
    def draw():
        ids, place, drawn = text, places[: layout.condition.length], []
        for n in range(layout.image_length):
            seen = layout.condition.length + n
            states = model.states(ids, place, causal=n == 0, caches=caches, seen=seen)[:, -1]
            top, where = model.logits(states, first, last).topk(layout.image_vocab // 2, dim=-1)
            noise = -torch.empty_like(top).exponential_().log()
            drawn.append(where.gather(-1, (top + noise).argmax(-1, keepdim=True)))
            ids, place = first + drawn[-1], places[seen : seen + 1]
        return torch.cat(drawn, dim=1)

    assert draw().shape == (rows, layout.image_length)
    line = m.measure(draw, runs or default_runs, warmup=0)
    return line | {"params": sum(p.numel() for p in model.parameters()), "shape": {"batch": rows}}


def train(rows: int, default_runs: int, runs: int, smoke: bool) -> dict:
    """Makes an update by AdamW."""
    model, layout = transformer(smoke)
    split, vocab = layout.condition.ids, layout.condition.ids + layout.image_vocab
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    text = torch.randint(0, layout.condition.vocab, (rows, layout.condition.length))
    ids = torch.cat([text, split + torch.randint(0, layout.image_vocab, (rows, layout.image_length))], dim=1)
    places, t = torch.arange(layout.length), layout.condition.length

    def step():
        states = model.states(ids, places, causal=True)
        words = model.logits(states[:, : t - 1], 0, split).flatten(0, 1)
        image = model.logits(states[:, t - 1 : -1], split, vocab).flatten(0, 1)
        loss = cross_entropy(words, ids[:, 1:t].flatten()) / 8
        loss = loss + cross_entropy(image, (ids[:, t:] - split).flatten()) * 7 / 8
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach().numpy()

    return m.measure(step, runs or default_runs) | {"shape": {"batch": rows}}


def openai(what: str, default_runs: int, runs: int, smoke: bool) -> dict:
    """Encodes or decodes one image of 256 pixels by OpenAI's dVAE with random weights."""
    side = 32 if smoke else 256
    if what == "encode":
        encoder, pixels = Encoder(), torch.rand(1, 3, side, side)
        run = lambda: encoder(pixels).argmax(dim=1)
    else:
        decoder, tokens = Decoder(), torch.randint(0, 8192, (1, side // 8, side // 8))
        run = lambda: decoder(one_hot(tokens, num_classes=8192).permute(0, 3, 1, 2).float())

    with torch.inference_mode():
        return m.measure(run, runs or default_runs) | {"shape": {"image": side}}


CASES = {
    "torch_sample_b1": lambda runs, smoke: sample(1, 3, runs, smoke),
    "torch_sample_b8": lambda runs, smoke: sample(8, 2, runs, smoke),
    "torch_train_b2": lambda runs, smoke: train(2, 5, runs, smoke),
    "openai_encode_256_b1": lambda runs, smoke: openai("encode", 5, runs, smoke),
    "openai_decode_256_b1": lambda runs, smoke: openai("decode", 5, runs, smoke),
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
