"""A MaskGIT `TextToImage` with random weights: images of 16 pixels, 4x4 tokens of 24 codes."""

import jax
from flax import linen as nn

from dalle_jax.data.text import TextModel
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.text_to_image.text_to_image import TextToImage
from dalle_jax.token_layout import TokenLayout

SIZE, SIDE = 16, 4
TRUNK = TransformerOptions(width=16, depth=2, heads=2, dtype="float32", scan=False)
_DVAE = dict(vocab_size=24, hidden=8, groups=1, blocks_per_group=1, codebook_dim=8, stem_factor=4)


def text_to_image(folder) -> TextToImage:
    """Builds a model that draws two images per batch. The text model is written to `folder`."""
    text = TextModel.train(["a red circle above a blue square", "a green star"] * 9, 40, folder / "model")
    tokenizer = DVAETokenizer(DVAEOptions(image_size=SIZE, **_DVAE))
    layout = TokenLayout(Text(text.vocab_size, 8), 24, SIDE, SIDE)
    prior = MaskGITPrior(layout, MaskGITOptions(TRUNK, steps=3))
    init = lambda made, key: nn.meta.unbox(jax.jit(made.init)(jax.random.key(key)))
    # Parameters times eight, so that images and tokens differ visibly.
    tokenizer_params = jax.tree.map(lambda x: 8 * x, init(tokenizer, 0))
    return TextToImage(prior, init(prior, 1), tokenizer, tokenizer_params, text, SIZE, rows_at_once=2)
