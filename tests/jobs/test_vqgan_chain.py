"""A VQGAN's training from its config to a prior that reads its tokens, and what is rejected before it begins."""

import jax
import numpy as np
import pytest
from own_images import TINY_PRIOR

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.errors import ConfigError, ConfigMismatch, UserError
from dalle_jax.jobs import train as train_job

SHORT = dict(steps=2, eval_batches=1, cadence__eval=2, cadence__preview=2, cadence__checkpoint=1)
TINY = {key.replace(".", "__"): value for key, value in TINY_PRIOR.items()}
SMALL = dict(data__image_size=16, model__multipliers=(1, 2), discriminator__layers=1, objective__init="random")
IN_GAME = dict(schedules__adversarial_weight__wait_steps=1)


def test_a_training_and_its_resumption(load):
    config = load("vqgan.py:small", **SHORT, **SMALL, **IN_GAME)
    train_job.run(config, "run")
    with Checkpoints("run", read_only=True) as checkpoints:
        stored = {step: checkpoints.restore_params(step) for step in checkpoints.steps}
    assert sorted(stored) == [1, 2]
    tokenizer, params = workdirs.load_tokenizer("run")
    assert set(stored[2]) - set(params) == {"discriminator", "running"}
    jax.tree.map(np.testing.assert_array_equal, params, {name: stored[2][name] for name in params})
    tokens = jax.jit(tokenizer.encode)(params, np.zeros((1, 16, 16, 3), np.uint8))
    assert (tokenizer.kind, tokens.shape) == ("vqgan", (1, 8, 8))

    with pytest.raises(ConfigMismatch, match=r"discriminator\.filters"):
        train_job.run(load("vqgan.py:small", **SHORT, **SMALL, **IN_GAME, discriminator__filters=4), "run")
    config.steps = 3
    train_job.run(config, "run")
    assert workdirs.latest_step("run") == 3


@pytest.mark.slow
def test_a_prior_trains_on_its_tokens(load):
    train_job.run(load("vqgan.py:small", **SHORT, **SMALL), "run")
    prior = load("prior.py:small", **SHORT, tokenizer_from="run", data__image_size=16, **TINY)
    train_job.run(prior, "prior")
    (tokenizer, _), (frozen, copied) = (workdirs.load_tokenizer(name) for name in ("run", "prior"))
    assert frozen == tokenizer and "discriminator" not in copied
    assert workdirs.latest_step("prior") == 2


def test_starts_from_a_frozen_tokenizer(load):
    """Such as an imported one: its parameters begin the training, next to a new discriminator."""
    begun = load("vqgan.py:small", **{**SHORT, "steps": 1}, **SMALL)
    train_job.run(begun, "first")
    tokenizer, params = workdirs.load_tokenizer("first")
    workdirs.save_tokenizer("imported", tokenizer, jax.tree.map(lambda x: x + 1, params))
    flat = dict(schedules__learning_rate__peak=1e-12, schedules__learning_rate__end=0.0, ema__decay=0.0)
    train_job.run(load("vqgan.py:small", **{**SHORT, "steps": 1}, **SMALL, **flat, start_from="imported"), "second")
    _, continued = workdirs.load_tokenizer("second")
    for part in ("encoder", "decoder"):  # codes follow their features at once
        jax.tree.map(
            lambda new, old: np.testing.assert_allclose(new, old + 1, atol=1e-6), continued[part], params[part]
        )
    with pytest.raises(ConfigError, match="task 'vqgan'.*'vq'"):
        train_job.run(load("dvae.py:small", **SHORT, data__image_size=16, start_from="imported"), "third")


@pytest.mark.parametrize(
    ("changes", "token"),
    [
        ({"objective__perceptual_weight": 1.0}, r"objective\.lpips"),
        ({"objective__perceptual_weight": 1.0, "objective__lpips": "nothing"}, "'nothing'"),
        ({"objective__perceptual_weight": 1.0, "objective__clip": "nowhere"}, r"objective\.clip='nowhere'"),
        ({"objective__clip": "nowhere"}, r"objective\.perceptual_weight"),
        ({"objective__perceptual_weight": 1.0, "objective__clip": "a", "objective__lpips": "b"}, r"one perceptual"),
        ({"start_from": "nowhere"}, r"start_from='nowhere'"),
        ({"discriminator__layers": 4}, r"discriminator\.layers"),
        ({"optimizer__b1": 1.0}, r"optimizer\.b1"),
        ({"schedules__adversarial_weight__wait_steps": -1}, r"adversarial_weight\.wait_steps"),
        ({"model__norm_groups": 7}, r"model\.norm_groups"),
    ],
)
def test_rejected_before_the_training(load, trained, changes, token):
    with pytest.raises(UserError, match=token):
        train_job.run(load("vqgan.py:small", **changes), "run")
    assert not trained and not workdirs.has_config("run")
