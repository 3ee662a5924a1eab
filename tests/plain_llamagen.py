"""LlamaGen's image tokenizer as a plain PyTorch module with the names of the published files.

It is written from the published layout, without our network, so that tests can compare both.
"""

import torch
from torch import nn
from torch.nn import functional as F


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(attended.reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, width, up):
        super().__init__()
        self.conv, self.up = nn.Conv2d(width, width, 3, 1 if up else 2, padding=1 if up else 0), up

    def forward(self, x):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, inputs, width, blocks, attended, resample):
        super().__init__()
        self.res = nn.ModuleList(Residual(width if i else inputs, width) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(width) for _ in range(blocks if attended else 0))
        if resample:
            setattr(self, f"{resample}sample", Resample(width, resample == "up"))

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Side(nn.Module):
    def __init__(self, inputs, outputs, widths, blocks, way):
        super().__init__()
        first, last, middle = widths[0], widths[-1], widths[-1 if way == "down" else 0]
        self.way, self.conv_in = way, nn.Conv2d(inputs, first, 3, padding=1)
        attended = [i == (len(widths) - 1 if way == "down" else 0) for i in range(len(widths))]  # the coarsest level
        resampled = [way if i < len(widths) - 1 else "" for i in range(len(widths))]
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, blocks, attended[i], resampled[i]) for i, width in enumerate(widths)
        )
        self.mid = nn.ModuleList([Residual(middle, middle), Attention(middle), Residual(middle, middle)])
        self.norm_out, self.conv_out = norm(last), nn.Conv2d(last, outputs, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        parts = [*self.conv_blocks, *self.mid] if self.way == "down" else [*self.mid, *self.conv_blocks]
        for part in parts:
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codes(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.register_buffer("codebook_used", torch.zeros(65536))


class Tokenizer(nn.Module):
    """The tokenizer of some sizes: fields of `VQGANOptions`, with 1 as the first multiplier."""

    def __init__(self, options):
        super().__init__()
        widths = [options["hidden"] * multiplier for multiplier in options["multipliers"]]
        latent, width = options["latent"], options["code_dim"]
        self.encoder = Side(3, latent, widths, options["blocks"], "down")
        self.decoder = Side(latent, 3, widths[::-1], options["blocks"] + 1, "up")
        self.quantize = Codes(options["vocab_size"], width)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, width, 1), nn.Conv2d(width, latent, 1)

    @torch.no_grad()
    def outputs(self, images):
        """Returns normalised features, tokens and decoded pixels of uint8 images [B, H, W, 3], channels last."""
        features = F.normalize(self.quant_conv(self.encoder(torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)))
        codes = F.normalize(self.quantize.embedding.weight, dim=-1)
        tokens = torch.einsum("bchw,vc->bhwv", features, codes).argmax(-1)
        pixels = self.decoder(self.post_quant_conv(codes[tokens].permute(0, 3, 1, 2)))
        last = lambda tensor: tensor.permute(0, 2, 3, 1).numpy()
        return {"features": last(features), "tokens": tokens.numpy(), "pixels": last(pixels)}
