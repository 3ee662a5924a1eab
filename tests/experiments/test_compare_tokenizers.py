"""The metrics of experiments/compare_tokenizers.py against sums by numpy."""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.image_tokenizers.vq import VQOptions, VQTokenizer

PATH = Path(__file__).parents[2] / "experiments" / "compare_tokenizers.py"


def test_metrics_of_a_tokenizer(tmp_path):
    spec = importlib.util.spec_from_file_location("compare_tokenizers", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = VQTokenizer(VQOptions(image_size=16, vocab_size=12, hidden=8, code_dim=4, tokens_per_side=4))
    params = nn.meta.unbox(jax.jit(tokenizer.init)(jax.random.key(0)))
    workdirs.save_tokenizer(tmp_path, tokenizer, params)
    images = np.random.default_rng(0).integers(0, 256, (35, 16, 16, 3), np.uint8)  # more than pass through at once
    metrics, shown = module.measured(str(tmp_path), images, lambda a, b: np.abs(a - b).mean((1, 2, 3)))

    tokens = np.asarray(jax.jit(tokenizer.encode)(params, images))
    again = np.asarray(jax.jit(tokenizer.decode)(params, tokens))
    np.testing.assert_allclose(shown, again * 255, atol=0.51)
    errors = np.mean((images - shown.astype(np.float64)) ** 2, axis=(1, 2, 3))
    assert metrics["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), rel=1e-4)
    assert metrics["codes_used"] == len(np.unique(tokens)) and metrics["codes"] == 12 and metrics["tokens"] == 16
    frequencies = np.unique(tokens, return_counts=True)[1] / tokens.size
    assert metrics["perplexity"] == pytest.approx(np.exp(-np.sum(frequencies * np.log(frequencies))), rel=1e-4)
    expected = np.abs(images.astype(np.float64) - shown).mean() / 127.5
    assert metrics["clip_distance"] == pytest.approx(expected, rel=1e-4)
