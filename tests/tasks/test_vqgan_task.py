"""Training of the VQGAN: the gradients of its two players, their start, codes, a few images, and what a prior reads.

tests/tasks/test_vqgan_originals.py compares the losses with the authors' code.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_vq_task import draw_images

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.adversarial import lecam_penalty, r1_penalty, with_gradient
from dalle_jax.image_tokenizers.discriminator import Discriminator, DiscriminatorOptions
from dalle_jax.image_tokenizers.vector_quantizer import entropy_loss, move_dead
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions, make_optimizer
from dalle_jax.optim.schedules import Constant, Delayed
from dalle_jax.tasks.perceptual import ClipDistance
from dalle_jax.tasks.vqgan import VQGANTask
from dalle_jax.tasks.vqgan_losses import VQGANObjectiveOptions
from dalle_jax.training.step import make_init, make_train_step

OPTIONS = VQGANOptions(
    image_size=16, vocab_size=24, code_dim=6, latent=8, hidden=8, multipliers=(1, 2), blocks=1, attention_levels=(),
    norm_groups=4,
)  # fmt: skip
GUMBEL = dataclasses.replace(OPTIONS, quantizer="gumbel")
DISCRIMINATOR = DiscriminatorOptions(layers=1, filters=8, norm="group")


def make_task(options=OPTIONS, discriminator=DISCRIMINATOR, start=None, weights=(0.5, 1.0), **objective):
    """`weights`: of the generator's and the discriminator's adversarial losses, numbers or schedules."""
    made = [one if callable(one) else Constant(one) for one in weights]
    schedules = dict(zip(("adversarial_weight", "discriminator_weight"), made))
    if options.quantizer == "gumbel":
        schedules |= {"temperature": Constant(0.5), "kl_weight": Constant(0.01)}
    objective = VQGANObjectiveOptions(**{"perceptual_weight": 0.0, **objective})
    return VQGANTask(VQGANTokenizer(options), objective, discriminator, schedules, start_images=start)


def new_params(task, seed=0):
    return nn.meta.unbox(jax.jit(task.init)(jax.random.key(seed)))


def batch(rows=8):
    return {"image": draw_images(rows), "valid": np.ones(rows, bool)}


# Steps with other weights of the generator's and the discriminator's losses, so that one program has them all.
BOTH, NEITHER, DISCRIMINATOR_ONLY, GENERATOR_ONLY = range(4)
STEPS = (lambda step: jnp.array([0.5, 0.0, 0.0, 0.5])[step], lambda step: jnp.array([1.0, 0.0, 1.0, 0.0])[step])


@functools.cache
def update_of(options=OPTIONS, **objective):
    """The loss with its gradients, compiled."""
    return jax.jit(jax.value_and_grad(make_task(options, weights=STEPS, **objective).loss, has_aux=True))


def gradients(params, step=BOTH, options=OPTIONS, **objective):
    update = update_of(options, **objective)
    (loss, scalars), grads = update(params, {}, batch(), jax.random.key(0), jnp.int32(step))
    own = {name: grads[name] for name in grads if name not in ("discriminator", "running")}
    return loss, scalars, own, grads["discriminator"]


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def same(left, right, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), left, right)


def different(left, right):
    return largest(jax.tree.map(jnp.subtract, left, right)) > 1e-6


@pytest.fixture(scope="module")
def params():
    return new_params(make_task())


class Run:
    """A training on one batch of images."""

    def __init__(self, task, mesh=(1, 1, 1), **optimizer):
        self.mesh = make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])
        options = OptimizerOptions(**{"b1": 0.5, "b2": 0.9, "parts": {"discriminator": {}}, **optimizer})
        average, transformation = AverageOptions(decay=0.9), make_optimizer(options)
        init, abstract = make_init(task, transformation, average, self.mesh, 0)
        rate = {**task.schedules, "learning_rate": Constant(3e-3)}
        self.step = make_train_step(task, transformation, options, average, rate, abstract)
        with on_mesh(self.mesh):
            self.state = init()

    def train(self, steps, state=None):
        """Returns the state after `steps` updates, and keeps the scalars of each."""
        state, self.scalars = self.state if state is None else state, []
        with on_mesh(self.mesh):
            for _ in range(steps):
                state, scalars = self.step(state, {}, {"image": draw_images(8)}, jax.random.key(0))
                self.scalars.append(dict(zip(scalars.names, np.asarray(scalars.values).tolist())))
        return state


# -- two players --------------------------------------------------------------------------------------------------


def test_each_player_has_its_own_gradient(params):
    """One backward pass over the sum of the losses mixes nothing, to the last digits."""
    loss, scalars, generator, discriminator = gradients(params)
    _, _, alone, _ = gradients(params, NEITHER)
    _, _, without_generator, discriminator_only = gradients(params, DISCRIMINATOR_ONLY)
    _, _, generator_only, idle = gradients(params, GENERATOR_ONLY)
    same(without_generator, alone, rtol=1e-5, atol=1e-7)
    same(generator_only, generator, rtol=1e-5, atol=1e-7)
    same(discriminator_only, discriminator, rtol=1e-5, atol=1e-7)
    assert different(generator, alone) and largest(discriminator) > 1e-4 and largest(idle) == 0
    game = 0.5 * scalars["adaptive_weight"] * scalars["generator_loss"]
    quantisation = scalars["codebook_loss"] + 0.25 * scalars["commitment"]
    assert loss == pytest.approx(float(scalars["pixel_loss"] + game + quantisation), rel=1e-5)


def test_the_gradients_are_those_of_plain_losses(params):
    """Without the short cut over the reconstruction's gradient, which saves a second pass through the discriminator."""
    tokenizer, network = VQGANTokenizer(OPTIONS), Discriminator(DISCRIMINATOR)
    pixels = batch()["image"].astype(jnp.float32) / 127.5 - 1

    def plain(own, discriminator):
        features = tokenizer.features(own, batch()["image"])
        codes = tokenizer.codebook(own)
        chosen = codes[tokenizer.encode(own, batch()["image"])]
        decoded = tokenizer.decode_vectors(own, features + jax.lax.stop_gradient(chosen - features))
        fixed = jax.lax.stop_gradient
        loss = jnp.mean(jnp.abs(decoded - pixels)) - 0.5 * jnp.mean(network.apply({"params": discriminator}, decoded))
        return loss + jnp.mean((chosen - fixed(features)) ** 2) + 0.25 * jnp.mean((fixed(chosen) - features) ** 2)

    own = {name: params[name] for name in params if name not in ("discriminator", "running")}
    expected, grads = jax.jit(jax.value_and_grad(plain))(own, params["discriminator"])
    loss, _, found, _ = gradients(params, adaptive=False)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    same(found, grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pixel_range", ["signed", "unit"])
def test_losses_see_the_same_pixels_as_the_evaluation(pixel_range):
    """The squared error of the loss is that of decoded tokens, whatever the scale of the network."""
    options = dataclasses.replace(OPTIONS, pixel_range=pixel_range)
    task = make_task(options, weights=(0.0, 0.0), pixel_loss="l2")
    params = new_params(task)
    _, scalars = jax.jit(task.loss)(params, {}, batch(), jax.random.key(0), jnp.int32(0))
    unclipped = task.tokenizer.signed(task.tokenizer.decode_vectors(params, _codes_of(task, params)))
    pixels = batch()["image"] / 127.5 - 1
    np.testing.assert_allclose(scalars["pixel_loss"], np.mean((unclipped - pixels) ** 2), rtol=1e-5)
    assert float(scalars["psnr"]) == pytest.approx(
        task.evaluate(params, {}, [batch()], jax.random.key(0))["psnr"], rel=1e-4
    )


def _codes_of(task, params):
    return task.tokenizer.codebook(params)[task.tokenizer.encode(params, batch()["image"])]


def test_the_discriminator_starts_with_its_schedule():
    """Before, it stays as it is, and the log has zeros. Then the generator's weight rises."""
    wait = Delayed(value=1.0, wait_steps=3)
    run = Run(make_task(weights=(Delayed(value=0.5, wait_steps=3, warmup_steps=1), wait)))
    state = run.train(3)
    same(state.params["discriminator"], run.state.params["discriminator"])
    assert different(state.params["decoder"], run.state.params["decoder"])
    for name in ("generator_loss", "discriminator_loss", "adaptive_weight", "adversarial_weight"):
        assert [each[name] for each in run.scalars] == [0, 0, 0], name
    assert float(state.params["running"]["real"]) == 0
    after = run.train(3, state)
    assert different(after.params["discriminator"], state.params["discriminator"])
    assert [each["adversarial_weight"] for each in run.scalars] == [0.25, 0.5, 0.5]
    assert [each["discriminator_weight"] for each in run.scalars] == [1, 1, 1]
    assert all(each["discriminator_loss"] > 0 and each["adaptive_weight"] > 0 for each in run.scalars)
    assert float(after.params["running"]["real"]) != 0


def test_penalties():
    pixels = jax.random.normal(jax.random.key(0), (3, 4, 4, 3))
    weights = jax.random.normal(jax.random.key(1), (4, 4, 3))
    linear = lambda x: jnp.sum(x * weights[None], axis=-1)  # 16 patches of one pixel
    assert r1_penalty(linear, pixels) == pytest.approx(float(jnp.sum((weights / 16) ** 2)), rel=1e-5)
    logits = jnp.array([[[2.0, 4.0]]]), jnp.array([[[-1.0, -3.0]]])
    assert lecam_penalty(*logits, 1.0, -1.0) == pytest.approx(4.0**2 + 3.0**2)
    assert lecam_penalty(*logits, -5.0, 5.0) == 0


def test_penalties_are_the_discriminators(params):
    penalised = dict(r1=3.0, lecam=2.0)
    _, scalars, generator, discriminator = gradients(params, **penalised)
    _, without, plain, unpenalised = gradients(params)
    same(generator, plain, rtol=1e-5, atol=1e-6)
    assert different(discriminator, unpenalised)
    lecam = lecam_penalty(*(scalars[name].reshape(1, 1, 1) for name in ("logits_real", "logits_fake")), 0.0, 0.0)
    both = 3.0 * scalars["r1_penalty"] + 2.0 * float(lecam)
    assert float(scalars["discriminator_loss"] - both) == pytest.approx(float(without["discriminator_loss"]), abs=1e-4)


def test_a_value_with_a_given_gradient():
    value, grad = jax.value_and_grad(lambda x: with_gradient(x[0] * 5, 2 * x, 3 * x))(jnp.array([1.0, 2.0]))
    assert value == 5 and grad.tolist() == [6.0, 12.0]


def test_parts_of_the_optimizer_are_clipped_alone():
    """A large gradient of one player does not shorten the step of the other one."""
    tree = {"decoder": {"kernel": jnp.ones(4)}, "discriminator": {"kernel": jnp.full(4, 100.0)}}
    step = lambda **options: make_optimizer(OptimizerOptions(b1=0.0, b2=0.0, eps=1.0, clip_norm=1.0, **options))
    for parts, share in (({"discriminator": {}}, 1.0), ({}, 0.01)):
        transformation = step(parts=parts)
        updates, _ = transformation.update(tree, transformation.init(tree), tree)
        clipped = share * 0.5 * (1 if parts else 1 / np.sqrt(1 + 1e-4))
        assert float(updates["decoder"]["kernel"][0]) == pytest.approx(clipped / (clipped + 1), rel=1e-4)


def test_parts_of_the_optimizer_have_their_own_betas():
    random = np.random.RandomState(0)
    trees = [{name: {"kernel": jnp.array(random.standard_normal(3))} for name in "ab"} for _ in range(4)]
    own = make_optimizer(OptimizerOptions(b1=0.9, b2=0.99, parts={"b": {"b1": 0.5, "b2": 0.8, "clip_norm": 0.1}}))
    clip = optax.clip_by_global_norm(0.1)
    others = {"a": optax.scale_by_adam(0.9, 0.99), "b": optax.chain(clip, optax.scale_by_adam(0.5, 0.8))}
    state, states = own.init(trees[0]), {name: others[name].init(trees[0][name]) for name in "ab"}
    for tree in trees:
        found, state = own.update(tree, state, tree)
        for name in "ab":
            expected, states[name] = others[name].update(tree[name], states[name])
            np.testing.assert_allclose(found[name]["kernel"], expected["kernel"], rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(make_optimizer(OptimizerOptions()).init(trees[0]))


@pytest.mark.parametrize(
    ("parts", "key"),
    [({"a": {"b1": 1.0}}, "parts.a.b1"), ({"a": {"lr": 1.0}}, "'lr'"), ({"a": {"clip_norm": -1.0}}, "clip_norm"),
     ({"a": 3.0}, "parts")],
)  # fmt: skip
def test_wrong_parts_are_rejected(parts, key):
    with pytest.raises(ConfigError, match=key):
        OptimizerOptions(parts=parts)


def test_a_part_that_the_model_lacks_is_rejected():
    own = make_optimizer(OptimizerOptions(parts={"discriminater": {}}))
    tree = {"discriminator": {"kernel": jnp.ones(2)}}
    with pytest.raises(ConfigError, match="discriminater"):
        own.update(tree, own.init(tree), tree)


# -- codes --------------------------------------------------------------------------------------------------------


def test_entropy_loss():
    codes = np.eye(4, dtype=np.float32) * 9
    even, one = entropy_loss(codes, codes, 0.1), entropy_loss(codes[:1].repeat(4, 0), codes, 0.1)
    assert even == pytest.approx(-np.log(4), abs=1e-3) and one == pytest.approx(0, abs=1e-3)
    unsure = entropy_loss(np.zeros((4, 4), np.float32), codes, 0.1)
    assert unsure == pytest.approx(0, abs=1e-3), "neither sure nor one-sided"


def test_dead_codes_move_to_large_errors():
    vectors = np.arange(8, dtype=np.float32)[:, None] * np.ones((8, 3), np.float32)
    uses, errors = np.array([0, 1, 2, 1, 1, 1, 1, 1.0]), np.array([5, 0, 3, 0, 0, 0, 0, 0.0])
    moved = move_dead(vectors, uses, errors, jax.random.key(0), 0.1)
    same(moved["vectors"][1:], vectors[1:])
    assert np.abs(moved["vectors"][0] - 2).max() < 1, "next to the code with the only error of one in use"
    assert (float(moved["uses"][0]), float(moved["errors"][2])) == pytest.approx((0.2, 1.5))
    same(move_dead(vectors, uses, errors, jax.random.key(0), 0.0)["vectors"], vectors)


def test_codes_of_both_kinds_after_an_update(params):
    """Averages come closer to their features. A code without uses is moved, whatever trains the others."""
    _, scalars, own, _ = gradients(params)
    uses = np.asarray(scalars["statistics"]["uses"])
    assert largest(own["codes"]) > 0 and "codebook_loss" in scalars and (uses == 0).any() and uses.mean() == 1
    before = np.asarray(params["codes"]["vectors"])
    for codes in ("gradient", "average"):
        task = make_task(codes=codes, dead_below=0.1, code_decay=0.05)
        after = jax.jit(task.after_update)(params, scalars["statistics"], jax.random.key(0))
        moved = np.abs(np.asarray(after["codes"]["vectors"]) - before).max(1) > 1e-6
        assert moved[uses == 0].all() and moved[uses > 1].any() == (codes == "average"), codes
        assert np.asarray(after["running"]["uses"]).min() >= 0.05
        assert float(after["running"]["real"]) == pytest.approx(0.95 * float(scalars["logits_real"]), rel=1e-5)
    averaged = np.asarray(scalars["statistics"]["sums"])[uses > 1] / uses[uses > 1][:, None]
    same(np.asarray(after["codes"]["vectors"])[uses > 1], averaged, atol=0.05 * np.abs(averaged).max() + 0.05)


def test_codes_start_as_clusters_of_features():
    images = draw_images(32)
    task = make_task(start=images, codes="average", init="clusters")
    params, plain = new_params(task), new_params(make_task())
    codes, features = np.asarray(params["codes"]["vectors"]), task.tokenizer.features(params, images)
    same(params["encoder"], plain["encoder"])
    distances = np.linalg.norm(np.asarray(features).reshape(-1, 1, 6) - codes, axis=-1)
    assert distances.min(1).mean() < 0.5 * np.linalg.norm(np.asarray(features), axis=-1).mean()
    assert len(np.unique(distances.argmin(1))) == 24


def test_gumbel_has_a_gradient_for_logits_and_codes():
    params = new_params(make_task(GUMBEL))
    assert set(params["running"]) == {"real", "fake"}
    _, scalars, own, _ = gradients(params, options=GUMBEL)
    assert largest(own["logits"]) > 1e-5 and largest(own["encoder"]) > 1e-6, "the straight-through gradient"
    assert largest(own["codes"]) > 1e-4 and float(scalars["kl_nats"]) > 0
    task = make_task(GUMBEL)
    after = jax.jit(task.after_update)(params, scalars["statistics"], jax.random.key(0))
    same(after["codes"], params["codes"])


# -- a training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    return Run(make_task(codes="average", dead_below=0.03, start=draw_images(32), init="clusters"))


def test_it_learns_a_few_images(run):
    task = make_task()
    before = task.evaluate(run.state.params, {}, [batch()], jax.random.key(0))
    state = run.train(60)
    after = task.evaluate(state.params, {}, [batch()], jax.random.key(0))
    assert after["psnr"] > before["psnr"] + 4
    apart = [each["logits_real"] - each["logits_fake"] for each in run.scalars[-30:]]
    assert np.mean(apart) > 0, "the discriminator tells them apart, though not in each single update"
    assert np.isfinite([list(each.values()) for each in run.scalars]).all()
    shown = task.preview(state.params, {}, {**batch(), "index": np.arange(8)}, jax.random.key(0))
    assert shown.dtype == np.uint8


def test_resumed_equals_uninterrupted(run):
    whole = run.train(6)
    stored = jax.tree.map(np.asarray, run.train(3))
    resumed = run.train(3, jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), stored, whole))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.slow
def test_a_mesh_of_devices_computes_the_same_update():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    batchwise = dataclasses.replace(DISCRIMINATOR, norm="batch")
    task = make_task(discriminator=batchwise)
    whole, split = (Run(task, mesh).train(1).params for mesh in ((1, 1, 1), (2, 2, 2)))
    for name in ("decoder", "discriminator", "codes"):
        same(split[name], whole[name], rtol=1e-2, atol=1e-2)


def test_a_prior_reads_the_tokenizer_only(run):
    params = run.state.params
    assert {"discriminator", "running"} < set(params)
    own = tokenizers.own_params(VQGANTokenizer(OPTIONS), params)
    assert set(params) - set(own) == {"discriminator", "running"}
    assert jax.tree.structure(own) == jax.tree.structure(nn.meta.unbox(jax.eval_shape(
        VQGANTokenizer(OPTIONS).init, jax.random.key(0))))  # fmt: skip


# -- a CLIP as the perceptual loss --------------------------------------------------------------------------------


def test_a_clip_takes_the_place_of_lpips():
    """Its distance is in the loss with its weight, has a gradient, and is measured in evaluations."""
    clip = CLIPOptions(
        image_size=16, patch=8, image_width=16, image_depth=2, image_heads=2, text_width=16, text_depth=1, text_heads=2,
        embed_dim=8, text_length=4, text_vocab=9, end_id=8,
    )  # fmt: skip
    params = nn.meta.unbox(jax.jit(CLIP(clip).init)(jax.random.key(5)))["image"]
    plain = make_task(weights=(0.0, 0.0))
    objective = dataclasses.replace(plain.objective, perceptual_weight=3.0, clip="a folder")
    task = VQGANTask(
        VQGANTokenizer(OPTIONS), objective, DISCRIMINATOR, plain.schedules, (ClipDistance(clip), params)
    )  # fmt: skip
    own, step = new_params(plain), jnp.int32(0)
    update = lambda one: jax.jit(jax.value_and_grad(one.loss, has_aux=True))(
        own, one.frozen, batch(), jax.random.key(0), step
    )
    (without, _), pixels_only = update(plain)
    (loss, scalars), grads = update(task)
    assert float(scalars["perceptual_loss"]) > 0.01
    np.testing.assert_allclose(loss - without, 3 * scalars["perceptual_loss"], rtol=1e-4)
    assert different(grads["encoder"], pixels_only["encoder"])
    metrics = task.evaluate(own, task.frozen, [batch()], jax.random.key(0))
    assert task.best_metric == "clip_distance" and metrics["clip_distance"] > 0.01


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"pixel_loss": "l3"}, "pixel_loss"),
        ({"adversarial": "wasserstein"}, "adversarial"),
        ({"codes": "frozen"}, "codes"),
        ({"init": "blocks"}, "init"),
        ({"r1": -1.0}, "r1"),
        ({"entropy_temperature": 0.0}, "entropy_temperature"),
        ({"dead_below": 1.0}, "dead_below"),
    ],
)
def test_objectives_that_make_no_sense_are_rejected(values, key):
    with pytest.raises(ConfigError, match=key):
        VQGANObjectiveOptions(**values)


@pytest.mark.parametrize(
    ("values", "key"), [({"layers": 0}, "layers"), ({"filters": 0}, "filters"), ({"norm": "layer"}, "norm")]
)
def test_discriminators_that_make_no_sense_are_rejected(values, key):
    with pytest.raises(ConfigError, match=key):
        DiscriminatorOptions(**values)


def test_images_too_small_for_the_discriminator():
    with pytest.raises(ConfigError, match="layers to 2"):
        make_task(discriminator=DiscriminatorOptions(layers=3))
