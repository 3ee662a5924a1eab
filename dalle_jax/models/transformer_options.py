"""Options of the transformer that both priors and BEiT share.

D width    H heads    K head size    F hidden width of the MLP
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention import kernels
from dalle_jax.models.attention.patterns import ATTENDED, HEADS

NORMS = ("layernorm", "rmsnorm")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "normformer")
ACTIVATIONS = {
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), False),
    "gelu_tanh": (functools.partial(jax.nn.gelu, approximate=True), False),
    "geglu": (functools.partial(jax.nn.gelu, approximate=False), True),
    "swiglu": (jax.nn.silu, True),
}
BRANCH = "branch_{}"  # name of the output of a branch, such as "branch_mlp", for `REMAT`
POSITIONS = ("learned", "table", "rotary", "relative")
DTYPES = ("float32", "bfloat16")
_MOST = {"width": 2**16, "depth": 1024, "heads": 2**12, "head_dim": 2**12, "mlp_ratio": 2**10}  # no device holds more
_MOST |= {"norm_epsilon": 1, "final_norms": 2, "layer_scale": 1000}
_KEEP = jax.checkpoint_policies
REMAT = {  # from least to most memory
    "full": _KEEP.nothing_saveable,
    "attended": _KEEP.save_only_these_names(ATTENDED),
    "mlp": _KEEP.save_only_these_names(ATTENDED, BRANCH.format("mlp")),
    "branches": _KEEP.save_only_these_names(ATTENDED, *map(BRANCH.format, ("attention", "cross", "mlp"))),
    "attention": _KEEP.save_only_these_names(HEADS, ATTENDED),
    "dots": _KEEP.save_from_both_policies(
        _KEEP.dots_with_no_batch_dims_saveable, _KEEP.save_only_these_names(ATTENDED)
    ),
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """Hyper-parameters of the trunk.

    Attributes:
      width: D.
      depth: number of layers.
      heads: H.
      head_dim: K; 0 for width / heads.
      mlp_ratio: F / D.
      norm: "layernorm" or "rmsnorm".
      norm_placement: norms of a branch f. "pre": x + f(norm(x)). "post": norm(x + f(x)), as in MaskGIT's reference.
        "sandwich": x + norm(f(norm(x))), as in CogView (arXiv 2105.13290, section 2.4) and ru-DALL-E. "normformer":
        that for attention, and for the MLP a norm before it and one of its hidden units, as in DALL-E mini
        (NormFormer, arXiv 2110.09456).
      norm_epsilon: added to the variance in all norms but those of `qk_norm`; 0 for 1e-5 in layer norms and 1e-6 in RMS
        norms.
      embedding_norm: apply a norm to the sum of token and position embeddings, before dropout.
      final_norms: number of norms after the last layer: 1, 0 as in MaskGIT's reference, or 2 as in ru-DALL-E.
      activation: "gelu" (exact), "gelu_tanh" (its approximation), "geglu" or "swiglu". The last two have a gate, and so
        two input matrices.
      qkv_bias: whether queries, keys and values have biases.
      qk_norm: apply RMS norm with a learned gain to queries and keys.
      positions: "learned" (text position; image row + column), "table" (one vector for each position of text and image)
        or "rotary" (the coordinates of "learned", as rotations of queries and keys). Or "relative": biases of
        attention, see `relative_positions.py`. Priors cannot have it, because decoding has no such biases.
      dropout: dropout rate on the embeddings and on the output of each branch.
      drop_path: rate at which training leaves out a whole branch for an example (stochastic depth, arXiv 1603.09382):
        0 in the first layer, rising linearly to this rate in the last one.
      layer_scale: initial value of a learned gain for each channel of a branch's output (LayerScale, arXiv 2103.17239);
        0 for no gain.
      dtype: dtype of products and activations. Parameters, norms, softmax and losses are always float32.
      float32_residual: keep the residual stream in float32: the embeddings, and the sum of all branch outputs (DALL-E,
        figure 4). The gradients along this path are then float32, too, because a gradient has the dtype of its value.
        Each branch still reads and returns `dtype`.
      float32_logits: compute logits from float32 states and float32 heads, with products in full precision (DALL-E,
        appendix D.2). Otherwise both are cast to `dtype` first; sum and result are float32 in both cases.
      remat: activations of each scanned unit that are kept for the backward pass, in addition to its input.
        "full": none, all are recomputed.
        "attended": the output of attention, so that the splash kernel does not run again.
        "mlp": also the output of each MLP, so that its last product is not computed again.
        "branches": also the output of the other branches, for the same reason.
        "attention": the output of attention, queries, keys and values.
        "dots": all products of dense layers, and the output of attention.
        "none": all, nothing is recomputed.
      scan: whether repeated layers run as one scan.
      attention_kernel: implementation of attention. "xla" runs everywhere, "splash" on TPUs and "cudnn" on NVIDIA GPUs.
        "auto" chooses by device, dtype and head size (`kernels.chosen`).
      attention_dropout: dropout rate of the attention probabilities (`xla.dropped`). Training then runs `xla.attend` on
        all devices, because the other kernels never have the probabilities in memory.
    """

    width: int = 512
    depth: int = 8
    heads: int = 8
    head_dim: int = 0
    mlp_ratio: float = 4.0
    norm: str = "layernorm"
    norm_placement: str = "pre"
    norm_epsilon: float = 0.0
    embedding_norm: bool = False
    final_norms: int = 1
    activation: str = "gelu"
    qkv_bias: bool = False
    qk_norm: bool = False
    positions: str = "learned"
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 0.0
    dtype: str = "bfloat16"
    float32_residual: bool = False
    float32_logits: bool = False
    remat: str = "none"
    scan: bool = True
    attention_kernel: str = "auto"
    attention_dropout: float = 0.0

    def __post_init__(self):
        choices = {"norm": NORMS, "activation": ACTIVATIONS, "positions": POSITIONS, "remat": REMAT}
        choices |= {"attention_kernel": kernels.KERNELS, "dtype": DTYPES, "norm_placement": NORM_PLACEMENTS}
        check(
            self, "model.trunk", positive=["width", "depth", "heads", "mlp_ratio"],
            at_least_0=["head_dim", "norm_epsilon", "final_norms", "layer_scale"],
            below_1=["dropout", "drop_path", "attention_dropout"], most=_MOST, choices=choices,
        )  # fmt: skip
        if self.attention_dropout and self.attention_kernel in ("splash", "cudnn"):
            raise ConfigError(
                f"config.model.trunk.attention_dropout is {self.attention_dropout} with attention_kernel="
                f"{self.attention_kernel!r}, which has no dropout. Set --config.model.trunk.attention_kernel=auto or "
                "attention_dropout=0."
            )
        if self.positions == "relative" and self.attention_kernel in ("splash", "cudnn"):
            raise ConfigError(
                f"config.model.trunk.positions is 'relative' with attention_kernel={self.attention_kernel!r}, which "
                "has no biases. Set --config.model.trunk.attention_kernel=auto or positions=learned."
            )
        if self.hidden < 1:
            raise ConfigError(
                f"config.model.trunk.mlp_ratio is {self.mlp_ratio}, which leaves no hidden unit at width {self.width}; "
                "expected a positive number, such as 4."
            )
        if not self.head_dim and self.width % self.heads:
            raise ConfigError(
                f"config.model.trunk.width {self.width} is not a multiple of config.model.trunk.heads {self.heads}; "
                f"change one of them: the width to {self.heads * max(round(self.width / self.heads), 1)}, for example."
            )
        if self.positions == "rotary" and self.size_per_head % 4:
            size = self.size_per_head
            raise ConfigError(f"Rotary positions need a head size (width / heads) divisible by 4, not {size}.")
        kernels.check_cudnn(self.attention_kernel, self.dtype, self.size_per_head, "model.trunk")

    def check_decoding(self) -> None:
        """Checks that a prior can decode with these options; raises a `ConfigError`."""
        if self.positions == "relative":
            raise ConfigError(
                "config.model.trunk.positions is 'relative', which no prior can decode with. Set "
                "--config.model.trunk.positions=learned, table or rotary."
            )

    @property
    def size_per_head(self) -> int:
        """K, the size of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def hidden(self) -> int:
        """F, the hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def stream_dtype(self) -> str:
        """Dtype of the residual stream."""
        return "float32" if self.float32_residual else self.dtype

    @property
    def states_dtype(self) -> str:
        """Dtype of the states that the heads read: the output of the last norm."""
        return "float32" if self.float32_logits else self.dtype
