"""Metrics in words, and the commands of the summary."""

import shlex

import numpy as np
import pytest
from ml_collections import ConfigDict

from dalle_jax.configuration.config_files import load
from dalle_jax.reporting.units import with_unit
from dalle_jax.tasks import words


@pytest.mark.parametrize(
    "decibels, word", [(12, "poor"), (21.6, "coarse"), (24, "good"), (30, "close"), (40, "hardly"), (np.nan, "poor")]
)
def test_psnr(decibels, word):
    assert word in words.reconstruction_in_words(decibels) and "dB" in words.reconstruction_in_words(decibels)


@pytest.mark.parametrize(
    "usage, perplexity, tokens, word",
    [
        (0.05, 80, 99_999, "vocab_size"),
        (412 / 2048, 150, 99_999, "412 of 2,048"),
        (412 / 2048, 150, 99_999, "fewer than half"),
        (0.9, 20, 99_999, "dominate"),
        (0.9, 900, 99_999, "good use"),
        (0.05, 80, 640, "too few"),
    ],
)
def test_codebook(usage, perplexity, tokens, word):
    assert word in words.codebook_in_words(usage, perplexity, 2048, tokens)


def test_tokens_and_retrieval():
    said = words.tokens_in_words({"image_nats": np.log(25), "image_accuracy": 0.41}, 2048, masked=True)
    assert "25 of 2,048" in said[0] and "masked" in said[0] and "41%" in said[1]
    assert words.tokens_in_words({"image_nats": np.inf}, 2048, masked=False)
    assert "95%" in words.retrieval_in_words({"retrieval@1": 0.95, "among": 64.0})[0]
    assert "too few" in words.retrieval_in_words({"retrieval@1": 1.0, "among": 1.0})[0]


def test_commands_survive_a_shell():
    """Paths and captions with blanks and quotes arrive as they are."""
    command = words.draw_command("my runs/it's", ["a dog's bone", "b"], "--config.step=best")
    assert shlex.split(command)[4:] == [
        "--config.model_workdir=my runs/it's", "--config.step=best", "--config.prompts=a dog's bone|b"
    ]  # fmt: skip
    config = ConfigDict({"variant": "small", "data": {"source": "folder", "path": "my images", "image_size": 64}})
    parts = shlex.split(words.train_command("prior", config))
    assert parts[3:] == [
        "--config=configs/prior.py:small", "--config.data.source=folder", "--config.data.path=my images",
        "--config.data.image_size=64",
    ]  # fmt: skip
    config.data.path = None
    assert len(shlex.split(words.train_command("prior", config))) == 4


def test_the_next_command_sees_the_same_images_and_captions():
    config = load("configs/dvae.py:small")
    config.data.update({"source": "folder", "path": "own", "fit": "pad", "caption_lines": "first", "workers": 3})
    parts = shlex.split(words.train_command("prior", config))
    assert {"--config.data.fit=pad", "--config.data.caption_lines=first"} <= set(parts)
    assert not any("workers" in part or "splits" in part or "caption_key" in part for part in parts)


@pytest.mark.parametrize("name", ["generate", "evaluate"])
@pytest.mark.parametrize("step", ["best", 750, None])
def test_the_command_accepts_a_step(name, step):
    config = load(f"configs/{name}.py").lock()
    config.step = step
    assert config.step == step


@pytest.mark.parametrize(
    "name, text",
    [
        ("eval/psnr", "21.63 dB"), ("mse", "21.63"), ("image_nats_masked_75_100", "21.63 nats per image token"),
        ("train/seconds_device", "21.63 s"), ("codebook_usage", "2.16e+03%"),
    ],
)  # fmt: skip
def test_units(name, text):
    assert with_unit(name, 21.634) == text
