"""A transformer in plain PyTorch, the other side of speed comparisons on CPUs and GPUs.

Pre-norm blocks, dense attention by `scaled_dot_product_attention`, and a key-value cache of fixed size.

    B rows    P positions    D width
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention


class Block(nn.Module):
    """Attention and MLP on a stream [B, P, D]."""

    def __init__(self, width: int, heads: int, gated: bool = False):
        """Creates the layers; `gated` gives the MLP a gate and so twice the inner products (GEGLU)."""
        super().__init__()
        self.heads, self.gated = heads, gated
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, (8 if gated else 4) * width), nn.Linear(4 * width, width)

    def forward(self, x, causal: bool = False, cache=None, position=None, seen: int | None = None):
        """Runs over positions.

        Args:
          x: states, [B, P, D].
          causal: whether a position sees only those before it.
          cache: keys and values of all positions, each [B, heads, positions, size]; P positions are written to it.
          position: the positions of x in the cache, int64 [P].
          seen: the number of cached positions to read; None reads all of them under a mask, so that shapes are fixed.
        """
        b, p, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, p, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mask = None
        if cache is not None:
            cache[0].index_copy_(2, position, k)
            cache[1].index_copy_(2, position, v)
            k, v = (each[:, :, :seen] for each in cache)
            if seen is None:
                mask = (torch.arange(k.shape[2], device=x.device) <= position)[None, None, None]
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, p, d))
        hidden = self.up(self.norms[1](x))
        if self.gated:
            hidden, gate = hidden.chunk(2, dim=-1)
            return x + self.down(hidden * gelu(gate))
        return x + self.down(gelu(hidden))


class Model(nn.Module):
    """Embedding, blocks, and an output layer."""

    def __init__(self, width: int, depth: int, heads: int, positions: int, vocab: int, gated: bool = False):
        super().__init__()
        self.embed, self.places = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList([Block(width, heads, gated) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab)

    def forward(self, ids, positions, causal: bool = False, caches=None):
        """Computes all logits, [B, P, vocab], from ids [B, P] at positions [P]."""
        return self.head(self.states(ids, positions, causal, caches))

    def states(self, ids, positions, causal: bool = False, caches=None, seen: int | None = None):
        """Computes the states that the output layer reads, [B, P, D]; arguments as in `Block`."""
        x = self.embed(ids) + self.places(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, causal, caches[i] if caches else None, positions, seen)
        return self.norm(x)

    def logits(self, states, first: int, last: int):
        """Computes the logits of the ids in [first, last) alone."""
        return linear(states, self.head.weight[first:last], self.head.bias[first:last])

    def caches(self, rows: int, positions: int):
        """Returns an empty cache for each block, of the dtype and on the device of the parameters."""
        weight, heads = self.head.weight, self.blocks[0].heads
        shape = (rows, heads, positions, weight.shape[1] // heads)
        return [tuple(weight.new_zeros(shape) for _ in range(2)) for _ in self.blocks]
