"""Imports ru-DALL-E's models (SberAI's Malevich, Emojich, Surrealist and Kandinsky) as workdirs of the prior.

    python -m dalle_jax.pretrained rudalle-malevich --weights=pytorch_model_v3.bin \\
        --weights=vqgan.gumbelf8-sber.model.ckpt --vocabulary=bpe.model --output=runs/malevich

They are autoregressive priors in DALL-E's attention patterns. Captions are Russian. The image tokenizer is a GumbelVQ
with 32 x 32 tokens, see `vqgan`, and the text model is one of YouTokenToMe.

There are two versions of the stream. "v3" is text and image, and the convolutional window ends at the borders of the
grid. "v2" begins with the id of begin and lacks the last image token, the masks begin one position earlier, and the
window continues on the opposite side.

`rudalle_layout` has the names of the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dalle_jax.data.youtokentome import YouTokenToMe
from dalle_jax.errors import PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.pretrained import prior_run, state_dict, vqgan
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.pretrained.rudalle_layout import (
    CONV_MASK,
    VERSIONS,
    Arrays,
    Sizes,
    check,
    convert,
    prior_of,
    sizes_of,
    version_of,
)
from dalle_jax.priors.autoregressive import AutoregressivePrior
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import expanded

_VAE = "vqgan-gumbel-f8"
PUBLISHED = {  # sizes, heads, version, file
    "rudalle-malevich": (Sizes(24, 2048), 16, "v3", "pytorch_model_v3.bin"),
    "rudalle-malevich-v2": (Sizes(24, 2048), 16, "v2", "pytorch_model_v2.bin"),
    "rudalle-emojich": (Sizes(24, 2048), 16, "v2", "pytorch_model.bin"),
    "rudalle-surrealist": (Sizes(24, 2048), 16, "v3", "pytorch_model.bin"),
    "rudalle-kandinsky": (Sizes(64, 3840), 60, "v3", "pytorch_model.bin"),
}
OWN = "rudalle"  # the importer of all other sizes


def load(
    weights: str | os.PathLike, name: str, heads: int | None = None, version: str = "v3", dtype: str = "float32"
) -> tuple[AutoregressivePrior, PyTree]:
    """Loads a transformer from a file.

    Args:
      weights: the file, see `state_dict.read`.
      name: a key of `PUBLISHED`, which determines sizes, heads and version, or `OWN`.
      heads: number of heads of an own model.
      version: of an own model.
      dtype: see `prior_of`.

    Returns:
      The prior and its parameters, see `convert`.

    Raises:
      PretrainedError: the file cannot be read, or does not hold such a model.
    """
    arrays = state_dict.read(weights)
    try:
        if name == OWN:
            sizes = sizes_of(arrays)
            if sizes.width % heads:
                raise PretrainedError(f"The width is {sizes.width}, no multiple of --heads={heads}.")
        else:
            sizes, heads, version, _ = PUBLISHED[name]
            sizes_of(arrays)
        check(arrays, sizes)
        found = version_of(arrays, sizes)
        if found not in (None, version):
            raise PretrainedError(f"{CONV_MASK} is that of version {found}, and {name} is imported as {version}.")
        prior = prior_of(sizes, heads, version, dtype)
        return prior, convert(arrays, sizes, prior)
    except PretrainedError as error:
        raise PretrainedError(f"{weights}: {error}") from error


def _run(name: str, files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports transformer, image tokenizer and text model; see `Importer.run`."""
    prior_run.check_free(output)
    weights, vae = files
    prior, params = load(weights, name, settings.get("heads"), settings.get("version", "v3"), settings["dtype"])
    layout = prior.layout
    tokenizer, tokenizer_params = vqgan.load(vae, None if name == OWN else vqgan.PUBLISHED[_VAE])
    size = layout.height * tokenizer.options.downsample
    tokenizer = VQGANTokenizer(dataclasses.replace(tokenizer.options, image_size=size))
    if tokenizer.vocab_size != layout.image_vocab:
        raise PretrainedError(
            f"{vae} has {tokenizer.vocab_size} codes, and {weights} has embeddings of {layout.image_vocab}. Both files "
            "must be those of one model."
        )
    text_model = _text_model(settings["vocabulary"])
    if text_model.vocab_size != layout.condition.vocab:
        raise PretrainedError(
            f"--vocabulary={settings['vocabulary']} has {text_model.vocab_size} ids, and {weights} has embeddings of "
            f"{layout.condition.vocab}. Both files must be those of one model."
        )
    prior_run.save(output, name, prior, params, tokenizer, tokenizer_params, text_model)
    return f"captions of {layout.condition.length} tokens, {size} pixels, {prior_run.described(prior)}"


def _text_model(path: str | os.PathLike) -> YouTokenToMe:
    """Reads the vocabulary; raises a `PretrainedError`, or a `DataError` if it is damaged."""
    try:
        content = expanded(path).read_bytes()
    except OSError as error:
        raise PretrainedError(f"--vocabulary={path} cannot be read: {error}. Give the file bpe.model.") from error
    return YouTokenToMe(content, str(path))


def _claims(name: str, arrays: Arrays) -> bool:
    if "quantize.proj.weight" in arrays:
        return vqgan.published_name(arrays) == (vqgan.OWN if name == OWN else _VAE)
    try:
        sizes = sizes_of(arrays)
        check(arrays, sizes)
        version = version_of(arrays, sizes)
    except PretrainedError:
        return False
    if name == OWN:
        return all(sizes != published for published, *_ in PUBLISHED.values())
    published, _, wanted, _ = PUBLISHED[name]
    return sizes == published and version in (None, wanted)


def _importer(name: str, title: str, parameters: int | None, source: str, licence: str) -> Importer:
    settings = [Setting("vocabulary", str, "File of the text model (bpe.model).", required=True)]
    settings.append(Setting("dtype", str, prior_run.DTYPE_HELP, "float32", choices=prior_run.DTYPES))
    if name == OWN:
        settings.append(Setting("heads", int, "Number of heads, which the files do not determine.", required=True))
        settings.append(Setting("version", str, "Version of the stream.", "v3", choices=VERSIONS))
    weights = PUBLISHED[name][3] if name in PUBLISHED else "pytorch_model.bin"
    return Importer(
        name=name,
        title=title,
        parameters=parameters,
        licence=licence,
        source=source,
        files=(weights, "vqgan.gumbelf8-sber.model.ckpt"),
        use="--config.model_workdir",
        run=functools.partial(_run, name),
        claims=functools.partial(_claims, name),
        settings=tuple(settings),
    )


_TITLE = "ru-DALL-E {}, 256 x 256 pixels, Russian captions, with its image tokenizer"
_REPOSITORIES = "huggingface.co/{}, and huggingface.co/shonenkov/rudalle-utils"
_OF_VAE = 68_995_971
_LARGE = 1_310_410_880 + _OF_VAE
_APACHE = "Apache-2.0 (of the code)"
IMPORTERS = (
    *(
        _importer(name, _TITLE.format(title), parameters, _REPOSITORIES.format(repository), _APACHE)
        for name, title, parameters, repository in (
            ("rudalle-malevich", "Malevich", _LARGE, "ai-forever/rudalle-Malevich"),
            ("rudalle-malevich-v2", "Malevich, version 2", _LARGE, "ai-forever/rudalle-Malevich"),
            ("rudalle-emojich", "Emojich, fine-tuned on emoji", _LARGE, "ai-forever/rudalle-Emojich"),
            ("rudalle-surrealist", "Surrealist", _LARGE, "shonenkov-AI/rudalle-xl-surrealist"),
            ("rudalle-kandinsky", "Kandinsky (12B)", 11_519_306_624 + _OF_VAE, "shonenkov-AI/Kandinsky"),
        )
    ),
    _importer(OWN, "Another model in ru-DALL-E's layout, such as your own training", None, "yours", "yours"),
)
