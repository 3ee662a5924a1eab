"""Tiny evaluations: images of noise, and models with random weights that draw captions or classes, two at once."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import random_model
from PIL import Image

from dalle_jax.data.builders.shapes_captions.scenes import Object, Scene
from dalle_jax.data.labels import Labels
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.evaluation.measure import Options
from dalle_jax.evaluation.reference import ImageReference, read_images
from dalle_jax.evaluation.test_sets import Protocol, TestSet, open_test_set
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.priors.condition import Label
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage
from dalle_jax.token_layout import TokenLayout

COUNT, N = 5, 5
WORDS = ["a red circle", "a blue square", "a green star", "a red circle above a blue square", "red"]
SAMPLING = SamplingOptions(temperature=0.7)
CLASSES = ["class_1", "class_2", "stars"]
OPTIONS = Options(seed=3, blur=(0, 1), candidates=N, candidate_captions=4)


def write_images(folder) -> None:
    """Writes the images and their captions."""
    for i, words in enumerate(WORDS):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(words)


def open_tests(folder) -> TestSet:
    """Opens the test set of a folder that `write_images` filled."""
    data = {"source": "folder", "path": str(folder), "image_size": 16}
    scenes = tuple(Scene((Object(color, None),)) for color in ("red", "green", "blue", "red", "blue"))
    return dataclasses.replace(open_test_set(data, Protocol("all", "first", COUNT)), scenes=scenes)


def make_model(folder) -> TextToImage:
    """Builds the model with a CLIP. Of five rows, batches of two leave one over. The text model goes to a folder."""
    model = random_model.text_to_image(folder)
    sizes = dict(image_size=16, patch=8, image_width=8, image_depth=1, image_heads=1, text_width=8, text_depth=1)
    end = model.text_model.vocab_size
    clip = CLIP(CLIPOptions(**sizes, text_heads=1, embed_dim=6, text_length=9, text_vocab=end + 1, end_id=end))
    scorer = ClipScorer(clip, nn.meta.unbox(clip.init(jax.random.key(0))), model.text_model, rows_at_once=2)
    return dataclasses.replace(model, scorer=scorer)


def make_class_model(folder) -> TextToImage:
    """Builds a model of three classes. The text model of its CLIP goes to a folder."""
    made = make_model(folder)
    layout = TokenLayout(Label(len(CLASSES)), 24, random_model.SIDE, random_model.SIDE)
    prior = MaskGITPrior(layout, MaskGITOptions(random_model.TRUNK, steps=3))
    params = nn.meta.unbox(jax.jit(prior.init)(jax.random.key(1)))
    return dataclasses.replace(made, prior=prior, params=params, text_model=Labels(len(CLASSES), CLASSES))


def write_class_folders(folder) -> None:
    """Writes twelve images of noise, and a damaged one, in folders of three classes."""
    for i in range(12):
        path = folder / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    (folder / "stars" / "damaged.png").write_bytes(b"\x89PNG")


def open_classes(folder, model: TextToImage) -> ImageReference:
    """Opens the images that `write_class_folders` wrote."""
    data = dict(source="folder", path=str(folder), condition="label", caption_from="folder_names", image_size=16)
    return read_images(DataOptions(**data), "all", model.text_model)
